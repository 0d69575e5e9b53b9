/** What of a block is written before resume, on this process's own memory. */
import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { isFslError } from "../../src/errors.ts";
import { writtenRanges } from "../../src/load/contents.ts";
import { BlockFiller, type BlockPlace } from "../../src/load/fill.ts";
import {
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  MAP_SHARED,
  PROT_READ,
  PROT_WRITE,
} from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";

const PAGE = 4096;
const PAGES = 64;
const LENGTH = PAGES * PAGE;
/** Pages 0, 3 to 6 and 40 have data; the file has stale bytes for the others. */
const DATA = Int32Array.of(0b1111001, 1 << 8);
const HAS_DATA = [0, 3, 4, 5, 6, 40];
const OFFSET = 3 * PAGE;

let directory: string;
let fd: number;
let hostAddr: number;
let memory: Uint8Array;
const path = (): string => join(directory, "snapshot");

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "fsl-fill-"));
  fd = openSync(path(), "w+");
  for (let page = 0; page < PAGES; page += 1) {
    writeSync(fd, new Uint8Array(PAGE).fill(page + 1), 0, PAGE, OFFSET + page * PAGE);
  }
  const flags = MAP_PRIVATE | MAP_ANONYMOUS;
  hostAddr = sys.check(sys.mmap(0, LENGTH, PROT_READ | PROT_WRITE, flags, -1, 0), "mmap");
  memory = new Uint8Array(sys.view(hostAddr, LENGTH));
});
afterEach(() => {
  sys.munmap(hostAddr, LENGTH);
  closeSync(fd);
  rmSync(directory, { recursive: true, force: true });
});

function place(): BlockPlace {
  return {
    idstr: "ram0",
    usedLength: LENGTH,
    pageSize: PAGE,
    pageCount: PAGES,
    bitmapOffset: 0,
    bitmapLength: 8,
    pagesOffset: OFFSET,
    notSaved: false,
    headerOffset: 0,
    hostAddr,
  } as BlockPlace;
}

/** First byte of every page; a page is all the same. */
function firstBytes(): number[] {
  return Array.from({ length: PAGES }, (_, page) => {
    const bytes = memory.subarray(page * PAGE, (page + 1) * PAGE);
    const first = bytes[0] ?? -1;
    return bytes.every((byte) => byte === first) ? first : -1;
  });
}

async function refusal(work: Promise<unknown>): Promise<string> {
  const error = await work.then(
    () => null,
    (reason: unknown) => reason,
  );
  return isFslError(error) ? error.code : String(error);
}

describe("fill.BlockFiller", () => {
  test("writes the data pages, and nothing else", async () => {
    memory.fill(0xee);
    const filler = new BlockFiller(process.pid, { fd, path: path() });
    await filler.writeData(place(), DATA);
    const expected = firstBytes().map((_, page) => (HAS_DATA.includes(page) ? page + 1 : 0xee));
    expect(firstBytes()).toEqual(expected);
    expect(filler.bytesWritten).toBe(HAS_DATA.length * PAGE);
  });

  test("writes zeros over pages of a range that are zero in the snapshot", async () => {
    memory.fill(0xee);
    const filler = new BlockFiller(process.pid, { fd, path: path() });
    await filler.writeZeros(place(), DATA, 2, 42);
    const isZeroed = (page: number): boolean => page >= 2 && page < 42 && !HAS_DATA.includes(page);
    const expected = firstBytes().map((_, page) => (isZeroed(page) ? 0 : 0xee));
    expect(firstBytes()).toEqual(expected);
  });

  test("says that the snapshot has become too short", async () => {
    ftruncateSync(fd, OFFSET + 4 * PAGE);
    const filler = new BlockFiller(process.pid, { fd, path: path() });
    expect(await refusal(filler.writeData(place(), DATA))).toBe("SNAPSHOT_OPEN");
  });

  test("says that the target is gone", async () => {
    const child = Bun.spawn(["true"]);
    await child.exited;
    const filler = new BlockFiller(child.pid, { fd, path: path() });
    expect(await refusal(filler.writeData(place(), DATA))).toBe("TARGET_LOST");
  });
});

describe("contents.writtenRanges", () => {
  test("finds what a file in memory has, within what is mapped of it", () => {
    const file = sys.check(sys.memfdCreate("fsl-fill-test", 0), "memfd_create");
    sys.check(sys.ftruncate(file, 4 * LENGTH), "ftruncate");
    const page = new Uint8Array(PAGE).fill(1);
    for (const index of [0, PAGES + 1, PAGES + 2, 2 * PAGES - 1, 2 * PAGES]) {
      writeSync(file, page, 0, PAGE, index * PAGE);
    }
    // Allocated only: zero.
    sys.check(sys.fallocate(file, 0, (PAGES + 20) * PAGE, PAGE), "fallocate");
    const access = PROT_READ | PROT_WRITE;
    const address = sys.check(sys.mmap(0, LENGTH, access, MAP_SHARED, file, LENGTH), "mmap");
    try {
      const pages = writtenRanges(process.pid, address, LENGTH, PAGE).flatMap(
        ({ startAddr, endAddr }) => [(startAddr - address) / PAGE, (endAddr - address) / PAGE],
      );
      expect(pages).toEqual([1, 3, 63, 64]);
    } finally {
      sys.munmap(address, LENGTH);
      sys.close(file);
    }
  });

  test("finds nothing in a file without contents", () => {
    const file = sys.check(sys.memfdCreate("fsl-fill-test", 0), "memfd_create");
    sys.check(sys.ftruncate(file, LENGTH), "ftruncate");
    const address = sys.check(sys.mmap(0, LENGTH, PROT_READ, MAP_SHARED, file, 0), "mmap");
    expect(writtenRanges(process.pid, address, LENGTH, PAGE)).toEqual([]);
    sys.munmap(address, LENGTH);
    sys.close(file);
  });
});
