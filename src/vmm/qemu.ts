/**
 * A QEMU that waits for its state (`-incoming defer`), as a `Target`. Shared by the QEMU that fsl
 * spawns and the one that somebody else started; what differs between the two is in `QemuProcess`.
 *
 * Runs on the main thread. Every wait is for QEMU's answer, its exit, or a deadline. While QEMU
 * loads its devices it may wait for a page: the fault loop serves that in its Worker, and needs
 * nothing of this file.
 */
import { closeSync, openSync } from "node:fs";
import { resolve } from "node:path";
import { FslError, assert, isFslError } from "../errors.ts";
import { endHelper, type HelperRecord } from "../sys/helper-task.ts";
import { checkDescriptorRoom, defaultWidth } from "../sys/limits.ts";
import { HOST_PAGE_LENGTH } from "../sys/host-pages.ts";
import * as native from "../sys/native.ts";
import { nodeOs } from "../sys/node-os.ts";
import { Control, PROBE_NAME, proveProcess } from "./control.ts";
import { anyFdset, dropLeftSeeds } from "./fdset.ts";
import { watchHotplugOf } from "./hotplug-watch.ts";
import { type Inventory, locateRegions, takeInventory, warmUp } from "./inventory.ts";
import {
  CAPABILITIES_IN_THE_WAY,
  type MigrationChanges,
  MigrationSettings,
  PARAMETERS_IN_THE_WAY,
  parseUndo,
} from "./migration-settings.ts";
import { injectHelpers, mayInject, SOCKET_NAME } from "./injection.ts";
import { linksOf } from "./process-links.ts";
import { ProcessMaps } from "./process-maps.ts";
import { type QmpClient, type QmpReply, formatVersion, isRecord } from "./qmp.ts";
import {
  EXIT_NOTICE_MS,
  type ExitStatus,
  type GuestRegion,
  type HotplugWants,
  KEPT_STATE,
  KEPT_STATE_LINK,
  type StateLoad,
  type Target,
  type TargetGuess,
  type TargetInfo,
  type TargetRecord,
} from "./target.ts";
import {
  DEVICE_NAME,
  type TakenUserfaultfd,
  type UserfaultfdRequest,
  type UserfaultfdWay,
  closeRemote,
  isOfProcess,
  makeUserfaultfd,
  receivePreloaded,
} from "./userfaultfd.ts";

/** The seed of a QEMU that was given it at its start. */
export interface GivenSeed {
  /** Descriptor of the file, still empty, open for writing. */
  readonly file: number;
  /** QEMU's descriptor set with that file in it. */
  readonly set: number;
}

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
  /** Its file is the target's to close. */
  readonly seed?: GivenSeed;
  /** Path of a QMP socket that a later fsl can connect to; null when there is none. */
  readonly controlPath: string | null;
  /** See `TargetRecord`. */
  readonly isControlOwn: boolean;
  /** Whether the process runs the program that fsl started: `taskset` and scripts run another one. */
  readonly runsStartedProgram: boolean;
  /** fsl started it: to abandon it is to end it. */
  readonly isSpawned: boolean;
  /** See `TargetRecord`. */
  readonly endsWithFsl: boolean;
  /** `-S`: the guest is to stay stopped. */
  readonly startsStopped: boolean;
  /** What its command line tells, unless it turns out to be another program's. */
  readonly hasNoDiscards: boolean;
  readonly hasDefaultSettings: boolean;
  readonly hasPlainMemory: boolean;
  /** Null when it does not tell. */
  readonly vcpus: number | null;
  /**
   * Called once QEMU has answered; the process may turn out to be another one (a wrapper script's
   * child).
   */
  identify(): void;
  /**
   * Closes what this object holds; QEMU itself is not touched. Idempotent.
   * @param isOver the load is: nobody will come back to go on with it
   */
  close(isOver: boolean): void;
}

export interface QemuTargetOptions {
  /** Tests and `doctor` force one way; otherwise each is the other's fall-back. */
  readonly userfaultfdWay?: UserfaultfdWay;
  /** Helper tasks to be made in a QEMU that runs already, 0 to 9; as many as a load has by default when left out. */
  readonly helperTasks?: number;
  /** What a person may want to know of the connection while RAM comes in. */
  readonly notice?: (text: string) => void;
}

/** Name of QEMU's own copy of the userfaultfd, among its `getfd` descriptors. */
export const USERFAULTFD_NAME = "fsl-uffd";

/** What a dead fsl can have left under a name in a QEMU that still waits for its state. */
const LEFT_NAMES = [USERFAULTFD_NAME, KEPT_STATE, DEVICE_NAME, PROBE_NAME, SOCKET_NAME];

/**
 * How long an exit may lag behind another sign of it than the end of the QMP connection. Of somebody else's QEMU it is
 * looked for every 250 ms.
 */
const EXIT_LAG_MS = 400;
/**
 * How long an abandoned QEMU may take to end in order (it removes its sockets and pid file) before
 * SIGKILL.
 */
const ABANDON_GRACE_MS = 2_000;
/** QEMU's monitor greets within half a millisecond, unless somebody else is connected to it. */
const GREETING_LAG_MS = 5;
/** In case an event is lost: how often the progress of a load is asked for. */
const LOAD_CHECK_MS = 2_000;
/** And when the connection was cut meanwhile. */
const LOAD_LOOK_MS = 20;
/** Chunks that each helper in somebody else's QEMU has room for: a packet's most, src/load/chunk-queue.ts. */
const INJECTED_SLOTS = 16;
/** How often the preloaded library's message is looked for while QEMU starts. */
const EARLY_PERIOD_MS = 2;
/** How often QEMU's maps are read while it builds its machine, for a guess at where its RAM is. */
const MAPS_PERIOD_MS = 6;
/** After SHUTDOWN: how long QEMU is watched, how often, and how long it may take for an answer. */
const END_WATCH_MS = 10_000;
const END_LOOK_MS = 200;
const END_ANSWER_MS = 1_000;

type Phase = "new" | "connected" | "loading" | "loaded" | "released" | "abandoned";

export class QemuTarget implements Target {
  readonly exited: Promise<ExitStatus>;
  readonly #process: QemuProcess;
  readonly #control: Control;
  /** Another one when that one was cut, and made again. */
  #qmp: QmpClient;
  readonly #options: QemuTargetOptions;
  readonly #inventory = Promise.withResolvers<Inventory>();
  /** What is done when QEMU greets, which is before it is ready. */
  readonly #met: Promise<void>;
  /** Commands that have been sent and must have succeeded before the state is handed over. */
  readonly #prepared: Promise<unknown>[] = [];
  #known: Inventory | null = null;
  /** What was changed before anything was asked; `undefined`: nothing. */
  readonly #defaultSettings: MigrationSettings | undefined;
  /** The negotiation is answered by QEMU's main loop: the machine is built. */
  readonly #readyAtMs: Promise<number>;
  #isReady = false;
  /** Of a QEMU of our own, whose memory nobody changes: while it builds its machine, then when it is ready. */
  #maps: ProcessMaps | undefined;
  /** Has been sent to QEMU, and nobody has taken it. */
  #preloaded: TakenUserfaultfd | null = null;
  #phase: Phase = "new";
  /** The way that the userfaultfd was come by, for reports. */
  #way: UserfaultfdWay | null = null;
  /** The descriptor set that holds the seed. */
  #seedSet: number;
  /** Nobody has taken it. */
  #seedFile: number | undefined;
  #isSeeded = false;
  /** Take seeds out of QEMU's descriptor sets. */
  readonly #dropSeedsLater: (() => Promise<void>)[] = [];
  #keptNames = new Set<string>();
  /** Helper tasks that nobody has taken. */
  #helpers: HelperRecord[] = [];
  /** Of a program that was not QEMU: somebody may still read ahead with them. */
  #strangers: HelperRecord[] = [];
  #earlier: TargetRecord | null = null;
  #settingsBack: Promise<void> = Promise.resolve();
  #isEndWatched = false;
  /** By QEMU's events: the guest runs. */
  #isRunning = false;
  #wasCut = false;
  #isClosed = false;

  /** @param qmp connected, not necessarily greeted yet; owned by the target from now on */
  constructor(process: QemuProcess, qmp: QmpClient, options: QemuTargetOptions = {}) {
    this.#process = process;
    this.#qmp = qmp;
    this.#options = options;
    this.exited = process.exited;
    this.#control = new Control(process, qmp, {
      onConnected: (again) => this.#goOnWith(again),
      notice: options.notice,
    });
    this.#heedEvents(qmp);
    this.#inventory.promise.catch(() => {});
    // Nothing is done before this, although much is when QEMU is ready.
    this.#readyAtMs = qmp.ready.then(() => performance.now());
    this.#readyAtMs.catch(() => {});
    this.#met = qmp.greeted.then(() => this.#meet(qmp));
    this.#met.catch(() => {});
    const { isSpawned, hasDefaultSettings, seed } = process;
    this.#defaultSettings = hasDefaultSettings ? MigrationSettings.ofNewQemu(qmp) : undefined;
    this.#seedFile = seed?.file;
    this.#seedSet = seed?.set ?? anyFdset();
    if (seed !== undefined) this.#dropSeedLater({ "fdset-id": seed.set }, Promise.resolve());
    // While QEMU starts there is time to compile what runs when it is ready: 3 ms less then.
    if (isSpawned) setImmediate(warmUp);
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

  get isAttached(): boolean {
    return !this.#process.isSpawned;
  }

  get isCommitted(): boolean {
    return ["loading", "loaded", "released"].includes(this.#phase);
  }

  /** It has not begun to take its state, and has not been given up. */
  get #canUndo(): boolean {
    return this.#phase === "new" || this.#phase === "connected";
  }

  forgetEarlier(record: TargetRecord): void {
    this.#earlier = record;
  }

  get userfaultfdWay(): UserfaultfdWay | null {
    return this.#way;
  }

  /**
   * QEMU has greeted, and builds its machine: what can be done 20 ms before it answers the first
   * question.
   */
  #meet(qmp: QmpClient): void {
    this.#process.identify();
    // First: the next descriptor cannot be sent before QEMU has answered for this one.
    this.#takePreloaded();
    const { isSpawned, hasNoDiscards, vcpus } = this.#process;
    const settings = this.#defaultSettings;
    const known = { isWaiting: isSpawned, hasNoDiscards, vcpus, ...(settings ? { settings } : {}) };
    // Asked now: the answers are there a moment after QEMU is able to give them.
    this.#inventory.resolve(takeInventory(qmp, known));
    if (this.isAttached || !this.#process.runsStartedProgram) return;
    // Of our own nothing is lost if it turns out to be another QEMU than it should be.
    if (settings !== undefined) this.#prepare(settings.apply(LOAD_CHANGES));
    this.#readMaps();
    const timer = setInterval(() => this.#readMaps(), MAPS_PERIOD_MS);
    const stop = (): void => {
      this.#isReady = true;
      clearInterval(timer);
    };
    this.#qmp.ready.then(() => {
      stop();
      // While QEMU answers: what it maps last is in no earlier account.
      this.#readMaps();
    }, stop);
  }

  #readMaps(): void {
    try {
      this.#maps = ProcessMaps.read(this.pid);
    } catch {
      // They are read again.
    }
  }

  async connect(): Promise<TargetInfo> {
    assert(this.#phase === "new", `connect in phase ${this.#phase}`);
    const readyAtMs = await this.#guard(this.#readyAtMs);
    await this.#guard(this.#met);
    const known = await this.#guard(this.#inventory.promise.then((asked) => this.#judge(asked)));
    this.#known = known;
    this.#phase = "connected";
    // What was set when it greeted is not sent again.
    this.#prepare(known.settings.apply(LOAD_CHANGES));
    const regions = await this.#guard(this.#locate(known));
    return {
      readyAtMs,
      version: formatVersion(known.version),
      machineType: known.machineType,
      regions,
      canDiscard: known.canDiscard,
      vcpus: known.vcpus,
      startsStopped: this.#process.startsStopped,
    };
  }

  async asked(): Promise<void> {
    // A QEMU that starts greets when there is nothing else to do any more.
    if (!this.isAttached) return;
    await Promise.race([this.#met.catch(() => {}), Bun.sleep(GREETING_LAG_MS)]);
  }

  /** By the account of QEMU's memory that is there; where that cannot be right, by a new one. */
  async #locate({ ramblocks, hasHelpers }: Inventory): Promise<GuestRegion[]> {
    const maps = this.#maps;
    this.#maps = undefined;
    if (maps !== undefined) {
      try {
        return locateRegions(ramblocks, this.pid, hasHelpers, maps);
      } catch (error) {
        if (!isFslError(error)) throw error;
      }
    }
    return locateRegions(ramblocks, this.pid, hasHelpers);
  }

  async guess(lengths: readonly number[]): Promise<TargetGuess | null> {
    const { hasPlainMemory, hasNoDiscards, startsStopped } = this.#process;
    if (!hasPlainMemory || !hasNoDiscards) return null;
    let looked: ProcessMaps | undefined;
    while (this.#phase === "new" && !this.#isReady && !this.#isClosed) {
      const [maps, preloaded] = [this.#maps, this.#preloaded];
      if (maps !== undefined && maps !== looked && preloaded !== null) {
        looked = maps;
        const areas = lengths.map((length) => maps.privateAreas(length));
        // Two of one length could be one another.
        if (areas.some((found) => found.length > 1)) return null;
        const regions = areas.flat().map((hostAddr) => ({ hostAddr, pageSize: HOST_PAGE_LENGTH }));
        if (regions.length === lengths.length) {
          return { regions, uffdFd: preloaded.fd, startsStopped };
        }
      }
      await Bun.sleep(EARLY_PERIOD_MS);
    }
    return null;
  }

  record(): TargetRecord {
    const { controlPath, isControlOwn, isSpawned, endsWithFsl } = this.#process;
    return {
      pid: this.pid,
      controlPath: controlPath === null ? null : resolve(controlPath),
      isControlOwn,
      isControlPrivate: isSpawned,
      endsWithFsl,
      undo: (this.#known?.settings ?? this.#defaultSettings)?.undoRecord() ?? {},
    };
  }

  async takeUserfaultfd(): Promise<number> {
    assert(this.#phase === "connected", `takeUserfaultfd in phase ${this.#phase}`);
    this.#endStrangers();
    if (this.isAttached) {
      // A refused setting is told while not one byte of somebody else's memory is touched.
      await this.#guard(Promise.all(this.#prepared));
    }
    const preloaded = this.#preloaded;
    this.#preloaded = null;
    if (preloaded !== null) return preloaded.fd;
    const taken = await this.#guard(this.#make());
    this.#way = taken.way;
    const kept = this.keepDescriptor(USERFAULTFD_NAME, taken.fd);
    kept.catch(() => {}); // `loadState` waits for the answer.
    if (taken.remoteFd === null) return taken.fd;
    try {
      await kept;
    } catch (error) {
      native.close(taken.fd);
      throw error;
    } finally {
      // The named copy can be dropped by QMP when the load is over; the one made by ptrace only by
      // ptrace.
      closeRemote(this.#request(), taken.remoteFd);
    }
    return taken.fd;
  }

  /**
   * What the preloaded library has made, if it has. QEMU gets a copy under a name while it answers
   * the questions: descriptors cannot be sent one right after the other.
   */
  #takePreloaded(): void {
    this.#receivePreloaded();
    const preloaded = this.#preloaded;
    if (preloaded === null) return;
    if (!this.#process.runsStartedProgram || !isOfProcess(preloaded, this.pid)) {
      this.#preloaded = null;
      native.close(preloaded.fd);
      this.#strangers = [...preloaded.helpers];
      return;
    }
    this.#way = preloaded.way;
    this.#helpers.push(...preloaded.helpers);
    // `loadState` waits for the answer.
    this.keepDescriptor(USERFAULTFD_NAME, preloaded.fd).catch(() => {});
  }

  #receivePreloaded(): void {
    const { preloadSocket } = this.#process;
    if (preloadSocket >= 0) this.#preloaded ??= receivePreloaded(preloadSocket, this.pid);
  }

  async earlyHelpers(): Promise<readonly HelperRecord[]> {
    const { preloadSocket, hasPlainMemory } = this.#process;
    if (preloadSocket < 0 || !hasPlainMemory) return [];
    let isOver = false;
    this.exited.then(() => {
      isOver = true;
    });
    for (;;) {
      if (this.#phase !== "new" || isOver || this.#isClosed) return [];
      this.#receivePreloaded();
      if (this.#preloaded !== null) return this.#preloaded.helpers;
      // The socket carries descriptors, so that it is nothing that the event loop could watch.
      await Bun.sleep(EARLY_PERIOD_MS);
    }
  }

  /** What a QEMU has sent that died before it answered: its helpers are children of this process. */
  #dropPreloaded(): void {
    this.#endStrangers();
    this.#receivePreloaded();
    const left = this.#preloaded;
    if (left === null) return;
    this.#preloaded = null;
    native.close(left.fd);
    // Those that `connect` has found to be QEMU's are among `#helpers`.
    if (this.#way === null) for (const helper of left.helpers) void endHelper(helper);
  }

  #endStrangers(): void {
    for (const helper of this.#strangers.splice(0)) void endHelper(helper);
  }

  get mayHaveHelpers(): boolean {
    if (this.#process.isSpawned) return true;
    return this.#options.userfaultfdWay !== "device" && mayInject(this.pid);
  }

  get hasHelpers(): boolean {
    return this.#helpers.length > 0;
  }

  takeHelpers(): HelperRecord[] {
    return this.#helpers.splice(0);
  }

  async keepDescriptor(name: string, fd: number): Promise<void> {
    const kept = this.#qmp.request("getfd", { fdname: name }, { fd });
    if (this.#canUndo) this.#prepare(kept);
    // From now on: a load that is given up before the answer has to drop it, too.
    this.#keptNames.add(name);
    try {
      await this.#guard(kept);
    } catch (error) {
      this.#keptNames.delete(name);
      throw error;
    }
  }

  async dropDescriptor(name: string): Promise<void> {
    this.#keptNames.delete(name);
    await this.#ask(async (qmp, isAgain) => {
      // The second time there may be none any more.
      if (isAgain) await qmp.execute("closefd", { fdname: name });
      else await qmp.request("closefd", { fdname: name });
    });
  }

  takeSeedFile(): number | undefined {
    const file = this.#seedFile;
    this.#seedFile = undefined;
    this.#isSeeded ||= file !== undefined;
    return file;
  }

  giveSeed(seedFd: number): void {
    assert(this.#phase === "connected", `giveSeed in ${this.#phase}`);
    // A new number each time. Those of somebody else's QEMU are known by now.
    this.#seedSet = Math.max(this.#seedSet + 1, this.#known?.freeFdset ?? 0);
    const set = { "fdset-id": this.#seedSet };
    // QEMU compares the access mode (it must be read-only) and does not seek: a new open file has
    // position 0.
    const readable = openSync(`/proc/self/fd/${seedFd}`, "r");
    const added = this.#qmp
      .request("add-fd", set, { fd: readable })
      .finally(() => closeSync(readable));
    this.#isSeeded = true;
    this.#prepare(added);
    this.#dropSeedLater(set, added);
  }

  /** Not right after the load: QEMU does one command at a time, and the next should be `cont`. */
  #dropSeedLater(set: Readonly<Record<string, number>>, added: Promise<unknown>): void {
    this.#dropSeedsLater.push(() =>
      added.then((reply) => this.#dropSeed(set, reply)).catch(() => {}),
    );
  }

  async loadState(
    streamOffset: number,
    capabilities: readonly string[] = [],
    resumes = false,
  ): Promise<StateLoad> {
    const known = this.#known;
    assert(this.#phase === "connected" && known !== null, `loadState in phase ${this.#phase}`);
    assert(this.#isSeeded, "loadState without a seed");
    if (capabilities.includes(IGNORE_SHARED)) this.#prepare(this.#ignoreShared(known));
    const prepared = this.#guard(Promise.all(this.#prepared));
    prepared.catch(() => {});
    // Somebody else's QEMU is to take nothing unless all is well. Of our own nothing is lost if not
    // all is, so its answers are not waited for, which takes 1.5 ms.
    if (this.isAttached) {
      await prepared;
      // With all that fsl leaves in it. One that began, and failed, would never take a state again.
      await this.#guard(this.#checkRoom());
    } else {
      await this.#qmp.descriptorsSent();
      // What it has answered by now is heard, so that `cont` can follow at once: one turn of Bun's event loop ends
      // before sockets are looked at, the next one behind that.
      for (let turn = 0; turn < 2; turn += 1) await new Promise(setImmediate);
    }
    this.#phase = "loading";
    const loaded = this.#endLoad(prepared, this.#guard(this.#loadFrom(known, streamOffset)));
    loaded.catch(() => {});
    if (resumes && !this.isAttached) this.#resumeEarly(prepared).catch(() => {});
    return { loaded };
  }

  /**
   * While QEMU loads its devices: `cont` only says that the guest may run then. Not before QEMU is
   * known to have all that another fsl would need.
   */
  async #resumeEarly(prepared: Promise<unknown>): Promise<void> {
    await prepared;
    if (this.#phase === "loading") await this.#qmp.execute("cont");
  }

  async #endLoad(prepared: Promise<unknown>, loaded: Promise<void>): Promise<void> {
    loaded.catch(() => {});
    await prepared;
    await loaded.catch((error: unknown) => this.#seeLoaded(error));
    this.#phase = "loaded";
    this.#endStrangers();
  }

  /**
   * The connection was cut while somebody else's QEMU loads its state, which it goes on with. (One
   * of our own is better started anew.)
   */
  async #seeLoaded(error: unknown): Promise<void> {
    if (!this.isAttached || !this.#isCut(error)) throw error;
    const patience = { timeoutMs: Number.POSITIVE_INFINITY };
    for (;;) {
      const progress = await this.#ask((qmp) => qmp.request("query-migrate", undefined, patience));
      const status = isRecord(progress) ? (progress["status"] ?? "none") : "none";
      if (status === "completed") return;
      if (status === "failed") {
        throw loadFailed(this.description, errorTextOf(progress));
      }
      if (status === "none") {
        await this.#takeNothing();
        throw error;
      }
      await Bun.sleep(LOAD_LOOK_MS);
    }
  }

  /**
   * With mapped-ram on, `savevm` and a migration to another host fail. What QEMU refuses or does not
   * answer is tried again at the end.
   */
  async putSettingsBack(): Promise<void> {
    this.#settingsBack = this.#known?.settings.restore() ?? Promise.resolve();
    await this.#settingsBack.catch(() => {});
  }

  async resume(): Promise<void> {
    await this.#ask(async (qmp) => {
      const resumed = this.#isRunning ? undefined : qmp.request("cont");
      // Sent along, so that it is done before anybody knows that the guest runs.
      void this.putSettingsBack();
      await resumed;
    });
  }

  async pause(): Promise<void> {
    await this.#ask((qmp) => pauseBy(qmp));
  }

  async hold(): Promise<boolean> {
    return this.#ask((qmp) => holdBy(qmp));
  }

  watchHotplug(
    wants: HotplugWants,
    found: (type: string) => void,
    lost: (error: FslError) => void,
  ): () => void {
    return watchHotplugOf(this.#control, wants, found, lost);
  }

  async abandon(): Promise<void> {
    if (this.#phase === "abandoned") return;
    const canUndo = this.#canUndo;
    this.#phase = "abandoned";
    if (this.#process.isSpawned) {
      await this.#end();
    } else if (canUndo && !this.#qmp.isClosed) {
      await this.#putBack().catch(() => {}); // The error that led here is the one to report.
    }
    this.close();
  }

  async release(): Promise<void> {
    assert(["loading", "loaded"].includes(this.#phase), `release in phase ${this.#phase}`);
    this.#phase = "released";
    this.#endHelpers();
    await this.#ask(async (qmp) => {
      await this.#putBack();
      if (this.#wasCut) await dropLeftSeeds(qmp, this.pid);
      // A seed may have stayed without a word.
      if (qmp.isClosed) throw await qmp.closed;
    });
    // The connection to a spawned QEMU stays: when the last monitor's client goes, QEMU closes
    // fdsets of the user's that are not in use at that moment. Somebody else's monitor is theirs.
    if (this.isAttached) this.#control.close();
  }

  kill(): void {
    this.#signal(nodeOs().constants.signals.SIGKILL);
  }

  /**
   * A QEMU in its end can wait for ever for a QMP command that came in that very moment: the
   * clean-up of its monitors sleeps until the command is done, and nothing wakes it to run it
   * (10.0.2; one end in thirty where the guest powered off just when fsl let go). SIGTERM asks for
   * what is under way anyway, and wakes it. One that is to stay (-no-shutdown) answers.
   */
  #watchEnd(): void {
    if (this.#isEndWatched) return;
    this.#isEndWatched = true;
    const endMs = performance.now() + END_WATCH_MS;
    const timer = setInterval(() => {
      const hangs = this.#qmp.unansweredMs > END_ANSWER_MS;
      if (hangs) this.signal("SIGTERM");
      if (hangs || this.#qmp.isClosed || performance.now() > endMs) {
        clearInterval(timer);
        this.#isEndWatched = false;
      }
    }, END_LOOK_MS);
    timer.unref();
  }

  signal(signal: NodeJS.Signals): void {
    this.#signal(nodeOs().constants.signals[signal]);
  }

  disconnect(): void {
    this.#control.close();
  }

  /** Closes fsl's descriptors: the QMP connection and the pidfd. QEMU goes on. Idempotent. */
  close(): void {
    if (!this.#isClosed) this.#dropPreloaded();
    const seedFile = this.takeSeedFile();
    if (seedFile !== undefined) native.close(seedFile);
    this.#isClosed = true;
    this.#endHelpers();
    this.#control.close();
    this.#process.close(this.#phase === "released");
  }

  /** What the inventory is worth: of whom it is, and what somebody else has left behind. */
  async #judge(known: Inventory): Promise<Inventory> {
    if (this.isAttached) return this.#withoutEarlier(known);
    if (this.#process.runsStartedProgram) return known;
    // Whatever runs there was given its command line by another program: a script, taskset.
    return takeInventory(this.#qmp);
  }

  /** What an earlier fsl, dead by now, has left in a QEMU that still waits goes first. */
  async #withoutEarlier(known: Inventory): Promise<Inventory> {
    // Refused where there is none.
    const dropped = LEFT_NAMES.map((fdname) => this.#qmp.execute("closefd", { fdname }));
    const left = Promise.all([...dropped, dropLeftSeeds(this.#qmp, this.pid)]);
    this.#prepare(left);
    // `loadState` waits for it. A descriptor that is given from here on is not among them.
    if (this.#earlier === null) return known;
    await left;
    await MigrationSettings.changedBefore(this.#qmp, parseUndo(this.#earlier.undo)).restore();
    const settings = await MigrationSettings.read(this.#qmp);
    if (!linksOf(this.pid).includes(KEPT_STATE_LINK)) return { ...known, settings };
    throw new FslError(
      "TARGET_MISMATCH",
      `${this.description} holds an earlier load, made through another QMP socket: ` +
        `expected ${this.#earlier.controlPath ?? "that one"}; use it, or start QEMU anew`,
      { pid: this.pid },
    );
  }

  /** Only what fsl added: somebody else may have come upon the same number. */
  async #dropSeed(set: Readonly<Record<string, number>>, added: unknown): Promise<void> {
    const fd = isRecord(added) ? added["fd"] : undefined;
    await this.#qmp.execute("remove-fd", typeof fd === "number" ? { ...set, fd } : set);
  }

  async #make(): Promise<TakenUserfaultfd> {
    const way = this.#options.userfaultfdWay;
    if (way === "preload") {
      throw new FslError(
        "HOST_UNSUPPORTED",
        `userfaultfd: ${this.description} did not send one at its start`,
      );
    }
    const injected = way === "device" ? null : await this.#inject();
    if (injected !== null) return injected;
    if (this.isAttached) await proveProcess(this.#qmp, this.pid);
    return makeUserfaultfd(this.#request(), way);
  }

  /** With helper tasks, where that can be. */
  async #inject(): Promise<TakenUserfaultfd | null> {
    const helpers = this.#options.helperTasks ?? defaultWidth() + 1;
    try {
      const taken = await injectHelpers(this.#request(), helpers, INJECTED_SLOTS);
      this.#helpers.push(...(taken?.helpers ?? []));
      return taken;
    } catch (error) {
      if (!isFslError(error)) throw error;
      return null; // What is wrong shows when it is done without.
    }
  }

  #endHelpers(): void {
    for (const helper of this.#helpers.splice(0)) void endHelper(helper);
  }

  #request(): UserfaultfdRequest {
    return { pid: this.pid, pidfd: this.pidfd, qmp: this.#qmp, description: this.description };
  }

  /**
   * `stop` of a QEMU that waits for its state only clears autostart, as `-S` does.
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

  async #checkRoom(): Promise<void> {
    checkDescriptorRoom(this.pid, this.description);
  }

  /** Starts the load and waits for its end. From here on nothing can be undone. */
  async #loadFrom(known: Inventory, streamOffset: number): Promise<void> {
    const outcome = this.#watchLoad();
    try {
      const { major, minor } = known.version;
      // Of somebody else's QEMU at the last moment: it cannot be undone for certain.
      const stopped = this.isAttached ? this.#clearAutostart() : undefined;
      stopped?.catch(() => {});
      const reply = await this.#qmp.execute("migrate-incoming", {
        uri: `file:/dev/fdset/${this.#seedSet}${streamOffset === 0 ? "" : `,offset=${streamOffset}`}`,
        // Since 9.1; before, QEMU exits when the load fails.
        ...(major > 9 || minor >= 1 ? { "exit-on-error": false } : {}),
      });
      await stopped;
      if (!reply.ok) {
        await this.#takeNothing();
        const message = `${this.description} refused to take the state: ${reply.description}`;
        throw new FslError("TARGET_LOST", message, { description: reply.description });
      }
      await outcome.ended;
    } finally {
      outcome.stop();
    }
  }

  /** QEMU refused to begin: it still waits, and everything can be put back. */
  async #takeNothing(): Promise<void> {
    this.#phase = "connected";
    // While QEMU waits for its state `cont` only sets autostart again.
    if (!this.#process.startsStopped) await this.#qmp.execute("cont");
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

  /** Capabilities, parameters and kept descriptors, as before fsl came. Can be done again. */
  async #putBack(): Promise<void> {
    // A descriptor on its way would come behind its own `closefd`.
    if (this.#known !== null) await Promise.allSettled(this.#prepared);
    const dropped = [...this.#keptNames].map((name) =>
      this.#qmp.execute("closefd", { fdname: name }),
    );
    await Promise.all(this.#dropSeedsLater.splice(0).map((drop) => drop()));
    await this.#settingsBack.catch(() => {});
    await Promise.all<QmpReply | void | undefined>([...dropped, this.#known?.settings.restore()]);
    this.#keptNames.clear();
  }

  /** A connection that was made in the place of one that was cut. */
  #goOnWith(qmp: QmpClient): void {
    this.#qmp = qmp;
    this.#wasCut = true;
    this.#heedEvents(qmp);
    if (this.#known === null) return;
    const undo = this.#known.settings.undoRecord();
    this.#known = { ...this.#known, settings: MigrationSettings.changedBefore(qmp, undo) };
  }

  #heedEvents(qmp: QmpClient): void {
    qmp.onEvent(({ name }) => {
      if (name === "SHUTDOWN") this.#watchEnd();
      else if (name === "RESUME" || name === "STOP") this.#isRunning = name === "RESUME";
    });
  }

  #isCut(error: unknown): boolean {
    return this.isCommitted && this.#control.isCut && !(error instanceof EndedError);
  }

  /** Once QEMU has its state: through a new connection, if need be. */
  async #ask<T>(work: (qmp: QmpClient, isAgain: boolean) => Promise<T>): Promise<T> {
    return this.#guard(this.#control.ask(work));
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

  async #guard<T>(work: Promise<T>): Promise<T> {
    try {
      return await work;
    } catch (error) {
      throw await this.explain(error);
    }
  }

  async explain(error: unknown): Promise<unknown> {
    if (!isFslError(error) || error instanceof EndedError) return error;
    if (this.#phase === "abandoned") return error;
    const isCut = this.#qmp.isClosed;
    // ptrace(2) of a thread that has ended is not permitted.
    if (!isCut && error.code !== "TARGET_LOST" && error.code !== "HOST_UNSUPPORTED") return error;
    // The kernel takes a process's memory and descriptors away before it tells of the end.
    const noticeMs = isCut ? EXIT_NOTICE_MS : EXIT_LAG_MS;
    const exit = await Promise.race([this.exited, Bun.sleep(noticeMs)]);
    if (exit === undefined) return error;
    const how = `${this.description} ended ${formatExit(exit)} ${PHASE_WORDS[this.#phase]}`;
    return new EndedError(
      "TARGET_LOST",
      `${how}; its own message, if any, is above`,
      { ...exit },
      error,
    );
  }
}

/** Says how the target has ended: nothing is left to explain. */
class EndedError extends FslError {}

const PHASE_WORDS: Readonly<Record<Phase, string>> = {
  new: "before it could take a state",
  connected: "before it was given its state",
  loading: "while it loaded its state",
  loaded: "after it had loaded its state",
  released: "after the load",
  abandoned: "when it was given up",
};

/** `with exit code 1` or `by SIGSEGV` */
function formatExit(exit: ExitStatus): string {
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

export async function pauseBy(qmp: QmpClient): Promise<void> {
  await qmp.request("stop", undefined, { timeoutMs: Number.POSITIVE_INFINITY });
}

/** See `ServedTarget.hold`. */
export async function holdBy(qmp: QmpClient): Promise<boolean> {
  const patience = { timeoutMs: Number.POSITIVE_INFINITY };
  const status = await qmp.request("query-status", undefined, patience);
  if (!isRecord(status) || status["running"] !== true) return false;
  await pauseBy(qmp);
  return true;
}

function errorTextOf(progress: unknown): string {
  return String((isRecord(progress) ? progress["error-desc"] : undefined) ?? "no reason given");
}

function loadFailed(who: string, description: string): FslError {
  return new FslError(
    "TARGET_MISMATCH",
    `${who} could not load the device state: ${description}; its own message is above. ` +
      "Usually its devices differ from those of the QEMU that made the snapshot",
    { description },
  );
}
