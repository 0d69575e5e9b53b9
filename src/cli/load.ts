/** `fsl load`: flags in, QEMU's exit code out. */
import { writeFileSync } from "node:fs";
import { type ArgsDef, defineCommand } from "citty";
import {
  FslError,
  isFslError,
  type LoadHandle,
  type LoadReport,
  loadSnapshot,
  spawnQemu,
} from "../index.ts";
import { byteSize } from "./arguments.ts";
import { formatBytes, formatMs } from "./format.ts";
import { log, setQuiet } from "./log.ts";
import { startProgress } from "./progress.ts";
import { exitCodeOf, forwardSignals, graceMs, servingArgs, servingOptions } from "./serve.ts";

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
    const serving = servingOptions(flags);
    const grace = graceMs(flags);
    // One a Worker; QEMU's own load has no use for any.
    const helperTasks = flags.mode === "copy" ? 0 : (serving.eager?.workers ?? 2);
    const forwarding = forwardSignals(grace);
    try {
      const target = spawnQemu({ argv: qemu, helperTasks });
      forwarding.to(target);
      const handle = await loadSnapshot({
        snapshot: flags.snapshot,
        target,
        mode: flags.mode === "copy" ? "copy" : "lazy",
        paused: flags.paused === true,
        lazyDespiteDiscards: flags["lazy-despite-discards"] === true,
        startedAtMs: 0,
        ...workingSet(flags["working-set"], flags.snapshot),
        ...serving,
        ...(flags.offset === undefined ? {} : { snapshotOffset: byteSize(flags.offset, "offset") }),
      });
      await follow(handle, flags.quiet === true, flags.report);
      process.exitCode = exitCodeOf(await handle.exited, handle.supplyFailed);
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
