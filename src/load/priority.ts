/**
 * Who has the CPU: vCPUs and the fault loop before the eager load. Runs in an eager Worker, for
 * itself and for its helpers in the target.
 *
 * In the first second the helpers take only what nobody else wants: the guest's first steps are
 * what somebody waits for. Then they have a share of a busy host too, or the load would never end. A
 * helper that a vCPU waits for gets the vCPU's own priority (from `FaultLoop`), and is put back here.
 * The Worker itself hardly uses the CPU, and is not to keep a helper waiting.
 */
import * as sys from "../sys/native.ts";

const GENTLE_NICE = 19;
/** How long helpers are so gentle, ms. */
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
    sys.setpriority(sys.gettid(), nice);
    this.putBack();
  }

  /** Looked at often; changes something once. @param isBulk see `LoadState.isBulk` */
  look(isBulk: boolean): void {
    if (this.#gentleUntilMs === 0) return;
    if (!isBulk && performance.now() < this.#gentleUntilMs) return;
    this.#gentleUntilMs = 0;
    this.putBack();
  }

  /** Helpers as they ought to be now: a chunk that was waited for has come. */
  putBack(): void {
    const nice = this.#gentleUntilMs > 0 ? GENTLE_NICE : this.#nice;
    for (const pid of this.#helperPids) sys.setpriority(pid, nice);
  }
}

/** CAP_SYS_NICE, or RLIMIT_NICE: tried with this thread. */
function mayRaise(): boolean {
  const thread = sys.gettid();
  return sys.setpriority(thread, 1) === 0 && sys.setpriority(thread, 0) === 0;
}
