/** How fast the guest asks for pages: tells one that reads on and on from one that goes on where it was. */

/**
 * So many faults within so many ns are a burst. An idle Linux guest has 16 in 10 ms at most after it is
 * resumed; one that reads pages at random has 24 in 2 ms.
 */
const BURST_FAULTS = 24;
const BURST_NS = 5e6;
/**
 * And so many in chunks that nobody had touched, each of which comes page by page for it. An idle guest has 2 in all,
 * if what it needs first was read ahead, one that reads at random 8 in 0.4 to 3 ms.
 */
const SPREAD_FAULTS = 8;
const SPREAD_NS = 2e6;
/** More faults than a guest needs to go on where it was, however slowly they come (from a disk). */
const FAULTS_MAX = 256;

export class Pace {
  readonly #all = new Recent(BURST_FAULTS);
  readonly #spread = new Recent(SPREAD_FAULTS);
  #faults = 0;
  /** Of the fault that was counted last. */
  #readAtNs = 0;

  /** @returns true when the guest reads on and on: from this fault, or from the ones before */
  count(readAtNs: number): boolean {
    this.#faults += 1;
    this.#readAtNs = readAtNs;
    return this.#all.add(readAtNs) < BURST_NS || this.#faults >= FAULTS_MAX;
  }

  /** The fault that was counted last is one where a whole chunk could come. @returns as `count` */
  countSpread(): boolean {
    return this.#spread.add(this.#readAtNs) < SPREAD_NS;
  }
}

/** When the last faults were read, ns: a ring. */
class Recent {
  readonly #readAtNs: Float64Array;
  #count = 0;

  constructor(length: number) {
    this.#readAtNs = new Float64Array(length).fill(Number.NEGATIVE_INFINITY);
  }

  /** @returns how much later that is than the oldest of them */
  add(readAtNs: number): number {
    const { length } = this.#readAtNs;
    this.#readAtNs[this.#count % length] = readAtNs;
    this.#count += 1;
    return readAtNs - (this.#readAtNs[this.#count % length] ?? 0);
  }
}
