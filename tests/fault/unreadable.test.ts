/**
 * Reads of the snapshot fail (EIO), for a while or for ever. Whoever needs such a page waits; it is
 * said at once which page it is; when reads work again the guest goes on as if nothing had been.
 */
import { describe, expect, test } from "bun:test";
import { readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { countMissing } from "../../src/bits.ts";
import { PHASE_HANDING_OVER, PHASE_RUNNING } from "../../src/load/state.ts";
import { openSnapshot } from "../../src/snapshot/snapshot.ts";
import { whyNoPoison } from "../helpers/declare.ts";
import { FaultyDisk, whyNoFaultyDisk } from "../helpers/fault-disk.ts";
import { AttachRun } from "../helpers/attach-runs.ts";
import { FaultRun, mainThreadWaits, openLoadState, someoneWaits } from "../helpers/fault-runs.ts";
import {
  type GuestSnapshot,
  snapshotOf,
  type SnapshotSpec,
  whyNoGuests,
} from "../helpers/guests.ts";
import { testOnBoth } from "../helpers/kvm.ts";
import { differencesFromOracle, differencesOfBareGuest } from "../helpers/load-oracle.ts";
import { until, whyNoExecutable } from "../helpers/load-runs.ts";
import { TWO_NODES, withNode } from "../helpers/load-snapshots.ts";

const TIMEOUT_MS = 120_000;
const reason = whyNoExecutable() ?? whyNoGuests() ?? whyNoFaultyDisk();
const SLOW = ["--eager-rate", "256K"];
/** Guest memory that cannot be lazy. */
const FILE = join(import.meta.dir, `../../.cache/fsl-unreadable-${process.pid}`);
const BARE: SnapshotSpec = { guest: "bare" };
const BARE_KVM: SnapshotSpec = { guest: "bare", accel: "kvm", machine: "pc" };

/** File offset of a place in a snapshot's main RAM, or in another block. */
function ramOffset(snapshot: GuestSnapshot, share: number, block = "pc.ram"): number {
  using parsed = openSnapshot(snapshot.path);
  const ram = parsed.blocks.find(({ idstr }) => idstr === block);
  if (ram === undefined) throw new Error(`no ${block}`);
  const page = Math.floor(ram.pageCount * share);
  return ram.pagesOffset + page * ram.pageSize;
}

/** Starts a guest that verifies its memory, and lets the disk fail in the middle of it. */
async function failing(
  disk: FaultyDisk,
  snapshot: GuestSnapshot,
  flags: readonly string[],
): Promise<FaultRun> {
  const run = await FaultRun.start(snapshot, {
    path: disk.path,
    flags: ["--paused", ...SLOW, ...flags],
  });
  await run.reached(PHASE_RUNNING);
  disk.fail(ramOffset(snapshot, 0.6));
  await run.qmp.execute("cont");
  return run;
}

/**
 * Starts a load whose disk fails once fsl has made its load state: it has read all but the guest's RAM
 * by then, and QEMU was not told yet. Null when fsl was quicker.
 */
async function failingWhenArmed(
  disk: FaultyDisk,
  snapshot: GuestSnapshot,
  offset: number,
  argv: readonly string[] = snapshot.argv,
): Promise<FaultRun | null> {
  disk.mend();
  // Whoever has set a limit has nothing read ahead, and nothing begun before QEMU is ready.
  const flags = ["--paused", "--eager-rate", "1G"];
  const run = await FaultRun.start(snapshot, { path: disk.path, flags, argv });
  const { pid } = run.fsl;
  const endMs = performance.now() + 20_000;
  let state = openLoadState(pid);
  while (state === null) {
    if (performance.now() > endMs) throw new Error(`no load state: ${run.fsl.stderr.text}`);
    state = openLoadState(pid);
  }
  run.fsl.signal("SIGSTOP");
  await until(() => (isStopped(pid) ? true : null), 5000, "the stop of fsl");
  const isInTime =
    state.phase < PHASE_HANDING_OVER &&
    state.blocks.every(({ data, done }) => countMissing(data, done) > 0);
  state.unmap();
  if (isInTime) disk.fail(offset);
  run.fsl.signal("SIGCONT");
  if (isInTime) return run;
  await run[Symbol.asyncDispose]();
  return null;
}

function isStopped(pid: number): boolean {
  return /^State:\s+T/m.test(readFileSync(`/proc/${pid}/status`, "latin1"));
}

/** As often as it takes. */
async function untilInTime(start: () => Promise<FaultRun | null>): Promise<FaultRun> {
  for (let attempt = 0; attempt < 20; attempt += 1) {
    const run = await start();
    if (run !== null) return run;
  }
  throw new Error("fsl was quicker 20 times");
}

const UNREADABLE =
  /RAMBlock pc\.ram: page (\d+) cannot be read at file offset (0x[0-9a-f]+): .*EIO.*; the vCPU that needs it waits/;

describe.skipIf(reason !== null)("a page that cannot be read", () => {
  testOnBoth<SnapshotSpec>(BARE, BARE_KVM)(
    "is waited for, told at once, and comes when the disk works again",
    async (spec) => {
      const snapshot = await snapshotOf(spec);
      await using disk = await FaultyDisk.make(snapshot.path);
      await using run = await failing(disk, snapshot, []);
      const pid = await run.qemuPid();
      const [, page, offset] = await run.fsl.stderr.waitFor(UNREADABLE);
      expect(Number(offset)).toBe(ramOffset(snapshot, 0) + Number(page) * 4096);
      // A read that begins before the place where the disk fails, and goes on behind it, fails as a
      // whole.
      expect(disk.isFailing(Number(offset), 0x40_0000)).toBe(true);
      await someoneWaits(pid);
      const failure = {
        idstr: "pc.ram",
        pageIndex: Number(page),
        fileOffset: Number(offset),
        errno: 5,
      };
      expect(await run.status()).toMatchObject({
        served: true,
        lastFailure: failure,
        progress: { failedPages: 1 },
      });
      const table = await run.command("status").end();
      expect(table.stdout).toContain(`pc.ram at file offset ${offset}`);
      expect(run.serial.lines.filter(({ text }) => text.startsWith("tick"))).toEqual([]);
      disk.mend();
      await run.fsl.stderr.waitFor(/page \d+ could be read again after \d+ attempts/);
      await run.serial.waitForNext(/^tick \d+ ok/);
      expect(await run.status()).toMatchObject({ lastFailure: null, progress: { failedPages: 0 } });
      await run.fsl.stderr.waitFor(/all RAM in after/);
      expect(await differencesOfBareGuest(snapshot, { pid, qmp: run.qmp })).toEqual([]);
      run.fsl.signal("SIGTERM");
      expect((await run.fsl.end()).code).toBe(0);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "that nobody waits for is told by the eager load, which ends when the disk works again",
    async () => {
      const snapshot = await snapshotOf(BARE);
      await using disk = await FaultyDisk.make(snapshot.path);
      // The middle of memory comes last, and not before the disk fails.
      const flags = ["--paused", "--eager-rate", "12M"];
      await using run = await FaultRun.start(snapshot, { path: disk.path, flags });
      await run.reached(PHASE_RUNNING);
      disk.fail(ramOffset(snapshot, 0.6));
      await run.fsl.stderr.waitFor(
        /page \d+ cannot be read at file offset 0x[0-9a-f]+: .*EIO.*; nobody waits/,
      );
      // A dead disk is not told page by page.
      await run.fsl.stderr.waitFor(/16 more pages that nobody waits for cannot come in/);
      expect(
        run.fsl.stderr.text.match(/cannot be read at file offset/g)?.length,
      ).toBeLessThanOrEqual(8);
      expect((await run.status())?.lastFailure).toMatchObject({ idstr: "pc.ram", errno: 5 });
      expect(await run.qmp.execute<object>("query-status")).toMatchObject({ running: false });
      disk.mend();
      await run.fsl.stderr.waitFor(/all RAM in after/);
      const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
      expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
      await run.qmp.execute("quit");
      expect((await run.fsl.end()).code).toBe(0);
    },
    TIMEOUT_MS,
  );

  test(
    "for ever, --on-error wait: fsl does not hang, SIGTERM ends all within the grace time",
    async () => {
      const snapshot = await snapshotOf(BARE);
      await using disk = await FaultyDisk.make(snapshot.path);
      await using run = await failing(disk, snapshot, ["--grace-ms", "500"]);
      await run.fsl.stderr.waitFor(UNREADABLE);
      // It never returns while a vCPU waits. fsl must not mind.
      run.qmp.execute("stop").catch(() => {});
      run.fsl.signal("SIGTERM");
      const { code, stderr } = await run.fsl.end(10_000);
      expect(stderr).toContain("QEMU did not end within 500 ms of SIGTERM: killed");
      expect(code).toBe(9);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "for ever, --on-error kill: QEMU is killed after the limit",
    async () => {
      const snapshot = await snapshotOf(BARE);
      await using disk = await FaultyDisk.make(snapshot.path);
      await using run = await failing(disk, snapshot, [
        "--on-error",
        "kill",
        "--error-limit-ms",
        "300",
      ]);
      await run.fsl.stderr.waitFor(UNREADABLE);
      const { code, stderr } = await run.fsl.end(10_000);
      expect(stderr).toContain("is killed: a page could not be supplied");
      expect(code).toBe(9);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  testOnBoth<SnapshotSpec>(BARE, BARE_KVM, whyNoPoison())(
    "for ever, --on-error poison: whoever touches it gets SIGBUS",
    async (spec) => {
      const snapshot = await snapshotOf(spec);
      await using disk = await FaultyDisk.make(snapshot.path);
      await using run = await failing(disk, snapshot, [
        "--on-error",
        "poison",
        "--error-limit-ms",
        "300",
        "--grace-ms",
        "500",
      ]);
      const [, page] = await run.fsl.stderr.waitFor(UNREADABLE);
      await run.fsl.stderr.waitFor(
        new RegExp(`page ${page} is poisoned: it could not be supplied`),
      );
      // What QEMU makes of SIGBUS differs: it dies of it, or stops the guest with an error. It
      // never goes on.
      await Promise.race([run.fsl.exited, run.qmp.waitEvent("STOP", () => true, 10_000)]).catch(
        () => {},
      );
      run.fsl.signal("SIGTERM");
      const { code } = await run.fsl.end(10_000);
      expect(code).toBe(9);
      expect(run.serial.lines.filter(({ text }) => text.startsWith("tick"))).toEqual([]);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test.each([
    ["in the foreground", []],
    ["with --detach", ["--detach"]],
  ])(
    "for ever, of somebody else's QEMU: a second signal ends fsl, and another one goes on (%s)",
    async (_, detach) => {
      const snapshot = await snapshotOf(BARE);
      await using disk = await FaultyDisk.make(snapshot.path);
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const flags = ["--paused", "--on-error", "wait", ...SLOW, ...detach];
      const load = run.attach({ path: disk.path }, ...flags);
      if (detach.length > 0) expect((await load.end()).code).toBe(0);
      await run.reached("running");
      disk.fail(ramOffset(snapshot, 0.6));
      await run.qmp.execute("cont");
      await someoneWaits(run.pid);
      const failing = { served: true, lastFailure: { idstr: "pc.ram", errno: 5 } };
      while ((await run.status(run.pid))?.lastFailure == null) await Bun.sleep(20);
      expect(await run.status(run.pid)).toMatchObject(failing);
      const served = await run.process("fsl");
      process.kill(served, "SIGTERM");
      if (detach.length === 0) await load.stderr.waitFor(/SIGTERM: QEMU needs fsl until/);
      // The second one counts a second later.
      const isOver = (): true | null => {
        if (run.processes("fsl").length === 0) return true;
        process.kill(served, "SIGTERM");
        return null;
      };
      await until(isOver, 20_000, "the end of fsl");
      if (detach.length === 0) {
        const { code, stderr } = await load.end();
        expect(code).toBe(9);
        expect(stderr).toContain(
          `SIGTERM: fsl ends; QEMU ${run.pid} waits where it needs a page, until: ` +
            `fsl resume --pid ${run.pid}`,
        );
      }
      expect(await run.status(run.pid)).toMatchObject({ ...failing, served: false });
      expect(run.serial.lines.filter(({ text }) => text.startsWith("tick"))).toEqual([]);
      disk.mend();
      const ticks = run.serial.waitForNext(/^tick \d+ ok/);
      expect((await run.resume(run.pid)).code).toBe(0);
      await ticks;
      expect(run.serial.lines.filter(({ text }) => text.includes("BAD"))).toEqual([]);
      expect(await run.traits()).toEqual(before);
    },
    TIMEOUT_MS,
  );

  test(
    "survives fsl: another one reports it too, and it comes when the disk works again",
    async () => {
      const snapshot = await snapshotOf(BARE);
      await using disk = await FaultyDisk.make(snapshot.path);
      await using run = await failing(disk, snapshot, []);
      await run.fsl.stderr.waitFor(UNREADABLE);
      await run.fsl.kill();
      expect(await run.status()).toMatchObject({ served: false, lastFailure: { errno: 5 } });
      const resumed = await run.resume();
      await resumed.stderr.waitFor(UNREADABLE);
      disk.mend();
      expect((await resumed.end()).code).toBe(0);
      const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
      expect(await differencesOfBareGuest(snapshot, qemu)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test.each([
    ["comes when the disk works again", false],
    ["survives fsl", true],
  ])(
    "of a ring, while QEMU loads its devices: its main loop waits, and the page %s",
    async (_, isKilled) => {
      const snapshot = await snapshotOf({ extraArgs: ["-device", "virtio-net-pci"] });
      await using disk = await FaultyDisk.make(snapshot.path);
      const offset = ramOffset(snapshot, 0);
      await using run = await untilInTime(() => failingWhenArmed(disk, snapshot, offset));
      const pid = await run.qemuPid();
      const [, page] = await run.fsl.stderr.waitFor(UNREADABLE);
      // The page may have failed before QEMU asks for it: the eager load starts there, too.
      await someoneWaits(pid);
      expect(mainThreadWaits(pid)).toBe(true);
      expect(await run.status()).toMatchObject({
        phase: "handing over",
        lastFailure: { idstr: "pc.ram", pageIndex: Number(page), errno: 5 },
      });
      let fsl = run.fsl;
      if (isKilled) {
        await run.fsl.kill();
        fsl = await run.resume();
        await fsl.stderr.waitFor(UNREADABLE);
      }
      expect(mainThreadWaits(pid)).toBe(true);
      disk.mend();
      await fsl.stderr.waitFor(/all RAM (is )?in/);
      expect(await differencesFromOracle(snapshot, { pid, qmp: run.qmp })).toEqual([]);
      expect(await run.qmp.execute<object>("query-status")).toMatchObject({ running: false });
    },
    TIMEOUT_MS,
  );

  test.each([
    ["a block that is loaded in full", "n1", `memory-backend-file,share=on,mem-path=${FILE}`],
    ["memory that is preallocated", "n0", "memory-backend-ram,prealloc=on"],
  ])(
    "before the guest runs, in %s: exit code 3 with the page, and nothing is left",
    async (_, block, backend) => {
      const snapshot = await snapshotOf(TWO_NODES);
      const argv = withNode(snapshot.argv, block, backend);
      await using disk = await FaultyDisk.make(snapshot.path);
      // Near its end: it is read from its beginning.
      const offset = ramOffset(snapshot, 0.97, block);
      try {
        await using run = await untilInTime(() => failingWhenArmed(disk, snapshot, offset, argv));
        const { code, stderr } = await run.fsl.end();
        expect(stderr).toMatch(
          new RegExp(`page \\d+ of RAMBlock ${block} at 0x[0-9a-f]+ cannot be read: EIO`),
        );
        expect(stderr).toContain(disk.path);
        expect(code).toBe(3);
        expect(run.serial.lines).toEqual([]);
        expect(await run.leftovers()).toEqual([]);
      } finally {
        rmSync(FILE, { force: true });
      }
    },
    TIMEOUT_MS,
  );

  test(
    "before QEMU is given anything, where the small blocks and the device state are: exit code 3",
    async () => {
      const snapshot = await snapshotOf({ ...BARE, extraArgs: ["-device", "VGA"] });
      await using disk = await FaultyDisk.make(snapshot.path);
      disk.fail(ramOffset(snapshot, 0, "/rom@etc/acpi/tables"));
      await using run = await FaultRun.start(snapshot, { path: disk.path });
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain(disk.path);
      expect(stderr).toContain("EIO");
      expect(code).toBe(3);
      expect(run.serial.lines).toEqual([]);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );
});
