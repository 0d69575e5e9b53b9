/**
 * The eager loader: brings in the data pages that nobody has asked for yet, chunk by chunk, and
 * ends. Each eager Worker (eager-worker.ts) runs one; they share a cursor over the chunks and the
 * done bitmaps. Blocks where the page source does. Zero pages cost nothing here: they are never
 * visited.
 *
 * Demand comes first: the Worker's nice value leaves the CPU to vCPUs and the fault loop, and a page that
 * is asked for in the middle of a copy comes by itself.
 */
import { POLLIN } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import type { PageSource } from "../source/page-source.ts";
import type { Uffd } from "../uffd/uffd.ts";
import { alignDown } from "../pages.ts";
import { nextMissing } from "../bits.ts";
import type { ChunkMover } from "./chunk-mover.ts";
import { ChunkQueue } from "./chunk-queue.ts";
import {
  add,
  type BlockState,
  C_EAGER_PAGES,
  CHUNK_COPYING,
  CHUNK_DONE,
  CHUNK_FREE,
  CHUNK_SPLIT,
  type LoadState,
} from "./state.ts";
import type { PageFailure } from "./fault-loop.ts";
import type { Priority } from "./priority.ts";
import { FAILED, GONE, type Outcome, PENDING, RETRY, SUPPLIED, Supply } from "./supply.ts";
import { WholeChunks } from "./whole-chunks.ts";

/** Pauses of a Worker that cannot go on at once, ms. */
const PARK_MS = 1;
/** Of poll(2). */
const FOREVER = -1;
const FAILED_PAUSE_MS = 200;
const FAILED_PAUSE_MAX_MS = 3200;
/** Unreadable pages that one Worker tells of; a whole disk may have died. */
const FAILURES_MAX = 64;
/**
 * Longest sleep in one go, ms: how soon a Worker that is held back by its rate notices that it is
 * to end.
 */
const PACE_MS = 100;

export type EagerEnd = "finished" | "stopped" | "gone";

export interface EagerLoopOptions {
  readonly uffd: Uffd;
  readonly source: PageSource;
  readonly state: LoadState;
  readonly counters: Float64Array;
  readonly workerIndex: number;
  /** Largest single copy in bytes. Where memory can be given back, no event is read until it has ended. */
  readonly pieceLength: number;
  /** Plan-wide chunk numbers in the order of loading. */
  readonly order: Uint32Array;
  /**
   * Runs to bring in first, before the order: block index, first page, pages; three
   * numbers each.
   */
  readonly replay: Int32Array;
  /** Absent: nobody's is changed. */
  readonly priority?: Priority;
  /** Bring whole chunks where that can be done; none: every page is copied. */
  readonly movers: readonly ChunkMover[];
  /**
   * Data pages of all eager Workers together, bytes per second; 0 = no limit. This Worker's share.
   */
  readonly bytesPerSecond: number;
  /** Bytes that this Worker may have asked the source for and not got yet, at most. */
  readonly pendingMax: number;
  readonly onFailure: (failure: PageFailure) => void;
  readonly onRecovered: (failure: PageFailure) => void;
}

export class EagerLoop {
  readonly #options: EagerLoopOptions;
  readonly #supply: Supply;
  readonly #readyFd: Int32Array;
  readonly #revents = new Int32Array(1);
  /** Pages that could not be read and have not come yet, by block and page. */
  readonly #failures = new Map<string, PageFailure>();
  readonly #pieceLength: number;
  readonly #whole: WholeChunks;
  readonly #queue: ChunkQueue;
  /**
   * What the source has not got yet, and how many bytes of it were asked for: chunks by their
   * plan-wide numbers, runs of the working set as -1 - their number. In the order of asking.
   */
  readonly #pending = new Map<number, number>();
  #pendingBytes = 0;
  /** Chunks with pages that could not be had, plan-wide numbers. */
  readonly #failed = new Set<number>();
  /**
   * Where the search for a missing page of any block goes on: pages do not become missing again.
   */
  #missingBlock = 0;
  #missingPage = 0;
  #startedMs = 0;
  #bytes = 0;

  constructor(options: EagerLoopOptions) {
    this.#options = options;
    this.#supply = new Supply(options.uffd, options.source, options.counters, options.state);
    this.#readyFd = Int32Array.of(options.source.readyFd);
    this.#whole = new WholeChunks({ ...options, readsEvents: false, pagesCounter: C_EAGER_PAGES });
    this.#queue = new ChunkQueue(options.state, options.order);
    const { pieceLength, bytesPerSecond } = options;
    // A low rate in large pieces would be bursts, each of them far ahead of the rate.
    const perPace = (bytesPerSecond * PACE_MS) / 1000;
    this.#pieceLength = bytesPerSecond === 0 ? pieceLength : Math.min(pieceLength, perPace);
  }

  /** Takes chunks until none is left and every page that was put off has come too. */
  run(): EagerEnd {
    const { state, priority } = this.#options;
    let isReplaying = true;
    this.#startedMs = performance.now();
    while (!this.#isOver()) {
      priority?.look(state.isBulk);
      this.#advance(0);
      if (this.#pending.size > 0) {
        const isFull = this.#isFull;
        if (this.#bringPending(isFull ? PACE_MS : 0) === GONE) return "gone";
        if (isFull) continue;
      }
      // Where the guest is now comes first, and what lies behind it; then the working set; then
      // the order.
      let chunk = this.#queue.nextFollowed(this.#isMoving);
      if (chunk === undefined && isReplaying) {
        const outcome = this.#replayNext();
        if (outcome === GONE) return "gone";
        isReplaying = outcome !== null;
        if (!isReplaying) this.#releaseSource();
        continue;
      }
      chunk ??= this.#whole.unmoved.pop() ?? this.#queue.nextOrdered(this.#isMoving);
      if (chunk === undefined) {
        if (this.#advance(FOREVER)) continue;
        break;
      }
      const outcome = this.#bring(chunk);
      if (outcome === GONE) return "gone";
    }
    while (this.#advance(FOREVER));
    return this.#isOver() ? "stopped" : this.#bringPutOff();
  }

  get #isMoving(): boolean {
    return !this.#whole.isEmpty;
  }

  /** What the working set had mapped: its chunks may be copied by another Worker. */
  #releaseSource(): void {
    const { source, state, replay } = this.#options;
    if (replay.length === 0) return;
    for (const { index, pageCount } of state.blocks) source.release?.(index, 0, pageCount);
  }

  /** Told to end, or nothing more can come. */
  #isOver(): boolean {
    const { state } = this.#options;
    return state.stopped || state.halted;
  }

  close(): void {
    this.#supply.close();
  }

  /** The next run of the working set. @returns null when the set is through */
  #replayNext(): Outcome | null {
    const { state: load, replay } = this.#options;
    const run = load.takeRun();
    return 3 * run >= replay.length ? null : this.#bring(-1 - run);
  }

  /** A run of the working set, up to the first page that is not to be had. */
  #bringRun(run: number): Outcome {
    const { state: load, replay } = this.#options;
    const at = 3 * run;
    const state = load.blocks[replay[at] ?? -1];
    const start = replay[at + 1] ?? 0;
    const pages = replay[at + 2] ?? 0;
    if (state === undefined) return SUPPLIED;
    const chunk = state.firstChunk + state.chunkOf(start);
    // A page that came alone would leave the rest of its chunk to be copied.
    if (pages === 0 || (this.#isMoving && this.#queue.isUntouched(chunk)))
      return this.#bringChunk(chunk);
    const end = start + pages;
    let page = nextMissing(state.data, state.done, start, end, true);
    while (page < end) {
      const chunkEnd = Math.min(end, state.chunkEnd(state.chunkOf(page)));
      const outcome = state.splitChunk(page) ? this.#bringPiece(state, page, chunkEnd) : SUPPLIED;
      if (outcome !== SUPPLIED) return outcome;
      page = nextMissing(state.data, state.done, page + 1, end, true);
    }
    return SUPPLIED;
  }

  /** A chunk, or as -1 - n a run of the working set, and notes what is to be tried again. */
  #bring(task: number): Outcome {
    this.#pendingBytes -= this.#pending.get(task) ?? 0;
    const before = this.#pendingBytes;
    const outcome = task < 0 ? this.#bringRun(-1 - task) : this.#bringChunk(task);
    if (outcome === PENDING) {
      this.#pending.set(task, this.#pendingBytes - before);
    } else {
      this.#pending.delete(task);
      this.#pendingBytes = before;
    }
    // A run that fails comes with its chunk.
    if (outcome === SUPPLIED || outcome === PENDING || task < 0) this.#failed.delete(task);
    else this.#failed.add(task);
    return outcome;
  }

  /** The source is to be asked for nothing more before it has given something. */
  get #isFull(): boolean {
    return this.#pendingBytes >= this.#options.pendingMax;
  }

  /** Tries pending pages again when the source has news, or after a wait in vain. */
  #bringPending(waitMs: number): Outcome {
    if (!this.#waitForSource(waitMs) && waitMs === 0) return SUPPLIED;
    for (const task of [...this.#pending.keys()]) {
      if (this.#isOver()) return RETRY;
      if (this.#bring(task) === GONE) return GONE;
    }
    return SUPPLIED;
  }

  /** Pages that are not to be had yet: tried again until they are. */
  #bringPutOff(): EagerEnd {
    let pauseMs = FAILED_PAUSE_MS;
    for (;;) {
      const left = [...this.#pending.keys(), ...this.#failed];
      if (left.length === 0) return "finished";
      this.#waitForSource(pauseMs);
      pauseMs = Math.min(2 * pauseMs, FAILED_PAUSE_MAX_MS);
      for (const task of left) {
        if (this.#isOver()) return "stopped";
        if (this.#bring(task) === GONE) return "gone";
      }
      if (this.#pending.size + this.#failed.size < left.length) pauseMs = FAILED_PAUSE_MS;
    }
  }

  /**
   * Brings what is missing of a chunk, unless another Worker has it in hand or it is complete. What
   * a helper brings has only been begun when this returns.
   */
  #bringChunk(planChunk: number): Outcome {
    const { state: load, workerIndex, bytesPerSecond } = this.#options;
    const state = load.blockOfChunk(planChunk);
    if (state === undefined) return SUPPLIED;
    const chunk = planChunk - state.firstChunk;
    const isUntouched = state.chunks[chunk] === CHUNK_FREE;
    if (isUntouched && this.#whole.begin(state, chunk)) {
      // Nothing may be in hand while the rate makes this Worker sleep.
      while (bytesPerSecond !== 0 && this.#advance(FOREVER));
      return SUPPLIED;
    }
    this.#whole.flush();
    // Pages may be served one by one from here on.
    Atomics.compareExchange(state.chunks, chunk, CHUNK_FREE, CHUNK_SPLIT);
    const copying = CHUNK_COPYING + workerIndex;
    if (Atomics.compareExchange(state.chunks, chunk, CHUNK_SPLIT, copying) !== CHUNK_SPLIT)
      return SUPPLIED;
    const outcome = this.#copyChunk(state, chunk);
    Atomics.store(state.chunks, chunk, outcome === SUPPLIED ? CHUNK_DONE : CHUNK_SPLIT);
    return outcome;
  }

  /** Goes on with what helpers have in hand, see `WholeChunks.advance`. */
  #advance(waitMs: number): boolean {
    const isBusy = this.#whole.advance(waitMs);
    const bytes = this.#whole.bytesCome;
    this.#whole.bytesCome = 0;
    if (bytes > 0) this.#pace(bytes);
    return isBusy;
  }

  /** Copies what is missing of a chunk. Goes past pages that fail, and says so by its outcome. */
  #copyChunk(state: BlockState, chunk: number): Outcome {
    const start = state.chunkStart(chunk);
    const end = state.chunkEnd(chunk);
    let worst: Outcome = SUPPLIED;
    let at = nextMissing(state.data, state.done, start, end, true);
    while (at < end) {
      if (this.#isOver()) return RETRY;
      const outcome = this.#bringPiece(state, at, end);
      if (outcome === GONE) return GONE;
      if (outcome === RETRY) {
        this.#sleep(PARK_MS);
      } else if (outcome !== SUPPLIED) {
        // A page that comes later decides when the chunk is tried again.
        if (worst !== PENDING) worst = outcome;
        if (outcome === PENDING && this.#isFull) return PENDING;
        const hostPages = state.block.hostPageSize / state.block.pageSize;
        at = alignDown(this.#supply.failedPage, hostPages) + hostPages;
      }
      at = nextMissing(state.data, state.done, at, end, true);
    }
    if (worst !== SUPPLIED) return worst;
    if (this.#failures.size > 0) this.#recover(state, start, end);
    this.#options.source.release?.(state.index, start, end - start);
    return SUPPLIED;
  }

  /** One copy, announced to the reader of events so that it cannot land behind a REMOVE. */
  #bringPiece(state: BlockState, from: number, chunkEnd: number): Outcome {
    const { state: load, counters, workerIndex } = this.#options;
    const { canDiscard } = load.metadata;
    const { block } = state;
    if (canDiscard && !load.enterCopy(workerIndex)) return RETRY;
    // Looked up again inside the gate: a REMOVE may have marked pages since the caller looked.
    const at = nextMissing(state.data, state.done, from, chunkEnd, true);
    let outcome: Outcome = SUPPLIED;
    let brought = 0;
    if (at < chunkEnd) {
      if (block.hostPageSize !== block.pageSize) {
        const ratio = block.hostPageSize / block.pageSize;
        outcome = this.#supply.copyHostPage(state, at - (at % ratio));
      } else {
        const piecePages = Math.max(1, Math.floor(this.#pieceLength / block.pageSize));
        const limit = Math.min(chunkEnd, at + piecePages);
        const runEnd = nextMissing(state.data, state.done, at, limit, false);
        outcome = this.#supply.copyRun(state, at, runEnd - at);
      }
      brought = this.#supply.pagesDone;
      add(counters, C_EAGER_PAGES, brought);
    }
    if (canDiscard) load.leaveCopy(workerIndex);
    if (outcome === PENDING) this.#pendingBytes += block.hostPageSize;
    if (outcome === FAILED) this.#report(state);
    this.#pace(brought * block.pageSize);
    return outcome;
  }

  #report(state: BlockState): void {
    const { block } = state;
    const pageIndex = this.#supply.failedPage;
    const key = `${state.index}:${pageIndex}`;
    if (this.#failures.size >= FAILURES_MAX && !this.#failures.has(key)) return;
    const failure = {
      idstr: block.idstr,
      pageIndex,
      fileOffset: block.pagesOffset + pageIndex * block.pageSize,
      errno: this.#supply.errno,
      attempts: (this.#failures.get(key)?.attempts ?? 0) + 1,
    };
    this.#failures.set(key, failure);
    // At the first attempt and at each doubling, not once per attempt.
    if ((failure.attempts & (failure.attempts - 1)) === 0) this.#options.onFailure(failure);
  }

  /** A chunk is complete: what had failed in it has come, by whichever Worker. */
  #recover(state: BlockState, start: number, end: number): void {
    for (const [key, failure] of this.#failures) {
      const { idstr, pageIndex } = failure;
      if (idstr !== state.block.idstr) continue;
      if (pageIndex < start || pageIndex >= end) continue;
      this.#failures.delete(key);
      this.#options.onRecovered(failure);
    }
  }

  /** Sleeps as long as the rate limit asks, unless everything has come by faults meanwhile. */
  #pace(bytes: number): void {
    const { bytesPerSecond, state } = this.#options;
    if (bytesPerSecond === 0) return;
    this.#bytes += bytes;
    const dueMs = this.#startedMs + (this.#bytes / bytesPerSecond) * 1000;
    for (;;) {
      const aheadMs = dueMs - performance.now();
      if (aheadMs < 1 || this.#isOver() || state.hurried || !this.#isAnyMissing()) return;
      this.#sleep(Math.min(aheadMs, PACE_MS));
    }
  }

  #isAnyMissing(): boolean {
    const { blocks } = this.#options.state;
    for (; this.#missingBlock < blocks.length; this.#missingBlock += 1) {
      const block = blocks[this.#missingBlock];
      if (block === undefined) break;
      const { data, done, pageCount } = block;
      this.#missingPage = nextMissing(data, done, this.#missingPage, pageCount, true);
      if (this.#missingPage < pageCount) return true;
      this.#missingPage = 0;
    }
    return false;
  }

  /**
   * Until a pending page may have come; a page that failed tells nobody when it can be read again.
   * @returns true when the source has news
   */
  #waitForSource(ms: number): boolean {
    const { source } = this.#options;
    // One that has no descriptor is waited for in vain: poll skips -1.
    const ready = sys.poll(this.#readyFd, this.#revents, 1, POLLIN, ms);
    if (ready > 0) source.acknowledge?.();
    return ready > 0;
  }

  #sleep(ms: number): void {
    sys.poll(this.#readyFd, this.#revents, 0, 0, Math.ceil(ms));
  }
}
