import { describe, expect, test } from "bun:test";
import { parsePreloadMessage, preloadEnvironment } from "../../src/vmm/preload-protocol.ts";

function message(...words: number[]): Uint8Array {
  return new Uint8Array(Int32Array.from(words).buffer);
}

const MAGIC = 0x756c7366;

describe("parsePreloadMessage", () => {
  test("reads process and result", () => {
    expect(parsePreloadMessage(message(MAGIC, 1, 123, 7, 1, 0))).toEqual({ pid: 123, result: 7 });
    expect(parsePreloadMessage(message(MAGIC, 1, 123, -1, 2, 1))).toEqual({ pid: 123, result: -1 });
  });

  test.each([
    ["nothing", message()],
    ["a short message", message(MAGIC, 1, 123, 7, 1)],
    ["a long message", message(MAGIC, 1, 123, 7, 1, 0, 0)],
    ["another magic", message(MAGIC + 1, 1, 123, 7, 1, 0)],
    ["another version", message(MAGIC, 2, 123, 7, 1, 0)],
  ])("refuses %s", (_what, bytes) => {
    expect(parsePreloadMessage(bytes)).toBeNull();
  });

  test("reads a message in the middle of a buffer", () => {
    const buffer = new Uint8Array(40);
    buffer.set(message(MAGIC, 1, 5, 6, 1, 0), 3);
    expect(parsePreloadMessage(buffer.subarray(3, 27))).toEqual({ pid: 5, result: 6 });
  });
});

describe("preloadEnvironment", () => {
  test("adds its variables to the user's", () => {
    expect(preloadEnvironment({ HOME: "/h" }, 4, 5)).toEqual({
      HOME: "/h",
      FSL_PRELOAD: "4:5:c",
      LD_PRELOAD: "/proc/self/fd/5",
    });
  });

  test("keeps the user's own LD_PRELOAD behind it, and says what to put back", () => {
    expect(preloadEnvironment({ LD_PRELOAD: "a.so:b.so" }, 4, 5)).toEqual({
      FSL_PRELOAD: "4:5:c",
      FSL_PRELOAD_NEXT: "a.so:b.so",
      LD_PRELOAD: "/proc/self/fd/5:a.so:b.so",
    });
  });
});
