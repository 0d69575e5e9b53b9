import { describe, expect, test } from "bun:test";
import { layOutDescriptors, spawnQemu } from "../../src/vmm/spawn.ts";
import { expectRefusal, refusalOf, runtimeDirectories } from "../helpers/qemu-vmm.ts";

describe("layOutDescriptors", () => {
  test.each([
    ["only fsl's", [], [20, 21], [20, 21], [3, 4]],
    ["the caller's keep their numbers", [3, 5], [20, 21], [3, 20, 5, 21], [4, 6]],
    ["gaps stay empty", [6], [20], [20, "ignore", "ignore", 6], [3]],
    ["none at all", [], [], [], []],
  ])("%s", (_what, inherited, own, slots, ownNumbers) => {
    expect(layOutDescriptors(inherited, own)).toEqual({ slots, ownNumbers } as never);
  });
});

describe("spawnQemu", () => {
  test("refuses a program that is not there, and leaves nothing behind", async () => {
    const before = runtimeDirectories();
    const error = await refusalOf(() => spawnQemu({ argv: ["no-such-qemu"] }));
    expectRefusal(error, "USAGE", /"no-such-qemu" was not found in PATH/);
    expect(runtimeDirectories()).toEqual(before);
  });

  test("refuses a command line before it starts anything", async () => {
    const error = await refusalOf(() => spawnQemu({ argv: ["true", "-incoming", "defer"] }));
    expectRefusal(error, "USAGE", /-incoming is refused/);
  });
});
