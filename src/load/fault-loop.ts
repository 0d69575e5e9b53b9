/**
 * The fault loop: wait, read events in a batch, account for memory that the guest gave back, serve
 * the faults. Runs in a Worker of its own (fault-worker.ts), the only reader of the userfaultfd.
 * Blocks in poll(2), and where the page source does; never on the target's control channel and
 * never on the main thread. Allocates nothing per fault.
 *
 * Order within a batch: every REMOVE first, then the faults (userfaultfd(2): a fault can be read
 * before the REMOVE that precedes it). A fault that cannot be served now is left unserved, its vCPU
 * waits, and it is tried again: when events were read (RETRY), when the source has news (PENDING),
 * after a growing pause (FAILED).
 */
import * as sys from "../sys/native.ts";
import { EINTR, F_SETFL, O_NONBLOCK, POLLERR, POLLIN } from "../sys/abi.ts";
import type { PageSource } from "../source/page-source.ts";
import { EVENT_PAGEFAULT, EVENT_REMOVE, type Uffd, UffdEvents } from "../uffd/uffd.ts";
import { FslError } from "../errors.ts";
import { hex } from "../pages.ts";
import { nextBit, nextMissing, runStart, setRange, testBit } from "../bits.ts";
import {
  add,
  type BlockState,
  C_BATCHES,
  C_CHUNK_FAULTS,
  CHUNK_FREE,
  CHUNK_MOVING,
  C_EAGER_PAGES,
  C_FAULT_PAGES,
  C_FAULTS,
  C_REMOVED_PAGES,
  C_ZERO_PAGES,
  EVENTS_MAX,
  FAULT_WORKER,
  type LoadState,
  MAIN_THREAD,
  recordLatency,
} from "./state.ts";
import type { ChunkMover } from "./chunk-mover.ts";
import type { EagerMoves } from "./eager-moves.ts";
import { Pace } from "./pace.ts";
import { compileReadily, raise } from "./priority.ts";
import { COMING, FAILED, GONE, type Outcome, PENDING, RETRY, SUPPLIED, Supply } from "./supply.ts";
import { WholeChunks } from "./whole-chunks.ts";

/** First pause before a failed read is tried again, and the longest, ms. */
const RETRY_PAUSE_MS = 20;
const RETRY_PAUSE_MAX_MS = 2000;

/**
 * Index among the descriptors that are polled: of the eventfd that begins the eager load, and of the
 * first helper that brings chunks for faults. Behind those come the helpers of the eager load.
 */
const GO_FD = 4;
const OWN_FDS = 5;
/** In the event buffer: a place that nothing was read into. */
const NO_EVENT = 0;

/**
 * After so many faults, or runs of the working set, the source lets go of what it has mapped: the
 * kernel maps up to 0.4 MiB of a file for each.
 */
const RELEASE_FAULTS = 8;

/**
 * After so many answers of the source that nobody had to wait for, the next ones are not announced to it:
 * that is a system call for each.
 */
const WARM_ANSWERS = 32;

const GO_BYTES = 8;
/** The record of first touches ends here: what a guest reads that reads on and on is no part of it. */
const LOGGED_MAX = 256;

/** How the loop ended. */
export type LoopEnd = "stopped" | "gone";

/** A page that cannot be read, reported when it first fails and when the state of that changes. */
export interface PageFailure {
  readonly idstr: string;
  readonly pageIndex: number;
  /** File offset of the page in the snapshot. */
  readonly fileOffset: number;
  readonly errno: number;
  readonly attempts: number;
}

export interface FaultLoopOptions {
  readonly uffd: Uffd;
  readonly source: PageSource;
  readonly state: LoadState;
  readonly counters: Float64Array;
  /** eventfd that ends the loop when it becomes readable. */
  readonly stopFd: number;
  /** pidfd of the target. */
  readonly pidfd: number;
  /** Data pages brought in around a faulting page after the batch is served, aligned; 1 = none. */
  readonly clusterPages: number;
  /** Brings whole chunks to a guest that reads much; none: all faults are served page by page. */
  readonly movers: readonly ChunkMover[];
  /** Helpers of the eager load: a vCPU may wait for a chunk that one of them has in hand. */
  readonly helperPids: readonly number[];
  /**
   * Runs that the guest will ask for: block index, first page, pages; three numbers each. Brought
   * while nobody waits, as far as they are at hand; the rest is the eager load's.
   */
  readonly replay: Int32Array;
  /** The eager load, if it is this loop's, and the eventfd that begins it. */
  readonly moves?: EagerMoves | undefined;
  readonly goFd?: number;
  readonly onFailure: (failure: PageFailure) => void;
  readonly onRecovered: (failure: PageFailure) => void;
  /** The eager load has come to its end here. */
  readonly onMoved?: () => void;
}

/** A fault that waits: parallel arrays would save an object, but waiting is the rare case. */
interface Waiting {
  readonly state: BlockState;
  readonly pageIndex: number;
  reason: Outcome;
  attempts: number;
  retryAtMs: number;
}

export class FaultLoop {
  readonly #options: FaultLoopOptions;
  readonly #supply: Supply;
  readonly #whole: WholeChunks;
  readonly #events: UffdEvents;
  readonly #fds: Int32Array;
  readonly #revents: Int32Array;
  /** Index of the first helper of the eager load among them. */
  readonly #eagerFds: number;
  readonly #waiting: Waiting[] = [];
  /**
   * Faults of the batch whose neighbours are still to come: block index and page index in pairs.
   */
  readonly #served = new Int32Array(2 * EVENTS_MAX);
  #servedCount = 0;
  /** Events that the last read put into the buffer. */
  #eventsRead = 0;
  #lastBlock: BlockState | undefined;
  #faults = 0;
  readonly #pace = new Pace();
  #faultsAtRelease = 0;
  /** Where in `replay` the next run is. */
  #replayAt = 0;
  /** What an eventfd gives. */
  readonly #go = new BigUint64Array(1);

  constructor(options: FaultLoopOptions) {
    this.#options = options;
    this.#supply = new Supply(options.uffd, options.source, options.counters, options.state);
    this.#events = new UffdEvents(options.state.eventsView());
    this.#whole = new WholeChunks({
      ...options,
      workerIndex: FAULT_WORKER,
      readsEvents: true,
      pagesCounter: C_FAULT_PAGES,
    });
    // A vCPU waits for it.
    this.#whole.packetChunks = 1;
    const { readyFd } = options.source;
    const { uffd, stopFd, pidfd, goFd = -1, moves } = options;
    // poll(2) passes over negative ones; the last are the helpers' while they are at work.
    this.#eagerFds = OWN_FDS + options.movers.length;
    this.#fds = new Int32Array(this.#eagerFds + (moves?.helperCount ?? 0)).fill(-1);
    this.#fds.set([uffd.fd, stopFd, pidfd, readyFd, goFd]);
    this.#revents = new Int32Array(this.#fds.length);
  }

  /**
   * Serves until it is told to stop, or the target has ended. @throws FslError INTERNAL on what
   * cannot be
   */
  run(): LoopEnd {
    const { state, uffd, moves } = this.#options;
    // A loop that died before us may have read events that nobody served, and may have left the
    // gate closed, or itself said to be busy.
    const left = state.eventCount;
    state.busy = false;
    if (state.isBulk) compileReadily();
    if (left > 0) this.#markRemoved(left);
    state.openGate();
    if (left > 0 && this.#serveBatch(left) === GONE) return "gone";
    this.#events.clearTypes(EVENTS_MAX);
    for (;;) {
      const isReplaying = this.#replayAt < this.#options.replay.length;
      const timeoutMs = isReplaying || moves?.canStep === true ? 0 : this.#timeoutMs();
      this.#whole.putFds(this.#fds, OWN_FDS);
      moves?.putFds(this.#fds, this.#eagerFds);
      const ready = sys.poll(this.#fds, this.#revents, this.#fds.length, POLLIN, timeoutMs);
      if (state.stopped || this.#revents[1]) return "stopped";
      if (ready < 0) {
        if (ready === -EINTR) continue;
        throw new FslError("INTERNAL", `poll of the userfaultfd: ${sys.errnoText(-ready)}`);
      }
      if (this.#revents[2]) return "gone";
      if (ready === 0 && isReplaying && this.#replayNext() === GONE) return "gone";
      if (this.#isAnswered(OWN_FDS, this.#eagerFds)) this.#advanceWhole();
      const sourceHasNews = (this.#revents[3] ?? 0) !== 0;
      if (sourceHasNews) this.#options.source.acknowledge?.();
      // QEMU makes every descriptor blocking that it is given by `getfd`, which is the description
      // that we have too. The kernel says POLLERR for a blocking userfaultfd, and a read would wait
      // for the next fault.
      if (((this.#revents[0] ?? 0) & POLLERR) !== 0) sys.fcntl(uffd.fd, F_SETFL, O_NONBLOCK);
      else if (this.#revents[0] && this.#readAndServe() === GONE) return "gone";
      if (this.#waiting.length > 0 && this.#retryWaiting(sourceHasNews) === GONE) return "gone";
      if (moves !== undefined && this.#goOnEagerly(moves) === GONE) return "gone";
    }
  }

  #isAnswered(from: number, to: number): boolean {
    for (let index = from; index < to; index += 1) if (this.#revents[index] !== 0) return true;
    return false;
  }

  /** After everybody who waits: the helpers of the eager load have something to do, or are given it. */
  #goOnEagerly(moves: EagerMoves): Outcome {
    if (this.#revents[GO_FD]) {
      sys.read(this.#fds[GO_FD] ?? -1, this.#go, GO_BYTES);
      moves.begin(Number(this.#go[0]));
    }
    if (this.#isAnswered(this.#eagerFds, this.#fds.length)) moves.advance();
    moves.look();
    if (!moves.canStep) return SUPPLIED;
    const isOver = moves.step();
    if (isOver === GONE) return GONE;
    if (isOver) this.#options.onMoved?.();
    return SUPPLIED;
  }

  close(): void {
    this.#supply.close();
  }

  /** ms until the next retry, -1 for none. */
  #timeoutMs(): number {
    const eagerMs = this.#options.moves?.timeoutMs ?? -1;
    // Asked after every batch: not even an iterator is made.
    if (this.#waiting.length === 0) return eagerMs;
    let next = Number.POSITIVE_INFINITY;
    for (const waiting of this.#waiting) {
      if (waiting.reason === RETRY) return 0;
      if (waiting.reason === FAILED) next = Math.min(next, waiting.retryAtMs);
    }
    if (next === Number.POSITIVE_INFINITY) return eagerMs;
    const retryMs = Math.max(0, Math.ceil(next - performance.now()));
    return eagerMs < 0 ? retryMs : Math.min(retryMs, eagerMs);
  }

  /**
   * Reads one batch and serves it. With discards possible, no eager copy is in flight while events
   * are read.
   */
  #readAndServe(): Outcome {
    const { state, uffd } = this.#options;
    const { canDiscard } = state.metadata;
    if (canDiscard) {
      state.closeGate();
      while (state.copiesInFlight) sys.poll(this.#fds, this.#revents, 0, 0, 0);
      // Should we be killed with events read and not counted: a REMOVE is told once only. The next
      // fsl looks at the whole buffer; where nothing was read the type is 0.
      this.#events.clearTypes(this.#eventsRead);
      state.eventCount = EVENTS_MAX;
    }
    const count = uffd.readEvents(state.eventsAddress, EVENTS_MAX);
    state.eventCount = Math.max(count, 0);
    this.#eventsRead = state.eventCount;
    if (count > 0 && canDiscard) this.#markRemoved(count);
    if (canDiscard) state.openGate();
    if (count < 0) return GONE;
    return count === 0 ? SUPPLIED : this.#serveBatch(count);
  }

  #markRemoved(count: number): void {
    const events = this.#events;
    for (let index = 0; index < count; index += 1) {
      if (events.type(index) !== EVENT_REMOVE) continue;
      this.#remove(events.removeStart(index), events.removeEnd(index));
    }
  }

  /** From now on these pages are zero, whatever the snapshot has. */
  #remove(startAddr: number, endAddr: number): void {
    for (const state of this.#options.state.blocks) {
      const { hostAddr, pageSize, usedLength } = state.block;
      const start = Math.max(startAddr, hostAddr);
      const end = Math.min(endAddr, hostAddr + usedLength);
      if (start >= end) continue;
      const first = Math.floor((start - hostAddr) / pageSize);
      const last = Math.ceil((end - hostAddr) / pageSize);
      setRange(state.done, first, last);
      add(this.#options.counters, C_REMOVED_PAGES, last - first);
    }
  }

  #serveBatch(count: number): Outcome {
    const { state, counters, source } = this.#options;
    const readAtNs = sys.clockNs();
    const events = this.#events;
    state.busy = true;
    this.#servedCount = 0;
    const isWarm = this.#supply.atHandInARow >= WARM_ANSWERS;
    if (count > 1 && !isWarm && source.willNeed) this.#announce(count, source);
    add(counters, C_BATCHES, 1);
    for (let index = 0; index < count; index += 1) {
      const type = events.type(index);
      if (type === EVENT_REMOVE || type === NO_EVENT) continue;
      if (type !== EVENT_PAGEFAULT) {
        throw new FslError("INTERNAL", `userfaultfd event ${hex(type)}: not asked for`);
      }
      add(counters, C_FAULTS, 1);
      this.#faults += 1;
      if (this.#pace.count(readAtNs)) this.#goBulk();
      const outcome = this.#serveFault(events.faultAddress(index));
      if (outcome === GONE) return GONE;
      if (outcome === SUPPLIED) recordLatency(counters, sys.clockNs() - readAtNs);
    }
    state.eventCount = 0;
    state.busy = false;
    if (this.#faults - this.#faultsAtRelease >= RELEASE_FAULTS) this.#releaseSource();
    return this.#options.clusterPages > 1 ? this.#bringNeighbours() : SUPPLIED;
  }

  /** The guest reads much. */
  #goBulk(): void {
    const { state } = this.#options;
    if (state.isBulk) return;
    state.setBulk();
    compileReadily();
  }

  /** The source need not hold what was copied: a mapped file would count as fsl's memory. */
  #releaseSource(): void {
    const { source, state } = this.#options;
    this.#faultsAtRelease = this.#faults;
    const { blocks } = state;
    for (let index = 0; index < blocks.length; index += 1) {
      source.release?.(index, 0, blocks[index]?.pageCount ?? 0);
    }
  }

  /** Starts the reads of a whole batch before the first is waited for. */
  #announce(count: number, source: PageSource): void {
    for (let index = 0; index < count; index += 1) {
      if (this.#events.type(index) !== EVENT_PAGEFAULT) continue;
      const address = this.#events.faultAddress(index);
      const state = this.#blockOf(address);
      if (state === undefined) continue;
      const page = Math.floor((address - state.block.hostAddr) / state.block.pageSize);
      if (testBit(state.data, page) && !testBit(state.done, page)) {
        source.willNeed?.(state.index, page, 1);
      }
    }
  }

  #blockOf(address: number): BlockState | undefined {
    const last = this.#lastBlock;
    if (last !== undefined && contains(last, address)) return last;
    const { blocks } = this.#options.state;
    // No closure, and no iterator: QEMU's vCPUs go from block to block.
    for (let index = 0; index < blocks.length; index += 1) {
      const state = blocks[index];
      if (state === undefined || !contains(state, address)) continue;
      this.#lastBlock = state;
      return state;
    }
    return undefined;
  }

  #serveFault(address: number): Outcome {
    const state = this.#blockOf(address);
    if (state === undefined) {
      throw new FslError("INTERNAL", `page fault at ${hex(address)}: outside every block`);
    }
    const { block } = state;
    const hostPage = Math.floor((address - block.hostAddr) / block.hostPageSize);
    const page = (hostPage * block.hostPageSize) / block.pageSize;
    const outcome = this.#bring(state, page);
    if (outcome === SUPPLIED || outcome === COMING) {
      this.#options.state.hotChunk = state.firstChunk + state.chunkOf(page);
    } else if (outcome !== GONE) {
      this.#wait(state, page, outcome);
    }
    return outcome;
  }

  /** Supplies the host page that begins at `page`. */
  #bring(state: BlockState, page: number): Outcome {
    const { counters } = this.#options;
    const { block } = state;
    if (block.hostPageSize !== block.pageSize) {
      const outcome = this.#supply.copyHostPage(state, page);
      add(counters, C_FAULT_PAGES, this.#supply.pagesDone);
      return outcome;
    }
    if (testBit(state.done, page)) return this.#supply.zeroRun(state, page, 1);
    const chunk = state.chunkOf(page);
    const isUntouched = state.chunks[chunk] === CHUNK_FREE;
    if (isUntouched && !this.#options.state.isBulk && this.#whole.canBegin(state, chunk)) {
      if (this.#pace.countSpread()) this.#goBulk();
    }
    if (isUntouched && this.#options.state.isBulk) {
      // What came last woke its vCPU, which may ask for the next before the helper has answered.
      if (!this.#whole.hasRoom) this.#advanceWhole();
      if (this.#whole.begin(state, chunk)) return this.#awaitChunk(state, page);
    }
    if (!state.splitChunk(page) && !this.#canOvertake(state, page)) {
      return this.#awaitChunk(state, page);
    }
    if (!testBit(state.data, page)) return this.#bringZeros(state, page);
    const outcome = this.#supply.copyRun(state, page, 1);
    if (this.#supply.pagesDone > 0) {
      add(counters, C_FAULT_PAGES, 1);
      this.#log(state, page);
      if (this.#servedCount < EVENTS_MAX) {
        this.#served[2 * this.#servedCount] = state.index;
        this.#served[2 * this.#servedCount + 1] = page;
        this.#servedCount += 1;
      }
    }
    return outcome;
  }

  /**
   * The eager load has the chunk in hand, and a helper that has only the CPU time which nobody else
   * wants may take milliseconds for it. The page alone is there in 0.1 ms. The chunk cannot be moved then, and its
   * rest is copied: too much for a guest that reads on and on.
   */
  #canOvertake(state: BlockState, page: number): boolean {
    const worker = (state.chunks[state.chunkOf(page)] ?? 0) - CHUNK_MOVING;
    if (worker === FAULT_WORKER || worker === MAIN_THREAD) return false;
    if (this.#options.state.isBulk) return false;
    return this.#options.source.isAtHand?.(state.index, page, 1) === true;
  }

  /**
   * The whole chunk is being brought, and whoever waits in it is woken, whether that succeeds or
   * not.
   */
  #awaitChunk(state: BlockState, page: number): Outcome {
    const chunk = state.chunkOf(page);
    add(this.#options.counters, C_CHUNK_FAULTS, 1);
    this.#log(state, page);
    if (state.chunkFaultNs[chunk] === 0) {
      state.chunkFaultNs[chunk] = sys.clockNs();
      if (state.chunks[chunk] === CHUNK_MOVING + FAULT_WORKER) return COMING;
      // Whichever it is.
      for (const pid of this.#options.helperPids) raise(pid);
    }
    return COMING;
  }

  /** What could not be moved is asked for again by whoever waits, and comes page by page. */
  #advanceWhole(): void {
    this.#whole.advance(0);
    this.#whole.unmoved.length = 0;
    this.#whole.bytesCome = 0;
  }

  /**
   * A page that is zero in the snapshot. Zero pages beside it in the same 2 MiB come along; they
   * cost 0.12 µs each.
   */
  #bringZeros(state: BlockState, page: number): Outcome {
    const { counters } = this.#options;
    const windowStart = Math.max(page - (page % ZERO_WINDOW_PAGES), 0);
    const windowEnd = Math.min(windowStart + ZERO_WINDOW_PAGES, state.pageCount);
    this.#findRegistered(state, page);
    const start = runStart(state.data, page, Math.max(windowStart, this.#rangeStart), false);
    let end = nextBit(state.data, page, Math.min(windowEnd, this.#rangeEnd), true);
    end = nextBit(state.done, page, end, true);
    // The faulting page first: the guest waits for it. Pages before it may be done already, one by
    // one.
    let outcome = this.#supply.zeroRun(state, page, end - page);
    add(counters, C_ZERO_PAGES, this.#supply.pagesDone);
    if (this.#supply.pagesDone > 0) this.#log(state, page);
    if (outcome === SUPPLIED && start < page && !testBit(state.done, start)) {
      const clear = nextBit(state.done, start, page, true);
      const before = this.#supply.zeroRun(state, start, clear - start);
      add(counters, C_ZERO_PAGES, this.#supply.pagesDone);
      if (before === GONE) outcome = GONE;
    }
    return outcome;
  }

  /**
   * The range around a page that stays registered, as page indexes: zero extents do not, fills are
   * clipped.
   */
  #rangeStart = 0;
  #rangeEnd = 0;
  #findRegistered(state: BlockState, page: number): void {
    const { registered } = this.#options.state.metadata;
    const { hostAddr, pageSize } = state.block;
    const address = hostAddr + page * pageSize;
    for (let index = 0; index + 1 < registered.length; index += 2) {
      const start = registered[index] ?? 0;
      const end = registered[index + 1] ?? 0;
      if (address < start || address >= end) continue;
      this.#rangeStart = Math.max(0, Math.ceil((start - hostAddr) / pageSize));
      this.#rangeEnd = Math.min(state.pageCount, Math.floor((end - hostAddr) / pageSize));
      return;
    }
    this.#rangeStart = page;
    this.#rangeEnd = page + 1;
  }

  /** After everybody was served: pages beside the faulting ones, as long as no new fault waits. */
  #bringNeighbours(): Outcome {
    const { clusterPages, state: load } = this.#options;
    for (let index = 0; index < this.#servedCount; index += 1) {
      const state = load.blocks[this.#served[2 * index] ?? 0];
      const page = this.#served[2 * index + 1] ?? 0;
      if (state === undefined) continue;
      const start = page - (page % clusterPages);
      const end = Math.min(start + clusterPages, state.pageCount);
      if (this.#bringUnasked(state, start, end, C_FAULT_PAGES) === GONE) return GONE;
    }
    return SUPPLIED;
  }

  /** The next run of the working set. */
  #replayNext(): Outcome {
    const { replay, state: load, source } = this.#options;
    const state = load.blocks[replay[this.#replayAt] ?? -1];
    const start = replay[this.#replayAt + 1] ?? 0;
    const pages = replay[this.#replayAt + 2] ?? 0;
    this.#replayAt += 3;
    const isLast = this.#replayAt >= replay.length;
    if (isLast || this.#replayAt % (3 * RELEASE_FAULTS) === 0) this.#releaseSource();
    if (state === undefined || pages === 0) return SUPPLIED;
    if (!testBit(state.data, start)) {
      const isOver = testBit(state.done, start) || !state.splitChunk(start);
      return isOver ? SUPPLIED : this.#bringZeros(state, start);
    }
    if (source.isAtHand?.(state.index, start, pages) !== true) return SUPPLIED;
    return this.#bringUnasked(state, start, start + pages, C_EAGER_PAGES);
  }

  /** Data pages that nobody waits for yet, for as long as nobody waits for another one. */
  #bringUnasked(state: BlockState, start: number, end: number, counter: number): Outcome {
    let at = nextMissing(state.data, state.done, start, end, true);
    while (at < end) {
      if (sys.poll(this.#fds, this.#revents, 1, POLLIN, 0) !== 0) return SUPPLIED;
      const chunkEnd = Math.min(end, state.chunkEnd(state.chunkOf(at)));
      const runEnd = nextMissing(state.data, state.done, at, chunkEnd, false);
      if (!state.splitChunk(at)) return SUPPLIED;
      const outcome = this.#supply.copyRun(state, at, runEnd - at);
      add(this.#options.counters, counter, this.#supply.pagesDone);
      // Whatever else stands in the way of a page that nobody asked for is met again when somebody
      // does.
      if (outcome !== SUPPLIED) return outcome;
      at = nextMissing(state.data, state.done, runEnd, end, true);
    }
    return SUPPLIED;
  }

  /** For the working set. */
  #log(state: BlockState, page: number): void {
    const { state: load } = this.#options;
    const length = load.faultLogLength;
    if (length >= LOGGED_MAX) return;
    this.#faultLog[length] = state.firstPage + page;
    load.faultLogLength = length + 1;
  }

  get #faultLog(): Uint32Array {
    return (this.#faultLogView ??= this.#options.state.faultLog());
  }
  #faultLogView: Uint32Array | undefined;

  #wait(state: BlockState, pageIndex: number, reason: Outcome): void {
    const known = this.#waiting.find((w) => w.state === state && w.pageIndex === pageIndex);
    if (known !== undefined) return;
    const waiting: Waiting = {
      state,
      pageIndex,
      reason,
      attempts: 1,
      retryAtMs: performance.now() + RETRY_PAUSE_MS,
    };
    this.#waiting.push(waiting);
    if (reason === FAILED) this.#options.onFailure(this.#failure(waiting));
    this.#countWaiting();
  }

  /**
   * Tries again what can be tried now. The waiters of a range that has come in by other means were
   * woken then.
   */
  #retryWaiting(sourceHasNews: boolean): Outcome {
    const nowMs = performance.now();
    for (let index = this.#waiting.length - 1; index >= 0; index -= 1) {
      const waiting = this.#waiting[index];
      if (waiting === undefined) continue;
      if (waiting.reason === PENDING && !sourceHasNews) continue;
      if (waiting.reason === FAILED && nowMs < waiting.retryAtMs) continue;
      const outcome = this.#bring(waiting.state, waiting.pageIndex);
      if (outcome === GONE) return GONE;
      if (outcome === SUPPLIED || outcome === COMING) {
        this.#waiting.splice(index, 1);
        if (waiting.reason === FAILED) this.#options.onRecovered(this.#failure(waiting));
      } else {
        this.#stillWaiting(waiting, outcome, nowMs);
      }
    }
    this.#countWaiting();
    return SUPPLIED;
  }

  #stillWaiting(waiting: Waiting, outcome: Outcome, nowMs: number): void {
    const before = waiting.reason;
    waiting.reason = outcome;
    waiting.attempts += 1;
    if (outcome !== FAILED) return;
    const pauseMs = Math.min(
      RETRY_PAUSE_MS * 2 ** Math.min(waiting.attempts, 16),
      RETRY_PAUSE_MAX_MS,
    );
    waiting.retryAtMs = nowMs + pauseMs;
    // Once per change of state and at each doubling, not once per attempt.
    const doubling = (waiting.attempts & (waiting.attempts - 1)) === 0;
    if (before !== FAILED || doubling) this.#options.onFailure(this.#failure(waiting));
  }

  #failure(waiting: Waiting): PageFailure {
    const { block } = waiting.state;
    return {
      idstr: block.idstr,
      pageIndex: waiting.pageIndex,
      fileOffset: block.pagesOffset + waiting.pageIndex * block.pageSize,
      errno: this.#supply.errno,
      attempts: waiting.attempts,
    };
  }

  #countWaiting(): void {
    const failed = this.#waiting.filter(({ reason }) => reason === FAILED);
    this.#options.state.failedPages = failed.length;
  }
}

/** Zero pages are filled within one aligned window of this many pages (2 MiB of 4 KiB pages). */
const ZERO_WINDOW_PAGES = 512;

function contains(state: BlockState, address: number): boolean {
  const offset = address - state.block.hostAddr;
  return offset >= 0 && offset < state.block.usedLength;
}
