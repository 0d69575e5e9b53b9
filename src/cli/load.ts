/** `fsl load`: flags in, QEMU's exit code out. */
import { writeFileSync } from "node:fs";
import { type ArgsDef, defineCommand } from "citty";
import {
  FslError,
  isFslError,
  type LoadHandle,
  type LoadOptions,
  type LoadReport,
  loadSnapshot,
  spawnQemu,
} from "../index.ts";
import { byteSize } from "./arguments.ts";
import { formatBytes, formatMs } from "./format.ts";
import { log, setQuiet } from "./log.ts";
import { startProgress } from "./progress.ts";
import {
  exitCodeOf,
  forwardSignals,
  graceMs,
  servingArgs,
  type ServingFlags,
  servingOptions,
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
  paused: { type: "boolean", description: "leave the guest stopped after its state is loaded" },
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
    description:
      "Starts a QEMU guest from a snapshot at once: fsl load SNAP [options] -- qemu-system-… args",
  },
  args,
  async run({ args: flags, data }) {
    const qemu = (data as { behind: string[] | null }).behind;
    if (qemu === null || qemu.length === 0) {
      throw new FslError("USAGE", "no QEMU command line: expected it behind --, found none");
    }
    setQuiet(flags.quiet === true);
    const options = loadOptions(flags);
    if (flags.report !== undefined) checkWritable(flags.report);
    // One a Worker; QEMU's own load has no use for any.
    const helperTasks = options.mode === "copy" ? 0 : (options.eager?.workers ?? 2);
    const forwarding = forwardSignals(graceMs(flags));
    try {
      const target = spawnQemu({ argv: qemu, helperTasks });
      forwarding.to(target);
      const handle = await loadSnapshot({ ...options, target });
      process.exitCode = await stay(handle, target.pid, flags.quiet === true, flags.report);
    } catch (error) {
      // Who asked for the end knows why there is no guest.
      if (forwarding.received === null || !isLost(error)) throw error;
      log.info(`ended by ${forwarding.received} before the guest ran`);
      process.exitCode = exitCodeOf({ exitCode: null, signal: forwarding.received }, false);
    } finally {
      forwarding.stop();
    }
  },
});

/** Until QEMU has ended, whatever happens. @returns the exit code */
async function stay(
  handle: LoadHandle,
  pid: number,
  quiet: boolean,
  reportPath: string | undefined,
): Promise<number> {
  const failure = await follow(handle, quiet, reportPath).catch((error: unknown) => {
    const message = error instanceof Error ? error.message : String(error);
    log.warn(`${message}; to go on: fsl resume --pid ${pid}`);
    return { error };
  });
  const exit = await handle.exited;
  if (failure !== undefined) throw failure.error;
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

/** Before QEMU is started: afterwards the guest would run already. */
function checkWritable(path: string): void {
  try {
    writeFileSync(path, "");
  } catch (cause) {
    throw new FslError("USAGE", `--report: ${(cause as Error).message}`, { path }, cause);
  }
}

function isLost(error: unknown): boolean {
  return isFslError(error) && error.code === "TARGET_LOST";
}

/** Shows the load as it goes, and writes its report when it is over. */
async function follow(
  handle: LoadHandle,
  quiet: boolean,
  reportPath: string | undefined,
): Promise<void> {
  const progress = quiet ? undefined : startProgress(() => handle.progress());
  let report: LoadReport;
  try {
    report = await handle.done;
  } finally {
    progress?.end();
  }
  if (reportPath !== undefined) writeFileSync(reportPath, `${JSON.stringify(report, null, 2)}\n`);
  if (report.complete) log.info(summary(report));
  else log.warn("QEMU ended before all RAM was in");
}

function summary(report: LoadReport): string {
  const { resumedMs, residentMs, pages, bytes, mode } = report;
  const times = [
    resumedMs === null ? "not resumed" : `resumed after ${formatMs(resumedMs)}`,
    residentMs === null ? "" : `all RAM in after ${formatMs(residentMs)}`,
  ].filter(Boolean);
  if (mode === "copy") return times.join(", ");
  return (
    `${times.join(", ")}: ${formatBytes(bytes.fault + bytes.eager)}, ${pages.fault} pages by ` +
    `${report.faults} faults, ${pages.eager} by the eager load`
  );
}

function workingSet(flag: string | undefined, snapshot: string): { workingSet?: string } {
  return flag === "none" ? {} : { workingSet: flag ?? `${snapshot}.fslws` };
}
