/** `fsl load`: flags in, QEMU's exit code out. */
import { writeFileSync } from "node:fs";
import { type ArgsDef, defineCommand } from "citty";
import {
  type EagerOptions,
  type ExitStatus,
  FslError,
  type LoadHandle,
  type LoadReport,
  loadSnapshot,
  spawnQemu,
  type Target,
} from "../index.ts";
import { byteSize, wholeNumber } from "./arguments.ts";
import { formatBytes, formatMs } from "./format.ts";
import { loadLogger, log, setQuiet } from "./log.ts";
import { startProgress } from "./progress.ts";

/** After a signal to end, a QEMU that cannot (a vCPU waits for a page that cannot be read) is killed. */
const GRACE_MS_DEFAULT = "10000";

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
  quiet: { type: "boolean", alias: "q", description: "no progress, no remarks; errors only" },
  "eager-workers": {
    type: "string",
    valueHint: "1..8",
    description: "threads that bring in what no one has asked for; default: CPUs, at most 2",
  },
  "eager-rate": {
    type: "string",
    valueHint: "bytes/s",
    description: "limit of the eager load, e.g. 200M; default: none",
  },
  "lazy-despite-discards": {
    type: "boolean",
    description: "shared memory and huge pages lazily although the guest may give memory back",
  },
  "grace-ms": {
    type: "string",
    valueHint: "ms",
    default: GRACE_MS_DEFAULT as string,
    description: "after SIGTERM, SIGINT or SIGHUP: how long QEMU may take before it is killed",
  },
} satisfies ArgsDef;

export const loadCommand = defineCommand({
  meta: {
    name: "load",
    description: "Starts a QEMU guest from a snapshot at once: fsl load SNAP [options] -- qemu-system-… args",
  },
  args,
  async run({ args: flags, data }) {
    const qemu = (data as { behind: string[] | null }).behind;
    if (qemu === null || qemu.length === 0) {
      throw new FslError("USAGE", "no QEMU command line: expected it behind --, found none");
    }
    setQuiet(flags.quiet === true);
    const graceMs = wholeNumber(flags["grace-ms"], "grace-ms", 0, 3_600_000);
    const eager = eagerOptions(flags["eager-workers"], flags["eager-rate"]);
    const target = spawnQemu({ argv: qemu });
    const stopForwarding = forwardSignals(target, graceMs);
    try {
      const handle = await loadSnapshot({
        snapshot: flags.snapshot,
        target,
        mode: flags.mode === "copy" ? "copy" : "lazy",
        paused: flags.paused === true,
        lazyDespiteDiscards: flags["lazy-despite-discards"] === true,
        eager,
        logger: loadLogger,
        startedAtMs: 0,
        ...(flags.offset === undefined ? {} : { snapshotOffset: byteSize(flags.offset, "offset") }),
      });
      await follow(handle, flags.quiet === true, flags.report);
      process.exitCode = exitCodeOf(await handle.exited);
    } finally {
      stopForwarding();
    }
  },
});

/** Shows the load as it goes, and writes its report when it is over. */
async function follow(handle: LoadHandle, quiet: boolean, reportPath: string | undefined): Promise<void> {
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

function eagerOptions(workers: string | undefined, rate: string | undefined): EagerOptions {
  return {
    ...(workers === undefined ? {} : { workers: wholeNumber(workers, "eager-workers", 1, 8) }),
    ...(rate === undefined ? {} : { bytesPerSecond: byteSize(rate, "eager-rate") }),
  };
}

/** fsl itself never ends on a signal: it serves until QEMU is gone. */
function forwardSignals(target: Target, graceMs: number): () => void {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const forward = (signal: NodeJS.Signals): void => {
    target.signal(signal);
    timer ??= setTimeout(() => {
      log.warn(`QEMU did not end within ${formatMs(graceMs)} of ${signal}: killed`);
      target.kill();
    }, graceMs);
  };
  const signals = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
  for (const signal of signals) process.on(signal, forward);
  return () => {
    clearTimeout(timer);
    for (const signal of signals) process.off(signal, forward);
  };
}

function exitCodeOf({ exitCode, signal }: ExitStatus): number {
  if (exitCode !== null) return exitCode;
  return 128 + (SIGNAL_NUMBERS[signal ?? ""] ?? 0);
}

/** signal(7); the numbers that a process can die of on x86_64 and aarch64. */
const SIGNAL_NUMBERS: Readonly<Record<string, number>> = {
  SIGHUP: 1,
  SIGINT: 2,
  SIGQUIT: 3,
  SIGILL: 4,
  SIGTRAP: 5,
  SIGABRT: 6,
  SIGBUS: 7,
  SIGFPE: 8,
  SIGKILL: 9,
  SIGUSR1: 10,
  SIGSEGV: 11,
  SIGUSR2: 12,
  SIGPIPE: 13,
  SIGALRM: 14,
  SIGTERM: 15,
  SIGSYS: 31,
};
