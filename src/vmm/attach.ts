/**
 * A QEMU that somebody else started with `-incoming defer`, as a `Target`. It is left as it was when
 * the load is given up before the state is handed over, and lives on as if nothing had been after it.
 */
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { FslError } from "../errors.ts";
import * as native from "../sys/native.ts";
import { type ExitWatch, watchExit } from "./exit-watch.ts";
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
  /** Forces one way to the userfaultfd; for tests. */
  readonly userfaultfdWay?: Exclude<UserfaultfdWay, "preload">;
}

/** A client that is connected already keeps ours waiting without a word. */
const GREETING_TIMEOUT_MS = 10_000;

/**
 * Connects to a QEMU that waits for its state.
 * @throws FslError TARGET_LOST when nobody listens, or its process cannot be told
 */
export function attachQemu(options: AttachOptions): QemuTarget {
  const socket = connectSocket(options.qmpPath);
  let found: { pid: number; pidfd: number };
  try {
    found = findProcess(socket, options);
  } catch (error) {
    native.close(socket);
    throw error;
  }
  const attached = new AttachedQemu(found.pid, found.pidfd, resolve(options.qmpPath));
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
  readonly preloadSocket = -1;
  readonly runsStartedProgram = false;
  readonly isSpawned = false;
  readonly #watch: ExitWatch;
  #isClosed = false;

  constructor(pid: number, pidfd: number, controlPath: string) {
    this.pid = pid;
    this.pidfd = pidfd;
    this.controlPath = controlPath;
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
  }
}

/**
 * The process that listens on the socket, by the kernel's account: whoever called listen(2) last, which
 * QEMU does also on a socket that it was given.
 */
function findProcess(socket: number, options: AttachOptions): { pid: number; pidfd: number } {
  const credentials = new Int32Array(3);
  const told = native.peerCredentials(socket, credentials) < 0 ? 0 : (credentials[0] ?? 0);
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
  if (pidfd >= 0) return { pid, pidfd };
  throw new FslError("TARGET_LOST", `process ${pid}: ${native.errnoText(-pidfd)}`, { pid });
}

/** For messages. */
function nameOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/comm`, "utf8").trim();
  } catch {
    return "QEMU";
  }
}
