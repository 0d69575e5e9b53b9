/**
 * fsl is killed (SIGKILL) at every stage of a load. The guest waits, nothing is lost, and `fsl
 * resume` goes on where the dead one was: afterwards all memory is what QEMU's own load brings in.
 * Many more kills with `npm run soak`.
 */
import { describe, expect, test } from "bun:test";
import { existsSync, readdirSync, rmSync, utimesSync } from "node:fs";
import { join } from "node:path";
import {
  PHASE_FINISHED,
  PHASE_HANDING_OVER,
  PHASE_RUNNING,
  PHASE_STATE_LOADED,
} from "../../src/load/state.ts";
import {
  FaultRun,
  mainThreadWaits,
  openLoadState,
  randomNumbers,
  repetitions,
  SEED,
  someoneWaits,
  waitingThreads,
} from "../helpers/fault-runs.ts";
import { refuseUnserved } from "../../src/load/recovery.ts";
import { FAULTY_SOURCE, faultyProgram, Switch } from "../helpers/fault-switch.ts";
import {
  type GuestSnapshot,
  snapshotOf,
  type SnapshotSpec,
  whyNoGuests,
} from "../helpers/guests.ts";
import { testOnBoth } from "../helpers/kvm.ts";
import { differencesFromOracle, differencesOfBareGuest } from "../helpers/load-oracle.ts";
import { isRunning, until, whyNoExecutable } from "../helpers/load-runs.ts";
import { TWO_NODES, withNode } from "../helpers/load-snapshots.ts";

const TIMEOUT_MS = 120_000;
const SOAK_MS = 3_600_000;
const reason = whyNoExecutable() ?? whyNoGuests();

const LINUX: SnapshotSpec = {};
const BARE: SnapshotSpec = { guest: "bare" };
/** They are in RAM, and QEMU reads them when it loads its devices. */
const WITH_RINGS: SnapshotSpec = { extraArgs: ["-device", "virtio-net-pci"] };
const BARE_KVM: SnapshotSpec = { guest: "bare", accel: "kvm", machine: "pc" };

/**
 * Spins until the load state that `pid` has is as `wanted` says: nobody tells, and it lasts for
 * microseconds only.
 */
function spinUntil(
  pid: number,
  wanted: (state: NonNullable<ReturnType<typeof openLoadState>>) => boolean,
): void {
  const endMs = performance.now() + 20_000;
  let state: ReturnType<typeof openLoadState> = null;
  while (state === null || !wanted(state)) {
    state ??= openLoadState(pid);
    if (performance.now() > endMs) throw new Error(`phase ${state?.phase ?? "none"} stays`);
  }
  state.unmap();
}

/** A load in which QEMU loads its devices, and its main loop waits for a page until the switch is off. */
async function whileDevicesLoad(on: Switch, paused: boolean): Promise<FaultRun> {
  const how = { every: 1, timesMax: 1_000_000, how: "pend", paused } as const;
  const run = await FaultRun.start(await snapshotOf(WITH_RINGS), faultyProgram(on, how));
  const pid = await run.qemuPid();
  await someoneWaits(pid);
  expect(mainThreadWaits(pid)).toBe(true);
  return run;
}

/** For guest memory that cannot be lazy, or a socket. */
class FileOnDisk implements Disposable {
  readonly path: string;
  constructor(kind = "ram") {
    this.path = join(import.meta.dir, `../../.cache/fsl-kill-${kind}-${process.pid}`);
  }
  [Symbol.dispose](): void {
    rmSync(this.path, { force: true });
  }
}

/**
 * Resumes to the end, with further kills at random moments, and compares all memory with the
 * oracle's.
 */
async function resumeToEnd(
  run: FaultRun,
  snapshot: GuestSnapshot,
  random: () => number,
  kills: number,
): Promise<void> {
  for (let kill = 0; kill < kills; kill += 1) {
    const next = await run.resume("--eager-rate", "100M");
    await Bun.sleep(random() * 300);
    await next.kill();
    if ((await run.status()) === null) break; // It had come to its end.
  }
  if ((await run.status()) !== null) {
    const { code, stderr } = await (await run.resume()).end();
    expect(stderr).toContain("all RAM is in");
    expect(code).toBe(0);
  }
  expect(await run.status()).toBeNull();
  const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
  expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
}

describe.skipIf(reason !== null)("fsl killed", () => {
  test(
    "while QEMU starts: nothing was handed over, and QEMU ends in order",
    async () => {
      const snapshot = await snapshotOf(BARE);
      await using run = await FaultRun.start(snapshot);
      const pid = await run.qemuPid();
      await run.fsl.kill();
      await run.qmp.ready;
      expect(await run.status()).toMatchObject({ phase: "not begun", served: false });
      expect((await run.command("status").end()).stdout).toContain(`end it (kill ${pid})`);
      const { code, stderr } = await (await run.resume()).end();
      expect(stderr).toContain(`process ${pid}: has no load of fsl to go on with`);
      expect(code).toBe(8);
      expect(await run.qmp.execute<object>("query-status")).toMatchObject({ status: "inmigrate" });
      process.kill(pid, "SIGTERM");
      await run.qmp.waitEvent("SHUTDOWN");
      // The next fsl takes its directory away, once it is old enough to be nobody's.
      await until(() => (isRunning(pid) ? null : true), 10_000, "the end of QEMU");
      const runtime = join(run.directory, "run");
      const [left = ""] = readdirSync(runtime);
      expect(left).toMatch(/^fsl-/);
      const start = (): Promise<number> =>
        run.command("load", snapshot.path, "--", ...snapshot.argv.slice(0, 1), "-version").exited;
      await start();
      expect(readdirSync(runtime)).toEqual([left]);
      utimesSync(join(runtime, left), new Date(0), new Date(0));
      await start();
      expect(readdirSync(runtime)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "while RAM comes in, and its guest is then saved: refused at once, for QEMU would wait for pages too",
    async () => {
      const snapshot = await snapshotOf(BARE);
      using socket = new FileOnDisk("qmp");
      const monitor = `unix:${socket.path},server=on,wait=off`;
      const qemuArgs = ["-qmp", monitor];
      await using run = await FaultRun.start(snapshot, { qemuArgs, flags: ["--eager-rate", "1M"] });
      const pid = await run.qemuPid();
      spinUntil(pid, ({ phase }) => phase === PHASE_RUNNING);
      await run.fsl.kill();
      const path = join(run.directory, "again.snap");
      // As QEMU has it, too.
      const save = ["save", path, "--qmp", monitor, "--then", "cont"];
      const refused = await run.command(...save).end();
      expect(refused.stderr).toContain(
        `QEMU (pid ${pid}) waits for pages of a load whose fsl has died`,
      );
      expect(refused.stderr).toContain(`fsl resume --pid ${pid}`);
      expect(refused.code).toBe(10);
      expect(existsSync(path)).toBe(false);
      expect(await run.qmp.execute<object>("query-status")).toMatchObject({ status: "running" });
      expect((await (await run.resume()).end()).code).toBe(0);
      const saved = await run.command(...save).end();
      expect(saved.stderr).toContain(`saved ${path}`);
      expect(saved.code).toBe(0);
    },
    TIMEOUT_MS,
  );

  /**
   * A load in which one of two blocks is loaded in full, once QEMU has its copy of the load state: that
   * takes some milliseconds.
   */
  async function armingSlowly(): Promise<[FaultRun, GuestSnapshot, Disposable]> {
    const snapshot = await snapshotOf(TWO_NODES);
    const file = new FileOnDisk();
    const onDisk = `memory-backend-file,share=on,mem-path=${file.path}`;
    const argv = withNode(snapshot.argv, "n1", onDisk);
    return [await FaultRun.start(snapshot, { argv, flags: ["--paused"] }), snapshot, file];
  }

  test(
    "while arming: nothing was handed over, which is said",
    async () => {
      for (let attempt = 1; ; attempt += 1) {
        const [load, , disk] = await armingSlowly();
        await using run = load;
        using _ = disk;
        const pid = await run.qemuPid();
        spinUntil(pid, () => true);
        await run.fsl.kill();
        const status = await run.status();
        // It was quicker than the kill, now and then.
        if (status?.phase !== "armed" && attempt < 20) continue;
        expect(status).toMatchObject({ pid, phase: "armed", served: false });
        expect((await run.command("status").end()).stdout).toContain(
          `QEMU ${pid} waits for its state, which its fsl did not live to give: end it`,
        );
        const { code, stderr } = await (await run.resume()).end();
        expect(stderr).toContain("before the state was handed over, so nothing is lost");
        expect(code).toBe(8);
        expect(await run.status()).toMatchObject({ pid, served: false });
        expect(() => refuseUnserved(pid)).toThrow(
          "before it gave it a state; end it and load again",
        );
        return;
      }
    },
    TIMEOUT_MS,
  );

  test(
    "while the state is handed over, and QEMU was not told yet: which is said",
    async () => {
      for (let attempt = 1; ; attempt += 1) {
        const [load, snapshot, disk] = await armingSlowly();
        await using run = load;
        using _ = disk;
        const pid = await run.qemuPid();
        spinUntil(pid, () => true);
        // So that it answers nothing: what fsl sends from here on QEMU may see when fsl is dead.
        process.kill(pid, "SIGSTOP");
        spinUntil(pid, ({ phase }) => phase >= PHASE_HANDING_OVER);
        await run.fsl.kill();
        process.kill(pid, "SIGCONT");
        const status = await run.status();
        const resumed = await (await run.resume()).end();
        if (status?.phase === "handing over" && resumed.code === 0) {
          // It had been told.
          await resumeToEnd(run, snapshot, randomNumbers(SEED), 0);
        }
        if ((status?.phase !== "handing over" || resumed.code === 0) && attempt < 20) continue;
        expect(status).toMatchObject({ phase: "handing over", served: false });
        expect(resumed.stderr).toContain("its state was not loaded (none); end it and load again");
        expect(resumed.code).toBe(8);
        expect(await run.qmp.execute<object>("query-status")).toMatchObject({
          status: "inmigrate",
        });
        return;
      }
    },
    TIMEOUT_MS,
  );

  test(
    "while the state is handed over, with QEMU's main loop waiting for a page: fsl resume goes on",
    async () => {
      const snapshot = await snapshotOf(WITH_RINGS);
      using on = new Switch();
      await using run = await whileDevicesLoad(on, true);
      const pid = await run.qemuPid();
      await run.fsl.kill();
      expect(await run.status()).toMatchObject({ phase: "handing over", served: false });
      expect(mainThreadWaits(pid)).toBe(true);
      on.off();
      const resumed = await (await run.resume("--source", FAULTY_SOURCE)).end();
      expect(resumed).toMatchObject({ code: 0, stderr: expect.stringContaining("all RAM is in") });
      await resumeToEnd(run, snapshot, randomNumbers(SEED), 0);
      expect(await run.qmp.execute<object>("query-status")).toMatchObject({ running: false });
    },
    TIMEOUT_MS,
  );

  test.each([
    ["between hand-over and resume", PHASE_STATE_LOADED],
    ["right after resume", PHASE_RUNNING],
  ])(
    "%s: fsl resume goes on",
    async (_, phase) => {
      const snapshot = await snapshotOf(BARE);
      await using run = await FaultRun.start(snapshot, {
        flags: ["--paused", "--eager-rate", "4M"],
      });
      const pid = await run.qemuPid();
      spinUntil(pid, (state) => state.phase >= phase);
      await run.fsl.kill();
      expect(await run.status()).toMatchObject({ served: false });
      // QMP is not asked: QEMU's main loop may wait for a page now.
      const resumed = await (await run.resume()).end();
      expect(resumed).toMatchObject({ code: 0, stderr: expect.stringContaining("all RAM is in") });
      await resumeToEnd(run, snapshot, randomNumbers(SEED), 0);
      expect(await run.qmp.execute<object>("query-status")).toMatchObject({ running: false });
    },
    TIMEOUT_MS,
  );

  test(
    "between hand-over and resume: the guest that was to run runs",
    async () => {
      const snapshot = await snapshotOf(BARE);
      await using run = await FaultRun.start(snapshot, { flags: ["--eager-rate", "1M"] });
      const pid = await run.qemuPid();
      spinUntil(pid, (state) => state.phase >= PHASE_STATE_LOADED);
      await run.fsl.kill();
      const resumed = await run.resume();
      await run.serial.waitForNext(/^tick \d+ ok/);
      expect((await resumed.end()).code).toBe(0);
      const qemu = { pid, qmp: run.qmp };
      expect(await differencesOfBareGuest(snapshot, qemu)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  /** The migration capabilities that are on. */
  async function capabilitiesOn(run: FaultRun): Promise<string[]> {
    const list = await run.qmp.execute<{ capability: string; state: boolean }[]>(
      "query-migrate-capabilities",
    );
    return list.filter(({ state }) => state).map(({ capability }) => capability);
  }

  test.each([
    ["that stays paused", true],
    ["that was to run", false],
  ])(
    "while the state is handed over to a guest %s: it can be saved while fsl resume goes on",
    async (_, paused) => {
      using on = new Switch();
      await using run = await whileDevicesLoad(on, paused);
      await run.fsl.kill();
      on.off();
      // It needs mapped-ram for what it is at, and cannot be asked meanwhile.
      await run.resume("--source", FAULTY_SOURCE, "--eager-rate", "256K");
      const endMs = performance.now() + 20_000;
      while ((await capabilitiesOn(run)).length > 0 && performance.now() < endMs)
        await Bun.sleep(10);
      expect(await capabilitiesOn(run)).toEqual([]);
      expect(await run.status()).toMatchObject({ served: true, phase: "running" });
      expect(await run.qmp.execute<object>("query-status")).toMatchObject({
        running: !paused,
      });
    },
    TIMEOUT_MS,
  );

  test(
    "while finishing: fsl resume cleans up",
    async () => {
      const snapshot = await snapshotOf(BARE);
      for (let round = 0; round < repetitions(4, 40); round += 1) {
        await using run = await FaultRun.start(snapshot, { flags: ["--paused"] });
        const pid = await run.qemuPid();
        const isLate = round % 2 === 1;
        spinUntil(pid, (state) =>
          isLate
            ? state.phase === PHASE_FINISHED
            : state.blocks.every(({ data, done }) =>
                data.every((word, i) => (word & ~(done[i] ?? 0)) === 0),
              ),
        );
        await run.fsl.kill();
        await resumeToEnd(run, snapshot, randomNumbers(SEED), 0);
      }
    },
    TIMEOUT_MS,
  );

  test(
    "at random moments of a paused load, and fsl resume too: every byte as QEMU loads it",
    async () => {
      const snapshot = await snapshotOf(LINUX);
      const random = randomNumbers(SEED);
      for (let round = 0; round < repetitions(3, 100); round += 1) {
        await using run = await FaultRun.start(snapshot, {
          flags: ["--paused", "--eager-rate", "50M"],
        });
        const pid = await run.qemuPid();
        spinUntil(pid, (state) => state.phase >= PHASE_HANDING_OVER);
        await Bun.sleep(random() * 1000);
        await run.fsl.kill();
        await resumeToEnd(run, snapshot, random, Math.floor(random() * 3));
      }
    },
    SOAK_MS,
  );

  test(
    "at random moments of a Linux guest that reads its memory: it waits, then sums up right",
    async () => {
      const snapshot = await snapshotOf({ smp: 2 });
      const random = randomNumbers(SEED + 1);
      let waits = 0;
      for (let round = 0; round < repetitions(4, 100); round += 1) {
        await using run = await FaultRun.start(snapshot, { flags: ["--eager-rate", "1M"] });
        await run.serial.waitFor(/^tick /);
        const pid = await run.qemuPid();
        const sum = run.serial.waitForNext(/^SUM /, 60_000);
        run.serial.send("sum 2\n");
        // All its data is in after some 100 ms.
        await Bun.sleep(random() * 50);
        await run.fsl.kill();
        const kills = Math.floor(random() * 3);
        for (let kill = 0; kill < kills; kill += 1) {
          const next = await run.resume("--eager-rate", "1M");
          await Bun.sleep(random() * 30);
          await next.kill();
        }
        // The guest may have all that it reads by now.
        const summed = sum.then(() => false);
        if (await Promise.race([summed, someoneWaits(pid).then(() => true)])) {
          waits += 1;
          expect(await run.status()).toMatchObject({ served: false, phase: "running" });
          expect(waitingThreads(pid)).toBeGreaterThan(0);
          expect(run.serial.lines.some(({ text }) => text.startsWith("SUM "))).toBe(false);
        }
        const resumed = (await run.status()) === null ? null : await run.resume();
        const [, verdict, , checksum] = (await sum).text.split(" ");
        expect([verdict, checksum]).toEqual(["ok", snapshot.checksum]);
        if (resumed !== null) expect((await resumed.end()).code).toBe(0);
        expect((await run.serial.command("verify"))[0]).toBe("ok");
      }
      expect(waits).toBeGreaterThan(0);
    },
    SOAK_MS,
  );

  testOnBoth<SnapshotSpec>(BARE, BARE_KVM)(
    "at random moments of a guest that verifies its memory, with faults waiting: then every byte",
    async (spec) => {
      const snapshot = await snapshotOf(spec);
      const random = randomNumbers(SEED + 2);
      for (let round = 0; round < repetitions(2, 100); round += 1) {
        await using run = await FaultRun.start(snapshot, { flags: ["--eager-rate", "64K"] });
        const pid = await run.qemuPid();
        spinUntil(pid, (state) => state.phase >= PHASE_RUNNING);
        await Bun.sleep(random() * 100);
        await run.fsl.kill();
        await someoneWaits(pid);
        const before = run.serial.lines.length;
        expect(await run.status()).toMatchObject({ served: false });
        expect(run.serial.lines.length).toBe(before);
        const next = await run.resume("--eager-rate", "64K");
        await Bun.sleep(random() * 300);
        await next.kill();
        const resumed = await run.resume();
        await run.serial.waitForNext(/^tick \d+ ok/);
        expect((await resumed.end()).code).toBe(0);
        const qemu = { pid, qmp: run.qmp };
        expect(await differencesOfBareGuest(snapshot, qemu)).toEqual([]);
      }
    },
    SOAK_MS,
  );
});
