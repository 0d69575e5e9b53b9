/**
 * A kernel-target with the preload library and helper tasks in it, and what tests want to know of
 * helpers from outside.
 */
import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { POLLIN, REGISTER_MISSING, WALL, WNOHANG } from "../../src/sys/abi.ts";
import { HelperTask } from "../../src/sys/helper-task.ts";
import * as sys from "../../src/sys/native.ts";
import { Uffd } from "../../src/uffd/uffd.ts";
import { mappedBytes, patternPages, TargetProcess, targetProgram, until } from "./kernel-target.ts";
import { libraryFd, preloadVariables, receivePreload } from "./preloaded.ts";

export const PAGE = 4096;
export const HUGE = 2 << 20;
export const HUGE_PAGES = HUGE / PAGE;
export interface Brought {
  /** Calls of the batch that were made. */
  readonly made: number;
  readonly read: number;
  readonly moved: number;
}

export type RegionKind = "thp" | "shmem" | "locked";

/** A target with a registered region, a file with the bytes that belong there, and helpers. */
export class HelperBench {
  readonly target: TargetProcess;
  readonly bytes: Uint8Array;
  readonly file: { fd: number; addr: number; close(): void };
  readonly #chunks: number;
  readonly #kind: RegionKind;
  tasks: HelperTask[] = [];
  uffd!: Uffd;
  addr = 0;

  private constructor(kind: RegionKind, chunks: number, helpers: number, slots?: number) {
    this.#kind = kind;
    this.#chunks = chunks;
    this.bytes = patternPages(chunks * HUGE_PAGES, 0x40e);
    this.file = mappedBytes(this.bytes);
    const library = libraryFd();
    this.target = new TargetProcess(
      ["region", kind, String(chunks * HUGE_PAGES)],
      targetProgram(),
      preloadVariables(helpers, slots),
      [library],
    );
    sys.close(library);
  }

  /** @param chunks length of the region in 2 MiB @param slots chunks of staging memory a helper */
  static async start(
    kind: RegionKind = "thp",
    chunks = 4,
    helpers = 1,
    features = 0,
    slots?: number,
  ): Promise<HelperBench> {
    const bench = new HelperBench(kind, chunks, helpers, slots);
    const line = await bench.target.line((text) => text.startsWith("region "));
    bench.addr = Number(line.split(" ")[1]);
    const preloaded = receivePreload(bench.target.socket);
    bench.uffd = new Uffd(preloaded.uffd);
    bench.uffd.api(features);
    bench.uffd.register(bench.addr, bench.#chunks * HUGE, REGISTER_MISSING);
    bench.tasks = preloaded.helpers.map((record) => new HelperTask(record));
    return bench;
  }

  get task(): HelperTask {
    const [first] = this.tasks;
    if (first === undefined) throw new Error(`${this.#kind}: no helper`);
    return first;
  }

  /** CRC of what belongs into these pages. */
  crc(page: number, pages: number): number {
    return Bun.hash.crc32(this.bytes.subarray(page * PAGE, (page + pages) * PAGE));
  }

  /** CRC of what the target finds there. */
  read(page: number, pages: number): Promise<number | "bus"> {
    return this.target.job("r", page, pages);
  }

  /** Address in the target. */
  chunk(index: number): number {
    return this.addr + index * HUGE;
  }

  /** preadInto and move of one chunk in one batch, with a descriptor of its own. */
  bring(index: number, mode = 0, task = this.task): Brought {
    const fd = task.sendDescriptor(this.file.fd);
    const { stagingAddr } = task.record;
    task.begin();
    const read = task.preadInto(fd, stagingAddr, HUGE, index * HUGE);
    const moved = task.move(this.chunk(index), stagingAddr, HUGE, mode);
    const made = task.run();
    const brought = { made, read: task.result(read), moved: task.result(moved) };
    task.begin();
    task.closeDescriptor(fd);
    task.run();
    return brought;
  }

  /** Has a fault been raised that nobody has read? */
  hasFault(): boolean {
    return sys.poll(Int32Array.of(this.uffd.fd), new Int32Array(1), 1, POLLIN, 0) === 1;
  }

  /** Starts a read of one page by a thread of the target; resolves when the thread waits in it. */
  async blockedRead(page: number): Promise<{ answer: Promise<number | "bus"> }> {
    const answer = this.read(page, 1);
    await until(() => (this.hasFault() ? true : null), 5000, "a fault");
    return { answer };
  }

  async end(): Promise<void> {
    await this.target.kill();
    for (const task of this.tasks) {
      task.close();
      await ended(task.record.pid);
    }
    this.uffd.close();
    this.file.close();
  }
}

/** Waits for the end of a helper. Its status, see `reap`. */
export function ended(pid: number): Promise<number> {
  return until(() => reap(pid) || null, 1000, `the end of helper ${pid}`);
}

/** Status as wait4(2) gives it; 0 while the helper lives, -1 when somebody else waited for it. */
export function reap(pid: number): number {
  const status = new Int32Array(1);
  const result = sys.waitpid(pid, WNOHANG | WALL, status);
  if (result === 0) return 0;
  // An exit code of 0 is told from "still running".
  return result < 0 ? -1 : (status[0] ?? 0) | 0x10000;
}

/** A line of /proc/PID/status, without its name. */
export function statusOf(pid: number, name: string): string {
  const text = readFileSync(`/proc/${pid}/status`, "latin1");
  return new RegExp(`^${name}:\\s*(.*)$`, "m").exec(text)?.[1] ?? "";
}

/** `Z` for one that has ended and was not waited for; null when there is no such process. */
export function stateOf(pid: number): string | null {
  try {
    return statusOf(pid, "State").slice(0, 1);
  } catch {
    return null;
  }
}

/** True when it holds no memory any more. */
export function isOver(pid: number): boolean {
  const state = stateOf(pid);
  return state === null || state === "Z" || state === "X";
}

/** Descriptors of a process: number -> what it is. */
export function descriptorsOf(pid: number): Record<string, string> {
  const found: Record<string, string> = {};
  for (const number of readdirSync(`/proc/${pid}/fd`)) {
    try {
      found[number] = readlinkSync(`/proc/${pid}/fd/${number}`);
    } catch {
      // Closed meanwhile.
    }
  }
  return found;
}

/** AnonHugePages in KiB of the areas that begin in [addr, addr + length). */
export function hugeKib(pid: number, addr: number, length: number): number {
  let sum = 0;
  let isInside = false;
  for (const line of readFileSync(`/proc/${pid}/smaps`, "latin1").split("\n")) {
    const area = /^([0-9a-f]+)-([0-9a-f]+) /.exec(line);
    if (area !== null) {
      const startAddr = Number.parseInt(area[1] ?? "", 16);
      const endAddr = Number.parseInt(area[2] ?? "", 16);
      isInside = startAddr < addr + length && endAddr > addr;
    }
    const huge = /^AnonHugePages:\s+(\d+) kB/.exec(line);
    if (isInside && huge !== null) sum += Number(huge[1]);
  }
  return sum;
}
