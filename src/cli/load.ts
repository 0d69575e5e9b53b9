/** `fsl load`: flags in, QEMU's exit code out. */
import {
  closeSync,
  constants,
  lstatSync,
  openSync,
  realpathSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { resolve } from "node:path";
import { type ArgsDef, defineCommand } from "citty";
import {
  attachQemu,
  type BackgroundRole,
  EXIT_CODES,
  FslError,
  helperTasksFor,
  isFslError,
  type LoadHandle,
  type LoadOptions,
  type LoadReport,
  loadSnapshot,
  spawnQemu,
  takeBackgroundRole,
} from "../index.ts";
import { byteSize, PID_MAX, socketPath, wholeNumber } from "./arguments.ts";
import { letForegroundGo, loadInBackground } from "./detach.ts";
import { formatBytes, formatMs } from "./format.ts";
import { log, setQuiet } from "./log.ts";
import { startProgress } from "./progress.ts";
import {
  exitCodeOf,
  forwardSignals,
  graceMs,
  heedSignals,
  leave,
  servingArgs,
  type ServingFlags,
  servingOptions,
  type SignalHeed,
} from "./serve.ts";

const args = {
  snapshot: {
    type: "positional",
    required: true,
    description: "mapped-ram snapshot, as `fsl save` or QEMU's migrate writes it",
  },
  mode: {
    type: "enum",
    options: ["lazy", "copy"],
    default: "lazy",
    description: "lazy: run at once. copy: QEMU's own load of everything first",
  },
  paused: {
    type: "boolean",
    description: "leave the guest stopped after its state is loaded; so does QEMU's own -S",
  },
  qmp: {
    type: "string",
    valueHint: "path",
    description: "load into the QEMU that listens there, started with -incoming defer",
  },
  pid: {
    type: "string",
    valueHint: "pid",
    description: "with --qmp: its process, where the socket is behind a relay",
  },
  detach: {
    type: "boolean",
    description: "return when the guest runs; a background process goes on, see fsl status",
  },
  offset: {
    type: "string",
    valueHint: "bytes",
    description: "where in the file the snapshot begins; default: found out",
  },
  report: { type: "string", valueHint: "file", description: "write the load's figures as JSON" },
  "working-set": {
    type: "string",
    valueHint: "file|none",
    description:
      "pages the guest touches first, recorded and brought in first; default: SNAP.fslws",
  },
  "lazy-despite-discards": {
    type: "boolean",
    description: "shared memory and huge pages lazily although the guest may give memory back",
  },
  ...servingArgs,
} satisfies ArgsDef;

export const loadCommand = defineCommand({
  meta: {
    name: "load",
    description: "Starts a QEMU guest from a snapshot at once",
  },
  args,
  async run({ args: flags, data }) {
    setQuiet(flags.quiet === true);
    const place = placeOf(flags, (data as { behind: string[] | null }).behind);
    const run: Run = {
      options: loadOptions(flags),
      grace: graceMs(flags),
      quiet: flags.quiet === true,
      reportPath: flags.report,
      background: flags.detach === true ? takeBackgroundRole() : null,
    };
    checkFiles(flags.snapshot, run.options.workingSet, flags.report);
    if (flags.detach === true && run.background === null) {
      process.exitCode = await loadInBackground();
    } else if (place.qemu === null) {
      process.exitCode = await loadAttached(run, place);
    } else {
      process.exitCode = await loadSpawned(run, place.qemu);
    }
  },
});

/** What citty's usage cannot say: what stands behind `--`, and how it looks. */
export const LOAD_USAGE = `\
USAGE fsl load SNAPSHOT [OPTIONS] -- qemu-system-… ARGUMENTS
      fsl load SNAPSHOT [OPTIONS] --qmp PATH`;

export const LOAD_EXAMPLES = `\
EXAMPLES

  fsl load vm.snap -- qemu-system-x86_64 -machine q35 -m 4G -drive file=disk.qcow2

      the command line of the guest that was saved; fsl adds what it needs, and ends with QEMU

  qemu-system-x86_64 … -incoming defer -qmp unix:qmp.sock,server=on,wait=off &
  fsl load vm.snap --qmp qmp.sock

      into a QEMU that somebody else has started; fsl ends when all RAM is in`;

/** What all ways of loading need. */
interface Run {
  readonly options: Omit<LoadOptions, "target">;
  readonly grace: number;
  readonly quiet: boolean;
  readonly reportPath: string | undefined;
  /** This process is the one in the background. */
  readonly background: BackgroundRole | null;
}

/** Where the guest is to come up. */
type Place =
  | { readonly qemu: readonly string[] }
  | { readonly qemu: null; readonly qmpPath: string; readonly pid?: number };

interface PlaceFlags {
  readonly qmp?: string | undefined;
  readonly pid?: string | undefined;
}

/** @throws FslError USAGE unless exactly one place is named */
function placeOf({ qmp, pid }: PlaceFlags, behind: readonly string[] | null): Place {
  if (qmp !== undefined) {
    if (behind !== null) {
      const message = "--qmp loads into a QEMU that is there: nothing is to follow behind --";
      throw new FslError("USAGE", message);
    }
    const qmpPath = socketPath(qmp);
    if (pid === undefined) return { qemu: null, qmpPath };
    return { qemu: null, qmpPath, pid: wholeNumber(pid, "pid", 1, PID_MAX) };
  }
  if (pid !== undefined) throw new FslError("USAGE", "--pid goes with --qmp only");
  if (behind === null || behind.length === 0) {
    const message = "no QEMU command line: expected it behind --, found none; or give --qmp PATH";
    throw new FslError("USAGE", message);
  }
  return { qemu: behind };
}

/** Starts QEMU, and stays until it has ended; in the background until all RAM is in. */
async function loadSpawned(run: Run, qemu: readonly string[]): Promise<number> {
  const { options, background } = run;
  // QEMU's own load has no use for any.
  const helperTasks = options.mode === "copy" ? 0 : helperTasksFor(options);
  const forwarding = forwardSignals(run.grace);
  try {
    const target = spawnQemu({ argv: qemu, helperTasks, detached: background !== null });
    forwarding.to(target);
    const handle = await loadSnapshot({ ...options, target });
    if (background === null) return await stay(handle, target.pid, run);
    forwarding.stop();
    const heed = heedSignals();
    letForegroundGo(background, target.pid);
    const code = await seeThrough(handle, target.pid, heed, run);
    target.close();
    return code;
  } catch (error) {
    // Who asked for the end knows why there is no guest.
    if (forwarding.received === null || !isLost(error)) throw error;
    return givenUp(forwarding.received);
  } finally {
    forwarding.stop();
  }
}

/** Takes a QEMU of somebody else's, and leaves it when all RAM is in. */
async function loadAttached(run: Run, place: { qmpPath: string; pid?: number }): Promise<number> {
  const heed = heedSignals();
  let target: ReturnType<typeof attachQemu> | undefined;
  try {
    const helperTasks = helperTasksFor(run.options);
    target = attachQemu({ ...place, helperTasks, notice: (text) => log.warn(text) });
    const handle = await loadSnapshot({ ...run.options, target, cancel: heed.cancel });
    // A guest that does not run is told in the foreground.
    const { background } = run;
    if (background !== null && handle.unfinished === null) letForegroundGo(background, target.pid);
    return await seeThrough(handle, target.pid, heed, run);
  } catch (error) {
    if (heed.received === null || error !== heed.cancel.reason) throw error;
    return givenUp(heed.received);
  } finally {
    heed.stop();
    target?.close();
  }
}

function givenUp(signal: NodeJS.Signals): number {
  log.info(`ended by ${signal} before the guest ran`);
  return exitCodeOf({ exitCode: null, signal }, false);
}

/**
 * Until QEMU needs fsl no more, or somebody insists on the end of fsl. @returns the exit code
 * @throws FslError TARGET_LOST when QEMU has all its RAM, but all is not well with it
 */
async function seeThrough(
  handle: LoadHandle,
  pid: number,
  heed: SignalHeed,
  run: Run,
): Promise<number> {
  heed.seeThrough(() => handle.hurry());
  const end = await Promise.race([follow(handle, run), heed.insisted]);
  if (typeof end === "string") return leave(end, pid, handle.supplyFailed);
  if (!end.complete) return EXIT_CODES[handle.supplyFailed ? "SUPPLY_FAILED" : "TARGET_LOST"];
  // Huge pages are nothing to wait for when somebody wants fsl to end.
  await Promise.race([handle.tidied, heed.first]);
  if (handle.unfinished !== null) throw handle.unfinished;
  return handle.supplyFailed ? EXIT_CODES.SUPPLY_FAILED : 0;
}

/** Until QEMU has ended, whatever happens. @returns the exit code */
async function stay(handle: LoadHandle, pid: number, run: Run): Promise<number> {
  const end = await follow(handle, run).catch((error: unknown) => {
    const message = error instanceof Error ? error.message : String(error);
    log.warn(`${message}; to go on: fsl resume --pid ${pid}`);
    return { error };
  });
  // What is left in it goes with it.
  if (handle.unfinished !== null) log.warn(handle.unfinished.message);
  const exit = await handle.exited;
  if ("error" in end) throw end.error;
  if (exit.signal === "SIGBUS" && !handle.supplyFailed) {
    log.warn(
      "QEMU died of SIGBUS: the host had no page for its memory (huge pages or a tmpfs have run out), or a file of " +
        "its memory was truncated",
    );
  }
  return exitCodeOf(exit, handle.supplyFailed);
}

interface LoadFlags extends ServingFlags {
  readonly snapshot: string;
  readonly mode?: string | undefined;
  readonly paused?: boolean | undefined;
  readonly "lazy-despite-discards"?: boolean | undefined;
  readonly "working-set"?: string | undefined;
  readonly offset?: string | undefined;
}

/** @throws FslError USAGE */
function loadOptions(flags: LoadFlags): Omit<LoadOptions, "target"> {
  return {
    snapshot: flags.snapshot,
    mode: flags.mode === "copy" ? "copy" : "lazy",
    paused: flags.paused === true,
    lazyDespiteDiscards: flags["lazy-despite-discards"] === true,
    startedAtMs: 0,
    ...workingSet(flags["working-set"], flags.snapshot),
    ...servingOptions(flags),
    ...(flags.offset === undefined ? {} : { snapshotOffset: byteSize(flags.offset, "offset") }),
  };
}

/** A report tells of paths and of what a guest does: its owner's alone. */
const REPORT_MODE = 0o600;

/**
 * Before QEMU is started, for afterwards the guest would run already; and nothing is written yet, for
 * the load may fail. @throws FslError USAGE for a file that fsl would destroy, or cannot write
 */
function checkFiles(snapshot: string, workingSet?: string, report?: string): void {
  const refuse = (flag: string, path: string, found: string): never => {
    throw new FslError("USAGE", `--${flag}: expected a file of its own, found ${found}`, { path });
  };
  if (workingSet !== undefined) {
    const status = statSync(workingSet, { throwIfNoEntry: false });
    if (status?.isFile() === false) refuse("working-set", workingSet, "no regular file");
    if (isSame(workingSet, snapshot)) refuse("working-set", workingSet, "the snapshot");
  }
  if (report === undefined) return;
  if (isSame(report, snapshot)) refuse("report", report, "the snapshot");
  if (
    workingSet !== undefined &&
    (isSame(report, workingSet) || resolve(report) === resolve(workingSet))
  ) {
    refuse("report", report, "the working set");
  }
  try {
    const there = lstatSync(report, { throwIfNoEntry: false });
    // Whoever reads it would take the end of this for the end of the report.
    if (statSync(report, { throwIfNoEntry: false })?.isFIFO() === true) return;
    const flags = constants.O_WRONLY | constants.O_CREAT | constants.O_NONBLOCK;
    closeSync(openSync(report, flags, REPORT_MODE));
    // A load that fails leaves no empty one behind.
    if (there === undefined) rmSync(report);
  } catch (cause) {
    throw new FslError(
      "USAGE",
      `--report: cannot be written: ${(cause as Error).message}`,
      { path: report },
      cause,
    );
  }
}

function isSame(path: string, other: string): boolean {
  const [a, b] = [path, other].map((each) => statSync(each, { throwIfNoEntry: false }));
  return a !== undefined && b !== undefined && a.ino === b.ino && a.dev === b.dev;
}

function isLost(error: unknown): boolean {
  return isFslError(error) && error.code === "TARGET_LOST";
}

/** Shows the load as it goes, and writes its report when it is over. */
async function follow(handle: LoadHandle, run: Run): Promise<LoadReport> {
  const { quiet, reportPath, background } = run;
  // A log is no place for a line a second.
  const isShown = !quiet && background === null;
  const progress = isShown ? startProgress(() => handle.progress()) : undefined;
  let report: LoadReport;
  try {
    report = await handle.done;
  } finally {
    progress?.end();
  }
  if (reportPath !== undefined) writeReport(reportPath, report);
  if (report.complete) log.info(summary(report));
  else log.warn("QEMU ended before all RAM was in");
  return report;
}

/** The guest has its RAM by now: a disk that is full is worth a word, and no reason to fail. */
function writeReport(path: string, report: LoadReport): void {
  try {
    // Of a FIFO without a reader this says so, and does not wait for one.
    const { O_WRONLY, O_CREAT, O_TRUNC, O_NONBLOCK } = constants;
    const fd = openSync(path, O_WRONLY | O_CREAT | O_TRUNC | O_NONBLOCK, REPORT_MODE);
    try {
      writeFileSync(fd, `${JSON.stringify(report, null, 2)}\n`);
    } finally {
      closeSync(fd);
    }
  } catch (error) {
    log.warn(`--report ${path}: cannot be written: ${(error as Error).message}`);
  }
}

function summary(report: LoadReport): string {
  const { resumedMs, residentMs, pages, bytes, mode } = report;
  const times = [
    resumedMs === null ? "not resumed" : `resumed after ${formatMs(resumedMs)}`,
    residentMs === null ? "" : `all RAM in after ${formatMs(residentMs)}`,
  ].filter(Boolean);
  if (mode === "copy") return times.join(", ");
  const filled = report.blocks.filter(({ way }) => way === "fill");
  const before = filled.reduce((sum, { dataBytes }) => sum + dataBytes, 0);
  const filledText = before > 0 ? `${formatBytes(before)} before that; ` : "";
  return (
    `${times.join(", ")}: ${filledText}${formatBytes(bytes.fault + bytes.eager)}, ${pages.fault} pages by ` +
    `${report.faults} faults, ${pages.eager} by the eager load`
  );
}

/** By default beside the file itself, whatever link it was reached by; beside a device there is no place. */
export function workingSet(flag: string | undefined, snapshot: string): { workingSet?: string } {
  if (flag === "none") return {};
  if (flag !== undefined) return { workingSet: flag };
  try {
    return statSync(snapshot).isFile() ? { workingSet: `${realpathSync(snapshot)}.fslws` } : {};
  } catch {
    return {}; // There is no file of that name: what that means shows when it is opened.
  }
}
