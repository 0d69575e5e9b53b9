/**
 * The figures of a load, from the counters of the Workers. The names of `LoadReport` are a contract
 * (README.md).
 */
import { countMissing } from "../bits.ts";
import {
  C_CHUNK_FAULTS,
  C_EAGER_PAGES,
  C_FAULT_PAGES,
  C_FAULTS,
  C_LATENCY_MAX,
  C_LATENCY_SUM,
  C_MOVED_CHUNKS,
  C_REDUNDANT_PAGES,
  C_REMOVED_PAGES,
  C_RETRIES,
  C_ZERO_PAGES,
  histogramEdgeNs,
  histogramOf,
  type LoadState,
  WORKERS_MAX,
} from "./state.ts";

export interface FaultLatency {
  /** Microseconds from reading a fault to its copy being done; null when there was none. */
  readonly p50: number | null;
  readonly p99: number | null;
  readonly max: number | null;
  readonly mean: number | null;
  /** Buckets with at least one fault: lower edge in microseconds, count. */
  readonly histogram: readonly { readonly fromUs: number; readonly count: number }[];
}

/** Milliseconds since the load was begun; null = has not happened. */
export interface LoadTimes {
  readonly qemuReadyMs: number | null;
  readonly armedMs: number | null;
  readonly resumedMs: number | null;
  readonly residentMs: number | null;
}

export interface PageCounts {
  /** Brought in because of a fault, neighbours included. */
  readonly fault: number;
  readonly eager: number;
  /** Filled with zeros because of a fault. */
  readonly zero: number;
}

export interface LoadProgress {
  /** Data bytes of the lazy blocks, and how many of them are in. */
  readonly dataBytes: number;
  readonly loadedBytes: number;
  readonly faults: number;
  /** Pages that cannot be read at this moment, with a vCPU waiting. */
  readonly failedPages: number;
}

export interface LoadReport extends LoadTimes {
  readonly mode: "lazy" | "copy";
  /** True when all RAM came in; false when the guest ended before. */
  readonly complete: boolean;
  readonly pages: PageCounts;
  readonly bytes: PageCounts;
  readonly faults: number;
  readonly faultLatencyUs: FaultLatency;
  /** Copies that found the page there already, and copies that the kernel put off. */
  readonly redundantPages: number;
  readonly retries: number;
  /** Chunks of 2 MiB that came as huge pages, and faults that waited for one. */
  readonly movedChunks: number;
  readonly chunkFaults: number;
  /** Pages that the guest gave back while loading. */
  readonly removedPages: number;
  /** What each block was: lazy, seed, fill or ignored (with mode copy: copy), with its data bytes. */
  readonly blocks: readonly {
    readonly idstr: string;
    readonly way: string;
    readonly reason: string;
    readonly length: number;
    readonly dataBytes: number;
  }[];
}

/** Sum of one counter over all Workers. */
function total(state: LoadState, counter: number): number {
  let sum = 0;
  for (let worker = 0; worker < WORKERS_MAX; worker += 1) {
    sum += state.counters(worker)[counter] ?? 0;
  }
  return sum;
}

export function progressOf(state: LoadState, dataBytes: number): LoadProgress {
  let missingBytes = 0;
  for (const block of state.blocks) {
    missingBytes += countMissing(block.data, block.done) * block.block.pageSize;
  }
  return {
    dataBytes,
    loadedBytes: dataBytes - missingBytes,
    faults: total(state, C_FAULTS),
    failedPages: state.failedPages,
  };
}

export function latencyOf(state: LoadState): FaultLatency {
  // A fault that waited for a whole chunk is counted by the eager Worker that brought it.
  const workers = Array.from({ length: WORKERS_MAX }, (_, index) => state.counters(index));
  const buckets = new Float64Array(histogramOf(state.counters(0)).length);
  let count = 0;
  for (const counters of workers) {
    if (counters[C_LATENCY_MAX] === 0) continue;
    const own = histogramOf(counters);
    for (let index = 0; index < own.length; index += 1) {
      const bucket = own[index] ?? 0;
      buckets[index] = (buckets[index] ?? 0) + bucket;
      count += bucket;
    }
  }
  if (count === 0) return { p50: null, p99: null, max: null, mean: null, histogram: [] };
  const histogram: { fromUs: number; count: number }[] = [];
  for (const [index, bucket] of buckets.entries()) {
    if (bucket > 0) histogram.push({ fromUs: histogramEdgeNs(index) / 1000, count: bucket });
  }
  const max = Math.max(...workers.map((counters) => counters[C_LATENCY_MAX] ?? 0)) / 1000;
  return {
    // The middle of a bucket may lie above the longest time in it.
    p50: Math.min(quantileUs(buckets, count, 0.5), max),
    p99: Math.min(quantileUs(buckets, count, 0.99), max),
    max,
    mean: total(state, C_LATENCY_SUM) / count / 1000,
    histogram,
  };
}

/** Middle of the bucket in which the quantile lies, microseconds. */
function quantileUs(buckets: Float64Array, count: number, quantile: number): number {
  let seen = 0;
  for (const [index, bucket] of buckets.entries()) {
    seen += bucket;
    if (seen >= count * quantile)
      return (histogramEdgeNs(index) + histogramEdgeNs(index + 1)) / 2000;
  }
  return histogramEdgeNs(buckets.length) / 1000;
}

export interface ReportInput {
  readonly times: LoadTimes;
  readonly mode: "lazy" | "copy";
  readonly complete: boolean;
  readonly blocks: LoadReport["blocks"];
}

export function reportOf(state: LoadState | null, input: ReportInput): LoadReport {
  const sum = (counter: number): number => (state === null ? 0 : total(state, counter));
  const pages: PageCounts = {
    fault: sum(C_FAULT_PAGES),
    eager: sum(C_EAGER_PAGES),
    zero: sum(C_ZERO_PAGES),
  };
  const pageSize = state?.blocks[0]?.block.pageSize ?? 4096;
  return {
    ...input.times,
    mode: input.mode,
    complete: input.complete,
    pages,
    bytes: {
      fault: pages.fault * pageSize,
      eager: pages.eager * pageSize,
      zero: pages.zero * pageSize,
    },
    faults: sum(C_FAULTS),
    faultLatencyUs:
      state === null
        ? { p50: null, p99: null, max: null, mean: null, histogram: [] }
        : latencyOf(state),
    redundantPages: sum(C_REDUNDANT_PAGES),
    retries: sum(C_RETRIES),
    movedChunks: sum(C_MOVED_CHUNKS),
    chunkFaults: sum(C_CHUNK_FAULTS),
    removedPages: sum(C_REMOVED_PAGES),
    blocks: input.blocks,
  };
}
