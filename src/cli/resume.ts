/** `fsl resume`: goes on with a load whose fsl has died. */
import { resolve } from "node:path";
import { defineCommand } from "citty";
import {
  findLoads,
  FslError,
  reattachQemu,
  resumeLoad,
  type ResumeHandle,
  type TargetRecord,
} from "../index.ts";
import { PID_MAX, socketPath, wholeNumber } from "./arguments.ts";
import { log, setQuiet } from "./log.ts";
import { startProgress } from "./progress.ts";
import {
  exitCodeOf,
  forwardSignals,
  graceMs,
  heedSignals,
  leave,
  resumingArgs,
  servingOptions,
  type SignalHeed,
} from "./serve.ts";

export const resumeCommand = defineCommand({
  meta: { name: "resume", description: "Goes on with a load whose fsl has died" },
  args: {
    pid: {
      type: "string",
      valueHint: "pid",
      description: "the QEMU; default: the only one whose load nobody serves",
    },
    snapshot: { type: "string", valueHint: "path", description: "the snapshot, if it was moved" },
    qmp: { type: "string", valueHint: "path", description: "the QMP socket, if it was moved" },
    source: {
      type: "string",
      valueHint: "module",
      description: "the page source of a load that a program of yours began with one",
    },
    ...resumingArgs,
  },
  async run({ args: flags }) {
    const quiet = flags.quiet === true;
    setQuiet(quiet);
    const pid =
      flags.pid === undefined ? onlyUnserved() : wholeNumber(flags.pid, "pid", 1, PID_MAX);
    const handle = await resumeLoad({
      pid,
      reattach: (record) => {
        return reattachQemu(reachedBy(record, flags.qmp), (text) => log.warn(text));
      },
      ...(flags.snapshot === undefined ? {} : { snapshot: flags.snapshot }),
      ...(flags.source === undefined ? {} : { sourceModule: flags.source }),
      ...servingOptions(flags),
    });
    const signals = followSignals(handle, graceMs(flags));
    const progress = quiet ? undefined : startProgress(() => handle.progress());
    try {
      const complete = await Promise.race([handle.done, signals.insisted]);
      progress?.end();
      if (typeof complete === "string") {
        process.exitCode = leave(complete, pid, handle.supplyFailed);
        return;
      }
      if (complete) log.info("all RAM is in; QEMU runs on without fsl");
      else log.warn("QEMU ended before all RAM was in");
      if (handle.unfinished !== null) throw handle.unfinished;
      process.exitCode = exitCodeOf({ exitCode: 0, signal: null }, handle.supplyFailed);
    } finally {
      progress?.end();
      signals.stop();
      handle.target.close();
    }
  },
});

/** Passed on to a QEMU that was to end with its fsl; kept from one that is somebody else's. */
function followSignals(handle: ResumeHandle, grace: number): Pick<SignalHeed, "insisted" | "stop"> {
  if (!handle.target.endsWithFsl) {
    const heed = heedSignals();
    heed.seeThrough(() => handle.hurry());
    return heed;
  }
  const forwarding = forwardSignals(grace);
  forwarding.to(handle.target);
  return { insisted: new Promise(() => {}), stop: () => forwarding.stop() };
}

function reachedBy(record: TargetRecord, qmpPath: string | undefined): TargetRecord {
  if (qmpPath === undefined) return record;
  const controlPath = resolve(socketPath(qmpPath));
  return { ...record, controlPath, isControlOwn: false, isControlPrivate: false };
}

function onlyUnserved(): number {
  const waiting = findLoads(({ message }) => log.warn(message)).filter(({ served }) => !served);
  const [only] = waiting;
  if (only !== undefined && waiting.length === 1) return only.pid;
  if (only === undefined)
    throw new FslError("TARGET_LOST", "no load waits for anybody to go on with it");
  const pids = waiting.map(({ pid }) => pid).join(", ");
  throw new FslError("USAGE", `several loads wait: QEMU ${pids}; say which with --pid`);
}
