/**
 * The other end of QMP for the tests of src/vmm: a scripted monitor on a socket pair, and a real QEMU
 * that lives as long as its test.
 */
import {
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readdirSync,
  readlinkSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect } from "bun:test";
import { type FslError, isFslError } from "../../src/errors.ts";
import { MSG_DONTWAIT, SOCK_STREAM } from "../../src/sys/abi.ts";
import * as native from "../../src/sys/native.ts";
import { QmpClient, type QmpOpenOptions } from "../../src/vmm/qmp.ts";
import { stateOf } from "./helper-target.ts";

export const GREETING =
  '{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, ' +
  '"capabilities": ["oob"]}}\r\n';

export interface FakeCommand {
  readonly execute: string;
  readonly arguments?: Record<string, unknown>;
  readonly id: number;
}

/** What a scripted monitor answers: a `return` value, or an error. */
export type FakeReply =
  { readonly return: unknown } | { readonly error: { class: string; desc: string } };

/**
 * A monitor that reads commands and answers what the test says. Its own reading polls every millisecond: it must see
 * the descriptors, which Bun's sockets drop.
 */
export class FakeMonitor {
  readonly commands: FakeCommand[] = [];
  /** The commands as they came. */
  readonly texts: string[] = [];
  readonly fds: number[] = [];
  /** Answers by command name; a command that is not there stays unanswered. */
  replies: Record<string, FakeReply | ((command: FakeCommand) => FakeReply)> = {
    qmp_capabilities: { return: {} },
  };
  readonly #fd: number;
  readonly #timer: ReturnType<typeof setInterval>;
  #text = "";
  #isClosed = false;

  private constructor(fd: number) {
    this.#fd = fd;
    this.#timer = setInterval(() => this.#read(), 1);
  }

  /** @returns the monitor, and the client at the other end */
  static open(options: Partial<QmpOpenOptions> = {}): { monitor: FakeMonitor; client: QmpClient } {
    const pair = new Int32Array(2);
    if (native.socketpair(SOCK_STREAM, pair) < 0) throw new Error("socketpair");
    const [clientFd = -1, monitorFd = -1] = pair;
    return {
      monitor: new FakeMonitor(monitorFd),
      client: QmpClient.open(clientFd, { peer: "fake", ...options }),
    };
  }

  send(text: string | Uint8Array): void {
    const bytes = typeof text === "string" ? Buffer.from(text) : text;
    const none = new Int32Array(0);
    for (let sent = 0; sent < bytes.length;) {
      const rest = bytes.subarray(sent);
      const count = native.send(this.#fd, rest, rest.length, none, 0, 0);
      if (count < 0) throw new Error(`send: ${native.errnoName(count)}`);
      sent += count;
    }
  }

  event(name: string, data: unknown = {}): void {
    this.send(
      `${JSON.stringify({ timestamp: { seconds: 1, microseconds: 2 }, event: name, data })}\r\n`,
    );
  }

  /** Reads no more. */
  pause(): void {
    clearInterval(this.#timer);
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    clearInterval(this.#timer);
    native.close(this.#fd);
    for (const fd of this.fds.splice(0)) native.close(fd);
  }

  named(name: string): FakeCommand[] {
    return this.commands.filter((command) => command.execute === name);
  }

  #read(): void {
    const buffer = Buffer.alloc(65_536);
    const fds = new Int32Array(8);
    const out = new Int32Array(2);
    const count = native.recv(this.#fd, buffer, buffer.length, fds, fds.length, out, MSG_DONTWAIT);
    if (count <= 0) return;
    this.fds.push(...fds.subarray(0, out[0]));
    this.#text += buffer.toString("utf8", 0, count);
    // The client writes one object after the other, without line breaks.
    for (const text of this.#text.split(/(?<=\})(?=\{"execute")/)) {
      let command: FakeCommand;
      try {
        command = JSON.parse(text) as FakeCommand;
      } catch {
        break; // Not complete yet.
      }
      this.#text = this.#text.slice(text.length);
      this.texts.push(text);
      this.#take(command);
    }
  }

  #take(command: FakeCommand): void {
    this.commands.push(command);
    const reply = this.replies[command.execute];
    if (reply === undefined) return;
    const answer = typeof reply === "function" ? reply(command) : reply;
    this.send(`${JSON.stringify({ ...answer, id: command.id })}\r\n`);
  }
}

/** The FslError that `work` ends with; the test fails when it does not. */
export async function refusalOf(work: Promise<unknown> | (() => unknown)): Promise<FslError> {
  try {
    await (typeof work === "function" ? work() : work);
  } catch (error) {
    if (isFslError(error)) return error;
    throw error;
  }
  throw new Error("expected an FslError, found success");
}

/** Waits until `condition` holds; looks every 5 ms. */
export async function until(
  condition: () => boolean,
  what: string,
  timeoutMs = 10_000,
): Promise<void> {
  const deadlineMs = performance.now() + timeoutMs;
  while (!condition()) {
    if (performance.now() > deadlineMs) throw new Error(`timeout: ${what}`);
    await Bun.sleep(5);
  }
}

/** SIGSTOP, until every thread has stopped: one that is waked before that may answer first. */
export async function stopProcess(pid: number): Promise<void> {
  process.kill(pid, "SIGSTOP");
  const isStopped = (task: string): boolean => stateOf(Number(task)) === "T";
  await until(() => readdirSync(`/proc/${pid}/task`).every(isStopped), "all threads to stop");
}

/** A directory for one test file; removed by `Symbol.dispose`. */
export class Scratch {
  readonly path = mkdtempSync(join(tmpdir(), "fsl-test-"));

  file(name: string, content: string | Uint8Array = ""): string {
    const path = join(this.path, name);
    writeFileSync(path, content);
    return path;
  }

  [Symbol.dispose](): void {
    rmSync(this.path, { recursive: true, force: true });
  }
}

/** Links of a process's descriptors. */
export function descriptorLinks(pid: number): string[] {
  return readdirSync(`/proc/${pid}/fd`).flatMap((fd) => {
    try {
      return [readlinkSync(`/proc/${pid}/fd/${fd}`)];
    } catch {
      return [];
    }
  });
}

/**
 * Makes fsl put its directories where no other process's are, until the test file ends.
 * @returns lists what is there
 */
export function ownRuntimeDirectory(scratch: Scratch): () => string[] {
  const path = join(scratch.path, "runtime");
  mkdirSync(path, { mode: 0o700 });
  process.env["XDG_RUNTIME_DIR"] = path;
  return () => readdirSync(path);
}

/** Numbers of this process's open descriptors. */
export function ownDescriptors(): number[] {
  return readdirSync("/proc/self/fd").map(Number);
}

/** State letter of a process, `R`, `S`, `T`, …; null when it has gone. */
export function processState(pid: number): string | null {
  try {
    return /^State:\s+(\S)/m.exec(readFileSync(`/proc/${pid}/status`, "latin1"))?.[1] ?? null;
  } catch {
    return null;
  }
}

/**
 * A boot sector that prints dots on the first serial port for ever and writes to 64 KiB of RAM between
 * them. Assembled by hand:
 * `cli; xor ax,ax; mov ds,ax; mov ax,1000h; mov es,ax; L: xor bx,bx; M: inc word [es:bx];`
 * `add bx,2; jnz M; mov dx,3f8h; mov al,'.'; out dx,al; jmp L`
 */
export function bootSector(): Uint8Array {
  const code = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0xb8, 0x00, 0x10, 0x8e, 0xc0, 0x31, 0xdb, 0x26, 0xff, 0x07, 0x83,
    0xc3, 0x02, 0x75, 0xf8, 0xba, 0xf8, 0x03, 0xb0, 0x2e, 0xee, 0xeb, 0xee,
  ];
  const disk = new Uint8Array(1024 * 1024);
  disk.set(code);
  disk.set([0x55, 0xaa], 510);
  return disk;
}

/** Asserts the parts of an error that are its contract. */
export function expectRefusal(error: FslError, code: string, text: RegExp): void {
  expect({ code: error.code, message: error.message }).toEqual({
    code: code as FslError["code"],
    message: expect.stringMatching(text) as unknown as string,
  });
}

/** The QEMU that tests use; FSL_QEMU names another one. */
export const QEMU = process.env["FSL_QEMU"] ?? "qemu-system-x86_64";

/** Command line of a small guest on TCG without any device of its own. */
export function guestArgv(machine: string, ...extra: string[]): string[] {
  const quiet = ["-nodefaults", "-no-user-config", "-display", "none"];
  return [QEMU, "-M", machine, "-accel", "tcg", "-m", "64", ...quiet, ...extra];
}

/** Makes the first drive of a pc or q35 guest out of `bootSector`. */
export function bootDrive(path: string): string[] {
  return ["-drive", `file=${path},format=raw,if=ide,snapshot=on`];
}

/** A QEMU that the test itself started, as somebody else would: with its own QMP socket. */
export class OwnQemu {
  readonly qmpPath: string;
  readonly #child: Bun.Subprocess;

  private constructor(child: Bun.Subprocess, qmpPath: string) {
    this.#child = child;
    this.qmpPath = qmpPath;
  }

  /** @returns when its QMP socket is there */
  static async start(scratch: Scratch, argv: readonly string[]): Promise<OwnQemu> {
    const qmpPath = join(scratch.path, `qmp-${Math.random().toString(36).slice(2)}`);
    const child = Bun.spawn([...argv, "-qmp", `unix:${qmpPath},server=on,wait=off`], {
      stdio: ["ignore", "ignore", "ignore"],
    });
    const qemu = new OwnQemu(child, qmpPath);
    await until(() => isListening(qmpPath), "QMP socket");
    return qemu;
  }

  get pid(): number {
    return this.#child.pid;
  }

  get exited(): Promise<number> {
    return this.#child.exited;
  }

  /** One command on a connection of its own. */
  async ask(command: string, args?: Record<string, unknown>): Promise<unknown> {
    return askQmp(this.qmpPath, command, args);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#child.kill("SIGKILL");
    await this.#child.exited;
  }
}

/** The file is there before QEMU listens: the kernel's table tells (flag SO_ACCEPTCON). */
function isListening(path: string): boolean {
  const lines = readFileSync("/proc/net/unix", "latin1").split("\n");
  return lines.some((line) => line.endsWith(` ${path}`) && / 00010000 0001 /.test(line));
}

/** One command on a connection of its own; a refusal is an error. */
export async function askQmp(
  path: string,
  command: string,
  args?: Record<string, unknown>,
): Promise<unknown> {
  const client = QmpClient.open(native.unixConnect(path), {
    peer: "test",
    greetingTimeoutMs: 10_000,
  });
  try {
    return await client.request(command, args);
  } finally {
    client.close();
  }
}
