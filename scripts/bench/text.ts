/** A result for reading: as text for the terminal, and as docs/performance.md. Pure. */
import { eagerLine, faultLine } from "./fault-path.ts";
import { floorsOf } from "./floors.ts";
import { MODES, WORKLOADS } from "./plan.ts";
import { type BenchResult, type Goal, type TableBlock, tablesOf } from "./results.ts";
import type { Summary } from "./statistics.ts";

const CACHE_TITLE = { warm: "page cache warm", cold: "not in the page cache" } as const;

export function formatNumber(value: number): string {
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return value
    .toFixed(digits)
    .replace(/(\.\d*?)0+$/, "$1")
    .replace(/\.$/, "");
}

/** Median, and the spread behind it when there is one. */
function formatSummary(summary: Summary | null): string {
  if (summary === null) return "";
  const { median, min, max, count } = summary;
  const spread = count > 1 ? ` (${formatNumber(min)}-${formatNumber(max)})` : "";
  return `${formatNumber(median)}${spread}`;
}

export function blockTitle({ scenario, workload, cache }: TableBlock): string {
  return `${scenario}, ${WORKLOADS[workload]}, ${CACHE_TITLE[cache]}`;
}

function tableRows(block: TableBlock): string[][] {
  const head = ["", ...block.columns.map(({ title }) => title)];
  const rows = block.rows.map(({ mode, figures, failed }) => [
    `${MODES[mode]}${failed > 0 ? ` [${failed} failed]` : ""}`,
    ...figures.map(formatSummary),
  ]);
  return [head, ...rows];
}

/** Columns padded to the same width, the first to the left and the others to the right. */
function align(rows: readonly (readonly string[])[]): string {
  const widths: number[] = [];
  for (const row of rows) {
    for (const [at, cell] of row.entries()) widths[at] = Math.max(widths[at] ?? 0, cell.length);
  }
  return rows
    .map((row) =>
      row
        .map((cell, at) =>
          at === 0 ? cell.padEnd(widths[at] ?? 0) : cell.padStart(widths[at] ?? 0),
        )
        .join("  ")
        .trimEnd(),
    )
    .join("\n");
}

export function terminalText(result: BenchResult): string {
  const parts = tablesOf(result.cells).map(
    (block) => `${blockTitle(block)}\n${align(tableRows(block))}`,
  );
  if (result.faultPath !== null) {
    const { faults, eager } = result.faultPath;
    parts.push([...faults.map(faultLine), ...eager.map(eagerLine)].join("\n"));
  }
  const goals = result.goals.map((goal) => [
    verdict(goal),
    `${goal.name}: ${goal.measured}; goal ${goal.goal}`,
  ]);
  parts.push(goals.map(([word = "", text]) => `${word.padEnd(VERDICT_WIDTH)}  ${text}`).join("\n"));
  if (result.notes.length > 0) parts.push(result.notes.map((note) => `note: ${note}`).join("\n"));
  return `${parts.join("\n\n")}\n`;
}

const VERDICT_WIDTH = "not all measured".length;

export function verdict({ met }: Goal): string {
  return met === null ? "not all measured" : met ? "met" : "not met";
}

// -- docs/performance.md --------------------------------------------------------------------------

function markdownTable(rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]): string =>
    `| ${cells.map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |`;
  const [head = [], ...rest] = rows;
  return [
    line(head),
    line(head.map((_, at) => (at === 0 ? "---" : "---:"))),
    ...rest.map(line),
  ].join("\n");
}

function goalTable(goals: readonly Goal[]): string {
  const rows = goals.map((goal) => [goal.name, goal.goal, goal.measured, verdict(goal)]);
  const lines = markdownTable([["", "goal", "measured", ""], ...rows]);
  return lines.replaceAll("---:", "---");
}

export const LEGEND = [
  "Medians over the rounds, with minimum and maximum in brackets; times in ms, CPU time in ms, " +
    "memory in MiB.",
  "**resume**, **first output**, **work done**, **all RAM in** and **time lost** count from the " +
    "moment at which QEMU can take the state. **time lost** is what a busy loop of " +
    "two seconds did not get of the CPU, the wait for its start included.",
  "**CPU** is the CPU time of QEMU, fsl and all their threads beyond what QEMU alone needs to " +
    "start, up to the same moment some seconds after the load for every mode of a table.",
  "**faults** with their latency (from reading the event to the page being there) and the sum of " +
    "it (**blocked**) are fsl's own count.",
  "**fsl MiB** is fsl's resident memory at its highest, **own MiB** the part that is not page " +
    "cache anyway. **huge MiB** is guest RAM in huge pages at the end. **ready** is the time " +
    "from the exec(2) of QEMU, or of fsl, to QEMU's monitor having answered.",
];

export function performanceDocument(result: BenchResult): string {
  const { host, faultPath } = result;
  const floors = floorsOf(result);
  const sections = tablesOf(result.cells).map(
    (block) => `### ${blockTitle(block)}\n\n${markdownTable(tableRows(block))}`,
  );
  return `${[
    "# Performance",
    "This file is written by `npm run bench -- --docs`; its figures are of one machine and day.",
    [
      `- Commit ${result.commit}, ${result.date.slice(0, 10)}`,
      `- ${host.cpu}, ${host.cpus} CPUs, ${Math.round(host.memoryMiB / 1024)} GiB; ` +
        `Linux ${host.kernel}; transparent huge pages: ${host.hugePages}`,
      `- QEMU ${result.qemu} (TCG, 1 vCPU), Bun ${host.bun}` +
        (result.upstream === null ? "" : `; upstream's lazy load: QEMU ${result.upstream}`),
    ].join("\n"),
    ...(result.quick ? ["**A quick run: small guests, few rounds; not for comparing.**"] : []),
    "## Goals",
    goalTable(result.goals),
    ...(floors.length === 0
      ? []
      : ["## Floors", FLOORS_INTRODUCTION, floors.map((line) => `- ${line}`).join("\n")]),
    "## How to repeat it",
    HOW_TO.join("\n\n"),
    "## Figures",
    LEGEND.join("\n\n"),
    ...sections,
    ...(faultPath === null ? [] : [faultPathMarkdown(faultPath)]),
    ...(result.notes.length === 0
      ? []
      : ["## Notes", result.notes.map((note) => `- ${note}`).join("\n")]),
  ].join("\n\n")}\n`;
}

const FLOORS_INTRODUCTION =
  "What the same machine gives in the same run without fsl, or without what fsl could do differently: " +
  "how near to a goal one can come.";

const HOW_TO = [
  "```\nnpm run bench -- --json bench.json --docs     # all: about 1.5 hours, 6 GiB of disk\n" +
    "npm run bench -- --quick                      # small guests, less than three minutes\n" +
    "npm run bench -- --only '4 GiB' --only sum    # runs that all of these fit\n```",
  "It needs root (or a usable userfaultfd), QEMU and the test guests (`npm run setup`), memory " +
    "for the largest guest beside its snapshot in the page cache (7 GiB), and a machine that does " +
    "nothing else. Snapshots are made once and kept in `.cache/snapshots`. A page with plots is " +
    "written beside the JSON. `FSL_BENCH_UPSTREAM` names a QEMU that has upstream's fast " +
    "snapshot load, `FSL_QEMU` another QEMU than the one in the path, `FSL_BENCH_FSL` another fsl.",
  "Rounds interleave: each runs every mode once, beginning with another one each time. Before " +
    "each run as much memory as it will use is touched and freed (on a virtual machine the first " +
    "touch of a page that the host has taken back costs more than all that is measured), and the " +
    "snapshot's data is read into the page cache or dropped from it. Ratios are taken pair by " +
    "pair, of runs of the same round, and the median of them is given.",
];

function faultPathMarkdown({ faults, eager }: NonNullable<BenchResult["faultPath"]>): string {
  const faultRows = faults.map((row) => [
    String(row.threads),
    formatSummary(row.ts.p50Us),
    formatSummary(row.c.p50Us),
    formatSummary(row.p50Ratio),
    formatSummary(row.bareP50Ratio),
    formatSummary(row.ts.p99Us),
    formatSummary(row.c.p99Us),
    formatSummary(row.p99Ratio),
    formatSummary(row.bareP99Ratio),
    formatSummary(row.ts.faultsPerSecond),
    formatSummary(row.c.faultsPerSecond),
    formatSummary(row.bare.faultsPerSecond),
  ]);
  const eagerRows = eager.map(({ pieceLength, threads, ts, c, ratio, tidy, tidyRatio }) => [
    `${pieceLength / 1024} KiB`,
    String(threads),
    formatSummary(ts),
    formatSummary(c),
    formatSummary(ratio),
    formatSummary(tidy),
    formatSummary(tidyRatio),
  ]);
  const ofEager = ["TypeScript", "C", "ratio", "C that unmaps", "ratio"];
  const ratios = ["ratio", "ratio to bare C"];
  const ofLatencies = ["p50 µs", "C", ...ratios, "p99 µs", "C", ...ratios];
  const ofFaults = [...ofLatencies, "faults/s", "C", "bare C"];
  return [
    "### The fault path alone",
    "Another process touches pages in random order and measures each touch; TypeScript is the " +
      "loader's own loop in its Worker, C the same loop in a process of its own: each page is read into a " +
      "buffer, marked as done, its latency counted. Bare C copies from the whole file mapped, which its page " +
      "table keeps, and does nothing else.",
    markdownTable([["touching threads", ...ofFaults], ...faultRows]),
    "### The eager load alone",
    "GB/s from a file in the page cache into another process; C is a bare loop around UFFDIO_COPY. " +
      "It keeps the whole file in its page table; the one that unmaps takes each chunk out when it was " +
      "copied, as fsl does: the memory of a loader must not grow with the guest.",
    markdownTable([["copies of", "threads", ...ofEager], ...eagerRows]),
  ].join("\n\n");
}
