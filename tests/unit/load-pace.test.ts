import { describe, expect, test } from "bun:test";
import { Pace } from "../../src/load/pace.ts";

const MS = 1e6;

/** The number of the fault that made it so, counted from 1. @param isSpread each in an untouched chunk */
function foundAt(timesMs: readonly number[], isSpread = false): number | undefined {
  const pace = new Pace();
  const found = timesMs.findIndex((ms) => {
    const isBurst = pace.count(1e15 + ms * MS);
    return isSpread ? pace.countSpread() : isBurst;
  });
  return found < 0 ? undefined : found + 1;
}
const every = (count: number, ms: number): number[] =>
  Array.from({ length: count }, (_, index) => index * ms);

describe("Pace", () => {
  test.each([
    ["24 faults at once", every(30, 0), 24],
    ["one each 0.2 ms", every(30, 0.2), 24],
    ["23 at once", every(23, 0), undefined],
    ["one each 0.3 ms, up to 255", every(255, 0.3), undefined],
    ["the 256th, however slow", every(300, 50), 256],
    ["a burst after a slow start", [...every(10, 10), ...every(30, 0.1).map((ms) => 200 + ms)], 34],
    [
      "two halves of a burst, apart",
      [...every(12, 0), ...every(12, 0).map((ms) => 6 + ms)],
      undefined,
    ],
  ])("%s", (_what, timesMs, at) => {
    expect(foundAt(timesMs)).toBe(at);
  });

  test.each([
    ["8 at once", every(10, 0), 8],
    ["7 at once", every(7, 0), undefined],
    ["one each 0.25 ms", every(10, 0.25), 8],
    ["one each 0.3 ms", every(300, 0.3), undefined],
    ["slowly, then fast", [...every(5, 10), ...every(10, 0.1).map((ms) => 100 + ms)], 13],
  ])("in chunks that nobody had touched: %s", (_what, timesMs, at) => {
    expect(foundAt(timesMs, true)).toBe(at);
  });
});
