/** The default page source: what it takes from where, and what a file that is cut short gives. */
import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import {
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  truncateSync,
} from "node:fs";
import { join } from "node:path";
import { SnapshotPageSource } from "../../src/source/snapshot-source.ts";
import type { PageBytes } from "../../src/source/page-source.ts";
import { EFAULT, ENODATA } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { patternPages } from "../helpers/kernel-target.ts";

const CACHE = join(import.meta.dir, "../../.cache");
const PAGE = 4096;
const PAGES = 1024;
/** Of page 0 in the file: no multiple of the host's page. */
const OFFSET = PAGE + 512;

let directory: string;
let path: string;
let fd: number;
let source: SnapshotPageSource;
let bytes: Uint8Array;
const answer: PageBytes = { state: "pending", address: 0, pages: 0, errno: 0 };

beforeEach(async () => {
  sys.load();
  // On a disk: what is on a tmpfs is always in the page cache.
  mkdirSync(CACHE, { recursive: true });
  directory = mkdtempSync(join(CACHE, "source-test-"));
  path = join(directory, "pages");
  bytes = patternPages(PAGES, 0x50);
  await Bun.write(path, Buffer.concat([new Uint8Array(OFFSET), bytes]));
  fd = openSync(path, "r");
  const block = { idstr: "ram", usedLength: PAGES * PAGE, pageSize: PAGE, pagesOffset: OFFSET };
  source = new SnapshotPageSource({ fd }, [block]);
});

afterEach(() => {
  source.close();
  closeSync(fd);
  rmSync(directory, { recursive: true });
});

/** Resolves pages. @returns what is at the address, or -errno */
function take(page: number, pages: number): Uint8Array | number {
  source.resolve(0, page, pages, answer);
  expect([answer.state, answer.pages, answer.errno]).toEqual(["ready", pages, 0]);
  const found = new Uint8Array(pages * PAGE);
  const target = sys.ptrOf(found);
  const read = sys.processVmReadv(process.pid, answer.address, target, found.length);
  return read === found.length ? found : read;
}

function expected(page: number, pages: number): Uint8Array {
  return bytes.subarray(page * PAGE, (page + pages) * PAGE);
}

/** Bytes of files that are in this process's page table, and of mappings of this file. */
function mappedBytes(): number {
  const maps = readFileSync("/proc/self/smaps", "latin1");
  const found = new RegExp(`${path}\\n[^]*?^Rss: +(\\d+) kB$`, "m").exec(maps);
  return Number(found?.[1]) * 1024;
}

describe("SnapshotPageSource", () => {
  test("a few pages that are in the page cache come without being mapped", () => {
    for (const [page, pages] of [
      [0, 1],
      [PAGES - 1, 1],
      [77, 16],
    ] as const) {
      expect(take(page, pages)).toEqual(expected(page, pages));
    }
    expect(mappedBytes()).toBe(0);
  });

  test("many pages come from the mapping, and leave it when they are released", () => {
    expect(take(100, 17)).toEqual(expected(100, 17));
    expect(mappedBytes()).toBeGreaterThanOrEqual(17 * PAGE);
    source.release(0, 100, 17);
    source.release(0, 0, PAGES);
    expect(mappedBytes()).toBe(0);
    // After that as before.
    expect(take(100, 17)).toEqual(expected(100, 17));
    source.release(0, 0, PAGES);
    expect(mappedBytes()).toBe(0);
  });

  test("pages that are not in the page cache come from the mapping, and the next time are", async () => {
    await Bun.$`sync ${path} && dd of=${path} oflag=nocache conv=notrunc count=0`.quiet();
    expect(source.isAtHand(0, 500, 1)).toBe(false);
    expect(take(500, 1)).toEqual(expected(500, 1));
    expect(mappedBytes()).toBeGreaterThanOrEqual(PAGE);
    source.release(0, 0, PAGES);
    expect(source.isAtHand(0, 500, 1)).toBe(true);
    expect(take(500, 1)).toEqual(expected(500, 1));
    expect(mappedBytes()).toBe(0);
  });

  test("pages that the file has no more of are no bytes, and it is known why", () => {
    truncateSync(path, OFFSET + 600 * PAGE);
    expect(take(599, 1)).toEqual(expected(599, 1));
    expect(take(700, 1)).toBe(-EFAULT);
    expect(source.diagnose(0, 700)).toBe(ENODATA);
    expect(source.diagnose(0, 599)).toBe(0);
  });
});
