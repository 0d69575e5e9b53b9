/**
 * Starts a QEMU with the user's command line, a private QMP socket and, where it can be, the
 * preloaded library.
 *
 * The socket is bound and listening before QEMU exists, so fsl connects at once and nothing polls:
 * QEMU greets when it is ready. QEMU keeps the listening socket; a later fsl can connect again in
 * the private directory.
 */
import { openSync, readdirSync, statSync, writeSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { FslError } from "../errors.ts";
import { F_GETFD, FD_CLOEXEC, MFD_CLOEXEC, SOCK_STREAM } from "../sys/abi.ts";
import * as native from "../sys/native.ts";
import { checkDescriptorLimit, defaultWidth } from "../sys/limits.ts";
import { preloadBytes } from "../sys/preload.ts";
import { isGlibcInterpreter, readElfInterpreter } from "./elf.ts";
import { anyFdset, newSeedFile } from "./fdset.ts";
import { preloadEnvironment } from "./preload-protocol.ts";
import {
  checkQemuCommand,
  MONITOR_CONFIG,
  type QemuCommand,
  qemuCommandLine,
  readQemuCommand,
  startsStopped,
} from "./qemu-command.ts";
import { type GivenSeed, type QemuProcess, QemuTarget } from "./qemu.ts";
import { listenerOf } from "./control.ts";
import { QmpClient } from "./qmp.ts";
import {
  CONTROL_NAME,
  makeRuntimeDirectory,
  removeRuntimeDirectory,
  removeStaleDirectories,
} from "./runtime-directory.ts";
import type { ExitStatus } from "./target.ts";
import type { UserfaultfdWay } from "./userfaultfd.ts";

export interface SpawnOptions {
  /** The user's command line, the binary first. */
  readonly argv: readonly string[];
  /** QEMU's environment; this process's when left out. */
  readonly env?: Readonly<Record<string, string | undefined>>;
  /** What QEMU's stdin, stdout and stderr are; this process's when left out. */
  readonly stdio?: readonly [StandardStream, StandardStream, StandardStream];
  /** Forces one way to the userfaultfd; for tests. */
  readonly userfaultfdWay?: UserfaultfdWay;
  /**
   * Helper tasks to be made in QEMU, with the preloaded library only: one more than the eager load's
   * `workers` (`helperTasksFor`), at most 9; as many as a load has by default when left out.
   */
  readonly helperTasks?: number;
  /** How long QEMU may take to greet, milliseconds. */
  readonly greetingTimeoutMs?: number;
  /**
   * QEMU is to live on without fsl: a signal that is to end fsl is not passed on, and `close` after
   * the load removes fsl's socket.
   */
  readonly detached?: boolean;
}

/** A descriptor of this process, or one of the two words. */
export type StandardStream = "inherit" | "ignore" | number;

/**
 * Descriptors of the caller's that are handed on (`-netdev tap,fd=N`) have low numbers: shells give
 * one digit.
 */
const INHERITED_FD_MAX = 255;
const NO_FD = -1;
/** Chunks of 2 MiB that each helper can read ahead while QEMU starts: only what is read takes memory. */
const STAGING_SLOTS = 24;

/**
 * Starts QEMU. Returns at once; `connect` waits for it.
 * @throws FslError USAGE for a command line that is refused or a program that is not found,
 * HOST_UNSUPPORTED when no private directory can be made
 */
export function spawnQemu(options: SpawnOptions): QemuTarget {
  checkQemuCommand(options.argv);
  checkDescriptorLimit();
  const env = options.env ?? process.env;
  const program = findProgram(options.argv[0] ?? "", env);
  const directory = makeRuntimeDirectory();
  const forChild = new Handles();
  const forTarget = new Handles();
  let child: Bun.Subprocess | undefined;
  try {
    const socketPath = join(directory, CONTROL_NAME);
    const listener = checked(native.unixListen(socketPath, 1), `listen on ${socketPath}`);
    forChild.add(listener);
    const connection = checked(native.unixConnect(socketPath), `connect to ${socketPath}`);
    forTarget.add(connection);
    const way = options.userfaultfdWay ?? "preload";
    const preload = way === "preload" ? preparePreload(program, forChild, forTarget) : null;
    const seedFile = newSeedFile();
    forTarget.add(seedFile);
    const seed = { fd: openSync(`/proc/self/fd/${seedFile}`, "r"), set: anyFdset() };
    forChild.add(seed.fd);
    const config = textFile("fsl-config", MONITOR_CONFIG);
    forChild.add(config);
    const known = readQemuCommand(options.argv);
    child = startChild(options, program, env, { listener, config, seed, preload }, known);
    // The child cannot have been waited for yet: the event loop has not run since it was started.
    const pidfd = checked(native.pidfdOpen(child.pid, 0), "open a pidfd");
    forTarget.add(pidfd);
    const preloadSocket = preload?.ownSocket ?? NO_FD;
    const process = new SpawnedQemu({
      child,
      pidfd,
      program,
      directory,
      socketPath,
      preloadSocket,
      seed: { file: seedFile, set: seed.set },
      endsWithFsl: options.detached !== true,
      startsStopped: startsStopped(options.argv),
      ...known,
    });
    forTarget.release(connection);
    const qmp = QmpClient.open(connection, {
      peer: process.description,
      ...(options.greetingTimeoutMs === undefined
        ? {}
        : { greetingTimeoutMs: options.greetingTimeoutMs }),
    });
    process.exited.then(() => qmp.close());
    return new QemuTarget(process, qmp, options);
  } catch (error) {
    child?.kill("SIGKILL");
    forTarget.close();
    removeRuntimeDirectory(directory);
    throw error;
  } finally {
    forChild.close();
  }
}

/** What the child needs for the preloaded library. */
interface Preload {
  /** fsl's end of the socket pair; stays open. */
  readonly ownSocket: number;
  readonly childSocket: number;
  /** Holds the library. */
  readonly library: number;
}

interface SpawnedParts extends QemuCommand {
  readonly child: Bun.Subprocess;
  readonly pidfd: number;
  readonly program: string;
  readonly directory: string;
  readonly socketPath: string;
  /** fsl's end of the preloaded library's socket, or -1. */
  readonly preloadSocket: number;
  readonly seed: GivenSeed;
  readonly endsWithFsl: boolean;
  readonly startsStopped: boolean;
}

class SpawnedQemu implements QemuProcess {
  readonly exited: Promise<ExitStatus>;
  readonly preloadSocket: number;
  readonly seed: GivenSeed;
  readonly endsWithFsl: boolean;
  readonly startsStopped: boolean;
  readonly hasNoDiscards: boolean;
  readonly hasDefaultSettings: boolean;
  readonly hasPlainMemory: boolean;
  readonly vcpus: number | null;
  readonly isSpawned = true;
  readonly isControlOwn = true;
  #pid: number;
  #pidfd: number;
  readonly #program: string;
  readonly #socketPath: string;
  readonly #directory: string;
  #isClosed = false;
  #runsStartedProgram = false;

  constructor(parts: SpawnedParts) {
    const { child, pidfd, program, directory } = parts;
    this.#program = program;
    this.#directory = directory;
    this.#socketPath = parts.socketPath;
    this.preloadSocket = parts.preloadSocket;
    this.seed = parts.seed;
    this.endsWithFsl = parts.endsWithFsl;
    this.startsStopped = parts.startsStopped;
    this.hasNoDiscards = parts.hasNoDiscards;
    this.hasDefaultSettings = parts.hasDefaultSettings;
    this.hasPlainMemory = parts.hasPlainMemory;
    this.vcpus = parts.vcpus;
    this.#pid = child.pid;
    this.#pidfd = pidfd;
    this.exited = child.exited.then(() => {
      removeRuntimeDirectory(directory);
      removeStaleDirectories(dirname(directory));
      return exitStatusOf(child);
    });
  }

  get description(): string {
    return `${basename(this.#program)} (pid ${this.#pid})`;
  }

  get pid(): number {
    return this.#pid;
  }

  get controlPath(): string {
    return this.#socketPath;
  }

  get pidfd(): number {
    return this.#pidfd;
  }

  get runsStartedProgram(): boolean {
    return this.#runsStartedProgram;
  }

  /**
   * A wrapper script may have started QEMU as a child of its own. QEMU called listen(2) on the
   * inherited socket, and the kernel tells everybody who connects afterwards which process did
   * that. The connection is given up at once.
   */
  identify(): void {
    this.#runsStartedProgram = runsProgram(this.#pid, this.#program);
    if (this.#runsStartedProgram) return;
    const probe = native.unixConnect(this.#socketPath);
    if (probe < 0) return;
    try {
      const pid = listenerOf(probe);
      if (pid <= 0 || pid === this.#pid || pid === process.pid) return;
      const pidfd = native.pidfdOpen(pid, 0);
      if (pidfd < 0) return;
      native.close(this.#pidfd);
      this.#pidfd = pidfd;
      this.#pid = pid;
    } finally {
      native.close(probe);
    }
  }

  close(isOver: boolean): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    if (isOver) removeRuntimeDirectory(this.#directory);
    native.close(this.#pidfd);
    if (this.preloadSocket >= 0) native.close(this.preloadSocket);
  }
}

/** Descriptors with one fate. */
class Handles {
  readonly #fds: number[] = [];

  add(fd: number): void {
    this.#fds.push(fd);
  }

  /** Somebody else owns it from now on. */
  release(fd: number): void {
    this.#fds.splice(this.#fds.indexOf(fd), 1);
  }

  close(): void {
    for (const fd of this.#fds.splice(0)) native.close(fd);
  }
}

/** What the child is given of fsl's. */
interface ChildParts {
  /** Of the QMP monitor. */
  readonly listener: number;
  /** Says that there is one. */
  readonly config: number;
  /** The seed, open for reading, and its descriptor set. */
  readonly seed: { readonly fd: number; readonly set: number };
  readonly preload: Preload | null;
}

function startChild(
  options: SpawnOptions,
  program: string,
  env: Readonly<Record<string, string | undefined>>,
  { listener, config, seed, preload }: ChildParts,
  { hasPlainMemory, readsKernel }: QemuCommand,
): Bun.Subprocess {
  const own = [listener, config, seed.fd];
  if (preload !== null) own.push(preload.childSocket, preload.library);
  const layout = layOutDescriptors(inheritedDescriptors(), own);
  const [qmpFd = NO_FD, configFd = NO_FD, seedFd = NO_FD, ...ofPreload] = layout.ownNumbers;
  const [childSocket = NO_FD, library = NO_FD] = ofPreload;
  const inherited = { qmpFd, configFd, seedFd, seedSet: seed.set };
  const [, ...args] = qemuCommandLine(options.argv, inherited);
  const wishes = {
    helperTasks: options.helperTasks ?? defaultWidth() + 1,
    stagingSlots: hasPlainMemory ? STAGING_SLOTS : 1,
    hugeHeap: readsKernel,
  };
  const environment =
    preload === null ? { ...env } : preloadEnvironment(env, childSocket, library, wishes);
  try {
    return Bun.spawn([program, ...args], {
      argv0: options.argv[0] ?? program,
      env: environment,
      stdio: [...(options.stdio ?? ["inherit", "inherit", "inherit"]), ...layout.slots],
    } as Bun.SpawnOptions.OptionsObject<"inherit", "inherit", "inherit">);
  } catch (error) {
    const errno = (error as NodeJS.ErrnoException).code ?? String(error);
    const message = `QEMU command: ${JSON.stringify(program)} cannot be started (${errno})`;
    throw new FslError("USAGE", message, { program, errno }, error);
  }
}

/**
 * The library in a memfd, and a socket for it to answer on; null when the program would not load
 * it. Shortage of descriptors is no reason to fail here: ptrace is the fall-back.
 */
function preparePreload(program: string, forChild: Handles, forTarget: Handles): Preload | null {
  if (!isGlibcInterpreter(readElfInterpreter(program))) return null;
  const library = native.memfdCreate("fsl-preload", MFD_CLOEXEC);
  if (library < 0) return null;
  forChild.add(library);
  const bytes = preloadBytes();
  for (let written = 0; written < bytes.length;) written += writeSync(library, bytes, written);
  const pair = new Int32Array(2);
  if (native.socketpair(SOCK_STREAM, pair) < 0) return null;
  const [ownSocket = NO_FD, childSocket = NO_FD] = pair;
  forTarget.add(ownSocket);
  forChild.add(childSocket);
  return { ownSocket, childSocket, library };
}

/**
 * Bun gives a child only the descriptors it is told of, number by number from 3. The caller's keep
 * their numbers (that is how a shell hands `fd=N` to QEMU), fsl's own take the free ones.
 */
export function layOutDescriptors(
  inherited: readonly number[],
  own: readonly number[],
): { slots: (number | "ignore")[]; ownNumbers: number[] } {
  const slots: (number | "ignore")[] = [];
  for (const number of inherited) slots[number - 3] = number;
  const ownNumbers: number[] = [];
  let next = 0;
  for (const fd of own) {
    while (slots[next] !== undefined) next += 1;
    slots[next] = fd;
    ownNumbers.push(next + 3);
  }
  return { slots: Array.from(slots, (slot) => slot ?? "ignore"), ownNumbers };
}

/**
 * Descriptors from 3 on that this process was started with to hand on: everything of its own is
 * close-on-exec.
 */
export function inheritedDescriptors(): number[] {
  const numbers = readdirSync("/proc/self/fd").map(Number);
  return numbers.filter(
    (number) => number >= 3 && number <= INHERITED_FD_MAX && !isCloseOnExec(number),
  );
}

/** True also for a descriptor that is closed by now (the one that listed the directory). */
function isCloseOnExec(fd: number): boolean {
  const flags = native.fcntl(fd, F_GETFD, 0);
  return flags < 0 || (flags & FD_CLOEXEC) !== 0;
}

/** A descriptor that reads this text. */
function textFile(name: string, text: string): number {
  const fd = checked(native.memfdCreate(name, MFD_CLOEXEC), "make a memfd");
  writeSync(fd, text);
  return fd;
}

function findProgram(name: string, env: Readonly<Record<string, string | undefined>>): string {
  const path = Bun.which(name, { PATH: env["PATH"] ?? "" });
  if (path !== null) return path;
  const status = name.includes("/") ? statSync(name, { throwIfNoEntry: false }) : undefined;
  const where = name.includes("/") ? "does not exist" : "was not found in PATH";
  const what = status?.isDirectory() ? "is a directory" : "is not executable";
  throw new FslError(
    "USAGE",
    `QEMU command: program ${JSON.stringify(name)} ${status === undefined ? where : what}`,
    { name },
  );
}

function exitStatusOf(child: Bun.Subprocess): ExitStatus {
  const signal = child.signalCode;
  return signal === null
    ? { exitCode: child.exitCode, signal: null }
    : { exitCode: null, signal: String(signal) };
}

/** False also when it cannot be told. */
function runsProgram(pid: number, program: string): boolean {
  try {
    const running = statSync(`/proc/${pid}/exe`);
    const wanted = statSync(program);
    return running.ino === wanted.ino && running.dev === wanted.dev;
  } catch {
    return false;
  }
}

function checked(result: number, what: string): number {
  if (result >= 0) return result;
  throw new FslError(
    "HOST_UNSUPPORTED",
    `QMP socket: cannot ${what} (${native.errnoName(result)})`,
    {
      errno: native.errnoName(result),
    },
  );
}
