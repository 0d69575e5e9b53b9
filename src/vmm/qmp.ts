/**
 * QMP client over a unix socket: commands with ids, descriptors by SCM_RIGHTS, events by callback.
 *
 * Receiving is Bun's (its event loop watches the socket, nothing polls); sending is one sendmsg(2)
 * per command, because only that carries descriptors. Commands may be given before the greeting has
 * come; they follow it at once, and are answered in order: a whole conversation can be one round
 * trip.
 *
 * Two facts of QEMU's monitor (measured with 10.0.2): it reads its socket one byte at a time, 5 µs
 * each, so commands are kept short; and it reads the next command only when the last is done,
 * unless out-of-band commands are enabled, which fsl has no other use for: nine queries take 2
 * instead of 5 ms.
 */
import { FslError, assert } from "../errors.ts";
import { randomInteger } from "../sys/random.ts";
import { EINTR, MSG_DONTWAIT, MSG_NOSIGNAL } from "../sys/abi.ts";
import * as native from "../sys/native.ts";
import { MessageLines } from "./message-lines.ts";

/**
 * A command's answer. An error of QEMU's is a value: most callers have something to do about it.
 */
export type QmpReply =
  | { readonly ok: true; readonly value: unknown }
  | { readonly ok: false; readonly errorClass: string; readonly description: string };

export interface QmpEvent {
  readonly name: string;
  readonly data: Readonly<Record<string, unknown>>;
}

export interface QmpVersion {
  readonly major: number;
  readonly minor: number;
  readonly micro: number;
}

export interface QmpExecuteOptions {
  /**
   * Sent along with the command by SCM_RIGHTS; stays the caller's. One such command at a time is
   * under way.
   */
  readonly fd?: number;
  /** How long to wait for the answer, Infinity allowed; a later answer is dropped. */
  readonly timeoutMs?: number;
}

export interface QmpOpenOptions {
  /** For messages: who is at the other end, e.g. `qemu-system-x86_64 (pid 123)`. */
  readonly peer: string;
  /**
   * How long the greeting may take, Infinity allowed (then also the negotiation). QEMU greets when
   * its machine is nearly built.
   */
  readonly greetingTimeoutMs?: number;
}

/** A QEMU that builds a machine with TiB of preallocated RAM takes its time before it greets. */
const GREETING_TIMEOUT_MS = 600_000;
/** Answers come within a millisecond, unless QEMU's main loop has something long to do. */
const COMMAND_TIMEOUT_MS = 60_000;
/** Commands under way: beyond this somebody waits for nothing and asks for more. */
const PENDING_COMMANDS_MAX = 256;

/** Short numbers: see above. */
const ID_START_MAX = 100_000;

/** A command on its way. */
interface Pending {
  readonly command: string;
  /** On the clock of `performance.now()`. */
  readonly sinceMs: number;
  readonly bytes: Uint8Array;
  readonly fd: number | undefined;
  readonly resolve: (reply: QmpReply) => void;
  readonly reject: (error: FslError) => void;
  readonly timeoutMs: number;
  /** Runs from when the command is sent. */
  timer: ReturnType<typeof setTimeout> | undefined;
}

export class QmpClient {
  /** Version out of the greeting, once the negotiation is done. Rejects with TARGET_LOST. */
  readonly ready: Promise<QmpVersion>;
  /** Resolves when the greeting has come: what is sent now is answered after all that was given before. */
  readonly greeted: Promise<void>;
  /** Resolves, with the reason, when the connection is gone for whatever cause. Never rejects. */
  readonly closed: Promise<FslError>;

  readonly #peer: string;
  readonly #fd: number;
  readonly #stream = new MessageLines();
  readonly #pending = new Map<number, Pending>();
  readonly #listeners = new Set<(event: QmpEvent) => void>();
  readonly #ready = Promise.withResolvers<QmpVersion>();
  readonly #greeting = Promise.withResolvers<void>();
  readonly #closed = Promise.withResolvers<FslError>();
  #socket: Bun.Socket<undefined> | null = null;
  #lostReason: FslError | null = null;
  readonly #greetingTimer: ReturnType<typeof setTimeout> | undefined;
  readonly #isPatient: boolean;
  #greeted = false;
  /** Not from 1: an answer to a client that was there before must not pass for one to this client. */
  #nextId = randomInteger(1, ID_START_MAX);
  /** Resolves when the last command that carries a descriptor is answered; absent: it is. And when it is sent. */
  #descriptorTurn: Promise<void> | undefined;
  #descriptorSent: Promise<void> | undefined;

  private constructor(fd: number, options: QmpOpenOptions) {
    this.#fd = fd;
    this.#peer = options.peer;
    this.closed = this.#closed.promise;
    this.ready = this.#ready.promise;
    this.greeted = this.#greeting.promise;
    this.ready.catch(() => {}); // Callers may look at their own commands only.
    const timeoutMs = options.greetingTimeoutMs ?? GREETING_TIMEOUT_MS;
    this.#isPatient = timeoutMs === Number.POSITIVE_INFINITY;
    if (this.#isPatient) return;
    this.#greetingTimer = setTimeout(() => {
      const hint = "; another client may be connected to it";
      this.#lose(this.#lostError(`no QMP greeting within ${timeoutMs} ms${hint}`));
    }, timeoutMs);
  }

  /**
   * Takes over a connected unix socket, and negotiates when the greeting comes.
   * @param fd connected stream socket; owned by the client from now on, also when this throws
   * @throws FslError TARGET_LOST when the socket cannot be watched
   */
  static open(fd: number, options: QmpOpenOptions): QmpClient {
    const client = new QmpClient(fd, options);
    client.#watch();
    return client;
  }

  get isClosed(): boolean {
    return this.#lostReason !== null;
  }

  /**
   * Sends a command and waits for its answer.
   * @param command name of the QMP command
   * @param args its arguments; left out when there are none
   * @throws FslError TARGET_LOST when the connection is lost, or no answer comes in time
   */
  execute(
    command: string,
    args?: Readonly<Record<string, unknown>>,
    options: QmpExecuteOptions = {},
  ): Promise<QmpReply> {
    if (options.fd === undefined) return this.#send(command, args, options);
    // QEMU's socket holds the descriptors of one message only: a second message with descriptors
    // closes those of the first if no command has fetched them yet.
    const before = this.#descriptorTurn;
    const send = (): Promise<QmpReply> => this.#send(command, args, options);
    const turn = before === undefined ? send() : before.then(send);
    const answered = turn
      .catch(() => {})
      .then(() => {
        if (this.#descriptorTurn === answered) this.#descriptorTurn = undefined;
      });
    this.#descriptorTurn = answered;
    this.#descriptorSent = before;
    return turn;
  }

  /** Commands that are sent when this resolves come behind all that carry a descriptor. */
  async descriptorsSent(): Promise<void> {
    await this.#descriptorSent;
  }

  /**
   * Like `execute`, for commands whose refusal is not expected.
   * @returns the `return` member of the answer
   * @throws FslError TARGET_LOST, also when QEMU answers with an error
   */
  async request(
    command: string,
    args?: Readonly<Record<string, unknown>>,
    options: QmpExecuteOptions = {},
  ): Promise<unknown> {
    const reply = await this.execute(command, args, options);
    if (reply.ok) return reply.value;
    throw new FslError(
      "TARGET_LOST",
      `QMP ${command}: ${this.#peer} refused it: ${reply.description}`,
      { command, errorClass: reply.errorClass, description: reply.description },
    );
  }

  /** For how long the oldest command has been waiting for its answer, ms; 0 when none is. */
  get unansweredMs(): number {
    const [oldest] = this.#pending.values();
    return oldest === undefined ? 0 : performance.now() - oldest.sinceMs;
  }

  /** @returns a function that takes the listener off again. Listeners must not throw. */
  onEvent(listener: (event: QmpEvent) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Lets go of the connection. Pending commands are rejected. Idempotent. */
  close(): void {
    this.#lose(new FslError("TARGET_LOST", `QMP: connection to ${this.#peer} was closed by fsl`));
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #watch(): void {
    // Bun closes the descriptor that it is given when the peer hangs up; a number that somebody
    // else owns by then must not be written to. So Bun gets a duplicate.
    const watched = native.dup(this.#fd, 3);
    if (watched < 0) {
      const error = this.#lostError(
        `descriptor cannot be duplicated (${native.errnoName(watched)})`,
      );
      this.#lose(error);
      throw error;
    }
    const opening = connectDescriptor({
      fd: watched,
      socket: {
        binaryType: "uint8array",
        open: (socket) => {
          this.#socket = socket;
          if (this.isClosed) socket.terminate();
        },
        data: (_socket, bytes) => this.#receive(bytes),
        end: () => this.#lose(this.#lostError("closed by the other end")),
        close: () => this.#lose(this.#lostError("closed by the other end")),
        error: (_socket, error) => this.#lose(this.#lostError(String(error.message))),
      },
    });
    opening.catch((error: unknown) => this.#lose(this.#lostError(String(error))));
  }

  #send(
    command: string,
    args: Readonly<Record<string, unknown>> | undefined,
    options: QmpExecuteOptions,
  ): Promise<QmpReply> {
    if (this.#lostReason !== null) return Promise.reject(this.#lostReason);
    assert(this.#pending.size < PENDING_COMMANDS_MAX, `${this.#pending.size} QMP commands pending`);
    const id = this.#nextId++;
    const { promise, resolve, reject } = Promise.withResolvers<QmpReply>();
    const timeoutMs = options.timeoutMs ?? COMMAND_TIMEOUT_MS;
    const message = { execute: command, ...(args === undefined ? {} : { arguments: args }), id };
    const bytes = Buffer.from(JSON.stringify(message, rawIntegers), "utf8");
    const pending = {
      command,
      sinceMs: performance.now(),
      bytes,
      fd: options.fd,
      resolve,
      reject,
      timeoutMs,
      timer: undefined,
    };
    this.#pending.set(id, pending);
    if (this.#greeted) this.#transmit(id, pending);
    return promise;
  }

  /**
   * Sends a command and lets its time run. A socket that does not take it at once is one whose
   * other end has not read for 200 KiB: as good as lost.
   */
  #transmit(id: number, pending: Pending): void {
    const { bytes, fd, command, timeoutMs } = pending;
    if (timeoutMs !== Number.POSITIVE_INFINITY) {
      pending.timer = setTimeout(() => {
        this.#pending.delete(id);
        pending.reject(this.#lostError(`no answer to ${command} within ${timeoutMs} ms`));
      }, timeoutMs);
    }
    const fds = fd === undefined ? new Int32Array(0) : Int32Array.of(fd);
    const flags = MSG_DONTWAIT | MSG_NOSIGNAL;
    let sent: number;
    do {
      sent = native.send(this.#fd, bytes, bytes.length, fds, fds.length, flags);
    } while (sent === -EINTR);
    if (sent === bytes.length) return;
    const found = sent < 0 ? native.errnoName(sent) : `${sent} of ${bytes.length} bytes taken`;
    this.#lose(this.#lostError(`cannot send (${found})`));
  }

  #receive(bytes: Uint8Array): void {
    if (this.#lostReason !== null) return;
    try {
      this.#stream.push(bytes, (text) => this.#dispatch(text));
    } catch (error) {
      this.#lose(this.#lostError(error instanceof Error ? error.message : String(error)));
    }
  }

  #dispatch(text: string): void {
    const message = parseMessage(text);
    if (!isRecord(message)) return;
    if (isRecord(message["QMP"])) {
      this.#greet(message["QMP"]);
      return;
    }
    // A client that was there before has left answers behind that QEMU sends to the next one.
    if (!this.#greeted) return;
    if (typeof message["event"] === "string") {
      const event = {
        name: message["event"],
        data: isRecord(message["data"]) ? message["data"] : {},
      };
      for (const listener of this.#listeners) listener(event);
      return;
    }
    this.#answer(message);
  }

  #greet(greeting: Record<string, unknown>): void {
    const version = parseVersion(greeting["version"]);
    if (version === null) throw new Error("the QMP greeting holds no version");
    if (this.#greeted) throw new Error("a second QMP greeting came");
    this.#greeted = true;
    clearTimeout(this.#greetingTimer);
    const waiting = [...this.#pending];
    const offered = greeting["capabilities"];
    const isReadAhead = Array.isArray(offered) && offered.includes("oob");
    this.#negotiate(isReadAhead ? { enable: ["oob"] } : undefined, version);
    for (const [id, pending] of waiting) {
      if (this.#lostReason === null) this.#transmit(id, pending);
    }
    this.#greeting.resolve();
  }

  async #negotiate(args: { enable: string[] } | undefined, version: QmpVersion): Promise<void> {
    try {
      const patience = this.#isPatient ? { timeoutMs: Number.POSITIVE_INFINITY } : {};
      const reply = await this.#send("qmp_capabilities", args, patience);
      if (reply.ok) this.#ready.resolve(version);
      else this.#lose(this.#lostError(`negotiation refused: ${reply.description}`));
    } catch (error) {
      this.#ready.reject(error);
    }
  }

  #answer(message: Record<string, unknown>): void {
    const id = message["id"];
    if (typeof id !== "number") {
      // QEMU could not even parse what we sent: no command will be answered in order any more.
      if ("error" in message)
        throw new Error(`QEMU could not read a command: ${describe(message["error"])}`);
      return;
    }
    const pending = this.#pending.get(id);
    if (pending === undefined) return; // An answer that came after its deadline.
    this.#pending.delete(id);
    clearTimeout(pending.timer);
    if ("return" in message) {
      pending.resolve({ ok: true, value: message["return"] });
    } else if (isRecord(message["error"])) {
      const errorClass = String(message["error"]["class"] ?? "GenericError");
      pending.resolve({ ok: false, errorClass, description: describe(message["error"]) });
    } else {
      pending.reject(
        this.#lostError(`the answer to ${pending.command} has neither return nor error`),
      );
    }
  }

  #lostError(reason: string): FslError {
    return new FslError("TARGET_LOST", `QMP: connection to ${this.#peer}: ${reason}`, {
      peer: this.#peer,
    });
  }

  #lose(reason: FslError): void {
    if (this.#lostReason !== null) return;
    this.#lostReason = reason;
    this.#socket?.terminate();
    native.close(this.#fd);
    clearTimeout(this.#greetingTimer);
    this.#ready.reject(reason);
    for (const pending of this.#pending.values()) {
      clearTimeout(pending.timer);
      pending.reject(reason);
    }
    this.#pending.clear();
    this.#listeners.clear();
    this.#closed.resolve(reason);
  }
}

export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** `10.0.2` */
export function formatVersion(version: QmpVersion): string {
  return `${version.major}.${version.minor}.${version.micro}`;
}

/** @param value the `version` member of a greeting, or the answer to `query-version` */
function parseVersion(value: unknown): QmpVersion | null {
  if (!isRecord(value) || !isRecord(value["qemu"])) return null;
  const { major, minor, micro } = value["qemu"];
  if (typeof major !== "number" || typeof minor !== "number" || typeof micro !== "number")
    return null;
  return { major, minor, micro };
}

/** QEMU's own words, on one line and of bounded length. */
function describe(error: unknown): string {
  const text = isRecord(error) ? String(error["desc"] ?? "") : String(error);
  return text
    .replace(/[^\x20-\x7e]+/g, " ")
    .trim()
    .slice(0, 1000);
}

function parseMessage(text: string): unknown {
  // A reviver makes parsing slow, and hardly any message has such a number.
  return /\d{16}/.test(text) ? JSON.parse(text, exactIntegers) : JSON.parse(text);
}

/**
 * JSON.parse reviver: integers beyond 2^53 (QEMU has some: migration limits, sizes of backends)
 * stay exact as bigint. `JSON.rawJSON` writes them back.
 */
function exactIntegers(_key: string, value: unknown, context?: { source?: string }): unknown {
  if (typeof value !== "number" || Number.isSafeInteger(value)) return value;
  const source = context?.source;
  return source !== undefined && /^-?\d{1,40}$/.test(source) ? BigInt(source) : value;
}

/** JSON.stringify replacer, the counterpart of `exactIntegers`. */
function rawIntegers(_key: string, value: unknown): unknown {
  return typeof value === "bigint" ? rawJson(String(value)) : value;
}

/** In Bun and in ECMAScript's "JSON.parse source text access"; not in TypeScript's library yet. */
const rawJson = (JSON as unknown as { rawJSON(text: string): unknown }).rawJSON;

/** Bun.connect takes a connected descriptor; its types do not say so. */
export const connectDescriptor = Bun.connect as unknown as (
  options: Bun.SocketOptions<undefined> & { fd: number },
) => Promise<Bun.Socket<undefined>>;
