/** The order in which chunks are brought that nobody has asked for. */
import { nextBit } from "../bits.ts";
import { type BlockState, CHUNK_LENGTH } from "./state.ts";

/** What of a block the order depends on. */
export interface ChunkedBlock {
  /** Bit set = page with bytes in the snapshot. */
  readonly data: Int32Array;
  readonly pageCount: number;
  /** Plan-wide number of chunk 0. */
  readonly firstChunk: number;
  chunkOf(pageIndex: number): number;
  chunkStart(chunk: number): number;
  chunkEnd(chunk: number): number;
}

/** A block that nobody has an address for yet. */
export interface SnapshotBlock {
  readonly idstr: string;
  readonly pageSize: number;
  readonly pageCount: number;
  readonly pagesOffset: number;
  /** Bit set = page with bytes in the snapshot. */
  readonly data: Int32Array;
}

export interface AlignedBlock extends SnapshotBlock, ChunkedBlock {}

/** The blocks' chunks in a target that aligns them to chunks, as it does with all that can have huge pages. */
export function alignBlocks(blocks: readonly SnapshotBlock[]): AlignedBlock[] {
  let firstChunk = 0;
  return blocks.map((block) => {
    const pages = CHUNK_LENGTH / block.pageSize;
    const aligned = {
      ...block,
      firstChunk,
      chunkOf: (page: number): number => Math.floor(page / pages),
      chunkStart: (chunk: number): number => chunk * pages,
      chunkEnd: (chunk: number): number => Math.min(block.pageCount, (chunk + 1) * pages),
    };
    firstChunk += Math.ceil(block.pageCount / pages);
    return aligned;
  });
}

/** Whether the target's chunks have the numbers that they have in `aligned`. */
export function areAligned(
  blocks: readonly BlockState[],
  aligned: readonly AlignedBlock[],
): boolean {
  return (
    blocks.length === aligned.length &&
    blocks.every(({ block, pageCount }, index) => {
      const other = aligned[index];
      const isSame = block.idstr === other?.idstr && pageCount === other.pageCount;
      return isSame && block.pageSize === other.pageSize && block.hostAddr % CHUNK_LENGTH === 0;
    })
  );
}

/** So many chunks at the top of memory come early: a kernel's page tables and per-CPU areas. */
const TOP_CHUNKS = 4;
/** So many chunks with holes come for each full one. */
const HOLED_TURNS = 2;
/** So many come by what they are; all others by address, as a disk likes it. */
const EARLY_CHUNKS = 128;

/**
 * Plan-wide numbers of all chunks that have data. Early come those that have holes, in turns with full
 * ones. What a kernel hands out in pages (slabs, stacks, page tables, small programs) lies between
 * pages that nobody has used yet, and is what a guest goes on with; what was taken by the megabyte
 * (page cache, large mappings) fills its chunks, and so does the kernel's image, at the bottom.
 */
export function orderChunks(blocks: readonly ChunkedBlock[]): Uint32Array {
  const all: number[] = [];
  const full: number[] = [];
  const holed: number[] = [];
  for (const block of blocks) {
    const { data, pageCount } = block;
    for (let page = nextBit(data, 0, pageCount, true); page < pageCount;) {
      const chunk = block.chunkOf(page);
      const end = block.chunkEnd(chunk);
      const isFull = page === block.chunkStart(chunk) && nextBit(data, page, end, false) === end;
      all.push(block.firstChunk + chunk);
      (isFull ? full : holed).push(block.firstChunk + chunk);
      page = nextBit(data, end, pageCount, true);
    }
  }
  const turns = holed.length > 0 ? takeTurns(fromEnds(holed), full, HOLED_TURNS) : fromEnds(full);
  const early = new Set(turns.slice(0, EARLY_CHUNKS));
  return Uint32Array.from([...early, ...all.filter((number) => !early.has(number))]);
}

/** By address, but the first ones take turns with those at the top. */
function fromEnds(numbers: readonly number[]): number[] {
  const topAt = Math.max(numbers.length - TOP_CHUNKS, Math.ceil(numbers.length / 2));
  return takeTurns(numbers.slice(0, topAt), numbers.slice(topAt).reverse(), 1);
}

/** So many of the first in turn with one of the second; as many as come early, or more. */
function takeTurns(a: readonly number[], b: readonly number[], turnsOfA: number): number[] {
  const turns: number[] = [];
  const rounds = Math.min(EARLY_CHUNKS, Math.max(Math.ceil(a.length / turnsOfA), b.length));
  for (let round = 0; round < rounds; round += 1) {
    turns.push(...a.slice(round * turnsOfA, (round + 1) * turnsOfA), ...b.slice(round, round + 1));
  }
  return turns;
}
