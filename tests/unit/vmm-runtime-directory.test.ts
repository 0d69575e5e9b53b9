import { afterAll, describe, expect, test } from "bun:test";
import { chmodSync, existsSync, mkdirSync, statSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import {
  makeRuntimeDirectory,
  removeRuntimeDirectory,
  removeRuntimeDirectoryOf,
} from "../../src/vmm/runtime-directory.ts";
import { Scratch } from "../helpers/qemu-vmm.ts";

const scratch = new Scratch();
afterAll(() => scratch[Symbol.dispose]());

function directory(name: string, mode: number): string {
  const path = join(scratch.path, name);
  mkdirSync(path);
  chmodSync(path, mode);
  return path;
}

describe("makeRuntimeDirectory", () => {
  test("makes a private directory with a new name in XDG_RUNTIME_DIR", () => {
    const base = directory("own", 0o700);
    const first = makeRuntimeDirectory({ XDG_RUNTIME_DIR: base });
    const second = makeRuntimeDirectory({ XDG_RUNTIME_DIR: base });
    expect([dirname(first), dirname(second)]).toEqual([base, base]);
    expect(first).not.toBe(second);
    expect(statSync(first).mode & 0o7777).toBe(0o700);
  });

  test.each([
    ["is open to others", () => directory("open", 0o777)],
    ["is not there", () => join(scratch.path, "none")],
    ["is a file", () => scratch.file("file")],
  ])("goes elsewhere when XDG_RUNTIME_DIR %s", (_what, base) => {
    const runtime = base();
    const made = makeRuntimeDirectory({ XDG_RUNTIME_DIR: runtime });
    expect(dirname(made)).not.toBe(runtime);
    removeRuntimeDirectory(made);
    expect(existsSync(made)).toBe(false);
  });
});

describe("removeRuntimeDirectory", () => {
  test("does not mind a directory that is gone", () => {
    expect(() => removeRuntimeDirectory(join(scratch.path, "gone"))).not.toThrow();
  });
});

describe("removeRuntimeDirectoryOf", () => {
  test("removes the socket and its directory", () => {
    const made = makeRuntimeDirectory({ XDG_RUNTIME_DIR: directory("dead", 0o700) });
    writeFileSync(join(made, "qmp"), "");
    removeRuntimeDirectoryOf(join(made, "qmp"));
    expect(existsSync(made)).toBe(false);
  });

  test("leaves a directory of another shape alone", () => {
    const other = directory("other", 0o700);
    writeFileSync(join(other, "qmp"), "");
    removeRuntimeDirectoryOf(join(other, "qmp"));
    expect(existsSync(join(other, "qmp"))).toBe(true);
  });
});
