import { afterAll, describe, expect, test } from "bun:test";
import { chmodSync } from "node:fs";
import { layOutDescriptors, spawnQemu } from "../../src/vmm/spawn.ts";
import {
  expectRefusal,
  ownDescriptors,
  ownRuntimeDirectory,
  refusalOf,
  Scratch,
} from "../helpers/qemu-vmm.ts";

const runtime = new Scratch();
const runtimeDirectories = ownRuntimeDirectory(runtime);
afterAll(() => runtime[Symbol.dispose]());

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

  test("says why a program cannot be started, and leaves nothing behind", async () => {
    using scratch = new Scratch();
    const program = scratch.file("no-program", "neither ELF nor script\n");
    chmodSync(program, 0o755);
    const before = { directories: runtimeDirectories(), descriptors: ownDescriptors().length };
    const error = await refusalOf(() => spawnQemu({ argv: [program] }));
    expectRefusal(error, "USAGE", /no-program" cannot be started \(ENOEXEC\)/);
    expect(runtimeDirectories()).toEqual(before.directories);
    expect(ownDescriptors().length).toBe(before.descriptors);
  });

  test("refuses a command line before it starts anything", async () => {
    const error = await refusalOf(() => spawnQemu({ argv: ["true", "-incoming", "defer"] }));
    expectRefusal(error, "USAGE", /-incoming is refused/);
  });
});
