/**
 * Reads that do not come back: of a disk or a server that hangs, of a helper that somebody has stopped.
 * They give no error, and a vCPU that waits for one waits without a word. Looked for once a second.
 */
import * as sys from "../sys/native.ts";
import type { Logger } from "./serving.ts";
import { C_BATCHES, CHUNK_COPYING, CHUNK_MOVING, FAULT_WORKER, type LoadState } from "./state.ts";

/** What takes so long is worth a word, ns. */
const STALL_NS = 5e9;
const LOOK_MS = 1000;

export class StallWatch {
  readonly #state: LoadState;
  readonly #logger: Logger | undefined;
  /** Batches that the fault loop had begun when it was last seen to do something, and when that was. */
  #batches = -1;
  #batchSinceNs = 0;
  /** Null: all is well. */
  #told: string | null = null;
  #timer: ReturnType<typeof setInterval> | undefined;

  constructor(state: LoadState, logger: Logger | undefined) {
    this.#state = state;
    this.#logger = logger;
  }

  start(): void {
    this.#timer ??= setInterval(() => this.look(sys.clockNs()), LOOK_MS);
    this.#timer.unref();
  }

  /** After one more look, if something was told: its end is to be told, too. */
  stop(): void {
    clearInterval(this.#timer);
    if (this.#told !== null) this.look(sys.clockNs());
  }

  /** Says once that somebody waits in vain, and once that it is over. @param nowNs as `clockNs` */
  look(nowNs: number): void {
    const stalled = this.#stalledChunk(nowNs) ?? this.#stalledBatch(nowNs);
    if (stalled !== null && this.#told === null) this.#logger?.warn(stalled);
    if (stalled === null && this.#told !== null) {
      this.#logger?.info("the read that took so long has ended");
    }
    this.#told = stalled;
  }

  /** A chunk that a helper has in hand, and that somebody waits for. */
  #stalledChunk(nowNs: number): string | null {
    for (const state of this.#state.blocks) {
      for (const [chunk, sinceNs] of state.chunkFaultNs.entries()) {
        const word = state.chunks[chunk] ?? 0;
        if (sinceNs === 0 || word < CHUNK_MOVING || word >= CHUNK_COPYING) continue;
        if (nowNs - sinceNs < STALL_NS) continue;
        const [first, end] = [state.chunkStart(chunk), state.chunkEnd(chunk)];
        return (
          `RAMBlock ${state.block.idstr}: a vCPU waits for one of the pages ${first} to ${end - 1}; the helper ` +
          `task that reads them has not answered for ${STALL_NS / 1e9} s: the snapshot's disk hangs, or ` +
          "somebody has stopped the helper"
        );
      }
    }
    return null;
  }

  /** The fault loop, in the middle of what it has read. */
  #stalledBatch(nowNs: number): string | null {
    const batches = this.#state.counters(FAULT_WORKER)[C_BATCHES] ?? 0;
    if (batches !== this.#batches || !this.#state.busy) {
      this.#batches = batches;
      this.#batchSinceNs = nowNs;
      return null;
    }
    if (nowNs - this.#batchSinceNs < STALL_NS) return null;
    return (
      `a vCPU waits for a page whose read has not ended for ${STALL_NS / 1e9} s: the snapshot's disk hangs, ` +
      "or whatever serves its file"
    );
  }
}
