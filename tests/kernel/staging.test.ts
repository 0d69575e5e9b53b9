/**
 * Chunks that are read ahead, then moved into a target's memory: a real userfaultfd, real helpers, a
 * target that reads its memory back.
 */
import { afterEach, describe, expect } from "bun:test";
import { alignBlocks, orderChunks } from "../../src/load/order.ts";
import { planStaging, Staging } from "../../src/load/staging.ts";
import { type LoadState, C_EAGER_PAGES, CHUNK_FREE, CHUNK_MOVED } from "../../src/load/state.ts";
import { WholeChunks } from "../../src/load/whole-chunks.ts";
import { testMoving as test } from "../helpers/declare.ts";
import { HelperBench, HUGE, HUGE_PAGES, hugeKib, PAGE, stateOf } from "../helpers/helper-target.ts";
import { until, within } from "../helpers/kernel-target.ts";
import { makeState } from "../helpers/load-states.ts";

const TIMEOUT_MS = 20_000;
/** More for each helper than an eager load's packet has. */
const CHUNKS = 20;
const SLOTS = 12;
/** So many fit when each has as many pieces as may be. */
const PIECED_CHUNKS = 6;
const WORKER = 8;

let bench: HelperBench | undefined;
afterEach(async () => {
  await bench?.end();
  bench = undefined;
});

/** A target with two helpers, and a load of it. */
async function start(data: readonly (readonly [number, number])[] = [[0, CHUNKS * HUGE_PAGES]]) {
  bench = await HelperBench.start("thp", CHUNKS, 2, 0, SLOTS);
  const it = bench;
  const spec = {
    pages: CHUNKS * HUGE_PAGES,
    hostAddr: it.addr,
    movable: true,
    pagesOffset: 0,
    data,
  };
  const made = makeState([spec]);
  const { state } = made;
  const [block] = state.blocks;
  if (block === undefined) throw new Error("no block");
  const whole = new WholeChunks({
    uffd: it.uffd,
    state,
    counters: state.counters(WORKER),
    workerIndex: WORKER,
    movers: [],
    readsEvents: false,
    pagesCounter: C_EAGER_PAGES,
  });
  const { pageSize, pagesOffset, idstr } = block.block;
  const { pageCount } = block;
  const aligned = alignBlocks([{ idstr, pageSize, pageCount, pagesOffset, data: block.data }]);
  const begin = (chunks: number): Staging => {
    const records = it.tasks.map(({ record }) => record);
    const plan = planStaging(aligned, orderChunks(aligned), null, chunks);
    return new Staging(plan, records, it.file.fd);
  };
  return { it, state, block, whole, begin, made };
}

/** KiB of huge pages in the helpers' staging memory. */
function stagedKib(it: HelperBench): number {
  const [first] = it.tasks;
  const staging = it.tasks.map(({ record }) => record.stagingAddr);
  return hugeKib(it.target.pid, Math.min(...staging), 2 * (first?.record.stagingLength ?? 0));
}

/** Stops it, and waits until its helpers have said so. */
async function stopped(staging: Staging): Promise<void> {
  staging.stop();
  await until(() => staging.isAnswered || null, 5000, "the helpers' answers");
}

/** @returns how many chunks have come */
function moveAll(staging: Staging, state: LoadState, whole: WholeChunks): number {
  staging.startMoves(state, whole);
  return staging.endMoves();
}

describe("Staging", () => {
  test(
    "brings what was read as huge pages, marks and counts it, and leaves nothing behind",
    async () => {
      const { it, state, block, whole, begin, made } = await start();
      using _ = made;
      const staging = begin(CHUNKS);
      await until(() => staging.isAnswered || null, 15_000, "all chunks read");
      expect(stagedKib(it)).toBe(CHUNKS * 2048);
      await stopped(staging);
      expect(moveAll(staging, state, whole)).toBe(CHUNKS);
      expect([...block.chunks]).toEqual(Array(CHUNKS).fill(CHUNK_MOVED));
      expect(state.counters(WORKER)[C_EAGER_PAGES]).toBe(CHUNKS * HUGE_PAGES);
      expect(stagedKib(it)).toBe(0);
      expect(hugeKib(it.target.pid, it.addr, CHUNKS * HUGE)).toBe(CHUNKS * 2048);
      expect(await it.read(0, CHUNKS * HUGE_PAGES)).toBe(it.crc(0, CHUNKS * HUGE_PAGES));
      expect(it.hasFault()).toBe(false);
    },
    TIMEOUT_MS,
  );

  test(
    "zero pages of a chunk are zero, whatever the file has there",
    async () => {
      const { it, state, whole, begin, made } = await start([
        [3, 5],
        [300, 512],
      ]);
      using _ = made;
      const staging = begin(1);
      await until(() => staging.isAnswered || null, 15_000, "a chunk read");
      await stopped(staging);
      expect(moveAll(staging, state, whole)).toBe(1);
      const zeros = Bun.hash.crc32(new Uint8Array(3 * PAGE));
      expect([await it.read(0, 3), await it.read(5, 3)]).toEqual([zeros, zeros]);
      expect([await it.read(3, 2), await it.read(300, 212)]).toEqual([
        it.crc(3, 2),
        it.crc(300, 212),
      ]);
    },
    TIMEOUT_MS,
  );

  test(
    "reads all chunks of the plan, in as many pieces as a chunk may have",
    async () => {
      const runs: [number, number][] = [];
      for (let page = 0; page < PIECED_CHUNKS * HUGE_PAGES; page += 8) runs.push([page, page + 4]);
      const { it, state, whole, begin, made } = await start(runs);
      using _ = made;
      const staging = begin(PIECED_CHUNKS);
      await until(() => staging.isAnswered || null, 15_000, "all chunks read");
      await stopped(staging);
      expect(moveAll(staging, state, whole)).toBe(PIECED_CHUNKS);
      const last = PIECED_CHUNKS * HUGE_PAGES - 8;
      expect(await it.read(last, 4)).toBe(it.crc(last, 4));
      expect(await it.read(last + 4, 4)).toBe(Bun.hash.crc32(new Uint8Array(4 * PAGE)));
    },
    TIMEOUT_MS,
  );

  test(
    "leaves alone what somebody has touched, or has in hand, and wakes who waits in the rest",
    async () => {
      const { it, state, block, whole, begin, made } = await start();
      using _ = made;
      const staging = begin(3);
      await until(() => staging.isAnswered || null, 15_000, "three chunks read");
      await stopped(staging);
      // The order is bottom, top, bottom.
      expect(block.splitChunk(HUGE_PAGES + 7)).toBe(true);
      const { answer } = await it.blockedRead(9);
      expect(moveAll(staging, state, whole)).toBe(2);
      expect(await within(answer, 5000, "the waiter")).toBe(it.crc(9, 1));
      expect(block.chunks[0]).toBe(CHUNK_MOVED);
      expect(block.chunks[CHUNKS - 1]).toBe(CHUNK_MOVED);
      expect(block.chunks[2]).toBe(CHUNK_FREE);
      expect(hugeKib(it.target.pid, it.addr, CHUNKS * HUGE)).toBe(2 * 2048);
      expect(stagedKib(it)).toBe(0);
    },
    TIMEOUT_MS,
  );

  test(
    "stops early, and moves only what was read to its end",
    async () => {
      const { it, state, block, whole, begin, made } = await start();
      using _ = made;
      const staging = begin(CHUNKS);
      await stopped(staging);
      const moved = moveAll(staging, state, whole);
      expect([...block.chunks].filter((word) => word === CHUNK_MOVED)).toHaveLength(moved);
      expect(moved).toBeLessThan(CHUNKS);
      for (const [chunk, word] of block.chunks.entries()) {
        if (word !== CHUNK_MOVED) continue;
        expect(await it.read(chunk * HUGE_PAGES, HUGE_PAGES)).toBe(
          it.crc(chunk * HUGE_PAGES, HUGE_PAGES),
        );
      }
      expect(stagedKib(it)).toBe(0);
      expect(it.hasFault()).toBe(false);
    },
    TIMEOUT_MS,
  );

  test(
    "a helper that dies takes its chunks along, and no other",
    async () => {
      const { it, state, whole, begin, made } = await start();
      using _ = made;
      const staging = begin(4);
      await until(() => staging.isAnswered || null, 15_000, "four chunks read");
      process.kill(it.tasks[1]?.record.pid ?? 0, "SIGKILL");
      await stopped(staging);
      expect(moveAll(staging, state, whole)).toBe(2);
      expect(await it.read(0, HUGE_PAGES)).toBe(it.crc(0, HUGE_PAGES));
    },
    TIMEOUT_MS,
  );

  test(
    "a helper that does not answer is named, and the others' chunks come",
    async () => {
      const { it, state, whole, begin, made } = await start();
      using _ = made;
      const [first, second] = it.tasks.map(({ record }) => record);
      if (first === undefined || second === undefined) throw new Error("no helpers");
      const staging = begin(4);
      process.kill(second.pid, "SIGSTOP");
      staging.stop();
      // Should it have been done before it was stopped, there is nothing to be waited for.
      await until(() => (stateOf(second.pid) === "T" ? true : null), 5000, "a stopped helper");
      await until(
        () => (staging.lost.every((one) => one === second) ? true : null),
        5000,
        "an answer",
      );
      const isLate = staging.lost.length > 0;
      expect(staging.isAnswered).toBe(!isLate);
      const moved = moveAll(staging, state, whole);
      process.kill(second.pid, "SIGCONT");
      expect(moved).toBeLessThanOrEqual(isLate ? 2 : 4);
      for (const chunk of [0, 1]) {
        if (state.blocks[0]?.chunks[chunk] !== CHUNK_MOVED) continue;
        expect(await it.read(chunk * HUGE_PAGES, HUGE_PAGES)).toBe(
          it.crc(chunk * HUGE_PAGES, HUGE_PAGES),
        );
      }
    },
    TIMEOUT_MS,
  );
});
