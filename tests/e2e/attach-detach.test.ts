/** `fsl load --detach`: it returns when the guest runs, and a process in the background goes on. */
import { beforeAll, describe, expect, test } from "bun:test";
import { openSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { AttachRun, MarkedRun } from "../helpers/attach-runs.ts";
import {
  type GuestSnapshot,
  QmpClient,
  SerialConsole,
  snapshotOf,
  whyNoGuests,
} from "../helpers/guests.ts";
import { differencesFromOracle } from "../helpers/load-oracle.ts";
import { openFiles, until, whyNoExecutable } from "../helpers/load-runs.ts";

const TIMEOUT_MS = 60_000;
const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;

let snapshot: GuestSnapshot;
beforeAll(async () => {
  if (!skip) snapshot = await snapshotOf({ guest: "bare" });
}, TIMEOUT_MS);

/** Waits until no fsl of the run lives any more. */
async function backgroundEnd(run: MarkedRun): Promise<void> {
  const isOver = (): true | null => (run.processes("fsl").length === 0 ? true : null);
  await until(isOver, 30_000, "the end of fsl in the background");
}

/** The guest looks at all its memory for each. */
async function twoTicks(serial: SerialConsole): Promise<void> {
  for (let tick = 0; tick < 2; tick += 1) await serial.waitForNext(/^tick \d+ ok/);
  expect(serial.lines.filter(({ text }) => text.includes("BAD"))).toEqual([]);
}

describe.skipIf(skip)("fsl load --qmp --detach", () => {
  test(
    "returns when the state is loaded; the rest comes in the background",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const flags = ["--detach", "--paused", "--eager-rate", "20M"];
      const { code, stderr } = await run.attach(snapshot, ...flags).end(10_000);
      expect({ code, stderr }).toEqual({
        code: 0,
        stderr: expect.stringMatching(/QEMU \d+ has its state after .* fsl \d+ brings in/) as never,
      });
      const background = await run.process("fsl");
      expect(stderr).toContain(`fsl ${background} brings in`);
      expect(await run.status(run.pid)).toMatchObject({ served: true, phase: "running" });
      // A session of its own: no terminal reaches it.
      const stat = readFileSync(`/proc/${background}/stat`, "latin1").split(") ")[1] ?? "";
      expect(Number(stat.split(" ")[3])).toBe(background);
      await backgroundEnd(run);
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
      expect(await run.traits()).toEqual(before);
    },
    TIMEOUT_MS,
  );

  test(
    "lets the guest run, which goes on while the rest comes and after that",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      expect((await run.attach(snapshot, "--detach", "--eager-rate", "20M").end()).code).toBe(0);
      await twoTicks(run.serial);
      await backgroundEnd(run);
      await twoTicks(run.serial);
      expect(await run.traits()).toEqual(before);
    },
    TIMEOUT_MS,
  );

  test(
    "killed in the background: fsl status shows it, fsl resume goes on",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const flags = ["--detach", "--paused", "--eager-rate", "4M"];
      expect((await run.attach(snapshot, ...flags).end()).code).toBe(0);
      process.kill(await run.process("fsl"), "SIGKILL");
      await backgroundEnd(run);
      expect(await run.status(run.pid)).toMatchObject({ served: false, phase: "running" });
      const { code, stderr } = await run.resume(run.pid);
      expect([code, stderr]).toEqual([0, expect.stringContaining("all RAM is in")]);
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
      expect(await run.traits()).toEqual(before);
    },
    TIMEOUT_MS,
  );

  test(
    "says why it failed, with the exit code of that",
    async () => {
      await using run = await AttachRun.start(snapshot, { incoming: [] });
      const { code, stderr } = await run.attach(snapshot, "--detach").end();
      expect([code, stderr]).toEqual([7, expect.stringMatching(/^fsl: QEMU is not waiting/m)]);
      expect(run.processes("fsl")).toEqual([]);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(skip)("fsl load --detach", () => {
  interface Started {
    readonly pid: number;
    readonly qmp: QmpClient;
  }

  /** The snapshot's QEMU in the background, with a monitor of the test's. */
  async function start(run: MarkedRun, ...flags: readonly string[]): Promise<Started> {
    return startWith(run, ["-serial", "null"], ...flags);
  }

  async function startWith(
    run: MarkedRun,
    serial: readonly string[],
    ...flags: readonly string[]
  ): Promise<Started> {
    const qmp = await QmpClient.listen(join(run.directory, "monitor"));
    const own = ["--detach", "--working-set", "none", ...flags, "--", ...snapshot.argv];
    const load = ["load", snapshot.path, ...own, ...serial, ...qmp.args];
    const { code, stderr } = await run.run(...load);
    expect({ code, stderr }).toEqual({
      code: 0,
      stderr: expect.stringContaining("brings in its RAM in the background") as never,
    });
    return { pid: await run.process("qemu-system"), qmp };
  }

  test(
    "leaves a QEMU that lives on without fsl",
    async () => {
      await using run = new MarkedRun();
      const { pid, qmp } = await start(run, "--paused", "--eager-rate", "20M");
      expect(await run.status(pid)).toMatchObject({ served: true });
      expect(openFiles(pid)[0]).toBe("/dev/null");
      // A shutdown of the host sends it too: the rest comes first.
      process.kill(await run.process("fsl"), "SIGTERM");
      await backgroundEnd(run);
      expect(await differencesFromOracle(snapshot, { pid, qmp })).toEqual([]);
      expect(openFiles(pid).filter((link) => /userfaultfd|fsl-(?!q)/.test(link))).toEqual([]);
      expect(run.files()).toEqual([]);
      expect(await qmp.execute("query-status")).toMatchObject({ running: false });
      qmp.close();
    },
    TIMEOUT_MS,
  );

  test(
    "lets the guest run; killed in the background it waits, and runs on with fsl resume",
    async () => {
      await using run = new MarkedRun();
      const serial = await SerialConsole.listen(join(run.directory, "serial"));
      const { pid, qmp } = await startWith(run, serial.args, "--eager-rate", "256K");
      expect(await run.status(pid)).toMatchObject({ served: true, phase: "running" });
      await twoTicks(serial);
      process.kill(await run.process("fsl"), "SIGKILL");
      await backgroundEnd(run);
      expect((await run.resume(pid)).code).toBe(0);
      await twoTicks(serial);
      expect(run.files()).toEqual([]);
      qmp.close();
      serial.close();
    },
    TIMEOUT_MS,
  );

  test(
    "killed in the background: QEMU waits, and fsl resume goes on",
    async () => {
      await using run = new MarkedRun();
      const { pid, qmp } = await start(run, "--paused", "--eager-rate", "4M");
      process.kill(await run.process("fsl"), "SIGKILL");
      await backgroundEnd(run);
      expect(await run.status(pid)).toMatchObject({ served: false });
      expect((await run.resume(pid)).code).toBe(0);
      expect(await differencesFromOracle(snapshot, { pid, qmp })).toEqual([]);
      expect(run.files()).toEqual([]);
      qmp.close();
    },
    TIMEOUT_MS,
  );

  test(
    "passes on what QEMU says when it cannot start, with its exit code",
    async () => {
      await using run = new MarkedRun();
      const qemu = [...snapshot.argv, "-device", "nonesuch"];
      const { code, stderr } = await run.run("load", snapshot.path, "--detach", "--", ...qemu);
      expect([code, stderr]).toEqual([8, expect.stringContaining("'nonesuch'")]);
      expect(stderr).toMatch(/^fsl: .* ended with exit code 1 before/m);
      expect([run.processes("qemu"), run.processes("fsl"), run.files()]).toEqual([[], [], []]);
    },
    TIMEOUT_MS,
  );

  test(
    "writes on into a file that stderr is",
    async () => {
      await using run = new MarkedRun();
      const path = join(run.directory, "log");
      const argv = ["load", snapshot.path, "--detach", "--", ...snapshot.argv];
      const program = join(import.meta.dir, "../../dist/fsl");
      const child = Bun.spawn([program, ...argv, "-serial", "null", "-S"], {
        stdio: ["ignore", "ignore", openSync(path, "a", 0o600)],
        env: run.env,
        cwd: run.directory,
      });
      expect(await child.exited).toBe(0);
      await backgroundEnd(run);
      const text = readFileSync(path, "utf8");
      expect(text).toMatch(/has its state after/);
      expect(text).toMatch(/all RAM in after/);
      // -S is as good as --paused.
      expect(text).toMatch(/not resumed/);
    },
    TIMEOUT_MS,
  );
});
