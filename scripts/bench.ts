/**
 * `npm run bench`: how fast a snapshot is loaded, by QEMU itself, by fsl, by the kernel, and beside
 * RAM that is there already; a real Linux guest on TCG. It only reports: no figure makes it fail,
 * wrong data in the guest does.
 *
 *   bun scripts/bench.ts [--quick] [--rounds N] [--only WORD]… [--json FILE] [--docs]
 *
 *   --quick        a small guest and few rounds, less than three minutes
 *   --rounds N     rounds of each block; default 7, with --quick 2
 *   --only WORD    only runs of that scenario ('4 GiB'), workload (idle, sum, random, busy), page
 *                  cache (warm, cold) or mode (scripts/bench/plan.ts), or fault-path; more than one
 *                  narrow it down
 *   --json FILE    all figures; a page with plots is written beside it (FILE with .html)
 *   --docs         writes docs/performance.md
 *   --render FILE  runs nothing: makes table, page and, with --docs, the document from a JSON
 *
 * The second benchmark, of the fault path alone, is scripts/bench/fault-path.ts; it runs last.
 */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import {
  type GuestSnapshot,
  killAllQemus,
  qemuVersion,
  snapshotOf,
  whyNoGuests,
} from "../tests/helpers/guests.ts";
import { type FaultPathResult, faultPathOptions, measureFaultPath } from "./bench/fault-path.ts";
import { describeHost, dropFile, touchMemory, warmFile } from "./bench/host.ts";
import { htmlPage } from "./bench/html.ts";
import { type Block, type Mode, planBlocks } from "./bench/plan.ts";
import { type BenchResult, type Cell, Cells, goalsOf, withLoadCpu } from "./bench/results.ts";
import { FSL, type Figures, hasWorkingSets, measureRun, UPSTREAM } from "./bench/run.ts";
import { measureStart, type StartResult } from "./bench/start.ts";
import { performanceDocument, terminalText } from "./bench/text.ts";
import { ROOT } from "./build-shim.ts";

const MIB = 1024 * 1024;
const ROUNDS = 7;
const QUICK_ROUNDS = 2;
/** Beside the guest's RAM: QEMU's own, fsl's, and what a load needs twice for a while. */
const EXTRA_MIB = 512;

interface Options {
  readonly quick: boolean;
  readonly rounds: number;
  readonly only: readonly string[];
}

const log = (line: string): void => {
  process.stderr.write(`${line}\n`);
};

async function measureAll(options: Options): Promise<BenchResult> {
  const reason = whyNoGuests();
  if (reason !== null) throw new Error(reason);
  const notes: string[] = [];
  const host = describeHost();
  if (host.load > 0.5) notes.push(`load average ${host.load} at the start: figures are noisy`);
  const { without, reasons } = missingModes();
  notes.push(...reasons);
  const directory = mkdtempSync(join(tmpdir(), "fsl-bench-sets-"));
  const removeDirectory = (): void => rmSync(directory, { recursive: true, force: true });
  process.once("exit", removeDirectory); // Also when it is interrupted.
  const cells: Cell[] = [];
  try {
    let previous: GuestSnapshot | null = null;
    for (const block of planBlocks({ ...options, without })) {
      const snapshot: GuestSnapshot = await snapshotOf(block.scenario.spec);
      // What is not in use leaves the page cache: the next guest needs the memory.
      if (previous !== null && previous.path !== snapshot.path) await dropFile(previous.path);
      previous = snapshot;
      cells.push(...(await measureBlock(block, snapshot, directory, notes)));
    }
    if (previous !== null) await dropFile(previous.path);
  } finally {
    removeDirectory();
  }
  const faultPath = await measureFaults(options);
  const start = await measureStarts(options);
  if (cells.length === 0 && faultPath === null && start === null) {
    throw new Error(`--only ${options.only.join(" --only ")}: no run fits all of these`);
  }
  const measured = withLoadCpu(cells);
  return {
    schema: 1,
    date: new Date().toISOString(),
    commit: commitName(),
    command: ["npm run bench --", ...process.argv.slice(2)].join(" "),
    quick: options.quick,
    host,
    qemu: await qemuVersion(),
    upstream: UPSTREAM === undefined ? null : versionOf(UPSTREAM),
    goals: goalsOf(new Cells(measured), faultPath),
    cells: measured,
    faultPath,
    start,
    notes,
  };
}

function missingModes(): { without: Mode[]; reasons: string[] } {
  const without: Mode[] = [];
  const reasons: string[] = [];
  if (!hasWorkingSets()) {
    without.push("fsl-ws");
    reasons.push("this fsl has no --working-set: that mode was left out");
  }
  if (UPSTREAM === undefined) {
    without.push("upstream");
    reasons.push("FSL_BENCH_UPSTREAM is not set: upstream's lazy load was left out");
  }
  return { without, reasons };
}

async function measureFaults({ quick, rounds, only }: Options): Promise<FaultPathResult | null> {
  if (!only.every((word) => "fault-path".includes(word.toLowerCase()))) return null;
  return measureFaultPath(faultPathOptions(quick, rounds, log));
}

async function measureStarts({ rounds, only }: Options): Promise<StartResult | null> {
  if (!only.every((word) => "start".includes(word.toLowerCase()))) return null;
  return measureStart(FSL, rounds, log);
}

// -- one block ------------------------------------------------------------------------------------

async function measureBlock(
  block: Block,
  snapshot: GuestSnapshot,
  directory: string,
  notes: string[],
): Promise<Cell[]> {
  const { scenario, workload, cache, modes } = block;
  const name = `${scenario.name}, ${workload}, ${cache}`;
  const measured = new Map<Mode, (Figures | null)[]>(modes.map((mode) => [mode, []]));
  const set = join(directory, `${snapshot.memoryMiB}-${workload}-${cache}.fslws`);
  const run = async (mode: Mode, recordTo?: string): Promise<Figures | null> => {
    try {
      await prepareHost(snapshot, cache);
      return await measureRun({
        mode,
        workload,
        snapshot,
        windowMs: scenario.windowMs,
        ...(mode === "fsl-ws" && recordTo === undefined ? { workingSet: set } : {}),
        ...(recordTo === undefined ? {} : { recordTo }),
      });
    } catch (error) {
      notes.push(`${name}, ${mode}: ${(error as Error).message}`);
      log(`  ${mode} failed: ${(error as Error).message}`);
      process.exitCode = 1;
      return null;
    }
  };
  if (modes.includes("fsl-ws")) await run("fsl", set);
  for (let round = 0; round < block.rounds; round += 1) {
    const turn = round % modes.length;
    // Each round begins with another mode, so that none is always behind the same one.
    for (const mode of [...modes.slice(turn), ...modes.slice(0, turn)]) {
      const figures = await run(mode);
      measured.get(mode)?.push(figures);
      log(`${name}, round ${round + 1}, ${mode}: ${shortLine(figures)}`);
    }
  }
  return [...measured].map(([mode, rounds]) => ({
    scenario: scenario.name,
    workload,
    cache,
    mode,
    rounds,
  }));
}

async function prepareHost(snapshot: GuestSnapshot, cache: Block["cache"]): Promise<void> {
  if (cache === "cold") {
    const left = await dropFile(snapshot.path);
    if (left > MIB) log(`  ${Math.round(left / MIB)} MiB of the snapshot stay in the page cache`);
  } else {
    await warmFile(snapshot.path);
  }
  // As much as the run will use: what the snapshot has, not what the guest could have.
  await touchMemory(snapshot.diskBytes + EXTRA_MIB * MIB);
}

function shortLine(figures: Figures | null): string {
  if (figures === null) return "failed";
  const shown = ["resumeMs", "firstOutputMs", "workMs", "residentMs", "lostMs", "totalCpuMs"];
  return shown
    .flatMap((name) => {
      const value = figures[name];
      return value === undefined ? [] : [`${name.replace(/Ms$/, "")} ${value.toFixed(1)}`];
    })
    .join(", ");
}

// -- about ----------------------------------------------------------------------------------------

function output(command: readonly string[]): string {
  const { stdout } = Bun.spawnSync([...command], { cwd: ROOT, stderr: "ignore" });
  return stdout.toString().trim();
}

function commitName(): string {
  const commit = output(["git", "rev-parse", "--short=12", "HEAD"]);
  const changed = output(["git", "status", "--porcelain", "--", "src", "shim"]);
  return `${commit || "unknown"}${changed === "" ? "" : "+"}`;
}

function versionOf(program: string): string {
  return /version (\S+)/.exec(output([program, "--version"]))?.[1] ?? "unknown";
}

// -- go -------------------------------------------------------------------------------------------

function writeAll(result: BenchResult, json: string | undefined, docs: boolean): void {
  if (json !== undefined) {
    writeFileSync(json, `${JSON.stringify(result, null, 1)}\n`);
    writeFileSync(json.replace(/(\.json)?$/, ".html"), htmlPage(result));
  }
  if (docs) {
    mkdirSync(join(ROOT, "docs"), { recursive: true });
    writeFileSync(join(ROOT, "docs", "performance.md"), performanceDocument(result));
  }
  process.stdout.write(terminalText(result));
}

/** @throws Error when it is no whole number from 1 on */
function countOf(text: string): number {
  const count = Number(text);
  if (!Number.isInteger(count) || count < 1)
    throw new Error(`--rounds: expected 1.., found ${text}`);
  return count;
}

const { values } = parseArgs({
  options: {
    quick: { type: "boolean" },
    rounds: { type: "string" },
    only: { type: "string", multiple: true },
    json: { type: "string" },
    docs: { type: "boolean" },
    render: { type: "string" },
  },
});
const quick = values.quick === true;
const rounds = countOf(values.rounds ?? String(quick ? QUICK_ROUNDS : ROUNDS));
for (const signal of ["SIGINT", "SIGTERM"] as const) {
  process.once(signal, () => process.exit(130)); // Ends every QEMU on its way: host.ts, guests.ts.
}
try {
  if (values.render === undefined) log(`measuring ${FSL}`);
  const result =
    values.render === undefined
      ? await measureAll({ quick, rounds, only: values.only ?? [] })
      : rendered(values.render);
  writeAll(result, values.json ?? values.render, values.docs === true);
} finally {
  killAllQemus();
}

/** An old result, with its goals judged anew. */
function rendered(path: string): BenchResult {
  const result = JSON.parse(readFileSync(path, "utf8")) as BenchResult;
  return { ...result, goals: goalsOf(new Cells(result.cells), result.faultPath) };
}
