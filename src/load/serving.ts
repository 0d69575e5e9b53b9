/**
 * Serving a target that is armed: the fault loop, the eager load, pages that cannot be read, and
 * the end, when nothing of fsl is left in the target. The same for a load that was just begun and
 * for one whose fsl has died. Runs on the main thread; waits for Workers, the target's exit and
 * QMP, and for QMP only when no vCPU can be waiting.
 */
import { FslError, isFslError } from "../errors.ts";
import { hex, KiB, MiB } from "../pages.ts";
import type { PageSourceSpec } from "../source/page-source.ts";
import { EFD_CLOEXEC, EFD_NONBLOCK, EINVAL, ENODATA, ENOMEM } from "../sys/abi.ts";
import { HOST_PAGE_LENGTH } from "../sys/host-pages.ts";
import * as sys from "../sys/native.ts";
import { defaultWidth } from "../sys/limits.ts";
import { releaseProgramText } from "../sys/program-text.ts";
import { endHelper, type HelperRecord } from "../sys/helper-task.ts";
import type { Uffd } from "../uffd/uffd.ts";
import { hasEnded, KEPT_STATE, type ServedTarget } from "../vmm/target.ts";
import { countMissing, setRange, testBit } from "../bits.ts";
import type { PageFailure } from "./fault-loop.ts";
import type { SnapshotGuard } from "./guard.ts";
import { orderChunks } from "./order.ts";
import type { EagerWorkerStart } from "./protocol.ts";
import { StallWatch } from "./stalls.ts";
import {
  CHUNK_LENGTH,
  EAGER_MOVES,
  FAULT_WORKER,
  type LoadState,
  PHASE_FINISHED,
  PHASE_HANDING_OVER,
  WORKERS_MAX,
} from "./state.ts";
import { Crew, type CrewEnd } from "./workers.ts";

/**
 * An eager pass that leaves pages behind (a Worker died with a chunk in hand) is followed by
 * another one.
 */
const EAGER_PASSES_MAX = 16;
/**
 * What the eager load may have asked a page source for that has not come yet, bytes: enough for one
 * far away, and a source need hold no more for pages that nobody waits for.
 */
const PENDING_MAX = 16 * MiB;
/** How often a load without an eager Worker is looked at, ms. */
const ALL_IN_PERIOD_MS = 200;
/** How long the fault loop may take to notice that it is over. */
const LOOP_END_MS = 1000;

export interface Logger {
  info(message: string): void;
  warn(message: string): void;
}

export interface EagerOptions {
  /**
   * How many bring chunks at a time, 1..8: helper tasks, or eager Workers where pages have to be copied.
   * Default: the host's CPUs, at most 2.
   */
  readonly workers?: number;
  /**
   * Largest single copy in bytes, 4 KiB..2 MiB. Default 2 MiB; 256 KiB where the guest may give memory back, and what
   * the fault loop copies itself.
   */
  readonly pieceLength?: number;
  /** Limit of the eager load in bytes per second; 0 or absent = none. */
  readonly bytesPerSecond?: number;
  /** Nice value of the eager load after its first 0.1 s, 0..19. Default 5. */
  readonly nice?: number;
}

/**
 * What becomes of a page that stays unreadable: wait for ever, let whoever touches it get SIGBUS,
 * or end the target.
 */
export type OnError = "wait" | "poison" | "kill";

export interface ServingOptions {
  readonly eager?: EagerOptions;
  /** Data pages brought in around a faulting page, 1..512. Default 16. */
  readonly clusterPages?: number;
  readonly onError?: OnError;
  /** How long a page is tried for before `onError` poison or kill, ms. Default 30 s. */
  readonly errorLimitMs?: number;
  readonly logger?: Logger;
}

/**
 * What brings whole chunks: helper tasks in the target, first those of the eager load, then one of
 * the fault loop; and the snapshot file.
 */
export interface ServingHelpers {
  readonly records: readonly HelperRecord[];
  readonly fileFd: number;
  /** What `orderChunks` says, if that is known: it takes milliseconds. */
  readonly order?: Uint32Array | undefined;
}

/** Of a copy that faults or events wait for: some 0.1 ms. */
const PIECE_LENGTH = 256 * KiB;
const NICE = 5;
const ERROR_LIMIT_MS = 30_000;
/** Unreadable pages that nobody waits for and that are told one by one. */
const FAILURES_TOLD_MAX = 8;

/** A page that cannot be read, and since when. */
interface KnownFailure {
  failure: PageFailure;
  readonly sinceMs: number;
  /** A vCPU, or QEMU itself, needs it. */
  readonly demanded: boolean;
}

export function eagerWidth(options: ServingOptions): number {
  const wanted = options.eager?.workers ?? defaultWidth();
  return Math.max(1, Math.min(wanted, WORKERS_MAX - 1));
}

/** How many helper tasks a load makes use of: the fault loop has one beside those of the eager load. */
export function helperTasksFor(options: ServingOptions): number {
  return eagerWidth(options) + 1;
}

export class Serving {
  readonly #options: ServingOptions;
  readonly #target: ServedTarget;
  readonly #state: LoadState;
  readonly #uffd: Uffd;
  readonly #crew: Crew;
  readonly #stopFd: number;
  /** Begins the eager load of the fault loop. */
  readonly #goFd: number;
  readonly #helpers: ServingHelpers;
  /** Helpers of the eager load that were given up before it. */
  readonly #lostHelpers = new Set<HelperRecord>();
  readonly #guard: SnapshotGuard | undefined;
  /** Resolved unless the eager load is on hold. */
  #released = Promise.withResolvers<void>();
  #order: Uint32Array | undefined;
  /** The working set. */
  #replay = new Int32Array(0);
  readonly #failures = new Map<string, KnownFailure>();
  /** Failures that were told one by one, and those that were only counted. */
  #failuresTold = 0;
  #failuresUntold = 0;
  readonly #stalls: StallWatch;
  readonly #lost = Promise.withResolvers<never>();
  #errorTimer: ReturnType<typeof setInterval> | undefined;
  #eager: Promise<CrewEnd> | undefined;
  #suppliedWrong = false;
  #isStopped = false;
  /** The eager load has, once. */
  #hasBegun = false;
  /** Of the eager load; false when they are lost with the Worker that had them. */
  #hasHelpers = true;

  constructor(
    target: ServedTarget,
    state: LoadState,
    uffd: Uffd,
    crew: Crew,
    options: ServingOptions,
    helpers: ServingHelpers = { records: [], fileFd: -1 },
    guard?: SnapshotGuard,
  ) {
    this.#guard = guard;
    this.#released.resolve();
    this.#target = target;
    this.#state = state;
    this.#uffd = uffd;
    this.#crew = crew;
    this.#options = options;
    this.#helpers = helpers;
    this.#order = helpers.order;
    this.#stopFd = sys.check(sys.eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd");
    this.#goFd = sys.check(sys.eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd");
    this.#lost.promise.catch(() => {});
    this.#stalls = new StallWatch(state, options.logger);
    crew.listen({
      onFailure: (failure, demanded) => this.#fail(failure, demanded),
      onRecovered: (failure) => this.#recover(failure),
      onWorkerLost: (role, error, replaced) => {
        const givenUp =
          role === "fault" ? "given up: the guest waits" : "given up: the rest comes on demand";
        const next = replaced ? "another one takes over" : givenUp;
        options.logger?.warn(`${role} Worker failed: ${error.message}; ${next}`);
        if (!replaced && role === "fault") this.#lost.reject(error);
        // They may be in the middle of an answer to it.
        if (role === "eager") this.#hasHelpers = false;
      },
      beforeReplacement: (start) => {
        this.#abandonWork(start.workerIndex);
        if (start.role === "fault" && start.moves !== null) this.#abandonWork(EAGER_MOVES);
      },
      afterReplacement: (start) => {
        if (start.role === "fault") this.wakeAll();
      },
    });
    guard?.listen({
      onWriter: (leftMs) => this.#hurry(leftMs),
      onHold: (isHeld) => this.#hold(isHeld),
      onChanged: (reason, isTooLate) => this.#halt(reason, isTooLate),
    });
  }

  /**
   * `onError` was carried out, the snapshot was changed, or somebody waits for a page that cannot
   * be read. A page that the host has no memory for can be read: a target that the kernel ends for
   * that has ended by itself.
   */
  get supplyFailed(): boolean {
    return this.#suppliedWrong || this.#isAnyDemanded(({ errno }) => errno !== ENOMEM);
  }

  /** Before the eager load: helpers that do not answer are ended, the others go on. */
  loseHelpers(lost: readonly HelperRecord[]): void {
    const records = new Set(lost);
    if (records.size === 0) return;
    this.#options.logger?.warn(
      `${records.size} helper tasks of ${this.#target.description} do not answer: the load goes on without them`,
    );
    for (const record of records) {
      this.#lostHelpers.add(record);
      void endHelper(record);
    }
  }

  #isAnyDemanded(matches: (failure: PageFailure) => boolean = () => true): boolean {
    return [...this.#failures.values()].some(
      ({ demanded, failure }) => demanded && matches(failure) && !this.#isDone(failure),
    );
  }

  /** Pages that cannot be read at this moment. */
  failures(): PageFailure[] {
    return [...this.#failures.values()].map(({ failure }) => failure);
  }

  /**
   * @param replay runs that the guest will ask for, see `planReplay`; none when left out
   * @param isReplayedNow by the fault loop, while the target loads its devices; false: by the eager load.
   * Chunks that were read ahead would come page by page
   * @returns when faults are served
   */
  async serveFaults(replay = new Int32Array(0), isReplayedNow = true): Promise<void> {
    this.#replay = replay;
    this.#stalls.start();
    const width = eagerWidth(this.#options);
    await this.#crew.serveFaults({
      role: "fault",
      handle: this.#state.handle,
      source: this.#state.metadata.source as PageSourceSpec,
      uffdFd: this.#uffd.fd,
      workerIndex: FAULT_WORKER,
      stopFd: this.#stopFd,
      pidfd: this.#target.pidfd,
      clusterPages: this.#options.clusterPages ?? 16,
      replay: isReplayedNow ? replay : new Int32Array(0),
      moves: this.#movesByFaultLoop
        ? {
            helpers: this.#eagerHelpers,
            goFd: this.#goFd,
            pieceLength: this.#options.eager?.pieceLength ?? PIECE_LENGTH,
            order: this.#chunkOrder,
            replay,
            nice: this.#options.eager?.nice ?? NICE,
          }
        : null,
      helpers: this.#helpers.records.slice(width),
      helperPids: this.#eagerHelpers.map(({ pid }) => pid),
      fileFd: this.#helpers.fileFd,
    });
  }

  /**
   * Every thread that waits faults again: for faults that a dead reader had taken. In zero extents
   * too, which are not always let go.
   */
  wakeAll(): void {
    for (const { block } of this.#state.blocks) this.#uffd.wake(block.hostAddr, block.usedLength);
  }

  /** Sets the eager load to work: first the working set, then everything. */
  startEager(): void {
    this.#eager = this.#loadEagerly();
    this.#eager.catch(() => {});
  }

  /** What can be moved by the fault loop, where that can be; what is left by eager Workers. */
  async #loadEagerly(): Promise<CrewEnd> {
    const usable = this.#movesByFaultLoop ? this.#usableHelpers() : 0;
    this.#hasBegun = true;
    if (usable !== 0) {
      const moved = this.#crew.moved();
      sys.write(this.#goFd, BigUint64Array.of(BigInt(usable)));
      if (!(await moved)) this.#hasHelpers = false;
      if (this.#isStopped) return "stopped";
      if (this.missingPages() === 0) return "finished";
      this.#state.resetChunks();
    }
    releaseProgramText();
    return this.#crew.loadEagerly(this.#eagerStarts());
  }

  /**
   * Helpers do all the work, nobody has set it a limit that would have to be slept for, and no chunk is to be looked at
   * before it is moved, which the fault loop would have to wait for: then it can do the rest, once.
   */
  get #movesByFaultLoop(): boolean {
    const { blocks, metadata } = this.#state;
    const hasAll = this.#helpers.records.length >= eagerWidth(this.#options);
    const isLimited = (this.#options.eager?.bytesPerSecond ?? 0) > 0;
    if (this.#hasBegun || !hasAll || isLimited || metadata.canDiscard) return false;
    return blocks.every(({ block }) => block.movable);
  }

  get #chunkOrder(): Uint32Array {
    return (this.#order ??= orderChunks(this.#state.blocks));
  }

  /** A bit for each helper of the eager load that was not given up. */
  #usableHelpers(): number {
    return this.#eagerHelpers.reduce(
      (bits, record, index) => (this.#lostHelpers.has(record) ? bits : bits | (1 << index)),
      0,
    );
  }

  get #eagerHelpers(): readonly HelperRecord[] {
    return this.#hasHelpers ? this.#helpers.records.slice(0, eagerWidth(this.#options)) : [];
  }

  /** Somebody wants the load to be over: no limit any more. */
  hurry(): void {
    this.#state.hurry();
  }

  /**
   * Waits until the rest is in.
   * @returns true when all RAM is in, false when the target has ended before
   */
  async bringRest(): Promise<boolean> {
    const gone = this.#target.exited.then(() => "gone" as const);
    if (this.#eager === undefined) this.startEager();
    for (let pass = 0; pass < EAGER_PASSES_MAX; pass += 1) {
      const eager = this.#eager?.catch(() => "lost" as const);
      let end = await Promise.race([eager, gone, this.#lost.promise]);
      if (end === "lost") end = await Promise.race([this.#allIn(), gone, this.#lost.promise]);
      if (end === "gone") {
        // Its memory is gone a moment before the process has ended, and who has the target waits for that.
        await hasEnded(this.#target);
        return false;
      }
      // Nobody takes a page from the file after this look, and none before a change went unnoticed.
      const isIntact = this.#guard?.look() ?? true;
      if (this.missingPages() === 0) return this.#end();
      if (!isIntact) break;
      await Promise.race([this.#released.promise, gone]);
      this.#state.resetChunks();
      this.startEager();
    }
    // Pages are missing and nobody brings them: nothing may be closed while the target lives.
    await gone;
    return false;
  }

  /** Resolves when no page is missing; for when no Worker tells. */
  async #allIn(): Promise<"finished"> {
    while (this.missingPages() > 0 && !this.#isStopped) await Bun.sleep(ALL_IN_PERIOD_MS);
    return "finished";
  }

  /**
   * All RAM is in. Bytes that may be wrong are nothing to go on with: nobody waits for a page any
   * more, so the guest can be stopped, and whoever has the target decides.
   */
  async #end(): Promise<boolean> {
    if (this.#guard?.isTooLate && this.#options.onError !== "kill") {
      this.#options.logger?.warn(`${this.#target.description} is stopped: its memory may be wrong`);
      await this.#target.pause();
    }
    return true;
  }

  /**
   * Lets every range go and takes everything of fsl out of the target. Only when no page is
   * missing.
   * @returns why something of fsl is left in a target that lives; null when all is well
   */
  async finish(): Promise<FslError | null> {
    this.#unregister();
    this.#state.phase = PHASE_FINISHED;
    this.#guard?.close();
    await this.stop();
    const target = this.#target;
    const problems: string[] = [];
    for (const part of [() => target.dropDescriptor(KEPT_STATE), () => target.release()]) {
      try {
        await part();
      } catch (error) {
        if (!isFslError(error)) throw error;
        problems.push(error.message);
      }
    }
    // A target that has ended needs no more. Another one goes on with all its RAM, whatever stays
    // behind in it: QEMU changes no settings while somebody migrates it, for one.
    if (problems.length === 0 || (await hasEnded(target))) return null;
    return new FslError(
      "TARGET_LOST",
      `${target.description} has all its RAM, but something of fsl is left in it: ` +
        `${problems.join("; ")}; to tidy up: fsl resume --pid ${target.pid}`,
      { pid: target.pid },
    );
  }

  /**
   * Ends the Workers. The target must be complete, gone, or about to be served by somebody else.
   * @param endsHelpers false: they are somebody else's from here on
   */
  async stop(endsHelpers = true): Promise<void> {
    if (this.#isStopped) return;
    this.#isStopped = true;
    clearInterval(this.#errorTimer);
    this.#stalls.stop();
    this.#state.stop();
    sys.write(this.#stopFd, ONE);
    await Promise.race([this.#crew.faultLoopEnded.catch(() => {}), Bun.sleep(LOOP_END_MS)]);
    this.#crew.dismiss();
    const left = this.#helpers.records.filter((record) => !this.#lostHelpers.has(record));
    if (endsHelpers) await Promise.all(left.map(endHelper));
    sys.close(this.#stopFd);
    sys.close(this.#goFd);
  }

  /**
   * What a dead Worker had in hand: faults that wait for a chunk of its are woken and served one by
   * one.
   */
  #abandonWork(workerIndex: number): void {
    this.#state.leaveCopy(workerIndex);
    for (const block of this.#state.blocks) {
      const { hostAddr, pageSize } = block.block;
      for (const chunk of block.abandonChunks(workerIndex)) {
        const start = block.chunkStart(chunk);
        const length = (block.chunkEnd(chunk) - start) * pageSize;
        this.#uffd.wake(hostAddr + start * pageSize, length);
      }
    }
  }

  missingPages(): number {
    let missing = 0;
    for (const { data, done } of this.#state.blocks) missing += countMissing(data, done);
    return missing;
  }

  /** Every block as a whole: with the zero extents that could not be let go. */
  #unregister(): void {
    for (const { block } of this.#state.blocks) {
      try {
        // A target that ended meanwhile has nothing left to unregister.
        if (!this.#uffd.unregister(block.hostAddr, block.usedLength)) return;
      } catch (error) {
        // A memory device that was unplugged meanwhile has taken its range along. Should a part of
        // it still be there, it is complete, and goes with the descriptor.
        if (!isFslError(error) || error.details["errno"] !== EINVAL) throw error;
      }
    }
  }

  #eagerStarts(): EagerWorkerStart[] {
    const state = this.#state;
    const eager = this.#options.eager ?? {};
    const width = eagerWidth(this.#options);
    const records = this.#eagerHelpers.filter((record) => !this.#lostHelpers.has(record));
    // One Worker keeps all helpers busy: another would cost 30 ms of CPU time to start, and memory.
    const isMoved = records.length >= width && state.blocks.every(({ block }) => block.movable);
    const workers = isMoved ? 1 : width;
    const order = this.#chunkOrder;
    // A page that is asked for in the middle of a long copy comes by itself; but where memory can be given back, no
    // event is read until the copy has ended.
    const piece = state.metadata.canDiscard ? PIECE_LENGTH : CHUNK_LENGTH;
    return Array.from({ length: workers }, (_, index) => ({
      role: "eager" as const,
      handle: state.handle,
      source: state.metadata.source as PageSourceSpec,
      uffdFd: this.#uffd.fd,
      workerIndex: index + 1,
      pieceLength: eager.pieceLength ?? piece,
      order,
      replay: this.#replay,
      helpers: records.filter((_record, number) => number % workers === index),
      fileFd: this.#helpers.fileFd,
      bytesPerSecond: (eager.bytesPerSecond ?? 0) / workers,
      pendingMax: PENDING_MAX / workers,
      nice: eager.nice ?? NICE,
    }));
  }

  /** Somebody waits to write to the snapshot: the rest comes as fast as it can. */
  #hurry(leftMs: number): void {
    this.hurry();
    const limit = Number.isFinite(leftMs)
      ? `for ${Math.round(leftMs / 1000)} s at most`
      : "until that is done";
    this.#options.logger?.warn(
      `${this.#state.metadata.snapshotPath}: another process wants to write to it and is kept waiting ${limit}; ` +
        "the rest is loaded without a limit",
    );
  }

  /** Nothing is read while a writer is let in that may have gone away. */
  #hold(isHeld: boolean): void {
    if (isHeld) {
      this.#released = Promise.withResolvers();
      this.#state.halt();
      return;
    }
    this.#state.goOn();
    this.#released.resolve();
  }

  /** The file has other bytes now: no page is taken from it any more. */
  #halt(reason: string, isTooLate: boolean): void {
    this.#state.halt();
    this.#released.resolve();
    // The loader looks once more before it hands anything over, and gives up.
    if (this.#state.phase < PHASE_HANDING_OVER) return;
    this.#suppliedWrong = true;
    const wrong = isTooLate ? "; pages that came in the last moments may be wrong" : "";
    this.#options.logger?.warn(
      `${this.#state.metadata.snapshotPath}: ${reason}: no page is taken from it any more${wrong}. ` +
        "vCPUs that need one wait; end QEMU, and load again from an intact copy",
    );
    if (this.#options.onError === "kill") {
      this.#options.logger?.warn(`${this.#target.description} is killed: its snapshot was changed`);
      this.#target.kill();
    } else if (isTooLate && this.missingPages() > 0) {
      // Not awaited: it returns only when no vCPU waits for a page.
      this.#target.pause().catch(() => {});
    }
  }

  #fail(failure: PageFailure, demanded: boolean): void {
    const key = failureKey(failure);
    const known = this.#failures.get(key);
    // What `fsl status` shows: a page that somebody waits for, if there is one.
    if (demanded || !this.#isAnyDemanded()) this.#state.lastFailure = failure;
    if (known !== undefined) {
      known.failure = failure;
      if (known.demanded || !demanded) return;
    }
    const sinceMs = known?.sinceMs ?? performance.now();
    this.#failures.set(key, { failure, sinceMs, demanded });
    this.#tellFailure(failure, demanded);
    if ((this.#options.onError ?? "wait") !== "wait") {
      this.#errorTimer ??= setInterval(() => this.#judgeFailures(), 100);
    }
  }

  /** The first ones one by one, then how many more there are: a whole disk may have died. */
  #tellFailure(failure: PageFailure, demanded: boolean): void {
    // A file that was changed fails for every page, which has been said.
    if (this.#state.halted) return;
    if (!demanded && this.#failuresTold >= FAILURES_TOLD_MAX) {
      this.#failuresUntold += 1;
      const count = this.#failuresUntold;
      if ((count & (count - 1)) === 0) {
        this.#options.logger?.warn(`${count} more pages that nobody waits for cannot come in`);
      }
      return;
    }
    this.#failuresTold += 1;
    const who = demanded ? "the vCPU that needs it waits" : "nobody waits for it yet";
    this.#options.logger?.warn(
      `RAMBlock ${failure.idstr}: page ${failure.pageIndex} ${this.#why(failure)}; ${who}, it is tried again`,
    );
  }

  #why(failure: PageFailure): string {
    const { errno, fileOffset } = failure;
    if (errno === ENOMEM) {
      const { hostPageSize } = this.#blockOf(failure).block;
      const isHuge = hostPageSize > HOST_PAGE_LENGTH;
      const limit = isHuge ? ` (pages of ${hostPageSize / MiB} MiB: vm.nr_hugepages)` : "";
      return `cannot come in: the host has no memory for it${limit}`;
    }
    const text = errno === ENODATA ? "the file ends before it" : sys.errnoText(errno);
    return `cannot be read at file offset ${hex(fileOffset)}: ${text}`;
  }

  #recover(failure: PageFailure): void {
    if (!this.#failures.delete(failureKey(failure))) return;
    const what = failure.errno === ENOMEM ? "has come" : "could be read again";
    this.#options.logger?.info(
      `RAMBlock ${failure.idstr}: page ${failure.pageIndex} ${what} after ${failure.attempts} attempts`,
    );
  }

  /** Carries out `onError` for pages that were tried for long enough. */
  #judgeFailures(): void {
    const limitMs = this.#options.errorLimitMs ?? ERROR_LIMIT_MS;
    for (const [key, { failure, sinceMs }] of this.#failures) {
      if (this.#isDone(failure)) {
        this.#failures.delete(key);
        continue;
      }
      if (performance.now() - sinceMs < limitMs) continue;
      this.#suppliedWrong = true;
      if (this.#options.onError === "kill") {
        this.#options.logger?.warn(
          `${this.#target.description} is killed: a page could not be supplied`,
        );
        clearInterval(this.#errorTimer);
        this.#target.kill();
        return;
      }
      this.#failures.delete(key);
      this.#poison(failure);
    }
  }

  #isDone(failure: PageFailure): boolean {
    return testBit(this.#blockOf(failure).done, failure.pageIndex);
  }

  #poison(failure: PageFailure): void {
    const { block, done } = this.#blockOf(failure);
    const hostPage = Math.floor((failure.pageIndex * block.pageSize) / block.hostPageSize);
    const address = block.hostAddr + hostPage * block.hostPageSize;
    const poisoned = this.#uffd.poison(address, block.hostPageSize, 0);
    if (poisoned < 0 && !this.#isDone(failure)) {
      this.#options.logger?.warn(
        `RAMBlock ${failure.idstr}: page ${failure.pageIndex} cannot be poisoned: ` +
          `${sys.errnoText(-poisoned)} (UFFDIO_POISON needs Linux 6.6); its vCPU goes on waiting`,
      );
      return;
    }
    const first = (hostPage * block.hostPageSize) / block.pageSize;
    setRange(done, first, first + block.hostPageSize / block.pageSize);
    this.#options.logger?.warn(
      `RAMBlock ${failure.idstr}: page ${failure.pageIndex} is poisoned: it could not be supplied`,
    );
  }

  #blockOf(failure: PageFailure): LoadState["blocks"][number] {
    const block = this.#state.blocks.find(({ block: { idstr } }) => idstr === failure.idstr);
    if (block === undefined) throw new FslError("INTERNAL", `no block ${failure.idstr}`);
    return block;
  }
}

/** What an eventfd takes: a u64 of 1. */
const ONE = new BigUint64Array([1n]);

function failureKey(failure: PageFailure): string {
  return `${failure.idstr}:${failure.pageIndex}`;
}
