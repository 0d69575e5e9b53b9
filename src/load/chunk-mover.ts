/**
 * Brings whole chunks, each in one piece: a helper task in the target's address space reads the
 * bytes of a chunk from the snapshot file into a fresh huge page, and moves that page into guest RAM
 * (UFFDIO_MOVE, Linux 6.8), which wakes whoever waits there. At the speed and the cost of an ordinary
 * load, and the guest has a huge page afterwards, where copying leaves 512 small ones.
 *
 * A batch of chunks at a time, which is one packet: `add` them, `send`, `take` the answer, `settle`
 * each. No call here waits for the helper but `take` and `moveNow`.
 *
 * Only for chunks in which no page is present: the kernel moves a huge page whole, or has to split
 * it first.
 */
import { HelperTask, type HelperRecord } from "../sys/helper-task.ts";
import { HELPER_CALLS_MAX, MADV_DONTNEED } from "../sys/abi.ts";
import { givesHugePages, keepsPageTables } from "../sys/host-pages.ts";
import { nextBit } from "../bits.ts";
import { type BlockState, CHUNK_LENGTH } from "./state.ts";

/**
 * A chunk with more runs of data than this is copied: one read for each would cost more than it
 * saves.
 */
export const RUNS_MAX = 64;
/** Calls that a chunk takes at most: staging memory is given back, touched, made huge, read into, moved. */
const CHUNK_CALLS_MAX = 3 + RUNS_MAX + 1;

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

/**
 * What has become of a chunk in hand: to be moved by `moveNow`, or how many bytes of it were moved, from its
 * first page on. Fewer than all: a page behind them was there already, or the helper has ended.
 */
export type ChunkFate = "read" | number;

/** A chunk in hand. */
export interface ChunkInHand {
  readonly state: BlockState;
  readonly chunk: number;
}

interface BatchedChunk extends ChunkInHand {
  /** How many calls of the packet must have been made for it to have been read. */
  readonly callsToRead: number;
  /** Which call moves it; -1 = none. */
  readonly moveCall: number;
}

let areSplitForGood: boolean | undefined;

/** Asked of the kernel once: a load has a few movers, made when the guest has just been resumed. */
function splitsForGood(): boolean {
  return (areSplitForGood ??= keepsPageTables() && givesHugePages());
}

export class ChunkMover {
  readonly #helper: HelperTask;
  readonly #isGuarded: boolean;
  readonly #makesHuge: boolean;
  /** Descriptor of the snapshot in the helper. */
  readonly #fileFd: number;
  /** Chunks that there is staging memory for. */
  readonly #slots: number;
  #isGone: boolean;
  #isRunning = false;
  /** What is in hand, each in the slot of its place. */
  #batch: BatchedChunk[] = [];
  #calls = 0;
  /** Slots that may hold bytes of a chunk that was not moved: at first all, for whoever had the helper before. */
  readonly #dirty = new Set<number>();

  /**
   * @param fileFd descriptor of the snapshot in this process
   * @param isGuarded a chunk is only read; `moveNow` moves it, after a look at what was given back
   * @param patienceMs see `HelperTask`
   * @param makesHuge a slot whose huge page was split would be of small pages from then on. A chunk is moved as
   * far as there are pages then: no zero behind the first one
   */
  constructor(
    record: HelperRecord,
    fileFd: number,
    isGuarded: boolean,
    patienceMs = -1,
    makesHuge = splitsForGood(),
  ) {
    this.#helper = new HelperTask(record, patienceMs);
    this.#isGuarded = isGuarded;
    this.#makesHuge = makesHuge;
    this.#fileFd = this.#helper.openFile(fileFd);
    this.#slots = Math.floor(record.stagingLength / CHUNK_LENGTH);
    this.#isGone = this.#fileFd < 0 || this.#slots === 0;
    for (let slot = 0; slot < this.#slots; slot += 1) this.#dirty.add(slot);
  }

  /** Readable when there is something to `take`. */
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

  /** Nothing is in hand: a batch can be begun. */
  get isFree(): boolean {
    return !this.#isGone && !this.#isRunning && this.#batch.length === 0;
  }

  /** What is in hand. */
  get batch(): readonly ChunkInHand[] {
    return this.#batch;
  }

  /** Nothing can be added to the batch. */
  get isFull(): boolean {
    return this.#batch.length >= this.#slots || this.#calls + CHUNK_CALLS_MAX > HELPER_CALLS_MAX;
  }

  /** Takes a chunk in hand that `canMove`. Only when the batch has not been sent and is not full. */
  add(state: BlockState, chunk: number): void {
    const slot = this.#batch.length;
    if (slot === 0) {
      this.#helper.begin();
      this.#calls = 0;
    }
    const stagingAddr = this.#slotAddr(slot);
    const isDirty = this.#dirty.delete(slot);
    if (isDirty) {
      this.#helper.madvise(stagingAddr, CHUNK_LENGTH, MADV_DONTNEED);
      this.#calls += 1;
    }
    this.#helper.touch(stagingAddr);
    this.#calls += 1;
    if (isDirty && this.#makesHuge) {
      this.#helper.collapse(stagingAddr, CHUNK_LENGTH);
      this.#calls += 1;
    }
    // The rest of it is zero, as a fresh page is.
    const { pageSize, pagesOffset } = state.block;
    const start = state.chunkStart(chunk);
    const end = state.chunkEnd(chunk);
    for (let at = nextBit(state.data, start, end, true); at < end;) {
      const runEnd = nextBit(state.data, at, end, false);
      const target = stagingAddr + (at - start) * pageSize;
      const length = (runEnd - at) * pageSize;
      this.#helper.preadInto(this.#fileFd, target, length, pagesOffset + at * pageSize);
      this.#calls += 1;
      at = nextBit(state.data, runEnd, end, true);
    }
    const callsToRead = this.#calls;
    let moveCall = -1;
    if (!this.#isGuarded) {
      // One that fails does not keep those behind it from coming.
      moveCall = this.#addMove(state, chunk, slot, false);
      this.#calls += 1;
    }
    this.#batch.push({ state, chunk, callsToRead, moveCall });
  }

  /** A failure shows when the answer is taken. */
  send(): void {
    this.#isRunning = true;
    if (this.#helper.start() < 0) this.#isGone = true;
  }

  /** Takes the helper's answer, and blocks until it is there. @returns the fate of each in `batch` */
  take(): ChunkFate[] {
    this.#isRunning = false;
    const made = this.#isGone ? -1 : this.#helper.finish();
    if (made < 0) this.#isGone = true;
    return this.#batch.map(({ callsToRead, moveCall }) => {
      if (made < callsToRead) return 0;
      return moveCall < 0 ? "read" : this.#helper.bytesMoved(moveCall);
    });
  }

  /** Moves a chunk that was read, and blocks until that is done. @returns bytes moved */
  moveNow(index: number): number {
    const inHand = this.#batch[index];
    if (inHand === undefined || this.#isGone) return 0;
    this.#helper.begin();
    const call = this.#addMove(inHand.state, inHand.chunk, index, true);
    this.#helper.run();
    return this.#helper.bytesMoved(call);
  }

  /** The batch is out of hand. @param moved bytes of each that were; the others are still in its slot */
  settle(moved: readonly number[]): void {
    for (const [slot, bytes] of moved.entries()) if (bytes < CHUNK_LENGTH) this.#dirty.add(slot);
    this.#batch = [];
  }

  #addMove(state: BlockState, chunk: number, slot: number, stopOnError: boolean): number {
    const target = state.block.hostAddr + state.chunkStart(chunk) * state.block.pageSize;
    return this.#helper.move(target, this.#slotAddr(slot), CHUNK_LENGTH, 0, stopOnError);
  }

  #slotAddr(slot: number): number {
    return this.#helper.record.stagingAddr + slot * CHUNK_LENGTH;
  }
}
