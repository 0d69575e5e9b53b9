/**
 * A QEMU that somebody else started with `-incoming defer`, as a `Target`. It is left as it was when
 * the load is given up before the state is handed over, and lives on as if nothing had been after it.
 */
import { closeSync, openSync, readFileSync } from "node:fs";
import { resolve } from "node:path";
import { FslError } from "../errors.ts";
import { EAGAIN, LOCK_EX, LOCK_NB } from "../sys/abi.ts";
import * as native from "../sys/native.ts";
import { listenerOf } from "./control.ts";
import { type ExitWatch, watchExit } from "./exit-watch.ts";
import { startsStopped } from "./qemu-command.ts";
import { type QemuProcess, QemuTarget } from "./qemu.ts";
import { connectSocket } from "./qmp-connect.ts";
import { QmpClient } from "./qmp.ts";
import type { UserfaultfdWay } from "./userfaultfd.ts";

export interface AttachOptions {
  /** QMP socket of the QEMU; nobody else may be connected to it. */
  readonly qmpPath: string;
  /** QEMU's process, where the socket does not tell: behind a relay, or in another pid namespace. */
  readonly pid?: number;
  /** How long QEMU may take to greet, milliseconds; 10,000 when left out. */
  readonly greetingTimeoutMs?: number;
  /** What a person may want to know of the connection while RAM comes in. */
  readonly notice?: (text: string) => void;
  /**
   * Helper tasks to be made in QEMU where that can be: one more than the eager load's `workers`
   * (`helperTasksFor`), at most 9; as many as a load has by default when left out.
   */
  readonly helperTasks?: number;
  /** Forces one way to the userfaultfd; for tests. */
  readonly userfaultfdWay?: Exclude<UserfaultfdWay, "preload">;
}

/** A client that is connected already keeps ours waiting without a word. */
const GREETING_TIMEOUT_MS = 10_000;

/**
 * Connects to a QEMU that waits for its state. Whoever calls this calls `close` when the load is
 * over and `tidied`, or has failed.
 * @throws FslError TARGET_LOST when nobody listens, its process cannot be told, or another fsl is
 * at work on it; HOST_UNSUPPORTED when this user may not touch its memory
 */
export function attachQemu(options: AttachOptions): QemuTarget {
  const socket = connectSocket(options.qmpPath);
  let found: FoundProcess | undefined;
  let lockFd: number;
  try {
    found = findProcess(socket, options);
    lockFd = lockProcess(found.pid);
  } catch (error) {
    native.close(socket);
    if (found !== undefined) native.close(found.pidfd);
    throw error;
  }
  const attached = new AttachedQemu(found, lockFd, resolve(options.qmpPath));
  const qmp = QmpClient.open(socket, {
    peer: attached.description,
    greetingTimeoutMs: options.greetingTimeoutMs ?? GREETING_TIMEOUT_MS,
  });
  // QEMU's end shows first as the end of its connection.
  qmp.closed.then(() => attached.hintExit());
  return new QemuTarget(attached, qmp, options);
}

class AttachedQemu implements QemuProcess {
  readonly description: string;
  readonly pid: number;
  readonly pidfd: number;
  readonly controlPath: string;
  readonly isControlOwn: boolean;
  readonly preloadSocket = -1;
  readonly runsStartedProgram = false;
  readonly isSpawned = false;
  readonly endsWithFsl = false;
  readonly startsStopped: boolean;
  readonly hasNoDiscards = false;
  readonly hasDefaultSettings = false;
  readonly hasPlainMemory = false;
  readonly vcpus = null;
  readonly #watch: ExitWatch;
  readonly #lockFd: number;
  #isClosed = false;

  constructor({ pid, pidfd, isListener }: FoundProcess, lockFd: number, controlPath: string) {
    this.pid = pid;
    this.pidfd = pidfd;
    this.isControlOwn = isListener;
    this.#lockFd = lockFd;
    this.controlPath = controlPath;
    this.startsStopped = startsStopped(commandLineOf(pid));
    this.description = `${nameOf(pid)} (pid ${pid})`;
    this.#watch = watchExit(pidfd, pid);
  }

  get exited(): ExitWatch["exited"] {
    return this.#watch.exited;
  }

  identify(): void {
    // Known before QEMU was asked anything; what it says of its memory is checked against it.
  }

  hintExit(): void {
    this.#watch.hint();
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#watch.stop();
    native.close(this.pidfd);
    closeSync(this.#lockFd);
  }
}

interface FoundProcess {
  readonly pid: number;
  readonly pidfd: number;
  /** It listens on the socket, by the kernel's account. */
  readonly isListener: boolean;
}

/**
 * The process that listens on the socket, by the kernel's account: whoever called listen(2) last, which
 * QEMU does also on a socket that it was given.
 */
function findProcess(socket: number, options: AttachOptions): FoundProcess {
  const told = listenerOf(socket);
  const pid = options.pid ?? told;
  if (pid <= 0) {
    throw new FslError(
      "TARGET_LOST",
      `QMP socket ${options.qmpPath}: its process is in another pid namespace; name it with --pid`,
      { path: options.qmpPath },
    );
  }
  // By the socket where that can be (Linux 6.5): a pid may belong to another process meanwhile.
  const bySocket =
    options.pid === undefined || options.pid === told ? native.peerPidfd(socket) : -1;
  const pidfd = bySocket >= 0 ? bySocket : native.pidfdOpen(pid, 0);
  if (pidfd >= 0) return { pid, pidfd, isListener: pid === told };
  throw new FslError("TARGET_LOST", `process ${pid}: ${native.errnoText(-pidfd)}`, { pid });
}

/**
 * Two loaders of one QEMU would undo one another's settings. A lock on its memory file: whoever may
 * load may open that, and nobody else can stand in the way.
 * @returns a descriptor that holds the lock until it is closed
 */
function lockProcess(pid: number): number {
  let fd: number;
  try {
    fd = openSync(`/proc/${pid}/mem`, "r");
  } catch (error) {
    const errno = (error as NodeJS.ErrnoException).code ?? String(error);
    if (errno === "ENOENT" || errno === "ESRCH") {
      throw new FslError("TARGET_LOST", `process ${pid}: it has ended`, { pid }, error);
    }
    const what = `process ${pid}: its memory cannot be opened (${errno})`;
    const hint = "run fsl as root, or as QEMU's user with kernel.yama.ptrace_scope=0";
    throw new FslError("HOST_UNSUPPORTED", `${what}; ${hint}`, { pid, errno }, error);
  }
  const result = native.flock(fd, LOCK_EX | LOCK_NB);
  if (result === 0) return fd;
  closeSync(fd);
  const why = result === -EAGAIN ? "another fsl is at work on it" : native.errnoText(-result);
  throw new FslError("TARGET_LOST", `process ${pid}: ${why}`, { pid });
}

/** Empty when it cannot be read. */
function commandLineOf(pid: number): string[] {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0");
  } catch {
    return [];
  }
}

/** For messages. */
function nameOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/comm`, "utf8").trim();
  } catch {
    return "QEMU";
  }
}
