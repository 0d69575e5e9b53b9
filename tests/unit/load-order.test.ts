import { describe, expect, test } from "bun:test";
import { orderChunks } from "../../src/load/order.ts";
import { BASE, type BlockSpec, makeState } from "../helpers/load-states.ts";

const CHUNK_PAGES = 512;

function orderOf(...specs: readonly BlockSpec[]): number[] {
  using made = makeState(specs);
  return [...orderChunks(made.state.blocks)];
}

describe("orderChunks", () => {
  test("names every chunk that has data, once, through all blocks, the last ones early", () => {
    const order = orderOf(
      {
        pages: 4 * CHUNK_PAGES,
        data: [
          [0, 3],
          [1500, 1600],
        ],
      },
      { pages: 10, data: [] },
      { pages: CHUNK_PAGES, data: [[511, 512]] },
    );
    // Four of the first block, one of the second, then the third's.
    expect(order).toEqual([0, 5, 2, 3]);
  });

  test("of much memory the top takes turns with the bottom, then it goes by address", () => {
    const order = orderOf({ pages: 40 * CHUNK_PAGES });
    expect(order.slice(0, 6)).toEqual([0, 39, 1, 38, 2, 37]);
    expect(order.slice(22, 28)).toEqual([11, 28, 12, 13, 14, 15]);
    expect(order.toSorted((a, b) => a - b)).toEqual(Array.from({ length: 40 }, (_, n) => n));
  });

  test("cuts chunks at 2 MiB of the target's addresses", () => {
    expect(orderOf({ pages: CHUNK_PAGES, hostAddr: BASE + 0x1000 })).toHaveLength(2);
  });
});
