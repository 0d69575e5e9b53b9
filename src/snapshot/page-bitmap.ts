/**
 * Which pages of a RAMBlock have bytes in the snapshot. Bit i = page i: set = data page, clear = zero page, whatever
 * bytes the file has at its place (a live save leaves stale ones).
 *
 * The one trap of the format: the bitmap is the saver's array of host `unsigned long`, written as it lies in memory
 * (QEMU migration/ram.c ram_save_file_bmap). On a little-endian 64-bit host page i is bit i & 7 of byte i >> 3, so
 * 32-bit words in host order (x86_64, arm64) hold page i in bit i & 31 of word i >> 5. Bits past the last page mean
 * nothing and are masked.
 */
import { countBits, nextBit } from "../bits.ts";
import { assert } from "../errors.ts";

/** Half-open run of page indexes. */
export interface PageRun {
  startIndex: number;
  /** Exclusive. */
  endIndex: number;
}

export class PageBitmap {
  /** Number of pages of the block. */
  readonly pageCount: number;
  /** Page i is bit i & 31 of words[i >> 5]; bits past pageCount are clear. ceil(pageCount / 32) words. */
  readonly words: Int32Array;
  #dataPages = -1;

  /**
   * @param bytes the bitmap as it is in the file: at least ceil(pageCount / 8) bytes. Kept, and masked at its tail,
   * when it is 4-byte aligned; copied otherwise
   */
  constructor(bytes: Uint8Array, pageCount: number) {
    assert(Number.isSafeInteger(pageCount) && pageCount >= 0, `page count ${pageCount}`);
    const wordCount = Math.ceil(pageCount / 32);
    assert(
      bytes.length >= Math.ceil(pageCount / 8),
      `bitmap of ${bytes.length} bytes for ${pageCount} pages`,
    );
    this.pageCount = pageCount;
    this.words = wordsOf(bytes, wordCount);
    const tailPages = pageCount % 32;
    const lastWord = this.words[wordCount - 1];
    if (tailPages !== 0 && lastWord !== undefined) {
      this.words[wordCount - 1] = lastWord & ((1 << tailPages) - 1);
    }
  }

  /** Number of set bits, 0..pageCount. Counted once. */
  get dataPages(): number {
    if (this.#dataPages < 0) this.#dataPages = countBits(this.words);
    return this.#dataPages;
  }

  /** @param pageIndex 0 <= pageIndex < pageCount */
  has(pageIndex: number): boolean {
    const word = this.words[pageIndex >>> 5];
    assert(
      word !== undefined && pageIndex < this.pageCount,
      `page index ${pageIndex} of ${this.pageCount}`,
    );
    return (word & (1 << (pageIndex & 31))) !== 0;
  }

  /**
   * The first run of data pages that ends after `fromIndex`, cut to start at `fromIndex` at the earliest.
   * @param fromIndex 0 <= fromIndex <= pageCount
   * @param out filled and returned when given, so that a loop allocates nothing
   * @returns null when only zero pages remain
   */
  nextDataRun(fromIndex: number, out?: PageRun): PageRun | null {
    const startIndex = this.#find(fromIndex, true);
    if (startIndex === this.pageCount) return null;
    return fillRun(out, startIndex, this.#find(startIndex, false));
  }

  /** The same for zero pages; null when only data pages remain. */
  nextZeroRun(fromIndex: number, out?: PageRun): PageRun | null {
    const startIndex = this.#find(fromIndex, false);
    if (startIndex === this.pageCount) return null;
    return fillRun(out, startIndex, this.#find(startIndex, true));
  }

  #find(fromIndex: number, value: boolean): number {
    assert(
      fromIndex >= 0 && fromIndex <= this.pageCount,
      `page index ${fromIndex} of ${this.pageCount}`,
    );
    return nextBit(this.words, fromIndex, this.pageCount, value);
  }
}

function wordsOf(bytes: Uint8Array, wordCount: number): Int32Array {
  if (bytes.byteOffset % 4 === 0 && bytes.length >= wordCount * 4) {
    return new Int32Array(bytes.buffer, bytes.byteOffset, wordCount);
  }
  const copy = new Uint8Array(wordCount * 4);
  copy.set(bytes.subarray(0, wordCount * 4));
  return new Int32Array(copy.buffer);
}

function fillRun(out: PageRun | undefined, startIndex: number, endIndex: number): PageRun {
  if (out === undefined) return { startIndex, endIndex };
  out.startIndex = startIndex;
  out.endIndex = endIndex;
  return out;
}
