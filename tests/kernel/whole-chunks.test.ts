/**
 * Batches of whole chunks: one packet to a real helper, which reads and moves them into the memory of a
 * target with a real userfaultfd.
 */
import { afterEach, describe, expect } from "bun:test";
import { nextBit, setRange } from "../../src/bits.ts";
import { ChunkMover } from "../../src/load/chunk-mover.ts";
import {
  C_EAGER_PAGES,
  C_MOVED_CHUNKS,
  CHUNK_FREE,
  CHUNK_MOVED,
  CHUNK_SPLIT,
} from "../../src/load/state.ts";
import { WholeChunks } from "../../src/load/whole-chunks.ts";
import * as sys from "../../src/sys/native.ts";
import { testMoving as test } from "../helpers/declare.ts";
import { HelperBench, HUGE, HUGE_PAGES, hugeKib, PAGE } from "../helpers/helper-target.ts";
import { within } from "../helpers/kernel-target.ts";
import { makeState } from "../helpers/load-states.ts";

const TIMEOUT_MS = 20_000;
const CHUNKS = 8;
const WORKER = 1;

let bench: HelperBench | undefined;
let made: ReturnType<typeof makeState> | undefined;
afterEach(async () => {
  await bench?.end();
  made?.[Symbol.dispose]();
  [bench, made] = [undefined, undefined];
});

interface Spec {
  readonly slots?: number;
  readonly canDiscard?: boolean;
  readonly data?: readonly (readonly [number, number])[];
  /** As `ChunkMover` has it; absent: as this kernel needs it. */
  readonly makesHuge?: boolean | undefined;
}

/** A target of eight chunks with one helper, and a load of it. */
async function start({ slots = 8, canDiscard = false, data, makesHuge }: Spec = {}) {
  bench = await HelperBench.start("thp", CHUNKS, 1, 0, slots);
  const it = bench;
  const block = {
    pages: CHUNKS * HUGE_PAGES,
    hostAddr: it.addr,
    movable: true,
    pagesOffset: 0,
    data: data ?? ([[0, CHUNKS * HUGE_PAGES]] as const),
  };
  made = makeState([block], { canDiscard });
  const { state } = made;
  const [blockState] = state.blocks;
  if (blockState === undefined) throw new Error("no block");
  /** One that has the helper from now on. */
  const takeOver = (): WholeChunks =>
    new WholeChunks({
      uffd: it.uffd,
      state,
      counters: state.counters(WORKER),
      workerIndex: WORKER,
      movers: [new ChunkMover(it.task.record, it.file.fd, canDiscard, -1, makesHuge)],
      readsEvents: false,
      pagesCounter: C_EAGER_PAGES,
    });
  const whole = takeOver();
  const begin = (...chunks: number[]): boolean[] =>
    chunks.map((chunk) => whole.begin(blockState, chunk));
  const finish = (): void => {
    while (whole.advance(-1));
  };
  return { it, state, block: blockState, whole, begin, finish, takeOver };
}

/** Compares a chunk of the target with the file. */
async function expectRight(it: HelperBench, ...chunks: number[]): Promise<void> {
  for (const chunk of chunks) {
    const at = chunk * HUGE_PAGES;
    expect([chunk, await it.read(at, HUGE_PAGES)]).toEqual([chunk, it.crc(at, HUGE_PAGES)]);
  }
}

/** What becomes of a slot whose huge page was split. */
const SPLIT_SLOTS: [string, boolean | undefined][] = [
  ["as this kernel needs it", undefined],
  ["its slot made huge again", true],
];

function testOfSplit(title: string, body: (makesHuge?: boolean) => Promise<void>): void {
  for (const [what, makesHuge] of SPLIT_SLOTS) {
    test(`${title}, ${what}`, () => body(makesHuge), TIMEOUT_MS);
  }
}

describe("WholeChunks", () => {
  test(
    "brings a few chunks by one packet, marks and counts each",
    async () => {
      const { it, state, block, whole, begin, finish } = await start();
      expect(begin(0, 3, 5)).toEqual([true, true, true]);
      // There is room for more, so that it has not been sent.
      const polled = Int32Array.of(0, 0);
      whole.putFds(polled, 1);
      expect([...polled, whole.isOpen]).toEqual([0, -1, true]);
      whole.flush();
      whole.putFds(polled, 1);
      expect([...polled, whole.isOpen]).toEqual([0, it.task.record.fd, false]);
      finish();
      for (const chunk of [0, 3, 5]) expect(block.chunks[chunk]).toBe(CHUNK_MOVED);
      expect(block.chunks[1]).toBe(CHUNK_FREE);
      expect(state.counters(WORKER)[C_EAGER_PAGES]).toBe(3 * HUGE_PAGES);
      expect(state.counters(WORKER)[C_MOVED_CHUNKS]).toBe(3);
      expect(hugeKib(it.target.pid, it.addr, CHUNKS * HUGE)).toBe(3 * 2048);
      await expectRight(it, 0, 3, 5);
      expect(it.hasFault()).toBe(false);
    },
    TIMEOUT_MS,
  );

  test(
    "whoever waits for the last one of a packet is woken",
    async () => {
      const { it, begin, finish } = await start();
      const { answer } = await it.blockedRead(2 * HUGE_PAGES + 7);
      begin(0, 1, 2);
      finish();
      expect(await within(answer, 5000, "the waiter")).toBe(it.crc(2 * HUGE_PAGES + 7, 1));
    },
    TIMEOUT_MS,
  );

  testOfSplit(
    "a chunk that cannot be moved keeps those behind it from nothing, and leaves nothing in its slot",
    async (makesHuge) => {
      // Of the last two chunks the first half is zero.
      const half = HUGE_PAGES / 2;
      const { it, block, whole, begin, finish } = await start({
        data: [
          [0, 6 * HUGE_PAGES],
          [6 * HUGE_PAGES + half, 7 * HUGE_PAGES],
          [7 * HUGE_PAGES + half, 8 * HUGE_PAGES],
        ],
        makesHuge,
      });
      // A page that is there without the load's knowledge.
      const at = HUGE_PAGES + 9;
      expect(it.uffd.copy(it.addr + at * PAGE, it.file.addr + at * PAGE, PAGE, 0)).toBe(PAGE);
      begin(0, 1, 2);
      finish();
      expect([...block.chunks.subarray(0, 3)]).toEqual([CHUNK_MOVED, CHUNK_SPLIT, CHUNK_MOVED]);
      expect(whole.unmoved).toEqual([1]);
      // What was moved of it before that page is there, and counted.
      expect(nextBit(block.done, HUGE_PAGES, 2 * HUGE_PAGES, false)).toBe(at);
      expect(whole.bytesCome).toBe((2 * HUGE_PAGES + 9) * PAGE);
      await expectRight(it, 0, 2);
      // The second slot holds what was not moved.
      begin(6, 7);
      finish();
      const zeros = Bun.hash.crc32(new Uint8Array(half * PAGE));
      for (const chunk of [6, 7]) {
        expect(block.chunks[chunk]).toBe(CHUNK_MOVED);
        expect(await it.read(chunk * HUGE_PAGES, half)).toBe(zeros);
        const data = chunk * HUGE_PAGES + half;
        expect(await it.read(data, half)).toBe(it.crc(data, half));
      }
      expect(hugeKib(it.target.pid, it.addr, CHUNKS * HUGE)).toBe(4 * 2048);
    },
  );

  testOfSplit(
    "what somebody else has left in a helper's memory does not come",
    async (makesHuge) => {
      const half = HUGE_PAGES / 2;
      const data = [
        [0, 6 * HUGE_PAGES],
        [6 * HUGE_PAGES + half, 7 * HUGE_PAGES],
      ] as const;
      const { it, block, begin, finish, takeOver } = await start({ data, makesHuge });
      const at = HUGE_PAGES + 9;
      expect(it.uffd.copy(it.addr + at * PAGE, it.file.addr + at * PAGE, PAGE, 0)).toBe(PAGE);
      begin(1);
      finish();
      expect(block.chunks[1]).toBe(CHUNK_SPLIT);
      // As an eager Worker does that has the helper after another one.
      const next = takeOver();
      expect(next.begin(block, 6)).toBe(true);
      while (next.advance(-1));
      expect(block.chunks[6]).toBe(CHUNK_MOVED);
      const zeros = Bun.hash.crc32(new Uint8Array(half * PAGE));
      expect(await it.read(6 * HUGE_PAGES, half)).toBe(zeros);
    },
  );

  test(
    "what the file has no more of does not come, nor what is behind it in the packet",
    async () => {
      const { it, state, block, whole, begin, finish } = await start();
      sys.ftruncate(it.file.fd, 3 * HUGE + 5 * PAGE);
      begin(2, 3, 1);
      finish();
      expect([2, 3, 1].map((chunk) => block.chunks[chunk])).toEqual([
        CHUNK_MOVED,
        CHUNK_SPLIT,
        CHUNK_SPLIT,
      ]);
      expect(whole.unmoved).toEqual([3, 1]);
      expect(state.counters(WORKER)[C_EAGER_PAGES]).toBe(HUGE_PAGES);
      expect(hugeKib(it.target.pid, it.addr, CHUNKS * HUGE)).toBe(2048);
    },
    TIMEOUT_MS,
  );

  test(
    "goes on in a second packet when the staging memory has no room for more",
    async () => {
      const { it, block, begin, finish } = await start({ slots: 2 });
      expect(begin(0, 1, 2, 3, 4)).toEqual([true, true, true, true, true]);
      finish();
      expect([...block.chunks.subarray(0, 5)]).toEqual(Array(5).fill(CHUNK_MOVED));
      await expectRight(it, 0, 1, 2, 3, 4);
    },
    TIMEOUT_MS,
  );

  test(
    "a snapshot that has changed: what was not sent does not come, and who waits is woken",
    async () => {
      const { it, state, block, whole, begin, finish } = await start();
      const { answer } = await it.blockedRead(7);
      begin(0, 1);
      state.halt();
      finish();
      expect(whole.unmoved).toEqual([0, 1]);
      expect([...block.chunks.subarray(0, 2)]).toEqual([CHUNK_SPLIT, CHUNK_SPLIT]);
      expect(hugeKib(it.target.pid, it.addr, CHUNKS * HUGE)).toBe(0);
      // It has raised its fault once more, and waits again.
      expect(it.uffd.copy(it.addr + 7 * PAGE, it.file.addr + 7 * PAGE, PAGE, 0)).toBe(PAGE);
      expect(await within(answer, 5000, "the waiter")).toBe(it.crc(7, 1));
    },
    TIMEOUT_MS,
  );

  test(
    "where memory can be given back: what was given back while it was read stays away",
    async () => {
      const { it, block, whole, begin, finish } = await start({ canDiscard: true });
      begin(0, 1, 2);
      whole.flush();
      // As the reader of events marks it.
      setRange(block.done, HUGE_PAGES + 3, HUGE_PAGES + 5);
      finish();
      expect([...block.chunks.subarray(0, 3)]).toEqual([CHUNK_MOVED, CHUNK_SPLIT, CHUNK_MOVED]);
      expect(whole.unmoved).toEqual([1]);
      expect(hugeKib(it.target.pid, it.addr, CHUNKS * HUGE)).toBe(2 * 2048);
      await expectRight(it, 0, 2);
    },
    TIMEOUT_MS,
  );
});
