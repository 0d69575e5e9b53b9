/** What a benchmark run leaves behind (the JSON), and the goals of it. Pure. */
import { STAGED_CHUNKS } from "../../src/load/staging.ts";
import { CHUNK_LENGTH } from "../../src/load/state.ts";
import { MiB } from "../../src/pages.ts";
import type { FaultPathResult } from "./fault-path.ts";
import type { HostDescription } from "./host.ts";
import { type Cache, type Mode, SCENARIOS, type Workload } from "./plan.ts";
import type { Figures } from "./run.ts";
import type { StartResult } from "./start.ts";
import { ratios, type Summary, summarize } from "./statistics.ts";

/** One mode of a block; rounds line up with those of the block's other modes. */
export interface Cell {
  readonly scenario: string;
  readonly workload: Workload;
  readonly cache: Cache;
  readonly mode: Mode;
  /** null: the run failed. */
  readonly rounds: readonly (Figures | null)[];
}

export interface Goal {
  /** The row of issue 4. */
  readonly name: string;
  readonly goal: string;
  /** For reading; "not measured" when nothing of it was. */
  readonly measured: string;
  /** null: not all of it was measured. */
  readonly met: boolean | null;
  /** What `measured` says, as numbers. */
  readonly values: Readonly<Record<string, number>>;
}

export interface BenchResult {
  readonly schema: 1;
  readonly date: string;
  /** The commit that was measured, with "+" when files differed from it. */
  readonly commit: string;
  readonly command: string;
  readonly quick: boolean;
  readonly host: HostDescription;
  readonly qemu: string;
  readonly upstream: string | null;
  readonly goals: readonly Goal[];
  readonly cells: readonly Cell[];
  readonly faultPath: FaultPathResult | null;
  /** null: not measured. */
  readonly start: StartResult | null;
  /** What could not be run, and what went wrong. */
  readonly notes: readonly string[];
}

/** Cells by what they are; figures of one of them as an array over the rounds. */
export class Cells {
  readonly all: readonly Cell[];

  constructor(cells: readonly Cell[]) {
    this.all = cells;
  }

  values(
    scenario: string,
    workload: Workload,
    mode: Mode,
    figure: string,
    cache: Cache = "warm",
  ): (number | undefined)[] {
    const cell = this.all.find(
      (one) =>
        one.scenario === scenario &&
        one.workload === workload &&
        one.mode === mode &&
        one.cache === cache,
    );
    return cell?.rounds.map((round) => round?.[figure]) ?? [];
  }

  median(scenario: string, workload: Workload, mode: Mode, figure: string): number | null {
    return summarize(this.values(scenario, workload, mode, figure))?.median ?? null;
  }

  /** Ratio of two modes, pair by pair: the median. */
  ratio(
    scenario: string,
    workload: Workload,
    figure: string,
    mode: Mode,
    base: Mode,
  ): number | null {
    const values = this.values(scenario, workload, mode, figure);
    return ratios(values, this.values(scenario, workload, base, figure))?.median ?? null;
  }

  /** All values of a figure in runs of a mode, whatever the scenario. */
  everywhere(mode: Mode, figure: string): number[] {
    return this.all
      .filter((cell) => cell.mode === mode)
      .flatMap((cell) => cell.rounds.map((round) => round?.[figure]))
      .filter((value): value is number => value !== undefined);
  }
}

/**
 * CPU time that a load costs beyond starting QEMU: the total less what QEMU alone needs until it
 * can take the state. fsl's own start counts in full. Idle runs only: they all end at the same
 * time.
 */
export function withLoadCpu(cells: readonly Cell[]): Cell[] {
  return cells.map((cell) => {
    if (cell.workload !== "idle") return cell;
    const ofScenario = cells.filter(
      ({ scenario, cache, mode }) =>
        scenario === cell.scenario && cache === cell.cache && mode === "ordinary",
    );
    const starts = ofScenario.flatMap(({ rounds }) => rounds.map((one) => one?.startCpuMs));
    const start = summarize(starts)?.median;
    if (start === undefined) return cell;
    const rounds = cell.rounds.map((one) => {
      if (one?.totalCpuMs === undefined) return one;
      const own = one.startCpuMs ?? start;
      return { ...one, cpuMs: one.totalCpuMs - own };
    });
    return { ...cell, rounds };
  });
}

// -- the goals ------------------------------------------------------------------------------------

const { small, medium, large, zero, sparse } = SCENARIOS;
/** Guests that the goals speak of. */
export const GUESTS = [small.name, medium.name, large.name, zero.name];

/** One number that a goal asks for, and its limit. */
interface Demand {
  readonly label: string;
  readonly value: number | null;
  readonly limit: number;
  readonly atLeast?: boolean;
  readonly unit?: string;
}

function goal(name: string, wanted: string, demands: readonly Demand[]): Goal {
  const known = demands.filter(
    (demand): demand is Demand & { value: number } =>
      demand.value !== null && Number.isFinite(demand.value),
  );
  const isMet = ({ value, limit, atLeast }: Demand & { value: number }): boolean =>
    atLeast === true ? value >= limit : value <= limit;
  const said = known.map(
    ({ label, value, unit }) => `${round(value)}${unit ?? ""}${label === "" ? "" : ` (${label})`}`,
  );
  const isComplete = known.length === demands.length && demands.length > 0;
  return {
    name,
    goal: wanted,
    measured: said.join(", ") || "not measured",
    met: known.some((demand) => !isMet(demand)) ? false : isComplete ? true : null,
    values: Object.fromEntries(known.map(({ label, value }) => [label || "value", value])),
  };
}

function round(value: number): string {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** Each row of the table of issue 4. */
export function goalsOf(cells: Cells, faultPath: FaultPathResult | null): Goal[] {
  const worst = (values: readonly (number | null | undefined)[]): number | null => {
    const known = values.filter((value): value is number => value !== null && value !== undefined);
    return known.length === 0 ? null : Math.max(...known);
  };
  const each = (
    limit: number,
    value: (scenario: string) => number | null,
    options: Partial<Demand> = {},
    scenarios: readonly string[] = GUESTS,
  ): Demand[] => scenarios.map((label) => ({ label, value: value(label), limit, ...options }));
  const firstOutput = (mode: Mode, limit: number, label: string): Demand => ({
    label,
    limit,
    value: worst(
      GUESTS.map((scenario) => cells.ratio(scenario, "idle", "firstOutputMs", mode, "floor")),
    ),
  });
  const peak = worst(
    ["fsl", "fsl-ws"].flatMap((mode) => cells.everywhere(mode as Mode, "fslPeakMiB")),
  );
  const own = worst(
    ["fsl", "fsl-ws"].flatMap((mode) => cells.everywhere(mode as Mode, "fslOwnMiB")),
  );
  const isSparseThere = cells.values(sparse.name, "idle", "fsl", "fslPeakMiB").length > 0;
  const eager = (faultPath?.eager ?? []).filter(({ pieceLength }) => pieceLength >= 256 * 1024);
  const eagerRatios = eager.map(({ ratio }) => ratio?.median ?? null);
  const faults = faultPath?.faults ?? [];
  return [
    goal("resume after QEMU can take the state", "≤ 10 ms, the same at 512 MiB and 8 GiB", [
      ...each(10, (scenario) => cells.median(scenario, "idle", "fsl", "resumeMs"), { unit: " ms" }),
    ]),
    goal(
      "first output ÷ the same with RAM already there",
      "≤ 1.05 with a working set, ≤ 1.2 without",
      [firstOutput("fsl-ws", 1.05, "with a working set"), firstOutput("fsl", 1.2, "without")],
    ),
    goal("all RAM in ÷ ordinary load", "≤ 1.0 at 4 GiB/3 GiB; mostly-zero guest ≤ 0.5", [
      ...each(1, (name) => cells.ratio(name, "idle", "residentMs", "fsl", "ordinary"), {}, [
        large.name,
      ]),
      ...each(0.5, (name) => cells.ratio(name, "idle", "residentMs", "fsl", "ordinary"), {}, [
        zero.name,
      ]),
    ]),
    goal(
      "checksum of all data done ÷ ordinary load",
      "≤ 0.8",
      each(
        0.8,
        (scenario) => cells.ratio(scenario, "sum", "workMs", "fsl", "ordinary"),
        {},
        measured(cells, "sum"),
      ),
    ),
    goal(
      "20,000 random pages done ÷ ordinary load",
      "≤ 0.9",
      each(
        0.9,
        (scenario) => cells.ratio(scenario, "random", "workMs", "fsl", "ordinary"),
        {},
        measured(cells, "random"),
      ),
    ),
    goal(
      "CPU seconds ÷ ordinary load",
      "≤ 1.5",
      each(1.5, (scenario) => cells.ratio(scenario, "idle", "cpuMs", "fsl", "ordinary")),
    ),
    goal(
      "faults of an idle guest with a working set ÷ without",
      "≤ 0.05",
      each(0.05, (scenario) => cells.ratio(scenario, "idle", "faults", "fsl-ws", "fsl")),
    ),
    goal("fault latency, TypeScript ÷ C, p50 and p99", "≤ 1.05 and ≤ 1.2", [
      {
        label: "p50, the worst of 1 to 4 threads",
        value: worst(faults.map(({ p50Ratio }) => p50Ratio?.median)),
        limit: 1.05,
      },
      {
        label: "p99, the worst of 1 to 4 threads",
        value: worst(faults.map(({ p99Ratio }) => p99Ratio?.median)),
        limit: 1.2,
      },
    ]),
    goal("eager throughput ÷ raw UFFDIO_COPY limit, same threads", "≥ 0.9", [
      ...eager.map(({ pieceLength, threads }, index) => ({
        label: `${pieceLength / 1024} KiB, ${threads} thread${threads > 1 ? "s" : ""}`,
        value: eagerRatios[index] ?? null,
        limit: 0.9,
        atLeast: true,
      })),
      {
        label: `moved by 2 helpers beside a guest, as ${large.name} is loaded`,
        value: movedRatio(cells, faultPath),
        limit: 0.9,
        atLeast: true,
      },
    ]),
    goal(
      "start of `fsl` to QEMU being ready ÷ QEMU alone",
      "≤ 1.1",
      each(1.1, (scenario) => cells.ratio(scenario, "idle", "readyMs", "fsl", "ordinary")),
    ),
    goal("fsl's peak memory", "≤ 64 MB, 64 GiB guests included", [
      { label: "all of it, at its highest", value: mb(peak), limit: 64, unit: " MB" },
      {
        label: "its own, without mapped files",
        value: mb(own),
        limit: 64,
        unit: " MB",
      },
      ...(isSparseThere ? [] : [{ label: sparse.name, value: null, limit: 64 }]),
    ]),
    goal(
      "guest RAM in huge pages a few seconds after the load, where it was before",
      "≥ 0.9",
      each(0.9, (scenario) => cells.ratio(scenario, "idle", "hugeMiB", "fsl", "ordinary"), {
        atLeast: true,
      }),
    ),
  ];
}

/**
 * What came of a large guest's RAM after QEMU could take its state, by time, ÷ what two threads in C
 * copy. What was read ahead before that is not counted.
 */
function movedRatio(cells: Cells, faultPath: FaultPathResult | null): number | null {
  const limit = faultPath?.eager.findLast(({ threads }) => threads === 2)?.c?.median;
  const mib = cells.median(large.name, "idle", "fsl", "anonymousMiB");
  const ms = cells.median(large.name, "idle", "fsl", "residentMs");
  if (limit === undefined || mib === null || ms === null) return null;
  const bytes = mib * MiB - STAGED_CHUNKS * CHUNK_LENGTH;
  return bytes / (ms * 1e6) / limit;
}

/** Scenarios that the plan has with a workload: in a short run not all of them. */
function measured(cells: Cells, workload: Workload): string[] {
  const found = cells.all.filter((cell) => cell.workload === workload && cell.cache === "warm");
  const names = new Set(found.map(({ scenario }) => scenario));
  return workload === "sum" || workload === "random"
    ? [medium.name, large.name, zero.name, ...names].filter(
        (name, at, all) => all.indexOf(name) === at,
      )
    : [...names];
}

function mb(mib: number | null): number | null {
  return mib === null ? null : mib * 1.048576;
}

// -- rows for tables and plots --------------------------------------------------------------------

/** Figures that tables show, in their order. */
export const COLUMNS = [
  ["resumeMs", "resume"],
  ["firstOutputMs", "first output"],
  ["workMs", "work done"],
  ["residentMs", "all RAM in"],
  ["lostMs", "time lost"],
  ["cpuMs", "CPU"],
  ["faults", "faults"],
  ["faultP50Us", "p50 µs"],
  ["faultP99Us", "p99 µs"],
  ["faultMaxUs", "max µs"],
  ["blockedMs", "blocked"],
  ["qemuPeakMiB", "QEMU MiB"],
  ["fslPeakMiB", "fsl MiB"],
  ["fslOwnMiB", "own MiB"],
  ["hugeMiB", "huge MiB"],
  ["readyMs", "ready"],
] as const;

export interface TableBlock {
  readonly scenario: string;
  readonly workload: Workload;
  readonly cache: Cache;
  readonly columns: readonly { readonly figure: string; readonly title: string }[];
  readonly rows: readonly {
    readonly mode: Mode;
    readonly figures: readonly (Summary | null)[];
    /** Rounds that failed. */
    readonly failed: number;
  }[];
}

/** A table for each scenario, workload and state of the page cache; empty columns left out. */
export function tablesOf(cells: readonly Cell[]): TableBlock[] {
  const groups = Map.groupBy(cells, (cell) => `${cell.scenario} ${cell.workload} ${cell.cache}`);
  return [...groups.values()].map((group) => {
    const [first] = group as [Cell];
    const columns = COLUMNS.map(([figure, title]) => ({ figure, title })).filter(({ figure }) =>
      group.some(({ rounds }) => rounds.some((one) => one?.[figure] !== undefined)),
    );
    const { scenario, workload, cache } = first;
    const rows = group.map(({ mode, rounds }) => ({
      mode,
      figures: columns.map(({ figure }) => summarize(rounds.map((one) => one?.[figure]))),
      failed: rounds.filter((one) => one === null).length,
    }));
    return { scenario, workload, cache, columns, rows };
  });
}
