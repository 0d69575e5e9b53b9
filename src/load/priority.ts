/**
 * Who has the CPU: vCPUs and the fault loop before everything else of a load.
 *
 * At first the helpers of the eager load take only what nobody else wants (SCHED_IDLE: a
 * vCPU that wakes up has their CPU at once, where it would have to wait a little for a thread of nice
 * 19). The guest's first steps are what somebody waits for. Then they have a share of a busy host
 * too, or the load would never end. A helper that a vCPU waits for gets the vCPU's own priority (from
 * `FaultLoop`), and is put back here.
 *
 * JavaScript is compiled by threads of its own while it runs: 30 ms of CPU time at each load, just when
 * QEMU starts and the guest takes its first steps. So it is compiled later than it would be, in a Worker
 * until the guest turns out to read much, and in the executable's main thread for good (scripts/build.ts);
 * and the threads that do it have what nobody else wants until all RAM is in.
 */
import { readdirSync, readFileSync } from "node:fs";
import { SCHED_IDLE, SCHED_OTHER } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";

/** Of the eager Worker itself, as long as its helpers are gentle: it has little to do. */
const GENTLE_NICE = 19;
/** How long helpers are so gentle, ms. */
const GENTLE_MS = 100;
/** JavaScriptCore's name for its compiling threads. */
const COMPILER_NAME = "JITWorker";

/** Of who loads eagerly: for helpers in the target, and for the calling thread if that does nothing else. */
export class Priority {
  readonly #helperPids: readonly number[];
  readonly #nice: number;
  /** 0: is left as it is. */
  readonly #thread: number;
  #gentleUntilMs: number;

  /**
   * @param nice of the helpers after that; 0..19
   * @param isForThread of the calling thread, too
   */
  constructor(helperPids: readonly number[], nice: number, isForThread = true) {
    this.#helperPids = helperPids;
    this.#nice = nice;
    this.#thread = isForThread ? sys.gettid() : 0;
    // Whoever may not raise a priority could never take it back.
    this.#gentleUntilMs = mayRaise() ? performance.now() + GENTLE_MS : 0;
    this.#set();
  }

  /** Looked at often; changes something once. @param isBulk see `LoadState.isBulk` */
  look(isBulk: boolean): void {
    if (this.#gentleUntilMs === 0) return;
    if (!isBulk && performance.now() < this.#gentleUntilMs) return;
    this.#gentleUntilMs = 0;
    this.#set();
  }

  /** After so many ms `look` has something to do; -1 when it has not. */
  get gentleLeftMs(): number {
    if (this.#gentleUntilMs === 0) return -1;
    return Math.max(0, Math.ceil(this.#gentleUntilMs - performance.now()));
  }

  /** The eager load is over. */
  close(): void {
    compileIdly(false);
  }

  /** Helpers as they ought to be now: a chunk that was waited for has come. */
  putBack(): void {
    for (const pid of this.#helperPids) {
      sys.setpriority(pid, this.#nice);
      if (this.#gentleUntilMs > 0) sys.schedSetscheduler(pid, SCHED_IDLE);
    }
  }

  #set(): void {
    const isGentle = this.#gentleUntilMs > 0;
    if (this.#thread > 0) sys.setpriority(this.#thread, isGentle ? GENTLE_NICE : this.#nice);
    if (!isGentle) for (const pid of this.#helperPids) sys.schedSetscheduler(pid, SCHED_OTHER);
    this.putBack();
  }
}

/** A helper that a vCPU waits for. Where that is not permitted, what it brings comes a little later. */
export function raise(helperPid: number): void {
  sys.schedSetscheduler(helperPid, SCHED_OTHER);
  sys.setpriority(helperPid, 0);
}

/** Until they are raised, these helpers take only the CPU time that is left: QEMU is starting. */
export function readIdly(helperPids: readonly number[]): void {
  if (!mayRaise()) return;
  for (const pid of helperPids) sys.schedSetscheduler(pid, SCHED_IDLE);
}

/**
 * What compiles JavaScript in this process takes only the CPU time that is left, or as much as anybody.
 * Called when code has run for the first time, so that the threads are there.
 */
export function compileIdly(isIdle = true): void {
  if (!mayRaise()) return;
  for (const tid of readdirSync("/proc/self/task")) {
    try {
      const name = readFileSync(`/proc/self/task/${tid}/comm`, "latin1");
      if (!name.startsWith(COMPILER_NAME)) continue;
      sys.schedSetscheduler(Number(tid), isIdle ? SCHED_IDLE : SCHED_OTHER);
    } catch {
      // It has ended.
    }
  }
}

/**
 * How much more often code of a Worker runs before it is compiled, until there is much to do. A load has some
 * hundred steps in all, so that hardly any of it need be.
 */
const RELUCTANCE = 15;

/** For the calling thread: most of what runs in a load runs a few hundred times. */
export function compileReluctantly(): void {
  Bun.unsafe.setJITPolicy(RELUCTANCE);
}

/** For the calling thread, which will have much to do. */
export function compileReadily(): void {
  Bun.unsafe.setJITPolicy(1);
}

let isRaisable: boolean | undefined;

/**
 * Whether this process may give a thread back what it took from it (CAP_SYS_NICE, RLIMIT_NICE): tried
 * with the calling thread.
 */
function mayRaise(): boolean {
  return (isRaisable ??= tryToRaise());
}

function tryToRaise(): boolean {
  const stat = readFileSync("/proc/thread-self/stat", "latin1");
  // Fields from the third on, behind the name; proc_pid_stat(5) counts nice as the 19th.
  const nice = Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[16]);
  const thread = sys.gettid();
  return sys.setpriority(thread, nice + 1) === 0 && sys.setpriority(thread, nice) === 0;
}
