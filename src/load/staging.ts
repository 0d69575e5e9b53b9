/**
 * Reading ahead: while the target is still starting, its helper tasks read the chunks that the guest
 * will need first into their staging memory, with the CPU time that nobody else wants. When the target
 * is armed these chunks are moved into its RAM, a few µs each, while it loads its devices: the guest's
 * first steps find them there. Runs on the main thread, which has nothing to do but to wait then: each
 * helper gets all that it is to read in one batch, and ends it when it is told to.
 *
 * What is read ahead is a guess and costs memory for a moment; it is worth nothing where RAM turns out
 * not to be movable, and is let go then.
 */
import { HELPER_CALLS_MAX, MADV_DONTNEED } from "../sys/abi.ts";
import { type HelperRecord, HelperTask } from "../sys/helper-task.ts";
import { nextBit } from "../bits.ts";
import { RUNS_MAX } from "./chunk-mover.ts";
import type { AlignedBlock } from "./order.ts";
import { raise, readIdly } from "./priority.ts";
import { type BlockState, CHUNK_LENGTH, type LoadState } from "./state.ts";
import type { WholeChunks } from "./whole-chunks.ts";
import type { WorkingSet } from "./working-set.ts";

/**
 * So many chunks are read ahead: what a kernel and its first programs need. More of them come sooner that
 * way too, but QEMU's own start and its devices come later: it was 1 ms for each 40 chunks, whose bytes go
 * through the same caches.
 */
export const STAGED_CHUNKS = 48;
/** How long a helper may take for what takes microseconds: the main thread waits for it, ms. */
const PATIENCE_MS = 500;
/** A chunk's words of the plan before its runs: block index, chunk number, number of runs. */
const HEAD_WORDS = 3;
/** And of each run: where in the chunk, bytes; file offset. */
const RUN_WORDS = 3;

/** Chunks to read, the first one first. Structured-cloneable. */
export interface StagingPlan {
  readonly idstrs: readonly string[];
  /** For each chunk HEAD_WORDS, then RUN_WORDS for each run of data in it. */
  readonly words: Float64Array;
}

/**
 * Chunks of the working set in its order, then `order`. Another than an aligned block's are let go in the end.
 * @param chunksMax how many
 */
export function planStaging(
  blocks: readonly AlignedBlock[],
  order: Uint32Array,
  set: Pick<WorkingSet, "pages"> | null,
  chunksMax: number,
): StagingPlan {
  const numbers = new Set<number>();
  for (const { idstr, pageIndex } of set?.pages ?? []) {
    const block = blocks.find((one) => one.idstr === idstr && pageIndex < one.pageCount);
    if (block !== undefined) numbers.add(block.firstChunk + block.chunkOf(pageIndex));
  }
  for (const number of order) {
    if (numbers.size >= chunksMax) break;
    numbers.add(number);
  }
  const words: number[] = [];
  for (const number of numbers) {
    const index = blocks.findLastIndex((one) => one.firstChunk <= number);
    const block = blocks[index];
    if (block !== undefined) addChunk(words, block, index, number - block.firstChunk);
  }
  return { idstrs: blocks.map(({ idstr }) => idstr), words: Float64Array.from(words) };
}

function addChunk(words: number[], block: AlignedBlock, index: number, chunk: number): void {
  const { data, pageSize, pagesOffset } = block;
  const start = block.chunkStart(chunk);
  const end = block.chunkEnd(chunk);
  const at = words.push(index, chunk, 0) - 1;
  let runs = 0;
  for (let page = nextBit(data, start, end, true); page < end; runs += 1) {
    const runEnd = nextBit(data, page, end, false);
    words.push(
      (page - start) * pageSize,
      (runEnd - page) * pageSize,
      pagesOffset + page * pageSize,
    );
    page = nextBit(data, runEnd, end, true);
  }
  words[at] = runs;
  // It comes page by page.
  const isUnfit = runs === 0 || runs > RUNS_MAX || (end - start) * pageSize < CHUNK_LENGTH;
  if (isUnfit) words.length = at + 1 - HEAD_WORDS;
}

interface StagedChunk {
  readonly idstr: string;
  readonly chunk: number;
  readonly slot: number;
}

interface ClaimedChunk {
  readonly block: BlockState;
  readonly chunk: number;
}

/** One helper: what it was told to read, and what it has read. */
class Reader {
  readonly helper: HelperTask;
  readonly #fileFd: number;
  readonly #slots: number;
  /** Chunks in the batch, and how many of its calls must have been made for each to be complete. */
  readonly #begun: (StagedChunk & { readonly calls: number })[] = [];
  #calls = 0;
  #isRunning = false;
  /** What is there to be moved. */
  #staged: readonly StagedChunk[] = [];
  /** What is under way. */
  readonly #moving: ClaimedChunk[] = [];
  /** Chunks that have been. */
  moved = 0;

  constructor(record: HelperRecord, fileFd: number) {
    this.helper = new HelperTask(record, PATIENCE_MS);
    this.#fileFd = this.helper.openFile(fileFd);
    this.#slots = this.#fileFd < 0 ? 0 : Math.floor(record.stagingLength / CHUNK_LENGTH);
    this.helper.begin(true);
  }

  #slotAddr(slot: number): number {
    return this.helper.record.stagingAddr + slot * CHUNK_LENGTH;
  }

  /** Adds the chunk at `at` in the plan to the batch. @returns false when there is no room for it */
  add({ idstrs, words }: StagingPlan, at: number): boolean {
    const slot = this.#begun.length;
    const [index = 0, chunk = 0, runs = 0] = words.subarray(at, at + HEAD_WORDS);
    if (slot >= this.#slots || this.#calls + 1 + runs > HELPER_CALLS_MAX) return false;
    this.helper.touch(this.#slotAddr(slot));
    for (let run = 0; run < runs; run += 1) {
      const runAt = at + HEAD_WORDS + run * RUN_WORDS;
      const [offset = 0, length = 0, fileOffset = 0] = words.subarray(runAt, runAt + RUN_WORDS);
      this.helper.preadInto(this.#fileFd, this.#slotAddr(slot) + offset, length, fileOffset);
    }
    this.#calls += 1 + runs;
    this.#begun.push({ idstr: idstrs[index] ?? "", chunk, slot, calls: this.#calls });
    return true;
  }

  start(): void {
    this.#isRunning = this.#calls > 0 && this.helper.start() >= 0;
  }

  stop(): void {
    if (this.#isRunning) this.helper.stop();
  }

  /** See `HelperTask.isAnswered`. */
  isAnswered(timeoutMs = 0): boolean {
    return !this.#isRunning || this.helper.isAnswered(timeoutMs);
  }

  /** Takes the answer: which chunks are complete. Blocks until the call returns that is being made. */
  finish(): void {
    if (!this.#isRunning) return;
    this.#isRunning = false;
    const made = this.helper.finish();
    this.#staged = this.#begun.filter(({ calls }) => calls <= made);
  }

  /** Sends what is to be moved, where nobody has touched it. Does not wait. */
  startMoves(state: LoadState, whole: WholeChunks): void {
    const batch = this.#moving;
    this.helper.begin();
    for (const { idstr, chunk, slot } of this.#staged) {
      const block = state.blocks.find((one) => one.block.idstr === idstr);
      if (block === undefined || block.block.hostAddr % CHUNK_LENGTH !== 0) continue;
      if (!whole.claim(block, chunk)) continue;
      const target = block.block.hostAddr + chunk * CHUNK_LENGTH;
      this.helper.move(target, this.#slotAddr(slot), CHUNK_LENGTH, 0, false);
      batch.push({ block, chunk });
    }
    if (batch.length > 0) this.helper.start();
  }

  endMoves(whole: WholeChunks): void {
    const batch = this.#moving.splice(0);
    if (batch.length === 0) return;
    this.helper.finish();
    for (const [call, { block, chunk }] of batch.entries()) {
      const moved = this.helper.bytesMoved(call);
      whole.settle(block, chunk, moved);
      if (moved === CHUNK_LENGTH) this.moved += 1;
    }
  }

  /** Lets go what was not moved; what was moved left nothing. */
  clear(): void {
    if (this.#begun.length === this.moved) return;
    this.helper.begin();
    this.helper.madvise(this.#slotAddr(0), this.#begun.length * CHUNK_LENGTH, MADV_DONTNEED);
    this.helper.run();
  }
}

export class Staging {
  #readers: readonly Reader[];
  /** Whose chunks are being moved. */
  #whole: WholeChunks | undefined;

  /**
   * Sets the helpers to work: they take the chunks of the plan in turns. @param others have nothing to do
   * yet, but will have the file open when they do
   */
  constructor(
    plan: StagingPlan,
    helpers: readonly HelperRecord[],
    fileFd: number,
    others: readonly HelperRecord[] = [],
  ) {
    for (const record of others) new HelperTask(record, PATIENCE_MS).openFile(fileFd);
    this.#readers = helpers.map((record) => new Reader(record, fileFd));
    // Not sooner: whoever opens the file is waited for, and on a busy host that may be long then.
    readIdly(helpers.map(({ pid }) => pid));
    for (let [at, turn] = [0, 0]; at < plan.words.length; turn += 1) {
      this.#add(plan, at, turn);
      at += HEAD_WORDS + RUN_WORDS * (plan.words[at + 2] ?? 0);
    }
    for (const reader of this.#readers) reader.start();
  }

  /** Gives a chunk to the helper whose turn it is, or to another one that has room for it. */
  #add(plan: StagingPlan, at: number, turn: number): void {
    const count = this.#readers.length;
    for (let step = 0; step < count; step += 1) {
      if (this.#readers[(turn + step) % count]?.add(plan, at) === true) return;
    }
  }

  /** Enough: each helper ends what it is reading, which is waited for soon. Does not wait. */
  stop(): void {
    for (const reader of this.#readers) reader.stop();
    for (const { helper } of this.#readers) raise(helper.record.pid);
  }

  /**
   * After `stop`: whether every helper has answered. One whose read takes long (a disk that hangs, a
   * helper that somebody has stopped) is not to be waited for here.
   */
  get isAnswered(): boolean {
    return this.#readers.every((reader) => reader.isAnswered());
  }

  /** Blocks for that, for so long with each helper at most; not with the next one when one is late. */
  awaitAnswers(timeoutMs: number): void {
    this.#readers.every((reader) => reader.isAnswered(timeoutMs));
  }

  /** Those that have not answered, or were given up: nobody can use them any more. */
  get lost(): HelperRecord[] {
    return this.#readers
      .filter((reader) => !reader.isAnswered() || reader.helper.isGone)
      .map(({ helper }) => helper.record);
  }

  /**
   * After `stop`: has what was read moved into the target where nobody has touched it, and does not wait for that.
   * Helpers that have not answered are left out. Once; `endMoves` must follow.
   */
  startMoves(state: LoadState, whole: WholeChunks): void {
    this.#readers = this.#readers.filter((reader) => reader.isAnswered());
    for (const reader of this.#readers) reader.finish();
    this.#whole = whole;
    whole.enterGate();
    if (state.halted) return;
    for (const reader of this.#readers) reader.startMoves(state, whole);
  }

  get hasStartedMoves(): boolean {
    return this.#whole !== undefined;
  }

  /** Blocks until the chunks are there, and lets the rest go. @returns how many have come */
  endMoves(): number {
    const whole = this.#whole;
    if (whole === undefined) return 0;
    for (const reader of this.#readers) reader.endMoves(whole);
    whole.leaveGate();
    for (const reader of this.#readers) reader.clear();
    return this.#readers.reduce((sum, { moved }) => sum + moved, 0);
  }
}
