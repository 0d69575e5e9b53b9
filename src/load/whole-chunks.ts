/**
 * Whole chunks by helper tasks (chunk-mover.ts): who has which in hand, and what is marked, counted
 * and woken when one has come. Each Worker has its own; the chunk words keep them apart.
 */
import { POLLIN } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import type { Uffd } from "../uffd/uffd.ts";
import { countRange, nextBit, setRange } from "../bits.ts";
import { canMove, type ChunkMover } from "./chunk-mover.ts";
import { PACKET_CHUNKS } from "./chunk-queue.ts";
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
  readonly priority?: Priority | undefined;
}

export class WholeChunks {
  readonly #options: WholeChunksOptions;
  readonly #fds: Int32Array;
  readonly #revents: Int32Array;
  /** Its packet has chunks and has not been sent. */
  #open: ChunkMover | undefined;
  /** A packet to a helper has so many at most. */
  packetChunks = PACKET_CHUNKS;
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

  /** The chunk could come as a whole, by this Worker, if a helper has time for it. */
  canBegin(state: BlockState, chunk: number): boolean {
    return !this.isEmpty && canMove(state, chunk);
  }

  /** A packet is under way. */
  get isRunning(): boolean {
    return this.#options.movers.some(({ isRunning }) => isRunning);
  }

  /** A packet has been begun and not been sent. */
  get isOpen(): boolean {
    return this.#open !== undefined;
  }

  /** `begin` would find a helper. */
  get hasRoom(): boolean {
    return this.#open !== undefined || this.#options.movers.some(({ isFree }) => isFree);
  }

  /**
   * Descriptors that poll readable when `advance` has something to do, one for each helper; -1 where
   * there is nothing to wait for.
   */
  putFds(fds: Int32Array, at: number): void {
    const { movers } = this.#options;
    // Asked before every poll: not even an iterator is made.
    for (let index = 0; index < movers.length; index += 1) {
      const mover = movers[index];
      fds[at + index] = mover?.isRunning === true ? mover.fd : -1;
    }
  }

  /**
   * Takes a chunk that nobody has touched in hand. While all helpers are at work, an eager Worker waits.
   * The reader of events does not: the one who waits for a page gets that page. A packet may have room
   * for more chunks: it goes when it is full, or by `flush`.
   * @returns false when it has to come otherwise
   */
  begin(state: BlockState, chunk: number): boolean {
    if (state.chunks[chunk] !== CHUNK_FREE) return false;
    // First: the reader of events is not to look through the chunk for nothing.
    const mover = this.#open ?? this.#free();
    if (mover === undefined || !this.claim(state, chunk)) return false;
    mover.add(state, chunk);
    this.#open = mover;
    if (mover.isFull || mover.batch.length >= this.packetChunks) this.flush();
    return true;
  }

  /** Sends what has been begun. */
  flush(): void {
    const mover = this.#open;
    if (mover === undefined) return;
    this.#open = undefined;
    if (this.#options.state.halted)
      this.#settleAll(
        mover,
        mover.batch.map(() => 0),
      );
    else mover.send();
  }

  /** A chunk that nobody has touched is this Worker's from here on: `settle` it. */
  claim(state: BlockState, chunk: number): boolean {
    if (!canMove(state, chunk)) return false;
    const word = CHUNK_MOVING + this.#options.workerIndex;
    return Atomics.compareExchange(state.chunks, chunk, CHUNK_FREE, word) === CHUNK_FREE;
  }

  #free(): ChunkMover | undefined {
    const { movers, readsEvents } = this.#options;
    for (;;) {
      const free = movers.find(({ isFree }) => isFree);
      if (free !== undefined || readsEvents || !this.advance(-1)) return free;
    }
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
    if (running === 0) return false;
    sys.poll(this.#fds, this.#revents, running, POLLIN, waitMs);
    let at = 0;
    for (const mover of movers) {
      if (mover.isRunning && this.#revents[at++] !== 0) this.#proceed(mover);
    }
    return true;
  }

  /** A helper has answered. */
  #proceed(mover: ChunkMover): void {
    const fates = mover.take();
    const moved = fates.map((fate, index) =>
      fate === "read" ? this.#moveGuarded(mover, index) : fate,
    );
    this.#settleAll(mover, moved);
  }

  #settleAll(mover: ChunkMover, moved: readonly number[]): void {
    const { batch } = mover;
    for (let index = 0; index < batch.length; index += 1) {
      const inHand = batch[index];
      if (inHand !== undefined) this.settle(inHand.state, inHand.chunk, moved[index] ?? 0);
    }
    mover.settle(moved);
  }

  /** Where pages can be given back: looked at and moved while no event is read. @returns bytes moved */
  #moveGuarded(mover: ChunkMover, index: number): number {
    const inHand = mover.batch[index];
    if (inHand === undefined) return 0;
    const { state, chunk } = inHand;
    this.enterGate();
    const start = state.chunkStart(chunk);
    const end = state.chunkEnd(chunk);
    // A REMOVE may have marked pages while the bytes were read: those are zero now.
    const isWhole = nextBit(state.done, start, end, true) === end;
    const moved = isWhole && !this.#options.state.halted ? mover.moveNow(index) : 0;
    setRange(state.done, start, start + moved / state.block.pageSize);
    this.leaveGate();
    return moved;
  }

  /** Until `leaveGate` no event is read that tells of pages given back. */
  enterGate(): void {
    const { state, workerIndex, readsEvents } = this.#options;
    if (readsEvents || !state.metadata.canDiscard) return;
    while (!state.enterCopy(workerIndex)) {
      sys.poll(this.#fds, this.#revents, 0, 0, GATE_PAUSE_MS);
    }
  }
  leaveGate(): void {
    if (!this.#options.readsEvents) this.#options.state.leaveCopy(this.#options.workerIndex);
  }

  /**
   * A chunk has come as a whole, or could not. Faults in it have waited for it; they are woken in any
   * case.
   * @param moved bytes that have come, from its first page on
   */
  settle(state: BlockState, chunk: number, moved: number): void {
    const { counters, uffd, priority } = this.#options;
    const { block } = state;
    const start = state.chunkStart(chunk);
    const end = state.chunkEnd(chunk);
    const come = start + moved / block.pageSize;
    const isWhole = come === end;
    setRange(state.done, start, come);
    Atomics.store(state.chunks, chunk, isWhole ? CHUNK_MOVED : CHUNK_SPLIT);
    const waitingSinceNs = state.chunkFaultNs[chunk] ?? 0;
    if (waitingSinceNs > 0) priority?.putBack();
    if (!isWhole || waitingSinceNs > 0) {
      uffd.wake(block.hostAddr + start * block.pageSize, (end - start) * block.pageSize);
    }
    const dataPages = countRange(state.data, start, come);
    add(counters, this.#options.pagesCounter, dataPages);
    this.bytesCome += dataPages * block.pageSize;
    if (!isWhole) {
      this.unmoved.push(state.firstChunk + chunk);
      return;
    }
    if (waitingSinceNs > 0) recordLatency(counters, sys.clockNs() - waitingSinceNs);
    add(counters, C_MOVED_CHUNKS, 1);
  }
}
