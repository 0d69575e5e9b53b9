import { describe, expect, test } from "bun:test";
import {
  countBits,
  countMissing,
  nextBit,
  nextMissing,
  runStart,
  setRange,
  testBit,
} from "../../src/bits.ts";

function words(bits: string): Int32Array {
  const result = new Int32Array(Math.ceil(bits.length / 32));
  for (const [index, bit] of [...bits].entries()) {
    if (bit === "1") result[index >>> 5] = (result[index >>> 5] ?? 0) | (1 << (index & 31));
  }
  return result;
}

function text(bitmap: Int32Array, length: number): string {
  return Array.from({ length }, (_, index) => (testBit(bitmap, index) ? "1" : "0")).join("");
}

describe("bits.setRange", () => {
  test.each([
    [0, 1],
    [31, 33],
    [0, 32],
    [5, 100],
    [64, 96],
    [7, 7],
  ])("sets exactly [%d, %d)", (start, end) => {
    const bitmap = new Int32Array(4);
    setRange(bitmap, start, end);
    const expected = Array.from({ length: 128 }, (_, i) => (i >= start && i < end ? "1" : "0"));
    expect(text(bitmap, 128)).toBe(expected.join(""));
  });

  test("keeps bits that are set already", () => {
    const bitmap = words("1000000000000000000000000000000010");
    setRange(bitmap, 2, 4);
    expect(text(bitmap, 34)).toBe("1011000000000000000000000000000010");
  });
});

describe("bits.nextMissing", () => {
  test("finds the next wanted page that is not done", () => {
    expect(nextMissing(words("0111"), words("0110"), 0, 4, true)).toBe(3);
  });

  test("finds the end of a run at a done page", () => {
    expect(nextMissing(words("1111"), words("0010"), 0, 4, false)).toBe(2);
  });

  test("crosses words", () => {
    const wanted = words(`${"0".repeat(70)}1`);
    expect(nextMissing(wanted, new Int32Array(3), 0, 71, true)).toBe(70);
  });

  test("answers the end when there is none", () => {
    expect(nextMissing(words("1110"), words("1110"), 0, 4, true)).toBe(4);
  });

  test("does not look past the end", () => {
    expect(nextMissing(words("00001"), new Int32Array(1), 0, 3, true)).toBe(3);
  });

  test("begins within a word", () => {
    expect(nextMissing(words("1001"), new Int32Array(1), 1, 4, true)).toBe(3);
  });
});

describe("bits.nextBit", () => {
  test("finds a clear bit in a full word", () => {
    const bitmap = new Int32Array([-1, 0b1011]);
    expect(nextBit(bitmap, 0, 64, false)).toBe(34);
  });

  test("finds bit 31", () => {
    expect(nextBit(new Int32Array([1 << 31]), 0, 32, true)).toBe(31);
  });

  test.each([true, false])("is right wherever it begins and ends: %p", (value) => {
    // Whole words of either kind, and words of both, at every distance from one another.
    const bitmap = new Int32Array([0, -1, 0, 0, 5, -1, -1, 1 << 31, 0, 0x7fffffff]);
    const { length } = bitmap;
    for (let start = 0; start <= 32 * length; start += 1) {
      let expected = 32 * length;
      for (let at = 32 * length - 1; at >= start; at -= 1) {
        if (testBit(bitmap, at) === value) expected = at;
      }
      for (const end of [start, start + 1, start + 33, 32 * length - 1, 32 * length]) {
        if (end > 32 * length) continue;
        const found = nextBit(bitmap, start, end, value);
        expect([start, end, found]).toEqual([
          start,
          end,
          start < end ? Math.min(expected, end) : end,
        ]);
      }
    }
  });

  test("behind the last word all bits are clear", () => {
    expect(nextBit(new Int32Array([0]), 0, 96, true)).toBe(96);
    expect(nextBit(new Int32Array([-1]), 0, 96, false)).toBe(32);
    expect(nextBit(new Int32Array([-1]), 40, 96, false)).toBe(40);
    expect(nextBit(new Int32Array([-1]), 40, 96, true)).toBe(96);
  });
});

describe("bits.runStart", () => {
  test("goes back to the first page of the run", () => {
    expect(runStart(words("110001"), 4, 0, false)).toBe(2);
  });

  test("stops at the floor", () => {
    expect(runStart(words("000000"), 4, 3, false)).toBe(3);
  });
});

describe("bits.count", () => {
  test("counts over words", () => {
    expect(countBits(new Int32Array([-1, 1, 1 << 31]))).toBe(34);
  });

  test("counts what is wanted and not done", () => {
    expect(countMissing(words("111100"), words("010100"))).toBe(2);
  });
});
