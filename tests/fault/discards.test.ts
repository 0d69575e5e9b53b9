/**
 * Memory that the guest gives back while its RAM comes in (its real balloon driver) is zero
 * afterwards, never the snapshot's bytes; also when fsl is killed in between.
 */
import { describe, expect, test } from "bun:test";
import { closeSync, openSync, readSync } from "node:fs";
import { nextBit, testBit } from "../../src/bits.ts";
import { PHASE_RUNNING } from "../../src/load/state.ts";
import {
  FaultRun,
  openLoadState,
  randomNumbers,
  repetitions,
  SEED,
} from "../helpers/fault-runs.ts";
import { snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import { whyNoExecutable } from "../helpers/load-runs.ts";

const POLL_MS = 20;
const TIMEOUT_MS = 120_000;
const SOAK_MS = 3_600_000;
const reason = whyNoExecutable() ?? whyNoGuests();
const MIB = 1 << 20;
const PAGE = 4096;
/** Memory that was full of data and is free: what the balloon takes has bytes in the snapshot. */
const SPEC = {
  extraArgs: ["-device", "virtio-balloon-pci,id=balloon0"],
  commands: ["fill 64", "free 64"],
};

/** Asks again until the balloon is there: its event comes once a second at most. */
async function balloonTo(run: FaultRun, bytes: number): Promise<void> {
  await run.qmp.execute("balloon", { value: bytes });
  const endMs = performance.now() + 60_000;
  for (;;) {
    const { actual } = await run.qmp.execute<{ actual: number }>("query-balloon");
    if (actual === bytes) return;
    if (performance.now() > endMs) throw new Error(`the balloon stays at ${actual}`);
    await Bun.sleep(20);
  }
}

/** Pages with data in the snapshot that count as done and are not in memory: given back. */
function discardedPages(pid: number): number[] {
  const state = openLoadState(pid);
  if (state === null) throw new Error("the load is over");
  const pagemap = openSync(`/proc/${pid}/pagemap`, "r");
  const found: number[] = [];
  const entry = new BigUint64Array(1);
  const bytes = new Uint8Array(entry.buffer);
  try {
    for (const { block, data, done, pageCount } of state.blocks) {
      for (let page = nextBit(data, 0, pageCount, true); page < pageCount;) {
        const address = block.hostAddr + page * PAGE;
        readSync(pagemap, bytes, 0, 8, (address / PAGE) * 8);
        // Bits 63 and 62: present, swapped.
        if (testBit(done, page) && (entry[0] ?? 0n) >> 62n === 0n) found.push(address);
        page = nextBit(data, page + 1, pageCount, true);
      }
    }
  } finally {
    closeSync(pagemap);
    state.unmap();
  }
  return found;
}

function isZero(pid: number, address: number): boolean {
  const memory = openSync(`/proc/${pid}/mem`, "r");
  try {
    const page = new Uint8Array(PAGE);
    readSync(memory, page, 0, PAGE, address);
    return page.every((byte) => byte === 0);
  } finally {
    closeSync(memory);
  }
}

describe.skipIf(reason !== null)("memory that the guest gives back", () => {
  test(
    "before fsl is killed stays zero after fsl resume",
    async () => {
      const snapshot = await snapshotOf(SPEC);
      await using run = await FaultRun.start(snapshot, { flags: ["--eager-rate", "1M"] });
      await run.reached(PHASE_RUNNING);
      await run.serial.waitFor(/^tick /);
      const pid = await run.qemuPid();
      await balloonTo(run, 192 * MIB);
      await run.qmp.execute("stop");
      const discarded = discardedPages(pid);
      expect(discarded.length).toBeGreaterThan(1000);
      await run.fsl.kill();
      const { code } = await (await run.resume()).end();
      expect(code).toBe(0);
      expect(discarded.filter((address) => !isZero(pid, address))).toEqual([]);
      await run.qmp.execute("cont");
      await balloonTo(run, 256 * MIB);
      expect((await run.serial.command("sum")).slice(0, 1)).toEqual(["ok"]);
      expect((await run.serial.command("verify"))[0]).toBe("ok");
    },
    TIMEOUT_MS,
  );

  test(
    "while fsl is killed and another one goes on, at random moments",
    async () => {
      const snapshot = await snapshotOf(SPEC);
      const random = randomNumbers(SEED + 4);
      for (let round = 0; round < repetitions(2, 50); round += 1) {
        await using run = await FaultRun.start(snapshot, { flags: ["--eager-rate", "20M"] });
        await run.reached(PHASE_RUNNING);
        await run.serial.waitFor(/^tick /);
        const pid = await run.qemuPid();
        const inflated = balloonTo(run, 192 * MIB);
        await Bun.sleep(random() * 400);
        await run.fsl.kill();
        // It was quicker than the kill, now and then.
        const resumed =
          (await run.status()) === null ? null : await run.resume("--eager-rate", "20M");
        await inflated;
        await run.qmp.execute("stop");
        const discarded = openLoadState(pid) === null ? [] : discardedPages(pid);
        if (resumed !== null) expect((await resumed.end()).code).toBe(0);
        expect(discarded.filter((address) => !isZero(pid, address))).toEqual([]);
        await run.qmp.execute("cont");
        await balloonTo(run, 256 * MIB);
        expect((await run.serial.command("verify"))[0]).toBe("ok");
      }
    },
    SOAK_MS,
  );

  test.each([
    ["private memory", {}, false],
    ["shared memory", { memoryBackend: "memory-backend-memfd,share=on" }, false],
    ["private memory, after fsl resume", {}, true],
  ])(
    "by a balloon that is plugged in while RAM comes in: the guest waits for all of it (%s)",
    async (_, memory, isResumed) => {
      const snapshot = await snapshotOf({
        machine: "pc",
        commands: ["fill 64", "free 64"],
        ...memory,
      });
      await using run = await FaultRun.start(snapshot, { flags: ["--eager-rate", "1M"] });
      await run.reached(PHASE_RUNNING);
      await run.serial.waitFor(/^tick /);
      const pid = await run.qemuPid();
      const state = openLoadState(pid);
      const ram = state?.blocks.find(({ block }) => /ram/.test(block.idstr));
      if (ram === undefined) throw new Error("no RAM");
      const { hostAddr } = ram.block;
      const data = ram.data.slice();
      state?.unmap();
      if (isResumed) await run.fsl.kill();
      const fsl = isResumed ? await run.resume("--eager-rate", "1M") : run.fsl;
      // While nobody serves, nobody looks for new devices either.
      while ((await run.status())?.served !== true) await Bun.sleep(POLL_MS);
      // QEMU tells on stderr which pages it is given.
      await run.qmp.hmp("trace-event virtio_balloon_handle_output on");
      await run.qmp.execute("device_add", { driver: "virtio-balloon-pci", id: "balloon0" });
      await balloonTo(run, 192 * MIB);
      expect(fsl.stderr.text).toContain("virtio-balloon-pci was plugged in while RAM comes in");
      await fsl.stderr.waitFor(isResumed ? /all RAM is in/ : /all RAM in after/);
      expect(await run.qmp.execute<object>("query-status")).toMatchObject({ running: true });
      await run.qmp.execute("stop");
      const told = /virtio_balloon_handle_output.* gpa: (0x\w+)/g;
      const given = [...run.fsl.stderr.text.matchAll(told)]
        .map(([, gpa]) => Number(gpa) / PAGE)
        .filter((page) => testBit(data, page));
      expect(given.length).toBeGreaterThan(1000);
      const wrong = given.filter((page) => !isZero(pid, hostAddr + page * PAGE));
      expect(wrong.length).toBe(0);
      await run.qmp.execute("cont");
      await balloonTo(run, 256 * MIB);
      expect((await run.serial.command("sum")).slice(0, 1)).toEqual(["ok"]);
      expect((await run.serial.command("verify"))[0]).toBe("ok");
    },
    TIMEOUT_MS,
  );
});
