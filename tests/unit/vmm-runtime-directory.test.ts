import { afterAll, describe, expect, test } from "bun:test";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import * as native from "../../src/sys/native.ts";
import {
  makeRuntimeDirectory,
  removeRuntimeDirectory,
  removeRuntimeDirectoryOf,
  removeStaleDirectories,
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

describe("removeStaleDirectories", () => {
  test("takes what nobody has any more, and nothing else", () => {
    const base = directory("stale", 0o700);
    const make = (name: string, isOld = true): string => {
      const path = join(base, name);
      mkdirSync(path);
      if (isOld) utimesSync(path, new Date(0), new Date(0));
      return path;
    };
    const bind = (name: string, isOld: boolean): number => {
      const path = make(name, false);
      const socket = native.check(native.unixListen(join(path, "qmp"), 1), "listen");
      if (isOld) utimesSync(path, new Date(0), new Date(0));
      return socket;
    };
    make("fsl-empty0");
    make("fsl-young0", false);
    make("fsl-empty0-not");
    make("other");
    writeFileSync(join(make("fsl-files0"), "notes"), "");
    utimesSync(join(base, "fsl-files0"), new Date(0), new Date(0));
    const living = bind("fsl-living", true);
    native.close(bind("fsl-dead00", true));
    native.close(bind("fsl-dead01", false));
    removeStaleDirectories(base);
    const left = [
      "fsl-dead01",
      "fsl-empty0-not",
      "fsl-files0",
      "fsl-living",
      "fsl-young0",
      "other",
    ];
    expect(readdirSync(base).toSorted()).toEqual(left);
    // Who listens has noticed nothing.
    const socket = native.unixConnect(join(base, "fsl-living", "qmp"));
    expect(socket).toBeGreaterThan(0);
    for (const fd of [socket, living]) native.close(fd);
    removeStaleDirectories(join(base, "none"));
  });
});
