import { describe, expect, test } from "bun:test";

import { PageBitmap, type PageRun } from "../../src/snapshot/page-bitmap.ts";

/** One letter per page: D data, . zero. */
function bitmapOf(pages: string): PageBitmap {
  const bytes = new Uint8Array(Math.ceil(pages.length / 64) * 8);
  [...pages].forEach((letter, page) => {
    if (letter === "D") bytes[page >> 3] = (bytes[page >> 3] ?? 0) | (1 << (page & 7));
  });
  return new PageBitmap(bytes, pages.length);
}

describe("PageBitmap.has", () => {
  test("takes page 0 from bit 0 of byte 0 and page 9 from bit 1 of byte 1", () => {
    const bitmap = new PageBitmap(Uint8Array.from([0x01, 0x02, 0, 0, 0, 0, 0, 0]), 64);
    expect(bitmap.has(0)).toBe(true);
    expect(bitmap.has(1)).toBe(false);
    expect(bitmap.has(9)).toBe(true);
    expect(bitmap.dataPages).toBe(2);
  });

  test("takes page 31 and 32 from neighbouring words", () => {
    const bitmap = bitmapOf(`${".".repeat(31)}DD${".".repeat(31)}`);
    expect([30, 31, 32, 33].map((page) => bitmap.has(page))).toEqual([false, true, true, false]);
  });

  test("is an assertion failure past the last page", () => {
    expect(() => bitmapOf("DD").has(2)).toThrow("page index 2 of 2");
  });

  test("masks bits behind the last page", () => {
    const bitmap = new PageBitmap(new Uint8Array(8).fill(0xff), 33);
    expect(bitmap.dataPages).toBe(33);
    expect(bitmap.nextZeroRun(0)).toBeNull();
    expect(bitmap.nextDataRun(0)).toEqual({ startIndex: 0, endIndex: 33 });
    expect(Array.from(bitmap.words)).toEqual([-1, 1]);
  });

  test("reads an unaligned view", () => {
    const backing = new Uint8Array(11);
    backing[3] = 0x81;
    const bitmap = new PageBitmap(backing.subarray(3), 8);
    expect(bitmap.nextDataRun(1)).toEqual({ startIndex: 7, endIndex: 8 });
  });
});

describe("PageBitmap.nextDataRun", () => {
  test.each([
    ["DD..D", 0, { startIndex: 0, endIndex: 2 }],
    ["DD..D", 1, { startIndex: 1, endIndex: 2 }],
    ["DD..D", 2, { startIndex: 4, endIndex: 5 }],
    ["DD..D", 5, null],
    [".....", 0, null],
    ["DDDDD", 0, { startIndex: 0, endIndex: 5 }],
    [`${"D".repeat(100)}.`, 40, { startIndex: 40, endIndex: 100 }],
    [`${".".repeat(200)}D`, 3, { startIndex: 200, endIndex: 201 }],
    ["D".repeat(64), 0, { startIndex: 0, endIndex: 64 }],
    ["D".repeat(64), 64, null],
  ])("%s from %i", (pages, fromIndex, expected) => {
    expect(bitmapOf(pages).nextDataRun(fromIndex)).toEqual(expected);
  });

  test("fills the run it is given and returns it", () => {
    const out: PageRun = { startIndex: -1, endIndex: -1 };
    expect(bitmapOf(".DD.").nextDataRun(0, out)).toBe(out);
    expect(out).toEqual({ startIndex: 1, endIndex: 3 });
  });
});

describe("PageBitmap.nextZeroRun", () => {
  test.each([
    ["DD..D", 0, { startIndex: 2, endIndex: 4 }],
    ["DD..D", 3, { startIndex: 3, endIndex: 4 }],
    ["DD..D", 4, null],
    ["D....", 0, { startIndex: 1, endIndex: 5 }],
    ["DDDDD", 0, null],
    [".".repeat(64), 0, { startIndex: 0, endIndex: 64 }],
    [`${"D".repeat(64)}.`, 0, { startIndex: 64, endIndex: 65 }],
  ])("%s from %i", (pages, fromIndex, expected) => {
    expect(bitmapOf(pages).nextZeroRun(fromIndex)).toEqual(expected);
  });
});

describe("PageBitmap of a 64 GiB block", () => {
  const pageCount = 16 * 1024 * 1024;

  test("is scanned and counted in a few milliseconds when it is sparse", () => {
    const bytes = new Uint8Array(pageCount / 8);
    bytes[bytes.length - 1] = 0x80;
    const startMs = performance.now();
    const bitmap = new PageBitmap(bytes, pageCount);
    expect(bitmap.nextDataRun(0)).toEqual({ startIndex: pageCount - 1, endIndex: pageCount });
    expect(bitmap.dataPages).toBe(1);
    // Typically 2 ms; the limit only catches a scan bit by bit on a loaded machine.
    expect(performance.now() - startMs).toBeLessThan(1000);
  });

  test("is scanned and counted in a few milliseconds when it is dense", () => {
    const startMs = performance.now();
    const bitmap = new PageBitmap(new Uint8Array(pageCount / 8).fill(0xff), pageCount);
    expect(bitmap.nextZeroRun(0)).toBeNull();
    expect(bitmap.dataPages).toBe(pageCount);
    expect(performance.now() - startMs).toBeLessThan(1000);
  });
});
