/**
 * Whole chunks by helper tasks (chunk-mover.ts): who has which in hand, and what is marked, counted
 * and woken when one has come. Each Worker has its own; the chunk words keep them apart.
 */
import { POLLIN } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import type { Uffd } from "../uffd/uffd.ts";
import { countRange, nextBit, setRange } from "./bits.ts";
import { type ChunkInHand, type ChunkMover, movableRuns } from "./chunk-mover.ts";
import type { Priority } from "./priority.ts";
import {
  add,
  type BlockState,
  C_MOVED_CHUNKS,
  CHUNK_FREE,
  CHUNK_MOVED,
  CHUNK_MOVING,
  CHUNK_SPLIT,
  type LoadState,
  recordLatency,
} from "./state.ts";

/** Until the reader of events opens the gate. */
const GATE_PAUSE_MS = 1;

export interface WholeChunksOptions {
  readonly uffd: Uffd;
  readonly state: LoadState;
  readonly counters: Float64Array;
  readonly workerIndex: number;
  readonly movers: readonly ChunkMover[];
  /** This thread reads the events itself: what it moves cannot land behind a REMOVE that is read. */
  readonly readsEvents: boolean;
  /** Counter of the pages that come: C_EAGER_PAGES, C_FAULT_PAGES. */
  readonly pagesCounter: number;
  /** Chunks that a helper is given at a time, at most. */
  readonly chunksAtOnce: number;
  readonly priority?: Priority | undefined;
}

export class WholeChunks {
  readonly #options: WholeChunksOptions;
  readonly #fds: Int32Array;
  readonly #revents: Int32Array;
  /** Plan-wide numbers of chunks that could not be moved: their pages come one by one. */
  readonly unmoved: number[] = [];
  /** Bytes of data that have come; the owner sets it back. */
  bytesCome = 0;

  constructor(options: WholeChunksOptions) {
    this.#options = options;
    this.#fds = new Int32Array(Math.max(1, options.movers.length)).fill(-1);
    this.#revents = new Int32Array(this.#fds.length);
  }

  /** There is no helper, or none any more. */
  get isEmpty(): boolean {
    return this.#options.movers.every(({ isGone }) => isGone);
  }

  /** Something is in hand. */
  get isBusy(): boolean {
    return this.#options.movers.some(({ isRunning, inHand }) => isRunning || inHand.length > 0);
  }

  /** A descriptor that polls readable when `advance` has something to do; -1 when there is none. */
  get fd(): number {
    return this.#options.movers.find(({ isRunning }) => isRunning)?.fd ?? -1;
  }

  /**
   * Takes a chunk that nobody has touched in hand. Waits while all helpers are at work.
   * @returns false when it has to come otherwise
   */
  begin(state: BlockState, chunk: number): boolean {
    const runs = movableRuns(state, chunk);
    if (runs === 0 || state.chunks[chunk] !== CHUNK_FREE) return false;
    const mover = this.#free(runs);
    if (mover === undefined) return false;
    const word = CHUNK_MOVING + this.#options.workerIndex;
    if (Atomics.compareExchange(state.chunks, chunk, CHUNK_FREE, word) !== CHUNK_FREE) return false;
    mover.add(state, chunk);
    if (mover.inHand.length >= this.#options.chunksAtOnce) mover.send();
    return true;
  }

  #free(runs: number): ChunkMover | undefined {
    for (;;) {
      const free = this.#options.movers.find((mover) => mover.canTake(runs));
      if (free !== undefined || !this.advance(-1)) return free;
    }
  }

  /** Nothing that was begun waits for more to go with it. */
  flush(): void {
    for (const mover of this.#options.movers) mover.send();
  }

  /**
   * Goes on with what helpers have done.
   * @param waitMs how long to wait for one of them at most, -1 = for ever
   * @returns false when nothing is in hand
   */
  advance(waitMs: number): boolean {
    const { movers } = this.#options;
    if (waitMs !== 0) this.flush();
    let running = 0;
    for (const mover of movers) {
      if (mover.isRunning) this.#fds[running++] = mover.fd;
    }
    if (running === 0) return this.isBusy;
    sys.poll(this.#fds, this.#revents, running, POLLIN, waitMs);
    let at = 0;
    for (const mover of movers) {
      if (mover.isRunning && this.#revents[at++] !== 0) this.#proceed(mover);
    }
    return true;
  }

  /** The next step of what a helper has in hand. */
  #proceed(mover: ChunkMover): void {
    const { state: load } = this.#options;
    mover.proceed();
    if (mover.inHand[0]?.fate === "reading" && !load.halted) {
      mover.goOn();
      return;
    }
    for (const taken of mover.inHand) {
      if (taken.fate === "read" && !load.halted) this.#moveGuarded(mover, taken);
      this.#settle(taken);
    }
    mover.clear();
  }

  /** Where pages can be given back: looked at and moved while no event is read. */
  #moveGuarded(mover: ChunkMover, taken: ChunkInHand): void {
    const { state: load, workerIndex, readsEvents } = this.#options;
    const { state, chunk } = taken;
    while (!readsEvents && !load.enterCopy(workerIndex)) {
      sys.poll(this.#fds, this.#revents, 0, 0, GATE_PAUSE_MS);
    }
    const end = state.chunkEnd(chunk);
    // A REMOVE may have marked pages while the bytes were read: those are zero now.
    const isWhole = nextBit(state.done, state.chunkStart(chunk), end, true) === end;
    if (isWhole && !load.halted && mover.moveNow(taken)) setMoved(taken);
    if (!readsEvents) load.leaveCopy(workerIndex);
  }

  /**
   * A chunk has come as a whole, or could not. Faults in it have waited for it; they are woken in any
   * case.
   */
  #settle(taken: ChunkInHand): void {
    const { counters, uffd, priority } = this.#options;
    const { state, chunk } = taken;
    const { block } = state;
    const start = state.chunkStart(chunk);
    const end = state.chunkEnd(chunk);
    const isMoved = taken.fate === "moved";
    if (isMoved) setMoved(taken);
    Atomics.store(state.chunks, chunk, isMoved ? CHUNK_MOVED : CHUNK_SPLIT);
    const waitingSinceNs = state.chunkFaultNs[chunk] ?? 0;
    if (waitingSinceNs > 0) priority?.putBack();
    if (!isMoved || waitingSinceNs > 0) {
      uffd.wake(block.hostAddr + start * block.pageSize, (end - start) * block.pageSize);
    }
    if (!isMoved) {
      this.unmoved.push(state.firstChunk + chunk);
      return;
    }
    if (waitingSinceNs > 0) recordLatency(counters, sys.clockNs() - waitingSinceNs);
    const dataPages = countRange(state.data, start, end);
    add(counters, this.#options.pagesCounter, dataPages);
    add(counters, C_MOVED_CHUNKS, 1);
    this.bytesCome += dataPages * block.pageSize;
  }
}

/** All its pages have come. Where pages can be given back: before another event is read. */
function setMoved({ state, chunk }: ChunkInHand): void {
  setRange(state.done, state.chunkStart(chunk), state.chunkEnd(chunk));
}
