/**
 * Loads whose fsl has died. The target keeps the load state and the userfaultfd, so its vCPUs wait
 * and nothing is lost; another fsl finds both in /proc/PID/fd, takes the lock, wakes everybody who
 * waits, and goes on where the first one was.
 */
import { closeSync, constants, fstatSync, openSync, readdirSync } from "node:fs";
import { FslError, isFslError } from "../errors.ts";
import { type GuardedFile, SnapshotGuard } from "./guard.ts";
import { EAGAIN, O_CLOEXEC, LOCK_EX, LOCK_NB, LOCK_SH } from "../sys/abi.ts";
import { checkDescriptorLimit } from "../sys/limits.ts";
import * as sys from "../sys/native.ts";
import { Uffd } from "../uffd/uffd.ts";
import type { FoundTarget, TargetRecord } from "../vmm/target.ts";
import { HotplugHold } from "./hotplug.ts";
import { giveHugePagesBack } from "./huge-pages.ts";
import { adoptLeftState, adoptOrNull, openLeftState } from "./left-state.ts";
import { takeUserfaultfd } from "./left-userfaultfd.ts";
import { withRecorded } from "./recorded-serving.ts";
import { type LoadProgress, progressOf } from "./report.ts";
import { Serving, type ServingOptions } from "./serving.ts";
import {
  LoadState,
  PHASE_ARMED,
  PHASE_FINISHED,
  PHASE_HANDING_OVER,
  PHASE_RUNNING,
  PHASE_STATE_LOADED,
} from "./state.ts";
import { testBit } from "../bits.ts";
import { Crew } from "./workers.ts";

const LOCK_TRIES = 10;
const LOCK_PAUSE_MS = 10;

/** A load that some target is part of, served or not. */
export interface FoundLoad {
  readonly pid: number;
  readonly snapshotPath: string;
  readonly phase: "not begun" | "armed" | "handing over" | "loaded" | "running" | "finished";
  /** A living fsl holds its lock. */
  readonly served: boolean;
  readonly progress: LoadProgress;
  /** The page that was last found unreadable and is still missing. */
  readonly lastFailure: LoadState["lastFailure"];
}

/**
 * Takes the lock of a load state: two loaders on one target would share its events in silence.
 * @returns a descriptor that holds the lock until it is closed; also by the death of its owner
 * @throws FslError TARGET_LOST when another fsl holds it
 */
export function lockState(stateFd: number): number {
  // flock(2) belongs to the open file, and the target has a copy of ours: the lock needs an open
  // file of its own.
  const lockFd = openSync(`/proc/self/fd/${stateFd}`, "r+");
  let result = sys.flock(lockFd, LOCK_EX | LOCK_NB);
  // `fsl status` of somebody holds it for microseconds, to see whether it is free.
  for (let tries = 1; result === -EAGAIN && tries < LOCK_TRIES; tries += 1) {
    Bun.sleepSync(LOCK_PAUSE_MS);
    result = sys.flock(lockFd, LOCK_EX | LOCK_NB);
  }
  if (result === 0) return lockFd;
  closeSync(lockFd);
  const why = result === -EAGAIN ? "another fsl serves it" : sys.errnoText(-result);
  throw new FslError("TARGET_LOST", `load state: cannot be locked: ${why}`);
}

/**
 * The loads of all processes whose descriptors this user may see.
 * @param onRefused told of each load state that is not to be trusted
 */
export function findLoads(onRefused: (error: FslError) => void = () => {}): FoundLoad[] {
  const loads: FoundLoad[] = [];
  for (const entry of readdirSync("/proc")) {
    const pid = Number(entry);
    if (!Number.isInteger(pid) || pid === process.pid) continue;
    try {
      const load = lookAt(pid);
      if (load !== null) loads.push(load);
    } catch (error) {
      if (!isFslError(error)) throw error;
      onRefused(error);
    }
  }
  return loads;
}

/** A target that waits for its state, and whose fsl has left nothing in it. */
export function unbegunLoad(pid: number): FoundLoad {
  const progress = { dataBytes: 0, loadedBytes: 0, faults: 0, failedPages: 0 };
  return {
    pid,
    snapshotPath: "",
    phase: "not begun",
    served: false,
    progress,
    lastFailure: null,
  };
}

const PHASES: Readonly<Record<number, FoundLoad["phase"]>> = {
  [PHASE_ARMED]: "armed",
  [PHASE_HANDING_OVER]: "handing over",
  [PHASE_STATE_LOADED]: "loaded",
  [PHASE_RUNNING]: "running",
  [PHASE_FINISHED]: "finished",
};

/** Null for a process that is no target, or has just ended. */
function lookAt(pid: number): FoundLoad | null {
  const fd = openLeftState(pid);
  if (fd === null) return null;
  try {
    const state = adoptOrNull(fd, pid);
    if (state === null) return null;
    try {
      const served = sys.flock(fd, LOCK_SH | LOCK_NB) !== 0;
      return {
        pid,
        snapshotPath: state.metadata.snapshotPath,
        phase: PHASES[state.phase] ?? "armed",
        served,
        progress: progressOf(state, state.dataBytes),
        lastFailure: missingFailure(state),
      };
    } finally {
      state.unmap();
    }
  } finally {
    closeSync(fd);
  }
}

/** The page that was last found unreadable, unless it has come since. */
function missingFailure(state: LoadState): LoadState["lastFailure"] {
  const { lastFailure } = state;
  if (lastFailure === null) return null;
  const block = state.blocks.find(({ block: { idstr } }) => idstr === lastFailure.idstr);
  return block === undefined || testBit(block.done, lastFailure.pageIndex) ? null : lastFailure;
}

/**
 * What an earlier fsl, dead by now, has left in a target that may still wait for its state.
 * @returns null when there is nothing
 * @throws FslError TARGET_LOST when a living fsl serves it, or its load is to be gone on with;
 * TARGET_MISMATCH when what is there is not to be trusted
 */
export function findEarlier(pid: number): TargetRecord | null {
  const fd = openLeftState(pid);
  if (fd === null) return null;
  try {
    if (sys.flock(fd, LOCK_SH | LOCK_NB) !== 0) {
      throw new FslError("TARGET_LOST", `process ${pid}: another fsl is at work on it`, { pid });
    }
    const state = adoptOrNull(fd, pid);
    if (state === null) return UNKNOWN_RECORD;
    try {
      const { phase, metadata } = state;
      if (phase !== PHASE_STATE_LOADED && phase !== PHASE_RUNNING) return metadata.target;
      throw new FslError(
        "TARGET_LOST",
        `process ${pid}: it was given its state by a fsl that died; go on with: fsl resume --pid ${pid}`,
        { pid, snapshot: metadata.snapshotPath },
      );
    } finally {
      state.unmap();
    }
  } finally {
    closeSync(fd);
  }
}

/**
 * A guest that waits for pages which nobody brings cannot be saved: QEMU would wait for them, too. Nor can one that has
 * no state yet.
 * @throws FslError SAVE_FAILED for such a process
 */
export function refuseUnserved(pid: number): void {
  const load = lookAt(pid);
  if (load === null || load.served || load.phase === "finished") return;
  const what =
    load.phase === "armed"
      ? "has no guest: its fsl has died before it gave it a state; end it and load again"
      : `waits for pages of a load whose fsl has died; bring them first: fsl resume --pid ${pid}`;
  const details = { pid, snapshot: load.snapshotPath };
  throw new FslError("SAVE_FAILED", `save: QEMU (pid ${pid}) ${what}`, details);
}

/** Of a state that another version of fsl has made, or has not finished. */
const UNKNOWN_RECORD: TargetRecord = {
  pid: 0,
  controlPath: null,
  isControlOwn: false,
  isControlPrivate: false,
  endsWithFsl: false,
  undo: null,
};

export interface ResumeOptions extends ServingOptions {
  /** The target process. */
  readonly pid: number;
  /** Reaches the target again by the record that the first fsl left. */
  readonly reattach: (record: TargetRecord) => FoundTarget;
  /** Path of the snapshot, when it is not where it was. */
  readonly snapshot?: string;
  /**
   * Module of the page source, for a load that has one of the caller's own. What the load state
   * names is code to be run: the state is the word of whoever owns the target, so it does not do.
   */
  readonly sourceModule?: string;
}

export interface ResumeHandle {
  /** All RAM is in (true), or the target has ended before (false). */
  readonly done: Promise<boolean>;
  readonly exited: FoundTarget["exited"];
  readonly target: FoundTarget;
  progress(): LoadProgress;
  readonly supplyFailed: boolean;
  /** Why something of fsl is left in a target that lives, or it was not let go on. See `done`. */
  readonly unfinished: FslError | null;
  /** Brings in the rest as fast as it can, whatever its limit. */
  hurry(): void;
}

/**
 * Goes on with the load of a target whose fsl has died.
 * @returns when faults are served again and, if it was still to be, the guest was resumed
 * @throws FslError TARGET_LOST when there is no such load, another fsl serves it, or the state was
 * never handed over; TARGET_MISMATCH when the snapshot is not the same file any more, or what the
 * target holds is not to be trusted; SNAPSHOT_OPEN when it cannot be opened
 */
export async function resumeLoad(options: ResumeOptions): Promise<ResumeHandle> {
  const { pid } = options;
  checkDescriptorLimit();
  const stateFd = openLeftState(pid);
  if (stateFd === null) {
    throw new FslError("TARGET_LOST", `process ${pid}: has no load of fsl to go on with`, { pid });
  }
  const opened: number[] = [stateFd];
  let begun: Serving | undefined;
  let guard: SnapshotGuard | undefined;
  try {
    opened.push(lockState(stateFd));
    const state = adoptLeftState(stateFd, pid, true);
    checkModule(state, options.sourceModule);
    if (state.phase === PHASE_ARMED) {
      throw new FslError(
        "TARGET_LOST",
        `process ${pid}: its fsl died before the state was handed over, so nothing is lost; end it and load again`,
        { pid },
      );
    }
    const target = options.reattach(state.metadata.target);
    const uffd = new Uffd(takeUserfaultfd(target, state));
    opened.push(uffd.fd);
    const snapshot = openSameFile(state, options.snapshot);
    // Sources other than the file are made from what was recorded; the file's descriptor is a new
    // one.
    const adopted = withSource(state, snapshot.fd);
    const crew = new Crew();
    if (isFileSource(state)) guard = new SnapshotGuard(snapshot);
    const how = withRecorded(options, state.metadata.serving);
    const serving = new Serving(target, adopted, uffd, crew, how, undefined, guard);
    begun = serving;
    // The dead fsl may have read REMOVE events without marking their pages: nothing is copied
    // before that is done. The fault loop does it first of all, and opens the gate.
    if (adopted.metadata.canDiscard) adopted.closeGate();
    await serving.serveFaults();
    serving.wakeAll();
    await goOn(adopted, target, options.logger);
    const { dataBytes } = adopted;
    const { watched } = adopted.metadata;
    const hotplug = new HotplugHold(target, serving, watched, options.logger);
    let unfinished: FslError | null = null;
    const rest = bringRest(serving, target, adopted, hotplug, (error) => {
      unfinished ??= error;
    });
    const done = rest.finally(() => {
      snapshot.close();
      guard?.close();
      for (const fd of opened) sys.close(fd);
    });
    done.catch(() => {});
    return {
      done,
      target,
      exited: target.exited,
      progress: () => progressOf(adopted, dataBytes),
      get supplyFailed() {
        return serving.supplyFailed;
      },
      get unfinished() {
        return unfinished;
      },
      hurry: () => serving.hurry(),
    };
  } catch (error) {
    // Nothing is unregistered: whoever waits goes on waiting, and another fsl can try again.
    await begun?.stop();
    guard?.close();
    for (const fd of opened) sys.close(fd);
    throw error;
  }
}

async function bringRest(
  serving: Serving,
  target: FoundTarget,
  state: LoadState,
  hotplug: HotplugHold,
  onUnfinished: (error: FslError | null) => void,
): Promise<boolean> {
  const complete = await serving.bringRest();
  onUnfinished(await hotplug.end(complete));
  if (!complete) {
    await serving.stop();
    return false;
  }
  onUnfinished(await serving.finish());
  let isOver = false;
  target.exited.then(() => {
    isOver = true;
  });
  await giveHugePagesBack(target, state, () => isOver);
  return true;
}

/**
 * The first fsl may have died between handing over and resuming: what it had left to do is done
 * now.
 */
async function goOn(
  state: LoadState,
  target: FoundTarget,
  logger: ServingOptions["logger"],
): Promise<void> {
  if (state.phase === PHASE_HANDING_OVER) {
    const timer = setTimeout(() => {
      logger?.info(
        `${target.description} does not answer yet: it waits for a page, or another client is ` +
          "connected to its QMP socket",
      );
    }, SILENCE_MS);
    try {
      await seeLoaded(target);
    } finally {
      clearTimeout(timer);
    }
    state.phase = PHASE_STATE_LOADED;
  }
  if (state.phase === PHASE_STATE_LOADED) {
    if (state.metadata.paused) await target.putSettingsBack();
    else await target.resume();
    state.phase = PHASE_RUNNING;
  }
}

/** For as long as it takes: a page that the device state needs may be waited for. */
async function seeLoaded(target: FoundTarget): Promise<void> {
  let progress = await target.stateProgress();
  while (progress === "loading") {
    await Bun.sleep(STATE_PERIOD_MS);
    progress = await target.stateProgress();
  }
  if (progress === "loaded") return;
  throw new FslError(
    "TARGET_LOST",
    `${target.description}: its state was not loaded (${progress}); end it and load again`,
  );
}

/** How often a target that is loading its device state is asked, ms. */
const STATE_PERIOD_MS = 20;
/** After how long a target that does not answer is worth a word, ms. */
const SILENCE_MS = 10_000;

/** See `ResumeOptions.sourceModule`. */
function checkModule({ metadata }: LoadState, named: string | undefined): void {
  const { module } = metadata.source as { module?: unknown };
  if (module === named) return;
  const found = module === undefined ? "none, but the snapshot file" : JSON.stringify(module);
  throw new FslError(
    "TARGET_MISMATCH",
    `page source: expected ${named === undefined ? "none" : JSON.stringify(named)}, found ${found}; ` +
      "if that is your own module, name it with --source",
    { pid: metadata.target.pid },
  );
}

/**
 * Opened, not read: what is needed of it is in the load state, and its disk may be failing at this
 * moment.
 */
function openSameFile(
  state: LoadState,
  otherPath: string | undefined,
): GuardedFile & { close(): void } {
  const { snapshotPath, snapshotIdentity } = state.metadata;
  const path = otherPath ?? snapshotPath;
  let fd: number;
  try {
    fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK | O_CLOEXEC);
  } catch (cause) {
    const message = `${path}: ${(cause as Error).message}; if it was moved, say where it is with --snapshot`;
    throw new FslError("SNAPSHOT_OPEN", message, { path }, cause);
  }
  const stat = fstatSync(fd, { bigint: true });
  const identity = { size: Number(stat.size), mtimeNs: stat.mtimeNs.toString() };
  const { size, mtimeNs } = snapshotIdentity;
  // Another path may hold a copy: what counts is what was written when, not where.
  if (!stat.isFile() || identity.size !== size || identity.mtimeNs !== mtimeNs) {
    closeSync(fd);
    throw new FslError(
      "TARGET_MISMATCH",
      `${path}: expected the snapshot of ${size} bytes that the load began with, found another or changed file`,
      { path },
    );
  }
  return { path, fd, identity, close: () => closeSync(fd) };
}

/** Pages come from the snapshot file itself. */
function isFileSource(state: LoadState): boolean {
  const { source } = state.metadata;
  return typeof source === "object" && source !== null && !("module" in source);
}

/** The same state, with the default source's descriptor replaced by one of this process. */
function withSource(state: LoadState, fd: number): LoadState {
  if (!isFileSource(state)) return state;
  const metadata = { ...state.metadata, source: { options: { fd } } };
  return LoadState.attach({ ...state.handle, metadata });
}
