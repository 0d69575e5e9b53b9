/**
 * What `fsl load` and `fsl resume` have in common: how pages are served, what signals do, which
 * exit code comes out.
 */
import type { ArgsDef } from "citty";
import {
  EXIT_CODES,
  type ExitStatus,
  FslError,
  type OnError,
  type ServedTarget,
  type ServingOptions,
} from "../index.ts";
import { byteSize, wholeNumber } from "./arguments.ts";
import { formatMs } from "./format.ts";
import { log } from "./log.ts";

/**
 * After a signal to end, a QEMU that cannot (a vCPU waits for a page that cannot be read) is
 * killed.
 */
const GRACE_MS_DEFAULT = "10000";
const ERROR_LIMIT_MS_DEFAULT = "30000";
const AS_BEFORE = "see fsl load; default: as the load was begun";
/**
 * A signal that comes sooner is the same one: who sends one to a process may send it to its group too.
 */
const SECOND_SIGNAL_MS = 1_000;

export const servingArgs = {
  "on-error": {
    type: "enum",
    options: ["wait", "poison", "kill"],
    default: "wait",
    description: "a page stays unreadable: its vCPU waits on, gets SIGBUS, or QEMU is killed",
  },
  "error-limit-ms": {
    type: "string",
    valueHint: "ms",
    default: ERROR_LIMIT_MS_DEFAULT as string,
    description: "how long a page is tried for before --on-error poison or kill",
  },
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
  "grace-ms": {
    type: "string",
    valueHint: "ms",
    default: GRACE_MS_DEFAULT as string,
    description:
      "after SIGTERM, SIGINT, SIGHUP or SIGQUIT: how long a QEMU that fsl started may take before it is killed",
  },
  quiet: { type: "boolean", alias: "q", description: "no progress, no remarks; errors only" },
} satisfies ArgsDef;

export interface ServingFlags {
  readonly "on-error"?: string | undefined;
  readonly "error-limit-ms"?: string | undefined;
  readonly "eager-workers"?: string | undefined;
  readonly "eager-rate"?: string | undefined;
}

/** The same for a load that has been served before: what is not said is as it was. */
export const resumingArgs = {
  ...servingArgs,
  "on-error": { ...withoutDefault(servingArgs["on-error"]), description: AS_BEFORE },
  "error-limit-ms": { ...withoutDefault(servingArgs["error-limit-ms"]), description: AS_BEFORE },
  "eager-workers": { ...servingArgs["eager-workers"], description: AS_BEFORE },
  "eager-rate": { ...servingArgs["eager-rate"], description: `${AS_BEFORE}; 0: none` },
} satisfies ArgsDef;

function withoutDefault<T extends { default: unknown }>(arg: T): Omit<T, "default"> {
  const { default: _, ...rest } = arg;
  return rest;
}

/** @throws FslError USAGE */
export function servingOptions(flags: ServingFlags): ServingOptions {
  const { "on-error": onError, "eager-workers": workers, "eager-rate": rate } = flags;
  const limit = flags["error-limit-ms"];
  return {
    ...(onError === undefined ? {} : { onError: onErrorOf(onError) }),
    ...(limit === undefined
      ? {}
      : { errorLimitMs: wholeNumber(limit, "error-limit-ms", 0, 86_400_000) }),
    logger: log,
    eager: {
      ...(workers === undefined ? {} : { workers: wholeNumber(workers, "eager-workers", 1, 8) }),
      ...(rate === undefined ? {} : { bytesPerSecond: byteSize(rate, "eager-rate") }),
    },
  };
}

function onErrorOf(text: string): OnError {
  if (text === "wait" || text === "poison" || text === "kill") return text;
  throw new FslError("USAGE", `--on-error: expected wait, poison or kill, found '${text}'`);
}

export function graceMs(flags: { readonly "grace-ms"?: string | undefined }): number {
  return wholeNumber(flags["grace-ms"] ?? GRACE_MS_DEFAULT, "grace-ms", 0, 3_600_000);
}

/**
 * fsl itself never ends on a signal: it serves until QEMU is gone. Called before there is a QEMU:
 * one that was started in the moment in which fsl died of a signal would wait for a state for ever.
 */
export function forwardSignals(grace: number): SignalForwarding {
  let target: ServedTarget | undefined;
  let received: NodeJS.Signals | null = null;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const forward = (signal: NodeJS.Signals): void => {
    received ??= signal;
    target?.signal(signal);
    timer ??= setTimeout(() => {
      log.warn(`QEMU did not end within ${formatMs(grace)} of ${signal}: killed`);
      target?.kill();
    }, grace);
  };
  // What QEMU makes of these is QEMU's affair: they need not end it.
  const passOn = (signal: NodeJS.Signals): void => target?.signal(signal);
  const letGo = catchSignals(forward, passOn);
  return {
    get received() {
      return received;
    },
    to(found) {
      target = found;
      if (received !== null) target.signal(received);
    },
    stop() {
      clearTimeout(timer);
      letGo();
    },
  };
}

export interface SignalForwarding {
  /** The first signal that came, if any did. */
  readonly received: NodeJS.Signals | null;
  /** Who gets the signals from now on, and one that has come already. */
  to(target: ServedTarget): void;
  stop(): void;
}

/** What signals do where QEMU is not fsl's to end: see `heedSignals`. */
export interface SignalHeed {
  /** The first signal that came, if any did. */
  readonly received: NodeJS.Signals | null;
  /** Aborted by a signal: whoever has not gone too far yet gives up. */
  readonly cancel: AbortSignal;
  /** Resolves with the first signal. */
  readonly first: Promise<void>;
  /** Resolves with the signal by which somebody insists, see `seeThrough`. */
  readonly insisted: Promise<NodeJS.Signals>;
  /**
   * From now on the load is to be seen through: a signal makes it hurry. A page that cannot be read
   * can keep it for ever, though: SIGINT or SIGTERM once more means that fsl is to end at once.
   */
  seeThrough(hurry: () => void): void;
  stop(): void;
}

/**
 * Signals where QEMU is somebody else's, or lives on by itself: it gets none of them. Its pages need
 * fsl all the same, so once it has its state fsl ends only when they are all there.
 */
export function heedSignals(): SignalHeed {
  const cancel = new AbortController();
  const first = Promise.withResolvers<void>();
  const insisted = Promise.withResolvers<NodeJS.Signals>();
  let hurry: (() => void) | undefined;
  let received: NodeJS.Signals | null = null;
  let hurriedAtMs = 0;
  const heed = (signal: NodeJS.Signals): void => {
    received ??= signal;
    first.resolve();
    if (hurry === undefined) {
      cancel.abort(new FslError("TARGET_LOST", `the load was given up on ${signal}`, { signal }));
      return;
    }
    if (hurriedAtMs === 0) {
      hurriedAtMs = performance.now();
      log.info(
        `${signal}: QEMU needs fsl until all its RAM is in, which comes without a limit now; ` +
          "SIGINT or SIGTERM once more ends fsl, and the guest waits for: fsl resume",
      );
      hurry();
      return;
    }
    // A terminal that is closed sends SIGHUP whatever else was sent.
    const isMeant = signal !== "SIGHUP" && performance.now() - hurriedAtMs >= SECOND_SIGNAL_MS;
    if (isMeant) insisted.resolve(signal);
  };
  const ignore = (signal: NodeJS.Signals): void =>
    log.info(`${signal}: ignored; the guest needs fsl until all its RAM is in`);
  const letGo = catchSignals(heed, ignore);
  return {
    get received() {
      return received;
    },
    cancel: cancel.signal,
    first: first.promise,
    insisted: insisted.promise,
    seeThrough(toHurry) {
      hurry = toHurry;
      if (received !== null) heed(received);
    },
    stop: letGo,
  };
}

/**
 * Somebody insists that fsl ends before all RAM is in. All that another one needs is in QEMU.
 * @returns the exit code
 */
export function leave(signal: NodeJS.Signals, pid: number, supplyFailed: boolean): number {
  log.warn(
    `${signal}: fsl ends; QEMU ${pid} waits where it needs a page, until: fsl resume --pid ${pid}`,
  );
  return exitCodeOf({ exitCode: null, signal }, supplyFailed);
}

/** Who presses keys, stops services or closes terminals sends these. */
const SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"] as const;

/** The others that would end a process and can be caught. A guest must not wait for ever because of them. */
const OTHER_SIGNALS = [
  "SIGUSR1",
  "SIGUSR2",
  "SIGALRM",
  "SIGVTALRM",
  "SIGPROF",
  "SIGIO",
  "SIGXCPU",
] as const;

/** All signals that are caught. */
export const CAUGHT_SIGNALS = [...SIGNALS, ...OTHER_SIGNALS] as const;

type SignalHandler = (signal: NodeJS.Signals) => void;

/** @returns what makes them end this process again */
function catchSignals(onEnding: SignalHandler, onOther: SignalHandler): () => void {
  for (const signal of SIGNALS) process.on(signal, onEnding);
  for (const signal of OTHER_SIGNALS) process.on(signal, onOther);
  return () => {
    for (const signal of SIGNALS) process.off(signal, onEnding);
    for (const signal of OTHER_SIGNALS) process.off(signal, onOther);
  };
}

/** QEMU's own exit code; 9 when pages stayed unreadable and that is why. */
export function exitCodeOf({ exitCode, signal }: ExitStatus, supplyFailed: boolean): number {
  if (supplyFailed) return EXIT_CODES.SUPPLY_FAILED;
  if (exitCode !== null) return exitCode;
  if (signal === null) return 0;
  // Bun has no names for real-time signals, and tells their numbers. Not imported above: that would take
  // 0.5 ms of each start.
  const { constants } = process.getBuiltinModule("node:os");
  return 128 + (constants.signals[signal as NodeJS.Signals] ?? Number(signal));
}
