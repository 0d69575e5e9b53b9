/** strace: another process that traces, and system calls that fail. */
import { collect } from "./fault-runs.ts";
import { Watched } from "./load-runs.ts";

export function whyNoStrace(): string | null {
  return Bun.which("strace") === null ? "strace is not installed" : null;
}

/** Somebody who traces all threads of a process, until `detach` or the end of the scope. */
export class Tracer implements AsyncDisposable {
  readonly #child: Bun.Subprocess<"ignore", "ignore", "pipe">;
  readonly #errors = new Watched();
  readonly #reading: Promise<void>;

  private constructor(pid: number) {
    const argv = ["strace", "-f", "-o", "/dev/null", "-p", String(pid)];
    this.#child = Bun.spawn(["setpriv", "--pdeathsig", "KILL", ...argv], {
      stdio: ["ignore", "ignore", "pipe"],
    });
    this.#reading = collect(this.#child.stderr, this.#errors);
  }

  static async attach(pid: number): Promise<Tracer> {
    const tracer = new Tracer(pid);
    await tracer.#errors.waitFor(/attached/);
    return tracer;
  }

  get pid(): number {
    return this.#child.pid;
  }

  /** @returns what strace said */
  async detach(): Promise<string> {
    this.#child.kill("SIGINT");
    await this.#child.exited;
    await this.#reading;
    return this.#errors.text;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.detach();
  }
}

/**
 * What executes a program whose calls fail: `calls` as strace's `inject=` has it, e.g.
 * `ptrace:error=EPERM`; only those on `path`, if one is named. The program is the process itself, and not
 * a child of strace (-D): its exit code does not depend on how strace fares.
 */
export function failing(calls: string, path?: string): string[] {
  const only = path === undefined ? [] : ["-P", path];
  return ["strace", "-D", "-f", "-qqq", "-o", "/dev/null", "-e", `inject=${calls}`, ...only];
}
