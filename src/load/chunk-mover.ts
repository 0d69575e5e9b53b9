/**
 * Brings whole chunks, each in one piece: a helper task in the target's address space reads the
 * bytes of a chunk from the snapshot file into a fresh huge page, and moves that page into guest RAM
 * (UFFDIO_MOVE, Linux 6.8), which wakes whoever waits there. At the speed and the cost of an ordinary
 * load, and the guest has a huge page afterwards, where copying leaves 512 small ones.
 *
 * A packet to the helper holds a few chunks: `add` them, `send` it, `proceed` takes the answer. No
 * call here waits for the helper but `proceed` and `moveNow`.
 *
 * Only for chunks in which no page is present: the kernel moves a huge page whole, or has to split
 * it first.
 */
import { HelperTask, type HelperRecord } from "../sys/helper-task.ts";
import { HELPER_CALLS_MAX, MADV_DONTNEED, MADV_POPULATE_WRITE } from "../sys/abi.ts";
import { nextBit } from "./bits.ts";
import { type BlockState, CHUNK_LENGTH } from "./state.ts";

/**
 * A chunk with more runs of data than this is copied: one read for each would cost more than it
 * saves.
 */
const RUNS_MAX = 64;

/**
 * In how many runs of data a chunk lies that can come as a whole; 0 when it cannot. The kernel looks
 * again when it does.
 */
export function movableRuns(state: BlockState, chunk: number): number {
  const { block } = state;
  const start = state.chunkStart(chunk);
  const end = state.chunkEnd(chunk);
  if (!block.movable || (end - start) * block.pageSize !== CHUNK_LENGTH) return 0;
  if (nextBit(state.done, start, end, true) !== end) return 0;
  let runs = 0;
  for (let at = nextBit(state.data, start, end, true); at < end; runs += 1) {
    at = nextBit(state.data, nextBit(state.data, at, end, false), end, true);
  }
  return runs <= RUNS_MAX ? runs : 0;
}

/** A chunk that a helper has in hand: number within its block. */
export interface ChunkInHand {
  readonly state: BlockState;
  readonly chunk: number;
  /** After `proceed`. unmoved: it has to come otherwise. read: `moveNow` is to move it. */
  fate: "reading" | "read" | "moved" | "unmoved";
  /** The first page that no packet has asked for yet. */
  nextPage: number;
  /** Index in the packet of the call that moves it; -1 when there is none. */
  moveCall: number;
}

export interface ChunkMoverOptions {
  /** Chunks are only read; each is moved by `moveNow`, after a look at what was given back. */
  readonly isGuarded: boolean;
  /** Makes the next huge page before it is needed: a vCPU that waits saves the time to zero it. */
  readonly preparesAhead: boolean;
}

export class ChunkMover {
  readonly #helper: HelperTask;
  readonly #options: ChunkMoverOptions;
  /** Descriptor of the snapshot in the helper. */
  readonly #fileFd: number;
  readonly #inHand: ChunkInHand[] = [];
  #isGone: boolean;
  #isRunning = false;
  /** Calls of the packet that is made up or runs. */
  #calls = 0;
  /** Calls of a packet that ends with a read: all of them have to succeed. */
  #readsEnd = 0;
  /** The staging memory holds bytes of a chunk that was not moved. */
  #isDirty = false;

  /** @param fileFd descriptor of the snapshot in this process */
  constructor(record: HelperRecord, fileFd: number, options: ChunkMoverOptions) {
    this.#helper = new HelperTask(record);
    this.#options = options;
    this.#fileFd = this.#helper.sendDescriptor(fileFd);
    this.#isGone = this.#fileFd < 0 || record.stagingLength < CHUNK_LENGTH;
    if (!this.#isGone) this.#prepareNext();
  }

  /** Readable when there is something to `proceed` with. */
  get fd(): number {
    return this.#helper.record.fd;
  }

  /** The helper has ended: nothing can be begun any more. */
  get isGone(): boolean {
    return this.#isGone;
  }

  /** A packet has been sent, and its answer has not been taken. */
  get isRunning(): boolean {
    return this.#isRunning;
  }

  /** What the packet that is made up or runs is to bring. */
  get inHand(): readonly ChunkInHand[] {
    return this.#inHand;
  }

  /** Another chunk of so many runs can be added. */
  canTake(runs: number): boolean {
    if (this.#isGone || this.#isRunning) return false;
    if (this.#inHand.length === 0) return true;
    return !this.#options.isGuarded && this.#calls + runs + 1 <= HELPER_CALLS_MAX;
  }

  /** Adds a chunk to the packet, as far as there is room. Only when `canTake` says so. */
  add(state: BlockState, chunk: number): void {
    if (this.#inHand.length === 0) this.#begin();
    const nextPage = nextBit(state.data, state.chunkStart(chunk), state.chunkEnd(chunk), true);
    const taken: ChunkInHand = { state, chunk, fate: "reading", nextPage, moveCall: -1 };
    this.#inHand.push(taken);
    this.#fill(taken);
  }

  /** Sends what was added. A failure shows when the answer is taken. */
  send(): void {
    if (this.#isRunning || this.#calls === 0) return;
    const isMoving = (this.#inHand.at(-1)?.moveCall ?? -1) >= 0;
    if (this.#options.preparesAhead && isMoving && this.#calls < HELPER_CALLS_MAX) {
      this.#populate();
    }
    this.#start();
  }

  /**
   * Takes the answer of the helper, and blocks until it is there. Then what is in hand has a fate;
   * one that is still `reading` goes on with `goOn`.
   */
  proceed(): void {
    this.#isRunning = false;
    this.#calls = 0;
    const made = this.#isGone ? -1 : this.#helper.finish();
    if (made < 0) this.#isGone = true;
    for (const taken of this.#inHand) taken.fate = this.#fateOf(taken, made);
  }

  /** The next calls for a chunk that did not fit into one packet. */
  goOn(): void {
    const taken = this.#inHand[0];
    if (taken === undefined) return;
    this.#helper.begin();
    this.#fill(taken);
    this.send();
  }

  /** Moves a chunk that was read, and blocks until that is done. */
  moveNow(taken: ChunkInHand): boolean {
    this.#helper.begin();
    const call = this.#addMove(taken);
    const isMade = !this.#isGone && this.#helper.run() >= 0;
    const isMoved = isMade && this.#helper.moveOutcome(call) === CHUNK_LENGTH;
    taken.fate = isMoved ? "moved" : "unmoved";
    return isMoved;
  }

  /** Nothing is in hand any more. */
  clear(): void {
    if (this.#inHand.some(({ fate }) => fate !== "moved")) this.#isDirty = true;
    this.#inHand.length = 0;
    if (this.#options.isGuarded) this.#prepareNext();
  }

  #fateOf(taken: ChunkInHand, made: number): ChunkInHand["fate"] {
    if (taken.moveCall >= 0) {
      return this.#helper.moveOutcome(taken.moveCall) === CHUNK_LENGTH ? "moved" : "unmoved";
    }
    // It is alone in its packet, which ends with a read.
    if (made < this.#readsEnd) return "unmoved";
    const isRead = taken.nextPage >= taken.state.chunkEnd(taken.chunk);
    return isRead && this.#options.isGuarded ? "read" : "reading";
  }

  #begin(): void {
    this.#helper.begin();
    this.#calls = 0;
    if (!this.#isDirty) return;
    this.#isDirty = false;
    this.#helper.madvise(this.#helper.record.stagingAddr, CHUNK_LENGTH, MADV_DONTNEED);
    this.#calls = 1;
  }

  /** Reads of the chunk's data pages, the rest is zero; then, if there is room, the move. */
  #fill(taken: ChunkInHand): void {
    const { state, chunk } = taken;
    const { pageSize, pagesOffset } = state.block;
    const { stagingAddr } = this.#helper.record;
    const start = state.chunkStart(chunk);
    const end = state.chunkEnd(chunk);
    let at = taken.nextPage;
    while (at < end && this.#calls < HELPER_CALLS_MAX) {
      const runEnd = nextBit(state.data, at, end, false);
      const target = stagingAddr + (at - start) * pageSize;
      const length = (runEnd - at) * pageSize;
      this.#helper.preadInto(this.#fileFd, target, length, pagesOffset + at * pageSize);
      this.#calls += 1;
      at = nextBit(state.data, runEnd, end, true);
    }
    taken.nextPage = at;
    this.#readsEnd = this.#calls;
    if (this.#options.isGuarded || at < end || this.#calls === HELPER_CALLS_MAX) return;
    taken.moveCall = this.#addMove(taken);
    this.#calls += 1;
  }

  /** A move that fails ends the packet: the next chunk would find its bytes in the staging memory. */
  #addMove({ state, chunk }: ChunkInHand): number {
    const target = state.block.hostAddr + state.chunkStart(chunk) * state.block.pageSize;
    return this.#helper.move(target, this.#helper.record.stagingAddr, CHUNK_LENGTH, 0);
  }

  #prepareNext(): void {
    if (!this.#options.preparesAhead || this.#isGone || this.#isRunning) return;
    this.#begin();
    this.#populate();
    this.#start();
  }

  #populate(): void {
    this.#helper.madvise(this.#helper.record.stagingAddr, CHUNK_LENGTH, MADV_POPULATE_WRITE);
    this.#calls += 1;
  }

  #start(): void {
    this.#isRunning = true;
    if (this.#helper.start() < 0) this.#isGone = true;
  }
}
