/**
 * Memory that is written before the guest runs: pages that are in the target's memory already, and blocks that cannot
 * be lazy. Much of it is read in place by the target's helpers, where there are some (in-place.ts), or written by the
 * eager Workers, each a piece at a time: neither has anything else to do yet. A little is written by whoever asks.
 */
import { FslError, isFslError } from "../errors.ts";
import { nextBit } from "../bits.ts";
import { MiB } from "../pages.ts";
import { fillInPlace, type InPlaceOptions, type InPlaceRun } from "./in-place.ts";
import { type BlockPlace, MemoryWriter } from "./memory-writer.ts";
import { PageReader } from "./page-reader.ts";
import { placeAs } from "./placement.ts";
import type { FillFailure, FillStart } from "./protocol.ts";
import { pagesIn, type PageSpan } from "./resident.ts";
import type { Crew, FillEnd } from "./workers.ts";

/** What of a block is written. */
export interface FillJob extends BlockPlace {
  /** File offset in bytes of page 0. */
  readonly pagesOffset: number;
  /** The block's page bitmap: bit set = page with bytes in the snapshot. */
  readonly data: Int32Array;
  /** Where pages without such bytes become zero. */
  readonly zeros: readonly PageSpan[];
  /** Where pages with such bytes get them. */
  readonly contents: readonly PageSpan[];
}

/** Less than that is written before anybody has been told of it, bytes. */
const SHARED_MIN = 4 * MiB;
/** What a Worker takes at a time, bytes: some 0.5 ms. */
const PIECE_LENGTH = 2 * MiB;
/** How often it is looked whether they may go on, ms. */
const LOOK_MS = 5;
/** How long Workers may take to end the piece that they are at, ms: a disk may hang. */
const END_MS = 1_000;

/** Words of `FillStart.control`. */
const NEXT_PIECE = 0;
const IS_HELD = 1;
const IS_OVER = 2;
const CONTROL_WORDS = 3;

export interface FillOptions extends Required<InPlaceOptions> {
  readonly pid: number;
  /** Of the main thread; Workers have one each like it. */
  readonly reader: PageReader;
  readonly crew: Crew;
  /** How many Workers. */
  readonly width: number;
  /** The target goes on when the load is given up. */
  readonly survives: boolean;
}

/**
 * Writes it all.
 * @throws FslError SNAPSHOT_OPEN when a page cannot be read, TARGET_LOST when the target cannot be written,
 * HOST_UNSUPPORTED without the privilege to; what `mayRead` throws. Nothing is written any more then, or it says so
 */
export async function fillMemory(jobs: readonly FillJob[], options: FillOptions): Promise<void> {
  const isMuch = lengthOf(jobs) >= SHARED_MIN;
  if (isMuch && options.helpers.length > 0 && (await fillInPlace(runsOf(jobs), options))) return;
  if (isMuch && (await fillByWorkers(jobs, options))) return;
  let next = 0;
  await fillPieces(jobs, options.pid, options.reader, () => next++);
}

/** Length of all that is looked at, bytes. */
function lengthOf(jobs: readonly FillJob[]): number {
  return jobs.reduce((sum, { zeros, contents, pageSize }) => {
    return sum + Math.max(pagesIn(zeros), pagesIn(contents)) * pageSize;
  }, 0);
}

/** As helpers read them. */
function* runsOf(jobs: readonly FillJob[]): Generator<InPlaceRun> {
  for (const { job, isZero, first, end } of piecesOf(jobs)) {
    const { data, hostAddr, pageSize, pagesOffset } = job;
    for (let page = nextBit(data, first, end, !isZero); page < end;) {
      const runEnd = nextBit(data, page, end, isZero);
      const at = page * pageSize;
      const offset = isZero ? null : pagesOffset + at;
      yield { addr: hostAddr + at, length: (runEnd - page) * pageSize, offset };
      page = nextBit(data, runEnd, end, !isZero);
    }
  }
}

/** @returns false when a Worker was lost, and what it had in hand is not there */
async function fillByWorkers(jobs: readonly FillJob[], options: FillOptions): Promise<boolean> {
  const { pid, reader, crew, width, mayRead } = options;
  const control = new Int32Array(new SharedArrayBuffer(CONTROL_WORDS * 4));
  const { source, blocks, snapshotPath, pidfd } = reader.options;
  const start: FillStart = {
    role: "fill",
    pid,
    // Not as a view of the load state: all of that would go with it.
    jobs: jobs
      .filter(({ zeros, contents }) => zeros.length + contents.length > 0)
      .map((job) => ({ ...job, data: job.data.slice() })),
    reader: { source, blocks, snapshotPath, pidfd },
    control,
  };
  let ends: readonly FillEnd[] | undefined;
  const ended = crew.fill(start, width).then((all) => {
    ends = all;
  });
  try {
    while (ends === undefined) {
      await Promise.race([ended, Bun.sleep(LOOK_MS)]);
      Atomics.store(control, IS_HELD, 1);
      await mayRead();
      Atomics.store(control, IS_HELD, 0);
    }
  } catch (error) {
    Atomics.store(control, IS_OVER, 1);
    await Promise.race([ended, Bun.sleep(END_MS)]);
    if (ends !== undefined || !options.survives) throw error;
    const what = `process ${pid}: what fsl could not read in time may be written to its memory yet`;
    const message = `${what}; end it, and load again`;
    throw new FslError("TARGET_LOST", message, { pid }, error);
  }
  for (const end of ends) {
    if (end !== null && end !== "lost") throw new FslError(end.code, end.message, end.details);
  }
  return !ends.includes("lost");
}

/** One Worker's part. @returns why there is no more of it; null when all is done, or is over */
export async function fillInWorker(start: FillStart): Promise<FillFailure | null> {
  const { pid, jobs, control } = start;
  placeAs(pid);
  const isOver = (): boolean => Atomics.load(control, IS_OVER) !== 0;
  const over = new Error("over");
  const mayRead = async (): Promise<void> => {
    while (!isOver() && Atomics.load(control, IS_HELD) !== 0) await Bun.sleep(1);
    if (isOver()) throw over;
  };
  const reader = new PageReader({ ...start.reader, mayRead });
  try {
    await fillPieces(jobs, pid, reader, () =>
      isOver() ? Infinity : Atomics.add(control, NEXT_PIECE, 1),
    );
    return null;
  } catch (error) {
    Atomics.store(control, IS_OVER, 1);
    if (error === over) return null;
    if (!isFslError(error)) throw error;
    const { code, message, details } = error;
    return { code, message, details };
  } finally {
    reader.close();
  }
}

/** @param claim the number of the piece that is to be written next, rising */
async function fillPieces(
  jobs: readonly FillJob[],
  pid: number,
  reader: PageReader,
  claim: () => number,
): Promise<void> {
  const writer = new MemoryWriter(pid);
  try {
    let claimed = claim();
    let number = 0;
    for (const { job, isZero, first, end } of piecesOf(jobs)) {
      if (number++ < claimed) continue;
      if (isZero) await writer.writeZeros(job, job.data, first, end, false);
      else await writer.writeData(reader, job, job.data, first, end);
      claimed = claim();
    }
  } finally {
    writer.close();
  }
}

interface Piece extends PageSpan {
  readonly job: FillJob;
  readonly isZero: boolean;
}

/** In the same order for everybody. */
function* piecesOf(jobs: readonly FillJob[]): Generator<Piece> {
  for (const job of jobs) {
    const pages = PIECE_LENGTH / job.pageSize;
    for (const isZero of [true, false]) {
      for (const { first, end } of isZero ? job.zeros : job.contents) {
        for (let at = first; at < end; at += pages) {
          yield { job, isZero, first: at, end: Math.min(end, at + pages) };
        }
      }
    }
  }
}
