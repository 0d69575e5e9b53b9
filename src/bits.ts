/**
 * Page bitmaps, of a snapshot and of the load state: 32-bit words, page i = bit (i mod 32) of word i div 32. Several
 * Workers share the state's, so bits are set by atomic OR; scans may see a bit late, never early.
 */

/** Index of the lowest set bit of a word that is not 0. */
function lowestBit(word: number): number {
  return 31 - Math.clz32(word & -word);
}

export function testBit(words: Int32Array, index: number): boolean {
  return ((words[index >>> 5] ?? 0) & (1 << (index & 31))) !== 0;
}

/** Sets the bits of the half-open range [start, end). */
export function setRange(words: Int32Array, start: number, end: number): void {
  const first = Math.ceil(start / 32);
  const last = Math.floor(end / 32);
  if (first > last) {
    setBits(words, start, end);
    return;
  }
  setBits(words, start, first * 32);
  // Whatever others set meanwhile, all of a word is what it will be.
  words.fill(-1, first, last);
  setBits(words, last * 32, end);
}

/** Within one word, and not all of it. */
function setBits(words: Int32Array, start: number, end: number): void {
  if (start < end) Atomics.or(words, start >>> 5, ((1 << (end - start)) - 1) << (start & 31));
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

/**
 * First index in [start, end) whose bit equals `value`, else `end`. Bitmaps are long, and mostly looked at by code that
 * is not compiled yet: words without such a bit are passed over by as little of it as can be.
 */
export function nextBit(words: Int32Array, start: number, end: number, value: boolean): number {
  if (start >= end) return end;
  const passed = value ? 0 : -1;
  let at = start >>> 5;
  let bits = ((words[at] ?? 0) ^ passed) & (-1 << (start & 31));
  if (bits === 0) {
    const last = (end - 1) >>> 5;
    do at += 1;
    while (at <= last && words[at] === passed);
    if (at > last) return end;
    bits = (words[at] ?? 0) ^ passed;
    // Behind the last word all bits are clear.
    if (bits === 0) return end;
  }
  return Math.min(end, at * 32 + lowestBit(bits));
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
  const { length } = words;
  for (let at = 0; at < length; at += 1) {
    const word = words[at] ?? 0;
    // Most are one of these two, and a call costs more than both, see `nextBit`.
    if (word === 0) continue;
    count += word === -1 ? 32 : popCount(word);
  }
  return count;
}

/** How many bits of [start, end) are set. */
export function countRange(words: Int32Array, start: number, end: number): number {
  let count = 0;
  for (let index = start; index < end;) {
    const wordEnd = Math.min(end, (index & ~31) + 32);
    const length = wordEnd - index;
    const mask = length === 32 ? -1 : ((1 << length) - 1) << (index & 31);
    const bits = (words[index >>> 5] ?? 0) & mask;
    // As in `countBits`.
    count += bits === -1 ? 32 : popCount(bits);
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
  const { length } = wanted;
  for (let at = 0; at < length; at += 1) {
    const word = wanted[at] ?? 0;
    if (word === 0) continue;
    // As in `countBits`.
    const bits = word & ~(done[at] ?? 0);
    if (bits === 0) continue;
    count += bits === -1 ? 32 : popCount(bits);
  }
  return count;
}
