/**
 * Which chunk the eager load brings next: where the guest is now, and what lies behind it; then the
 * order. Everybody who loads eagerly has one; the cursor over the order is shared.
 */
import { CHUNK_FREE, CHUNK_SPLIT, type LoadState } from "./state.ts";

/**
 * How many chunks the eager load follows a fault; and that of a guest that reads much: 64 MiB are
 * read in 20 ms.
 */
const FOLLOWED = 2;
const FOLLOWED_BULK = 32;

/**
 * Chunks in one packet to a helper, when the guest takes its first steps and may ask for one of them, and
 * later: a packet costs the fault loop as much CPU time as six chunks do.
 */
export const PACKET_CHUNKS = 4;
const PACKET_CHUNKS_MAX = 16;
/** A packet has such a part of what came before it, and of what is left: helpers end together. */
const PACKET_OF_TAKEN = 16;
const PACKET_OF_LEFT = 8;

export class ChunkQueue {
  readonly #state: LoadState;
  readonly #order: Uint32Array;
  /** The next chunk to look at behind the guest's last fault, and where that ends. */
  #followed = 0;
  #followedEnd = 0;

  /** @param order plan-wide chunk numbers */
  constructor(state: LoadState, order: Uint32Array) {
    this.#state = state;
    this.#order = order;
  }

  /**
   * The next chunk at and behind the guest's last fault. Of a guest that reads on and on, chunks
   * that it has begun are left to its faults, where others can be moved: it will be through soon.
   * @param isMoving chunks that nobody has touched can be moved
   */
  nextFollowed(isMoving: boolean): number | undefined {
    const state = this.#state;
    const hot = state.takeHotChunk();
    if (hot >= 0) {
      this.#followed = hot;
      this.#followedEnd = hot + (state.isBulk ? FOLLOWED_BULK : FOLLOWED);
    }
    const isPicky = isMoving && state.isBulk;
    while (this.#followed < this.#followedEnd) {
      const chunk = this.#followed;
      this.#followed += 1;
      if (!isPicky || this.isUntouched(chunk)) return chunk;
    }
    return undefined;
  }

  /** The next chunk in the order: first those that can be moved, then what is left. */
  nextOrdered(isMoving: boolean): number | undefined {
    const order = this.#order;
    for (;;) {
      const at = this.#state.takeChunk();
      if (!isMoving || at >= 2 * order.length) return order[at];
      const chunk = order[at % order.length] ?? 0;
      const word = this.#wordOf(chunk);
      const isSecondTime = at >= order.length;
      if (word === CHUNK_FREE || (isSecondTime && word === CHUNK_SPLIT)) return chunk;
    }
  }

  /** How many chunks the next packet is to have. Few for a guest that reads on and on: it is followed. */
  get packetChunks(): number {
    if (this.#state.isBulk) return PACKET_CHUNKS;
    const taken = this.#state.chunksTaken;
    const left = this.#order.length - taken;
    const wanted = Math.floor(Math.min(taken / PACKET_OF_TAKEN, left / PACKET_OF_LEFT));
    return Math.max(PACKET_CHUNKS, Math.min(wanted, PACKET_CHUNKS_MAX));
  }

  isUntouched(planChunk: number): boolean {
    return this.#wordOf(planChunk) === CHUNK_FREE;
  }

  #wordOf(planChunk: number): number | undefined {
    const block = this.#state.blockOfChunk(planChunk);
    return block?.chunks[planChunk - block.firstChunk];
  }
}
