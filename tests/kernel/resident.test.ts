/** What is in memory, by both ways of asking the kernel: they must agree, and only Linux before 6.7 uses the second. */
import { afterEach, describe, expect, test } from "bun:test";
import { closeSync, openSync } from "node:fs";
import { readPagemap, residentRanges, scanPagemap } from "../../src/load/resident.ts";
import { MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE } from "../../src/sys/abi.ts";
import { HOST_PAGE_LENGTH } from "../../src/sys/host-pages.ts";
import * as sys from "../../src/sys/native.ts";

/** @source Linux include/uapi/asm-generic/mman-common.h */
const MAP_NORESERVE = 0x4000;
const MADV_NOHUGEPAGE = 15;

/** More than is read at once: 65,536 pages. */
const PAGES = 3 * 65_536 + 17;
const LENGTH = PAGES * HOST_PAGE_LENGTH;

let address = 0;
afterEach(() => {
  sys.munmap(address, LENGTH);
});

/** Memory in which these pages have been touched. */
function touched(pages: readonly number[]): void {
  const flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  address = sys.check(sys.mmap(0, LENGTH, PROT_READ | PROT_WRITE, flags, -1, 0), "mmap");
  sys.check(sys.madvise(address, LENGTH, MADV_NOHUGEPAGE), "madvise");
  for (const page of pages) {
    new Uint8Array(sys.view(address + page * HOST_PAGE_LENGTH, HOST_PAGE_LENGTH))[0] = 1;
  }
}

/** As ranges of pages. */
function rangesBy(ask: (fd: number) => { startAddr: number; endAddr: number }[]): number[][] {
  const fd = openSync("/proc/self/pagemap", "r");
  try {
    return ask(fd).map(({ startAddr, endAddr }) => [
      (startAddr - address) / HOST_PAGE_LENGTH,
      (endAddr - address) / HOST_PAGE_LENGTH,
    ]);
  } finally {
    closeSync(fd);
  }
}

/** So many pages, none beside another. */
function everyOther(count: number): [string, number[], number[][]] {
  const pages = Array.from({ length: count }, (_, index) => 65_000 + 2 * index);
  return [`${count} of every other one`, pages, pages.map((page) => [page, page + 1])];
}

describe("pages in memory", () => {
  test.each<[string, number[], number[][]]>([
    ["none", [], []],
    [
      "the first and the last",
      [0, PAGES - 1],
      [
        [0, 1],
        [PAGES - 1, PAGES],
      ],
    ],
    ["on both sides of what is read at once", [65_535, 65_536], [[65_535, 65_537]]],
    ["one in the middle of nothing", [100_000], [[100_000, 100_001]]],
    ["all of what is read at once", range(65_536, 131_072), [[65_536, 131_072]]],
    // More than the kernel collects at once (512), and than it is asked for at once (1024).
    ...[700, 1024, 1536, 2500].map((count) => everyOther(count)),
  ])("%s", (_, pages, expected) => {
    touched(pages);
    const end = address + LENGTH;
    expect(rangesBy((fd) => readPagemap(fd, address, LENGTH))).toEqual(expected);
    // null: this kernel has no PAGEMAP_SCAN, and nothing to compare with.
    const scanned = rangesBy(
      (fd) => scanPagemap(fd, address, end) ?? readPagemap(fd, address, LENGTH),
    );
    expect(scanned).toEqual(expected);
    expect(rangesBy(() => residentRanges(process.pid, address, LENGTH))).toEqual(expected);
  });
});

function range(start: number, end: number): number[] {
  return Array.from({ length: end - start }, (_, index) => start + index);
}
