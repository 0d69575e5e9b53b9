/** How a load is served, as a later fsl finds it in the load state. */
import { describe, expect, test } from "bun:test";
import { recordServing, withRecorded } from "../../src/load/recorded-serving.ts";
import type { ServingOptions } from "../../src/load/serving.ts";

const LOAD: ServingOptions = {
  eager: { workers: 2, bytesPerSecond: 1_000_000, nice: 10, pieceLength: 65_536 },
  clusterPages: 8,
  onError: "kill",
  errorLimitMs: 500,
};

/** Through the load state, which is JSON. */
function recorded(options: ServingOptions): unknown {
  return JSON.parse(JSON.stringify(recordServing(options)));
}

describe("withRecorded", () => {
  test("goes on as the load was begun", () => {
    const logger = { info: () => {}, warn: () => {} };
    expect(withRecorded({ logger }, recorded({ ...LOAD, logger }))).toEqual({ ...LOAD, logger });
    expect(withRecorded({}, recorded({}))).toEqual({ eager: {} });
  });

  test("does what its caller says instead", () => {
    const said: ServingOptions = { eager: { bytesPerSecond: 0 }, onError: "wait" };
    expect(withRecorded(said, recorded(LOAD))).toEqual({
      ...LOAD,
      onError: "wait",
      eager: { ...LOAD.eager, bytesPerSecond: 0 },
    });
  });

  test.each<[unknown]>([
    [null],
    [undefined],
    [7],
    ["kill"],
    [[]],
    [{ eager: null }],
    [{ eager: 7, onError: "run", errorLimitMs: "1", clusterPages: -1 }],
    [{ eager: { workers: 1.5, bytesPerSecond: null, nice: {}, pieceLength: 1e300 } }],
  ])("leaves out what is no such thing: %j", (value) => {
    const said: ServingOptions = { clusterPages: 4 };
    expect(withRecorded(said, value)).toEqual({ clusterPages: 4, eager: {} });
  });
});
