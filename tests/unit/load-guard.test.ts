import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { closeSync, fstatSync, mkdtempSync, openSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { FslError } from "../../src/errors.ts";
import { type GuardedFile, SnapshotGuard } from "../../src/load/guard.ts";

let directory: string;
let fd: number;
let file: GuardedFile;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "fsl-guard-"));
  const path = join(directory, "a.snap");
  writeFileSync(path, "snapshot");
  fd = openSync(path, "r");
  const { size, mtimeNs } = fstatSync(fd, { bigint: true });
  file = { path, fd, identity: { size: Number(size), mtimeNs: String(mtimeNs) } };
});
afterEach(() => {
  closeSync(fd);
  rmSync(directory, { recursive: true, force: true });
});

async function refusal(work: Promise<SnapshotGuard>): Promise<FslError> {
  try {
    (await work).close();
  } catch (error) {
    if (error instanceof FslError) return error;
    throw error;
  }
  throw new Error("was not refused");
}

describe("SnapshotGuard.take", () => {
  test("takes a file that nobody writes to", async () => {
    const guard = await SnapshotGuard.take(file);
    expect(guard.look()).toBe(true);
    guard.close();
  });

  test("waits for a writer that is about to close the file", async () => {
    const writer = openSync(file.path, "r+");
    const taken = SnapshotGuard.take(file);
    // It has found the writer by now: it looks before it waits.
    closeSync(writer);
    const guard = await taken;
    expect(guard.isLeased).toBe(true);
    guard.close();
  });

  test("refuses a file that stays open for writing", async () => {
    const writer = openSync(file.path, "r+");
    const error = await refusal(SnapshotGuard.take(file, 20));
    closeSync(writer);
    expect([error.code, error.exitCode]).toEqual(["SNAPSHOT_OPEN", 3]);
    expect(error.message).toBe(
      `${file.path}: another process has it open for writing; wait until it is saved`,
    );
  });

  test("refuses at once a file that was changed after it was opened", async () => {
    writeFileSync(file.path, "something longer");
    expect((await refusal(SnapshotGuard.take(file, 60_000))).code).toBe("SNAPSHOT_OPEN");
  });
});
