/**
 * `npm run demo`: a real Linux guest is saved by `fsl save`, then loaded by QEMU's own load and by
 * `fsl load`, and checksums its own data after each. Prints them side by side. `fsl load` comes
 * twice: the first load records which pages the guest touches first, the second brings those in
 * first. And both once more for a guest that checksums from its first moment on, while its RAM comes
 * in.
 *
 *   bun scripts/demo.ts [--json] [--memory MIB] [--data MIB] [--rounds N]
 *
 * What the guest's first output is held against is the same guest with all its RAM there already: loaded by
 * QEMU, left alone for a second, then resumed.
 *
 * All times count from the moment at which QEMU can take the state (its monitor answers), in ms;
 * medians over the rounds. The guest prints every 10 ms, so its own sleep adds up to 10 ms to its
 * first output. With --json the last line is one JSON object.
 */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, watch } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import {
  bootGuest,
  type GuestSpec,
  guestArgv,
  killAllQemus,
  ordinaryLoad,
  QmpClient,
  qemuVersion,
  SerialConsole,
} from "../tests/helpers/guests.ts";
import { touchMemory, warmFile } from "./bench/host.ts";

const MIB = 1024 * 1024;
const ROOT = join(import.meta.dir, "..");
const FSL = join(ROOT, "dist/fsl");
/** How long a guest whose RAM is there is left alone before it runs. */
const REST_MS = 1000;

interface Run {
  readonly resumeMs: number;
  readonly firstOutputMs: number;
  readonly residentMs: number;
  /** When the guest had read all of its data and printed the checksum. */
  readonly checksumMs: number;
  readonly isRight: boolean;
}

/** The guest checksums its data when all RAM is in (idle), or from its first output on (busy). */
const KINDS = ["idle", "busy"] as const;
type Kind = (typeof KINDS)[number];

interface FslRun extends Run {
  readonly faultPages: number;
  readonly eagerPages: number;
  readonly faults: number;
}

/** What of `fsl load --report` is used here. */
interface Report {
  readonly qemuReadyMs: number;
  readonly resumedMs: number;
  readonly residentMs: number;
  readonly faults: number;
  readonly pages: { readonly fault: number; readonly eager: number };
}

interface Demo {
  readonly spec: GuestSpec;
  readonly snapshot: string;
  /** The guest's checksum before it was saved. */
  readonly checksum: string;
  readonly directory: string;
}

// -- the snapshot -------------------------------------------------------------------------------

async function runFsl(args: readonly string[]): Promise<void> {
  const child = Bun.spawn([FSL, ...args], { stdin: "ignore", stdout: "ignore", stderr: "pipe" });
  const errors = await new Response(child.stderr).text();
  if ((await child.exited) !== 0) throw new Error(`fsl ${args[0]} failed: ${errors.trim()}`);
}

async function makeSnapshot(spec: GuestSpec, directory: string, say: Say): Promise<Demo> {
  const snapshot = join(directory, "guest.snap");
  const monitor = join(directory, "qmp");
  const extraArgs = ["-qmp", `unix:${monitor},server=on,wait=off`];
  const { qemu, bootMs } = await bootGuest({ ...spec, extraArgs });
  try {
    say(`booted in ${Math.round(bootMs)} ms, ${spec.dataMiB} MiB of data written`);
    const checksum = (await qemu.serial.command("info"))[1] ?? "";
    const start = performance.now();
    await runFsl(["save", "--qmp", monitor, "--then", "quit", snapshot]);
    await qemu.exited;
    const diskMiB = Math.round((statSync(snapshot).blocks * 512) / 1024 ** 2);
    say(`saved in ${Math.round(performance.now() - start)} ms, ${diskMiB} MiB on disk`);
    return { spec, snapshot, checksum, directory };
  } finally {
    await qemu.kill();
  }
}

/** The same for every load: the snapshot in the page cache, and memory that is not to be found first. */
async function prepareHost({ snapshot, spec }: Demo): Promise<void> {
  await warmFile(snapshot);
  await touchMemory((spec.memoryMiB ?? 0) * MIB);
}

// -- the two loads ------------------------------------------------------------------------------

/**
 * Lets the guest checksum its data; says whether the guest found it right, and it is what it was
 * before the save.
 */
async function checksumIsRight(serial: SerialConsole, demo: Demo): Promise<boolean> {
  const [verdict, , checksum] = await serial.command("sum");
  return verdict === "ok" && checksum === demo.checksum;
}

async function loadByQemu(demo: Demo): Promise<Run> {
  const loaded = await ordinaryLoad({ path: demo.snapshot, argv: guestArgv(demo.spec) });
  try {
    const { readyAt, loadedAt, resumedAt } = loaded.times;
    const first = await loaded.firstOutput();
    const isRight = await checksumIsRight(loaded.qemu.serial, demo);
    return {
      resumeMs: resumedAt - readyAt,
      firstOutputMs: first.at - readyAt,
      residentMs: loadedAt - readyAt,
      checksumMs: performance.now() - readyAt,
      isRight,
    };
  } finally {
    await loaded.qemu.kill();
  }
}

/** The first output after resume of a guest whose RAM is all there; ms. */
async function outputWithRamThere(demo: Demo): Promise<number> {
  const argv = guestArgv(demo.spec);
  const { qemu } = await ordinaryLoad({ path: demo.snapshot, argv }, { paused: true });
  try {
    await Bun.sleep(REST_MS);
    const from = qemu.qmp.events.length;
    await qemu.qmp.execute("cont");
    const resumed = await qemu.qmp.waitEvent("RESUME", () => true, 60_000, from);
    const first = await qemu.serial.waitFor(/./);
    return first.at - resumed.at;
  } finally {
    await qemu.kill();
  }
}

/** Waits until a file holds a JSON document. */
function waitForJson<T>(directory: string, name: string, timeoutMs: number): Promise<T> {
  return new Promise((resolve, reject) => {
    const finish = (act: () => void): void => {
      watcher.close();
      clearTimeout(timer);
      act();
    };
    const look = (): void => {
      try {
        const document = JSON.parse(readFileSync(join(directory, name), "utf8")) as T;
        finish(() => resolve(document));
      } catch {
        // Not there yet, or not whole.
      }
    };
    const watcher = watch(directory, look);
    const timer = setTimeout(() => {
      finish(() => reject(new Error(`fsl load wrote no ${name} within ${timeoutMs} ms`)));
    }, timeoutMs);
    look();
  });
}

async function loadByFsl(demo: Demo, kind: Kind): Promise<FslRun> {
  const directory = mkdtempSync(join(demo.directory, "load-"));
  const serial = await SerialConsole.listen(join(directory, "serial"));
  const qmp = await QmpClient.listen(join(directory, "qmp"));
  const report = ["--report", join(directory, "report.json")];
  const qemu = [...guestArgv(demo.spec), ...serial.args, ...qmp.args];
  const child = Bun.spawn([FSL, "load", demo.snapshot, "--quiet", ...report, "--", ...qemu], {
    stdin: "ignore",
    stdout: "ignore",
    stderr: "pipe",
  });
  const endWithUs = (): void => child.kill("SIGTERM");
  process.on("exit", endWithUs);
  const messages = new Response(child.stderr).text();
  const ended = child.exited.then(async (code) => {
    const reason = new Error(`fsl load ended with ${code}: ${(await messages).trim()}`);
    serial.fail(reason);
    qmp.fail(reason);
    return code;
  });
  try {
    // Both arrive here, so that their distance is exact; when QEMU was ready only fsl knows.
    const resumed = await qmp.waitEvent("RESUME");
    const first = await serial.waitFor(/./);
    const report = (): Promise<Report> => waitForJson(directory, "report.json", 120_000);
    if (kind === "idle") await report();
    const isRight = await checksumIsRight(serial, demo);
    const checksumAt = performance.now();
    const figures = await report();
    await qmp.execute("quit");
    if ((await ended) !== 0) throw new Error(`fsl load failed: ${(await messages).trim()}`);
    const resumeMs = figures.resumedMs - figures.qemuReadyMs;
    return {
      resumeMs,
      firstOutputMs: resumeMs + first.at - resumed.at,
      residentMs: figures.residentMs - figures.qemuReadyMs,
      checksumMs: resumeMs + checksumAt - resumed.at,
      isRight,
      faultPages: figures.pages.fault,
      eagerPages: figures.pages.eager,
      faults: figures.faults,
    };
  } finally {
    qmp.close();
    serial.close();
    // fsl ends its QEMU before it ends itself.
    if (child.exitCode === null) child.kill("SIGTERM");
    await child.exited;
    process.off("exit", endWithUs);
  }
}

// -- figures ------------------------------------------------------------------------------------

function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)] ?? Number.NaN;
}

/** To a tenth. */
function roundedMedian(values: readonly number[]): number {
  return Math.round(median(values) * 10) / 10;
}

/** The median of one figure over all runs. */
function figure<R extends Run>(runs: readonly R[], pick: (run: R) => number): number {
  return roundedMedian(runs.map(pick));
}

function summary(runs: readonly Run[]) {
  return {
    resumeMs: figure(runs, (run) => run.resumeMs),
    firstOutputMs: figure(runs, (run) => run.firstOutputMs),
    residentMs: figure(runs, (run) => run.residentMs),
    checksum: runs.every((run) => run.isRight) ? ("ok" as const) : ("wrong" as const),
    checksumMs: figure(runs, (run) => run.checksumMs),
    outputAfterResumeMs: figure(runs, (run) => run.firstOutputMs - run.resumeMs),
  };
}

/** @param busy of the guest that is at work from its first moment on */
function fslSummary(runs: readonly FslRun[], busy: readonly FslRun[]) {
  const { checksum, checksumMs, residentMs } = summary(busy);
  const idle = summary(runs);
  return {
    ...idle,
    checksum: checksum === "ok" ? idle.checksum : checksum,
    checksumMs,
    busyResidentMs: residentMs,
    faultPages: figure(runs, (run) => run.faultPages),
    eagerPages: figure(runs, (run) => run.eagerPages),
    faults: figure(runs, (run) => run.faults),
  };
}

type Say = (line: string) => void;

type Figures = ReturnType<typeof fslSummary>;

function printTable(
  copy: ReturnType<typeof summary>,
  fsl: Figures,
  again: Figures,
  ramThereMs: number,
  say: Say,
): void {
  const row = (what: string, pick: (run: ReturnType<typeof summary>) => number): string[] => [
    what,
    ...[copy, fsl, again].map((run) => `${pick(run).toFixed(1)} ms`),
  ];
  const rows = [
    ["", "QEMU's own load", "fsl load", "fsl load, again"],
    row("guest runs after", (run) => run.resumeMs),
    row("its first output after", (run) => run.firstOutputMs),
    row("  counted from resume", (run) => run.outputAfterResumeMs),
    [
      `  ÷ with RAM there (${ramThereMs.toFixed(1)} ms)`,
      ...[copy, fsl, again].map((run) => (run.outputAfterResumeMs / ramThereMs).toFixed(2)),
    ],
    row("all RAM in place after", (run) => run.residentMs),
    [
      "  with the guest at work",
      "-",
      ...[fsl, again].map((run) => `${run.busyResidentMs.toFixed(1)} ms`),
    ],
    row("all data checksummed after", (run) => run.checksumMs),
    ["  checksum", copy.checksum, fsl.checksum, again.checksum],
    ["faults", "-", `${fsl.faults}`, `${again.faults}`],
    ["pages by fault", "-", `${fsl.faultPages}`, `${again.faultPages}`],
    ["pages by eager load", "-", `${fsl.eagerPages}`, `${again.eagerPages}`],
  ];
  say("");
  for (const [what = "", ...cells] of rows) {
    say(`  ${what.padEnd(32)}${cells.map((cell) => cell.padStart(17)).join("")}`);
  }
  say("");
}

// -- main ---------------------------------------------------------------------------------------

function positive(value: string, option: string): number {
  const number = Number(value);
  if (!Number.isInteger(number) || number < 1) {
    throw new Error(`--${option}: expected a whole number above 0, found ${value}`);
  }
  return number;
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      json: { type: "boolean", default: false },
      memory: { type: "string", default: "1024" },
      data: { type: "string", default: "400" },
      rounds: { type: "string", default: "5" },
    },
  });
  const memoryMiB = positive(values.memory, "memory");
  const dataMiB = positive(values.data, "data");
  const rounds = positive(values.rounds, "rounds");
  const say: Say = values.json ? (line) => console.error(line) : (line) => console.log(line);

  const qemu = await qemuVersion();
  const spec: GuestSpec = { machine: "q35", memoryMiB, dataMiB, guestOptions: "fsl.tick=10" };
  say(`QEMU ${qemu}, Linux guest with ${memoryMiB} MiB of RAM, ${dataMiB} MiB of data in it`);
  mkdirSync(join(ROOT, ".cache"), { recursive: true });
  const directory = mkdtempSync(join(ROOT, ".cache/demo-"));
  process.on("exit", () => rmSync(directory, { recursive: true, force: true, maxRetries: 5 }));
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.once(signal, () => process.exit(1));
  try {
    const demo = await makeSnapshot(spec, directory, say);
    const byQemu: Run[] = [];
    const withRamThere: number[] = [];
    const byFsl = { idle: [] as FslRun[], busy: [] as FslRun[] };
    const byFslAgain = { idle: [] as FslRun[], busy: [] as FslRun[] };
    // The first round only warms up: code that is on disk.
    for (let round = 0; round <= rounds; round++) {
      say(round === 0 ? "loading, to warm up" : `loading, round ${round} of ${rounds}`);
      await prepareHost(demo);
      const ordinary = await loadByQemu(demo);
      if (round > 0) byQemu.push(ordinary);
      await prepareHost(demo);
      const ramThereMs = await outputWithRamThere(demo);
      if (round > 0) withRamThere.push(ramThereMs);
      for (const kind of KINDS) {
        rmSync(`${demo.snapshot}.fslws`, { force: true });
        for (const runs of [byFsl[kind], byFslAgain[kind]]) {
          await prepareHost(demo);
          const run = await loadByFsl(demo, kind);
          if (round > 0) runs.push(run);
        }
      }
    }
    const copy = summary(byQemu);
    const fsl = fslSummary(byFsl.idle, byFsl.busy);
    const fslAgain = fslSummary(byFslAgain.idle, byFslAgain.busy);
    const outputWithRamThereMs = roundedMedian(withRamThere);
    printTable(copy, fsl, fslAgain, outputWithRamThereMs, say);
    if (values.json) {
      const guest = { memoryMiB, dataMiB };
      const figures = { copy, fsl, fslAgain, outputWithRamThereMs, guest, qemu, rounds };
      console.log(JSON.stringify(figures));
    }
    if ([copy, fsl, fslAgain].some((load) => load.checksum !== "ok")) process.exitCode = 1;
  } finally {
    killAllQemus();
  }
}

await main();
