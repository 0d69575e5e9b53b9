/**
 * The eager loader: brings in the data pages that nobody has asked for yet, chunk by chunk, and ends. Each eager Worker
 * (eager-worker.ts) runs one; they share a cursor over the chunks and the done bitmaps. Blocks where the page source
 * does. Zero pages cost nothing here: they are never visited.
 *
 * Demand comes first: a copy is at most `pieceLength` bytes, and the Worker's nice value leaves the CPU to vCPUs and the
 * fault loop.
 */
import { POLLIN } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import type { PageSource } from "../source/page-source.ts";
import type { Uffd } from "../uffd/uffd.ts";
import { alignDown } from "../pages.ts";
import { nextMissing } from "./bits.ts";
import { add, type BlockState, C_EAGER_PAGES, type LoadState } from "./state.ts";
import type { PageFailure } from "./fault-loop.ts";
import { FAILED, GONE, type Outcome, RETRY, SUPPLIED, Supply } from "./supply.ts";

/** Bytes of a chunk, the unit that a Worker takes from the common cursor: the reach of one page table page. */
export const CHUNK_LENGTH = 0x200000;
/** Pauses of a Worker that cannot go on at once, ms. */
const PARK_MS = 1;
const FAILED_PAUSE_MS = 200;
/** Longest sleep in one go, ms: how soon a Worker that is held back by its rate notices that it is to end. */
const PACE_MS = 100;

export type EagerEnd = "finished" | "stopped" | "gone";

export interface EagerLoopOptions {
  readonly uffd: Uffd;
  readonly source: PageSource;
  readonly state: LoadState;
  readonly counters: Float64Array;
  readonly workerIndex: number;
  /** Largest single copy in bytes: a fault that comes meanwhile waits for no more than this. */
  readonly pieceLength: number;
  /** Plan-wide chunk numbers in the order of loading. */
  readonly order: Uint32Array;
  /** Data pages of all eager Workers together, bytes per second; 0 = no limit. This Worker's share. */
  readonly bytesPerSecond: number;
  readonly onFailure: (failure: PageFailure) => void;
  readonly onRecovered: (failure: PageFailure) => void;
}

/** One chunk's place: chunks are aligned in the target's address space so that huge pages can be given back. */
export interface Chunk {
  readonly blockIndex: number;
  /** Half-open page range. */
  readonly pageStart: number;
  readonly pageEnd: number;
}

/** All chunks of a load, in address order. Chunks without data are left out. */
export function planChunks(state: LoadState): Chunk[] {
  const chunks: Chunk[] = [];
  const none = new Int32Array(0);
  for (const block of state.blocks) {
    const { hostAddr, pageSize } = block.block;
    let page = nextMissing(block.data, none, 0, block.pageCount, true);
    while (page < block.pageCount) {
      const address = hostAddr + page * pageSize;
      const chunkEndAddr = address - (address % CHUNK_LENGTH) + CHUNK_LENGTH;
      const startAddr = Math.max(hostAddr, chunkEndAddr - CHUNK_LENGTH);
      const pageStart = Math.ceil((startAddr - hostAddr) / pageSize);
      const pageEnd = Math.min(block.pageCount, Math.ceil((chunkEndAddr - hostAddr) / pageSize));
      chunks.push({ blockIndex: block.index, pageStart, pageEnd });
      page = nextMissing(block.data, none, pageEnd, block.pageCount, true);
    }
  }
  return chunks;
}

export class EagerLoop {
  readonly #options: EagerLoopOptions;
  readonly #supply: Supply;
  readonly #chunks: readonly Chunk[];
  readonly #readyFd: Int32Array;
  readonly #revents = new Int32Array(1);
  /** Pages that could not be read and have not come yet, by block and page. */
  readonly #failures = new Map<string, PageFailure>();
  readonly #pieceLength: number;
  /** Where the search for a missing page of any block goes on: pages do not become missing again. */
  #missingBlock = 0;
  #missingPage = 0;
  #startedMs = 0;
  #bytes = 0;

  constructor(options: EagerLoopOptions) {
    this.#options = options;
    this.#supply = new Supply(options.uffd, options.source, options.counters);
    this.#chunks = planChunks(options.state);
    this.#readyFd = Int32Array.of(options.source.readyFd);
    const { pieceLength, bytesPerSecond } = options;
    // A low rate in large pieces would be bursts, each of them far ahead of the rate.
    const perPace = (bytesPerSecond * PACE_MS) / 1000;
    this.#pieceLength = bytesPerSecond === 0 ? pieceLength : Math.min(pieceLength, perPace);
  }

  /** Takes chunks until none is left and every page that was put off has come too. */
  run(): EagerEnd {
    const { state, order } = this.#options;
    this.#startedMs = performance.now();
    const putOff: Chunk[] = [];
    for (;;) {
      const turn = state.takeChunk();
      const chunk = this.#chunks[order[turn] ?? -1];
      if (chunk === undefined) break;
      const outcome = this.#bringChunk(chunk);
      if (state.stopped) return "stopped";
      if (outcome === GONE) return "gone";
      if (outcome !== SUPPLIED) putOff.push(chunk);
    }
    return this.#bringPutOff(putOff);
  }

  close(): void {
    this.#supply.close();
  }

  /** Chunks with pages that are not to be had yet: tried again until they are. */
  #bringPutOff(chunks: Chunk[]): EagerEnd {
    const { state } = this.#options;
    let left = chunks;
    while (left.length > 0) {
      this.#waitForSource(FAILED_PAUSE_MS);
      const still: Chunk[] = [];
      for (const chunk of left) {
        if (state.stopped) return "stopped";
        const outcome = this.#bringChunk(chunk);
        if (outcome === GONE) return "gone";
        if (outcome !== SUPPLIED) still.push(chunk);
      }
      left = still;
    }
    return "finished";
  }

  /** Brings what is missing of a chunk. Goes past pages that fail, and says so by its outcome. */
  #bringChunk(chunk: Chunk): Outcome {
    const { state: load } = this.#options;
    const state = load.blocks[chunk.blockIndex];
    if (state === undefined) return SUPPLIED;
    let worst: Outcome = SUPPLIED;
    let at = nextMissing(state.data, state.done, chunk.pageStart, chunk.pageEnd, true);
    while (at < chunk.pageEnd) {
      if (load.stopped) return worst;
      const outcome = this.#bringPiece(state, at, chunk.pageEnd);
      if (outcome === GONE) return GONE;
      if (outcome === RETRY) {
        this.#sleep(PARK_MS);
      } else if (outcome !== SUPPLIED) {
        worst = outcome;
        const hostPages = state.block.hostPageSize / state.block.pageSize;
        at = alignDown(this.#supply.failedPage, hostPages) + hostPages;
      }
      at = nextMissing(state.data, state.done, at, chunk.pageEnd, true);
    }
    if (worst !== SUPPLIED) return worst;
    if (this.#failures.size > 0) this.#recover(state, chunk);
    const { pageStart, pageEnd } = chunk;
    this.#options.source.release?.(state.index, pageStart, pageEnd - pageStart);
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
    if (outcome === FAILED) this.#report(state);
    this.#pace(brought * block.pageSize);
    return outcome;
  }

  #report(state: BlockState): void {
    const { block } = state;
    const pageIndex = this.#supply.failedPage;
    const key = `${state.index}:${pageIndex}`;
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
  #recover(state: BlockState, chunk: Chunk): void {
    for (const [key, failure] of this.#failures) {
      const { idstr, pageIndex } = failure;
      if (idstr !== state.block.idstr) continue;
      if (pageIndex < chunk.pageStart || pageIndex >= chunk.pageEnd) continue;
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
      if (aheadMs < 1 || state.stopped || !this.#isAnyMissing()) return;
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

  /** Until a pending page may have come; a page that failed tells nobody when it can be read again. */
  #waitForSource(ms: number): void {
    const { source } = this.#options;
    if (source.readyFd < 0) return this.#sleep(ms);
    const ready = sys.poll(this.#readyFd, this.#revents, 1, POLLIN, ms);
    if (ready > 0) source.acknowledge?.();
  }

  #sleep(ms: number): void {
    sys.poll(this.#readyFd, this.#revents, 0, 0, Math.ceil(ms));
  }
}
