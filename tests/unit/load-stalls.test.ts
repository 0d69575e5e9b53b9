/** Reads that do not come back are told once, and so is their end. */
import { describe, expect, test } from "bun:test";
import { StallWatch } from "../../src/load/stalls.ts";
import { add, C_BATCHES, CHUNK_MOVED, CHUNK_MOVING, FAULT_WORKER } from "../../src/load/state.ts";
import { makeState } from "../helpers/load-states.ts";

const SECOND = 1e9;
const START = 1000 * SECOND;

function start() {
  const made = makeState([{ pages: 8 * 512, movable: true }]);
  const told: string[] = [];
  const tell = (message: string): void => void told.push(message);
  const watch = new StallWatch(made.state, { info: tell, warn: tell });
  const [block] = made.state.blocks;
  if (block === undefined) throw new Error("no block");
  return { made, state: made.state, block, told, watch };
}

describe("StallWatch", () => {
  test("a chunk that somebody has waited for too long is told with its pages, once", () => {
    const { made, block, told, watch } = start();
    using _ = made;
    block.chunks[3] = CHUNK_MOVING + 2;
    block.chunkFaultNs[3] = START;
    watch.look(START + 4.9 * SECOND);
    expect(told).toEqual([]);
    watch.look(START + 5 * SECOND);
    watch.look(START + 60 * SECOND);
    expect(told).toEqual([
      expect.stringMatching(/^RAMBlock block0: .* pages 1536 to 2047; .* not answered for 5 s/),
    ]);
    block.chunks[3] = CHUNK_MOVED;
    watch.look(START + 61 * SECOND);
    watch.look(START + 62 * SECOND);
    expect(told.slice(1)).toEqual(["the read that took so long has ended"]);
  });

  test("a chunk that nobody waits for, or that has come, is nothing to tell", () => {
    const { made, block, told, watch } = start();
    using _ = made;
    block.chunks[1] = CHUNK_MOVING + 1;
    block.chunks[2] = CHUNK_MOVED;
    block.chunkFaultNs[2] = START;
    watch.look(START + 60 * SECOND);
    expect(told).toEqual([]);
  });

  test("a fault loop that stays in one batch is told; one that goes on is not", () => {
    const { made, state, told, watch } = start();
    using _ = made;
    state.busy = true;
    for (let second = 0; second < 20; second += 1) {
      add(state.counters(FAULT_WORKER), C_BATCHES, 1);
      watch.look(START + second * SECOND);
    }
    expect(told).toEqual([]);
    watch.look(START + 23 * SECOND);
    expect(told).toEqual([]);
    watch.look(START + 24 * SECOND);
    expect(told).toEqual([expect.stringContaining("read has not ended for 5 s")]);
    state.busy = false;
    watch.look(START + 25 * SECOND);
    expect(told.slice(1)).toEqual(["the read that took so long has ended"]);
    // Nothing to do, for however long.
    watch.look(START + 90 * SECOND);
    expect(told).toHaveLength(2);
  });
});
