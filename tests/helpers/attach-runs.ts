/**
 * A QEMU that the test starts as somebody else would, with `-incoming defer` and a QMP socket of its
 * own for fsl; the test keeps a second monitor and the serial line. Everything that belongs to it, an
 * fsl in the background too, carries a mark in its environment, by which it is found and ended.
 */
import {
  chownSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";
import type { FoundLoad } from "../../src/index.ts";
import { type Ended, FslProcess } from "./fault-runs.ts";
import { type GuestSnapshot, QmpClient, SerialConsole } from "./guests.ts";
import {
  childrenOf,
  FSL,
  isRunning,
  nameOf,
  openFiles,
  plainEnvironment,
  until,
} from "./load-runs.ts";
import { byUser, type Published } from "./published.ts";

const MARK = "FSL_ATTACH_RUN";
let counter = 0;

export interface AttachRunOptions {
  readonly argv?: readonly string[];
  /** What executes QEMU, e.g. `["unshare", "--mount"]`. */
  readonly prefix?: readonly string[];
  readonly qemuArgs?: readonly string[];
  /** Default: `-incoming defer`. */
  readonly incoming?: readonly string[];
  /** QEMU runs by this user and group. */
  readonly uid?: number;
}

/** What a QEMU has that fsl could leave different. */
export interface QemuTraits {
  readonly capabilities: readonly string[];
  readonly fdsets: unknown;
  /** userfaultfds and memfds of fsl's. */
  readonly descriptors: readonly string[];
  /** Names of its children. */
  readonly children: readonly string[];
  /** Memory areas of the process that are as big as the guest's RAM in all, or parts of it. */
  readonly areas: number;
}

/** Only fsl processes, with a directory of their own: for loads that start QEMU themselves. */
export class MarkedRun implements AsyncDisposable {
  readonly directory: string;
  readonly env: Record<string, string>;
  readonly #mark: string;

  constructor() {
    this.directory = mkdtempSync(join(tmpdir(), "fsl-attach-test-"));
    mkdirSync(join(this.directory, "run"), { mode: 0o700 });
    mkdirSync(join(this.directory, "tmp"));
    counter += 1;
    this.#mark = `${process.pid}-${counter}`;
    this.env = plainEnvironment({
      [MARK]: this.#mark,
      XDG_RUNTIME_DIR: join(this.directory, "run"),
      TMPDIR: join(this.directory, "tmp"),
    });
  }

  /** The compiled executable with these arguments. */
  fsl(...args: readonly string[]): FslProcess {
    return new FslProcess([FSL, ...args], this.env, this.directory);
  }

  async run(...args: readonly string[]): Promise<Ended> {
    return this.fsl(...args).end();
  }

  /** `fsl resume` to its end, without the limit that the load had. */
  async resume(pid: number, ...flags: readonly string[]): Promise<Ended> {
    return this.run("resume", "--pid", String(pid), "--eager-rate", "0", ...flags);
  }

  /** What `fsl status` says of a QEMU; null when it does not know it. */
  async status(pid: number): Promise<FoundLoad | null> {
    const { code, stdout, stderr } = await this.run("status", "--json");
    if (code !== 0) throw new Error(`fsl status ended with ${code}: ${stderr}`);
    return (JSON.parse(stdout) as FoundLoad[]).find((load) => load.pid === pid) ?? null;
  }

  /** Waits until `fsl status` says that a load has come so far. */
  async reachedBy(pid: number, phase: FoundLoad["phase"]): Promise<void> {
    const endMs = performance.now() + 20_000;
    while ((await this.status(pid))?.phase !== phase) {
      if (performance.now() > endMs) throw new Error(`QEMU ${pid} never was ${phase}`);
      await Bun.sleep(20);
    }
  }

  /** Living processes of this run whose program begins with `name`. */
  processes(name: string): number[] {
    return marked(this.#mark).filter((pid) => programOf(pid).startsWith(name));
  }

  /** The only such process. */
  process(name: string): Promise<number> {
    return until(() => this.processes(name)[0] ?? null, 10_000, `a process ${name}`);
  }

  /** Files in its runtime directory and TMPDIR. */
  files(): string[] {
    return ["run", "tmp"].flatMap((name) => readdirSync(join(this.directory, name)));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const isEmpty = (): true | null => {
      const left = marked(this.#mark);
      for (const pid of left) killQuietly(pid);
      return left.length === 0 ? true : null;
    };
    await until(isEmpty, 5000, "the end of the run");
    rmSync(this.directory, { recursive: true, force: true });
  }
}

export class AttachRun extends MarkedRun {
  readonly qmpPath: string;
  readonly serial: SerialConsole;
  readonly qmp: QmpClient;
  #pid = 0;

  private constructor(serial: SerialConsole, qmp: QmpClient, qmpPath: string) {
    super();
    this.serial = serial;
    this.qmp = qmp;
    this.qmpPath = qmpPath;
  }

  /** @returns when its monitors answer */
  static async start(
    snapshot: Pick<GuestSnapshot, "argv">,
    options: AttachRunOptions = {},
  ): Promise<AttachRun> {
    const sockets = mkdtempSync(join(tmpdir(), "fsl-attach-qemu-"));
    const serial = await SerialConsole.listen(join(sockets, "serial"));
    const qmp = await QmpClient.listen(join(sockets, "monitor"));
    const run = new AttachRun(serial, qmp, join(sockets, "qmp"));
    const { uid } = options;
    if (uid !== undefined) {
      for (const name of [".", "serial", "monitor"]) chownSync(join(sockets, name), uid, uid);
      run.#giveTo(uid);
    }
    const child = Bun.spawn(
      [
        ...(options.prefix ?? []),
        ...(uid === undefined ? [] : byUser(uid)),
        ...(options.argv ?? snapshot.argv),
        ...(options.qemuArgs ?? []),
        ...serial.args,
        ...qmp.args,
        "-qmp",
        `unix:${run.qmpPath},server=on,wait=off`,
        ...(options.incoming ?? ["-incoming", "defer"]),
      ],
      { stdio: ["ignore", "ignore", "ignore"], env: run.env, cwd: run.directory },
    );
    child.unref();
    await qmp.ready;
    return run;
  }

  get pid(): number {
    const [found = this.#pid] = this.processes("qemu-system");
    this.#pid = found;
    return found;
  }

  reached(phase: FoundLoad["phase"]): Promise<void> {
    return this.reachedBy(this.pid, phase);
  }

  /** `fsl load SNAP --qmp PATH …`. */
  attach(snapshot: { readonly path: string }, ...flags: readonly string[]): FslProcess {
    return this.fsl("load", ...this.#arguments(snapshot.path, flags));
  }

  /** The same, executed by something else. */
  attachBy(
    prefix: readonly string[],
    snapshot: { readonly path: string },
    ...flags: readonly string[]
  ): FslProcess {
    const argv = [...prefix, FSL, "load", ...this.#arguments(snapshot.path, flags)];
    return new FslProcess(argv, this.env, this.directory);
  }

  /** The same as another user, to whom the QMP socket is open. */
  attachAs(uid: number, { fsl, snapshot }: Published, prefix: readonly string[] = []): FslProcess {
    this.#giveTo(uid);
    for (const path of [dirname(this.qmpPath), this.qmpPath]) chownSync(path, uid, uid);
    const argv = [
      ...prefix,
      ...byUser(uid),
      fsl,
      "load",
      ...this.#arguments(snapshot, ["--paused"]),
    ];
    return new FslProcess(argv, this.env, this.directory);
  }

  #arguments(path: string, flags: readonly string[]): string[] {
    return [path, "--qmp", this.qmpPath, "--working-set", "none", ...flags];
  }

  /** Whose fsl may use the run's own directory. */
  #giveTo(uid: number): void {
    for (const name of [".", "run", "tmp"]) chownSync(join(this.directory, name), uid, uid);
  }

  /** Descriptors that QEMU has open. */
  openCount(): number {
    return openFiles(this.pid).length;
  }

  async traits(): Promise<QemuTraits> {
    const list = await this.qmp.execute<{ capability: string; state: boolean }[]>(
      "query-migrate-capabilities",
    );
    const isOfFsl = (link: string): boolean => /userfaultfd|fsl-/.test(link);
    return {
      capabilities: list.filter(({ state }) => state).map(({ capability }) => capability),
      fdsets: await this.qmp.execute("query-fdsets"),
      descriptors: openFiles(this.pid).filter(isOfFsl),
      children: childrenOf(this.pid).map(nameOf),
      areas: await this.#ramAreas(),
    };
  }

  /** Memory areas that the guest's biggest block consists of. */
  async #ramAreas(): Promise<number> {
    const table = await this.qmp.hmp("info ramblock");
    const row = /^\s*(?:pc\.ram|microvm\.ram|ram0)\s.*?0x\S+\s+(0x\S+)\s+0x\S+\s+(0x\S+)/m;
    const [, used = "0", start = "0"] = row.exec(table) ?? [];
    const end = Number(start) + Number(used);
    const lines = readFileSync(`/proc/${this.pid}/maps`, "latin1").split("\n");
    return lines.filter((line) => {
      const [from = "", to = ""] = (line.split(" ", 1)[0] ?? "").split("-");
      return Number(`0x${from}`) < end && Number(`0x${to}`) > Number(start);
    }).length;
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    await super[Symbol.asyncDispose]();
    this.serial.close();
    this.qmp.close();
    rmSync(join(this.qmpPath, ".."), { recursive: true, force: true });
  }
}

/** Processes whose environment has the mark of a run. */
function marked(mark: string): number[] {
  return readdirSync("/proc")
    .map(Number)
    .filter((pid) => Number.isInteger(pid) && pid !== process.pid && isRunning(pid))
    .filter((pid) => {
      try {
        const environment = readFileSync(`/proc/${pid}/environ`, "latin1").split("\0");
        return environment.includes(`${MARK}=${mark}`);
      } catch {
        return false; // It has ended meanwhile, or it is somebody else's.
      }
    });
}

function programOf(pid: number): string {
  try {
    const [program = ""] = readFileSync(`/proc/${pid}/cmdline`, "latin1").split("\0", 1);
    return basename(program);
  } catch {
    return "";
  }
}

function killQuietly(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch {
    // It has ended meanwhile.
  }
}

export function socketExists(path: string): boolean {
  return existsSync(path);
}
