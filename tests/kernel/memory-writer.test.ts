/**
 * What of a block is written before resume, and where its bytes come from, on this process's own
 * memory.
 */
import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type FslError, isFslError } from "../../src/errors.ts";
import { writtenRanges } from "../../src/load/contents.ts";
import { type BlockPlace, MemoryWriter } from "../../src/load/memory-writer.ts";
import { PageReader, type WritePages } from "../../src/load/page-reader.ts";
import type { PageSourceSpec } from "../../src/index.ts";
import { patternPage, type TestSourceOptions } from "../helpers/load-sources.ts";
import {
  EIO,
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
let reader: PageReader;
let writer: MemoryWriter;
const readers: PageReader[] = [];
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
  reader = readerOf({ options: { fd } });
  writer = new MemoryWriter(process.pid);
});
afterEach(() => {
  writer.close();
  for (const one of readers.splice(0)) one.close();
  sys.munmap(hostAddr, LENGTH);
  closeSync(fd);
  rmSync(directory, { recursive: true, force: true });
});

function place(): BlockPlace {
  return {
    idstr: "ram0",
    pageSize: PAGE,
    hostAddr,
  };
}

/** First byte of every page; a page is all the same. */
function firstBytes(): number[] {
  return Array.from({ length: PAGES }, (_, page) => {
    const bytes = memory.subarray(page * PAGE, (page + 1) * PAGE);
    const first = bytes[0] ?? -1;
    return bytes.every((byte) => byte === first) ? first : -1;
  });
}

function readerOf(
  source: PageSourceSpec,
  watched = process.pid,
  mayRead?: () => Promise<void>,
): PageReader {
  const one = new PageReader({
    source,
    blocks: [{ idstr: "ram0", usedLength: LENGTH, pageSize: PAGE, pagesOffset: OFFSET }],
    snapshotPath: path(),
    pidfd: sys.check(sys.pidfdOpen(watched, 0), "pidfd_open"),
    mayRead,
  });
  readers.push(one);
  return one;
}

async function writePages(from: PageReader, first: number, end: number): Promise<void> {
  await writer.writeZeros(place(), DATA, first, end, false);
  await writer.writeData(from, place(), DATA, first, end);
}

/** A source of somebody else's: see load-sources.ts. */
function source(kind: TestSourceOptions["kind"], more: Partial<TestSourceOptions> = {}) {
  const module = join(import.meta.dir, "../helpers/load-sources.ts");
  return { module, options: { kind, path: path(), ...more } };
}

/** What the pages of this block are by kind `pattern`, as `firstBytes` would have it. */
function isPattern(page: number): boolean {
  const bytes = memory.subarray(page * PAGE, (page + 1) * PAGE);
  return Buffer.compare(bytes, patternPage("ram0", page, PAGE)) === 0;
}

async function refused(work: Promise<unknown>): Promise<FslError> {
  const error = await work.then(
    () => null,
    (reason: unknown) => reason,
  );
  if (!isFslError(error)) throw new Error(`was not refused: ${String(error)}`);
  return error;
}

async function refusal(work: Promise<unknown>): Promise<string> {
  return (await refused(work)).code;
}

describe("MemoryWriter", () => {
  test("writes data pages, and zeros over those that are zero in the snapshot", async () => {
    memory.fill(0xee);
    await writePages(reader, 2, 42);
    const expected = firstBytes().map((_, page) => {
      if (page < 2 || page >= 42) return 0xee;
      return HAS_DATA.includes(page) ? page + 1 : 0;
    });
    expect(firstBytes()).toEqual(expected);
    expect(writer.bytesWritten).toBe(40 * PAGE);
  });

  test("writes the data pages, and nothing else", async () => {
    memory.fill(0xee);
    await writer.writeData(reader, place(), DATA, 0, PAGES);
    const expected = firstBytes().map((_, page) => (HAS_DATA.includes(page) ? page + 1 : 0xee));
    expect(firstBytes()).toEqual(expected);
    expect(writer.bytesWritten).toBe(HAS_DATA.length * PAGE);
  });

  test("writes zeros over pages of a range that are zero in the snapshot", async () => {
    memory.fill(0xee);
    await writer.writeZeros(place(), DATA, 2, 42, false);
    const isZeroed = (page: number): boolean => page >= 2 && page < 42 && !HAS_DATA.includes(page);
    const expected = firstBytes().map((_, page) => (isZeroed(page) ? 0 : 0xee));
    expect(firstBytes()).toEqual(expected);
  });

  test("says that the snapshot has become too short, and where", async () => {
    ftruncateSync(fd, OFFSET + 4 * PAGE);
    const error = await refused(writer.writeData(reader, place(), DATA, 0, PAGES));
    expect(error.code).toBe("SNAPSHOT_OPEN");
    expect(error.message).toContain("page 4 of RAMBlock ram0 at 0x7000 cannot be read");
  });

  test("says that the target is gone", async () => {
    const child = Bun.spawn(["true"]);
    await child.exited;
    const late = new MemoryWriter(child.pid);
    expect(await refusal(late.writeData(reader, place(), DATA, 0, PAGES))).toBe("TARGET_LOST");
    late.close();
  });

  test("says that it is the source whose bytes cannot be taken, also when that has no reason", async () => {
    const mute = {
      each: (_: string, __: Int32Array, ___: number, ____: number, take: WritePages) =>
        take(PAGE, 3, 2),
      diagnose: () => null,
      unreadable: (idstr: string, page: number) => reader.unreadable(idstr, page),
    } as unknown as PageReader;
    const error = await refused(writer.writeData(mute, place(), DATA, 0, PAGES));
    expect(error.code).toBe("SNAPSHOT_OPEN");
    expect(error.message).toContain("page 3 of RAMBlock ram0 at 0x6000 cannot be read");
  });

  test("says that memory is not mapped", async () => {
    const nowhere = { ...place(), hostAddr: PAGE };
    const error = await refused(writer.writeData(reader, nowhere, DATA, 0, PAGES));
    expect(error.code).toBe("TARGET_LOST");
    expect(error.message).toContain("at 0x1000: cannot be written: EIO");
  });
});

describe("MemoryWriter with a page source of somebody else's", () => {
  const write = (from: PageReader): Promise<void> => writePages(from, 0, PAGES);

  test("takes every byte from it", async () => {
    await write(readerOf(source("pattern")));
    expect(HAS_DATA.filter((page) => !isPattern(page))).toEqual([]);
  });

  test.each(["later", "thread"] as const)("waits for what is pending: %s", async (kind) => {
    await write(readerOf(source(kind)));
    const expected = firstBytes().map((__, page) => (HAS_DATA.includes(page) ? page + 1 : 0));
    expect(firstBytes()).toEqual(expected);
  });

  test("says which page cannot be had, and why", async () => {
    const error = await refused(write(readerOf(source("failing", { failPage: 5 }))));
    expect(error.code).toBe("SNAPSHOT_OPEN");
    expect(error.message).toMatch(/^page source .*: page 5 of RAMBlock ram0 cannot be read: .*EIO/);
    expect(error.details).toMatchObject({ idstr: "ram0", page: 5, errno: EIO });
  });

  test("waits no longer for it than for the target", async () => {
    const child = Bun.spawn(["sleep", "0.05"]);
    expect(await refusal(write(readerOf(source("never"), child.pid)))).toBe("TARGET_LOST");
  });

  test("waits no longer for it than the caller wants", async () => {
    const cancel = AbortSignal.timeout(50);
    const mayRead = async (): Promise<void> => cancel.throwIfAborted();
    const work = write(readerOf(source("never"), process.pid, mayRead));
    expect(String(await work.catch(String))).toContain("TimeoutError");
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
