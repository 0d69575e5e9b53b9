/**
 * `loadSnapshot`: joins a snapshot, a page source and a target. Runs on the main thread and blocks
 * on nothing: faults are served by a Worker from before the device state is loaded until all RAM is
 * in (serving.ts).
 *
 *   open and parse ─┐
 *   start Workers   ├─▶ plan ─▶ arm ─▶ serve faults ─▶ device state ─▶ resume ─▶ rest ─▶ let go
 *   target starts  ─┘   every check is before this line ──┘ (it works once and cannot be undone)
 *
 * The userfaultfd is never closed and no range is unregistered while a page is missing: the kernel
 * would let the guest go on with zeros. If fsl dies, the target's own copy of the descriptor keeps
 * the guest waiting (recovery.ts).
 */
import { closeSync, openSync } from "node:fs";
import { resolve } from "node:path";
import { FslError, isFslError } from "../errors.ts";
import type { PageBitmap } from "../snapshot/page-bitmap.ts";
import { MiB } from "../pages.ts";
import { openSnapshot, type Snapshot } from "../snapshot/snapshot.ts";
import { makeSource } from "../source/make-source.ts";
import type { PageSourceSpec } from "../source/page-source.ts";
import { UFFD_FEATURES } from "../sys/abi.ts";
import type { HelperRecord } from "../sys/helper-task.ts";
import * as sys from "../sys/native.ts";
import { HOST_PAGE_LENGTH } from "../sys/host-pages.ts";
import { Uffd } from "../uffd/uffd.ts";
import {
  type ExitStatus,
  type GuestRegion,
  hasEnded,
  type HotplugWants,
  KEPT_STATE,
  type StateLoad,
  type Target,
  type TargetInfo,
} from "../vmm/target.ts";
import {
  clearBrought,
  findResident,
  findZeroRuns,
  jobsOfFilled,
  jobsOfResident,
  markResident,
  planRegistration,
  registerBlocks,
  releaseZeroExtents,
  residentLength,
  type ResidentPages,
} from "./arm.ts";
import type { PageFailure } from "./fault-loop.ts";
import { fillMemory } from "./fill.ts";
import { SnapshotGuard } from "./guard.ts";
import { PageReader } from "./page-reader.ts";
import { type BlockPlan, type LoadPlan, planLoad, SEED_DATA_MAX } from "./plan.ts";
import { HotplugHold } from "./hotplug.ts";
import { giveHugePagesBack } from "./huge-pages.ts";
import { recordServing } from "./recorded-serving.ts";
import { findEarlier, lockState } from "./recovery.ts";
import {
  type AlignedBlock,
  alignBlocks,
  areAligned,
  orderChunks,
  type SnapshotBlock,
} from "./order.ts";
import { planStaging, STAGED_CHUNKS, Staging } from "./staging.ts";
import { type LoadProgress, type LoadReport, progressOf, reportOf } from "./report.ts";
import type { AddressRange, PageSpan } from "./resident.ts";
import { makeSeed, makeSeedFrom, runsFromSeed } from "./seed-file.ts";
import { eagerWidth, Serving, type ServingOptions } from "./serving.ts";
import {
  type BlockState,
  C_EAGER_PAGES,
  LoadState,
  MAIN_THREAD,
  PHASE_HANDING_OVER,
  PHASE_RUNNING,
  PHASE_STATE_LOADED,
  type StateBlock,
  type StateMetadata,
} from "./state.ts";
import { Supply } from "./supply.ts";
import { WholeChunks } from "./whole-chunks.ts";
import { Crew } from "./workers.ts";
import {
  growWorkingSet,
  identityFits,
  planReplay,
  readWorkingSet,
  type WorkingSet,
  type WorkingSetIdentity,
  writeWorkingSet,
} from "./working-set.ts";

export type LoadMode = "lazy" | "copy";

export interface LoadOptions extends ServingOptions {
  /** Path of the snapshot. */
  readonly snapshot: string;
  /** File offset in bytes of the stream within the file. */
  readonly snapshotOffset?: number;
  readonly target: Target;
  /** lazy (default): resume at once. copy: QEMU's own load of everything, then resume. */
  readonly mode?: LoadMode;
  /** Leave the guest stopped after its state is loaded. */
  readonly paused?: boolean;
  /**
   * Where the bytes of all RAM come from; absent = the snapshot file. Not with mode copy: QEMU
   * reads the file itself.
   */
  readonly source?: PageSourceSpec;
  /**
   * File of the working set: brought in first if it is there, recorded if it is not. Absent =
   * neither.
   */
  readonly workingSet?: string;
  /** Shared memory and huge pages lazily, although discards of them cannot be noticed. */
  readonly lazyDespiteDiscards?: boolean;
  /** `performance.now()` from which the report's times count; default: the call. */
  readonly startedAtMs?: number;
  /** Gives the load up with the signal's reason, unless the state has been handed over by then. */
  readonly cancel?: AbortSignal;
}

export interface LoadHandle {
  readonly info: TargetInfo;
  readonly plan: LoadPlan;
  /** All RAM is in, or the target has ended before. Rejects only for a bug in fsl. */
  readonly done: Promise<LoadReport>;
  /**
   * After `done`: the guest has its huge pages back too, and fsl holds nothing of the target any
   * more.
   */
  readonly tidied: Promise<void>;
  /** The target has ended. */
  readonly exited: Promise<ExitStatus>;
  progress(): LoadProgress;
  /** Pages that cannot be read at this moment. */
  failures(): readonly PageFailure[];
  /**
   * `onError` was carried out, the snapshot was changed, or somebody waits for a page that cannot
   * be read (not: that the host has no memory for). Looked at when the target has ended: that is why.
   */
  readonly supplyFailed: boolean;
  /**
   * Somebody else's target has its state, but could not be told to go on, or to let go of what is
   * fsl's; null when that is not so. Its pages are served all the same. Final when `done` resolves.
   */
  readonly unfinished: FslError | null;
  resume(): Promise<void>;
  /** Brings in the rest as fast as it can, whatever its limit. */
  hurry(): void;
}

interface Times {
  qemuReadyMs: number | null;
  armedMs: number | null;
  resumedMs: number | null;
  residentMs: number | null;
}

/**
 * Loads a snapshot into a target that waits for its state.
 * @returns when the guest runs (or is stopped, with `paused`); RAM may still be coming in
 * @throws FslError; until the state was handed over the target is put back (a spawned one is ended)
 */
export async function loadSnapshot(options: LoadOptions): Promise<LoadHandle> {
  const load = new Load(options);
  return load.begin();
}

class Load {
  readonly #options: LoadOptions;
  readonly #target: Target;
  readonly #startedAtMs: number;
  readonly #times: Times = { qemuReadyMs: null, armedMs: null, resumedMs: null, residentMs: null };
  #prepared: Prepared | undefined;
  #guard: SnapshotGuard | undefined;
  #crew: Crew | undefined;
  /** What is being read ahead, until it has been moved. */
  #staging: Staging | undefined;
  #reader: PageReader | undefined;
  #info: TargetInfo | undefined;
  #plan: LoadPlan | undefined;
  #uffd: Uffd | undefined;
  #state: LoadState | undefined;
  #serving: Serving | undefined;
  /** Begun on a guess that nobody has looked at yet. */
  #early: BegunServing | undefined;
  /** Of the target, since somebody had a use for them. */
  readonly #helpers: HelperRecord[] = [];
  /** The load state, and the open file that holds its lock. */
  readonly #stateFds: number[] = [];
  #dataBytes = 0;
  /** What is to be the working set is somebody else's file. */
  #isSetForeign = false;
  #handedOver = false;
  #isTargetOver = false;
  #unfinished: FslError | null = null;
  /** Set when `done` resolves. */
  #tidied: Promise<void> = Promise.resolve();

  constructor(options: LoadOptions) {
    this.#options = options;
    this.#target = options.target;
    this.#startedAtMs = options.startedAtMs ?? performance.now();
  }

  async begin(): Promise<LoadHandle> {
    try {
      if (this.#options.mode === "copy" && this.#options.source !== undefined) {
        throw new FslError(
          "USAGE",
          "mode copy: QEMU reads the snapshot itself, from no page source",
        );
      }
      return (this.#options.mode ?? "lazy") === "copy" ? await this.#copy() : await this.#lazy();
    } catch (error) {
      // Before it is undone: that ends a target of our own.
      const told = (await this.#target.explain?.(error)) ?? error;
      await this.#undo(told);
      throw told;
    }
  }

  /** QEMU's own load, for comparison: the snapshot itself is the seed. */
  async #copy(): Promise<LoadHandle> {
    const { snapshot } = (await this.#meet()).prepared;
    this.#target.giveSeed(snapshot.fd);
    await (
      await this.#handOver(snapshot, false)
    ).loaded;
    this.#guard?.check();
    this.#times.residentMs = this.#now();
    if (!this.#isPaused) await this.#resume();
    await this.#target.release();
    this.#closeOwn();
    return this.#handle(Promise.resolve(this.#report(true)));
  }

  async #lazy(): Promise<LoadHandle> {
    this.#crew = new Crew();
    this.#target.exited.then(() => {
      this.#isTargetOver = true;
    });
    const { prepared, plan } = await this.#meet();
    // Each helper ends what it is reading, and will have answered when the target is armed.
    this.#staging?.stop();
    const lazy = plan.blocks.filter((block) => block.way === "lazy");
    const fill = plan.blocks.filter((block) => block.way === "fill");
    const reader = this.#openReader(prepared);
    await this.#giveSeed(prepared, [...lazy, ...fill], reader);
    const { state, serving, served, zero } = await this.#arm(prepared, reader, lazy, fill);
    reader.close();
    await this.#mayRead();
    if (this.#options.source === undefined) this.#guard?.check();
    state.phase = PHASE_HANDING_OVER;
    const { snapshot } = prepared;
    // Where memory can be given back, nothing is waited for between a move's start and its end.
    if (!state.metadata.canDiscard && this.#staging?.isAnswered) this.#startMoves(state);
    const { loaded } = await this.#handOver(snapshot, !this.#isPaused && runsFromSeed(snapshot));
    await this.#bringMeanwhile(loaded, serving, state, zero);
    try {
      await Promise.all([loaded, served]);
      state.phase = PHASE_STATE_LOADED;
      if (this.#isPaused) await this.#target.putSettingsBack?.();
      else await this.#resume();
      state.phase = PHASE_RUNNING;
    } catch (error) {
      await this.#serveOn(error);
    }
    if (this.#staging === undefined) serving.startEager();
    return this.#handle(
      this.#finish(serving, state, prepared.set).catch((error) => this.#giveUp(serving, error)),
    );
  }

  /**
   * Somebody else's target that has taken its state needs its pages, whatever has become of the
   * control connection. @throws the error itself where that is not so
   */
  async #serveOn(error: unknown): Promise<void> {
    const target = this.#target;
    if (!target.isAttached || !target.isCommitted) throw error;
    // Another code means that the state could not be loaded.
    if (!isFslError(error) || error.code !== "TARGET_LOST" || (await hasEnded(target))) throw error;
    const what = `${target.description} was given its state, but its guest could not be resumed`;
    const message = `${what}: ${error.message}; resume it by QMP's cont`;
    this.#unfinished = new FslError("TARGET_LOST", message, { pid: target.pid }, error);
    this.#options.logger?.warn(`${what}: ${error.message}; its pages are served all the same`);
  }

  #sourceOf(snapshot: Snapshot): PageSourceSpec {
    return this.#options.source ?? { options: { fd: snapshot.fd } };
  }

  /** For the pages that are written before the guest runs. */
  #openReader({ snapshot, bitmaps }: Prepared): PageReader {
    this.#reader = new PageReader({
      source: this.#sourceOf(snapshot),
      blocks: snapshot.blocks
        .filter(({ idstr }) => (bitmaps.get(idstr)?.dataPages ?? 0) > 0)
        .map(({ idstr, usedLength, pageSize, pagesOffset }) => {
          return { idstr, usedLength, pageSize, pagesOffset };
        }),
      snapshotPath: snapshot.path,
      pidfd: this.#target.pidfd,
      mayRead: () => this.#mayRead(),
    });
    return this.#reader;
  }

  /**
   * For what is read before anything is handed over: waits while a writer may be about to be let in.
   * @throws FslError SNAPSHOT_OPEN when the snapshot was changed, TARGET_LOST when there is nobody to read for any
   * more; the reason of `cancel`
   */
  async #mayRead(): Promise<void> {
    for (;;) {
      this.#options.cancel?.throwIfAborted();
      if (this.#isTargetOver) {
        throw new FslError("TARGET_LOST", "QEMU ended while its memory was written");
      }
      // Whatever comes from the file; its guard looks ten times a second.
      if (this.#state?.halted !== true) return;
      this.#guard?.check();
      await Bun.sleep(HOLD_LOOK_MS);
    }
  }

  /** The prepared seed if it fits what was planned, else a new one. */
  async #giveSeed(
    prepared: Prepared,
    notSeeded: readonly BlockPlan[],
    reader: PageReader,
  ): Promise<void> {
    const { snapshot, seedFd, isSeedGiven, seededWithout, bitmaps } = prepared;
    const names = new Set(notSeeded.map(({ block }) => block.idstr));
    if (seedFd >= 0 && names.symmetricDifference(seededWithout).size === 0) {
      if (!isSeedGiven) this.#target.giveSeed(seedFd);
      return;
    }
    const newFd =
      this.#options.source === undefined
        ? makeSeed(snapshot, names)
        : await makeSeedFrom(reader, snapshot, names, bitmaps);
    try {
      this.#target.giveSeed(newFd);
    } finally {
      closeSync(newFd);
    }
  }

  /** By the caller's wish, or by the `-S` of whoever started the target. */
  get #isPaused(): boolean {
    return this.#options.paused === true || this.#info?.startsStopped === true;
  }

  /** Null when there is none, or none that fits: that is worth a word, and no reason to fail. */
  #readWorkingSet(snapshot: Snapshot): WorkingSet | null {
    const { workingSet, logger } = this.#options;
    if (workingSet === undefined) return null;
    try {
      const set = readWorkingSet(workingSet);
      if (set === null || identityFits(set.identity, workingSetIdentity(snapshot))) return set;
      logger?.info(`working set ${workingSet}: of another snapshot, not used`);
    } catch (error) {
      if (!isFslError(error)) throw error;
      logger?.warn(`${error.message}; not used`);
      this.#isSetForeign = error.details["isForeign"] === true;
    }
    return null;
  }

  /** Writes down what the guest touched first. The place need not be writable. */
  #recordWorkingSet(before: WorkingSet | null, faultLogLength: number): void {
    const [{ workingSet, logger }, state, snapshot] = [
      this.#options,
      this.#state,
      this.#prepared?.snapshot,
    ];
    if (workingSet === undefined || state === undefined || snapshot === undefined) return;
    if (this.#isSetForeign) return;
    const set = growWorkingSet(before, workingSetIdentity(snapshot), state, faultLogLength);
    if (set === null) return;
    try {
      writeWorkingSet(workingSet, set);
    } catch (error) {
      logger?.info(`working set ${workingSet}: cannot be written: ${(error as Error).message}`);
    }
  }

  /** Opens the snapshot while the target starts, then holds the two against one another. */
  async #meet(): Promise<{ prepared: Prepared; plan: LoadPlan }> {
    const { snapshotOffset } = this.#options;
    this.#lookForEarlier();
    // Told at once: a target that dies at its start must not leave an unhandled rejection behind.
    const connected = this.#target.connect();
    connected.catch(() => {});
    await this.#target.asked?.();
    const snapshot = openSnapshot(
      resolve(this.#options.snapshot),
      snapshotOffset === undefined ? {} : { offset: snapshotOffset },
    );
    if (snapshot.blocks.reduce((sum, { usedLength }) => sum + usedLength, 0) > UNSEEN_MAX) {
      const info = await unlessCancelled(connected, this.#options.cancel);
      planLoad(snapshot, info, { bitmaps: new Map(), lazyDespiteDiscards: false });
    }
    const set = this.#readWorkingSet(snapshot);
    // The pages of a source of the caller's own are waited for when the target is there.
    const seedsNow = this.#options.mode !== "copy" && this.#options.source === undefined;
    const seedFile = seedsNow ? this.#target.takeSeedFile?.() : undefined;
    const prepared = prepare(snapshot, seedsNow, seedFile, set);
    this.#prepared = prepared;
    this.#guard = await SnapshotGuard.take(snapshot);
    // Whoever limits the eager load does not want so much at once.
    const isLimited = (this.#options.eager?.bytesPerSecond ?? 0) > 0;
    // Not sooner: QEMU needs the CPU. Where helpers do the work, the fault loop has time for the rest.
    const isLeftToFaultLoop = this.#target.mayHaveHelpers === true && seedsNow && !isLimited;
    if (!isLeftToFaultLoop) this.#crew?.hireEager(eagerWidth(this.#options));
    if (seedsNow && !isLimited) this.#beginEarly(prepared).catch(() => {});
    const info = await unlessCancelled(connected, this.#options.cancel);
    this.#info = info;
    this.#times.qemuReadyMs = info.readyAtMs - this.#startedAtMs;
    const plan = planLoad(snapshot, info, {
      bitmaps: prepared.bitmaps,
      lazyDespiteDiscards: this.#options.lazyDespiteDiscards ?? false,
    });
    for (const warning of plan.warnings) this.#options.logger?.warn(warning);
    this.#plan = plan;
    return { prepared, plan };
  }

  /** While the target starts: a guess. What is wrong with it shows when it is done in earnest. */
  async #beginEarly(prepared: Prepared): Promise<void> {
    await this.#readAhead(prepared);
    if (this.#staging !== undefined) await this.#serveEarly(prepared);
  }

  /**
   * While the target builds its machine: the fault loop starts, for RAM that is where it seems to be.
   * That takes 2 ms, and later the first fault would come before it is there.
   */
  async #serveEarly(prepared: Prepared): Promise<void> {
    const { blocks, zeroRuns } = prepared;
    const guess = await this.#target.guess?.(blocks.map(lengthOf));
    if (guess == null || this.#info !== undefined || this.#prepared === undefined) return;
    const plans = blocks.flatMap((block, index) => {
      const region = guess.regions[index];
      return region === undefined ? [] : [{ block, region }];
    });
    const uffd = new Uffd(guess.uffdFd);
    uffd.api(0);
    this.#early = this.#beginServing(
      prepared,
      {
        blocks: plans.map(({ block, region }) =>
          stateBlock(
            { ...block, usedLength: lengthOf(block) },
            region,
            region.pageSize === block.pageSize,
          ),
        ),
        registered: plans.flatMap((plan) => planRegistration(zeroRuns, plan).registered),
        paused: this.#options.paused === true || guess.startsStopped,
        canDiscard: false,
        watched: { balloons: blocks.length > 0, helpers: false },
      },
      blocks.map(({ data }) => data),
      uffd,
    );
  }

  /**
   * The Worker gets ready, and the target takes its copy of the load state, while we go on: whoever comes after a
   * fsl that has died sees by it what to undo. @param data for each block: bit set = page with bytes in the snapshot
   */
  #beginServing(
    prepared: Prepared,
    layout: StateLayout,
    data: readonly Int32Array[],
    uffd: Uffd,
  ): BegunServing {
    const { state, fd } = LoadState.create(this.#describe(prepared, layout));
    this.#stateFds.push(fd, lockState(fd));
    for (const block of state.blocks) block.data.set(data[block.index] ?? []);
    const kept = this.#keepState(fd);
    kept.catch(() => {});
    const serving = this.#makeServing(prepared, state, uffd);
    this.#serving = serving;
    const served = this.#serve(prepared, serving, state);
    return { state, serving, served, kept };
  }

  /** Its helpers read what the guest will need first. */
  async #readAhead({ snapshot, blocks, order, set }: Prepared): Promise<void> {
    const helpers = (await this.#target.earlyHelpers?.()) ?? [];
    const width = Math.min(helpers.length, eagerWidth(this.#options));
    if (width === 0 || this.#info !== undefined || this.#prepared === undefined) return;
    if (blocks.some(({ pageSize }) => pageSize !== HOST_PAGE_LENGTH)) return; // Nothing that could be moved.
    const plan = planStaging(blocks, order, set, STAGED_CHUNKS);
    this.#staging = new Staging(plan, helpers.slice(0, width), snapshot.fd, helpers.slice(width));
  }

  /** Somebody else's target may hold what an earlier fsl has left in it. */
  #lookForEarlier(): void {
    const target = this.#target;
    if (!target.isAttached) return;
    const earlier = findEarlier(target.pid);
    if (earlier === null) return;
    this.#options.logger?.info(
      `${target.description} holds what a dead fsl has left, which is undone first; if it does not ` +
        `answer, its state was handed over already: fsl resume --pid ${target.pid}`,
    );
    target.forgetEarlier?.(earlier);
  }

  /**
   * Registers, serves faults, and corrects what was in memory already; all before the state is
   * handed over.
   */
  async #arm(
    prepared: Prepared,
    reader: PageReader,
    lazy: BlockPlan[],
    fill: BlockPlan[],
  ): Promise<{
    state: LoadState;
    serving: Serving;
    served: Promise<void>;
    zero: readonly (readonly AddressRange[])[];
  }> {
    const canDiscard = this.#info?.canDiscard ?? false;
    const early = this.#early;
    if (early === undefined && this.#target.hasHelpers !== true) this.#dropStaged();
    const uffd = new Uffd(await this.#target.takeUserfaultfd());
    this.#uffd = uffd;
    if (early === undefined) uffd.api(canDiscard ? UFFD_FEATURES.EVENT_REMOVE : 0);
    const movable = registerBlocks(uffd, lazy, this.#options.onError === "poison");
    const registrations = lazy.map((plan) => planRegistration(prepared.zeroRuns, plan));
    const layout = {
      blocks: lazy.map(({ block, region }) => stateBlock(block, region, movable.has(block.idstr))),
      registered: registrations.flatMap((registration) => registration.registered),
      paused: this.#isPaused,
      canDiscard,
      watched: this.#watched(lazy),
    };
    const data = lazy.map(({ bitmap }) => bitmap.words);
    const { state, serving, served, kept } =
      (await this.#adoptEarly(prepared, layout)) ??
      this.#beginServing(prepared, layout, data, uffd);
    this.#state = state;
    for (const { bitmap, block } of lazy) this.#dataBytes += bitmap.dataPages * block.pageSize;
    const resident = findResident(this.#target.pid, lazy, state);
    if (fill.length > 0 || residentLength(resident) > 0) {
      await this.#fill(prepared, reader, resident, fill);
    }
    // The default source cannot fail later, and `loadState` itself waits for QEMU's answer about the
    // kept descriptor.
    await served;
    if (this.#options.source !== undefined) await kept;
    this.#times.armedMs = this.#now();
    return { state, serving, served, zero: registrations.map(({ zero }) => zero) };
  }

  /** What is in memory already gets its bytes, and what cannot be lazy all of them. */
  async #fill(
    prepared: Prepared,
    reader: PageReader,
    resident: readonly ResidentPages[],
    blocks: readonly BlockPlan[],
  ): Promise<void> {
    const { pid, isAttached } = this.#target;
    const width = eagerWidth(this.#options);
    const filled = fillMemory([...jobsOfResident(resident), ...jobsOfFilled(pid, blocks)], {
      pid,
      reader,
      // Those that read ahead have something to do.
      helpers: this.#staging === undefined ? this.#helpers.slice(0, width) : [],
      fileFd: prepared.snapshot.fd,
      crew: (this.#crew ??= new Crew()),
      width,
      survives: isAttached,
      mayRead: () => this.#mayRead(),
    });
    filled.catch(() => {});
    // Workers have begun before a word is said: on a terminal the first one takes 12 ms.
    await new Promise(setImmediate);
    try {
      this.#tellWhatIsFilled(blocks, residentLength(resident));
    } finally {
      // Whatever the caller's logger does: nothing is undone before it has ended.
      await filled;
    }
    markResident(resident);
  }

  /** Before it is over: it may take long. */
  #tellWhatIsFilled(fill: readonly BlockPlan[], residentBytes: number): void {
    const { logger } = this.#options;
    for (const { block, reason } of fill) {
      logger?.warn(`RAMBlock ${block.idstr} is loaded in full before resume: ${reason}`);
    }
    if (residentBytes === 0) return;
    const isMuch = residentBytes >= MiB;
    const text = isMuch ? `${Math.round(residentBytes / MiB)} MiB` : `${residentBytes} bytes`;
    logger?.info(`${text} of RAM are in QEMU's memory already: filled before the guest runs`);
  }

  /**
   * What was begun while the target was starting, if that was right. If not, it is undone: no fault can
   * have come.
   */
  async #adoptEarly(prepared: Prepared, layout: StateLayout): Promise<BegunServing | undefined> {
    const early = this.#early;
    this.#early = undefined;
    if (early === undefined) return undefined;
    const metadata = this.#describe(prepared, layout);
    // Who the target is has been learned since.
    const guessed = { ...early.state.metadata, target: metadata.target };
    if (Bun.deepEquals(guessed, metadata, true)) {
      early.state.describe(metadata);
      return early;
    }
    this.#options.logger?.info(
      "QEMU's RAM is not what it seemed to be: the fault loop starts again",
    );
    // Its state stays locked: the target has it until it gets the other one.
    await early.serving.stop(false);
    this.#crew = new Crew();
    return undefined;
  }

  #describe({ snapshot }: Prepared, layout: StateLayout): StateMetadata {
    return {
      ...layout,
      registered: layout.registered.flatMap(({ startAddr, endAddr }) => [startAddr, endAddr]),
      target: this.#target.record(),
      snapshotPath: snapshot.path,
      snapshotIdentity: { ...snapshot.identity, streamOffset: snapshot.streamOffset },
      serving: recordServing(this.#options),
      source: this.#sourceOf(snapshot),
    };
  }

  #makeServing({ snapshot, blocks, order }: Prepared, state: LoadState, uffd: Uffd): Serving {
    const isOwnSource = this.#options.source !== undefined;
    // A guess that was wrong has taken them.
    if (!isOwnSource) this.#helpers.push(...(this.#target.takeHelpers?.() ?? []));
    return new Serving(
      this.#target,
      state,
      uffd,
      (this.#crew ??= new Crew()),
      this.#options,
      {
        // A source of the caller's own is asked for every page.
        records: isOwnSource ? [] : this.#helpers,
        fileFd: snapshot.fd,
        order: areAligned(state.blocks, blocks) ? order : undefined,
      },
      isOwnSource ? undefined : this.#guard,
    );
  }

  #serve({ set }: Prepared, serving: Serving, state: LoadState): Promise<void> {
    const replay = set === null ? new Int32Array(0) : planReplay(set, state);
    const served = serving.serveFaults(replay, this.#staging === undefined);
    served.catch(() => {});
    return served;
  }

  /** While the target loads its devices. One that cannot is ending, and its helpers with it. */
  async #bringMeanwhile(
    loaded: Promise<void>,
    serving: Serving,
    state: LoadState,
    zero: readonly (readonly AddressRange[])[],
  ): Promise<void> {
    let isLoaded: boolean | undefined;
    loaded.then(
      () => {
        isLoaded = true;
      },
      () => {
        isLoaded = false;
      },
    );
    const hasStaged = await this.#hasStaged(() => isLoaded !== undefined);
    if (isLoaded === false) return;
    if (hasStaged) this.#endMoves(serving, state);
    await this.#letZeroExtentsGo(state, zero);
  }

  /** Nobody can move it. */
  #dropStaged(): void {
    this.#staging?.stop();
    this.#staging = undefined;
  }

  /**
   * What helpers have read ahead can be moved: each has answered before it `isTooLate`. A read may take
   * long.
   */
  async #hasStaged(isTooLate: () => boolean): Promise<boolean> {
    const staging = this.#staging;
    if (staging === undefined) return false;
    while (!staging.isAnswered && !isTooLate()) {
      // Not by a timer: it would be 1 ms late or more, and most answer in half of that.
      staging.awaitAnswers(STAGED_WAIT_MS);
      await new Promise(setImmediate);
    }
    return staging.isAnswered;
  }

  /** What was read ahead goes into RAM that nobody has touched: by helpers, which are not waited for. */
  #startMoves(state: LoadState): void {
    if (this.#uffd === undefined) return;
    const whole = new WholeChunks({
      uffd: this.#uffd,
      state,
      counters: state.counters(MAIN_THREAD),
      workerIndex: MAIN_THREAD,
      movers: [],
      readsEvents: false,
      pagesCounter: C_EAGER_PAGES,
    });
    this.#staging?.startMoves(state, whole);
  }

  /** While the target loads its devices, or later. Helpers that have not answered are given up. */
  #endMoves(serving: Serving, state: LoadState): void {
    const staging = this.#staging;
    if (staging === undefined) return;
    const { lost } = staging;
    if (!staging.hasStartedMoves) this.#startMoves(state);
    this.#staging = undefined;
    staging.endMoves();
    serving.loseHelpers([...lost, ...staging.lost]);
  }

  /** The kernel fills them without us. Where that cannot be, faults in them are served. */
  async #letZeroExtentsGo(
    state: LoadState,
    zero: readonly (readonly AddressRange[])[],
  ): Promise<void> {
    const uffd = this.#uffd;
    if (uffd === undefined || zero.every((extents) => extents.length === 0)) return;
    const extents = new Map<BlockState, readonly AddressRange[]>();
    for (const block of state.blocks) extents.set(block, zero[block.index] ?? []);
    const spec = state.metadata.source as PageSourceSpec;
    try {
      const source = await makeSource(spec, state.metadata.blocks);
      const supply = new Supply(uffd, source, state.counters(MAIN_THREAD), state);
      try {
        releaseZeroExtents(uffd, state, supply, extents);
      } finally {
        supply.close();
        source.close();
      }
    } catch (error) {
      this.#options.logger?.info(`zero pages come by fault: ${(error as Error).message}`);
    }
  }

  /** Read-only: a later fsl believes what it says. @throws at once when there is no room for a descriptor */
  #keepState(fd: number): Promise<void> {
    const readable = openSync(`/proc/self/fd/${fd}`, "r");
    const kept = this.#target.keepDescriptor(KEPT_STATE, readable);
    return kept.finally(() => closeSync(readable));
  }

  /** Lets the target have its device state. @param resumes its guest runs then */
  async #handOver({ streamOffset, capabilities }: Snapshot, resumes: boolean): Promise<StateLoad> {
    this.#options.cancel?.throwIfAborted();
    this.#handedOver = true;
    return this.#target.loadState(streamOffset, capabilities, resumes);
  }

  async #resume(): Promise<void> {
    await this.#target.resume();
    this.#times.resumedMs ??= this.#now();
  }

  #handle(done: Promise<LoadReport>): LoadHandle {
    const [plan, info] = [this.#plan, this.#info];
    if (plan === undefined || info === undefined) throw new FslError("INTERNAL", "no plan");
    // Who does not await it is told by `exited`.
    done.catch(() => {});
    const supplyFailed = (): boolean => this.#serving?.supplyFailed ?? false;
    const unfinished = (): FslError | null => this.#unfinished;
    return {
      info,
      plan,
      done,
      tidied: done.then(() => this.#tidied),
      exited: this.#target.exited,
      progress: () => this.#progress(),
      failures: () => this.#serving?.failures() ?? [],
      get supplyFailed() {
        return supplyFailed();
      },
      get unfinished() {
        return unfinished();
      },
      resume: () => this.#resume(),
      hurry: () => this.#serving?.hurry(),
    };
  }

  /** fsl cannot serve any more. The target keeps all that another one needs; whoever waits goes on waiting. */
  async #giveUp(serving: Serving, error: unknown): Promise<never> {
    await serving.stop();
    this.#closeOwn();
    this.#target.disconnect();
    throw error;
  }

  /** Devices that break what lazy memory relies on, should they be plugged in. */
  #watched(lazy: readonly BlockPlan[]): HotplugWants {
    return {
      balloons: this.#info?.canDiscard !== true && lazy.length > 0,
      helpers: lazy.some(({ region }) => region.shared),
    };
  }

  /** Brings in the rest, then lets go of everything. */
  async #finish(serving: Serving, state: LoadState, set: WorkingSet | null): Promise<LoadReport> {
    let recordedLength: number | undefined;
    const timer = setTimeout(() => {
      recordedLength = this.#state?.faultLogLength;
    }, RECORD_MS);
    const { watched } = state.metadata;
    const hotplug = new HotplugHold(this.#target, serving, watched, this.#options.logger);
    const endMs = performance.now() + STAGED_PATIENCE_MS;
    await this.#hasStaged(() => performance.now() > endMs);
    this.#endMoves(serving, state);
    const complete = await serving.bringRest();
    this.#unfinished ??= await hotplug.end(complete);
    clearTimeout(timer);
    if (complete) {
      this.#times.residentMs = this.#now();
      if (!this.#isPaused) {
        this.#recordWorkingSet(set, recordedLength ?? this.#state?.faultLogLength ?? 0);
      }
      const left = await serving.finish();
      this.#unfinished ??= left;
    } else {
      await serving.stop();
    }
    const report = this.#report(complete);
    this.#tidied = this.#tidy(complete);
    return report;
  }

  /** After the load: huge pages back, at leisure; then nothing of it is left. */
  async #tidy(complete: boolean): Promise<void> {
    if (complete && this.#state !== undefined) {
      await giveHugePagesBack(this.#target, this.#state, () => this.#isTargetOver);
    }
    this.#closeOwn();
  }

  #progress(): LoadProgress {
    if (this.#state === undefined) {
      return {
        dataBytes: this.#dataBytes,
        loadedBytes: this.#dataBytes,
        faults: 0,
        failedPages: 0,
      };
    }
    return progressOf(this.#state, this.#dataBytes);
  }

  #report(complete: boolean): LoadReport {
    const { mode = "lazy" } = this.#options;
    return reportOf(this.#state ?? null, {
      times: { ...this.#times },
      mode,
      complete,
      blocks: (this.#plan?.blocks ?? []).map(({ block, way, reason, bitmap }) => ({
        idstr: block.idstr,
        ...(mode === "copy" ? { way: mode, reason: "by QEMU itself" } : { way, reason }),
        length: block.usedLength,
        dataBytes: bitmap.dataPages * block.pageSize,
      })),
    });
  }

  /**
   * Before the state was handed over: everything back as it was. After it the device state failed
   * to load: the guest has never run, and is ended before the userfaultfd goes. QEMU's own load of
   * everything needs nothing of fsl.
   */
  async #undo(error: unknown): Promise<void> {
    this.#staging?.stop();
    this.#staging?.endMoves();
    const isCut = isFslError(error) && error.code === "TARGET_LOST" && this.#uffd === undefined;
    if (isCut && this.#target.isAttached && this.#target.isCommitted) {
      this.#target.disconnect();
    } else if (this.#handedOver && this.#target.isCommitted) {
      await endInOrder(this.#target);
      await this.#serving?.stop();
    } else {
      await this.#serving?.stop();
      const isLeft = this.#target.isAttached && !this.#isTargetOver;
      if (isLeft && this.#uffd !== undefined) await this.#clearMemory();
      await this.#target.abandon().catch(() => {});
    }
    this.#crew?.dismiss();
    this.#closeOwn();
  }

  /** QEMU's own load leaves zero pages alone: they must be zero again for the next one who tries. */
  async #clearMemory(): Promise<void> {
    const touched = this.#plan?.blocks.filter(({ way }) => way !== "seed") ?? [];
    try {
      await clearBrought(this.#target.pid, touched);
    } catch (error) {
      // The error that led here is the one to report.
      this.#options.logger?.warn(
        `${(error as Error).message}; start ${this.#target.description} anew`,
      );
    }
  }

  #closeOwn(): void {
    this.#uffd?.close();
    this.#reader?.close();
    for (const fd of this.#stateFds.splice(0)) sys.close(fd);
    if (this.#prepared && this.#prepared.seedFd >= 0) sys.close(this.#prepared.seedFd);
    this.#guard?.close();
    this.#prepared?.snapshot.close();
    this.#prepared = undefined;
  }

  #now(): number {
    return performance.now() - this.#startedAtMs;
  }
}

/**
 * How long helpers that read ahead may take to end that when the guest runs, and how long the main thread
 * waits for them at a time.
 */
const STAGED_PATIENCE_MS = 2000;
const STAGED_WAIT_MS = 1;
/** How often it is looked whether a writer has gone away, ms. */
const HOLD_LOOK_MS = 5;

/** How long a target whose state cannot be loaded may take to end in order, before SIGKILL. */
const END_GRACE_MS = 2000;

/** It removes its sockets and its pid file. */
async function endInOrder(target: Target): Promise<void> {
  target.signal("SIGTERM");
  const timer = setTimeout(() => target.kill(), END_GRACE_MS);
  await target.exited;
  clearTimeout(timer);
}

async function unlessCancelled<T>(work: Promise<T>, cancel: AbortSignal | undefined): Promise<T> {
  if (cancel === undefined) return work;
  cancel.throwIfAborted();
  const cancelled = Promise.withResolvers<never>();
  const reject = (): void => cancelled.reject(cancel.reason);
  cancel.addEventListener("abort", reject);
  try {
    return await Promise.race([work, cancelled.promise]);
  } finally {
    cancel.removeEventListener("abort", reject);
  }
}

/**
 * RAM whose bitmaps are read before the target is seen, bytes: a sparse file of some KiB can say that it has
 * a hundred times as much memory as there is disk, and only a target that has it, too, is worth the 32 MiB
 * for each TiB.
 */
const UNSEEN_MAX = 2 ** 40;

/**
 * How long after resume a fault still is a first touch that the next load should bring in
 * beforehand.
 */
const RECORD_MS = 2000;

function workingSetIdentity(snapshot: Snapshot): WorkingSetIdentity {
  const { size, mtimeNs } = snapshot.identity;
  return { size, mtimeNs, streamOffset: snapshot.streamOffset };
}

/** What can be worked out of the snapshot alone, while the target starts. */
interface Prepared {
  readonly snapshot: Snapshot;
  readonly bitmaps: ReadonlyMap<string, PageBitmap>;
  readonly zeroRuns: ReadonlyMap<string, readonly PageSpan[]>;
  /** Blocks that will most likely be lazy, and the order of their chunks. */
  readonly blocks: readonly AlignedBlock[];
  readonly order: Uint32Array;
  /**
   * A seed without these blocks, and their names; -1 when there is none.
   */
  readonly seedFd: number;
  /** The target has it already. */
  readonly isSeedGiven: boolean;
  readonly seededWithout: ReadonlySet<string>;
  readonly set: WorkingSet | null;
}

function prepare(
  snapshot: Snapshot,
  seedsNow: boolean,
  seedFile: number | undefined,
  set: WorkingSet | null,
): Prepared {
  const bitmaps = new Map<string, PageBitmap>();
  const zeroRuns = new Map<string, readonly PageSpan[]>();
  const seededWithout = new Set<string>();
  const lazy: SnapshotBlock[] = [];
  for (const block of snapshot.blocks) {
    if (block.notSaved) continue;
    const bitmap = snapshot.pageBitmap(block);
    bitmaps.set(block.idstr, bitmap);
    if (bitmap.dataPages * block.pageSize <= SEED_DATA_MAX) continue;
    seededWithout.add(block.idstr);
    zeroRuns.set(block.idstr, findZeroRuns(bitmap, block.pageSize));
    const { idstr, pageSize, pageCount, pagesOffset } = block;
    lazy.push({ idstr, pageSize, pageCount, pagesOffset, data: bitmap.words });
  }
  const blocks = alignBlocks(lazy);
  const seedFd = seedsNow ? makeSeed(snapshot, seededWithout, seedFile) : -1;
  const order = orderChunks(blocks);
  const isSeedGiven = seedFile !== undefined;
  return { snapshot, bitmaps, zeroRuns, blocks, order, seedFd, isSeedGiven, seededWithout, set };
}

/** What a guess can be wrong about. */
interface StateLayout extends Pick<StateMetadata, "blocks" | "paused" | "canDiscard" | "watched"> {
  readonly registered: readonly AddressRange[];
}

/** From a guess on, while the target was starting, or from arming on. */
interface BegunServing {
  readonly state: LoadState;
  readonly serving: Serving;
  readonly served: Promise<void>;
  /** The target has its copy of the state. */
  readonly kept: Promise<void>;
}

function lengthOf({ pageCount, pageSize }: AlignedBlock): number {
  return pageCount * pageSize;
}

function stateBlock(
  block: Pick<StateBlock, "idstr" | "usedLength" | "pageSize" | "pagesOffset">,
  region: Pick<GuestRegion, "hostAddr" | "pageSize">,
  movable: boolean,
): StateBlock {
  return {
    idstr: block.idstr,
    hostAddr: region.hostAddr,
    usedLength: block.usedLength,
    pageSize: block.pageSize,
    hostPageSize: region.pageSize,
    pagesOffset: block.pagesOffset,
    movable,
  };
}
