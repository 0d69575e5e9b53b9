/**
 * `loadSnapshot`: joins a snapshot, a page source and a target, and owns their life. Runs on the main thread and blocks on
 * nothing: faults are served by a Worker from before the device state is loaded until all RAM is in.
 *
 *   open and parse ─┐
 *   start Workers   ├─▶ plan ─▶ arm ─▶ serve faults ─▶ device state ─▶ resume ─▶ eager load ─▶ unregister, let go
 *   target starts  ─┘   every check is before this line ──┘ (it works once and cannot be undone)
 *
 * The userfaultfd is never closed and no range is unregistered while a page is missing: the kernel would let the guest go
 * on with zeros. If fsl dies, the target's own copy of the descriptor keeps the guest waiting.
 */
import { closeSync, openSync } from "node:fs";
import { availableParallelism } from "node:os";
import { resolve } from "node:path";
import { FslError, isFslError } from "../errors.ts";
import { hex, KiB } from "../pages.ts";
import type { PageBitmap } from "../snapshot/page-bitmap.ts";
import { planSeed, writeSeed } from "../snapshot/seed.ts";
import { openSnapshot, type Snapshot } from "../snapshot/snapshot.ts";
import { makeSource } from "../source/make-source.ts";
import type { PageSourceSpec } from "../source/page-source.ts";
import * as sys from "../sys/native.ts";
import { EFD_CLOEXEC, EFD_NONBLOCK, MFD_CLOEXEC, UFFD_FEATURES } from "../sys/abi.ts";
import { Uffd } from "../uffd/uffd.ts";
import type { ExitStatus, Target, TargetInfo } from "../vmm/target.ts";
import {
  correctResident,
  fillBlocks,
  findZeroRuns,
  planRegistration,
  registerBlocks,
  releaseZeroExtents,
  type ZeroRun,
} from "./arm.ts";
import { countMissing } from "./bits.ts";
import { planChunks } from "./eager-loop.ts";
import type { PageFailure } from "./fault-loop.ts";
import { type BlockPlan, type LoadPlan, planLoad, SEED_DATA_MAX } from "./plan.ts";
import type { EagerWorkerStart, FaultWorkerStart } from "./protocol.ts";
import type { AddressRange } from "./resident.ts";
import { type LoadProgress, type LoadReport, progressOf, reportOf } from "./report.ts";
import {
  type BlockState,
  LoadState,
  PHASE_FINISHED,
  PHASE_STATE_LOADED,
  type StateBlock,
  WORKERS_MAX,
} from "./state.ts";
import { Supply } from "./supply.ts";
import { Crew } from "./workers.ts";

/** Names under which the target keeps copies of our descriptors. */
const KEPT_STATE = "fsl-state";
/** An eager pass that leaves pages behind (a Worker died with a chunk in hand) is followed by another one. */
const EAGER_PASSES_MAX = 16;

export type LoadMode = "lazy" | "copy";

export interface Logger {
  info(message: string): void;
  warn(message: string): void;
}

export interface EagerOptions {
  /** Eager Workers, 1..8. Default: the host's CPUs, at most 2. */
  readonly workers?: number;
  /** Largest single copy in bytes, 4 KiB..2 MiB. Default 256 KiB. */
  readonly pieceLength?: number;
  /** Limit of the eager load in bytes per second; 0 or absent = none. */
  readonly bytesPerSecond?: number;
  /** Nice value of the eager Workers, 0..19. Default 10. */
  readonly nice?: number;
}

export interface LoadOptions {
  /** Path of the snapshot. */
  readonly snapshot: string;
  /** File offset in bytes of the stream within the file. */
  readonly snapshotOffset?: number;
  readonly target: Target;
  /** lazy (default): resume at once. copy: QEMU's own load of everything, then resume. */
  readonly mode?: LoadMode;
  /** Leave the guest stopped after its state is loaded. */
  readonly paused?: boolean;
  readonly eager?: EagerOptions;
  /** Where page bytes come from; absent = the snapshot file. */
  readonly source?: PageSourceSpec;
  /** Data pages brought in around a faulting page, 1..512. Default 16. */
  readonly clusterPages?: number;
  /** Shared memory and huge pages lazily, although discards of them cannot be noticed. */
  readonly lazyDespiteDiscards?: boolean;
  readonly logger?: Logger;
  /** `performance.now()` from which the report's times count; default: the call. */
  readonly startedAtMs?: number;
}

export interface LoadHandle {
  readonly info: TargetInfo;
  readonly plan: LoadPlan;
  /** All RAM is in, or the target has ended before. Rejects only for a bug in fsl. */
  readonly done: Promise<LoadReport>;
  /** The target has ended. */
  readonly exited: Promise<ExitStatus>;
  progress(): LoadProgress;
  /** Pages that cannot be read at this moment. */
  failures(): readonly PageFailure[];
  resume(): Promise<void>;
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
  readonly #failures = new Map<string, PageFailure>();
  #snapshot: Snapshot | undefined;
  #prepared: Prepared | undefined;
  #crew: Crew | undefined;
  #info: TargetInfo | undefined;
  #plan: LoadPlan | undefined;
  #uffd: Uffd | undefined;
  #state: LoadState | undefined;
  #stateFd = -1;
  #stopFd = -1;
  #registered: readonly AddressRange[] = [];
  #dataBytes = 0;
  #handedOver = false;

  constructor(options: LoadOptions) {
    this.#options = options;
    this.#target = options.target;
    this.#startedAtMs = options.startedAtMs ?? performance.now();
  }

  async begin(): Promise<LoadHandle> {
    try {
      return (this.#options.mode ?? "lazy") === "copy" ? await this.#copy() : await this.#lazy();
    } catch (error) {
      await this.#undo();
      throw error;
    }
  }

  /** QEMU's own load, for comparison: the snapshot itself is the seed. */
  async #copy(): Promise<LoadHandle> {
    const { snapshot } = (await this.#meet()).prepared;
    const seedFd = openSync(`/proc/self/fd/${snapshot.fd}`, "r");
    this.#handedOver = true;
    try {
      await this.#target.loadState(seedFd, snapshot.streamOffset);
    } finally {
      closeSync(seedFd);
    }
    this.#times.residentMs = this.#now();
    if (!this.#options.paused) await this.#resume();
    await this.#target.release();
    return this.#handle(Promise.resolve(this.#report(true)));
  }

  async #lazy(): Promise<LoadHandle> {
    const eagerWorkers = this.#eagerWorkers();
    this.#crew = new Crew(eagerWorkers, {
      onFailure: (failure, demanded) => this.#fail(failure, demanded),
      onRecovered: (failure) => this.#recover(failure),
      onWorkerLost: (role, error, replaced) => {
        const next = replaced ? "another one takes over" : "given up: the guest waits";
        this.#options.logger?.warn(`${role} Worker failed: ${error.message}; ${next}`);
      },
      beforeReplacement: (start) => this.#state?.leaveCopy(start.workerIndex),
      afterReplacement: (start) => {
        if (start.role === "fault") this.#wakeAll();
      },
    });
    const { prepared, plan } = await this.#meet();
    const { snapshot } = prepared;
    const lazy = plan.blocks.filter((block) => block.way === "lazy");
    const fill = plan.blocks.filter((block) => block.way === "fill");
    await this.#arm(prepared, lazy, fill);
    const seedFd = takeSeed(prepared, [...lazy, ...fill]);
    this.#handedOver = true;
    try {
      await this.#target.loadState(seedFd, snapshot.streamOffset);
    } finally {
      closeSync(seedFd);
    }
    if (this.#state) this.#state.phase = PHASE_STATE_LOADED;
    if (!this.#options.paused) await this.#resume();
    return this.#handle(this.#finish());
  }

  /** Opens the snapshot while the target starts, then holds the two against one another. */
  async #meet(): Promise<{ prepared: Prepared; plan: LoadPlan }> {
    const { snapshotOffset } = this.#options;
    // Told at once: a target that dies at its start must not leave an unhandled rejection behind.
    const connected = this.#target.connect();
    connected.catch(() => {});
    const snapshot = openSnapshot(
      resolve(this.#options.snapshot),
      snapshotOffset === undefined ? {} : { offset: snapshotOffset },
    );
    this.#snapshot = snapshot;
    const prepared = prepare(snapshot, this.#options.mode ?? "lazy");
    this.#prepared = prepared;
    const info = await connected;
    this.#info = info;
    this.#times.qemuReadyMs = info.readyAtMs - this.#startedAtMs;
    const plan = planLoad(snapshot, info, {
      bitmaps: prepared.bitmaps,
      lazyDespiteDiscards: this.#options.lazyDespiteDiscards ?? false,
    });
    for (const warning of plan.warnings) this.#options.logger?.warn(warning);
    for (const { block, way, reason } of plan.blocks) {
      if (way !== "fill") continue;
      this.#options.logger?.warn(`RAMBlock ${block.idstr} is loaded in full before resume: ${reason}`);
    }
    this.#plan = plan;
    return { prepared, plan };
  }

  /** Registers, serves faults, and corrects what was in memory already; all before the state is handed over. */
  async #arm(prepared: Prepared, lazy: BlockPlan[], fill: BlockPlan[]): Promise<void> {
    const info = this.#info;
    if (info === undefined) throw new FslError("INTERNAL", "arming before the target is known");
    const { snapshot, zeroRuns } = prepared;
    const uffd = new Uffd(await this.#target.takeUserfaultfd());
    this.#uffd = uffd;
    uffd.api(info.canDiscard ? UFFD_FEATURES.EVENT_REMOVE : 0);
    registerBlocks(uffd, lazy);

    const registrations = lazy.map(({ region, block }) =>
      planRegistration(
        zeroRuns.get(block.idstr) ?? [],
        region.hostAddr,
        block.pageSize,
        region.pageSize,
        block.pageCount,
      ),
    );
    this.#registered = registrations.flatMap((registration) => registration.registered);
    const source = this.#options.source ?? { options: { fd: snapshot.fd } };
    const { state, fd } = LoadState.create({
      snapshotPath: snapshot.path,
      snapshotIdentity: { ...snapshot.identity, streamOffset: snapshot.streamOffset },
      blocks: lazy.map(stateBlock),
      registered: this.#registered.flatMap(({ startAddr, endAddr }) => [startAddr, endAddr]),
      canDiscard: info.canDiscard,
      source,
    });
    this.#state = state;
    this.#stateFd = fd;
    for (const [index, { bitmap, block }] of lazy.entries()) {
      const { buffer, byteOffset, length } = bitmap.words;
      state.blocks[index]?.data.set(new Int32Array(buffer, byteOffset, length));
      this.#dataBytes += bitmap.dataPages * block.pageSize;
    }
    const { pid } = this.#target;
    const corrected = correctResident(pid, snapshot, lazy, state);
    if (corrected > 0) {
      this.#options.logger?.info(`${corrected} bytes were in QEMU's memory already and were corrected`);
    }
    // The Worker gets ready and the target takes its copies while we go on here.
    const serving = this.#serve();
    const kept = this.#target.keepDescriptor(KEPT_STATE, fd);
    serving.catch(() => {});
    kept.catch(() => {});
    await this.#releaseZeroExtents(uffd, state, registrations.map(({ zero }) => zero));
    fillBlocks(pid, snapshot, fill);
    await Promise.all([serving, kept]);
    this.#times.armedMs = this.#now();
  }

  async #releaseZeroExtents(
    uffd: Uffd,
    state: LoadState,
    zero: readonly (readonly AddressRange[])[],
  ): Promise<void> {
    const extents = new Map<BlockState, readonly AddressRange[]>();
    for (const block of state.blocks) extents.set(block, zero[block.index] ?? []);
    const source = await makeSource(state.metadata.source as PageSourceSpec, state.metadata.blocks);
    const supply = new Supply(uffd, source, state.counters(WORKERS_MAX - 1));
    try {
      releaseZeroExtents(uffd, state, supply, extents);
    } finally {
      supply.close();
      source.close();
    }
  }

  async #serve(): Promise<void> {
    const { state, uffd, crew } = this.#armed();
    this.#stopFd = sys.check(sys.eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd");
    const start: FaultWorkerStart = {
      role: "fault",
      handle: state.handle,
      source: state.metadata.source as PageSourceSpec,
      uffdFd: uffd.fd,
      workerIndex: 0,
      stopFd: this.#stopFd,
      pidfd: this.#target.pidfd,
      clusterPages: this.#options.clusterPages ?? 16,
    };
    await crew.serveFaults(start);
  }

  async #resume(): Promise<void> {
    await this.#target.resume();
    this.#times.resumedMs ??= this.#now();
  }

  #handle(done: Promise<LoadReport>): LoadHandle {
    const { plan, info } = { plan: this.#plan, info: this.#info };
    if (plan === undefined || info === undefined) throw new FslError("INTERNAL", "no plan");
    // Who does not await it is told by `exited`.
    done.catch(() => {});
    return {
      info,
      plan,
      done,
      exited: this.#target.exited,
      progress: () => this.#progress(),
      failures: () => [...this.#failures.values()],
      resume: () => this.#resume(),
    };
  }

  /** Brings in the rest, then lets go of everything. */
  async #finish(): Promise<LoadReport> {
    const { state, crew } = this.#armed();
    const gone = this.#target.exited.then(() => "gone" as const);
    for (let pass = 0; pass < EAGER_PASSES_MAX && this.#missingPages() > 0; pass += 1) {
      state.resetChunks();
      const loading = crew.loadEagerly(this.#eagerStarts());
      loading.catch(() => {});
      const end = await Promise.race([loading, gone]);
      if (end === "gone") break;
    }
    const complete = this.#missingPages() === 0;
    if (complete) {
      this.#times.residentMs = this.#now();
      this.#unregister();
      state.phase = PHASE_FINISHED;
      this.#stopWorkers();
    } else {
      // Pages are missing, so nothing may be closed while the target lives.
      await gone;
      this.#stopWorkers();
    }
    await Promise.race([crew.faultLoopEnded.catch(() => {}), sleep(1000)]);
    const report = this.#report(complete);
    await this.#letGo();
    return report;
  }

  #unregister(): void {
    const { uffd } = this.#armed();
    for (const { startAddr, endAddr } of this.#registered) {
      // A target that ended meanwhile has nothing left to unregister.
      if (!uffd.unregister(startAddr, endAddr - startAddr)) return;
    }
  }

  #missingPages(): number {
    let missing = 0;
    for (const { data, done } of this.#armed().state.blocks) missing += countMissing(data, done);
    return missing;
  }

  #eagerStarts(): EagerWorkerStart[] {
    const { state, uffd } = this.#armed();
    const eager = this.#options.eager ?? {};
    const workers = this.#eagerWorkers();
    const order = Uint32Array.from(planChunks(state).keys());
    return Array.from({ length: workers }, (_, index) => ({
      role: "eager" as const,
      handle: state.handle,
      source: state.metadata.source as PageSourceSpec,
      uffdFd: uffd.fd,
      workerIndex: index + 1,
      pieceLength: eager.pieceLength ?? 256 * KiB,
      order,
      bytesPerSecond: (eager.bytesPerSecond ?? 0) / workers,
      nice: eager.nice ?? 10,
    }));
  }

  #eagerWorkers(): number {
    const wanted = this.#options.eager?.workers ?? Math.min(2, availableParallelism());
    return Math.max(1, Math.min(wanted, WORKERS_MAX - 1));
  }

  /** Every thread that waits faults again: for faults that a dead reader had taken. */
  #wakeAll(): void {
    for (const { startAddr, endAddr } of this.#registered) {
      this.#uffd?.wake(startAddr, endAddr - startAddr);
    }
  }

  #fail(failure: PageFailure, demanded: boolean): void {
    const key = `${failure.idstr}:${failure.pageIndex}`;
    const known = this.#failures.has(key);
    this.#failures.set(key, failure);
    if (known) return;
    const who = demanded ? "the vCPU that needs it waits" : "nobody waits for it yet";
    this.#options.logger?.warn(
      `RAMBlock ${failure.idstr}: page ${failure.pageIndex} cannot be read at file offset ` +
        `${hex(failure.fileOffset)}: ${sys.errnoText(failure.errno)}; ${who}, reading is tried again`,
    );
  }

  #recover(failure: PageFailure): void {
    this.#failures.delete(`${failure.idstr}:${failure.pageIndex}`);
    this.#options.logger?.info(
      `RAMBlock ${failure.idstr}: page ${failure.pageIndex} could be read again after ` +
        `${failure.attempts} attempts`,
    );
  }

  #progress(): LoadProgress {
    if (this.#state === undefined) {
      return { dataBytes: this.#dataBytes, loadedBytes: this.#dataBytes, faults: 0, failedPages: 0 };
    }
    return progressOf(this.#state, this.#dataBytes);
  }

  #report(complete: boolean): LoadReport {
    return reportOf(this.#state ?? null, {
      times: { ...this.#times },
      mode: this.#options.mode ?? "lazy",
      complete,
      blocks: (this.#plan?.blocks ?? []).map(({ block, way, reason, bitmap }) => ({
        idstr: block.idstr,
        way,
        reason,
        length: block.usedLength,
        dataBytes: bitmap.dataPages * block.pageSize,
      })),
    });
  }

  #armed(): { state: LoadState; uffd: Uffd; crew: Crew } {
    const [state, uffd, crew] = [this.#state, this.#uffd, this.#crew];
    if (state === undefined || uffd === undefined || crew === undefined) {
      throw new FslError("INTERNAL", "the load is not armed");
    }
    return { state, uffd, crew };
  }

  #stopWorkers(): void {
    this.#state?.stop();
    if (this.#stopFd >= 0) sys.write(this.#stopFd, ONE);
  }

  /** After the load: nothing of fsl stays in the target's way. */
  async #letGo(): Promise<void> {
    this.#crew?.dismiss();
    try {
      await this.#target.dropDescriptor(KEPT_STATE);
      await this.#target.release();
    } catch (error) {
      // A target that has ended needs no more; anything else is worth a word, but the guest runs.
      if (!isFslError(error) || error.code !== "TARGET_LOST") throw error;
    }
    this.#closeOwn();
  }

  /** Before the state was handed over: everything back as it was. After it: the target is lost or waits; it is kept. */
  async #undo(): Promise<void> {
    if (!this.#handedOver) {
      this.#stopWorkers();
      await this.#target.abandon().catch(() => {});
      this.#crew?.dismiss();
      this.#closeOwn();
      return;
    }
    // The device state failed to load: the guest has never run. It is ended before the userfaultfd goes.
    this.#target.kill();
    await this.#target.exited;
    this.#stopWorkers();
    this.#crew?.dismiss();
    this.#closeOwn();
  }

  #closeOwn(): void {
    this.#uffd?.close();
    if (this.#stateFd >= 0) sys.close(this.#stateFd);
    if (this.#stopFd >= 0) sys.close(this.#stopFd);
    if (this.#prepared && this.#prepared.seedFd >= 0) sys.close(this.#prepared.seedFd);
    this.#prepared = undefined;
    this.#stateFd = -1;
    this.#stopFd = -1;
    this.#snapshot?.close();
  }

  #now(): number {
    return performance.now() - this.#startedAtMs;
  }
}

/** What can be worked out of the snapshot alone, while the target starts. */
interface Prepared {
  readonly snapshot: Snapshot;
  readonly bitmaps: ReadonlyMap<string, PageBitmap>;
  readonly zeroRuns: ReadonlyMap<string, readonly ZeroRun[]>;
  /** A seed for the blocks that will most likely be lazy, and their names; -1 when there is none. */
  seedFd: number;
  readonly seededWithout: ReadonlySet<string>;
}

function prepare(snapshot: Snapshot, mode: LoadMode): Prepared {
  const bitmaps = new Map<string, PageBitmap>();
  const zeroRuns = new Map<string, readonly ZeroRun[]>();
  const seededWithout = new Set<string>();
  for (const block of snapshot.blocks) {
    if (block.notSaved) continue;
    const bitmap = snapshot.pageBitmap(block);
    bitmaps.set(block.idstr, bitmap);
    if (bitmap.dataPages * block.pageSize <= SEED_DATA_MAX) continue;
    seededWithout.add(block.idstr);
    zeroRuns.set(block.idstr, findZeroRuns(bitmap, block.pageSize));
  }
  const seedFd = mode === "lazy" ? makeSeed(snapshot, seededWithout) : -1;
  return { snapshot, bitmaps, zeroRuns, seedFd, seededWithout };
}

/** The prepared seed if it fits what was planned, else a new one. The caller closes it. */
function takeSeed(prepared: Prepared, notSeeded: readonly BlockPlan[]): number {
  const names = new Set(notSeeded.map(({ block }) => block.idstr));
  const fits = prepared.seedFd >= 0 && names.symmetricDifference(prepared.seededWithout).size === 0;
  if (!fits) return makeSeed(prepared.snapshot, names);
  const { seedFd } = prepared;
  prepared.seedFd = -1;
  return seedFd;
}

/** @returns a descriptor that is open for reading only, as QEMU wants it, at position 0 */
function makeSeed(snapshot: Snapshot, without: ReadonlySet<string>): number {
  // RLIMIT_FSIZE counts for memfds too; without this its signal would end us instead of giving EFBIG.
  sys.ignoreSignal(SIGXFSZ);
  const fd = sys.check(sys.memfdCreate("fsl-seed", MFD_CLOEXEC), "memfd_create of the seed");
  try {
    writeSeed(planSeed(snapshot, without), snapshot.fd, fd);
    return openSync(`/proc/self/fd/${fd}`, "r");
  } finally {
    sys.close(fd);
  }
}

const SIGXFSZ = 25;
/** What an eventfd takes: a u64 of 1. */
const ONE = new BigUint64Array([1n]);

function stateBlock({ block, region }: BlockPlan): StateBlock {
  return {
    idstr: block.idstr,
    hostAddr: region.hostAddr,
    usedLength: block.usedLength,
    pageSize: block.pageSize,
    hostPageSize: region.pageSize,
    pagesOffset: block.pagesOffset,
  };
}

function sleep(ms: number): Promise<void> {
  return new Promise((done) => setTimeout(done, ms));
}
