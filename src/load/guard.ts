/**
 * Watches over the snapshot file while pages are taken from it. Bytes that somebody writes into it
 * meanwhile would become the guest's memory; that must not happen, or at least be noticed.
 *
 *   leased     a read lease (fcntl(2) F_SETLEASE): the kernel lets nobody open the file for writing
 *              or truncate it while it holds. Whoever wants to waits, at most
 *              /proc/sys/fs/lease-break-time (45 s), and we are told: time to bring in the rest. For
 *              the file's owner and CAP_LEASE, on local file systems.
 *   looked at  else: size and modification time, ten times a second and at the end. A change is
 *              noticed, after the fact.
 *
 * Renaming, deleting and unmounting do no harm: the descriptor holds the file. Writing to the block
 * device below, or on another machine, is seen by neither way.
 *
 * Runs on the main thread, off a timer.
 */
import { fstatSync, readFileSync } from "node:fs";
import { FslError, isFslError } from "../errors.ts";
import { EAGAIN, F_GETLEASE, F_RDLCK, F_SETLEASE, F_SETSIG, F_UNLCK } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";

/**
 * Ignored by default. The signal of a lease would be SIGIO, which ends a process that does not
 * expect it.
 */
const SIGURG = 23;
const LOOK_PERIOD_MS = 100;
/**
 * How long nothing more is read before a writer is let in: reads that were begun must have ended by
 * then.
 */
const HOLD_MS = 5000;
/** How long before the kernel's own limit. */
const MARGIN_MS = 500;
const BREAK_TIME_PATH = "/proc/sys/fs/lease-break-time";
const BREAK_TIME_DEFAULT_S = 45;

export interface GuardedFile {
  readonly path: string;
  /** Open for reading only. */
  readonly fd: number;
  readonly identity: { readonly size: number; readonly mtimeNs: string };
}

export interface GuardEvents {
  /** Somebody waits to write to the file; pages can be taken for so long yet. */
  onWriter(leftMs: number): void;
  /** True: nothing is to be read for a moment. False: the one who waited has gone away, go on. */
  onHold(isHeld: boolean): void;
  /**
   * The bytes of the file are not those of the snapshot any more, or will not be in a moment.
   * Called once.
   * @param isTooLate pages may have been taken from the file after the change
   */
  onChanged(reason: string, isTooLate: boolean): void;
}

/** How long a snapshot that is still open for writing is waited for, and how often looked at, ms. */
const WRITER_WAIT_MS = 1000;
const WRITER_LOOK_MS = 5;

export class SnapshotGuard {
  readonly #file: GuardedFile;
  readonly #fd: number;
  readonly #timer: ReturnType<typeof setInterval>;
  #events: GuardEvents | undefined;
  readonly #breakTimeMs: number;
  #isLeased: boolean;
  /**
   * Until when pages are taken although a writer waits, on the clock of `performance.now()`; 0 =
   * nobody waits.
   */
  #holdAtMs = 0;
  /** When it is let in; 0 = not on hold. */
  #letInAtMs = 0;
  #change: { reason: string; isTooLate: boolean } | undefined;
  #isClosed = false;

  /**
   * @param breakTimeMs how long a writer is kept waiting, at most what the kernel grants; default:
   * that
   * @throws FslError SNAPSHOT_OPEN when somebody has the file open for writing, or has written
   * since it was opened
   */
  constructor(file: GuardedFile, breakTimeMs = kernelBreakTimeMs()) {
    this.#file = file;
    this.#fd = file.fd;
    this.#breakTimeMs = breakTimeMs;
    const leased = this.#lease();
    if (leased === -EAGAIN) {
      throw new FslError(
        "SNAPSHOT_OPEN",
        `${file.path}: another process has it open for writing; wait until it is saved`,
        { path: file.path, isBeingWritten: true },
      );
    }
    this.#isLeased = leased === 0;
    this.#timer = setInterval(() => this.look(), LOOK_PERIOD_MS);
    this.#timer.unref();
    try {
      this.check();
    } catch (error) {
      this.close();
      throw error;
    }
  }

  /**
   * Waits a moment for a writer: a QEMU that has saved a snapshot closes the file shortly after it
   * has said so.
   * @throws FslError SNAPSHOT_OPEN as the constructor does
   */
  static async take(file: GuardedFile, waitMs = WRITER_WAIT_MS): Promise<SnapshotGuard> {
    const endMs = performance.now() + waitMs;
    for (;;) {
      try {
        return new SnapshotGuard(file);
      } catch (error) {
        const isWriting = isFslError(error) && error.details["isBeingWritten"] === true;
        if (!isWriting || performance.now() >= endMs) throw error;
        await Bun.sleep(WRITER_LOOK_MS);
      }
    }
  }

  /** The kernel keeps writers out. */
  get isLeased(): boolean {
    return this.#isLeased;
  }

  /** Pages may have been taken from the file after it was changed. */
  get isTooLate(): boolean {
    return this.#change?.isTooLate ?? false;
  }

  /** From now on `events` are told; at once when something has happened already. */
  listen(events: GuardEvents): void {
    this.#events = events;
    if (this.#change !== undefined) events.onChanged(this.#change.reason, this.#change.isTooLate);
  }

  /** Looks now. @returns false when the file's bytes are not to be trusted */
  look(): boolean {
    if (this.#isClosed || this.#change !== undefined) return this.#change === undefined;
    const changed = this.#whatChanged();
    // The lease ought to have prevented it: a clock that was set, utimes(2), or we were stopped for
    // too long.
    if (changed !== null) this.#tell(changed, true);
    else if (this.#isLeased) this.#lookAtLease();
    return this.#change === undefined;
  }

  /** Looks now. @throws FslError SNAPSHOT_OPEN when the file's bytes are not to be trusted */
  check(): void {
    if (this.look()) return;
    const { path } = this.#file;
    const reason = this.#change?.reason ?? "it was changed";
    throw new FslError("SNAPSHOT_OPEN", `${path}: ${reason}; load again from an intact copy`, {
      path,
    });
  }

  /**
   * Lets writers in again. The descriptor is the caller's, and may be closed already. Idempotent.
   */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    clearInterval(this.#timer);
    if (this.#isLeased) sys.fcntl(this.#fd, F_SETLEASE, F_UNLCK);
  }

  #lease(): number {
    sys.fcntl(this.#fd, F_SETSIG, SIGURG);
    return sys.fcntl(this.#fd, F_SETLEASE, F_RDLCK);
  }

  #lookAtLease(): void {
    // The kernel answers what the lease is to become: unlocked when somebody waits.
    if (sys.fcntl(this.#fd, F_GETLEASE, 0) === F_RDLCK) return;
    const nowMs = performance.now();
    const limitMs = this.#breakTimeMs - LOOK_PERIOD_MS - Math.min(MARGIN_MS, this.#breakTimeMs / 4);
    const holdMs = Math.min(HOLD_MS, limitMs / 2);
    if (this.#holdAtMs === 0) {
      this.#holdAtMs = nowMs + limitMs - holdMs;
      this.#events?.onWriter(limitMs - holdMs);
    } else if (this.#letInAtMs === 0 && nowMs >= this.#holdAtMs) {
      this.#letInAtMs = nowMs + holdMs;
      this.#events?.onHold(true);
    } else if (this.#letInAtMs > 0 && nowMs >= this.#letInAtMs) {
      this.#letIn();
    }
  }

  /**
   * Lets in whoever waits. Nobody may be left by now (truncate(1), for one, does not wait), which
   * shows in that the lease can be had anew.
   */
  #letIn(): void {
    sys.fcntl(this.#fd, F_SETLEASE, F_UNLCK);
    this.#isLeased = this.#lease() === 0;
    const changed = this.#whatChanged();
    if (!this.#isLeased || changed !== null) {
      this.#tell(changed ?? "another process waited to write to it, and was let in", false);
      return;
    }
    this.#holdAtMs = 0;
    this.#letInAtMs = 0;
    this.#events?.onHold(false);
  }

  #whatChanged(): string | null {
    const { identity } = this.#file;
    const { size, mtimeNs } = fstatSync(this.#fd, { bigint: true });
    if (Number(size) < identity.size) {
      return `it was truncated from ${identity.size} to ${size} bytes`;
    }
    return mtimeNs.toString() === identity.mtimeNs ? null : "it was written to";
  }

  #tell(reason: string, isTooLate: boolean): void {
    this.#change = { reason, isTooLate };
    this.#events?.onChanged(reason, isTooLate);
  }
}

/** How long the kernel makes a writer wait. 0 in the setting means for ever. */
function kernelBreakTimeMs(): number {
  let seconds = BREAK_TIME_DEFAULT_S;
  try {
    seconds = Number(readFileSync(BREAK_TIME_PATH, "latin1"));
  } catch {
    // No /proc: the kernel's default.
  }
  return seconds === 0 ? Number.POSITIVE_INFINITY : seconds * 1000;
}
