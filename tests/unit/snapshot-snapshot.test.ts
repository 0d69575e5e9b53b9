import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, readdirSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { openSnapshot, parseSnapshot, readPageBitmap } from "../../src/snapshot/snapshot.ts";
import { buildSnapshot, CountingSource, refusalOf } from "../helpers/snapshot-builder.ts";

let directory = "";
beforeAll(() => {
  directory = mkdtempSync(join(tmpdir(), "fsl-snapshot-"));
  writeFileSync(join(directory, "good.snap"), buildSnapshot().bytes);
});
afterAll(() => rmSync(directory, { recursive: true }));

function openDescriptors(): number {
  return readdirSync("/proc/self/fd").length;
}

describe("openSnapshot", () => {
  test("gives everything that the file says", () => {
    const path = join(directory, "good.snap");
    using snapshot = openSnapshot(path);
    expect(snapshot).toMatchObject({
      path,
      fileLength: 83217,
      streamOffset: 0,
      machineType: "pc-q35-10.0",
      capabilities: ["mapped-ram"],
      uuid: null,
      targetPageBits: null,
      libvirt: null,
    });
    expect(snapshot.identity.size).toBe(83217);
    expect(snapshot.identity.mtimeNs).toMatch(/^\d{15,}$/);
    expect(snapshot.blocks.map((block) => block.idstr)).toEqual(["pc.ram", "pc.bios"]);
    expect(snapshot.globalState?.runState).toBe("paused");
    expect(snapshot.sections.length).toBe(8);
    expect(snapshot.vmdescription).not.toBeNull();
  });

  test("keeps reading the same file when its name is given to another", () => {
    const path = join(directory, "moving.snap");
    writeFileSync(path, buildSnapshot().bytes);
    using snapshot = openSnapshot(path);
    writeFileSync(join(directory, "other"), "nothing");
    renameSync(join(directory, "other"), path);
    const [block] = snapshot.blocks;
    expect(block && snapshot.pageBitmap(block).dataPages).toBe(8);
  });

  test("opens its descriptor close-on-exec and read-only", () => {
    using snapshot = openSnapshot(join(directory, "good.snap"));
    const flags =
      /flags:\s*(\d+)/.exec(readFileSync(`/proc/self/fdinfo/${snapshot.fd}`, "utf8"))?.[1] ?? "";
    expect(Number.parseInt(flags, 8) & 0o2000000).toBe(0o2000000);
    expect(Number.parseInt(flags, 8) & 0o3).toBe(0);
  });

  test("can be closed twice, and says so when it is used after that", () => {
    const snapshot = openSnapshot(join(directory, "good.snap"));
    const [block] = snapshot.blocks;
    snapshot.close();
    snapshot.close();
    expect(() => snapshot.fd).toThrow("is closed");
    expect(() => block && snapshot.pageBitmap(block)).toThrow("is closed");
    expect(snapshot.machineType).toBe("pc-q35-10.0");
  });

  test("leaves no descriptor behind when it refuses a file", () => {
    writeFileSync(join(directory, "bad.snap"), "this is no snapshot");
    const before = openDescriptors();
    refusalOf(() => openSnapshot(join(directory, "bad.snap")));
    expect(openDescriptors()).toBe(before);
  });

  test("refuses a missing file with SNAPSHOT_OPEN and the system's reason", () => {
    const path = join(directory, "missing.snap");
    const error = refusalOf(() => openSnapshot(path));
    expect(error.code).toBe("SNAPSHOT_OPEN");
    expect(error.message).toBe(`snapshot: cannot open: ENOENT (${path})`);
    expect(error.details).toEqual({ path, reason: "ENOENT" });
  });

  test.each([
    ["a directory", "/proc"],
    ["a device", "/dev/zero"],
  ])("refuses %s", (_name, path) => {
    expect(refusalOf(() => openSnapshot(path)).code).toBe("SNAPSHOT_OPEN");
  });

  test("refuses a FIFO without waiting for a writer", () => {
    const path = join(directory, "fifo");
    execFileSync("mkfifo", [path]);
    expect(refusalOf(() => openSnapshot(path)).code).toBe("SNAPSHOT_OPEN");
  });
});

describe("parseSnapshot", () => {
  test("reads metadata only", () => {
    const blocks = [{ idstr: "pc.ram", pages: "D".repeat(4096) }];
    const source = new CountingSource(buildSnapshot({ blocks, pagesAlignment: 1024 * 1024 }).bytes);
    parseSnapshot(source);
    expect(source.byteLength).toBeGreaterThan(16_000_000);
    expect(source.reads).toBeLessThan(10);
    expect(source.bytesRead).toBeLessThan(300_000);
  });

  test("is an assertion failure with an offset that is no offset", () => {
    const source = new CountingSource(buildSnapshot().bytes);
    expect(() => parseSnapshot(source, { offset: -1 })).toThrow("stream offset");
  });
});

describe("readPageBitmap", () => {
  test("has one bit per page of the block, set for data", () => {
    const pages = "D..DS.D";
    const source = new CountingSource(
      buildSnapshot({ blocks: [{ idstr: "pc.ram", pages }] }).bytes,
    );
    const [block] = parseSnapshot(source).blocks;
    const bitmap = block && readPageBitmap(source, block);
    expect([...pages].map((_letter, page) => bitmap?.has(page))).toEqual(
      [...pages].map((letter) => letter === "D"),
    );
  });

  test("is an assertion failure for a block that was not saved", () => {
    const spec = {
      capabilities: ["x-ignore-shared", "mapped-ram"],
      blocks: [{ idstr: "s", pages: "D", notSaved: true }],
    };
    const source = new CountingSource(buildSnapshot(spec).bytes);
    const [block] = parseSnapshot(source).blocks;
    expect(() => block && readPageBitmap(source, block)).toThrow("has no bitmap");
  });
});
