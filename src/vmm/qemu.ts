/**
 * A QEMU that waits for its state (`-incoming defer`), as a `Target`. Shared by the QEMU that fsl
 * spawns and the one that somebody else started; what differs between the two is in `QemuProcess`.
 *
 * Runs on the main thread. Every wait is for QEMU's answer, its exit, or a deadline. While QEMU
 * loads its devices it may wait for a page: the fault loop serves that in its Worker, and needs
 * nothing of this file.
 */
import { closeSync, openSync } from "node:fs";
import { constants } from "node:os";
import { FslError, assert, isFslError } from "../errors.ts";
import { endHelper, type HelperRecord } from "../sys/helper-task.ts";
import * as native from "../sys/native.ts";
import { type Inventory, locateRegions, takeInventory, warmUp } from "./inventory.ts";
import {
  CAPABILITIES_IN_THE_WAY,
  type MigrationChanges,
  PARAMETERS_IN_THE_WAY,
} from "./migration-settings.ts";
import { type QmpClient, type QmpReply, formatVersion, isRecord } from "./qmp.ts";
import type { ExitStatus, StateLoaded, Target, TargetInfo, TargetRecord } from "./target.ts";
import {
  type TakenUserfaultfd,
  type UserfaultfdRequest,
  type UserfaultfdWay,
  closeRemote,
  makeUserfaultfd,
  receivePreloaded,
} from "./userfaultfd.ts";

/** The process behind a target. */
export interface QemuProcess {
  /** For messages: `qemu-system-x86_64 (pid 123)`. */
  readonly description: string;
  readonly pid: number;
  /** Owned by this object; open until `close`. */
  readonly pidfd: number;
  readonly exited: Promise<ExitStatus>;
  /** fsl's end of the preloaded library's socket, or -1. */
  readonly preloadSocket: number;
  /** Path of a QMP socket that a later fsl can connect to; null when there is none. */
  readonly controlPath: string | null;
  /** Whether the process runs the program that fsl started: `taskset` and scripts run another one. */
  readonly runsStartedProgram: boolean;
  /** fsl started it: to abandon it is to end it. */
  readonly isSpawned: boolean;
  /**
   * Called once QEMU has answered; the process may turn out to be another one (a wrapper script's
   * child).
   */
  identify(): void;
  /** Closes what this object holds; QEMU itself is not touched. Idempotent. */
  close(): void;
}

export interface QemuTargetOptions {
  /** Tests and `doctor` force one way; otherwise each is the other's fall-back. */
  readonly userfaultfdWay?: UserfaultfdWay;
}

/** Name of QEMU's own copy of the userfaultfd, among its `getfd` descriptors. */
export const USERFAULTFD_NAME = "fsl-uffd";

/** How long an exit may lag behind the end of the QMP connection. */
const EXIT_NOTICE_MS = 1_000;
/**
 * How long an abandoned QEMU may take to end in order (it removes its sockets and pid file) before
 * SIGKILL.
 */
const ABANDON_GRACE_MS = 2_000;
/** In case an event is lost: how often the progress of a load is asked for. */
const LOAD_CHECK_MS = 2_000;

type Phase = "new" | "connected" | "loading" | "loaded" | "released" | "abandoned";

export class QemuTarget implements Target {
  readonly exited: Promise<ExitStatus>;
  readonly #process: QemuProcess;
  readonly #qmp: QmpClient;
  readonly #options: QemuTargetOptions;
  readonly #inventory: Promise<Inventory>;
  /** Commands that have been sent and must have succeeded before the state is handed over. */
  readonly #prepared: Promise<unknown>[] = [];
  #known: Inventory | null = null;
  #phase: Phase = "new";
  /** The way that the userfaultfd was come by, for reports. */
  #way: UserfaultfdWay | null = null;
  #keptNames = new Set<string>();
  /** Helper tasks that nobody has taken. */
  #helpers: HelperRecord[] = [];

  /** @param qmp connected, not necessarily greeted yet; owned by the target from now on */
  constructor(process: QemuProcess, qmp: QmpClient, options: QemuTargetOptions = {}) {
    this.#process = process;
    this.#qmp = qmp;
    this.#options = options;
    this.exited = process.exited;
    // Asked at once: the answers are there a moment after QEMU is able to give them.
    this.#inventory = takeInventory(qmp);
    this.#inventory.catch(() => {});
    // While QEMU starts there is time to compile what runs when it is ready: 3 ms less then.
    setImmediate(warmUp);
  }

  get description(): string {
    return this.#process.description;
  }

  get pid(): number {
    return this.#process.pid;
  }

  get pidfd(): number {
    return this.#process.pidfd;
  }

  get userfaultfdWay(): UserfaultfdWay | null {
    return this.#way;
  }

  async connect(): Promise<TargetInfo> {
    assert(this.#phase === "new", `connect in phase ${this.#phase}`);
    // The negotiation is answered by QEMU's main loop: the machine is built.
    await this.#guard(this.#qmp.ready);
    const readyAtMs = performance.now();
    const known = await this.#guard(this.#inventory);
    this.#known = known;
    this.#phase = "connected";
    this.#process.identify();
    // QEMU works on these while the process's maps are read here.
    this.#prepare(known.settings.apply(LOAD_CHANGES));
    if (this.#process.isSpawned) this.#prepare(this.#clearAutostart());
    return {
      readyAtMs,
      version: formatVersion(known.version),
      machineType: known.machineType,
      regions: locateRegions(known.ramblocks, this.pid),
      canDiscard: known.canDiscard,
    };
  }

  record(): TargetRecord {
    assert(this.#known !== null, "record before connect");
    const { controlPath } = this.#process;
    return { pid: this.pid, controlPath, undo: this.#known.settings.undoRecord() };
  }

  async takeUserfaultfd(): Promise<number> {
    assert(this.#phase === "connected", `takeUserfaultfd in phase ${this.#phase}`);
    const taken = await this.#guard(this.#take());
    this.#way = taken.way;
    this.#helpers.push(...taken.helpers);
    try {
      const kept = this.keepDescriptor(USERFAULTFD_NAME, taken.fd);
      if (taken.remoteFd === null) {
        this.#prepare(kept);
      } else {
        await kept;
        // The named copy can be dropped by QMP when the load is over; the one made by ptrace only
        // by ptrace.
        closeRemote(this.#request(), taken.remoteFd);
      }
    } catch (error) {
      native.close(taken.fd);
      throw error;
    }
    return taken.fd;
  }

  takeHelpers(): HelperRecord[] {
    return this.#helpers.splice(0);
  }

  async keepDescriptor(name: string, fd: number): Promise<void> {
    await this.#guard(this.#qmp.request("getfd", { fdname: name }, { fd }));
    this.#keptNames.add(name);
  }

  async dropDescriptor(name: string): Promise<void> {
    this.#keptNames.delete(name);
    await this.#guard(this.#qmp.request("closefd", { fdname: name }));
  }

  async loadState(
    seedFd: number,
    streamOffset: number,
    capabilities: readonly string[] = [],
  ): Promise<StateLoaded> {
    const known = this.#known;
    assert(this.#phase === "connected" && known !== null, `loadState in phase ${this.#phase}`);
    if (!this.#process.isSpawned) this.#prepare(this.#clearAutostart());
    if (capabilities.includes(IGNORE_SHARED)) this.#prepare(this.#ignoreShared(known));
    // QEMU compares the access mode (it must be read-only) and does not seek: a new open file has
    // position 0.
    const readable = openSync(`/proc/self/fd/${seedFd}`, "r");
    try {
      const set = { "fdset-id": known.freeFdset };
      this.#prepare(this.#qmp.request("add-fd", set, { fd: readable }));
      await this.#guard(Promise.all(this.#prepared));
    } finally {
      closeSync(readable);
    }
    this.#phase = "loading";
    try {
      await this.#guard(this.#loadFrom(known, streamOffset));
    } finally {
      this.#qmp.execute("remove-fd", { "fdset-id": known.freeFdset }).catch(() => {});
    }
    this.#phase = "loaded";
    const status = await this.#guard(this.#qmp.request("query-status"));
    return { status: isRecord(status) ? String(status["status"]) : "unknown" };
  }

  async resume(): Promise<void> {
    await this.#guard(this.#qmp.request("cont"));
  }

  async pause(): Promise<void> {
    await this.#guard(
      this.#qmp.request("stop", undefined, { timeoutMs: Number.POSITIVE_INFINITY }),
    );
  }

  async abandon(): Promise<void> {
    if (this.#phase === "abandoned") return;
    const canUndo = this.#phase === "new" || this.#phase === "connected";
    this.#phase = "abandoned";
    if (this.#process.isSpawned) {
      await this.#end();
    } else if (canUndo && !this.#qmp.isClosed) {
      await this.#putBack().catch(() => {}); // The error that led here is the one to report.
    }
    this.close();
  }

  async release(): Promise<void> {
    assert(this.#phase === "loaded", `release in phase ${this.#phase}`);
    this.#phase = "released";
    this.#endHelpers();
    await this.#guard(this.#putBack());
    // The connection to a spawned QEMU stays: when the last monitor's client goes, QEMU closes
    // fdsets of the user's that are not in use at that moment.
    if (!this.#process.isSpawned) this.close();
  }

  kill(): void {
    this.#signal(constants.signals.SIGKILL);
  }

  signal(signal: NodeJS.Signals): void {
    this.#signal(constants.signals[signal]);
  }

  disconnect(): void {
    this.#qmp.close();
  }

  /** Closes fsl's descriptors: the QMP connection and the pidfd. QEMU goes on. Idempotent. */
  close(): void {
    this.#endHelpers();
    this.#qmp.close();
    this.#process.close();
  }

  async #take(): Promise<TakenUserfaultfd> {
    const way = this.#options.userfaultfdWay;
    if (this.#process.preloadSocket >= 0 && (way === undefined || way === "preload")) {
      const { preloadSocket, runsStartedProgram } = this.#process;
      const preloaded = receivePreloaded(preloadSocket, this.pid, runsStartedProgram);
      if (preloaded !== null) return preloaded;
    }
    if (way === "preload") {
      throw new FslError(
        "HOST_UNSUPPORTED",
        `userfaultfd: ${this.description} did not send one at its start`,
      );
    }
    return makeUserfaultfd(this.#request(), way);
  }

  #endHelpers(): void {
    for (const helper of this.#helpers.splice(0)) void endHelper(helper);
  }

  #request(): UserfaultfdRequest {
    return { pid: this.pid, pidfd: this.pidfd, qmp: this.#qmp, description: this.description };
  }

  /**
   * `stop` of a QEMU that waits for its state only clears autostart: whether the guest runs is
   * fsl's decision.
   */
  #clearAutostart(): Promise<unknown> {
    return this.#qmp.request("stop");
  }

  /** QEMU compares it with the snapshot's. Mapped-ram files know it since 11.0. */
  async #ignoreShared(known: Inventory): Promise<void> {
    if (known.version.major < IGNORE_SHARED_MAJOR_MIN) {
      throw new FslError(
        "TARGET_MISMATCH",
        `the snapshot was saved with ${IGNORE_SHARED}: expected QEMU ` +
          `${IGNORE_SHARED_MAJOR_MIN}.0 or later, found ${formatVersion(known.version)}`,
        { version: formatVersion(known.version), capability: IGNORE_SHARED },
      );
    }
    await known.settings.apply({ capabilities: { [IGNORE_SHARED]: true }, parameters: {} });
  }

  #prepare(work: Promise<unknown>): void {
    work.catch(() => {}); // loadState looks at it.
    this.#prepared.push(work);
  }

  /** Starts the load and waits for its end. From here on nothing can be undone. */
  async #loadFrom(known: Inventory, streamOffset: number): Promise<void> {
    const outcome = this.#watchLoad();
    try {
      const { major, minor } = known.version;
      const reply = await this.#qmp.execute("migrate-incoming", {
        uri: `file:/dev/fdset/${known.freeFdset}${streamOffset === 0 ? "" : `,offset=${streamOffset}`}`,
        // Since 9.1; before, QEMU exits when the load fails.
        ...(major > 9 || minor >= 1 ? { "exit-on-error": false } : {}),
      });
      if (!reply.ok) throw loadFailed(this.description, reply.description);
      await outcome.ended;
    } finally {
      outcome.stop();
    }
  }

  /**
   * Waits for the MIGRATION event that ends a load. Set up before the load starts, so that none is
   * missed.
   */
  #watchLoad(): { ended: Promise<void>; stop: () => void } {
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    promise.catch(() => {});
    const judge = (status: unknown, description: unknown): void => {
      if (status === "completed") resolve();
      else if (status === "failed")
        reject(loadFailed(this.description, String(description ?? "no reason given")));
    };
    const ask = async (): Promise<void> => {
      const progress = await this.#qmp.request("query-migrate", undefined, {
        timeoutMs: Number.POSITIVE_INFINITY,
      });
      if (isRecord(progress)) judge(progress["status"], progress["error-desc"]);
    };
    const stopEvents = this.#qmp.onEvent((event) => {
      if (event.name !== "MIGRATION") return;
      if (event.data["status"] === "failed") ask().catch(reject);
      else judge(event.data["status"], undefined);
    });
    let isAsking = false;
    const timer = setInterval(() => {
      if (isAsking) return; // QEMU's main loop is busy; one question waits already.
      isAsking = true;
      ask()
        .catch(reject)
        .finally(() => {
          isAsking = false;
        });
    }, LOAD_CHECK_MS);
    this.#qmp.closed.then(reject);
    const stop = (): void => {
      stopEvents();
      clearInterval(timer);
    };
    return { ended: promise, stop };
  }

  /** Capabilities, parameters and kept descriptors, as before fsl came. */
  async #putBack(): Promise<void> {
    const dropped = [...this.#keptNames].map((name) =>
      this.#qmp.execute("closefd", { fdname: name }),
    );
    this.#keptNames.clear();
    await Promise.all<QmpReply | void | undefined>([...dropped, this.#known?.settings.restore()]);
  }

  /** Ends a QEMU whose guest never ran. */
  async #end(): Promise<void> {
    this.#process.identify(); // A script's child would outlive the script.
    this.signal("SIGTERM");
    const timer = setTimeout(() => this.kill(), ABANDON_GRACE_MS);
    await this.exited;
    clearTimeout(timer);
  }

  #signal(number: number): void {
    native.pidfdSendSignal(this.pidfd, number); // ESRCH: it has ended already.
  }

  /** Gives an error that a dead QEMU caused its real reason. */
  async #guard<T>(work: Promise<T>): Promise<T> {
    try {
      return await work;
    } catch (error) {
      if (!isFslError(error) || !this.#qmp.isClosed || this.#phase === "abandoned") throw error;
      const exit = await Promise.race([this.exited, Bun.sleep(EXIT_NOTICE_MS)]);
      if (exit === undefined) throw error;
      throw new FslError(
        "TARGET_LOST",
        `${this.description} ended ${formatExit(exit)} ${PHASE_WORDS[this.#phase]}; its own message, if any, is above`,
        { ...exit },
        error,
      );
    }
  }
}

const PHASE_WORDS: Readonly<Record<Phase, string>> = {
  new: "before it could take a state",
  connected: "before it was given its state",
  loading: "while it loaded its state",
  loaded: "after it had loaded its state",
  released: "after the load",
  abandoned: "when it was given up",
};

/** `with exit code 1` or `by SIGSEGV` */
export function formatExit(exit: ExitStatus): string {
  return exit.signal === null
    ? `with exit code ${exit.exitCode ?? "unknown"}`
    : `by ${exit.signal}`;
}

/** Shared memory that is a named file is not in such a snapshot. */
const IGNORE_SHARED = "x-ignore-shared";
/** @source QEMU migration/ram.c parse_ramblock: before, the block's address was not read */
const IGNORE_SHARED_MAJOR_MIN = 11;

/** What must be set for a mapped-ram load, and what must not. */
const LOAD_CHANGES: MigrationChanges = {
  capabilities: {
    ...Object.fromEntries(CAPABILITIES_IN_THE_WAY.map((name) => [name, false])),
    "mapped-ram": true,
    events: true,
  },
  parameters: PARAMETERS_IN_THE_WAY,
};

function loadFailed(who: string, description: string): FslError {
  return new FslError(
    "TARGET_MISMATCH",
    `${who} could not load the device state: ${description}; its own message is above. ` +
      "Usually its devices differ from those of the QEMU that made the snapshot",
    { description },
  );
}
