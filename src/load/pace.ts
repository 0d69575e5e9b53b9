/** How fast the guest asks for pages: tells one that reads on and on from one that goes on where it was. */

/**
 * So many faults within so many ns are a burst. An idle Linux guest has 16 in 10 ms at most after it is
 * resumed; one that reads pages at random has 24 in 2 ms.
 */
const BURST_FAULTS = 24;
const BURST_NS = 5e6;
/** More faults than a guest needs to go on where it was, however slowly they come (from a disk). */
const FAULTS_MAX = 256;

export class Pace {
  /** When the last faults were read, ns: a ring. */
  readonly #readAtNs = new Float64Array(BURST_FAULTS).fill(Number.NEGATIVE_INFINITY);
  #faults = 0;

  /** @returns true when the guest reads on and on: from this fault, or from the ones before */
  count(readAtNs: number): boolean {
    this.#readAtNs[this.#faults % BURST_FAULTS] = readAtNs;
    this.#faults += 1;
    const oldestNs = this.#readAtNs[this.#faults % BURST_FAULTS] ?? 0;
    return readAtNs - oldestNs < BURST_NS || this.#faults >= FAULTS_MAX;
  }
}
