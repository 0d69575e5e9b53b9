/**
 * The eager load of memory that can be moved and is not given back, by the fault loop itself: helper tasks
 * in the target do the work (chunk-mover.ts), so that all there is to do here is to tell them what comes
 * next, a few hundred times in a load. A thread of its own for that would take 30 ms of CPU time to start,
 * would have to be told of every fault, and its code would be cold when the guest resumes.
 *
 * Between two packets the rest of chunks that came page by page is copied, piece by piece and only
 * while nobody waits for a page, and only what the page source has at hand: the fault loop must not
 * wait for a disk for a page that nobody wants. What is left in the end is for eager Workers, and so is
 * everything if there is much to copy: then they have the helpers, too.
 */
import { POLLIN } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import type { PageSource } from "../source/page-source.ts";
import type { Uffd } from "../uffd/uffd.ts";
import { nextMissing } from "../bits.ts";
import { ChunkMover } from "./chunk-mover.ts";
import { ChunkQueue, PACKET_CHUNKS } from "./chunk-queue.ts";
import { Priority, raise } from "./priority.ts";
import type { EagerMovesStart } from "./protocol.ts";
import {
  add,
  type BlockState,
  C_EAGER_PAGES,
  CHUNK_DONE,
  CHUNK_FREE,
  CHUNK_SPLIT,
  EAGER_MOVES,
  type LoadState,
} from "./state.ts";
import { GONE, type Outcome, SUPPLIED, Supply } from "./supply.ts";
import { WholeChunks } from "./whole-chunks.ts";

/**
 * How long a helper may take for what takes microseconds, when it is given a descriptor, ms: faults wait
 * for that.
 */
const HELPER_PATIENCE_MS = 500;

/**
 * More chunks than this are not copied beside the serving of faults: vCPUs that touch pages at random, many
 * at once or slowly, can split all.
 */
const RESTS_MAX = 96;
/** Chunks that are looked at in one step: faults wait meanwhile. */
const LOOKS_MAX = 64;

export interface EagerMovesOptions {
  readonly uffd: Uffd;
  readonly source: PageSource;
  readonly state: LoadState;
  /** Descriptor of the snapshot file. */
  readonly fileFd: number;
  readonly start: EagerMovesStart;
}

/** Pages of a block that are to be copied, from `at` on. */
interface Rest {
  readonly state: BlockState;
  readonly chunk: number;
  at: number;
  readonly end: number;
}

export class EagerMoves {
  readonly #options: EagerMovesOptions;
  readonly #counters: Float64Array;
  readonly #supply: Supply;
  readonly #fds: Int32Array;
  readonly #revents = new Int32Array(1);
  readonly #queue: ChunkQueue;
  #whole: WholeChunks | undefined;
  #priority: Priority | undefined;
  #isOn = false;
  /** Nothing is left to move, unless a helper's answer brings something. */
  #isDrained = false;
  /** Eager Workers are to do the rest. */
  #isLeaving = false;
  /** To be copied, the last one first. */
  readonly #rests: Rest[] = [];

  constructor(options: EagerMovesOptions) {
    this.#options = options;
    this.#queue = new ChunkQueue(options.state, options.start.order);
    this.#counters = options.state.counters(EAGER_MOVES);
    this.#supply = new Supply(options.uffd, options.source, this.#counters, options.state);
    this.#fds = Int32Array.of(options.uffd.fd);
  }

  /** Begins; once. @param usable bit set = the helper of that number */
  begin(usable: number): void {
    const { start, fileFd } = this.#options;
    this.#isOn = true;
    const records = start.helpers.filter((_record, index) => ((usable >> index) & 1) === 1);
    // They answer before they are left only the CPU time that nobody wants: faults wait for that.
    for (const { pid } of records) raise(pid);
    const movers = records.map(
      (record) => new ChunkMover(record, fileFd, false, HELPER_PATIENCE_MS),
    );
    this.#priority = new Priority(
      records.map(({ pid }) => pid),
      start.nice,
      false,
    );
    this.#whole = new WholeChunks({
      ...this.#options,
      counters: this.#counters,
      workerIndex: EAGER_MOVES,
      movers,
      readsEvents: true,
      pagesCounter: C_EAGER_PAGES,
      priority: this.#priority,
    });
  }

  get helperCount(): number {
    return this.#options.start.helpers.length;
  }

  /** Something could be done at once: `step`. */
  get canStep(): boolean {
    const whole = this.#whole;
    if (!this.#isOn || whole === undefined) return false;
    if (this.#rests.length > 0) return true;
    return this.#isDrained ? !whole.isRunning : whole.hasRoom || whole.isEmpty;
  }

  /** When `step` or `look` ought to be called at the latest, ms; -1 = it need not be. */
  get timeoutMs(): number {
    return this.#isOn ? (this.#priority?.gentleLeftMs ?? -1) : -1;
  }

  /** Descriptors that poll readable when `advance` has something to do, as many as there are helpers. */
  putFds(fds: Int32Array, at: number): void {
    this.#whole?.putFds(fds, at);
  }

  /** Goes on with what helpers have done. Does not wait. */
  advance(): void {
    this.#whole?.advance(0);
    this.#isDrained = false;
  }

  /** Looked at often. */
  look(): void {
    if (this.#isOn) this.#priority?.look(this.#options.state.isBulk);
  }

  /**
   * The next bit of work, some 0.1 ms once a fault waits: a packet for a helper, or a piece that is copied.
   * @returns true when that was the last: the helpers are somebody else's from here on
   */
  step(): boolean | typeof GONE {
    const { state } = this.#options;
    const whole = this.#whole;
    if (!this.#isOn || whole === undefined) return false;
    this.#isLeaving ||= this.#rests.length > RESTS_MAX || whole.isEmpty;
    const isOver = this.#isLeaving || state.halted || state.stopped;
    if (isOver) this.#rests.length = 0;
    this.#isDrained ||= isOver;
    if (!this.#isDrained && whole.hasRoom) this.#fill(whole);
    else if (this.#rests.length > 0) return this.#copyPiece() === GONE ? GONE : false;
    // What is begun but not sent waits for nothing more to join it.
    if (this.#isDrained) whole.flush();
    if (!this.#isDrained || this.#rests.length > 0 || whole.isRunning) return false;
    this.#end();
    return true;
  }

  /** Makes a packet full, if there are so many chunks that can be moved, and sends it. */
  #fill(whole: WholeChunks): void {
    let wasOpen = false;
    whole.packetChunks = this.#queue.packetChunks;
    for (let looks = 0; looks < LOOKS_MAX && whole.hasRoom; looks += 1) {
      // A long packet stays open meanwhile: a fault waits for a few chunks of it at most.
      if (looks > 0 && looks % PACKET_CHUNKS === 0 && this.#isWaitedFor()) return;
      const planChunk = this.#next(whole);
      this.#isDrained = planChunk === undefined;
      if (planChunk === undefined) return;
      const block = this.#options.state.blockOfChunk(planChunk);
      const chunk = planChunk - (block?.firstChunk ?? 0);
      if (block !== undefined && !whole.begin(block, chunk)) this.#putOff(block, chunk);
      if (wasOpen && !whole.isOpen) return;
      wasOpen = whole.isOpen;
    }
  }

  /** Where the guest is, the working set, what could not be moved, the order. */
  #next(whole: WholeChunks): number | undefined {
    const queue = this.#queue;
    return (
      queue.nextFollowed(true) ??
      this.#nextOfSet() ??
      whole.unmoved.pop() ??
      queue.nextOrdered(true)
    );
  }

  /** The chunk of the next run of the working set. */
  #nextOfSet(): number | undefined {
    const { state: load, start } = this.#options;
    const at = 3 * load.takeRun();
    const state = at < start.replay.length ? load.blocks[start.replay[at] ?? -1] : undefined;
    if (state === undefined) return undefined;
    return state.firstChunk + state.chunkOf(start.replay[at + 1] ?? 0);
  }

  /** A chunk that cannot come in one move. One that a helper has in hand is nothing to copy. */
  #putOff(state: BlockState, chunk: number): void {
    Atomics.compareExchange(state.chunks, chunk, CHUNK_FREE, CHUNK_SPLIT);
    if (state.chunks[chunk] !== CHUNK_SPLIT) return;
    if (this.#rests.some((rest) => rest.state === state && rest.chunk === chunk)) return;
    this.#rests.push({ state, chunk, at: state.chunkStart(chunk), end: state.chunkEnd(chunk) });
  }

  /** A fault that comes meanwhile waits for no more than one piece. */
  #copyPiece(): Outcome {
    const [rest, { start, source }] = [this.#rests.at(-1), this.#options];
    if (rest === undefined || this.#isWaitedFor()) return SUPPLIED;
    const { state, end } = rest;
    const { pageSize } = state.block;
    rest.at = nextMissing(state.data, state.done, rest.at, end, true);
    if (rest.at >= end) {
      this.#endRest(rest, CHUNK_DONE);
      return SUPPLIED;
    }
    const limit = Math.min(end, rest.at + Math.max(1, Math.floor(start.pieceLength / pageSize)));
    const runEnd = nextMissing(state.data, state.done, rest.at, limit, false);
    if (source.isAtHand?.(state.index, rest.at, runEnd - rest.at) !== true) {
      this.#endRest(rest, CHUNK_SPLIT);
      return SUPPLIED;
    }
    const outcome = this.#supply.copyRun(state, rest.at, runEnd - rest.at);
    add(this.#counters, C_EAGER_PAGES, this.#supply.pagesDone);
    // What stands in the way is met again by an eager Worker, which can wait.
    if (outcome !== SUPPLIED) this.#endRest(rest, CHUNK_SPLIT);
    return outcome;
  }

  #endRest({ state, chunk }: Rest, word: number): void {
    this.#rests.pop();
    Atomics.compareExchange(state.chunks, chunk, CHUNK_SPLIT, word);
    const start = state.chunkStart(chunk);
    this.#options.source.release?.(state.index, start, state.chunkEnd(chunk) - start);
  }

  #isWaitedFor(): boolean {
    return sys.poll(this.#fds, this.#revents, 1, POLLIN, 0) !== 0;
  }

  #end(): void {
    this.#isOn = false;
    this.#priority?.close();
  }

  close(): void {
    this.#supply.close();
  }
}
