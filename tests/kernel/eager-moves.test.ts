/**
 * The eager load by the fault loop: real helpers bring the chunks of a target with a real userfaultfd,
 * while the loop serves faults.
 */
import { afterEach, describe, expect, test } from "bun:test";
import { countMissing, setRange } from "../../src/bits.ts";
import { EagerMoves } from "../../src/load/eager-moves.ts";
import { orderChunks } from "../../src/load/order.ts";
import { FaultLoop } from "../../src/load/fault-loop.ts";
import {
  C_EAGER_PAGES,
  C_FAULT_PAGES,
  C_MOVED_CHUNKS,
  CHUNK_DONE,
  CHUNK_MOVED,
  CHUNK_SPLIT,
  EAGER_MOVES,
  FAULT_WORKER,
} from "../../src/load/state.ts";
import type { PageSource } from "../../src/source/page-source.ts";
import { createPageSource } from "../../src/source/snapshot-source.ts";
import { EFD_CLOEXEC, EFD_NONBLOCK } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { testMoving } from "../helpers/declare.ts";
import { HelperBench, HUGE, HUGE_PAGES, hugeKib, PAGE } from "../helpers/helper-target.ts";
import { within } from "../helpers/kernel-target.ts";
import { makeState } from "../helpers/load-states.ts";

const TIMEOUT_MS = 20_000;
const CHUNKS = 12;

let bench: HelperBench | undefined;
let made: ReturnType<typeof makeState> | undefined;
const fds: number[] = [];
afterEach(async () => {
  await bench?.end();
  made?.[Symbol.dispose]();
  for (const fd of fds.splice(0)) sys.close(fd);
  [bench, made] = [undefined, undefined];
});

function eventfd(): number {
  const fd = sys.check(sys.eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd");
  fds.push(fd);
  return fd;
}

interface Spec {
  readonly data?: readonly (readonly [number, number])[];
  readonly replay?: readonly number[];
  /** Whether a page is in the page cache, as the source has it. */
  readonly isAtHand?: boolean;
  readonly chunks?: number;
}

/** A target with two helpers, and a fault loop that has them for the eager load. */
async function start({ data, replay = [], isAtHand, chunks = CHUNKS }: Spec = {}) {
  bench = await HelperBench.start("thp", chunks, 2);
  const it = bench;
  made = makeState(
    [
      {
        pages: chunks * HUGE_PAGES,
        hostAddr: it.addr,
        movable: true,
        pagesOffset: 0,
        data: data ?? [[0, chunks * HUGE_PAGES]],
      },
    ],
    {},
  );
  const { state } = made;
  const [block] = state.blocks;
  if (block === undefined) throw new Error("no block");
  const source: PageSource = createPageSource({ fd: it.file.fd }, [block.block]);
  if (isAtHand !== undefined) source.isAtHand = () => isAtHand;
  const [goFd, stopFd] = [eventfd(), eventfd()];
  let ends = 0;
  const moves = new EagerMoves({
    uffd: it.uffd,
    source,
    state,
    fileFd: it.file.fd,
    start: {
      helpers: it.tasks.map(({ record }) => record),
      goFd,
      pieceLength: 64 * PAGE,
      order: orderChunks(state.blocks),
      replay: Int32Array.from(replay),
      nice: 0,
    },
  });
  const loop = new FaultLoop({
    uffd: it.uffd,
    source,
    state,
    counters: state.counters(FAULT_WORKER),
    stopFd,
    pidfd: -1,
    clusterPages: 1,
    movers: [],
    helperPids: [],
    replay: new Int32Array(0),
    moves,
    goFd,
    onFailure: () => {},
    onRecovered: () => {},
    onMoved: () => {
      ends += 1;
      sys.write(stopFd, BigUint64Array.of(1n));
    },
  });
  /** Begins with these helpers (bits), and serves until the eager load has come to its end. */
  const run = (usable = 0b11): void => {
    sys.write(goFd, BigUint64Array.of(BigInt(usable)));
    expect(loop.run()).toBe("stopped");
    sys.read(stopFd, new BigUint64Array(1), 8);
  };
  /** A page that has come by a fault. */
  const touch = (page: number): void => {
    expect(block.splitChunk(page)).toBe(true);
    expect(it.uffd.copy(it.addr + page * PAGE, it.file.addr + page * PAGE, PAGE, 0)).toBe(PAGE);
    setRange(block.done, page, page + 1);
  };
  const words = (...chunks: number[]): number[] => chunks.map((chunk) => block.chunks[chunk] ?? -1);
  return { it, state, block, run, touch, words, ends: () => ends };
}

const ALL = Array.from({ length: CHUNKS }, (_, chunk) => chunk);
const others = (...chunks: number[]): number[] => ALL.filter((chunk) => !chunks.includes(chunk));
const RAM_PAGES = CHUNKS * HUGE_PAGES;

describe("EagerMoves", () => {
  testMoving(
    "moves what nobody has touched, copies the rest of what somebody has, and says so once",
    async () => {
      const { it, state, block, run, touch, words, ends } = await start();
      touch(3 * HUGE_PAGES + 5);
      touch(7 * HUGE_PAGES + 511);
      run();
      expect(ends()).toBe(1);
      expect(words(3, 7)).toEqual([CHUNK_DONE, CHUNK_DONE]);
      expect(words(...others(3, 7))).toEqual(Array(CHUNKS - 2).fill(CHUNK_MOVED));
      expect(countMissing(block.data, block.done)).toBe(0);
      const counters = state.counters(EAGER_MOVES);
      expect(counters[C_EAGER_PAGES]).toBe(RAM_PAGES - 2);
      expect(counters[C_MOVED_CHUNKS]).toBe(CHUNKS - 2);
      expect(hugeKib(it.target.pid, it.addr, CHUNKS * HUGE)).toBe((CHUNKS - 2) * 2048);
      expect(await it.read(0, RAM_PAGES)).toBe(it.crc(0, RAM_PAGES));
      expect(it.hasFault()).toBe(false);
    },
    TIMEOUT_MS,
  );

  test(
    "serves a fault before anything else",
    async () => {
      const { it, state, run, words } = await start();
      const page = 9 * HUGE_PAGES + 100;
      const { answer } = await it.blockedRead(page);
      run();
      expect(await within(answer, 5000, "the waiter")).toBe(it.crc(page, 1));
      // It was there before a helper could have the chunk, so that the rest was copied.
      expect(state.counters(FAULT_WORKER)[C_FAULT_PAGES]).toBe(1);
      expect(words(9)).toEqual([CHUNK_DONE]);
      expect(await it.read(0, RAM_PAGES)).toBe(it.crc(0, RAM_PAGES));
    },
    TIMEOUT_MS,
  );

  testMoving(
    "leaves to others what is not at hand: the fault loop waits for no disk",
    async () => {
      const { it, block, run, touch, words, ends } = await start({ isAtHand: false });
      touch(4 * HUGE_PAGES);
      run();
      expect(ends()).toBe(1);
      expect(words(4)).toEqual([CHUNK_SPLIT]);
      expect(words(...others(4))).toEqual(Array(CHUNKS - 1).fill(CHUNK_MOVED));
      expect(countMissing(block.data, block.done)).toBe(HUGE_PAGES - 1);
      expect(await it.read(5 * HUGE_PAGES, HUGE_PAGES)).toBe(it.crc(5 * HUGE_PAGES, HUGE_PAGES));
    },
    TIMEOUT_MS,
  );

  testMoving(
    "uses the helpers that it may, and brings everything by one",
    async () => {
      const { it, run, words } = await start();
      // The other one would never answer.
      it.tasks[0]?.close();
      run(0b10);
      expect(words(...ALL)).toEqual(Array(CHUNKS).fill(CHUNK_MOVED));
      expect(await it.read(0, RAM_PAGES)).toBe(it.crc(0, RAM_PAGES));
    },
    TIMEOUT_MS,
  );

  test(
    "ends, with pages missing, when its helpers have died",
    async () => {
      const { it, block, run, ends } = await start();
      for (const { record } of it.tasks) process.kill(record.pid, "SIGKILL");
      await Bun.sleep(50);
      run();
      expect(ends()).toBe(1);
      expect(countMissing(block.data, block.done)).toBe(RAM_PAGES);
      expect(block.chunks.every((word) => word < CHUNK_MOVED)).toBe(true);
    },
    TIMEOUT_MS,
  );

  test(
    "leaves everything to others, its helpers too, when there is much to copy",
    async () => {
      const chunks = 104;
      const { it, block, run, touch, ends } = await start({ chunks });
      for (let chunk = 0; chunk < chunks - 1; chunk += 1) touch(chunk * HUGE_PAGES + chunk);
      // A page that is there without the load's knowledge: its chunk stays in the helper's memory.
      const at = (chunks - 1) * HUGE_PAGES;
      expect(it.uffd.copy(it.addr + at * PAGE, it.file.addr + at * PAGE, PAGE, 0)).toBe(PAGE);
      run();
      expect(ends()).toBe(1);
      const words = [...block.chunks];
      expect(words.filter((word) => word === CHUNK_SPLIT).length).toBeGreaterThan(96);
      expect(words.filter((word) => word >= CHUNK_MOVED)).toEqual([]);
      for (const task of it.tasks) {
        expect(task.sendDescriptor(it.file.fd)).toBeGreaterThanOrEqual(0);
      }
    },
    TIMEOUT_MS,
  );

  test(
    "brings nothing of a snapshot that was changed",
    async () => {
      const { state, block, run, ends } = await start();
      state.halt();
      run();
      expect([ends(), countMissing(block.data, block.done)]).toEqual([1, RAM_PAGES]);
    },
    TIMEOUT_MS,
  );

  testMoving(
    "brings chunks of many runs, and the odd end of a block, page by page",
    async () => {
      const runs = Array.from({ length: 100 }, (_, run) => [4 * run, 4 * run + 2] as const);
      const { it, block, run, words } = await start({
        data: [...runs, [HUGE_PAGES, 3 * HUGE_PAGES]],
        replay: [0, HUGE_PAGES + 7, 1],
      });
      run();
      expect(words(0, 1, 2)).toEqual([CHUNK_DONE, CHUNK_MOVED, CHUNK_MOVED]);
      expect(countMissing(block.data, block.done)).toBe(0);
      expect(await it.read(396, 2)).toBe(it.crc(396, 2));
      expect(await it.read(HUGE_PAGES, 2 * HUGE_PAGES)).toBe(it.crc(HUGE_PAGES, 2 * HUGE_PAGES));
    },
    TIMEOUT_MS,
  );
});
