/**
 * One run: a QEMU is started, takes the state in one of the ways, the guest works, and all of it is
 * measured from the outside. Nothing is polled while it counts: QMP, the serial line and the
 * report's file tell when something has happened.
 *
 * All times count from the same moment: QEMU can take the state. For QEMU's own loads that is when
 * `migrate-incoming` is sent; for fsl, which sends it itself, when QEMU's monitor had answered, by
 * fsl's report, which is somewhat earlier; for a fsl that is attached, when that is started. The two
 * clocks meet in the event RESUME, which a second monitor brings here.
 */
import {
  closeSync,
  copyFileSync,
  existsSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  watch,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { openSnapshot } from "../../src/index.ts";
import { planSeed, writeSeed } from "../../src/snapshot/seed.ts";
import {
  type GuestSnapshot,
  QmpClient,
  type QmpEvent,
  ramBlocks,
  SerialConsole,
  startQemu,
} from "../../tests/helpers/guests.ts";
import { ROOT } from "../build-shim.ts";
import { hugePagesOf, MemoryPeaks, ProcessGroup, type ProcessMemory, Reader } from "./host.ts";
import { BUSY_MS, COMMANDS, type Mode, type Workload } from "./plan.ts";

/** `fsl`; FSL_BENCH_FSL names another one. */
export const FSL = process.env.FSL_BENCH_FSL ?? join(ROOT, "dist", "fsl");
/** A QEMU with upstream's lazy load of snapshots, or undefined. */
export const UPSTREAM = process.env.FSL_BENCH_UPSTREAM;

const LONG_MS = 600_000;
const MIB = 1024 * 1024;
const SAMPLE_MS = 25;
/** A guest whose RAM is there rests for so long before it is let go. */
const REST_MS = 300;
const BINS_PER_SECOND = 100;

/** Figures of a run by name; what does not apply is absent. Times in ms, memory in MiB. */
export interface Figures {
  readonly [name: string]: number | undefined;
  /** From its start (fsl's, where fsl starts QEMU) to QEMU's monitor having answered. */
  readonly readyMs?: number;
  readonly resumeMs?: number;
  readonly firstOutputMs?: number;
  /** The guest's answer to the workload's command. */
  readonly workMs?: number;
  readonly residentMs?: number;
  /** Busy loop: time that the guest did not get, from the common moment on. */
  readonly lostMs?: number;
  /** CPU time of QEMU (and fsl) from their start to the end of the run. */
  readonly totalCpuMs?: number;
  /** CPU time of QEMU alone until it can take the state. */
  readonly startCpuMs?: number;
  readonly qemuPeakMiB?: number;
  readonly fslPeakMiB?: number;
  /** fsl's own memory: anonymous and shmem. And its mapped files, which are page cache. */
  readonly fslOwnMiB?: number;
  readonly fslFileMiB?: number;
  readonly faults?: number;
  readonly faultPages?: number;
  readonly eagerPages?: number;
  readonly faultP50Us?: number;
  readonly faultP99Us?: number;
  readonly faultMaxUs?: number;
  /** Sum over all faults. */
  readonly blockedMs?: number;
  /** Of the guest's RAM in QEMU. */
  readonly hugeMiB?: number;
  readonly anonymousMiB?: number;
}

export interface RunOptions {
  readonly mode: Mode;
  readonly workload: Workload;
  readonly snapshot: GuestSnapshot;
  readonly windowMs: number;
  /** fsl: the working set to start with; it is copied. Absent: none, and it is recorded. */
  readonly workingSet?: string;
  /** fsl: where to leave the working set that the run has recorded. */
  readonly recordTo?: string;
}

/** What of `fsl load --report` is used here. */
interface FslReport {
  readonly qemuReadyMs: number;
  readonly resumedMs: number;
  readonly residentMs: number | null;
  readonly faults: number;
  readonly pages: { readonly fault: number; readonly eager: number };
  readonly faultLatencyUs: {
    readonly p50: number | null;
    readonly p99: number | null;
    readonly max: number | null;
    readonly mean: number | null;
  };
}

/** A guest that runs. Absolute times are on the clock of `performance.now()`. */
interface Running {
  readonly serial: SerialConsole;
  readonly qmp: QmpClient;
  readonly resumedAt: number;
  /** Resolves when the load is over. */
  readonly loaded: Promise<Loaded>;
  readonly startCpuMs?: number;
}

interface Loaded {
  readonly readyMs: number;
  /** When the state could be taken: what all times count from. */
  readonly origin: number;
  /** When all RAM was in; NaN: never. */
  readonly residentAt: number;
  readonly report: FslReport | null;
}

/** @throws Error when the guest's data is not what it was, or the run does not come to its end */
export async function measureRun(options: RunOptions): Promise<Figures> {
  const directory = mkdtempSync(join(tmpdir(), "fsl-bench-"));
  const removeDirectory = (): void => rmSync(directory, { recursive: true, force: true });
  process.once("exit", removeDirectory);
  const group = new ProcessGroup(directory);
  try {
    return await measure(options, group, directory);
  } finally {
    await group.close();
    process.off("exit", removeDirectory);
    removeDirectory();
  }
}

async function measure(
  options: RunOptions,
  group: ProcessGroup,
  directory: string,
): Promise<Figures> {
  const { workload, snapshot } = options;
  const running = await start(options, group, directory, (serial) => {
    const command = COMMANDS[workload];
    if (command !== null) serial.send(`${command}\n`);
  });
  const { serial, resumedAt, loaded } = running;
  loaded.catch(() => {});
  const isIdle = workload === "idle";
  const peaks = isIdle ? new PeakWatch(group, snapshot) : null;
  try {
    const first = await serial.waitFor(/./, LONG_MS);
    const word = COMMANDS[workload]?.split(" ")[0]?.toUpperCase();
    const answer =
      word === undefined ? null : await serial.waitFor(new RegExp(`^${word} `), LONG_MS);
    const { readyMs, origin, residentAt, report } = await loaded;
    const work = answer === null ? {} : judge(workload, answer.text, answer.at - origin);
    if (isIdle) await Bun.sleep(Math.max(0, origin + options.windowMs - performance.now()));
    const totalCpuMs = group.cpuMs();
    const { startCpuMs } = running;
    // The floor's load came before, and is not what it is about. A fsl that is attached is in no group.
    const isWhole = !["floor", "fsl-attach"].includes(options.mode);
    const ofLoad = isWhole ? { readyMs, totalCpuMs } : {};
    const isResidentKnown = options.mode !== "floor" && !Number.isNaN(residentAt);
    return {
      resumeMs: resumedAt - origin,
      firstOutputMs: first.at - origin,
      ...(isResidentKnown ? { residentMs: residentAt - origin } : {}),
      ...work,
      ...ofLoad,
      ...(startCpuMs === undefined ? {} : { startCpuMs }),
      ...(report === null ? {} : reportFigures(report)),
      ...(peaks === null ? {} : await peaks.figures(running.qmp)),
    };
  } finally {
    peaks?.close();
  }
}

/** The figures of a workload. @throws Error when the guest found wrong data */
function judge(workload: Workload, answer: string, elapsedMs: number): Figures {
  const fields = answer.split(" ").slice(1);
  if (workload !== "busy") {
    if (fields[0] !== "ok") throw new Error(`the guest's data is not what it was: ${answer}`);
    return { workMs: elapsedMs };
  }
  const bins = fields.slice(1).map(Number);
  const sorted = bins.toSorted((a, b) => a - b);
  // What an undisturbed bin does: the host is never faster than that, and bins lost are not in it.
  const typical = sorted[Math.floor(sorted.length * 0.75)] ?? Number.NaN;
  const done = bins.reduce((total, bin) => total + bin, 0);
  const usefulMs = ((done / typical) * 1000) / BINS_PER_SECOND;
  return { workMs: elapsedMs, lostMs: elapsedMs - Math.min(usefulMs, BUSY_MS) };
}

function reportFigures({ faults, pages, faultLatencyUs }: FslReport): Figures {
  const { p50, p99, max, mean } = faultLatencyUs;
  return {
    faults,
    faultPages: pages.fault,
    eagerPages: pages.eager,
    ...(p50 === null ? {} : { faultP50Us: p50 }),
    ...(p99 === null ? {} : { faultP99Us: p99 }),
    ...(max === null ? {} : { faultMaxUs: max }),
    blockedMs: ((mean ?? 0) * faults) / 1000,
  };
}

/** Memory of the processes of an idle run. */
class PeakWatch {
  readonly #snapshot: GuestSnapshot;
  readonly #qemuPid: number;
  readonly #qemu: MemoryPeaks;
  readonly #fsl: MemoryPeaks | null;

  constructor(group: ProcessGroup, snapshot: GuestSnapshot) {
    this.#snapshot = snapshot;
    this.#qemuPid = group.find("qemu")[0] ?? 0;
    this.#qemu = new MemoryPeaks(this.#qemuPid, SAMPLE_MS);
    const fslPid = group.findExactly(basename(FSL));
    this.#fsl = fslPid === undefined ? null : new MemoryPeaks(fslPid, SAMPLE_MS);
  }

  async figures(qmp: QmpClient): Promise<Figures> {
    const qemu = this.#qemu.close();
    const fsl = this.#fsl?.close();
    const blocks = await ramBlocks(qmp);
    const ram = blocks.find(({ total }) => total === this.#snapshot.memoryMiB * MIB);
    const huge =
      ram === undefined ? null : hugePagesOf(this.#qemuPid, ram.address, ram.address + ram.total);
    return {
      qemuPeakMiB: qemu.peak / MIB,
      ...(fsl === undefined ? {} : fslMemory(fsl)),
      ...(huge === null ? {} : { hugeMiB: huge.huge / MIB, anonymousMiB: huge.anonymous / MIB }),
    };
  }

  close(): void {
    this.#qemu.close();
    this.#fsl?.close();
  }
}

function fslMemory(memory: ProcessMemory): Figures {
  return {
    fslPeakMiB: memory.peak / MIB,
    fslOwnMiB: (memory.anonymous + memory.shmem) / MIB,
    fslFileMiB: memory.file / MIB,
  };
}

// -- the modes ------------------------------------------------------------------------------------

type Resumed = (serial: SerialConsole) => void;

function start(
  options: RunOptions,
  group: ProcessGroup,
  directory: string,
  resumed: Resumed,
): Promise<Running> {
  const { mode, snapshot } = options;
  const { argv, path } = snapshot;
  switch (mode) {
    case "fsl":
    case "fsl-copy":
    case "fsl-ws":
      return startFsl(options, group, directory, resumed);
    case "fsl-attach":
      return startAttached(options, group, directory, resumed);
    case "ordinary":
      return startPlain({ argv, path, capabilities: [], group, resumed });
    case "multifd":
      return startPlain({ argv, path, capabilities: ["multifd"], group, resumed });
    case "floor":
      return startPlain({ argv, path, capabilities: [], group, resumed, restMs: REST_MS });
    case "mapped":
    case "beside": {
      const seed = join(directory, "seed");
      const mapped = mapRam(snapshot, seed);
      const plan = { argv: mapped, path: seed, capabilities: [], group, resumed };
      if (mode === "mapped") return startPlain({ ...plan, isNeverResident: true });
      return startPlain({ ...plan, reader: new Reader(path, group.launcher) });
    }
    case "upstream": {
      const other = upstreamArgv(snapshot);
      return startPlain({ argv: other, path, capabilities: ["postcopy-ram"], group, resumed });
    }
  }
}

interface PlainStart {
  readonly argv: readonly string[];
  /** What `migrate-incoming` is told to read. */
  readonly path: string;
  /** Beside mapped-ram. */
  readonly capabilities: readonly string[];
  readonly group: ProcessGroup;
  readonly resumed: Resumed;
  /** All times count from `cont`, which is sent so long after the load: the floor. */
  readonly restMs?: number;
  /** RAM comes in as it is touched, and nobody says when all of it has. */
  readonly isNeverResident?: boolean;
  /** Told to read when QEMU is told to load; all RAM is in when it has read all. */
  readonly reader?: Reader;
}

/** A QEMU that loads by itself, told to by plain QMP. */
async function startPlain(plan: PlainStart): Promise<Running> {
  const { group, capabilities } = plan;
  const qemu = await startQemu([...group.timedLauncher, ...plan.argv, "-incoming", "defer"]);
  group.pid = qemu.pid;
  const readyMs = performance.now() - group.startedAt;
  const { qmp, serial } = qemu;
  await qmp.setCapabilities(["mapped-ram", ...capabilities]);
  if (capabilities.includes("multifd")) {
    await qmp.execute("migrate-set-parameters", { "multifd-channels": 4 });
  }
  const startCpuMs = group.cpuMs();
  const from = qmp.events.length;
  let origin = performance.now();
  const read = plan.reader?.read();
  read?.catch(() => {});
  const incoming = qmp.execute("migrate-incoming", {
    uri: `file:${plan.path}`,
    "exit-on-error": false,
  });
  incoming.catch(() => {});
  const migrated = qmp.waitMigrated(from, LONG_MS);
  migrated.catch(() => {});
  // Upstream's lazy load resumes by itself, long before it has completed.
  const isLazy = capabilities.includes("postcopy-ram");
  if (!isLazy) {
    await migrated;
    if (plan.restMs !== undefined) {
      await Bun.sleep(plan.restMs);
      origin = performance.now();
    }
    qmp.execute("cont").catch(() => {});
  }
  const resumedAt = (await resumeEvent(qmp, from)).at;
  plan.resumed(serial);
  const whenLoaded = async (): Promise<Loaded> => {
    const { at } = await migrated;
    if (read !== undefined) return { readyMs, origin, residentAt: await read, report: null };
    const residentAt = plan.restMs !== undefined ? origin : at;
    const told = plan.isNeverResident === true ? Number.NaN : residentAt;
    return { readyMs, origin, residentAt: told, report: null };
  };
  return { serial, qmp, resumedAt, loaded: whenLoaded(), startCpuMs };
}

function resumeEvent(qmp: QmpClient, from = 0): Promise<QmpEvent> {
  return qmp.waitEvent("RESUME", () => true, LONG_MS, from);
}

async function startFsl(
  options: RunOptions,
  group: ProcessGroup,
  directory: string,
  resumed: Resumed,
): Promise<Running> {
  const { snapshot, workingSet } = options;
  const serial = await SerialConsole.listen(join(directory, "serial"));
  const qmp = await QmpClient.listen(join(directory, "qmp"));
  const reportPath = join(directory, "report.json");
  const ownSet = join(directory, "own.fslws");
  // A guest that had no fault has left no set.
  if (workingSet !== undefined && existsSync(workingSet)) copyFileSync(workingSet, ownSet);
  const setArgs = hasWorkingSets() ? ["--working-set", ownSet] : [];
  const errors = openSync(join(directory, "errors"), "w");
  const report = nextReport(directory, reportPath);
  // The same way in as startQemu's, so that both starts take the same detours.
  const prefix = ["setpriv", "--pdeathsig", "KILL", ...group.timedLauncher];
  const modeArgs = options.mode === "fsl-copy" ? ["--mode", "copy"] : [];
  const flags = ["--quiet", "--report", reportPath, ...modeArgs, ...setArgs];
  const load = [FSL, "load", snapshot.path, ...flags, "--"];
  const child = Bun.spawn([...prefix, ...load, ...snapshot.argv, ...serial.args, ...qmp.args], {
    // Killed with its group in the end, fsl removes nothing.
    env: { ...process.env, XDG_RUNTIME_DIR: directory },
    stdin: "ignore",
    stdout: "ignore",
    stderr: errors,
  });
  closeSync(errors);
  group.pid = child.pid;
  void child.exited.then((code) => {
    const reason = new Error(`fsl ended with exit code ${code}: ${wordsOf(directory)}`);
    serial.fail(reason);
    qmp.fail(reason);
    report.fail(reason);
    serial.close();
    qmp.close();
  });
  const resumedAt = (await resumeEvent(qmp)).at;
  resumed(serial);
  const loaded = report.promise.then((told) => {
    if (options.recordTo !== undefined && existsSync(ownSet)) {
      copyFileSync(ownSet, options.recordTo);
    }
    const origin = resumedAt - (told.resumedMs - told.qemuReadyMs);
    const residentAt = origin + ((told.residentMs ?? Number.NaN) - told.qemuReadyMs);
    return { readyMs: origin - group.startedAt, origin, residentAt, report: told };
  });
  return { serial, qmp, resumedAt, loaded };
}

/** A QEMU that waits, and a fsl that is started for it: all times count from that. */
async function startAttached(
  { snapshot }: RunOptions,
  group: ProcessGroup,
  directory: string,
  resumed: Resumed,
): Promise<Running> {
  const path = join(directory, "fsl-qmp");
  const monitor = ["-qmp", `unix:${path},server=on,wait=off`];
  const qemu = await startQemu([
    ...group.launcher,
    ...snapshot.argv,
    ...monitor,
    "-incoming",
    "defer",
  ]);
  group.pid = qemu.pid;
  const { qmp, serial } = qemu;
  const from = qmp.events.length;
  const reportPath = join(directory, "report.json");
  const errors = openSync(join(directory, "errors"), "w");
  const report = nextReport(directory, reportPath);
  const flags = ["--quiet", "--report", reportPath, "--working-set", "none", "--qmp", path];
  const origin = performance.now();
  const child = Bun.spawn(
    ["setpriv", "--pdeathsig", "KILL", FSL, "load", snapshot.path, ...flags],
    { stdin: "ignore", stdout: "ignore", stderr: errors },
  );
  closeSync(errors);
  void child.exited.then((code) => {
    if (code === 0) return;
    const reason = new Error(`fsl ended with exit code ${code}: ${wordsOf(directory)}`);
    qmp.fail(reason);
    report.fail(reason);
  });
  const resumedAt = (await resumeEvent(qmp, from)).at;
  resumed(serial);
  const loaded = report.promise.then((told) => {
    const residentAt = resumedAt + ((told.residentMs ?? Number.NaN) - told.resumedMs);
    return { readyMs: Number.NaN, origin, residentAt, report: told };
  });
  return { serial, qmp, resumedAt, loaded };
}

/** What fsl has written to stderr. */
function wordsOf(directory: string): string {
  try {
    return readFileSync(join(directory, "errors"), "utf8").trim() || "no message";
  } catch {
    return "the run is over"; // Its directory is gone.
  }
}

/** The report that fsl writes when all RAM is in. */
function nextReport(
  directory: string,
  path: string,
): { promise: Promise<FslReport>; fail: (error: Error) => void } {
  const { promise, resolve, reject } = Promise.withResolvers<FslReport>();
  promise.catch(() => {});
  const watcher = watch(directory, () => {
    try {
      resolve(JSON.parse(readFileSync(path, "utf8")) as FslReport);
    } catch {
      // Not there, or not whole yet: another event follows.
    }
  });
  promise.then(
    () => watcher.close(),
    () => watcher.close(),
  );
  return { promise, fail: reject };
}

let workingSets: boolean | undefined;

/** Does this fsl know working sets? */
export function hasWorkingSets(): boolean {
  if (workingSets === undefined) {
    const { stdout, stderr } = Bun.spawnSync([FSL, "load", "--help"]);
    workingSets = `${stdout}${stderr}`.includes("--working-set");
  }
  return workingSets;
}

/** The snapshot itself as the guest's RAM, copy on write; and a seed that has all the rest. */
function mapRam(guest: GuestSnapshot, seedPath: string): string[] {
  const snapshot = openSnapshot(guest.path);
  try {
    const ram = snapshot.blocks.find(({ usedLength }) => usedLength === guest.memoryMiB * MIB);
    if (ram === undefined) throw new Error(`${guest.path}: no block of ${guest.memoryMiB} MiB`);
    const seed = openSync(seedPath, "w", 0o600);
    writeSeed(planSeed(snapshot, new Set([ram.idstr])), snapshot.fd, seed);
    closeSync(seed);
    const backend = [
      `memory-backend-file,id=${ram.idstr},size=${guest.memoryMiB}M,mem-path=${guest.path}`,
      `offset=${ram.pagesOffset},share=off,readonly=on,rom=off`,
    ];
    const machine = guest.argv.indexOf("-machine") + 1;
    const argv = [...guest.argv];
    argv[machine] = `${argv[machine]},memory-backend=${ram.idstr}`;
    return [...argv, "-object", backend.join(",")];
  } finally {
    snapshot.close();
  }
}

function upstreamArgv(guest: GuestSnapshot): string[] {
  if (UPSTREAM === undefined) throw new Error("FSL_BENCH_UPSTREAM is not set");
  const [, ...args] = guest.argv;
  const machine = args.indexOf("-machine") + 1;
  args[machine] = (args[machine] ?? "").replace(/^[^,]+/, guest.machineType);
  return [UPSTREAM, ...args];
}
