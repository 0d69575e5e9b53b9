/**
 * The guest's own verdict: it checks its memory while that is still coming in, by faults and by the
 * eager load.
 */
import { describe, expect, test } from "bun:test";
import {
  type GuestSnapshot,
  type SnapshotSpec,
  snapshotOf,
  whyNoGuests,
} from "../helpers/guests.ts";
import { testOn } from "../helpers/kvm.ts";
import { FslRun, whyNoExecutable } from "../helpers/load-runs.ts";
import type { LoadReport } from "../../src/index.ts";

const TIMEOUT_MS = 60_000;
const MIB = 2 ** 20;
const PAGE = 4096;
const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;
const KVM: SnapshotSpec = {
  guest: "bare",
  accel: "kvm",
  machine: "microvm",
  machineOptions: "acpi=off",
};

/** Number in the last line that the guest printed before it was saved. */
function lastNumber(snapshot: GuestSnapshot): number {
  return Number(/\d+/.exec(snapshot.lastLine)?.[0]);
}

/**
 * Starts a load, and waits until the guest runs: what its serial port is sent before that is lost.
 */
async function startRunning(
  snapshot: GuestSnapshot,
  flags: readonly string[] = [],
): Promise<FslRun> {
  const run = await FslRun.start(snapshot, { flags });
  try {
    await run.hasState();
    const { running } = await run.qmp.execute<{ running: boolean }>("query-status");
    if (!running) await run.qmp.waitEvent("RESUME");
    return run;
  } catch (error) {
    await run[Symbol.asyncDispose]();
    throw error;
  }
}

/** Lets everything come in and QEMU end. */
async function finish(run: FslRun): Promise<LoadReport> {
  const report = await run.complete();
  await run.qmp.execute("quit");
  expect(await run.end()).toBe(0);
  expect(run.leftovers()).toEqual([]);
  return report;
}

/** What the report promises, whatever the load was. */
function expectContract(report: LoadReport): void {
  const { qemuReadyMs, armedMs, resumedMs, residentMs, faults, faultLatencyUs } = report;
  const times = [qemuReadyMs, armedMs, resumedMs, residentMs].map((ms) => ms ?? Number.NaN);
  expect(times.every((ms) => ms > 0)).toBe(true);
  expect(times).toEqual(times.toSorted((a, b) => a - b));
  const { p50, p99, max, histogram } = faultLatencyUs;
  const counted = histogram.reduce((sum, { count }) => sum + count, 0);
  expect(counted).toBeLessThanOrEqual(faults);
  if (counted === 0) {
    expect([p50, p99, max]).toEqual([null, null, null]);
  } else {
    const quantiles = [p50, p99, max].map((us) => us ?? Number.NaN);
    expect(quantiles.every((us) => us > 0)).toBe(true);
    expect(quantiles).toEqual(quantiles.toSorted((a, b) => a - b));
  }
  for (const cause of ["fault", "eager", "zero"] as const) {
    expect(report.bytes[cause]).toBe(report.pages[cause] * PAGE);
  }
}

describe.skipIf(skip)("a Linux guest", () => {
  test.each(["pc", "q35", "microvm"] as const)(
    "finds its data right while the eager load is still running, and ticks on: %s",
    async (machine) => {
      const snapshot = await snapshotOf({ machine });
      // Some 140 MiB of data: the checksum of its 64 MiB is there long before they are.
      await using run = await startRunning(snapshot, ["--eager-rate", "4M"]);
      const [verdict, , checksum] = await run.serial.command("sum");
      expect(run.stderr.text).not.toMatch(/all RAM in after/);
      expect([verdict, checksum]).toEqual(["ok", snapshot.checksum]);
      const tick = await run.serial.waitFor(/^tick /);
      expect(tick.text).toBe(`tick ${lastNumber(snapshot) + 1}`);
      await run.qmp.execute("quit");
      expect(await run.end()).toBe(0);
      const report = run.report();
      expect(report.complete).toBe(false);
      // By far the most of it must have come because the guest asked for it.
      const { fault, eager, zero } = report.pages;
      expect(fault + eager + zero).toBeGreaterThan((64 * MIB) / PAGE);
      expect(fault).toBeGreaterThan((32 * MIB) / PAGE);
      expect(run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "finds its data right during and after a load at full speed",
    async () => {
      const snapshot = await snapshotOf({ machine: "q35" });
      await using run = await startRunning(snapshot);
      expect(await run.serial.command("sum")).toMatchObject({ 0: "ok", 2: snapshot.checksum });
      await run.stderr.waitFor(/all RAM in after/);
      expect((await run.serial.command("verify")).slice(0, 1)).toEqual(["ok"]);
      expect(await run.serial.command("random 5000")).toMatchObject({ 0: "ok" });
      const report = await finish(run);
      expectContract(report);
      expect(report).toMatchObject({ mode: "lazy", complete: true });
    },
    TIMEOUT_MS,
  );

  test(
    "finds its data right with four vCPUs that fault at once",
    async () => {
      const snapshot = await snapshotOf({ machine: "q35", smp: 4 });
      await using run = await startRunning(snapshot, ["--eager-rate", "4M"]);
      expect(await run.serial.command("sum 4")).toMatchObject({ 0: "ok", 2: snapshot.checksum });
      expect(run.stderr.text).not.toMatch(/all RAM in after/);
    },
    TIMEOUT_MS,
  );

  test(
    "can write to pages that are not there yet, and to those that came",
    async () => {
      const snapshot = await snapshotOf({ machine: "q35" });
      await using run = await startRunning(snapshot, ["--eager-rate", "16M"]);
      for (const line of ["poke 500", "rewrite 7", "fill 32", "free 32"]) {
        expect(await run.serial.command(line)).toMatchObject({ 0: "ok" });
      }
      expect((await run.serial.command("verify")).slice(0, 1)).toEqual(["ok"]);
      const report = await run.complete();
      expect(report.faultLatencyUs.histogram).not.toEqual([]);
      expectContract(report);
      expect((await run.serial.command("verify")).slice(0, 1)).toEqual(["ok"]);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(skip)("the bare guest", () => {
  /**
   * Runs it until it has seen all its pages `rounds` times, at an eager rate that brings next to
   * nothing.
   */
  async function rounds(spec: SnapshotSpec, count: number): Promise<[LoadReport, number]> {
    const snapshot = await snapshotOf(spec);
    const flags = ["--eager-rate", "4K", "--eager-workers", "1"];
    await using run = await FslRun.start(snapshot, { flags });
    const ticks: string[] = [];
    for (let round = 1; round <= count; round += 1) {
      const { text } = await run.serial.waitFor(new RegExp(`^tick ${round} `), TIMEOUT_MS);
      ticks.push(text);
    }
    expect(ticks).toEqual(ticks.map((_, index) => `tick ${index + 1} ok`));
    expect(run.serial.lines.filter(({ text }) => text.includes("BAD"))).toEqual([]);
    expect(run.serial.lines[0]?.text).toBe(`beat ${lastNumber(snapshot) + 1}`);
    await run.qmp.execute("quit");
    expect(await run.end()).toBe(0);
    expect(run.leftovers()).toEqual([]);
    return [run.report(), Math.floor((snapshot.memoryMiB - 2) * 256 * (2 / 3))];
  }

  test(
    "verifies its pattern while every page comes by fault, on TCG",
    async () => {
      const [report, dataPages] = await rounds({ guest: "bare" }, 2);
      expect(report.pages.fault).toBeGreaterThan(0.9 * dataPages);
      expect(report.faults).toBeGreaterThan(dataPages / 16);
    },
    TIMEOUT_MS,
  );

  test(
    "finds zeros where nothing was saved, and its pattern elsewhere",
    async () => {
      const spec: SnapshotSpec = { guest: "bare", memoryMiB: 256, guestOptions: "zero=upper" };
      const [report] = await rounds(spec, 1);
      // Long runs of zeros are the kernel's own business: hardly a fault in 127 MiB of them.
      expect(report.pages.zero).toBeLessThan(4096);
      expect(report.pages.fault).toBeGreaterThan(20_000);
    },
    TIMEOUT_MS,
  );

  testOn("kvm")(
    "verifies its pattern while every page comes by fault, on KVM",
    async () => {
      const [report, dataPages] = await rounds(KVM, 2);
      expect(report.pages.fault).toBeGreaterThan(0.9 * dataPages);
      expect(report.faults).toBeGreaterThan(dataPages / 16);
    },
    TIMEOUT_MS,
  );

  test(
    "goes on with pages that it changes all the time, saved live",
    async () => {
      const live: SnapshotSpec = {
        guest: "bare",
        live: true,
        bandwidthMiB: 20,
        guestOptions: "churn=4096",
      };
      await using run = await FslRun.start(await snapshotOf(live), {
        flags: ["--eager-rate", "8M"],
      });
      await run.serial.waitFor(/^tick \d+ /);
      await run.serial.waitForNext(/^tick \d+ /);
      const ticks = run.serial.lines.filter(({ text }) => text.startsWith("tick"));
      expect(ticks.every(({ text }) => text.endsWith(" ok"))).toBe(true);
    },
    TIMEOUT_MS,
  );

  test(
    "comes up stopped with --paused and goes on by the user's own cont",
    async () => {
      const snapshot = await snapshotOf({ guest: "bare" });
      await using run = await FslRun.start(snapshot, { flags: ["--paused", "--eager-rate", "4K"] });
      await run.hasState();
      const { status } = await run.qmp.execute<{ status: string }>("query-status");
      expect(["paused", "prelaunch"]).toContain(status);
      expect(run.serial.lines).toEqual([]);
      await run.qmp.execute("cont");
      expect((await run.serial.waitFor(/^tick /)).text).toMatch(/ ok$/);
      await run.qmp.execute("quit");
      expect(await run.end()).toBe(0);
      expect(run.report()).toMatchObject({ resumedMs: null, complete: false });
    },
    TIMEOUT_MS,
  );
});
