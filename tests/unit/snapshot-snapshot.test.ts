import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { execFileSync } from "node:child_process";
import {
  closeSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readdirSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { planSeed, writeSeed } from "../../src/snapshot/seed.ts";
import { openSnapshot, parseSnapshot, readPageBitmap } from "../../src/snapshot/snapshot.ts";
import {
  buildSnapshot,
  CountingSource,
  fieldOffset,
  refusalOf,
} from "../helpers/snapshot-builder.ts";

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
    expect(error.message).toBe(`snapshot: cannot open: ENOENT, it does not exist (${path})`);
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

describe("openSnapshot of a sparse 64 GiB guest", () => {
  const usedLength = 64 * 1024 ** 3;
  const bitmapLength = usedLength / 4096 / 8;

  /**
   * Block record, then a hole of bitmap and pages with one bit set, then the tail of a small
   * snapshot.
   */
  function writeSparse(path: string): void {
    const small = buildSnapshot({ blocks: [{ idstr: "pc.ram", pages: "." }] });
    const bitmapOffset = fieldOffset(small, "pc.ram.bitmap");
    const pagesOffset = Math.ceil((bitmapOffset + bitmapLength) / 2 ** 20) * 2 ** 20;
    const corrupt = {
      "ram.total": usedLength + 4,
      "pc.ram.usedLength": usedLength,
      "pc.ram.pagesOffset": pagesOffset,
    };
    const built = buildSnapshot({ blocks: [{ idstr: "pc.ram", pages: "." }], corrupt });
    const tail = built.bytes.subarray(fieldOffset(built, "ram.eos"));
    const fd = openSync(path, "w");
    writeSync(fd, built.bytes, 0, bitmapOffset, 0);
    writeSync(fd, Uint8Array.of(0x80), 0, 1, bitmapOffset + bitmapLength - 1);
    writeSync(fd, tail, 0, tail.length, pagesOffset + usedLength);
    closeSync(fd);
  }

  test("takes some milliseconds, and so do bitmap and seed", () => {
    const path = join(directory, "64g.snap");
    writeSparse(path);
    openSnapshot(path).close(); // Compiles the code once.
    const startMs = performance.now();
    using snapshot = openSnapshot(path);
    const [ram] = snapshot.blocks;
    const run = ram && snapshot.pageBitmap(ram).nextDataRun(0);
    const plan = planSeed(snapshot, new Set(["pc.ram"]));
    const fd = openSync(join(directory, "64g.seed"), "w");
    writeSeed(plan, snapshot.fd, fd);
    closeSync(fd);
    // Typically 3 ms; the limit allows for a loaded machine.
    expect(performance.now() - startMs).toBeLessThan(1000);
    expect(run).toEqual({ startIndex: 16777215, endIndex: 16777216 });
    expect(plan.copyLength).toBeLessThan(10_000);
    expect(statSync(join(directory, "64g.seed")).blocks).toBeLessThan(100);
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
