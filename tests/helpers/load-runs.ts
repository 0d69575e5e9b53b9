/**
 * Runs of the compiled executable `fsl load`, seen from the test: starts it with a serial line and
 * a QMP of the test's own in the user's QEMU arguments, collects what it prints, and ends it and
 * its QEMU whatever happens. Every run has a private runtime directory and a private TMPDIR, so
 * that what it leaves behind shows.
 */
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { LoadReport } from "../../src/index.ts";
import { type GuestSnapshot, QmpClient, SerialConsole } from "./guests.ts";

const ROOT = join(import.meta.dir, "../..");
/** The executable under test; `npm run build` makes it. */
export const FSL = join(ROOT, "dist/fsl");

/** Why the executable cannot be run, or null when it can. */
export function whyNoExecutable(): string | null {
  return existsSync(FSL) ? null : "dist/fsl is not built; run: npm run build";
}

/** Resolves with what `question` finds, asked whenever `changed` has called; rejects after `ms`. */
export class Watched {
  #text = "";
  readonly #waiting = new Set<() => void>();
  #ended = false;

  get text(): string {
    return this.#text;
  }

  append(text: string): void {
    this.#text += text;
    for (const look of Array.from(this.#waiting)) look();
  }

  end(): void {
    this.#ended = true;
    for (const look of Array.from(this.#waiting)) look();
  }

  /** The first match in all that has come and will come. */
  waitFor(pattern: RegExp, ms = 30_000): Promise<RegExpExecArray> {
    return new Promise((resolve, reject) => {
      const finish = (act: () => void): void => {
        this.#waiting.delete(look);
        clearTimeout(timer);
        act();
      };
      const look = (): void => {
        const match = pattern.exec(this.#text);
        if (match !== null) finish(() => resolve(match));
        else if (this.#ended)
          finish(() => reject(new Error(`${pattern} never came: ${this.#text}`)));
      };
      const late = (): void =>
        reject(new Error(`${pattern}: nothing within ${ms} ms: ${this.#text}`));
      const timer = setTimeout(() => finish(late), ms);
      this.#waiting.add(look);
      look();
    });
  }
}

/** A deadline of its own for a wait that has none. */
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
 * Asks again until the answer is not null: for what tells nobody when it changes (/proc, files).
 */
export async function until<T>(question: () => T | null, ms: number, what: string): Promise<T> {
  const endMs = performance.now() + ms;
  for (;;) {
    const answer = question();
    if (answer !== null) return answer;
    if (performance.now() > endMs) throw new Error(`${what}: not within ${ms} ms`);
    await Bun.sleep(2);
  }
}

/** The environment of a child: without what the test runner itself is told by. */
export function plainEnvironment(
  extra: Readonly<Record<string, string>> = {},
): Record<string, string> {
  const own = Object.entries(process.env).filter(
    (entry): entry is [string, string] =>
      entry[1] !== undefined && !/^(NODE_ENV|TEST|CI|FORCE_COLOR|NO_COLOR)$/.test(entry[0]),
  );
  return { ...Object.fromEntries(own), ...extra };
}

export interface FslOptions {
  /** Arguments of `fsl load` after the snapshot's path. */
  readonly flags?: readonly string[];
  /** Another path than the snapshot's own. */
  readonly path?: string;
  /** Another QEMU command line than the snapshot's own. */
  readonly argv?: readonly string[];
  /** More QEMU arguments. */
  readonly qemuArgs?: readonly string[];
  /** Without the test's own QMP and serial line. */
  readonly bare?: boolean;
  readonly env?: Readonly<Record<string, string>>;
  readonly cwd?: string;
  /** Another program than the compiled executable, e.g. `bun script.ts`. */
  readonly program?: readonly string[];
}

const living = new Set<FslRun>();
process.on("exit", () => {
  for (const run of living) run.killNow();
});

export class FslRun implements AsyncDisposable {
  readonly directory: string;
  readonly reportPath: string;
  readonly stderr = new Watched();
  readonly stdout = new Watched();
  readonly serial: SerialConsole;
  readonly qmp: QmpClient;
  /** Exit code, 128 + signal when it died by one. */
  readonly exited: Promise<number>;
  readonly #child: Bun.Subprocess<"ignore", "pipe", "pipe">;
  readonly #qemuPids = new Set<number>();

  private constructor(
    directory: string,
    serial: SerialConsole,
    qmp: QmpClient,
    argv: readonly string[],
    options: FslOptions,
  ) {
    this.directory = directory;
    this.reportPath = join(directory, "report.json");
    this.serial = serial;
    this.qmp = qmp;
    // The kernel kills fsl when the test dies; setpriv executes it in its own place.
    this.#child = Bun.spawn(["setpriv", "--pdeathsig", "KILL", ...argv], {
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
      cwd: options.cwd ?? directory,
      env: plainEnvironment({
        XDG_RUNTIME_DIR: join(directory, "run"),
        TMPDIR: join(directory, "tmp"),
        ...options.env,
      }),
    });
    living.add(this);
    const reading = Promise.all([
      collect(this.#child.stdout, this.stdout),
      collect(this.#child.stderr, this.stderr),
    ]);
    this.exited = this.#child.exited.then(async (code) => {
      // A QEMU that was left behind keeps the pipes open: its output is not waited for.
      await Promise.race([reading, Bun.sleep(2000)]);
      const reason = new Error(
        `fsl ended with ${code}: ${this.stderr.text.trim() || "no message"}`,
      );
      serial.fail(reason);
      qmp.fail(reason);
      return code;
    });
  }

  /** Starts `fsl load SNAP FLAGS --report … -- QEMU …`. */
  static async start(
    snapshot: Pick<GuestSnapshot, "path" | "argv">,
    options: FslOptions = {},
  ): Promise<FslRun> {
    const directory = mkdtempSync(join(tmpdir(), "fsl-load-test-"));
    mkdirSync(join(directory, "run"), { mode: 0o700 });
    mkdirSync(join(directory, "tmp"));
    const serial = await SerialConsole.listen(join(directory, "serial"));
    const qmp = await QmpClient.listen(join(directory, "qmp"));
    const program = options.program ?? [FSL, "load"];
    const own = options.bare === true ? [] : [...serial.args, ...qmp.args];
    const flags = options.flags ?? [];
    // A file beside the snapshot would make the next load another one.
    const workingSet = flags.includes("--working-set") ? [] : ["--working-set", "none"];
    const argv = [
      ...program,
      options.path ?? snapshot.path,
      "--report",
      join(directory, "report.json"),
      ...workingSet,
      ...flags,
      "--",
      ...(options.argv ?? snapshot.argv),
      ...(options.qemuArgs ?? []),
      ...own,
    ];
    return new FslRun(directory, serial, qmp, argv, options);
  }

  get pid(): number {
    return this.#child.pid;
  }

  /** QEMU's pid: fsl's child, but for the helper tasks, which QEMU makes fsl's children. */
  async qemuPid(): Promise<number> {
    const isQemu = (pid: number): boolean =>
      isRunning(pid) && !nameOf(pid).startsWith("fsl-helper");
    return until(
      () =>
        this.#childPids()
          .filter(isQemu)
          .toSorted((a, b) => a - b)[0] ?? null,
      10_000,
      "QEMU",
    );
  }

  /**
   * Waits until QEMU has its state: it runs, or is stopped. Asked for, because events that came
   * before the test's own QMP was ready are lost.
   */
  async hasState(): Promise<void> {
    await this.qmp.ready;
    const endMs = performance.now() + 30_000;
    for (;;) {
      const { status } = await this.qmp.execute<{ status: string }>("query-status");
      if (status !== "inmigrate") return;
      if (performance.now() > endMs) throw new Error(`still in migration: ${this.stderr.text}`);
      await Bun.sleep(2);
    }
  }

  /** The summary line that fsl prints when its report is written. */
  async complete(ms = 60_000): Promise<LoadReport> {
    await this.stderr.waitFor(/all RAM in after|ended before all RAM/, ms);
    return this.report();
  }

  report(): LoadReport {
    return JSON.parse(readFileSync(this.reportPath, "utf8")) as LoadReport;
  }

  signal(signal: NodeJS.Signals): void {
    this.#child.kill(signal);
  }

  /** Waits for the end. */
  async end(ms = 30_000): Promise<number> {
    return within(this.exited, ms, `the end of fsl (${this.stderr.text})`);
  }

  /**
   * What the run has left: living processes, files in its runtime directory and TMPDIR. Call it
   * after the end.
   */
  leftovers(): string[] {
    const processes = [...this.#qemuPids].filter(isRunning).map((pid) => `process ${pid} is alive`);
    const files = ["run", "tmp"].flatMap((name) =>
      readdirSync(join(this.directory, name)).map((file) => `${name}/${file}`),
    );
    return [...processes, ...files];
  }

  #childPids(): number[] {
    const { pid } = this.#child;
    for (const child of childrenOf(pid)) this.#qemuPids.add(child);
    return [...this.#qemuPids];
  }

  killNow(): void {
    for (const pid of this.#childPids()) killQuietly(pid);
    this.#child.kill("SIGKILL");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const pid of this.#childPids()) killQuietly(pid);
    await Promise.race([this.exited, Bun.sleep(3000)]);
    this.killNow();
    await this.exited;
    living.delete(this);
    this.serial.close();
    this.qmp.close();
    rmSync(this.directory, { recursive: true, force: true });
  }
}

async function collect(stream: ReadableStream<Uint8Array>, into: Watched): Promise<void> {
  const decoder = new TextDecoder();
  try {
    for await (const chunk of stream) into.append(decoder.decode(chunk, { stream: true }));
  } finally {
    into.end();
  }
}

/** Children of a process, by whichever of its threads they were started. */
export function childrenOf(pid: number): number[] {
  try {
    return readdirSync(`/proc/${pid}/task`).flatMap((thread) =>
      readFileSync(`/proc/${pid}/task/${thread}/children`, "latin1")
        .split(" ")
        .filter(Boolean)
        .map(Number),
    );
  } catch {
    return []; // It has ended.
  }
}

/** Empty when it has ended and was waited for. */
export function nameOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/comm`, "latin1").trim();
  } catch {
    return "";
  }
}

/**
 * False for a zombie too; but not while other threads of it are still ending: what they have open,
 * locks among it, is not given back before.
 */
export function isRunning(pid: number): boolean {
  try {
    const status = readFileSync(`/proc/${pid}/status`, "latin1");
    if (!/^State:\s+[ZX]/m.test(status)) return true;
    return Number(/^Threads:\s+(\d+)/m.exec(status)?.[1] ?? 0) > 1;
  } catch {
    return false;
  }
}

function killQuietly(pid: number): void {
  try {
    if (isRunning(pid)) process.kill(pid, "SIGKILL");
  } catch {
    // It has ended meanwhile.
  }
}

/** What a process's descriptors are: link texts of /proc/PID/fd. */
export function openFiles(pid: number): string[] {
  return readdirSync(`/proc/${pid}/fd`).flatMap((fd) => {
    try {
      return [readlinkSync(`/proc/${pid}/fd/${fd}`)];
    } catch {
      return []; // Closed meanwhile.
    }
  });
}
