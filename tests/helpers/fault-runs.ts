/**
 * Runs of `fsl load` that are meant to go wrong: fsl may be killed while its QEMU lives on, another
 * fsl takes over, and the test keeps its serial line and QMP all the while. Everything that a run
 * starts carries a mark in its environment, by which it is found and ended whatever has happened.
 */
import {
  chownSync,
  closeSync,
  fstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  readSync,
  rmSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import type { FoundLoad, LoadReport } from "../../src/index.ts";
import { type BlockState, LoadState } from "../../src/load/state.ts";
import { type GuestSnapshot, QmpClient, SerialConsole } from "./guests.ts";
import { FSL, isRunning, plainEnvironment, until, Watched, within } from "./load-runs.ts";
import { byUser } from "./published.ts";

const MARK = "FSL_FAULT_RUN";
let counter = 0;

export interface FaultOptions {
  /** Arguments of `fsl load` after the snapshot's path. */
  readonly flags?: readonly string[];
  /** Another path than the snapshot's own. */
  readonly path?: string;
  /** Another QEMU command line than the snapshot's own, and more arguments of it. */
  readonly argv?: readonly string[];
  readonly qemuArgs?: readonly string[];
  /** What executes fsl in its own place, e.g. `["prlimit", "--nofile=32"]`. */
  readonly prefix?: readonly string[];
  /** Another program than the compiled executable, with its arguments before the snapshot. */
  readonly program?: readonly string[];
  /** Run by this user and group, who then owns the run's directory. */
  readonly uid?: number;
}

export interface Ended {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** An fsl of a run: the first one, or one that takes over. */
export class FslProcess {
  readonly pid: number;
  readonly stdout = new Watched();
  readonly stderr = new Watched();
  /** Exit code, 128 + signal when it died by one. */
  readonly exited: Promise<number>;
  readonly #child: Bun.Subprocess<"ignore", "pipe", "pipe">;

  constructor(argv: readonly string[], env: Record<string, string>, cwd: string) {
    // The kernel kills fsl when the test dies; setpriv executes it in its own place.
    this.#child = Bun.spawn(["setpriv", "--pdeathsig", "KILL", ...argv], {
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
      cwd,
      env,
    });
    this.pid = this.#child.pid;
    const reading = Promise.all([
      collect(this.#child.stdout, this.stdout),
      collect(this.#child.stderr, this.stderr),
    ]);
    this.exited = this.#child.exited.then(async (code) => {
      // A QEMU that was left behind keeps the pipes open: its output is not waited for.
      await Promise.race([reading, Bun.sleep(200)]);
      return code;
    });
  }

  signal(signal: NodeJS.Signals): void {
    this.#child.kill(signal);
  }

  /** Waits for the end. */
  async end(ms = 30_000): Promise<Ended> {
    const code = await within(this.exited, ms, `the end of fsl (${this.stderr.text})`);
    return { code, stdout: this.stdout.text, stderr: this.stderr.text };
  }

  /** SIGKILL, and waits until it is gone. */
  async kill(): Promise<void> {
    this.#child.kill("SIGKILL");
    await this.#child.exited;
  }
}

/** Marks of runs that were not disposed yet: a test that ran into its time limit leaves them. */
const living = new Set<string>();
process.on("exit", () => {
  for (const mark of living) for (const pid of marked(mark)) killQuietly(pid);
});

export class FaultRun implements AsyncDisposable {
  readonly directory: string;
  readonly serial: SerialConsole;
  readonly qmp: QmpClient;
  readonly fsl: FslProcess;
  readonly #mark: string;
  readonly #env: Record<string, string>;
  #qemuPid = 0;

  private constructor(
    directory: string,
    mark: string,
    serial: SerialConsole,
    qmp: QmpClient,
    argv: readonly string[],
  ) {
    this.directory = directory;
    this.serial = serial;
    this.qmp = qmp;
    this.#mark = mark;
    living.add(mark);
    this.#env = plainEnvironment({
      [MARK]: mark,
      XDG_RUNTIME_DIR: join(directory, "run"),
      TMPDIR: join(directory, "tmp"),
    });
    this.fsl = new FslProcess(argv, this.#env, directory);
  }

  /** Starts `fsl load SNAP FLAGS --report … -- QEMU …`. */
  static async start(
    snapshot: Pick<GuestSnapshot, "path" | "argv">,
    options: FaultOptions = {},
  ): Promise<FaultRun> {
    const directory = mkdtempSync(join(tmpdir(), "fsl-fault-test-"));
    mkdirSync(join(directory, "run"), { mode: 0o700 });
    mkdirSync(join(directory, "tmp"));
    const serial = await SerialConsole.listen(join(directory, "serial"));
    const qmp = await QmpClient.listen(join(directory, "qmp"));
    const { uid } = options;
    if (uid !== undefined) {
      for (const name of [".", "run", "tmp", "serial", "qmp"])
        chownSync(join(directory, name), uid, uid);
    }
    const user = uid === undefined ? [] : byUser(uid);
    const argv = [
      ...(options.prefix ?? []),
      ...user,
      ...(options.program ?? [FSL, "load"]),
      options.path ?? snapshot.path,
      "--report",
      join(directory, "report.json"),
      ...(options.flags ?? []),
      "--",
      ...(options.argv ?? snapshot.argv),
      ...(options.qemuArgs ?? []),
      ...serial.args,
      ...qmp.args,
    ];
    counter += 1;
    return new FaultRun(directory, `${process.pid}-${counter}`, serial, qmp, argv);
  }

  /** QEMU's pid, also when fsl has died meanwhile. */
  async qemuPid(): Promise<number> {
    this.#qemuPid ||= await until(() => this.#findQemu(), 10_000, "a QEMU of this run");
    return this.#qemuPid;
  }

  #findQemu(): number | null {
    const found = marked(this.#mark).find((pid) =>
      basename(linkOf(`/proc/${pid}/exe`)).startsWith("qemu"),
    );
    return found ?? null;
  }

  /** Another fsl, with this run's environment. */
  command(...args: string[]): FslProcess {
    return new FslProcess([FSL, ...args], this.#env, this.directory);
  }

  /** `fsl resume` of this run's QEMU, without the limit that the load had unless it is said. */
  async resume(...flags: string[]): Promise<FslProcess> {
    const rate = flags.includes("--eager-rate") ? [] : ["--eager-rate", "0"];
    return this.command("resume", "--pid", String(await this.qemuPid()), ...rate, ...flags);
  }

  /** What `fsl status` says of this run's QEMU; null when it does not know it. */
  async status(): Promise<FoundLoad | null> {
    const { code, stdout, stderr } = await this.command("status", "--json").end();
    if (code !== 0) throw new Error(`fsl status ended with ${code}: ${stderr}`);
    const pid = await this.qemuPid();
    return (JSON.parse(stdout) as FoundLoad[]).find((load) => load.pid === pid) ?? null;
  }

  /** Waits until the load has come so far: PHASE_*. */
  async reached(phase: number): Promise<void> {
    const pid = await this.qemuPid();
    const state = await until(() => openLoadState(pid), 20_000, "a load state");
    await until(() => (state.phase >= phase ? true : null), 20_000, `phase ${phase}`);
    state.unmap();
  }

  report(): LoadReport {
    return JSON.parse(readFileSync(join(this.directory, "report.json"), "utf8")) as LoadReport;
  }

  /**
   * What the run has left: processes, files in its runtime directory and TMPDIR. Call it after the
   * end.
   */
  async leftovers(): Promise<string[]> {
    // A process that was just killed needs a moment until it is gone.
    await until(() => (marked(this.#mark).length === 0 ? true : null), 3000, "no process").catch(
      () => {},
    );
    const processes = marked(this.#mark).map(
      (pid) => `process ${pid} (${linkOf(`/proc/${pid}/exe`)})`,
    );
    const files = ["run", "tmp"].flatMap((name) =>
      readdirSync(join(this.directory, name)).map((file) => `${name}/${file}`),
    );
    return [...processes, ...files];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // fsl may have a signal to pass on or a child to reap: QEMU first.
    for (const pid of marked(this.#mark)) killQuietly(pid);
    await until(() => (marked(this.#mark).length === 0 ? true : null), 5000, "the end of the run");
    living.delete(this.#mark);
    this.serial.close();
    this.qmp.close();
    rmSync(this.directory, { recursive: true, force: true });
  }
}

/**
 * The load state among a process's descriptors; null when it has none. Those that fsl's Workers
 * rehearse with are nobody's.
 */
export function openLoadState(pid: number): LoadState | null {
  for (const [number, link] of descriptors(pid)) {
    if (link !== "/memfd:fsl-state (deleted)") continue;
    const state = adopt(`/proc/${pid}/fd/${number}`);
    if ((state?.metadata.target.pid ?? 0) > 0) return state;
    state?.unmap();
  }
  return null;
}

/** Null when it is not written yet, or was closed meanwhile. */
function adopt(path: string): LoadState | null {
  try {
    const fd = openSync(path, "r+");
    try {
      return LoadState.adopt(fd, fstatSync(fd).size, false);
    } finally {
      closeSync(fd);
    }
  } catch {
    return null;
  }
}

/** The guest's RAM, where there are small blocks beside it. */
export function biggestOf(blocks: readonly BlockState[]): BlockState {
  const biggest = blocks.toSorted((a, b) => b.pageCount - a.pageCount)[0];
  if (biggest === undefined) throw new Error("no block is lazy");
  return biggest;
}

/** The pages of a block that are in a QEMU's memory at this moment. */
export class PresentPages implements Disposable {
  readonly #fd: number;
  readonly #block: BlockState["block"];
  readonly #bytes: Uint8Array;

  constructor(pid: number, { block }: BlockState) {
    this.#fd = openSync(`/proc/${pid}/mem`, "r");
    this.#block = block;
    this.#bytes = new Uint8Array(block.pageSize);
  }

  /** Hash of a page's bytes, as the oracle has it; null while it is missing. */
  hash(page: number): bigint | null {
    const { hostAddr, pageSize } = this.#block;
    try {
      const length = readSync(this.#fd, this.#bytes, 0, pageSize, hostAddr + page * pageSize);
      if (length !== pageSize) throw new Error(`page ${page}: ${length} bytes`);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "EIO") return null;
      throw error;
    }
    return Bun.hash.wyhash(this.#bytes);
  }

  [Symbol.dispose](): void {
    closeSync(this.#fd);
  }
}

/** Number and link of every descriptor of a process; none when it has ended. */
export function descriptors(pid: number): [string, string][] {
  try {
    return readdirSync(`/proc/${pid}/fd`).map((fd) => [fd, linkOf(`/proc/${pid}/fd/${fd}`)]);
  } catch {
    return [];
  }
}

/** Threads of a process that wait for a page of a userfaultfd at this moment. */
export function waitingThreads(pid: number): number {
  return readdirSync(`/proc/${pid}/task`).filter((thread) => threadWaits(pid, thread)).length;
}

/** QEMU's main loop does: no monitor answers. */
export function mainThreadWaits(pid: number): boolean {
  return threadWaits(pid, String(pid));
}

function threadWaits(pid: number, thread: string): boolean {
  try {
    const where = readFileSync(`/proc/${pid}/task/${thread}/wchan`, "latin1");
    return where.includes("handle_userfault");
  } catch {
    return false; // It has ended meanwhile.
  }
}

/** Returns when some thread of a process waits for a page. */
export async function someoneWaits(pid: number, ms = 20_000): Promise<void> {
  await until(
    () => (waitingThreads(pid) > 0 ? true : null),
    ms,
    `a thread of ${pid} that waits for a page`,
  );
}

/** Processes whose environment has the mark of a run. */
function marked(mark: string): number[] {
  return readdirSync("/proc")
    .map(Number)
    .filter((pid) => Number.isInteger(pid) && pid !== process.pid && isRunning(pid))
    .filter((pid) => {
      try {
        return readFileSync(`/proc/${pid}/environ`, "latin1")
          .split("\0")
          .includes(`${MARK}=${mark}`);
      } catch {
        return false; // It has ended meanwhile, or it is somebody else's.
      }
    });
}

function killQuietly(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch {
    // It has ended meanwhile.
  }
}

function linkOf(path: string): string {
  try {
    return readlinkSync(path);
  } catch {
    return "";
  }
}

/** Appends what a stream says until it ends. */
export async function collect(stream: ReadableStream<Uint8Array>, into: Watched): Promise<void> {
  const decoder = new TextDecoder();
  try {
    for await (const chunk of stream) into.append(decoder.decode(chunk, { stream: true }));
  } finally {
    into.end();
  }
}

/** Set by tests/soak/faults.test.ts. */
export const MANY = "FSL_FAULT_MANY";

/** How often a random test is repeated: a few times in the tier, many times in the long run. */
export function repetitions(few: number, many: number): number {
  return process.env[MANY] === "1" ? many : few;
}

/**
 * A generator of numbers in [0, 1) from a seed: a failing run can be repeated (FSL_SEED).
 * mulberry32.
 */
export function randomNumbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let value = Math.imul(state ^ (state >>> 15), state | 1);
    value ^= value + Math.imul(value ^ (value >>> 7), value | 61);
    return ((value ^ (value >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Seed of this process's random tests. */
export const SEED = Number(process.env["FSL_SEED"] ?? Date.now() % 1_000_000);
