import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { setRange } from "../../src/bits.ts";
import { latencyOf, progressOf, reportOf } from "../../src/load/report.ts";
import {
  add,
  C_EAGER_PAGES,
  C_FAULT_PAGES,
  C_FAULTS,
  C_REDUNDANT_PAGES,
  C_REMOVED_PAGES,
  C_RETRIES,
  C_ZERO_PAGES,
  histogramEdgeNs,
  type LoadState,
  recordLatency,
} from "../../src/load/state.ts";
import { makeState, PAGE } from "../helpers/load-states.ts";

let made: ReturnType<typeof makeState>;
let state: LoadState;
beforeEach(() => {
  made = makeState([{ pages: 100 }, { pages: 50, data: [[10, 20]] }]);
  state = made.state;
});
afterEach(() => made[Symbol.dispose]());

function record(...latenciesNs: readonly number[]): void {
  for (const ns of latenciesNs) recordLatency(state.counters(0), ns);
}

describe("report.latencyOf", () => {
  test("has no figures without a fault", () => {
    expect(latencyOf(state)).toEqual({
      p50: null,
      p99: null,
      max: null,
      mean: null,
      histogram: [],
    });
  });

  test("never says more for a quantile than for the maximum", () => {
    record(16_385);
    const { p50, p99, max } = latencyOf(state);
    expect([p50, p99, max]).toEqual([16.385, 16.385, 16.385]);
  });

  test("finds quantiles within a sixteenth of their place", () => {
    record(...Array.from({ length: 1000 }, (_, index) => (index + 1) * 1000));
    const { p50, p99, max, mean } = latencyOf(state);
    expect(Math.abs((p50 ?? 0) - 500) / 500).toBeLessThan(1 / 16);
    expect(Math.abs((p99 ?? 0) - 990) / 990).toBeLessThan(1 / 16);
    expect([max, mean]).toEqual([1000, 500.5]);
  });

  test("counts every fault in exactly one bucket, in ascending order", () => {
    record(1, 255, 256, 257, 271, 272, 1e6, 2 ** 40);
    const { histogram } = latencyOf(state);
    expect(histogram.reduce((sum, { count }) => sum + count, 0)).toBe(8);
    expect(histogram.map(({ fromUs }) => fromUs)).toEqual(
      histogram.map(({ fromUs }) => fromUs).toSorted((a, b) => a - b),
    );
    expect(histogram[0]).toEqual({ fromUs: 0.256, count: 5 });
    expect(histogram[1]).toEqual({ fromUs: 0.272, count: 1 });
  });

  test.each([0, 1, 15, 16, 17, 100, 479])(
    "puts both ends of bucket %d where they belong",
    (bucket) => {
      const edge = Math.ceil(histogramEdgeNs(bucket));
      const last = Math.ceil(histogramEdgeNs(bucket + 1)) - 1;
      record(edge, last);
      expect(latencyOf(state).histogram).toEqual([
        { fromUs: histogramEdgeNs(bucket) / 1000, count: 2 },
      ]);
    },
  );
});

describe("report.progressOf", () => {
  test("counts data that is in, of all blocks, and the faults of all Workers", () => {
    for (const block of state.blocks) setRange(block.done, 0, 15);
    add(state.counters(0), C_FAULTS, 3);
    state.failedPages = 2;
    expect(progressOf(state, 110 * PAGE)).toEqual({
      dataBytes: 110 * PAGE,
      loadedBytes: 20 * PAGE,
      faults: 3,
      failedPages: 2,
    });
  });
});

describe("report.reportOf", () => {
  const input = {
    times: { qemuReadyMs: 1, armedMs: 2, resumedMs: 3, residentMs: 4 },
    mode: "lazy",
    complete: true,
    blocks: [],
  } as const;

  test("adds up the counters of all Workers under the names of the contract", () => {
    for (const [worker, factor] of [
      [0, 1],
      [1, 10],
      [8, 100],
    ] as const) {
      const counters = state.counters(worker);
      add(counters, C_FAULTS, 7 * factor);
      add(counters, C_FAULT_PAGES, 1 * factor);
      add(counters, C_EAGER_PAGES, 2 * factor);
      add(counters, C_ZERO_PAGES, 3 * factor);
      add(counters, C_REDUNDANT_PAGES, 4 * factor);
      add(counters, C_RETRIES, 5 * factor);
      add(counters, C_REMOVED_PAGES, 6 * factor);
    }
    expect(reportOf(state, input)).toMatchObject({
      qemuReadyMs: 1,
      armedMs: 2,
      resumedMs: 3,
      residentMs: 4,
      mode: "lazy",
      complete: true,
      pages: { fault: 111, eager: 222, zero: 333 },
      bytes: { fault: 111 * PAGE, eager: 222 * PAGE, zero: 333 * PAGE },
      faults: 777,
      redundantPages: 444,
      retries: 555,
      removedPages: 666,
    });
  });

  test("has zeros and no latency when there is no load state (mode copy)", () => {
    expect(reportOf(null, { ...input, mode: "copy" })).toMatchObject({
      pages: { fault: 0, eager: 0, zero: 0 },
      faults: 0,
      faultLatencyUs: { p50: null, p99: null, max: null, histogram: [] },
    });
  });
});
