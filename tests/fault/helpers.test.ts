/**
 * Helper tasks of fsl (`fsl-helper`, src/load/chunk-mover.ts) that are killed with a chunk in hand:
 * its pages come otherwise, and whoever waits for the chunk is served.
 */
import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import {
  type BlockState,
  C_MOVED_CHUNKS,
  CHUNK_COPYING,
  CHUNK_MOVED,
  CHUNK_MOVING,
  type LoadState,
  PHASE_RUNNING,
} from "../../src/load/state.ts";
import { testMoving } from "../helpers/declare.ts";
import { FaultRun, openLoadState } from "../helpers/fault-runs.ts";
import { guestArgv, type GuestSnapshot, snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import {
  differencesFromOracle,
  differencesOfBareGuest,
  wholeRound,
} from "../helpers/load-oracle.ts";
import { childrenOf, nameOf, until, whyNoExecutable } from "../helpers/load-runs.ts";
import { type MatrixSnapshot, saveGuest } from "../helpers/matrix-guests.ts";

const TIMEOUT_MS = 60_000;
const WAIT_MS = 20_000;
const reason = whyNoExecutable() ?? whyNoGuests();
/** More than is read ahead (STAGED_CHUNKS), which comes before the eager load begins. */
const SPEC = { guest: "bare", memoryMiB: 160 } as const;
/** Every page counts as data: every second one is zero, and such a chunk would be copied. */
const SAVE = { ready: /^tick /, parameters: { "zero-page-detection": "none" } };
/** One eager Worker keeps them busy; another one is the fault Worker's. */
const EAGER_HELPERS = 2;
/** A chunk takes half a second of the rate, and is in hand for a moment of it. */
const FLAGS = ["--paused", "--eager-workers", `${EAGER_HELPERS}`, "--eager-rate", "4M"];

/** Helper tasks of an fsl, in the order in which they were made: those of the eager load first. */
function helpersOf(fsl: number): number[] {
  return childrenOf(fsl).filter((pid) => field(pid, "Name") === "fsl-helper");
}

function field(pid: number, name: string): string {
  const status = readFileSync(`/proc/${pid}/status`, "latin1");
  return new RegExp(`^${name}:\\s+(\\S+)`, "m").exec(status)?.[1] ?? "";
}

class ChunkInHand {
  readonly #block: BlockState;
  readonly #chunk: number;

  private constructor(block: BlockState, chunk: number) {
    this.#block = block;
    this.#chunk = chunk;
  }

  /** The chunk that a helper has in hand at this moment; null = none. */
  static find({ blocks }: LoadState): ChunkInHand | null {
    for (const block of blocks) {
      const chunk = block.chunks.findIndex((word) => word >= CHUNK_MOVING && word < CHUNK_COPYING);
      if (chunk >= 0) return new ChunkInHand(block, chunk);
    }
    return null;
  }

  /** Somebody needs a page of it, and waits until it is moved. */
  get isWanted(): boolean {
    return (this.#block.chunkFaultNs[this.#chunk] ?? 0) > 0;
  }

  /** Waits until no helper has it. @returns whether it came as a whole */
  async isMoved(): Promise<boolean> {
    const word = (): number => Atomics.load(this.#block.chunks, this.#chunk);
    const isInHand = (): boolean => word() >= CHUNK_MOVING && word() < CHUNK_COPYING;
    await until(() => (isInHand() ? null : true), WAIT_MS, "the chunk out of hand");
    return word() === CHUNK_MOVED;
  }
}

/**
 * Stops the helpers of an eager load that has begun, while none has a chunk: what they take in hand from
 * here on, they keep.
 */
async function stopIdle(helpers: readonly number[], state: LoadState): Promise<void> {
  const [eagerCounters, begun] = [state.counters(1), "the eager load's first chunk"];
  await until(() => (eagerCounters[C_MOVED_CHUNKS] ? true : null), WAIT_MS, begun);
  const signal = (name: NodeJS.Signals): void => helpers.forEach((pid) => process.kill(pid, name));
  for (;;) {
    await until(() => (ChunkInHand.find(state) === null ? true : null), WAIT_MS, "idle helpers");
    signal("SIGSTOP");
    const areStopped = (): boolean => helpers.every((pid) => field(pid, "State") === "T");
    await until(() => (areStopped() ? true : null), WAIT_MS, "stopped helpers");
    if (ChunkInHand.find(state) === null) return;
    signal("SIGCONT");
  }
}

/** A load whose guest does not run yet, and whose helpers are stopped with nothing in hand. */
async function stopped(run: FaultRun): Promise<{ eager: number[]; state: LoadState }> {
  await run.reached(PHASE_RUNNING);
  const pid = await run.qemuPid();
  const state = await until(() => openLoadState(pid), WAIT_MS, "a load state");
  const all = helpersOf(run.fsl.pid);
  expect(all.length).toBe(EAGER_HELPERS + 1);
  const eager = all.slice(0, EAGER_HELPERS);
  await stopIdle(eager, state);
  return { eager, state };
}

/** When all RAM is in the guest, which runs, finds it right, and so do we. */
async function expectRight(run: FaultRun, snapshot: MatrixSnapshot): Promise<void> {
  await run.fsl.stderr.waitFor(/all RAM in after/);
  await wholeRound(run.serial);
  const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
  const bare = snapshot as MatrixSnapshot & GuestSnapshot;
  expect(await differencesOfBareGuest(bare, qemu)).toEqual([]);
}

async function expectEnd(run: FaultRun): Promise<void> {
  await run.qmp.execute("quit");
  expect((await run.fsl.end()).code).toBe(0);
  expect(await run.leftovers()).toEqual([]);
}

describe.skipIf(reason !== null)("helper tasks of the eager load", () => {
  testMoving(
    "killed one after the other, each with a chunk in hand: its pages come, and a vCPU that waits",
    async () => {
      using snapshot = await saveGuest(guestArgv(SPEC), SAVE);
      await using run = await FaultRun.start(snapshot, { flags: FLAGS });
      const { eager, state } = await stopped(run);
      for (const [index, helper] of eager.entries()) {
        const inHand = await until(() => ChunkInHand.find(state), WAIT_MS, "a chunk in hand");
        if (index === EAGER_HELPERS - 1) {
          await run.qmp.execute("cont");
          await until(() => (inHand.isWanted ? true : null), WAIT_MS, "a vCPU that waits for it");
        }
        process.kill(helper, "SIGKILL");
        expect(await inHand.isMoved()).toBe(false);
      }
      state.unmap();
      await expectRight(run, snapshot);
      expect(run.report().complete).toBe(true);
      expect(run.fsl.stderr.text).not.toMatch(/Worker failed|given up/);
      await expectEnd(run);
    },
    TIMEOUT_MS,
  );

  test(
    "stopped while they read ahead are given up, and all pages come without them",
    async () => {
      const snapshot = await snapshotOf({ guest: "bare" });
      const before = new Set(helpersAnywhere());
      const starting = FaultRun.start(snapshot, { flags: ["--paused"] });
      for (const pid of await firstHelpers(before)) process.kill(pid, "SIGSTOP");
      await using run = await starting;
      await run.fsl.stderr.waitFor(/all RAM in after/);
      const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
      expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
      await expectEnd(run);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(reason !== null)("a helper task that somebody has stopped", () => {
  testMoving(
    "with a chunk that a vCPU waits for is told, and when it goes on so does the guest",
    async () => {
      using snapshot = await saveGuest(guestArgv(SPEC), SAVE);
      await using run = await FaultRun.start(snapshot, { flags: FLAGS });
      const { eager, state } = await stopped(run);
      const inHand = await until(() => ChunkInHand.find(state), WAIT_MS, "a chunk in hand");
      await run.qmp.execute("cont");
      await until(() => (inHand.isWanted ? true : null), WAIT_MS, "a vCPU that waits for it");
      await run.fsl.stderr.waitFor(/RAMBlock pc\.ram: a vCPU waits .* has not answered for 5 s/);
      for (const helper of eager) process.kill(helper, "SIGCONT");
      await run.fsl.stderr.waitFor(/the read that took so long has ended/);
      state.unmap();
      await expectRight(run, snapshot);
      await expectEnd(run);
    },
    TIMEOUT_MS,
  );
});

function helpersAnywhere(): number[] {
  const numbers = readdirSync("/proc").map(Number).filter(Number.isInteger);
  return numbers.filter((pid) => nameOf(pid) === "fsl-helper");
}

/** The helpers of the eager load that is just being started, as soon as there are any. */
function firstHelpers(before: ReadonlySet<number>): Promise<number[]> {
  const found = (): number[] | null => {
    const helpers = helpersAnywhere().filter((pid) => !before.has(pid));
    return helpers.length >= EAGER_HELPERS ? helpers.slice(0, EAGER_HELPERS) : null;
  };
  return until(found, WAIT_MS, "helpers");
}
