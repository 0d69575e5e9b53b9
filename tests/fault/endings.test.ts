/**
 * Signals at any time, and a QEMU that dies or is stopped while it is loaded: fsl serves until
 * QEMU has ended, and leaves nothing.
 */
import { describe, expect, test } from "bun:test";
import { createConnection } from "node:net";
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { PHASE_ARMED, PHASE_HANDING_OVER, PHASE_RUNNING } from "../../src/load/state.ts";
import { AttachRun, MarkedRun } from "../helpers/attach-runs.ts";
import {
  FaultRun,
  type FslProcess,
  randomNumbers,
  repetitions,
  SEED,
  someoneWaits,
} from "../helpers/fault-runs.ts";
import { type SnapshotSpec, snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import { testOnBoth } from "../helpers/kvm.ts";
import {
  differencesFromOracle,
  differencesOfBareGuest,
  wholeRound,
} from "../helpers/load-oracle.ts";
import { openFiles, until, whyNoExecutable } from "../helpers/load-runs.ts";

const TIMEOUT_MS = 60_000;
const SOAK_MS = 3_600_000;
const reason = whyNoExecutable() ?? whyNoGuests();
const SLOW = ["--eager-rate", "256K"];
const BARE = { guest: "bare" } as const;

/** A guest that is loaded slowly, with faults all the time. */
async function loading(flags: readonly string[] = []): Promise<FaultRun> {
  const run = await FaultRun.start(await snapshotOf(BARE), { flags: [...SLOW, ...flags] });
  await run.reached(PHASE_RUNNING);
  return run;
}

describe.skipIf(reason !== null)("a signal to fsl", () => {
  test.each([
    ["SIGTERM", 143],
    ["SIGINT", 130],
    ["SIGHUP", 129],
  ] as const)(
    "%s before QEMU greets ends QEMU; the exit code says which signal it was",
    async (signal, expected) => {
      await using run = await FaultRun.start(await snapshotOf(BARE), { flags: SLOW });
      await run.qemuPid();
      run.fsl.signal(signal);
      const { code, stderr } = await run.fsl.end();
      expect(code).toBeOneOf([expected, 0]); // 0: it had greeted, and QEMU's own exit code counts.
      expect(stderr).not.toContain("before it could take a state");
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test.each([
    ["while arming", PHASE_ARMED],
    ["while the state is handed over", PHASE_HANDING_OVER],
    ["while RAM comes in", PHASE_RUNNING],
  ])(
    "%s ends QEMU in order",
    async (_, phase) => {
      await using run = await FaultRun.start(await snapshotOf(BARE), { flags: SLOW });
      await run.reached(phase);
      run.fsl.signal("SIGTERM");
      const { code } = await run.fsl.end();
      expect(code).toBeOneOf([0, 143]);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "after all RAM is in ends QEMU with its own exit code",
    async () => {
      await using run = await FaultRun.start(await snapshotOf(BARE));
      await run.fsl.stderr.waitFor(/all RAM in after/);
      run.fsl.signal("SIGINT");
      expect((await run.fsl.end()).code).toBe(0);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "at random moments leaves no process and no directory",
    async () => {
      const random = randomNumbers(SEED);
      const snapshot = await snapshotOf(BARE);
      for (let round = 0; round < repetitions(12, 200); round += 1) {
        await using run = await FaultRun.start(snapshot, { flags: SLOW });
        await Bun.sleep(random() * 250);
        const signal =
          (["SIGTERM", "SIGINT", "SIGHUP"] as const)[Math.floor(random() * 3)] ?? "SIGINT";
        run.fsl.signal(signal);
        expect((await run.fsl.end()).code).toBeOneOf([0, 129, 130, 143]);
        expect(await run.leftovers()).toEqual([]);
      }
    },
    SOAK_MS,
  );

  test(
    "to fsl and QEMU together, as a terminal sends it, ends both",
    async () => {
      await using run = await loading();
      const pid = await run.qemuPid();
      process.kill(pid, "SIGINT");
      run.fsl.signal("SIGINT");
      expect((await run.fsl.end()).code).toBe(0);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "that QEMU does not heed: it is killed after the grace time",
    async () => {
      await using run = await loading(["--grace-ms", "300"]);
      const pid = await run.qemuPid();
      process.kill(pid, "SIGSTOP");
      run.fsl.signal("SIGTERM");
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain("QEMU did not end within 300 ms of SIGTERM: killed");
      expect(code).toBe(137);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );
});

/** Sends a signal until the process ends by it: for one that heeds only the second. */
async function insist(fsl: FslProcess, signal: NodeJS.Signals): Promise<void> {
  const ended = fsl.exited.then(() => true);
  while ((await Promise.race([ended, Bun.sleep(200)])) !== true) fsl.signal(signal);
}

describe.skipIf(reason !== null)("a signal to fsl resume", () => {
  /** The load of a QEMU of fsl's own goes on as slowly as it began: nothing else is said. */
  async function resumed(run: FaultRun, flags: readonly string[] = []): Promise<FslProcess> {
    await run.fsl.kill();
    const fsl = run.command("resume", "--pid", String(await run.qemuPid()), ...flags);
    const [, rate, unit] = await fsl.stderr.waitFor(/\d+% of .*?, ([\d.]+) (\w+)\/s/);
    expect([Number(rate) < 1024, unit]).toEqual([true, "KiB"]);
    return fsl;
  }

  test.each(["SIGTERM", "SIGINT", "SIGHUP"] as const)(
    "%s ends a QEMU that was to end with fsl, in order",
    async (signal) => {
      await using run = await loading(["--paused"]);
      const fsl = await resumed(run);
      fsl.signal(signal);
      const { code, stderr } = await fsl.end();
      expect([code, stderr]).toEqual([0, expect.stringContaining("QEMU ended before all RAM")]);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "that QEMU does not heed: it is killed after the grace time",
    async () => {
      await using run = await loading(["--paused"]);
      const fsl = await resumed(run, ["--grace-ms", "300"]);
      process.kill(await run.qemuPid(), "SIGSTOP");
      fsl.signal("SIGTERM");
      const { stderr } = await fsl.end();
      expect(stderr).toContain("QEMU did not end within 300 ms of SIGTERM: killed");
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "makes it hurry where QEMU is somebody else's; the second one ends it, and another goes on",
    async () => {
      const snapshot = await snapshotOf(BARE);
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const load = run.attach(snapshot, "--paused", ...SLOW);
      await run.reached("running");
      await load.kill();
      process.kill(run.pid, "SIGSTOP"); // All RAM may come, but fsl cannot let go.
      const first = run.fsl("resume", "--pid", String(run.pid));
      await first.stderr.waitFor(/\d+% of/);
      first.signal("SIGINT");
      await first.stderr.waitFor(/SIGINT: QEMU needs fsl until all its RAM is in/);
      await insist(first, "SIGINT");
      const { code, stderr } = await first.end();
      expect([code, stderr]).toEqual([
        130,
        expect.stringMatching(/SIGINT: fsl ends; QEMU \d+ waits/),
      ]);
      process.kill(run.pid, "SIGCONT");
      expect(await run.status(run.pid)).toMatchObject({ served: false });
      expect((await run.resume(run.pid)).code).toBe(0);
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
      expect(await run.traits()).toEqual(before);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(reason !== null)("a signal to fsl load --detach before the guest runs", () => {
  test.each([
    ["SIGTERM", 143],
    ["SIGINT", 130],
    ["SIGHUP", 129],
  ] as const)(
    "%s gives up a QEMU of somebody else's and leaves it as it was",
    async (signal, expected) => {
      await using run = await AttachRun.start(await snapshotOf(BARE));
      const before = await run.traits();
      const busy = createConnection(run.qmpPath);
      await new Promise((resolve) => busy.once("data", resolve));
      const load = run.attach(await snapshotOf(BARE), "--detach");
      // The one in the background has its lock, and waits for the monitor.
      const lock = `/proc/${run.pid}/mem`;
      const isWaiting = (): true | null =>
        run.processes("fsl").some((pid) => openFiles(pid).includes(lock)) ? true : null;
      await until(isWaiting, 10_000, "fsl in the background");
      load.signal(signal);
      const { code, stderr } = await load.end();
      expect([code, stderr]).toEqual([
        expected,
        expect.stringContaining(`ended by ${signal} before the guest ran`),
      ]);
      busy.destroy();
      expect(run.processes("fsl")).toEqual([]);
      expect(await run.traits()).toEqual(before);
    },
    TIMEOUT_MS,
  );

  test(
    "ends a QEMU that fsl has started",
    async () => {
      await using run = new MarkedRun();
      // One that never greets.
      const program = join(run.directory, "qemu-system-slow");
      writeFileSync(program, "#!/bin/sh\nexec sleep 60\n", { mode: 0o755 });
      const { path } = await snapshotOf(BARE);
      const load = run.fsl("load", path, "--detach", "--", program, "-m", "64M");
      await run.process("sleep");
      load.signal("SIGTERM");
      const { code, stderr } = await load.end();
      expect([code, stderr]).toEqual([143, expect.stringContaining("ended by SIGTERM before")]);
      expect([run.processes("sleep"), run.processes("fsl"), run.files()]).toEqual([[], [], []]);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(reason !== null)("QEMU", () => {
  test.each([
    ["SIGKILL", 137],
    ["SIGSEGV", 139],
    ["SIGABRT", 134],
  ] as const)(
    "that dies of %s while it is loaded: fsl ends as it did",
    async (signal, expected) => {
      await using run = await loading();
      process.kill(await run.qemuPid(), signal);
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain("QEMU ended before all RAM was in");
      expect(code).toBe(expected);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "that dies while it is given its state: an error, and nothing is left",
    async () => {
      const snapshot = await snapshotOf(BARE);
      const random = randomNumbers(SEED + 3);
      for (let round = 0; round < repetitions(4, 60); round += 1) {
        await using run = await FaultRun.start(snapshot, { flags: SLOW });
        const pid = await run.qemuPid();
        await Bun.sleep(random() * 150);
        process.kill(pid, "SIGKILL");
        const { code, stderr } = await run.fsl.end();
        expect(code).toBeOneOf([8, 137]);
        expect(stderr).toMatch(/ended by SIGKILL|QEMU ended before all RAM was in/);
        expect(await run.leftovers()).toEqual([]);
      }
    },
    SOAK_MS,
  );

  test(
    "that quits while it is loaded: fsl ends with its exit code",
    async () => {
      await using run = await loading();
      await run.qmp.execute("quit");
      expect((await run.fsl.end()).code).toBe(0);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  testOnBoth<SnapshotSpec>(BARE, { ...BARE, accel: "kvm", machine: "pc" })(
    "that is stopped and continued while it is loaded goes on",
    async (spec) => {
      const snapshot = await snapshotOf(spec);
      await using run = await FaultRun.start(snapshot, { flags: ["--eager-rate", "20M"] });
      await run.reached(PHASE_RUNNING);
      const pid = await run.qemuPid();
      process.kill(pid, "SIGSTOP");
      await run.fsl.stderr.waitFor(/all RAM in after|\d+% of/);
      process.kill(pid, "SIGCONT");
      await run.serial.waitForNext(/^tick \d+ ok/);
      await run.fsl.stderr.waitFor(/all RAM in after/);
      expect(await differencesOfBareGuest(snapshot, { pid, qmp: run.qmp })).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "that is stopped while it starts, for a while: fsl waits",
    async () => {
      const snapshot = await snapshotOf(BARE);
      await using run = await FaultRun.start(snapshot);
      const pid = await run.qemuPid();
      process.kill(pid, "SIGSTOP");
      await until(
        () => (readdirSync(join(run.directory, "run")).length > 0 ? true : null),
        5000,
        "a directory",
      );
      await Bun.sleep(300);
      process.kill(pid, "SIGCONT");
      await run.serial.waitForNext(/^tick \d+ ok/);
      await run.fsl.stderr.waitFor(/all RAM in after/);
      expect(await differencesOfBareGuest(snapshot, { pid, qmp: run.qmp })).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "is not left behind by a mistake in fsl's own arguments",
    async () => {
      const snapshot = await snapshotOf(BARE);
      for (const flags of [
        ["--offset", "nonsense"],
        ["--report", "/nowhere/report.json"],
        ["--eager-rate", "x"],
      ]) {
        await using run = await FaultRun.start(snapshot, { flags });
        expect((await run.fsl.end()).code).toBe(2);
        expect(await run.leftovers()).toEqual([]);
      }
    },
    TIMEOUT_MS,
  );

  test(
    "is not left behind by a snapshot that is none",
    async () => {
      const directory = mkdtempSync(join(tmpdir(), "fsl-fault-none-"));
      try {
        writeFileSync(join(directory, "none"), "not a snapshot");
        for (const [path, code] of [
          ["none", 4],
          ["missing", 3],
        ] as const) {
          const snapshot = await snapshotOf(BARE);
          await using run = await FaultRun.start(snapshot, { path: join(directory, path) });
          expect((await run.fsl.end()).code).toBe(code);
          expect(await run.leftovers()).toEqual([]);
        }
      } finally {
        rmSync(directory, { recursive: true });
      }
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(reason !== null)("two loaders", () => {
  test(
    "on one QEMU: the second is refused, the first goes on",
    async () => {
      await using run = await loading();
      const { code, stderr } = await (await run.resume()).end();
      expect(stderr).toContain("another fsl serves it");
      expect(code).toBe(8);
      expect(await run.status()).toMatchObject({ served: true });
      await wholeRound(run.serial);
    },
    TIMEOUT_MS,
  );

  test(
    "that want to go on with one load: one of them does",
    async () => {
      await using run = await loading();
      const pid = await run.qemuPid();
      await run.fsl.kill();
      await someoneWaits(pid);
      const rivals = await Promise.all([run.resume(), run.resume(), run.resume()]);
      const ends = await Promise.all(rivals.map((rival) => rival.end()));
      expect(ends.filter(({ code }) => code === 0)).toHaveLength(1);
      for (const { code, stderr } of ends) {
        if (code !== 0)
          expect(stderr).toMatch(
            /another fsl serves it|has no load of fsl|all its RAM is in already/,
          );
      }
      const qemu = { pid, qmp: run.qmp };
      expect(await differencesOfBareGuest(await snapshotOf(BARE), qemu)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "with two guests from one snapshot at once: both are right",
    async () => {
      const snapshot = await snapshotOf({});
      const flags = ["--eager-rate", "20M"];
      await using one = await FaultRun.start(snapshot, { flags });
      await using two = await FaultRun.start(snapshot, { flags });
      for (const run of [one, two]) await run.serial.waitFor(/^tick /);
      const sums = await Promise.all([one, two].map((run) => run.serial.command("sum")));
      for (const [verdict, , checksum] of sums)
        expect([verdict, checksum]).toEqual(["ok", snapshot.checksum]);
      for (const run of [one, two]) await run.fsl.stderr.waitFor(/all RAM in after/);
      for (const run of [one, two]) expect((await run.serial.command("verify"))[0]).toBe("ok");
    },
    TIMEOUT_MS,
  );
});
