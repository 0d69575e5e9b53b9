/**
 * Which chunk the eager load brings next: where the guest is now, and what lies behind it; then the
 * order. Everybody who loads eagerly has one; the cursor over the order is shared.
 */
import { CHUNK_FREE, type LoadState } from "./state.ts";

/**
 * How many chunks the eager load follows a fault; and that of a guest that reads much: 64 MiB are
 * read in 20 ms.
 */
const FOLLOWED = 2;
const FOLLOWED_BULK = 32;

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
      if (!isMoving) return order[at];
      if (at >= order.length) return order[at - order.length];
      const chunk = order[at] ?? 0;
      if (this.isUntouched(chunk)) return chunk;
    }
  }

  isUntouched(planChunk: number): boolean {
    const block = this.#state.blockOfChunk(planChunk);
    return block !== undefined && block.chunks[planChunk - block.firstChunk] === CHUNK_FREE;
  }
}
