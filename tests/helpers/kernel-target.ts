/**
 * The second process of the kernel tests, seen from the test: compiles
 * tests/helpers/kernel-target.c, starts it, sends it commands, collects its answers, and ends it
 * whatever happens.
 */
import { beforeAll } from "bun:test";
import { join } from "node:path";
import { BUILD, compileProgram, modifiedMs, ROOT } from "../../scripts/build-shim.ts";
import { SOCK_STREAM } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";

const HELPERS = join(ROOT, "tests", "helpers");

/** The program of kernel-target.c, compiled when it is older than its source. */
export function targetProgram(): string {
  return compiled("kernel-target", ["-pthread"]);
}

/** The program of static-target.c. */
export function staticProgram(): string {
  const flags = ["-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector"];
  return compiled("static-target", flags);
}

function compiled(name: string, flags: readonly string[]): string {
  const source = join(HELPERS, `${name}.c`);
  const path = join(BUILD, name);
  if (modifiedMs(path) < modifiedMs(source)) compileProgram([source], path, flags);
  return path;
}

/** Compiling takes seconds when the compiler's own cache is empty. */
beforeAll(() => {
  targetProgram();
  staticProgram();
}, 120_000);

/** A deadline of its own for every wait: nothing here may hang a test run. */
export async function within<T>(promise: Promise<T>, ms: number, what: string): Promise<T> {
  const late = Promise.withResolvers<never>();
  const timer = setTimeout(() => late.reject(new Error(`${what}: nothing within ${ms} ms`)), ms);
  try {
    return await Promise.race([promise, late.promise]);
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Repeats `question` until it answers something else than null. Between the tries the event loop
 * runs.
 */
export async function until<T>(question: () => T | null, ms: number, what: string): Promise<T> {
  const endMs = performance.now() + ms;
  for (;;) {
    const answer = question();
    if (answer !== null) return answer;
    if (performance.now() > endMs) throw new Error(`${what}: not within ${ms} ms`);
    await Bun.sleep(1);
  }
}

export class TargetProcess {
  readonly child: Bun.Subprocess<"pipe", "pipe", "inherit">;
  readonly #lines: string[] = [];
  #news = Promise.withResolvers<void>();
  /** Our end of the socket that the target has as descriptor 3. */
  readonly socket: number;
  #nextId = 1;

  /**
   * @param env its environment, this process's when left out
   * @param fds what it has as descriptors from 4 on
   */
  constructor(
    args: readonly string[],
    program = targetProgram(),
    env: Readonly<Record<string, string | undefined>> = process.env,
    fds: readonly number[] = [],
  ) {
    const pair = new Int32Array(2);
    sys.check(sys.socketpair(SOCK_STREAM, pair), "socketpair");
    const [own = -1, theirs = -1] = pair;
    this.socket = own;
    this.child = Bun.spawn([program, ...args], {
      env: { ...env },
      stdio: ["pipe", "pipe", "inherit", theirs, ...fds],
    }) as Bun.Subprocess<"pipe", "pipe", "inherit">;
    sys.close(theirs);
    void this.#collect();
  }

  get pid(): number {
    return this.child.pid;
  }

  async #collect(): Promise<void> {
    const decoder = new TextDecoder();
    let rest = "";
    for await (const chunk of this.child.stdout) {
      rest += decoder.decode(chunk, { stream: true });
      const lines = rest.split("\n");
      rest = lines.pop() ?? "";
      this.#lines.push(...lines);
      this.#news.resolve();
      this.#news = Promise.withResolvers();
    }
  }

  /** Sends a line. */
  say(line: string): void {
    void this.child.stdin.write(`${line}\n`);
    void this.child.stdin.flush();
  }

  /** Starts a memory command and resolves with the number it answers; "bus" after a SIGBUS. */
  async job(
    kind: "r" | "t" | "w" | "d" | "u",
    page: number,
    count: number,
  ): Promise<number | "bus"> {
    const id = this.#nextId++;
    this.say(`${kind} ${id} ${page} ${count}`);
    const line = await this.line((text) => text.startsWith(`${kind} ${id} `) || text === `b ${id}`);
    return line.startsWith("b ") ? "bus" : Number(line.split(" ")[2]);
  }

  /** The first line that fits, taken out of those not asked for yet. */
  async line(fits: (line: string) => boolean, ms = 10_000): Promise<string> {
    const endMs = performance.now() + ms;
    for (;;) {
      const index = this.#lines.findIndex(fits);
      const error = this.#lines.find((text) => text.startsWith("error "));
      if (error !== undefined) throw new Error(`kernel-target: ${error}`);
      if (index >= 0) return this.#lines.splice(index, 1)[0] ?? "";
      await within(this.#news.promise, endMs - performance.now(), "an answer of kernel-target");
    }
  }

  /** What `memory` sends first: the userfaultfd and the region. */
  async region(): Promise<{ fd: number; addr: number; length: number }> {
    const message = new BigUint64Array(2);
    const fds = new Int32Array(1);
    const out = new Int32Array(2);
    const dontWait = 0x40;
    await until(
      () => (sys.recv(this.socket, message, 16, fds, 1, out, dontWait) === 16 ? true : null),
      10_000,
      "the region of kernel-target",
    );
    return { fd: fds[0] ?? -1, addr: Number(message[0]), length: Number(message[1]) };
  }

  /** Ends it and waits until it is gone. */
  async kill(): Promise<void> {
    this.child.kill("SIGKILL");
    await this.child.exited;
    sys.close(this.socket);
  }
}

/** A readable mapping of a memfd with the given bytes: a source for UFFDIO_COPY. */
export function mappedBytes(bytes: Uint8Array): { fd: number; addr: number; close(): void } {
  const fd = sys.check(sys.memfdCreate("fsl-test", 1), "memfd_create");
  for (let at = 0; at < bytes.length;) {
    at += sys.check(sys.pwrite(fd, sys.ptrOf(bytes) + at, bytes.length - at, at), "pwrite");
  }
  const addr = sys.check(sys.mmap(0, bytes.length, 1, 1, fd, 0), "mmap");
  return {
    fd,
    addr,
    close(): void {
      sys.munmap(addr, bytes.length);
      sys.close(fd);
    },
  };
}

/** Pages whose every word says where it belongs, so that a page in the wrong place shows. */
export function patternPages(pages: number, seed: number): Uint8Array {
  const words = new Uint32Array(pages * 1024);
  for (let index = 0; index < words.length; index += 1) {
    words[index] = Math.imul(index + 1, 2_654_435_761) ^ seed;
  }
  return new Uint8Array(words.buffer);
}
