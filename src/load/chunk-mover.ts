/**
 * Brings whole chunks, each in one piece: a helper task in the target's address space reads the
 * bytes of a chunk from the snapshot file into a fresh huge page, and moves that page into guest RAM
 * (UFFDIO_MOVE, Linux 6.8), which wakes whoever waits there. At the speed and the cost of an ordinary
 * load, and the guest has a huge page afterwards, where copying leaves 512 small ones.
 *
 * One chunk at a time: `begin` it, `proceed` takes the answer, `settle` it. No call here waits for the
 * helper but `proceed` and `moveNow`.
 *
 * Only for chunks in which no page is present: the kernel moves a huge page whole, or has to split
 * it first.
 */
import { HelperTask, type HelperRecord } from "../sys/helper-task.ts";
import { HELPER_CALLS_MAX, MADV_DONTNEED } from "../sys/abi.ts";
import { nextBit } from "./bits.ts";
import { type BlockState, CHUNK_LENGTH } from "./state.ts";

/**
 * A chunk with more runs of data than this is copied: one read for each would cost more than it
 * saves.
 */
export const RUNS_MAX = 64;

/** Whether a chunk can come as a whole; looked at again by the kernel when it does. */
export function canMove(state: BlockState, chunk: number): boolean {
  const { block } = state;
  const start = state.chunkStart(chunk);
  const end = state.chunkEnd(chunk);
  if (!block.movable || (end - start) * block.pageSize !== CHUNK_LENGTH) return false;
  if (nextBit(state.done, start, end, true) !== end) return false;
  let runs = 0;
  for (let at = nextBit(state.data, start, end, true); at < end; runs += 1) {
    at = nextBit(state.data, nextBit(state.data, at, end, false), end, true);
  }
  return runs > 0 && runs <= RUNS_MAX;
}

/** What has become of the chunk in hand: still being read, to be moved by `moveNow`, there, or not. */
export type ChunkFate = "reading" | "read" | "moved" | "unmoved";

export class ChunkMover {
  readonly #helper: HelperTask;
  readonly #isGuarded: boolean;
  /** Descriptor of the snapshot in the helper. */
  readonly #fileFd: number;
  #isGone: boolean;
  #isRunning = false;
  #state: BlockState | null = null;
  #chunk = 0;
  /** The first page that no packet has asked for yet. */
  #nextPage = 0;
  /** Calls of the packet that runs, and which of them moves the chunk; -1 = none. */
  #calls = 0;
  #moveCall = -1;
  /** The staging memory holds bytes of a chunk that was not moved. */
  #isDirty = false;

  /**
   * @param fileFd descriptor of the snapshot in this process
   * @param isGuarded a chunk is only read; `moveNow` moves it, after a look at what was given back
   */
  constructor(record: HelperRecord, fileFd: number, isGuarded: boolean) {
    this.#helper = new HelperTask(record);
    this.#isGuarded = isGuarded;
    this.#fileFd = this.#helper.sendDescriptor(fileFd);
    this.#isGone = this.#fileFd < 0 || record.stagingLength < CHUNK_LENGTH;
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

  /** A chunk can be begun. */
  get isFree(): boolean {
    return !this.#isGone && !this.#isRunning && this.#state === null;
  }

  /** The block whose chunk is in hand, and the chunk's number within it; null = none. */
  get state(): BlockState | null {
    return this.#state;
  }
  get chunk(): number {
    return this.#chunk;
  }

  /** Takes a chunk in hand. Only when `isFree`. */
  begin(state: BlockState, chunk: number): void {
    this.#state = state;
    this.#chunk = chunk;
    this.#nextPage = nextBit(state.data, state.chunkStart(chunk), state.chunkEnd(chunk), true);
    this.#helper.begin();
    this.#calls = 0;
    const { stagingAddr } = this.#helper.record;
    if (this.#isDirty) {
      this.#isDirty = false;
      this.#helper.madvise(stagingAddr, CHUNK_LENGTH, MADV_DONTNEED);
      this.#calls += 1;
    }
    this.#helper.touch(stagingAddr);
    this.#calls += 1;
    this.#sendCalls(state);
  }

  /**
   * Takes the answer of the helper, and blocks until it is there.
   * @returns what has become of the chunk in hand; reading: it goes on with `goOn`
   */
  proceed(): ChunkFate {
    this.#isRunning = false;
    const made = this.#isGone ? -1 : this.#helper.finish();
    if (made < 0) this.#isGone = true;
    if (this.#moveCall >= 0) return this.#hasMoved(this.#moveCall) ? "moved" : "unmoved";
    if (made < this.#calls || this.#state === null) return "unmoved";
    const isRead = this.#nextPage >= this.#state.chunkEnd(this.#chunk);
    return isRead && this.#isGuarded ? "read" : "reading";
  }

  /** The next calls for a chunk that did not fit into one packet. */
  goOn(): void {
    if (this.#state === null) return;
    this.#helper.begin();
    this.#calls = 0;
    this.#sendCalls(this.#state);
  }

  /** Moves the chunk that was read, and blocks until that is done. @returns whether it has come */
  moveNow(): boolean {
    if (this.#state === null || this.#isGone) return false;
    this.#helper.begin();
    const call = this.#addMove(this.#state);
    return this.#helper.run() >= 0 && this.#hasMoved(call);
  }

  /** The chunk is out of hand. @param hasMoved else its bytes are still in the staging memory */
  settle(hasMoved: boolean): void {
    this.#state = null;
    this.#moveCall = -1;
    if (!hasMoved) this.#isDirty = true;
  }

  #hasMoved(call: number): boolean {
    return this.#helper.moveOutcome(call) === CHUNK_LENGTH;
  }

  /** Reads of the chunk's data pages, the rest is zero; then, if there is room, the move. */
  #sendCalls(state: BlockState): void {
    const { pageSize, pagesOffset } = state.block;
    const { stagingAddr } = this.#helper.record;
    const start = state.chunkStart(this.#chunk);
    const end = state.chunkEnd(this.#chunk);
    let at = this.#nextPage;
    while (at < end && this.#calls < HELPER_CALLS_MAX) {
      const runEnd = nextBit(state.data, at, end, false);
      const target = stagingAddr + (at - start) * pageSize;
      const length = (runEnd - at) * pageSize;
      this.#helper.preadInto(this.#fileFd, target, length, pagesOffset + at * pageSize);
      this.#calls += 1;
      at = nextBit(state.data, runEnd, end, true);
    }
    this.#nextPage = at;
    const isLast = at >= end && this.#calls < HELPER_CALLS_MAX;
    if (isLast && !this.#isGuarded) {
      this.#moveCall = this.#addMove(state);
      this.#calls += 1;
    }
    this.#send();
  }

  #addMove(state: BlockState): number {
    const target = state.block.hostAddr + state.chunkStart(this.#chunk) * state.block.pageSize;
    return this.#helper.move(target, this.#helper.record.stagingAddr, CHUNK_LENGTH, 0);
  }

  /** A failure shows when the answer is taken. */
  #send(): void {
    this.#isRunning = true;
    if (this.#helper.start() < 0) this.#isGone = true;
  }
}
