import { describe, expect, test } from "bun:test";
import { freeFdset } from "../../src/vmm/fdset.ts";

describe("freeFdset", () => {
  test.each([
    ["no sets", [], 64],
    ["low numbers", [{ "fdset-id": 0, fds: [] }, { "fdset-id": 63 }], 64],
    ["numbers in the way", [{ "fdset-id": 64 }, { "fdset-id": 70 }], 71],
    ["a number at the end", [{ "fdset-id": 2 ** 31 }, { "fdset-id": 2 ** 53 }], 64],
    ["rubbish", [null, 7, { "fdset-id": "64" }], 64],
    ["no list", { a: 1 }, 64],
  ])("%s", (_what, value, expected) => {
    expect(freeFdset({ ok: true, value })).toBe(expected);
  });

  test("does without the list", () => {
    expect(freeFdset({ ok: false, errorClass: "CommandNotFound", description: "" })).toBe(64);
  });
});
