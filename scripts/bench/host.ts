/**
 * What the benchmark does to this machine and reads from it: page cache, memory, CPU time. Linux
 * only; CPU time wants cgroup 2 (then every thread and child counts to the microsecond) and falls
 * back to /proc (steps of 10 ms).
 */
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  writeFileSync,
} from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { BUILD, compileProgram, modifiedMs } from "../build-shim.ts";

const KIB = 1024;
const MIB = 1024 * 1024;
/** sysconf(_SC_CLK_TCK) of every Linux that this runs on. */
const TICK_MS = 10;
/** How long processes may take to leave a cgroup after they were killed. */
const EMPTY_MS = 5_000;

/** The program of `scripts/bench/NAME.c`, compiled when it is older than its source. */
export function benchProgram(name: "host" | "fault-path"): string {
  const source = join(import.meta.dir, `${name}.c`);
  const path = join(BUILD, `bench-${name}`);
  if (modifiedMs(path) < modifiedMs(source)) compileProgram([source], path, ["-pthread"]);
  return path;
}

async function host(...args: readonly string[]): Promise<string> {
  const child = Bun.spawn([benchProgram("host"), ...args], { stdout: "pipe", stderr: "pipe" });
  const [output, errors] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  if ((await child.exited) !== 0) throw new Error(`bench-host ${args.join(" ")}: ${errors.trim()}`);
  return output.trim();
}

/**
 * Takes so much memory from the host of a virtual machine and gives it back to this kernel: the
 * first touch of a page that the host has taken back costs more than all that is measured here.
 */
export async function touchMemory(bytes: number): Promise<void> {
  await host("touch", String(bytes));
}

/** @returns bytes of the file in the page cache */
export async function warmFile(path: string): Promise<number> {
  return Number(await host("warm", path));
}

/** @returns bytes of the file that are in the page cache in spite of it */
export async function dropFile(path: string): Promise<number> {
  return Number(await host("drop", path));
}

/** Reads the file's data into huge pages of its own, a thread for each CPU, and keeps it. */
export class Reader {
  readonly #child: Bun.Subprocess<"pipe", "pipe", "inherit">;

  /** @param launcher what to put before its command line */
  constructor(path: string, launcher: readonly string[]) {
    this.#child = Bun.spawn(
      [...launcher, benchProgram("host"), "read", path, String(availableParallelism())],
      { stdin: "pipe", stdout: "pipe", stderr: "inherit" },
    );
  }

  /** Begins. @returns when all was in, by `performance.now()` */
  async read(): Promise<number> {
    this.#child.stdin.write("\n");
    this.#child.stdin.flush();
    const { done } = await this.#child.stdout.getReader().read();
    if (done) throw new Error("bench-host read ended before all was read");
    return performance.now();
  }
}

// -- a group of processes -------------------------------------------------------------------------

const groups = new Set<ProcessGroup>();
process.on("exit", () => {
  for (const group of groups) group.closeNow();
});

/** @source proc(5) /proc/PID/comm */
const NAME_MAX = 15;

/** The processes of one run: their CPU time, and their end. */
export class ProcessGroup {
  readonly #path: string | null;
  readonly #timePath: string;
  #pid = 0;
  static #count = 0;

  /** @param directory where to leave a file */
  constructor(directory: string) {
    this.#timePath = join(directory, "started");
    this.#path = makeCgroup(`fsl-bench-${process.pid}-${ProcessGroup.#count++}`);
    groups.add(this);
  }

  /** What to put before a command line so that it runs in the group and dies with this process. */
  get launcher(): string[] {
    return this.#launcher("/dev/null");
  }

  /** The same for the program whose start is measured: `startedAt`. */
  get timedLauncher(): string[] {
    return this.#launcher(this.#timePath);
  }

  #launcher(timePath: string): string[] {
    const procs = this.#path === null ? "-" : join(this.#path, "cgroup.procs");
    return [benchProgram("host"), "launch", procs, timePath];
  }

  /** When that program took its process over, by `performance.now()`. */
  get startedAt(): number {
    return Number(readFileSync(this.#timePath, "latin1")) / 1e6 - performance.timeOrigin;
  }

  /** The process that was launched. */
  set pid(pid: number) {
    this.#pid = pid;
  }

  /** CPU time of all of the group so far, ms. */
  cpuMs(): number {
    if (this.#path === null) return sum(this.#tree().map(procCpuMs));
    const stat = readFileSync(join(this.#path, "cpu.stat"), "latin1");
    return Number(/^usage_usec (\d+)$/m.exec(stat)?.[1] ?? Number.NaN) / 1000;
  }

  /** Pids of the group whose program's file name begins with `name`. */
  find(name: string): number[] {
    return this.#tree().filter((pid) => commandName(pid).startsWith(name.slice(0, NAME_MAX)));
  }

  /** That of fsl itself: its helpers in QEMU are called fsl-helper. */
  findExactly(name: string): number | undefined {
    return this.#tree().find((pid) => commandName(pid) === name.slice(0, NAME_MAX));
  }

  kill(): void {
    try {
      if (this.#path !== null) writeFileSync(join(this.#path, "cgroup.kill"), "1");
      else for (const pid of this.#tree()) process.kill(pid, "SIGKILL");
    } catch {
      // They have ended already.
    }
  }

  /** Ends all of them, and waits until they are gone, their memory too. */
  async close(): Promise<void> {
    const deadline = performance.now() + EMPTY_MS;
    for (;;) {
      this.kill();
      if (this.#isGone() || performance.now() > deadline) break;
      await Bun.sleep(5); // Nothing tells when the last thread has left a cgroup.
    }
    groups.delete(this);
  }

  /** The same for the end of this process, when nothing can be awaited any more. */
  closeNow(): void {
    const deadline = performance.now() + EMPTY_MS;
    for (;;) {
      this.kill();
      if (this.#isGone() || performance.now() > deadline) return;
      Bun.sleepSync(5);
    }
  }

  /** A cgroup can be removed when the last thread in it has ended; a process is listed for less. */
  #isGone(): boolean {
    if (this.#path === null) return this.#tree().length === 0;
    try {
      rmdirSync(this.#path);
      return true;
    } catch {
      return false;
    }
  }

  #tree(): number[] {
    if (this.#path !== null) {
      const text = readFileSync(join(this.#path, "cgroup.procs"), "latin1");
      return text.split("\n").filter(Boolean).map(Number);
    }
    const found = this.#pid > 0 && existsSync(`/proc/${this.#pid}`) ? [this.#pid] : [];
    for (const pid of found) found.push(...childrenOf(pid));
    return found;
  }
}

function makeCgroup(name: string): string | null {
  const mounts = readFileSync("/proc/self/mounts", "latin1");
  const mount = /^\S+ (\S+) cgroup2 /m.exec(mounts)?.[1];
  if (mount === undefined) return null;
  const path = join(mount, name);
  try {
    mkdirSync(path);
    if (existsSync(join(path, "cgroup.kill")) && existsSync(join(path, "cpu.stat"))) return path;
    rmdirSync(path);
  } catch {
    // Not ours to make: /proc has to do.
  }
  return null;
}

function childrenOf(pid: number): number[] {
  try {
    return readdirSync(`/proc/${pid}/task`).flatMap((task) =>
      readFileSync(`/proc/${pid}/task/${task}/children`, "latin1")
        .split(" ")
        .filter(Boolean)
        .map(Number),
    );
  } catch {
    return [];
  }
}

function procCpuMs(pid: number): number {
  const fields = readProc(pid, "stat").split(") ").at(-1)?.split(" ") ?? [];
  return sum(fields.slice(11, 15).map(Number)) * TICK_MS;
}

function commandName(pid: number): string {
  return readProc(pid, "comm").trim();
}

function readProc(pid: number, name: string): string {
  try {
    return readFileSync(`/proc/${pid}/${name}`, "latin1");
  } catch {
    return "";
  }
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}

// -- memory ---------------------------------------------------------------------------------------

/** Resident memory of a process in bytes; NaN when it is gone. */
export interface ProcessMemory {
  /** Everything, at its highest. */
  readonly peak: number;
  /** Heap, stacks and what was written to private mappings, now. */
  readonly anonymous: number;
  /** Pages of mapped files, now: memory that the page cache holds anyway. */
  readonly file: number;
  /** memfds and the like, now. */
  readonly shmem: number;
}

export function memoryOf(pid: number): ProcessMemory {
  const status = readProc(pid, "status");
  const field = (name: string): number =>
    Number(new RegExp(`^${name}:\\s+(\\d+) kB$`, "m").exec(status)?.[1] ?? Number.NaN) * KIB;
  return {
    peak: field("VmHWM"),
    anonymous: field("RssAnon"),
    file: field("RssFile"),
    shmem: field("RssShmem"),
  };
}

/** Highest values seen, by sampling; `peak` is the kernel's own. */
export class MemoryPeaks {
  readonly #pid: number;
  readonly #timer: ReturnType<typeof setInterval>;
  #anonymous = 0;
  #file = 0;
  #shmem = 0;
  #peak = 0;

  constructor(pid: number, intervalMs: number) {
    this.#pid = pid;
    this.#timer = setInterval(() => this.#sample(), intervalMs);
  }

  #sample(): void {
    const now = memoryOf(this.#pid);
    if (Number.isNaN(now.peak)) return;
    this.#anonymous = Math.max(this.#anonymous, now.anonymous);
    this.#file = Math.max(this.#file, now.file);
    this.#shmem = Math.max(this.#shmem, now.shmem);
    this.#peak = now.peak;
  }

  close(): ProcessMemory {
    clearInterval(this.#timer);
    this.#sample();
    return {
      peak: this.#peak,
      anonymous: this.#anonymous,
      file: this.#file,
      shmem: this.#shmem,
    };
  }
}

/** Bytes of [start, end) of a process that are resident anonymous memory, and in huge pages. */
export function hugePagesOf(
  pid: number,
  start: number,
  end: number,
): { anonymous: number; huge: number } {
  let inside = false;
  let anonymous = 0;
  let huge = 0;
  for (const line of readProc(pid, "smaps").split("\n")) {
    const area = /^([0-9a-f]+)-([0-9a-f]+) /.exec(line);
    if (area !== null) {
      inside = Number(`0x${area[1]}`) < end && Number(`0x${area[2]}`) > start;
    } else if (inside) {
      const [, name, kib] = /^(Anonymous|AnonHugePages):\s+(\d+) kB/.exec(line) ?? [];
      if (name === "Anonymous") anonymous += Number(kib) * KIB;
      if (name === "AnonHugePages") huge += Number(kib) * KIB;
    }
  }
  return { anonymous, huge };
}

// -- about this machine ---------------------------------------------------------------------------

export interface HostDescription {
  readonly kernel: string;
  readonly cpu: string;
  readonly cpus: number;
  readonly memoryMiB: number;
  readonly hugePages: string;
  readonly bun: string;
  /** Load average of the last minute when the run began. */
  readonly load: number;
}

export function describeHost(): HostDescription {
  const cpuInfo = readFileSync("/proc/cpuinfo", "latin1");
  const memory = readFileSync("/proc/meminfo", "latin1");
  const hugePath = "/sys/kernel/mm/transparent_hugepage/enabled";
  const huge = existsSync(hugePath) ? readFileSync(hugePath, "latin1") : "";
  const firstLine = readFileSync("/proc/version", "latin1").split(" ");
  return {
    kernel: firstLine[2] ?? "unknown",
    cpu: /^model name\s*: (.*)$/m.exec(cpuInfo)?.[1] ?? "unknown",
    cpus: navigator.hardwareConcurrency,
    memoryMiB: Math.round((Number(/^MemTotal:\s+(\d+)/m.exec(memory)?.[1]) * KIB) / MIB),
    hugePages: /\[(\w+)\]/.exec(huge)?.[1] ?? "none",
    bun: Bun.version,
    load: Number(readFileSync("/proc/loadavg", "latin1").split(" ")[0]),
  };
}
