/**
 * fsl's end of a helper task: a task in the target's address space that makes system calls there
 * when asked (shim/helper.c, shim/helper.h). UFFDIO_MOVE needs one: the kernel moves pages only
 * within the caller's own address space. Mechanism only: the helper makes any call that its seccomp
 * filter lets through; a call that it does not ends the helper.
 *
 * A batch is begun, filled with up to 256 calls, and run: one packet there, one packet back, 15 to
 * 20 µs. `run` blocks until the calls have been made. Nothing here allocates after construction, but
 * `finish` behind a `stop`.
 *
 * Addresses are the target's. Descriptors are the helper's: `sendDescriptor` says the number that a
 * descriptor has there.
 *
 * One owner at a time, on any thread; a `HelperRecord` goes to a Worker by structured clone. Who has
 * the record closes it, once: `HelperTask.close` or `endHelper`.
 */
import { readFileSync } from "node:fs";
import { assert } from "../errors.ts";
import {
  EAGAIN,
  ECONNRESET,
  EINTR,
  ENODATA,
  EPIPE,
  HELPER_CALL,
  HELPER_CALLS_MAX,
  HELPER_CLEAR,
  HELPER_MOVE,
  HELPER_REPLY,
  HELPER_REQUEST,
  HELPER_STOP_IF_NEGATIVE,
  HELPER_STOP_UNLESS_EXPECTED,
  HELPER_TOUCH,
  HELPER_YIELDS,
  MADV_COLLAPSE,
  MSG_DONTWAIT,
  POLLIN,
  SIGKILL,
  SYS_CLOSE,
  SYS_MADVISE,
  SYS_PREAD64,
  WALL,
  WNOHANG,
} from "./abi.ts";
import * as native from "./native.ts";

/** A helper, as plain numbers. */
export interface HelperRecord {
  /** This process's end of the socket. Closing it ends the helper. */
  readonly fd: number;
  /** A child of this process, to be waited for when the helper has ended; or of init, see src/vmm/injection.ts. */
  readonly pid: number;
  /** Address in the target of memory that only this helper uses; 2 MiB aligned, huge pages. */
  readonly stagingAddr: number;
  /** Bytes. */
  readonly stagingLength: number;
  /** Number of the userfaultfd in the helper. */
  readonly uffdFd: number;
  /** Number in the helper of the file that it reads; absent until `openFile`. */
  fileFd?: number;
}

/** The helper has ended, or broke the protocol: `run` and `sendDescriptor` will not work again. */
export const HELPER_GONE = -EPIPE;
/** Result of a call that was not made, because one before it stopped the batch. */
export const CALL_NOT_MADE = -ENODATA;

const NO_FDS = new Int32Array(0);
/** A request without a call. */
const NO_CALLS = new Int32Array(HELPER_REQUEST.CALLS / 4);
/** What the task calls itself, shim/helper.c. */
const HELPER_NAME = "fsl-helper";
/** How often and how long apart a helper's end is asked for, and when it is forced. */
const REAP_PAUSE_MS = 2;
const REAP_TRIES = 500;
const SIGKILL_AFTER_TRIES = 50;

export class HelperTask {
  readonly record: HelperRecord;
  readonly #request = new Int32Array(HELPER_REQUEST.BYTES / 4);
  /** The same bytes: 64-bit numbers go as doubles. */
  readonly #requestNumbers = new Float64Array(this.#request.buffer);
  readonly #reply = new Int32Array(HELPER_REPLY.BYTES / 4);
  readonly #replyNumbers = new Float64Array(this.#reply.buffer);
  readonly #sentFd = new Int32Array(1);
  readonly #out = new Int32Array(2);
  #callCount = 0;
  #callsMade = 0;
  readonly #patienceMs: number;
  readonly #polled = new Int32Array(1);
  #isGone = false;
  #isClosed = false;
  /** `stop` has been sent: its answer comes behind that of the batch. */
  #isStopping = false;

  /**
   * @param patienceMs how long an answer may take; a helper that takes longer (somebody has stopped it, its
   * disk hangs) is killed, so that it makes no call when nobody expects it any more. -1 = for ever
   */
  constructor(record: HelperRecord, patienceMs = -1) {
    this.record = record;
    this.#patienceMs = patienceMs;
    this.#polled[0] = record.fd;
  }

  /** The helper has ended, or was given up. */
  get isGone(): boolean {
    return this.#isGone;
  }

  /** Starts a batch. @param canStop it may be ended by `stop` */
  begin(canStop = false): void {
    this.#callCount = 0;
    this.#callsMade = 0;
    this.#request[HELPER_REQUEST.FLAGS / 4] = canStop ? HELPER_YIELDS : 0;
  }

  /**
   * Adds a system call to the batch.
   * @param number for the target's architecture, which is this one: SYS_*
   * @param stopOnError a negative result ends the batch
   * @returns its index, for `result`
   */
  add(
    number: number,
    a0: number,
    a1: number,
    a2: number,
    a3: number,
    a4: number,
    a5: number,
    stopOnError: boolean,
  ): number {
    const index = this.#callCount;
    assert(index < HELPER_CALLS_MAX, "a batch has at most 256 calls");
    this.#callCount = index + 1;
    const at = callWord(index);
    this.#request[at + HELPER_CALL.NUMBER / 4] = number;
    this.#request[at + HELPER_CALL.FLAGS / 4] = stopOnError ? HELPER_STOP_IF_NEGATIVE : 0;
    const numbers = this.#requestNumbers;
    const argsAt = (at * 4 + HELPER_CALL.ARGS) / 8;
    numbers[argsAt] = a0;
    numbers[argsAt + 1] = a1;
    numbers[argsAt + 2] = a2;
    numbers[argsAt + 3] = a3;
    numbers[argsAt + 4] = a4;
    numbers[argsAt + 5] = a5;
    return index;
  }

  /** The batch ends after call `index` unless its result is this. */
  stopUnless(index: number, expected: number): void {
    assert(index < this.#callCount, "no such call");
    const at = callWord(index);
    this.#request[at + HELPER_CALL.FLAGS / 4] =
      (this.#request[at + HELPER_CALL.FLAGS / 4] ?? 0) | HELPER_STOP_UNLESS_EXPECTED;
    this.#requestNumbers[(at * 4 + HELPER_CALL.EXPECTED) / 8] = expected;
  }

  /**
   * Adds pread(2) of exactly `length` bytes: fewer, as at the end of a file that was cut short, end
   * the batch, so that a `move` behind it does not take what the memory held before.
   * @param addr in the target, usually staging memory
   */
  preadInto(fdInHelper: number, addr: number, length: number, offset: number): number {
    const index = this.add(SYS_PREAD64, fdInHelper, addr, length, offset, 0, 0, true);
    this.stopUnless(index, length);
    return index;
  }

  /** Adds making pages zero that are in memory: see shim/helper.h. */
  clear(addr: number, length: number): number {
    const index = this.add(HELPER_CLEAR, addr, length, 0, 0, 0, 0, true);
    this.stopUnless(index, length);
    return index;
  }

  /** Adds a write of a 0 to the byte at `addr`, which brings the page there: see shim/helper.h. */
  touch(addr: number): number {
    return this.add(HELPER_TOUCH, addr, 0, 0, 0, 0, 0, false);
  }

  /**
   * Adds UFFDIO_MOVE (Linux 6.8). All of it private anonymous memory; the destination registered. Its
   * `result`: bytes moved (> 0, maybe fewer than asked for: then a page at that place was present, or the
   * next -errno applies there), or -errno when nothing was moved:
   *
   *   EEXIST  the first page of the destination is present; nobody was woken
   *   EAGAIN  the address space is changing (an event waits to be read), or a page of the source
   *           was busy for a moment: read events, try again
   *   ENOENT  a page of the source is not there, or the destination is not mapped any more
   *   EINVAL  never for this memory: shared or file memory, not registered, locked (mlockall) where
   *           the source is not, other protection, or a helper of another address space
   *   EBUSY   a page of the source is shared with a forked child
   *   ENOMEM  no memory for page tables
   *   ESRCH   the target is ending
   *   ENODATA (CALL_NOT_MADE) a call before it ended the batch
   *
   * A huge page of the source that is moved in part is split first, which takes 0.3 to 0.5 ms.
   * What a failed move leaves in the source stays there: discard it before it is filled again.
   * (Measured on Linux 6.18.)
   *
   * @param mode 0 or MODE_DONTWAKE
   * @param stopOnError anything but the whole length ends the batch
   * @source Linux mm/userfaultfd.c move_pages, fs/userfaultfd.c
   */
  move(dstAddr: number, srcAddr: number, length: number, mode: number, stopOnError = true): number {
    const { uffdFd } = this.record;
    const index = this.add(HELPER_MOVE, uffdFd, dstAddr, srcAddr, length, mode, 0, false);
    if (stopOnError) this.stopUnless(index, length);
    return index;
  }

  /**
   * Adds madvise(2), for instance MADV_DONTNEED of staging memory that still holds what a failed
   * move left there.
   */
  madvise(addr: number, length: number, advice: number): number {
    return this.add(SYS_MADVISE, addr, length, advice, 0, 0, 0, true);
  }

  /**
   * Adds madvise(2) with MADV_COLLAPSE (Linux 6.1): what is there of a huge page's range becomes one, if the
   * kernel can. What comes behind it is made in any case.
   */
  collapse(addr: number, length: number): number {
    return this.add(SYS_MADVISE, addr, length, MADV_COLLAPSE, 0, 0, 0, false);
  }

  /** Adds close(2) of a descriptor that was sent. */
  closeDescriptor(fdInHelper: number): number {
    return this.add(SYS_CLOSE, fdInHelper, 0, 0, 0, 0, 0, false);
  }

  /**
   * Has the batch made. Blocks until it is: as long as its calls take.
   * @returns how many calls went as they were to: all that were added, or the index of the one that
   * ended the batch, with an error or another result than `stopUnless` has. HELPER_GONE
   */
  run(): number {
    const sent = this.start();
    return sent < 0 ? sent : this.finish();
  }

  /**
   * Sends the batch, and does not wait: `record.fd` becomes readable when it has been made, and
   * `finish` must be called before anything else. @returns 0, HELPER_GONE, or -errno of sendmsg(2)
   */
  start(): number {
    this.#callsMade = 0;
    return this.#send(NO_FDS);
  }

  /**
   * Ends the batch that was started, if it may be, behind the call that it is in. Does not wait.
   */
  stop(): void {
    if (this.#isGone || this.#isClosed || this.#isStopping) return;
    const { fd } = this.record;
    this.#isStopping = native.send(fd, NO_CALLS, HELPER_REQUEST.CALLS, NO_FDS, 0, 0) >= 0;
  }

  /** The answer to the batch that was started; blocks until it is there. As `run`. */
  finish(): number {
    const received = this.#receive();
    if (received < 0) return received;
    if (this.#isStopping) {
      this.#isStopping = false;
      const answer = this.#reply.slice();
      if (this.#receive() < 0) return HELPER_GONE;
      this.#reply.set(answer);
    }
    const made = this.#reply[HELPER_REPLY.CALLS_MADE / 4] ?? 0;
    this.#callsMade = made;
    return made > 0 && this.#hasEnded(made - 1) ? made - 1 : made;
  }

  /** What call `index` of the last batch returned: >= 0 or -errno; CALL_NOT_MADE. */
  result(index: number): number {
    if (index >= this.#callsMade) return CALL_NOT_MADE;
    return this.#replyNumbers[HELPER_REPLY.RESULTS / 8 + index] ?? CALL_NOT_MADE;
  }

  /** Bytes that a `move` of the last batch has moved; 0 when it failed, or was not made. */
  bytesMoved(index: number): number {
    return Math.max(0, this.result(index));
  }

  /**
   * Gives the helper a copy of a descriptor. Not between `begin` and `run`.
   * @returns its number there; HELPER_GONE; CALL_NOT_MADE when it cannot take another (EMFILE)
   */
  sendDescriptor(fd: number): number {
    this.begin();
    this.#sentFd[0] = fd;
    const sent = this.#send(this.#sentFd);
    if (sent < 0) return sent;
    const received = this.#receive();
    if (received < 0) return received;
    const count = this.#reply[HELPER_REPLY.FD_COUNT / 4] ?? 0;
    return count > 0 ? (this.#reply[HELPER_REPLY.FDS / 4] ?? -1) : CALL_NOT_MADE;
  }

  /**
   * Gives the helper the file that it is to read, once: whoever has the record after this finds it there.
   * @returns as `sendDescriptor`
   */
  openFile(fd: number): number {
    const { record } = this;
    if (record.fileFd !== undefined) return record.fileFd;
    const number = this.sendDescriptor(fd);
    if (number >= 0) record.fileFd = number;
    return number;
  }

  /**
   * Ends the helper, at once or when the call that it is in returns. Idempotent. Whoever owns the
   * record waits for the pid: `reapHelper`.
   */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    native.close(this.record.fd);
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** Whether this call's result is one that ends the batch. As make_calls in shim/helper.c. */
  #hasEnded(index: number): boolean {
    const at = callWord(index);
    const flags = this.#request[at + HELPER_CALL.FLAGS / 4] ?? 0;
    const result = this.result(index);
    if ((flags & HELPER_STOP_IF_NEGATIVE) !== 0 && result < 0) return true;
    if ((flags & HELPER_STOP_UNLESS_EXPECTED) === 0) return false;
    return result !== this.#requestNumbers[(at * 4 + HELPER_CALL.EXPECTED) / 8];
  }

  /** Sends the request. 0, HELPER_GONE, or what sendmsg(2) says. */
  #send(fds: Int32Array): number {
    if (this.#isGone || this.#isClosed) return HELPER_GONE;
    const { fd } = this.record;
    this.#request[HELPER_REQUEST.CALL_COUNT / 4] = this.#callCount;
    const length = HELPER_REQUEST.CALLS + this.#callCount * HELPER_CALL.BYTES;
    let sent: number;
    do {
      sent = native.send(fd, this.#request, length, fds, fds.length, 0);
    } while (sent === -EINTR);
    if (sent >= 0) return 0;
    this.#isGone = sent === -EPIPE || sent === -ECONNRESET;
    return this.#isGone ? HELPER_GONE : sent;
  }

  /** Whether `finish` would not wait, or not longer than `timeoutMs`, which is waited for; -1 = for ever. */
  isAnswered(timeoutMs = 0): boolean {
    return native.poll(this.#polled, this.#out, 1, POLLIN, timeoutMs) === 1;
  }

  /** Waits for the reply. 0 or HELPER_GONE. */
  #receive(): number {
    if (this.#isGone || this.#isClosed) return HELPER_GONE;
    const received = this.#receivePacket();
    const made = this.#reply[HELPER_REPLY.CALLS_MADE / 4] ?? 0;
    if (received >= HELPER_REPLY.RESULTS && received === HELPER_REPLY.RESULTS + made * 8) return 0;
    this.#isGone = true;
    return HELPER_GONE;
  }

  /** Bytes of it; 0 or negative when there is none. */
  #receivePacket(): number {
    const { fd, pid } = this.record;
    // Whoever has patience has polled: mostly it is there.
    const flags = this.#patienceMs < 0 ? 0 : MSG_DONTWAIT;
    for (;;) {
      const length = HELPER_REPLY.BYTES;
      const received = native.recv(fd, this.#reply, length, NO_FDS, 0, this.#out, flags);
      if (received !== -EINTR && received !== -EAGAIN) return received;
      if (received === -EINTR) continue;
      if (native.poll(this.#polled, this.#out, 1, POLLIN, this.#patienceMs) !== 0) continue;
      killChild(pid);
      return received;
    }
  }
}

/** Ends a helper that nobody uses: closes its socket, and waits for its pid on the side. */
export function endHelper(record: HelperRecord): Promise<boolean> {
  native.close(record.fd);
  return reapHelper(record.pid);
}

/**
 * Waits for the end of a helper whose socket is closed, which takes microseconds, or as long as the
 * call that it is in; after 0.1 s it is killed. Does not keep the event loop alive.
 * @param pid as the helper's record has it; of no use when QEMU has another pid namespace, so only
 * a task with the helper's name is touched
 * @returns false when it has not ended after a second
 */
export async function reapHelper(pid: number): Promise<boolean> {
  if (!isHelper(pid)) return true;
  const status = new Int32Array(1);
  for (let attempt = 0; attempt < REAP_TRIES; attempt += 1) {
    const waited = native.waitpid(pid, WNOHANG | WALL, status);
    // Not a child of this process: init's (src/vmm/injection.ts).
    if (waited > 0 || (waited < 0 && isEndedTask(pid))) return true;
    if (attempt === SIGKILL_AFTER_TRIES) killChild(pid);
    await new Promise<void>((resolve) => {
      setTimeout(resolve, REAP_PAUSE_MS).unref();
    });
  }
  return false;
}

function isHelper(pid: number): boolean {
  try {
    return readFileSync(`/proc/${pid}/comm`, "latin1") === `${HELPER_NAME}\n`;
  } catch {
    return false; // It is gone: somebody else's child.
  }
}

/** Whether a task runs no more: nobody may have waited for it yet. */
export function isEndedTask(pid: number): boolean {
  return ["", "Z", "X"].includes(stateOf(pid));
}

/** Whether somebody has stopped it (SIGSTOP, a debugger). */
export function isStoppedTask(pid: number): boolean {
  return ["T", "t"].includes(stateOf(pid));
}

/** The letter of proc(5); empty when there is no such task. */
function stateOf(pid: number): string {
  try {
    return /^State:\s+(\w)/m.exec(readFileSync(`/proc/${pid}/status`, "latin1"))?.[1] ?? "";
  } catch {
    return "";
  }
}

/** By pidfd. The pid is that of a child not waited for, so it can be nobody else's. */
function killChild(pid: number): void {
  if (!isHelper(pid)) return;
  const pidfd = native.pidfdOpen(pid, 0);
  if (pidfd < 0) return;
  native.pidfdSendSignal(pidfd, SIGKILL);
  native.close(pidfd);
}

/** Index of the first 32-bit word of a call in the request. */
function callWord(index: number): number {
  return (HELPER_REQUEST.CALLS + index * HELPER_CALL.BYTES) / 4;
}
