/**
 * RAM that is filled before the guest runs gets its bytes in place: the target's helper tasks read them from the
 * snapshot straight into it, each a packet at a time, and make the rest zero where it is not. That is what an ordinary
 * load does, on as many CPUs as there are helpers. Runs on the main thread, and lets its events through meanwhile.
 *
 * Whoever asks has another way (fill.ts), which also knows to say what is wrong: here there is only "all has come" or
 * not.
 */
import { FslError } from "../errors.ts";
import { MiB } from "../pages.ts";
import { HELPER_CALLS_MAX, POLLIN } from "../sys/abi.ts";
import { type HelperRecord, HelperTask, isStoppedTask, reapHelper } from "../sys/helper-task.ts";
import * as sys from "../sys/native.ts";

/** A run of bytes in the target's memory: present, or not registered. */
export interface InPlaceRun {
  readonly addr: number;
  readonly length: number;
  /** Where the snapshot has its bytes; null = zeros. */
  readonly offset: number | null;
}

/** What one call reads: a helper that is told to stop does so between two of them. */
const CALL_LENGTH = MiB;
/** What one packet reads, some 2 ms: at the end one helper waits for the other for so long at most. */
const PACKET_LENGTH = 8 * MiB;
/** Longest wait in one go, ms: so long may signals and messages be kept waiting. */
const WAIT_MS = 5;
/** Without an answer for so long, it is looked at who does not give it, ms. */
const SILENCE_MS = 1_000;
/** How long a helper may take to stop, ms. */
const PATIENCE_MS = 500;

export interface InPlaceOptions {
  /** Nobody else uses them meanwhile. */
  readonly helpers: readonly HelperRecord[];
  /** The snapshot, in this process. */
  readonly fileFd: number;
  /** Awaited now and then: it may take its time, or throw. */
  readonly mayRead?: () => Promise<void>;
}

/**
 * Fills the runs, in order as they come. @returns false when not all of it could be: a page that cannot be read, a
 * helper that has ended, or that somebody has stopped
 * @throws what `mayRead` throws; FslError TARGET_LOST when a helper can be neither stopped nor ended
 */
export async function fillInPlace(
  runs: Iterable<InPlaceRun>,
  options: InPlaceOptions,
): Promise<boolean> {
  const fillers: Filler[] = [];
  try {
    const calls = callsOf(runs);
    for (const record of options.helpers) fillers.push(new Filler(record, options.fileFd));
    return await fillAll(calls, fillers, options.mayRead);
  } finally {
    for (const filler of fillers) await filler.end();
  }
}

async function fillAll(
  calls: Iterator<InPlaceRun, undefined>,
  fillers: readonly Filler[],
  mayRead: (() => Promise<void>) | undefined,
): Promise<boolean> {
  const fds = new Int32Array(fillers.length);
  const revents = new Int32Array(fillers.length);
  let quietSinceMs = performance.now();
  while (fillers.every((filler) => filler.isRight)) {
    await mayRead?.();
    for (const filler of fillers) if (!filler.isRunning) filler.send(calls);
    if (!fillers.some((filler) => filler.isRunning)) break;
    for (const [index, { isRunning, fd }] of fillers.entries()) fds[index] = isRunning ? fd : -1;
    sys.poll(fds, revents, fds.length, POLLIN, WAIT_MS);
    const nowMs = performance.now();
    for (const [index, filler] of fillers.entries()) {
      if (revents[index] === 0) continue;
      filler.take();
      quietSinceMs = nowMs;
    }
    // A disk may take its time.
    if (nowMs - quietSinceMs > SILENCE_MS) {
      if (fillers.some((filler) => filler.isStopped)) return false;
      quietSinceMs = nowMs;
    }
    await new Promise<void>((resolve) => setImmediate(resolve));
  }
  return fillers.every(({ isRight }) => isRight) && calls.next().done === true;
}

function* callsOf(runs: Iterable<InPlaceRun>): Generator<InPlaceRun, undefined> {
  for (const { addr, length, offset } of runs) {
    for (let at = 0; at < length; at += CALL_LENGTH) {
      const from = offset === null ? null : offset + at;
      yield { addr: addr + at, length: Math.min(CALL_LENGTH, length - at), offset: from };
    }
  }
}

/** One helper. */
class Filler {
  readonly #helper: HelperTask;
  readonly #fileFd: number;
  #calls = 0;
  isRunning = false;
  /** All that it was told to fill has come. */
  isRight: boolean;

  constructor(record: HelperRecord, fileFd: number) {
    this.#helper = new HelperTask(record, PATIENCE_MS);
    this.#fileFd = this.#helper.openFile(fileFd);
    this.isRight = this.#fileFd >= 0;
  }

  get fd(): number {
    return this.#helper.record.fd;
  }

  /** Somebody has sent it SIGSTOP: it may never answer. */
  get isStopped(): boolean {
    return this.isRunning && isStoppedTask(this.#helper.record.pid);
  }

  /** Starts the next packet, if there is one. */
  send(calls: Iterator<InPlaceRun, undefined>): void {
    this.#helper.begin(true);
    this.#calls = 0;
    for (let length = 0; this.#calls < HELPER_CALLS_MAX && length < PACKET_LENGTH;) {
      const run = calls.next().value;
      if (run === undefined) break;
      const { addr, length: bytes, offset } = run;
      if (offset === null) this.#helper.clear(addr, bytes);
      else this.#helper.preadInto(this.#fileFd, addr, bytes, offset);
      this.#calls += 1;
      length += run.length;
    }
    if (this.#calls === 0) return;
    this.isRunning = this.#helper.start() >= 0;
    this.isRight &&= this.isRunning;
  }

  take(): void {
    this.isRunning = false;
    this.isRight &&= this.#helper.finish() === this.#calls;
  }

  /**
   * Writes nothing any more from here on: it has ended what it was doing, or was killed.
   * @throws FslError TARGET_LOST when it cannot be
   */
  async end(): Promise<void> {
    const { pid } = this.#helper.record;
    if (this.isRunning) {
      this.#helper.stop();
      this.take();
    }
    // What it still read would land in a guest that runs.
    if (this.#helper.isGone && !(await reapHelper(pid))) {
      const message = `helper task ${pid} does not end; end QEMU and load again`;
      throw new FslError("TARGET_LOST", message, { pid });
    }
  }
}
