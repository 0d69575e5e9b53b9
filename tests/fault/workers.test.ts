/**
 * Workers that throw or end while faults wait: replaced, and who waits is served; too often: said,
 * and the guest waits.
 */
import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { FaultRun, someoneWaits } from "../helpers/fault-runs.ts";
import { FAULTY_SOURCE, faultyProgram, type How, Switch } from "../helpers/fault-switch.ts";
import { snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import { differencesOfBareGuest } from "../helpers/load-oracle.ts";
import { whyNoExecutable } from "../helpers/load-runs.ts";

const TIMEOUT_MS = 60_000;
const reason = whyNoExecutable() ?? whyNoGuests();
const BARE = { guest: "bare" } as const;

async function start(on: Switch, how: How): Promise<FaultRun> {
  return FaultRun.start(await snapshotOf(BARE), faultyProgram(on, how));
}

async function expectEveryByte(run: FaultRun): Promise<void> {
  const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
  expect(await differencesOfBareGuest(await snapshotOf(BARE), qemu)).toEqual([]);
}

describe.skipIf(reason !== null)("a Worker", () => {
  test.each([
    ["throws", "throw", /fault Worker failed: thrown by the test; another one takes over/],
    ["ends", "end", /fault Worker failed: fault Worker ended unexpectedly; another one takes over/],
  ] as const)(
    "that %s is replaced, and the guest notices nothing",
    async (_, how, message) => {
      using on = new Switch();
      await using run = await start(on, { every: 300, timesMax: 6, how });
      await run.fsl.stderr.waitFor(message);
      await run.fsl.stderr.waitFor(/^all RAM in$/m);
      await expectEveryByte(run);
      expect(on.times).toBeGreaterThan(0);
      expect(run.fsl.stderr.text).not.toContain("given up");
      await run.qmp.execute("quit");
      expect((await run.fsl.end()).code).toBe(0);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "of faults that fails again and again is given up: the guest waits, another fsl goes on",
    async () => {
      using on = new Switch();
      await using run = await start(on, { every: 20, timesMax: 1000, how: "throw" });
      const pid = await run.qemuPid();
      await run.fsl.stderr.waitFor(
        /fault Worker failed: thrown by the test; given up: the guest waits/,
      );
      await run.fsl.stderr.waitFor(/^not all RAM in$/m);
      await someoneWaits(pid);
      expect(await run.status()).toMatchObject({ served: false });
      expect(run.serial.lines.filter(({ text }) => text.startsWith("tick"))).toEqual([]);
      on.off();
      const untold = await (await run.resume()).end();
      expect(untold.stderr).toMatch(/page source: expected none, found ".*fault-source\.ts"/);
      expect(untold.code).toBe(7);
      const resumed = await run.resume("--source", FAULTY_SOURCE);
      expect((await resumed.end()).code).toBe(0);
      await expectEveryByte(run);
      await run.qmp.execute("quit");
      expect((await run.fsl.end()).code).toBe(1);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "of the eager load that fails again and again is given up: pages come on demand",
    async () => {
      using on = new Switch();
      await using run = await start(on, { every: 1, timesMax: 1000, how: "throw in eager" });
      await run.fsl.stderr.waitFor(
        /eager Worker failed: thrown by the test; another one takes over/,
      );
      await run.fsl.stderr.waitFor(
        /eager Worker failed: thrown by the test; given up: the rest comes on demand/,
      );
      // QEMU itself asks for what the guest does not.
      const filename = join(run.directory, "memory");
      await run.qmp.execute("pmemsave", { val: 0, size: 64 << 20, filename });
      await run.fsl.stderr.waitFor(/^all RAM in$/m);
      await expectEveryByte(run);
      await run.qmp.execute("quit");
      expect((await run.fsl.end()).code).toBe(0);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "that is given up, and then SIGTERM: all ends",
    async () => {
      using on = new Switch();
      await using run = await start(on, { every: 20, timesMax: 1000, how: "end" });
      await run.fsl.stderr.waitFor(/given up: the guest waits/);
      const pid = await run.qemuPid();
      await someoneWaits(pid);
      run.fsl.signal("SIGTERM");
      expect((await run.fsl.end()).code).toBe(1);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );
});
