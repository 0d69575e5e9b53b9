/**
 * Brings a whole chunk in one piece: a helper task in the target's address space reads its bytes
 * from the snapshot file into a fresh huge page, and moves that page into guest RAM (UFFDIO_MOVE,
 * Linux 6.8). At the speed and the cost of an ordinary load, and the guest has a huge page
 * afterwards, where copying leaves 512 small ones. Runs in an eager Worker; blocks while the helper
 * reads and moves, about 0.6 ms a chunk.
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

export class ChunkMover {
  readonly #helper: HelperTask;
  /** Descriptor of the snapshot in the helper. */
  readonly #fileFd: number;
  /** The staging memory holds bytes of a chunk that was not moved. */
  #isDirty = false;
  #isGone: boolean;

  /** @param fileFd descriptor of the snapshot in this process */
  constructor(record: HelperRecord, fileFd: number) {
    this.#helper = new HelperTask(record);
    this.#fileFd = this.#helper.sendDescriptor(fileFd);
    this.#isGone = this.#fileFd < 0;
  }

  /** Whether the chunk can come as a whole; looked at again by the kernel when it does. */
  canMove(state: BlockState, chunk: number): boolean {
    const { block } = state;
    const start = state.chunkStart(chunk);
    const end = state.chunkEnd(chunk);
    if (this.#isGone || !block.movable || (end - start) * block.pageSize !== CHUNK_LENGTH)
      return false;
    if (nextBit(state.done, start, end, true) !== end) return false;
    let runs = 0;
    for (let at = nextBit(state.data, start, end, true); at < end; runs += 1) {
      at = nextBit(state.data, nextBit(state.data, at, end, false), end, true);
    }
    return runs > 0 && runs <= RUNS_MAX;
  }

  /**
   * Reads the chunk's data pages into the staging memory; the rest of it is zero. @returns false
   * when it failed
   */
  read(state: BlockState, chunk: number): boolean {
    const helper = this.#helper;
    const { stagingAddr } = helper.record;
    const { pageSize, pagesOffset } = state.block;
    const start = state.chunkStart(chunk);
    const end = state.chunkEnd(chunk);
    helper.begin();
    let calls = 0;
    if (this.#isDirty) {
      helper.madvise(stagingAddr, CHUNK_LENGTH, MADV_DONTNEED);
      calls += 1;
    }
    this.#isDirty = true;
    let at = nextBit(state.data, start, end, true);
    while (at < end) {
      const runEnd = nextBit(state.data, at, end, false);
      const target = stagingAddr + (at - start) * pageSize;
      helper.preadInto(this.#fileFd, target, (runEnd - at) * pageSize, pagesOffset + at * pageSize);
      calls += 1;
      at = nextBit(state.data, runEnd, end, true);
      if (calls === HELPER_CALLS_MAX || at === end) {
        if (!this.#run(calls)) return false;
        helper.begin();
        calls = 0;
      }
    }
    return true;
  }

  /**
   * Moves what was read into guest RAM and wakes whoever waits there. @returns false when it did
   * not move all of it
   */
  move(state: BlockState, chunk: number): boolean {
    const { hostAddr, pageSize } = state.block;
    const helper = this.#helper;
    helper.begin();
    const target = hostAddr + state.chunkStart(chunk) * pageSize;
    const index = helper.move(target, helper.record.stagingAddr, CHUNK_LENGTH, 0);
    this.#run(1);
    const moved = !this.#isGone && helper.moveOutcome(index) === CHUNK_LENGTH;
    // A page that was moved leaves nothing behind: the next one is fresh.
    this.#isDirty = !moved;
    return moved;
  }

  /** @returns false when not all calls were made, or the last one failed */
  #run(calls: number): boolean {
    const made = this.#helper.run();
    if (made < 0) this.#isGone = true;
    return made === calls && this.#helper.result(calls - 1) >= 0;
  }
}
