/** The order in which chunks are brought that nobody has asked for. */
import { nextBit } from "./bits.ts";

/** What of a block the order depends on. */
export interface ChunkedBlock {
  /** Bit set = page with bytes in the snapshot. */
  readonly data: Int32Array;
  readonly pageCount: number;
  /** Plan-wide number of chunk 0. */
  readonly firstChunk: number;
  chunkOf(pageIndex: number): number;
  chunkEnd(chunk: number): number;
}

/** So many chunks at the top of memory come early: a kernel's page tables and per-CPU areas. */
const TOP_CHUNKS = 12;

/**
 * Plan-wide numbers of all chunks that have data, by address, which is what a guest reads them by;
 * but the first ones (a kernel's image and first allocations) take turns with those at the top, that a
 * guest needs in its first steps.
 */
export function orderChunks(blocks: readonly ChunkedBlock[]): Uint32Array {
  const numbers: number[] = [];
  for (const block of blocks) {
    let page = nextBit(block.data, 0, block.pageCount, true);
    while (page < block.pageCount) {
      const chunk = block.chunkOf(page);
      numbers.push(block.firstChunk + chunk);
      page = nextBit(block.data, block.chunkEnd(chunk), block.pageCount, true);
    }
  }
  const top = numbers.splice(Math.max(numbers.length - TOP_CHUNKS, numbers.length / 2)).reverse();
  for (const [index, number] of top.entries()) numbers.splice(2 * index + 1, 0, number);
  return Uint32Array.from(numbers);
}
