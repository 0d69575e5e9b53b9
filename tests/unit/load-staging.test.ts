import { describe, expect, test } from "bun:test";
import { setRange } from "../../src/bits.ts";
import { alignBlocks, orderChunks, type SnapshotBlock } from "../../src/load/order.ts";
import { planStaging } from "../../src/load/staging.ts";

const PAGE = 4096;
const CHUNK_PAGES = 512;
const CHUNK = CHUNK_PAGES * PAGE;

function blockOf(
  idstr: string,
  pageCount: number,
  pagesOffset: number,
  ...runs: readonly (readonly [number, number])[]
): SnapshotBlock {
  const data = new Int32Array(Math.ceil(pageCount / 32));
  for (const [start, end] of runs) setRange(data, start, end);
  return { idstr, pageSize: PAGE, pageCount, pagesOffset, data };
}

const setOf = (...pages: readonly (readonly [string, number])[]) => {
  return { pages: pages.map(([idstr, pageIndex]) => ({ idstr, pageIndex })) };
};

function planOf(
  blocks: readonly SnapshotBlock[],
  set: ReturnType<typeof setOf> | null,
  chunksMax: number,
) {
  const aligned = alignBlocks(blocks);
  return planStaging(aligned, orderChunks(aligned), set, chunksMax);
}

describe("planStaging", () => {
  test("says of each chunk where its runs of data are, in it and in the file", () => {
    const block = blockOf("ram", 2 * CHUNK_PAGES, 0x100000, [1, 3], [10, 11], [700, 1024]);
    const plan = planOf([block], null, 8);
    expect(plan.idstrs).toEqual(["ram"]);
    const first = [0, 0, 2, PAGE, 2 * PAGE, 0x101000, 10 * PAGE, PAGE, 0x10a000];
    const second = [0, 1, 1, 188 * PAGE, 324 * PAGE, 0x100000 + 700 * PAGE];
    expect([...plan.words]).toEqual([...first, ...second]);
  });

  test("begins with the working set, in its order, each chunk once, and takes no more than it may", () => {
    const pages = 8 * CHUNK_PAGES;
    const blocks = [blockOf("a", pages, 0, [0, pages]), blockOf("b", pages, CHUNK * 8, [0, pages])];
    const set = setOf(["b", 1200], ["a", 5 * CHUNK_PAGES], ["b", 1024], ["none", 0], ["a", pages]);
    const { words } = planOf(blocks, set, 3);
    // One run each: block, chunk, 1, then three words.
    expect(words).toHaveLength(18);
    expect([0, 6, 12].map((at) => [words[at], words[at + 1]])).toEqual([
      [1, 2],
      [0, 5],
      [0, 0],
    ]);
  });

  test("leaves out what cannot come as a whole: no data, too many runs, cut off by the block's end", () => {
    const runs = Array.from({ length: 65 }, (_, n) => [512 + 2 * n, 513 + 2 * n] as const);
    const block = blockOf("ram", 4 * CHUNK_PAGES - 1, 0, ...runs, [1024, 1536], [1536, 2047]);
    const { words } = planOf([block], setOf(["ram", 0]), 8);
    expect([...words]).toEqual([0, 2, 1, 0, CHUNK, 2 * CHUNK]);
  });
});
