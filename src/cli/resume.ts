/** `fsl resume`: goes on with a load whose fsl has died. */
import { defineCommand } from "citty";
import { findLoads, FslError, reattachQemu, resumeLoad } from "../index.ts";
import { wholeNumber } from "./arguments.ts";
import { log, setQuiet } from "./log.ts";
import { startProgress } from "./progress.ts";
import { exitCodeOf, forwardSignals, graceMs, servingArgs, servingOptions } from "./serve.ts";

/** Linux's limit, /proc/sys/kernel/pid_max. */
const PID_MAX = 4_194_304;

export const resumeCommand = defineCommand({
  meta: { name: "resume", description: "Goes on with a load whose fsl has died" },
  args: {
    pid: {
      type: "string",
      valueHint: "pid",
      description: "the QEMU; default: the only one whose load nobody serves",
    },
    snapshot: { type: "string", valueHint: "path", description: "the snapshot, if it was moved" },
    ...servingArgs,
  },
  async run({ args: flags }) {
    const quiet = flags.quiet === true;
    setQuiet(quiet);
    const pid =
      flags.pid === undefined ? onlyUnserved() : wholeNumber(flags.pid, "pid", 1, PID_MAX);
    const handle = await resumeLoad({
      pid,
      reattach: reattachQemu,
      ...(flags.snapshot === undefined ? {} : { snapshot: flags.snapshot }),
      ...servingOptions(flags),
    });
    const forwarding = forwardSignals(graceMs(flags));
    forwarding.to(handle.target);
    const progress = quiet ? undefined : startProgress(() => handle.progress());
    try {
      const complete = await handle.done;
      progress?.end();
      if (complete) log.info("all RAM is in; QEMU runs on without fsl");
      else log.warn("QEMU ended before all RAM was in");
      process.exitCode = exitCodeOf({ exitCode: 0, signal: null }, handle.supplyFailed);
    } finally {
      progress?.end();
      forwarding.stop();
    }
  },
});

function onlyUnserved(): number {
  const waiting = findLoads().filter(({ served }) => !served);
  const [only] = waiting;
  if (only !== undefined && waiting.length === 1) return only.pid;
  if (only === undefined)
    throw new FslError("TARGET_LOST", "no load waits for anybody to go on with it");
  const pids = waiting.map(({ pid }) => pid).join(", ");
  throw new FslError("USAGE", `several loads wait: QEMU ${pids}; say which with --pid`);
}
