/**
 * Who has the CPU: vCPUs and the fault loop before the eager load. Runs in an eager Worker, for
 * itself and for its helpers in the target.
 *
 * In the first second the eager load takes only what nobody else wants: the guest's first steps are
 * what somebody waits for. Then it has a share of a busy host too, or it would never end. A helper
 * that a vCPU waits for gets the vCPU's own priority (from `FaultLoop`), and is put back here.
 */
import * as sys from "../sys/native.ts";

const GENTLE_NICE = 19;
/** How long the eager load is so gentle, ms. */
const GENTLE_MS = 1000;

export class Priority {
  readonly #helperPids: readonly number[];
  readonly #nice: number;
  #gentleUntilMs: number;

  /** @param nice of the Worker and its helpers after the first second; 0..19 */
  constructor(helperPids: readonly number[], nice: number) {
    this.#helperPids = helperPids;
    this.#nice = nice;
    // Whoever may not raise a priority could never take it back.
    this.#gentleUntilMs = mayRaise() ? performance.now() + GENTLE_MS : 0;
    this.#setAll(this.#gentleUntilMs > 0 ? GENTLE_NICE : nice);
  }

  /** Looked at often; changes something once. */
  look(): void {
    if (this.#gentleUntilMs === 0 || performance.now() < this.#gentleUntilMs) return;
    this.#gentleUntilMs = 0;
    this.#setAll(this.#nice);
  }

  /** A chunk that was waited for has come. */
  putBack(): void {
    const nice = this.#gentleUntilMs > 0 ? GENTLE_NICE : this.#nice;
    for (const pid of this.#helperPids) sys.setpriority(pid, nice);
  }

  #setAll(nice: number): void {
    for (const id of [sys.gettid(), ...this.#helperPids]) sys.setpriority(id, nice);
  }
}

/** CAP_SYS_NICE, or RLIMIT_NICE: tried with this thread. */
function mayRaise(): boolean {
  const thread = sys.gettid();
  return sys.setpriority(thread, 1) === 0 && sys.setpriority(thread, 0) === 0;
}
