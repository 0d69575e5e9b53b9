import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { ChunkQueue } from "../../src/load/chunk-queue.ts";
import {
  CHUNK_COPYING,
  CHUNK_DONE,
  CHUNK_FREE,
  CHUNK_LENGTH,
  CHUNK_MOVED,
  CHUNK_MOVING,
  CHUNK_SPLIT,
  type LoadState,
} from "../../src/load/state.ts";
import { makeState, PAGE } from "../helpers/load-states.ts";

const PAGES = CHUNK_LENGTH / PAGE;
const CHUNKS = 400;

let made: ReturnType<typeof makeState>;
let state: LoadState;
beforeEach(() => {
  made = makeState([{ pages: CHUNKS * PAGES }]);
  state = made.state;
});
afterEach(() => made[Symbol.dispose]());

function queueOf(...order: readonly number[]): ChunkQueue {
  return new ChunkQueue(state, Uint32Array.from(order));
}

function mark(chunk: number, word: number): void {
  const [block] = state.blocks;
  if (block === undefined) throw new Error("no block");
  block.chunks[chunk] = word;
}

/** All that comes, up to the end. */
function drain(queue: ChunkQueue, isMoving: boolean): number[] {
  const chunks: number[] = [];
  for (;;) {
    const chunk = queue.nextOrdered(isMoving);
    if (chunk === undefined) return chunks;
    chunks.push(chunk);
  }
}

describe("ChunkQueue.nextOrdered", () => {
  test("gives all of the order when nothing is moved", () => {
    mark(5, CHUNK_SPLIT);
    expect(drain(queueOf(7, 5, 9), false)).toEqual([7, 5, 9]);
  });

  test("gives what can be moved first, and then what is left to copy", () => {
    mark(5, CHUNK_SPLIT);
    const queue = queueOf(7, 5, 9);
    expect(queue.nextOrdered(true)).toBe(7);
    mark(7, CHUNK_MOVING + 1);
    expect(queue.nextOrdered(true)).toBe(9);
    mark(9, CHUNK_MOVED);
    expect(queue.nextOrdered(true)).toBe(5);
    expect(queue.nextOrdered(true)).toBeUndefined();
  });

  test.each([
    ["moved", CHUNK_MOVED],
    ["complete", CHUNK_DONE],
    ["being moved", CHUNK_MOVING + 2],
    ["being copied", CHUNK_COPYING + 2],
  ])("never gives a chunk that is %s", (_, word) => {
    mark(5, word);
    expect(drain(queueOf(5), true)).toEqual([]);
  });

  test("gives a chunk once more that could not be moved when it was its turn", () => {
    const queue = queueOf(5, 6);
    expect(queue.nextOrdered(true)).toBe(5);
    mark(5, CHUNK_SPLIT);
    expect(queue.nextOrdered(true)).toBe(6);
    mark(6, CHUNK_MOVED);
    expect(drain(queue, true)).toEqual([5]);
  });
});

describe("ChunkQueue.packetChunks", () => {
  const all = Array.from({ length: CHUNKS }, (_, index) => index);

  test("is small at first, grows with what has come, and shrinks towards the end", () => {
    const queue = queueOf(...all);
    const sizes = all.map(() => {
      queue.nextOrdered(true);
      return queue.packetChunks;
    });
    expect(sizes.slice(0, 64)).toEqual(Array.from({ length: 64 }, () => 4));
    expect(Math.max(...sizes)).toBe(16);
    expect(sizes.slice(-32)).toEqual(Array.from({ length: 32 }, () => 4));
    const top = sizes.indexOf(16);
    expect(sizes.slice(0, top)).toEqual(sizes.slice(0, top).toSorted((a, b) => a - b));
    expect(sizes.slice(top)).toEqual(sizes.slice(top).toSorted((a, b) => b - a));
  });

  test("stays small for a guest that reads on and on, and behind the end of the order", () => {
    const queue = queueOf(...all);
    for (let taken = 0; taken < CHUNKS / 2; taken += 1) queue.nextOrdered(true);
    expect(queue.packetChunks).toBe(12);
    state.setBulk();
    expect(queue.packetChunks).toBe(4);
    for (const chunk of all) mark(chunk, CHUNK_MOVED);
    drain(queue, true);
    expect(queue.packetChunks).toBe(4);
  });
});

describe("ChunkQueue.nextFollowed", () => {
  test("gives the chunk of the last fault and the one behind it", () => {
    const queue = queueOf();
    state.hotChunk = 20;
    expect([queue.nextFollowed(true), queue.nextFollowed(true), queue.nextFollowed(true)]).toEqual([
      20,
      21,
      undefined,
    ]);
  });

  test("gives 32 of a guest that reads on and on, and none of them that it has begun itself", () => {
    const queue = queueOf();
    state.setBulk();
    mark(21, CHUNK_SPLIT);
    state.hotChunk = 20;
    const followed: number[] = [];
    for (;;) {
      const chunk = queue.nextFollowed(true);
      if (chunk === undefined) break;
      followed.push(chunk);
    }
    expect(followed).toEqual(
      Array.from({ length: 32 }, (_, index) => 20 + index).filter((chunk) => chunk !== 21),
    );
    expect(state.blocks[0]?.chunks[20]).toBe(CHUNK_FREE);
  });
});
