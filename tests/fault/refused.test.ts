/**
 * What the host does not grant: userfaultfd, ptrace, descriptors, file sizes, disk space. Either
 * it works all the same, or the message says what mends it; nothing is left behind, and no guest
 * runs on half its memory.
 */
import { describe, expect, test } from "bun:test";
import { chmodSync, copyFileSync, existsSync, mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { FaultRun } from "../helpers/fault-runs.ts";
import { snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import { differencesFromOracle, differencesOfBareGuest } from "../helpers/load-oracle.ts";
import { whyNoExecutable } from "../helpers/load-runs.ts";
import { isUserfaultfdRefused, NOBODY, Published } from "../helpers/published.ts";

const TIMEOUT_MS = 60_000;
const BARE = { guest: "bare" } as const;
const reason =
  whyNoExecutable() ?? whyNoGuests() ?? (process.getuid?.() === 0 ? null : "other users need root");

async function shell(...argv: string[]): Promise<void> {
  const child = Bun.spawn(argv, { stdout: "ignore", stderr: "pipe" });
  if ((await child.exited) !== 0) throw new Error(await new Response(child.stderr).text());
}

describe.skipIf(reason !== null || !isUserfaultfdRefused())("an ordinary user", () => {
  test(
    "without access to /dev/userfaultfd is told what mends it",
    async () => {
      const snapshot = await snapshotOf(BARE);
      using published = new Published(snapshot);
      await using run = await FaultRun.start(snapshot, {
        path: published.snapshot,
        argv: published.argv,
        program: [published.fsl, "load"],
        uid: NOBODY,
      });
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain("/dev/userfaultfd cannot be opened (EACCES)");
      expect(stderr).toMatch(/run: setfacl -m u:nobody:rw \/dev\/userfaultfd #/);
      expect(code).toBe(6);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "with access to /dev/userfaultfd loads every byte",
    async () => {
      const snapshot = await snapshotOf(BARE);
      using published = new Published(snapshot);
      await using run = await FaultRun.start(snapshot, {
        path: published.snapshot,
        argv: published.argv,
        program: [published.fsl, "load"],
        flags: ["--paused"],
        prefix: await published.withDevice(),
        uid: NOBODY,
      });
      await run.fsl.stderr.waitFor(/all RAM in after/);
      const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
      expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
      await run.qmp.execute("quit");
      expect((await run.fsl.end()).code).toBe(0);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "who may not read the snapshot is told so",
    async () => {
      const snapshot = await snapshotOf(BARE);
      using published = new Published(snapshot);
      chmodSync(published.snapshot, 0o600);
      await using run = await FaultRun.start(snapshot, {
        path: published.snapshot,
        argv: published.argv,
        program: [published.fsl, "load"],
        uid: NOBODY,
      });
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain("snapshot: cannot open: EACCES");
      expect(code).toBe(3);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(reason !== null)("a limit", () => {
  test.each([12, 24, 63])(
    "of %d descriptors is told before anything is started",
    async (limit) => {
      const prefix = ["prlimit", `--nofile=${limit}:${limit}`];
      await using run = await FaultRun.start(await snapshotOf(BARE), { prefix });
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain(`descriptor limit: expected at least 64, found ${limit}`);
      expect(stderr).toContain("run: ulimit -n 1024");
      expect(code).toBe(6);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "of 64 descriptors is enough, with eight eager Workers",
    async () => {
      const snapshot = await snapshotOf(BARE);
      await using run = await FaultRun.start(snapshot, {
        flags: ["--paused", "--eager-workers", "8"],
        prefix: ["prlimit", "--nofile=64:64"],
      });
      await run.fsl.stderr.waitFor(/all RAM in after/);
      const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
      expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
      await run.qmp.execute("quit");
      expect((await run.fsl.end()).code).toBe(0);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "of the file size (RLIMIT_FSIZE): no signal ends fsl",
    async () => {
      const snapshot = await snapshotOf(BARE);
      const refusals = [
        [0, "shim: cannot be loaded: EFBIG"],
        [100_000, "seed: cannot set its length: EFBIG"],
      ] as const;
      for (const [limit, message] of refusals) {
        await using run = await FaultRun.start(snapshot, {
          prefix: ["prlimit", `--fsize=${limit}:${limit}`],
        });
        const { code, stderr } = await run.fsl.end();
        expect(stderr).toContain(message);
        expect(code).toBe(6);
        expect(await run.leftovers()).toEqual([]);
      }
      await using run = await FaultRun.start(snapshot, {
        flags: ["--paused", "--working-set", "none"],
        prefix: ["prlimit", "--fsize=200000000:200000000"],
      });
      await run.fsl.stderr.waitFor(/all RAM in after/);
      const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
      expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "of the disk, full where remarks go: they are lost, and the guest loads all the same",
    async () => {
      const snapshot = await snapshotOf(BARE);
      const prefix = ["sh", "-c", 'exec "$@" 2>/dev/full', "sh"];
      const flags = ["--eager-rate", "20M"];
      await using run = await FaultRun.start(snapshot, { prefix, flags });
      const pid = await run.qemuPid();
      await run.serial.waitForNext(/^tick \d+ ok/);
      // Lines of progress come once a second, and the last remark when all RAM is in.
      while ((await run.status()) !== null) await Bun.sleep(100);
      expect(await differencesOfBareGuest(snapshot, { pid, qmp: run.qmp })).toEqual([]);
      await run.qmp.execute("quit");
      expect(await run.fsl.exited).toBe(0);
    },
    TIMEOUT_MS,
  );

  test(
    "of the disk, full beside the snapshot: the guest loads all the same",
    async () => {
      const snapshot = await snapshotOf(BARE);
      const directory = mkdtempSync(join(tmpdir(), "fsl-fault-full-"));
      const mount = join(directory, "mount");
      mkdirSync(mount);
      await shell("mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", mount);
      try {
        const path = join(mount, "guest.snap");
        copyFileSync(snapshot.path, path);
        await shell(
          "sh",
          "-c",
          'dd if=/dev/zero of="$0" bs=64k 2>/dev/null; true',
          join(mount, "filler"),
        );
        await using run = await FaultRun.start(snapshot, { path });
        await run.fsl.stderr.waitFor(/all RAM in after/);
        await run.serial.waitForNext(/^tick \d+ ok/);
        const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
        expect(await differencesOfBareGuest(snapshot, qemu)).toEqual([]);
        expect(run.fsl.stderr.text).toMatch(/working set .*: cannot be written: ENOSPC/);
        expect(existsSync(`${path}.fslws`)).toBe(false);
        await run.qmp.execute("quit");
        expect((await run.fsl.end()).code).toBe(0);
        expect(await run.leftovers()).toEqual([]);
      } finally {
        await shell("umount", "--lazy", mount);
        rmSync(directory, { recursive: true });
      }
    },
    TIMEOUT_MS,
  );

  test(
    "of the disk, full where the report goes: said, and the exit code is QEMU's",
    async () => {
      await using run = await FaultRun.start(await snapshotOf(BARE), {
        flags: ["--report", "/dev/full"],
      });
      await run.fsl.stderr.waitFor(/all RAM in after/);
      await run.qmp.execute("quit");
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain("--report /dev/full: cannot be written: ENOSPC");
      expect(stderr).not.toContain("a bug in fsl");
      expect(code).toBe(0);
    },
    TIMEOUT_MS,
  );
});
