/**
 * Brings whole chunks, each in one piece: a helper task in the target's address space reads the
 * bytes of a chunk from the snapshot file into a fresh huge page, and moves that page into guest RAM
 * (UFFDIO_MOVE, Linux 6.8). At the speed and the cost of an ordinary load, and the guest has a huge
 * page afterwards, where copying leaves 512 small ones.
 *
 * Runs in an eager Worker, which has a mover for each helper and waits for none of them: `begin` has
 * a chunk read, `proceed` takes the answer, `queueMove` has it moved together with the reads of the
 * next chunk. The staging memory has room for two chunks, so that the helper is always at work.
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
const RUNS_MAX = 64;

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

/** A chunk in hand: number within its block. */
export interface ChunkInHand {
  readonly state: BlockState;
  readonly chunk: number;
}

export class ChunkMover {
  readonly #helper: HelperTask;
  /** Descriptor of the snapshot in the helper. */
  readonly #fileFd: number;
  #isGone: boolean;
  #isRunning = false;
  /** Calls of the batch that is being made up or runs. */
  #calls = 0;
  #reading: ChunkInHand | null = null;
  /** The first page that no batch has asked for yet. */
  #nextPage = 0;
  #moving: ChunkInHand | null = null;
  #hasMoved = false;
  /** Which half of the staging memory the next chunk is read into. */
  #half = 0;
  /** Halves that hold bytes of a chunk that was not moved. */
  readonly #isDirty = [false, false];

  /** @param fileFd descriptor of the snapshot in this process */
  constructor(record: HelperRecord, fileFd: number) {
    this.#helper = new HelperTask(record);
    this.#fileFd = this.#helper.sendDescriptor(fileFd);
    this.#isGone = this.#fileFd < 0 || record.stagingLength < 2 * CHUNK_LENGTH;
  }

  /** Readable when there is something to `proceed` with. */
  get fd(): number {
    return this.#helper.record.fd;
  }

  /** The helper has ended: nothing can be begun any more. */
  get isGone(): boolean {
    return this.#isGone;
  }

  /** A batch has been sent, and its answer has not been taken. */
  get isRunning(): boolean {
    return this.#isRunning;
  }

  /** A chunk can be begun. */
  get isFree(): boolean {
    return !this.#isGone && !this.#isRunning && this.#reading === null;
  }

  /**
   * The chunk that is being read: between `begin` and `queueMove` or `drop`. `moving`: from there to
   * `settle`.
   */
  get reading(): ChunkInHand | null {
    return this.#reading;
  }
  get moving(): ChunkInHand | null {
    return this.#moving;
  }
  /** After `proceed`: what was to be moved is in guest RAM, all of it. */
  get hasMoved(): boolean {
    return this.#hasMoved;
  }

  /**
   * Has the chunk's data pages read into the staging memory, where the rest is zero; and what is
   * queued moved before.
   */
  begin(state: BlockState, chunk: number): void {
    this.#reading = { state, chunk };
    this.#nextPage = nextBit(state.data, state.chunkStart(chunk), state.chunkEnd(chunk), true);
    if (this.#calls === 0) this.#helper.begin();
    if (this.#isDirty[this.#half] === true) {
      this.#helper.madvise(this.#stagingAddr(this.#half), CHUNK_LENGTH, MADV_DONTNEED);
      this.#calls += 1;
    }
    this.#isDirty[this.#half] = true;
    this.#readMore(state, chunk);
  }

  /**
   * Takes the answer of the helper, and blocks until it is there. Then `hasMoved` tells of `moving`.
   * @returns of `reading`: null when more of it is to be read (which goes on), else whether all was
   */
  proceed(): boolean | null {
    this.#isRunning = false;
    const calls = this.#calls;
    this.#calls = 0;
    const made = this.#isGone ? -1 : this.#helper.finish();
    if (made < 0) this.#isGone = true;
    if (this.#moving !== null) {
      this.#hasMoved = made >= 0 && this.#helper.moveOutcome(0) === CHUNK_LENGTH;
      // A page that was moved leaves nothing behind: the next one is fresh.
      if (this.#hasMoved) this.#isDirty[1 - this.#half] = false;
    }
    if (this.#reading === null) return false;
    if (made !== calls || this.#helper.result(calls - 1) < 0) return false;
    const { state, chunk } = this.#reading;
    if (this.#nextPage >= state.chunkEnd(chunk)) return true;
    return null;
  }

  /** After `proceed` said null, and `settle`: the next reads of the same chunk. */
  goOn(): void {
    if (this.#reading === null) return;
    this.#helper.begin();
    this.#readMore(this.#reading.state, this.#reading.chunk);
  }

  /**
   * Has what was read moved into guest RAM, which wakes whoever waits there: with the next `begin`,
   * or with `flush`.
   */
  queueMove(): void {
    const chunk = this.#reading;
    if (chunk === null) return;
    const { state } = chunk;
    const target = state.block.hostAddr + state.chunkStart(chunk.chunk) * state.block.pageSize;
    this.#helper.begin();
    this.#helper.move(target, this.#stagingAddr(this.#half), CHUNK_LENGTH, 0, false);
    this.#calls = 1;
    this.#half = 1 - this.#half;
    this.#moving = chunk;
    this.#hasMoved = false;
    this.#reading = null;
  }

  /** Sends what is queued. */
  flush(): void {
    if (this.#calls > 0 && !this.#isRunning) this.#start();
  }

  /** What was moved, or not, is out of hand. */
  settle(): void {
    this.#moving = null;
  }

  /** What was read, or not, is not to be moved. */
  drop(): void {
    this.#reading = null;
  }

  #stagingAddr(half: number): number {
    return this.#helper.record.stagingAddr + half * CHUNK_LENGTH;
  }

  /** Fills the batch with reads and sends it. */
  #readMore(state: BlockState, chunk: number): void {
    const helper = this.#helper;
    const { pageSize, pagesOffset } = state.block;
    const start = state.chunkStart(chunk);
    const end = state.chunkEnd(chunk);
    const stagingAddr = this.#stagingAddr(this.#half);
    let at = this.#nextPage;
    while (at < end && this.#calls < HELPER_CALLS_MAX) {
      const runEnd = nextBit(state.data, at, end, false);
      const target = stagingAddr + (at - start) * pageSize;
      helper.preadInto(this.#fileFd, target, (runEnd - at) * pageSize, pagesOffset + at * pageSize);
      this.#calls += 1;
      at = nextBit(state.data, runEnd, end, true);
    }
    this.#nextPage = at;
    this.#start();
  }

  /** A failure shows when the answer is taken. */
  #start(): void {
    this.#isRunning = true;
    if (this.#helper.start() < 0) this.#isGone = true;
  }
}
