import { describe, expect, test } from "bun:test";
import { alignBlocks, areAligned, orderChunks } from "../../src/load/order.ts";
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
    // Four of the first block, one of the second, then the third's. All of them have holes but chunk 2.
    expect(order).toEqual([0, 5, 2, 3]);
  });

  test("of much memory the top takes turns with the bottom, then it goes by address", () => {
    const order = orderOf({ pages: 40 * CHUNK_PAGES });
    expect(order.slice(0, 12)).toEqual([0, 39, 1, 38, 2, 37, 3, 36, 4, 5, 6, 7]);
    expect(order.toSorted((a, b) => a - b)).toEqual(Array.from({ length: 40 }, (_, n) => n));
  });

  test("two chunks with holes take turns with a full one, wherever they lie", () => {
    // The hole is the first page, one in the middle, the last page.
    const order = orderOf({
      pages: 12 * CHUNK_PAGES,
      data: [
        [0, 6 * CHUNK_PAGES],
        [6 * CHUNK_PAGES + 1, 8 * CHUNK_PAGES + 100],
        [8 * CHUNK_PAGES + 101, 11 * CHUNK_PAGES - 1],
        [11 * CHUNK_PAGES, 12 * CHUNK_PAGES],
      ],
    });
    // With holes: 6, 8, 10; from both ends 6, 10, 8.
    expect(order).toEqual([6, 10, 0, 8, 1, 2, 3, 4, 5, 7, 9, 11]);
  });

  test("beyond the first 128 it goes by address, holes or not", () => {
    const order = orderOf({
      pages: 400 * CHUNK_PAGES,
      data: Array.from({ length: 200 }, (_, two): [number, number] => [
        2 * two * CHUNK_PAGES,
        (2 * two + 2) * CHUNK_PAGES - 7,
      ]),
    });
    // 86 of the 200 with holes, which are the odd ones; 42 of the full ones.
    expect(order.slice(122, 128)).toEqual([80, 157, 159, 82, 161, 163]);
    expect(order.slice(128)).toEqual(order.slice(128).toSorted((a, b) => a - b));
    expect(order.toSorted((a, b) => a - b)).toEqual(Array.from({ length: 400 }, (_, n) => n));
  });

  test("cuts chunks at 2 MiB of the target's addresses", () => {
    expect(orderOf({ pages: CHUNK_PAGES, hostAddr: BASE + 0x1000 })).toHaveLength(2);
  });
});

describe("areAligned", () => {
  const specs = [
    { pages: 3 * CHUNK_PAGES, data: [[600, 700]] },
    { pages: CHUNK_PAGES + 5, hostAddr: BASE + 0x4000_0000 },
  ] satisfies BlockSpec[];
  const alignedOf = (made: ReturnType<typeof makeState>) =>
    alignBlocks(
      made.state.blocks.map(({ block: { idstr, pageSize, pagesOffset }, pageCount, data }) => {
        return { idstr, pageSize, pageCount, pagesOffset, data };
      }),
    );

  test("is true of a target that aligns its blocks: chunks have the same numbers and order", () => {
    using made = makeState(specs);
    const aligned = alignedOf(made);
    expect(areAligned(made.state.blocks, aligned)).toBe(true);
    expect([...orderChunks(aligned)]).toEqual([...orderChunks(made.state.blocks)]);
    for (const [index, block] of made.state.blocks.entries()) {
      expect(aligned[index]?.firstChunk).toBe(block.firstChunk);
    }
  });

  test("is false of one that does not, and of other blocks", () => {
    using made = makeState(specs);
    const aligned = alignedOf(made);
    using shifted = makeState([{ ...specs[0], hostAddr: BASE + 0x1000 }, specs[1]] as BlockSpec[]);
    using longer = makeState([{ pages: 4 * CHUNK_PAGES }, specs[1]] as BlockSpec[]);
    for (const { state } of [shifted, longer]) {
      expect(areAligned(state.blocks, aligned)).toBe(false);
    }
    expect(areAligned(made.state.blocks.slice(1), aligned)).toBe(false);
    expect(areAligned(made.state.blocks.toReversed(), aligned)).toBe(false);
  });
});
