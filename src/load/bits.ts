/**
 * Page bitmaps of the load state: 32-bit words, page i = bit (i mod 32) of word i div 32. Several
 * Workers share them, so bits are set by atomic OR; scans may see a bit late, never early.
 */

/** The words of a snapshot's bitmap, as the functions here take them. */
export function wordsOf({ words }: { readonly words: Uint32Array }): Int32Array {
  return new Int32Array(words.buffer, words.byteOffset, words.length);
}

/** Index of the lowest set bit of a word that is not 0. */
function lowestBit(word: number): number {
  return 31 - Math.clz32(word & -word);
}

export function testBit(words: Int32Array, index: number): boolean {
  return ((words[index >>> 5] ?? 0) & (1 << (index & 31))) !== 0;
}

/** Sets the bits of the half-open range [start, end). */
export function setRange(words: Int32Array, start: number, end: number): void {
  let index = start;
  while (index < end) {
    const wordEnd = (index & ~31) + 32;
    const bitEnd = Math.min(end, wordEnd);
    const count = bitEnd - index;
    const mask = count === 32 ? -1 : ((1 << count) - 1) << (index & 31);
    Atomics.or(words, index >>> 5, mask);
    index = bitEnd;
  }
}

/**
 * First index in [start, end) at which `wanted & ~done` has the value `value`, else `end`.
 * With `value` true: the next page that still has to come. With false: the end of such a run.
 */
export function nextMissing(
  wanted: Int32Array,
  done: Int32Array,
  start: number,
  end: number,
  value: boolean,
): number {
  let index = start;
  while (index < end) {
    const word = index >>> 5;
    let bits = (wanted[word] ?? 0) & ~(done[word] ?? 0);
    if (!value) bits = ~bits;
    bits &= -1 << (index & 31);
    if (bits !== 0) return Math.min(end, (index & ~31) + lowestBit(bits));
    index = (index & ~31) + 32;
  }
  return end;
}

/** First index in [start, end) whose bit equals `value`, else `end`. */
export function nextBit(words: Int32Array, start: number, end: number, value: boolean): number {
  let index = start;
  while (index < end) {
    const word = words[index >>> 5] ?? 0;
    const bits = (value ? word : ~word) & (-1 << (index & 31));
    if (bits !== 0) return Math.min(end, (index & ~31) + lowestBit(bits));
    index = (index & ~31) + 32;
  }
  return end;
}

/**
 * Lowest index `from` such that all bits of [from, start] equal `value`, not below `floor`; bit
 * `start` must.
 */
export function runStart(words: Int32Array, start: number, floor: number, value: boolean): number {
  let index = start;
  while (index > floor && testBit(words, index - 1) === value) index -= 1;
  return index;
}

function popCount(value: number): number {
  let bits = value - ((value >>> 1) & 0x55555555);
  bits = (bits & 0x33333333) + ((bits >>> 2) & 0x33333333);
  return Math.imul((bits + (bits >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24;
}

/** How many bits are set in `words`. */
export function countBits(words: Int32Array): number {
  let count = 0;
  for (let word = 0; word < words.length; word += 1) count += popCount(words[word] ?? 0);
  return count;
}

/** How many bits of [start, end) are set. */
export function countRange(words: Int32Array, start: number, end: number): number {
  let count = 0;
  for (let index = start; index < end;) {
    const wordEnd = Math.min(end, (index & ~31) + 32);
    const length = wordEnd - index;
    const mask = length === 32 ? -1 : ((1 << length) - 1) << (index & 31);
    count += popCount((words[index >>> 5] ?? 0) & mask);
    index = wordEnd;
  }
  return count;
}

/**
 * How many bits of `wanted & ~done` are set. Words of `done` of which nothing is wanted are not looked
 * at: a look is what makes a page of the load state take memory.
 */
export function countMissing(wanted: Int32Array, done: Int32Array): number {
  let count = 0;
  for (let word = 0; word < wanted.length; word += 1) {
    const bits = wanted[word] ?? 0;
    if (bits !== 0) count += popCount(bits & ~(done[word] ?? 0));
  }
  return count;
}
