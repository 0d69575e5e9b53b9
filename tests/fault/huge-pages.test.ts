/**
 * Huge pages that run out while a guest is loaded. QEMU reserves them at its start; only a back end
 * with reserve=off can come too late. Whoever needs the page waits; no byte is wrong.
 */
import { describe, expect, test } from "bun:test";
import { FaultRun } from "../helpers/fault-runs.ts";
import {
  type GuestSnapshot,
  QEMU,
  type Qemu,
  snapshotOf,
  startQemu,
  whyNoGuests,
} from "../helpers/guests.ts";
import { differencesFromOracle } from "../helpers/load-oracle.ts";
import { whyNoExecutable } from "../helpers/load-runs.ts";
import { freeHugePages, hugePages, withArgument } from "../helpers/matrix-guests.ts";

const TIMEOUT_MS = 60_000;
const reason = whyNoExecutable() ?? whyNoGuests();
const SPEC = { guest: "bare", memoryBackend: "memory-backend-ram" } as const;
/** Of 2 MiB. The guest has 32. */
const LEFT = 10;

/** Another process that has all huge pages but a few. */
async function otherProcess(left = LEFT): Promise<Qemu> {
  const size = `${2 * (freeHugePages() - left)}M`;
  const backend = `memory-backend-memfd,id=all,hugetlb=on,hugetlbsize=2M,prealloc=on,size=${size}`;
  return startQemu([QEMU, "-M", "none", "-nodefaults", "-display", "none", "-object", backend]);
}

function startLoad(snapshot: GuestSnapshot, flags: readonly string[] = []): Promise<FaultRun> {
  const backend = "memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=on,reserve=off";
  const argv = withArgument(snapshot.argv, "memory-backend-ram", backend);
  return FaultRun.start(snapshot, { argv, flags });
}

/** A load that has come so far that the next page is refused. */
async function ranOut(snapshot: GuestSnapshot, flags: readonly string[]): Promise<FaultRun> {
  const run = await startLoad(snapshot, flags);
  try {
    const said = await run.fsl.stderr.waitFor(/RAMBlock ram0: page \d+ .*/);
    expect(said[0]).toContain("the host has no memory for it (pages of 2 MiB: vm.nr_hugepages)");
    return run;
  } catch (error) {
    await run[Symbol.asyncDispose]();
    throw error;
  }
}

describe.skipIf(reason !== null)("huge pages that run out", () => {
  test(
    "are waited for: with more of them the load comes to its end, every byte right",
    async () => {
      using _pages = await hugePages(60);
      const snapshot = await snapshotOf(SPEC);
      await using other = await otherProcess();
      await using run = await ranOut(snapshot, ["--paused"]);
      expect(await run.status()).toMatchObject({ served: true, phase: "running" });
      expect(run.fsl.stderr.text).not.toMatch(/all RAM in after/);
      await other.kill();
      await run.fsl.stderr.waitFor(/all RAM in after/);
      const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
      expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "while the guest runs: its vCPU waits, then its own check is right",
    async () => {
      using _pages = await hugePages(60);
      await using other = await otherProcess();
      await using run = await ranOut(await snapshotOf(SPEC), []);
      await run.fsl.stderr.waitFor(/the vCPU that needs it waits/);
      await other.kill();
      await run.serial.waitForNext(/^tick \d+ ok/);
      await run.serial.waitForNext(/^tick \d+ ok/);
      expect(run.serial.lines.filter(({ text }) => text.includes("BAD"))).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "after the load, for memory that was zero: QEMU dies of SIGBUS as without fsl, which is said",
    async () => {
      using _pages = await hugePages(140);
      const snapshot = await snapshotOf({ ...SPEC, guest: "linux" });
      await using run = await startLoad(snapshot);
      await run.fsl.stderr.waitFor(/all RAM in after/);
      await using _other = await otherProcess();
      const [verdict, , found] = await run.serial.command("sum");
      expect([verdict, found]).toEqual(["ok", snapshot.checksum]);
      run.serial.send("fill 96\n");
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain("QEMU died of SIGBUS: the host had no page for its memory");
      expect(code).toBe(135);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "before the guest runs, in memory that cannot be lazy: exit code 8, and nothing is left",
    async () => {
      using _pages = await hugePages(60);
      await using _other = await otherProcess();
      const balloon = ["-device", "virtio-balloon-pci"];
      const snapshot = await snapshotOf({ ...SPEC, extraArgs: balloon });
      await using run = await startLoad(snapshot);
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain("ram0 is loaded in full before resume");
      expect(stderr).toContain("the host has no memory for it (huge pages: vm.nr_hugepages)");
      expect(code).toBe(8);
      expect(run.serial.lines).toEqual([]);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "for ever, --on-error kill: exit code 9",
    async () => {
      using _pages = await hugePages(60);
      await using _other = await otherProcess();
      const flags = ["--on-error", "kill", "--error-limit-ms", "300"];
      await using run = await ranOut(await snapshotOf(SPEC), flags);
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain("is killed: a page could not be supplied");
      expect(code).toBe(9);
      expect(run.serial.lines.filter(({ text }) => text.includes("BAD"))).toEqual([]);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );
});
