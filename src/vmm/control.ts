/**
 * The QMP connection to a QEMU that has its state. Its guest needs its pages whatever becomes of the
 * connection, so a cut one (a relay has ended) is made again; and a fsl that goes on with the load
 * of a dead one makes its first one here.
 */
import { FslError, isFslError } from "../errors.ts";
import { MFD_CLOEXEC } from "../sys/abi.ts";
import * as native from "../sys/native.ts";
import { randomHex } from "../sys/random.ts";
import { linksOf } from "./process-links.ts";
import { connectSocket } from "./qmp-connect.ts";
import { QmpClient } from "./qmp.ts";

/** Whose monitor it is, and where. */
export interface ControlPlace {
  /** For messages. */
  readonly description: string;
  readonly pid: number;
  /** Null: there is no socket that can be connected to again. */
  readonly controlPath: string | null;
  /** The process itself listens there, by the kernel's account; else a relay may. */
  readonly isControlOwn: boolean;
  readonly exited: Promise<unknown>;
}

export interface ControlOptions {
  /** Told of each connection that was made here. */
  readonly onConnected?: (qmp: QmpClient) => void;
  /** What a person may want to know: that the connection was cut, and is there again. */
  readonly notice?: ((text: string) => void) | undefined;
}

/** Name of the descriptor that shows which process has the monitor. */
export const PROBE_NAME = "fsl-probe";
/** QEMU may have a whole device state to load before it answers. */
const GREETING_TIMEOUT_MS = 60_000;
/** For how long, and how often, a socket is tried that nobody listens on: a relay may come back. */
const TRY_MS = 3_000;
const RETRY_MS = 200;
/** QEMU closes its sockets a moment before it ends, which is nothing to be told. */
const TELL_MS = 1_000;

export class Control {
  readonly #place: ControlPlace;
  readonly #options: ControlOptions;
  #qmp: QmpClient | null;
  #connecting: Promise<QmpClient> | null = null;
  /** Nobody has listened for `TRY_MS`: whoever asks now is not kept waiting for that. */
  #isGivenUp = false;
  #isClosed = false;

  /** @param first a connection that is there already, its owner from now on this object */
  constructor(place: ControlPlace, first: QmpClient | null, options: ControlOptions = {}) {
    this.#place = place;
    this.#qmp = first;
    this.#options = options;
  }

  /** There was a connection, and it is gone, but not by `close`. */
  get isCut(): boolean {
    return this.#qmp?.isClosed === true && !this.#isClosed;
  }

  /**
   * A connection that lives.
   * @param isPatient waits for the greeting for as long as QEMU lives: it may wait for a page
   * @throws FslError TARGET_LOST when none can be made, TARGET_MISMATCH when another process answers
   */
  open(isPatient = false): Promise<QmpClient> {
    if (this.#qmp?.isClosed === false) return Promise.resolve(this.#qmp);
    this.#connecting ??= this.#connect(isPatient).finally(() => {
      this.#connecting = null;
    });
    return this.#connecting;
  }

  /**
   * Carries `work` out, once more if the connection is cut meanwhile.
   * @param work isAgain: QEMU may have done it already
   */
  async ask<T>(work: (qmp: QmpClient, isAgain: boolean) => Promise<T>): Promise<T> {
    const qmp = await this.open();
    try {
      return await work(qmp, false);
    } catch (error) {
      if (!isFslError(error) || !this.isCut) throw error;
      return work(await this.open(), true);
    }
  }

  /** Idempotent. */
  close(): void {
    this.#isClosed = true;
    this.#qmp?.close();
  }

  async #connect(isPatient: boolean): Promise<QmpClient> {
    const { notice, onConnected } = this.#options;
    const cut = this.#qmp === null ? null : await this.#qmp.closed;
    const startMs = performance.now();
    let isTold = false;
    for (;;) {
      try {
        const qmp = await connectTo(this.#place, isPatient);
        if (this.#isClosed) qmp.close();
        this.#qmp = qmp;
        this.#isGivenUp = false;
        onConnected?.(qmp);
        if (cut !== null) notice?.(`${cut.message}; it was made again`);
        return qmp;
      } catch (error) {
        // A cut connection is the first that is seen of QEMU's end.
        const end = Promise.race([this.#place.exited.then(() => true), Bun.sleep(RETRY_MS)]);
        const isOver = (await end) === true;
        const triedMs = performance.now() - startMs;
        this.#isGivenUp ||= triedMs > TRY_MS;
        if (isOver || this.#isClosed || this.#isGivenUp || !isLost(error)) throw error;
        if (cut === null || isTold || triedMs < TELL_MS) continue;
        notice?.(`${cut.message}; it is tried again`);
        isTold = true;
      }
    }
  }
}

function isLost(error: unknown): boolean {
  return isFslError(error) && error.code === "TARGET_LOST";
}

async function connectTo(place: ControlPlace, isPatient: boolean): Promise<QmpClient> {
  const { controlPath, description, pid, isControlOwn } = place;
  if (controlPath === null) {
    const what = "has no QMP socket that can be connected to again";
    throw new FslError("TARGET_LOST", `${description}: ${what}`, { pid });
  }
  const socket = connectSocket(controlPath);
  const listener = listenerOf(socket);
  // A private directory or a socket of QEMU's own that another process has put its own into.
  if (isControlOwn && listener > 0 && listener !== pid) {
    native.close(socket);
    throw new FslError(
      "TARGET_MISMATCH",
      `QMP socket ${controlPath}: expected process ${pid} to listen there, found ${listener}; ` +
        "say where its QMP socket is with --qmp",
      { path: controlPath, pid },
    );
  }
  const qmp = QmpClient.open(socket, {
    peer: description,
    greetingTimeoutMs: isPatient ? Number.POSITIVE_INFINITY : GREETING_TIMEOUT_MS,
  });
  try {
    await qmp.ready;
    if (listener !== pid) await proveProcess(qmp, pid);
    return qmp;
  } catch (error) {
    qmp.close();
    throw error;
  }
}

/** Who called listen(2) on the other end, by the kernel's account; 0 when it does not tell. */
export function listenerOf(socket: number): number {
  const credentials = new Int32Array(3);
  return native.peerCredentials(socket, credentials) < 0 ? 0 : (credentials[0] ?? 0);
}

/**
 * The pid may be the caller's word only, and the monitor a relay: a descriptor that is sent there
 * must arrive in that process.
 * @throws FslError TARGET_MISMATCH when it does not
 */
export async function proveProcess(qmp: QmpClient, pid: number): Promise<void> {
  const name = `${PROBE_NAME}-${randomHex(8)}`;
  const fd = native.check(native.memfdCreate(name, MFD_CLOEXEC), "memfd_create");
  try {
    await qmp.request("getfd", { fdname: PROBE_NAME }, { fd });
    const isThere = linksOf(pid).includes(`/memfd:${name} (deleted)`);
    await qmp.execute("closefd", { fdname: PROBE_NAME });
    if (isThere) return;
    throw new FslError(
      "TARGET_MISMATCH",
      `process ${pid}: is not the QEMU that answers on the QMP socket; ` +
        "give its pid with --pid, or leave that out",
      { pid },
    );
  } finally {
    native.close(fd);
  }
}
