import { describe, expect, test } from "bun:test";
import { parsePreloadMessage, preloadEnvironment } from "../../src/vmm/preload-protocol.ts";

function message(...words: number[]): Uint8Array {
  return new Uint8Array(Int32Array.from(words).buffer);
}

const MAGIC = 0x756c7366;

describe("parsePreloadMessage", () => {
  test("reads process and result", () => {
    expect(parsePreloadMessage(message(MAGIC, 2, 123, 7, 1, 0), [9])).toEqual({
      pid: 123,
      result: 7,
      helpers: [],
    });
    expect(parsePreloadMessage(message(MAGIC, 2, 123, -1, 2, 1), [])).toEqual({
      pid: 123,
      result: -1,
      helpers: [],
    });
  });

  test("pairs each helper with its socket", () => {
    const first = [124, 7, 0x4000_0000, 0x7f12, 0x40_0000, 0];
    const second = [125, 7, 0x4040_0000, 0x7f12, 0x40_0000, 0];
    const bytes = message(MAGIC, 2, 123, 7, 1, 0, ...first, ...second);
    const staging = { stagingLength: 0x40_0000, uffdFd: 7 };
    expect(parsePreloadMessage(bytes, [9, 10, 11])?.helpers).toEqual([
      { fd: 10, pid: 124, stagingAddr: 0x7f12_4000_0000, ...staging },
      { fd: 11, pid: 125, stagingAddr: 0x7f12_4040_0000, ...staging },
    ]);
  });

  test.each([
    ["a descriptor too few", [9]],
    ["a descriptor too many", [9, 10, 11]],
  ])("refuses one helper with %s", (_what, fds) => {
    const bytes = message(MAGIC, 2, 123, 7, 1, 0, 124, 7, 0x4000_0000, 0x7f12, 0x40_0000, 0);
    expect(parsePreloadMessage(bytes, fds)).toBeNull();
  });

  test.each([
    ["nothing", message()],
    ["a short message", message(MAGIC, 2, 123, 7, 1)],
    ["a long message", message(MAGIC, 2, 123, 7, 1, 0, 0)],
    ["another magic", message(MAGIC + 1, 2, 123, 7, 1, 0)],
    ["another version", message(MAGIC, 1, 123, 7, 1, 0)],
  ])("refuses %s", (_what, bytes) => {
    expect(parsePreloadMessage(bytes, [9])).toBeNull();
  });

  test("reads a message in the middle of a buffer", () => {
    const buffer = new Uint8Array(40);
    buffer.set(message(MAGIC, 2, 5, 6, 1, 0), 3);
    expect(parsePreloadMessage(buffer.subarray(3, 27), [9])?.pid).toBe(5);
  });
});

describe("preloadEnvironment", () => {
  const wishes = { helperTasks: 0, stagingSlots: 1, hugeHeap: false };

  test("adds its variables to the user's", () => {
    expect(preloadEnvironment({ HOME: "/h" }, 4, 5, wishes)).toEqual({
      HOME: "/h",
      FSL_PRELOAD: "4:5:c",
      LD_PRELOAD: "/proc/self/fd/5",
    });
  });

  test.each([
    [1, 1, "4:5:ch1s1"],
    [9, 24, "4:5:ch9s24"],
    [10, 256, "4:5:ch9s256"],
  ])("asks for %d helpers with %d slots each", (helperTasks, stagingSlots, expected) => {
    const asked = { ...wishes, helperTasks, stagingSlots };
    expect(preloadEnvironment({}, 4, 5, asked)["FSL_PRELOAD"]).toBe(expected);
  });

  test("keeps the user's own LD_PRELOAD behind it, and says what to put back", () => {
    expect(preloadEnvironment({ LD_PRELOAD: "a.so:b.so" }, 4, 5, wishes)).toEqual({
      FSL_PRELOAD: "4:5:c",
      FSL_PRELOAD_NEXT: "a.so:b.so",
      LD_PRELOAD: "/proc/self/fd/5:a.so:b.so",
    });
  });

  test("has the heap in huge pages, and says what of GLIBC_TUNABLES to put back", () => {
    const asked = { ...wishes, helperTasks: 3, hugeHeap: true };
    expect(preloadEnvironment({ GLIBC_TUNABLES: "" }, 4, 5, asked)).toEqual({
      FSL_PRELOAD: "4:5:cth3s1",
      LD_PRELOAD: "/proc/self/fd/5",
      GLIBC_TUNABLES: "glibc.malloc.hugetlb=1",
    });
    const own = "glibc.malloc.check=3";
    expect(preloadEnvironment({ GLIBC_TUNABLES: own }, 4, 5, asked)).toEqual({
      FSL_PRELOAD: "4:5:cth3s1",
      LD_PRELOAD: "/proc/self/fd/5",
      GLIBC_TUNABLES: `glibc.malloc.hugetlb=1:${own}`,
      FSL_TUNABLES_NEXT: own,
    });
  });

  test("puts nothing back that is not the user's own", () => {
    const env = { FSL_PRELOAD_NEXT: "a.so", FSL_TUNABLES_NEXT: "glibc.malloc.check=3" };
    const found = preloadEnvironment(env, 4, 5, { ...wishes, hugeHeap: true });
    expect(found["FSL_PRELOAD_NEXT"] ?? found["FSL_TUNABLES_NEXT"]).toBeUndefined();
  });

  test("leaves a heap alone that the user has tuned", () => {
    const own = "glibc.malloc.hugetlb=0";
    const asked = { ...wishes, hugeHeap: true };
    expect(preloadEnvironment({ GLIBC_TUNABLES: own }, 4, 5, asked)).toEqual({
      FSL_PRELOAD: "4:5:c",
      LD_PRELOAD: "/proc/self/fd/5",
      GLIBC_TUNABLES: own,
    });
  });
});
