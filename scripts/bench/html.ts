/** A result as one self-contained HTML page: goals, plots as inline SVG, and all tables. Pure. */
import { MODES, type Mode, WORKLOADS } from "./plan.ts";
import { type BenchResult, type Cell, type TableBlock, tablesOf } from "./results.ts";
import { type Summary, summarize } from "./statistics.ts";
import { blockTitle, formatNumber, LEGEND, verdict } from "./text.ts";

const WIDTH = 760;
const LABEL_WIDTH = 235;
const VALUE_WIDTH = 150;
const BAR = 18;
const GAP = 6;

/** One bar of a plot. */
interface Bar {
  readonly label: string;
  readonly mode: Mode | "c";
  readonly summary: Summary;
}

export function htmlPage(result: BenchResult): string {
  const { host } = result;
  const about =
    `${result.date.slice(0, 10)}, commit ${result.commit}; ${host.cpu}, ${host.cpus} CPUs, ` +
    `Linux ${host.kernel}, QEMU ${result.qemu} (TCG), Bun ${host.bun}`;
  return [
    "<!doctype html>",
    '<html lang="en"><head><meta charset="utf-8"><title>fsl benchmark</title>',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    `<style>${STYLE}</style></head><body>`,
    `<h1>fsl benchmark${result.quick ? " (quick)" : ""}</h1><p class="about">${escape(about)}</p>`,
    goalsHtml(result),
    `<h2>Plots</h2><p>Medians, ms from the moment at which QEMU can take the state; the thin ` +
      `line goes from minimum to maximum.</p><div class="plots">`,
    ...plots(result.cells),
    ...faultPathPlots(result),
    "</div><h2>All figures</h2>",
    ...LEGEND.map((text) => `<p>${bold(escape(text))}</p>`),
    ...tablesOf(result.cells).map(tableHtml),
    ...(result.notes.length === 0
      ? []
      : [`<h2>Notes</h2><ul>${result.notes.map((n) => `<li>${escape(n)}</li>`).join("")}</ul>`]),
    "</body></html>\n",
  ].join("\n");
}

function goalsHtml({ goals }: BenchResult): string {
  const rows = goals.map((goal) => {
    const word = verdict(goal);
    const kind = goal.met === null ? "open" : goal.met ? "met" : "missed";
    const cells = [goal.name, goal.goal, goal.measured].map((text) => `<td>${escape(text)}</td>`);
    return `<tr>${cells.join("")}<td class="${kind}">${word}</td></tr>`;
  });
  const head = "<tr><th>goal</th><th>wanted</th><th>measured</th><th></th></tr>";
  const table = `<table class="goals">${head}${rows.join("")}</table>`;
  return `<h2>Goals</h2><div class="wide">${table}</div>`;
}

// -- plots ----------------------------------------------------------------------------------------

const PLOTTED: readonly { readonly figure: string; readonly title: string }[] = [
  { figure: "resumeMs", title: "resume" },
  { figure: "firstOutputMs", title: "first output" },
  { figure: "residentMs", title: "all RAM in" },
  { figure: "workMs", title: "done" },
  { figure: "lostMs", title: "time lost to the load" },
  { figure: "cpuMs", title: "CPU time of the load, ms" },
];

function plots(cells: readonly Cell[]): string[] {
  const groups = Map.groupBy(cells, (cell) => `${cell.scenario} ${cell.workload} ${cell.cache}`);
  return [...groups.values()].flatMap((group) => {
    const [first] = group as [Cell];
    return PLOTTED.flatMap(({ figure, title }) => {
      // Of a workload only what it is about: the rest is the same as with an idle guest.
      const isOfWork = figure === "workMs" || figure === "lostMs";
      if (isOfWork !== (first.workload !== "idle")) return [];
      if (figure === "workMs" && first.workload === "busy") return [];
      const bars = group.flatMap(({ mode, rounds }): Bar[] => {
        const summary = summarize(rounds.map((one) => one?.[figure]));
        return summary === null ? [] : [{ label: MODES[mode], mode, summary }];
      });
      if (bars.length < 2) return [];
      const cache = first.cache === "cold" ? ", not in the page cache" : "";
      const what = isOfWork ? `${WORKLOADS[first.workload]}: ${title}` : title;
      return [plot(`${first.scenario}${cache}: ${what}`, bars)];
    });
  });
}

function faultPathPlots({ faultPath }: BenchResult): string[] {
  if (faultPath === null) return [];
  const pair = (label: string, ts: Summary | null, c: Summary | null): Bar[] => [
    ...(ts === null ? [] : [{ label: `${label}, TypeScript`, mode: "fsl" as const, summary: ts }]),
    ...(c === null ? [] : [{ label: `${label}, C`, mode: "c" as const, summary: c }]),
  ];
  const threads = (count: number): string => (count === 1 ? "1 thread" : `${count} threads`);
  const p50 = faultPath.faults.flatMap((row) =>
    pair(threads(row.threads), row.ts.p50Us, row.c.p50Us),
  );
  const p99 = faultPath.faults.flatMap((row) =>
    pair(threads(row.threads), row.ts.p99Us, row.c.p99Us),
  );
  const eager = faultPath.eager.flatMap((row) =>
    pair(`${row.pieceLength / 1024} KiB, ${threads(row.threads)}`, row.ts, row.c),
  );
  return [
    plot("fault latency p50, µs", p50),
    plot("fault latency p99, µs", p99),
    plot("eager throughput, GB/s", eager),
  ];
}

function plot(title: string, bars: readonly Bar[]): string {
  const height = bars.length * (BAR + GAP) + GAP;
  const most = Math.max(...bars.map(({ summary }) => summary.max), 1e-9);
  const span = WIDTH - LABEL_WIDTH - VALUE_WIDTH;
  const x = (value: number): number => LABEL_WIDTH + (Math.max(0, value) / most) * span;
  const shapes = bars.map(({ label, mode, summary }, index) => {
    const y = GAP + index * (BAR + GAP);
    const { median, min, max, count } = summary;
    const middle = y + BAR / 2;
    const spread = count > 1 ? ` (${formatNumber(min)}-${formatNumber(max)})` : "";
    const line =
      count > 1
        ? `<line class="spread" x1="${x(min)}" x2="${x(max)}" y1="${middle}" y2="${middle}"/>`
        : "";
    return (
      `<text class="label" x="${LABEL_WIDTH - 8}" y="${middle}">${escape(label)}</text>` +
      `<rect class="bar ${mode}" x="${LABEL_WIDTH}" y="${y}" height="${BAR}" ` +
      `width="${Math.max(1, x(median) - LABEL_WIDTH)}"/>${line}` +
      `<text class="value" x="${x(Math.max(median, max)) + 8}" y="${middle}">` +
      `<tspan class="median">${formatNumber(median)}</tspan>${escape(spread)}</text>`
    );
  });
  return (
    `<figure><figcaption>${escape(title)}</figcaption>` +
    `<svg viewBox="0 0 ${WIDTH} ${height}" role="img" aria-label="${escape(title)}">` +
    `${shapes.join("")}</svg></figure>`
  );
}

// -- tables ---------------------------------------------------------------------------------------

function tableHtml(block: TableBlock): string {
  const head = ["", ...block.columns.map(({ title }) => title)];
  const rows = block.rows.map(({ mode, figures }) => {
    const cells = figures.map((summary) => {
      if (summary === null) return "<td></td>";
      const { median, min, max, count } = summary;
      const spread =
        count > 1 ? `<br><small>${formatNumber(min)}-${formatNumber(max)}</small>` : "";
      return `<td class="number">${formatNumber(median)}${spread}</td>`;
    });
    return `<tr><th>${escape(MODES[mode])}</th>${cells.join("")}</tr>`;
  });
  return (
    `<h3>${escape(blockTitle(block))}</h3><div class="wide"><table class="figures">` +
    `<tr>${head.map((text) => `<th>${escape(text)}</th>`).join("")}</tr>${rows.join("")}` +
    "</table></div>"
  );
}

function escape(text: string): string {
  return text
    .replaceAll("&", "&amp;")
    .replaceAll("<", "&lt;")
    .replaceAll(">", "&gt;")
    .replaceAll('"', "&quot;");
}

function bold(text: string): string {
  return text.replace(/\*\*([^*]+)\*\*/g, "<b>$1</b>");
}

const STYLE = `
:root { color-scheme: light dark; --text: #1b1f24; --soft: #59636e; --page: #fff; --rule: #d8dee4;
  --fsl: #0b66c3; --fsl-ws: #0a8f6a; --other: #8b949e; --floor: #c2c8ce; --met: #1a7f37;
  --missed: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9aa4ae; --page: #0f1419;
  --rule: #30363d; --fsl: #4c9ff0; --fsl-ws: #34c497; --other: #7d8792; --floor: #4a525b;
  --met: #56d364; --missed: #ff7b72; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 1560px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { margin-bottom: 0; } .about, small, p { color: var(--soft); } h2 { margin-top: 2.2rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr));
  gap: 1.2rem 2rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { font: 13px system-ui, sans-serif; dominant-baseline: central; fill: var(--text); }
svg .label { text-anchor: end; } svg .value { fill: var(--soft); }
svg .median { fill: var(--text); font-weight: 600; }
.bar { fill: var(--other); } .bar.fsl { fill: var(--fsl); } .bar.fsl-ws { fill: var(--fsl-ws); }
.bar.floor { fill: var(--floor); } .spread { stroke: var(--text); stroke-width: 1.5; opacity: .7; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; font-weight: normal; } tr:first-child th { font-weight: 600; }
.figures tr:first-child th:not(:first-child) { text-align: right; }
.number { text-align: right; font-variant-numeric: tabular-nums; } small { white-space: nowrap; }
.goals td:last-child { white-space: nowrap; font-weight: 600; }
.met { color: var(--met); } .missed { color: var(--missed); } .open { color: var(--soft); }
`;
