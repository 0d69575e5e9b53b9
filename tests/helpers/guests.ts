/**
 * Real guests for tests and benchmarks: boots one with a stock QEMU, makes a mapped-ram snapshot of
 * it by plain QMP, loads one QEMU's own way (the oracle), and reads all guest memory back out of a
 * QEMU. It shares no code with src/, so that both cannot be wrong together. Snapshots are made once
 * and kept in .cache/snapshots.
 *
 * QEMU's serial line and its QMP connect to sockets that listen here before QEMU starts: no output
 * is ever lost and nothing is polled. Every QEMU dies with this process, whatever ends it.
 */
import { createHash } from "node:crypto";
import {
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

const ROOT = join(import.meta.dir, "../..");
const GUEST_DIR = join(ROOT, ".cache/guest");
const SNAPSHOT_DIR = join(ROOT, ".cache/snapshots");
/** A part of every snapshot's key: raise it when what is made here changes. */
const RECIPE = 1;
const MIB = 1024 * 1024;

/** The QEMU that tests use; FSL_QEMU names another one. */
export const QEMU = process.env.FSL_QEMU ?? "qemu-system-x86_64";

// -- waiting --------------------------------------------------------------------------------------

/** Things that arrive, and those who wait for one of them. */
class Arrivals<T> {
  readonly all: T[] = [];
  #waiting = new Set<() => void>();
  #failure: Error | null = null;

  add(item: T): void {
    this.all.push(item);
    for (const look of this.#waiting) look();
  }

  /** Nothing will arrive any more: everybody who waits, now or later, gets the error. */
  fail(error: Error): void {
    this.#failure ??= error;
    for (const look of this.#waiting) look();
  }

  /**
   * The first item with index >= `from` that matches. Rejects after `timeoutMs`, or when nothing
   * can come any more.
   */
  waitFor(matches: (item: T) => boolean, what: string, timeoutMs: number, from = 0): Promise<T> {
    let next = from;
    return new Promise((resolve, reject) => {
      const finish = (act: () => void): void => {
        this.#waiting.delete(look);
        clearTimeout(timer);
        act();
      };
      const look = (): void => {
        for (; next < this.all.length; next++) {
          const item = this.all[next] as T;
          if (matches(item)) return finish(() => resolve(item));
        }
        const failure = this.#failure;
        if (failure !== null)
          finish(() => reject(new Error(`waiting for ${what}: ${failure.message}`)));
      };
      const timer = setTimeout(
        () => finish(() => reject(new Error(`waiting for ${what}: nothing after ${timeoutMs} ms`))),
        timeoutMs,
      );
      this.#waiting.add(look);
      look();
    });
  }
}

/** Listens on a unix socket and calls back with the one connection that comes. */
function listenOnce(path: string, connected: (socket: Socket) => void): Promise<Server> {
  return new Promise((resolve, reject) => {
    const server = createServer((socket) => {
      server.close();
      connected(socket);
    });
    server.once("error", reject);
    server.listen(path, () => resolve(server));
  });
}

/** Calls `take` with each complete line, without its line end. */
function splitLines(socket: Socket, take: (line: string) => void): void {
  let rest = "";
  socket.setEncoding("latin1");
  socket.on("data", (chunk: string) => {
    const lines = (rest + chunk).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) take(line.replace(/\r$/, ""));
  });
}

// -- serial console -------------------------------------------------------------------------------

export interface SerialLine {
  readonly text: string;
  /** When it arrived, on the clock of `performance.now()`, ms. */
  readonly at: number;
}

/** The guest's first serial port. Pass `args` to QEMU. */
export class SerialConsole {
  readonly args: readonly string[];
  readonly #lines = new Arrivals<SerialLine>();
  #socket: Socket | null = null;
  #server: Server | null = null;
  #unsent = "";

  private constructor(path: string) {
    this.args = [
      "-chardev",
      `socket,id=fsl-test-serial,path=${path}`,
      "-serial",
      "chardev:fsl-test-serial",
    ];
  }

  static async listen(path: string): Promise<SerialConsole> {
    const serial = new SerialConsole(path);
    serial.#server = await listenOnce(path, (socket) => serial.#connected(socket));
    return serial;
  }

  #connected(socket: Socket): void {
    this.#socket = socket;
    splitLines(socket, (text) => this.#lines.add({ text, at: performance.now() }));
    socket.on("error", () => {});
    socket.on("close", () => this.fail(new Error("the serial line was closed")));
    if (this.#unsent !== "") socket.write(this.#unsent);
    this.#unsent = "";
  }

  /** All lines so far. */
  get lines(): readonly SerialLine[] {
    return this.#lines.all;
  }

  /**
   * The first line that matches, among those with index >= `from` (default: all, those that came
   * before too).
   */
  waitFor(pattern: RegExp, timeoutMs = 60_000, from = 0): Promise<SerialLine> {
    return this.#lines.waitFor(
      (line) => pattern.test(line.text),
      `${pattern} on the serial line`,
      timeoutMs,
      from,
    );
  }

  /** The first line that matches and comes after this call. */
  waitForNext(pattern: RegExp, timeoutMs = 60_000): Promise<SerialLine> {
    return this.waitFor(pattern, timeoutMs, this.#lines.all.length);
  }

  send(text: string): void {
    if (this.#socket === null) this.#unsent += text;
    else this.#socket.write(text);
  }

  /**
   * Sends a command of the Linux guest (see scripts/guest/linux-guest.c) and returns the fields of
   * its answer.
   */
  async command(line: string, timeoutMs = 120_000): Promise<string[]> {
    const word = (line.split(" ")[0] ?? "").toUpperCase();
    const answer = this.waitForNext(new RegExp(`^${word} `), timeoutMs);
    this.send(`${line}\n`);
    return (await answer).text.split(" ").slice(1);
  }

  fail(error: Error): void {
    this.#lines.fail(error);
  }

  close(): void {
    this.#server?.close();
    this.#socket?.destroy();
  }
}

// -- QMP ------------------------------------------------------------------------------------------

export interface QmpEvent {
  readonly event: string;
  readonly data: Record<string, unknown>;
  /** On the clock of `performance.now()`, ms. */
  readonly at: number;
}

interface QmpMessage {
  readonly QMP?: unknown;
  readonly event?: string;
  readonly data?: Record<string, unknown>;
  readonly id?: number;
  readonly return?: unknown;
  readonly error?: { readonly class: string; readonly desc: string };
}

/** A small QMP client. Pass `args` to QEMU; `ready` resolves when commands can be sent. */
export class QmpClient {
  readonly args: readonly string[];
  readonly ready: Promise<void>;
  readonly #events = new Arrivals<QmpEvent>();
  readonly #pending = new Map<
    number,
    { resolve: (value: unknown) => void; reject: (error: Error) => void; what: string }
  >();
  #socket: Socket | null = null;
  #server: Server | null = null;
  #nextId = 1;
  #failure: Error | null = null;
  #isReady: () => void = () => {};
  #isNotReady: (error: Error) => void = () => {};

  private constructor(path: string) {
    this.args = ["-chardev", `socket,id=fsl-test-qmp,path=${path}`, "-qmp", "chardev:fsl-test-qmp"];
    this.ready = new Promise((resolve, reject) => {
      this.#isReady = resolve;
      this.#isNotReady = reject;
    });
    this.ready.catch(() => {});
  }

  static async listen(path: string): Promise<QmpClient> {
    const qmp = new QmpClient(path);
    qmp.#server = await listenOnce(path, (socket) => qmp.#connected(socket));
    return qmp;
  }

  #connected(socket: Socket): void {
    this.#socket = socket;
    splitLines(socket, (line) => this.#take(JSON.parse(line) as QmpMessage));
    socket.on("error", () => {});
    socket.on("close", () => this.fail(new Error("the QMP connection was closed")));
  }

  #take(message: QmpMessage): void {
    if (message.QMP !== undefined) {
      this.#send("qmp_capabilities").then(this.#isReady, this.#isNotReady);
    } else if (message.event !== undefined) {
      this.#events.add({ event: message.event, data: message.data ?? {}, at: performance.now() });
    } else if (message.id !== undefined) {
      const call = this.#pending.get(message.id);
      this.#pending.delete(message.id);
      if (message.error !== undefined)
        call?.reject(new Error(`QMP ${call.what}: ${message.error.desc}`));
      else call?.resolve(message.return);
    }
  }

  /** Waits for QEMU's greeting, should it not have come yet. */
  async execute<T = unknown>(command: string, args: Record<string, unknown> = {}): Promise<T> {
    await this.ready;
    return this.#send<T>(command, args);
  }

  #send<T = unknown>(command: string, args: Record<string, unknown> = {}): Promise<T> {
    return new Promise((resolve, reject) => {
      if (this.#failure !== null || this.#socket === null) {
        return reject(new Error(`QMP ${command}: ${this.#failure?.message ?? "not connected"}`));
      }
      const id = this.#nextId++;
      this.#pending.set(id, {
        resolve: resolve as (value: unknown) => void,
        reject,
        what: command,
      });
      this.#socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`);
    });
  }

  /** A command of the human monitor, and what it prints. */
  hmp(line: string): Promise<string> {
    return this.execute<string>("human-monitor-command", { "command-line": line });
  }

  get events(): readonly QmpEvent[] {
    return this.#events.all;
  }

  waitEvent(
    event: string,
    matches: (data: Record<string, unknown>) => boolean = () => true,
    timeoutMs = 60_000,
    from = 0,
  ): Promise<QmpEvent> {
    return this.#events.waitFor(
      (e) => e.event === event && matches(e.data),
      `the QMP event ${event}`,
      timeoutMs,
      from,
    );
  }

  /** Waits until a migration has completed; rejects with QEMU's words when it failed. */
  async waitMigrated(from: number, timeoutMs = 300_000): Promise<QmpEvent> {
    const isFinal = (data: Record<string, unknown>): boolean =>
      data.status === "completed" || data.status === "failed";
    const end = await this.waitEvent("MIGRATION", isFinal, timeoutMs, from);
    if (end.data.status === "completed") return end;
    const state = await this.execute<Record<string, unknown>>("query-migrate");
    throw new Error(`the migration failed: ${String(state["error-desc"] ?? "no reason given")}`);
  }

  /** Sets migration capabilities; `events` always comes along, `waitMigrated` needs it. */
  async setCapabilities(names: readonly string[]): Promise<void> {
    const capabilities = ["events", ...names].map((capability) => ({ capability, state: true }));
    await this.execute("migrate-set-capabilities", { capabilities });
  }

  fail(error: Error): void {
    this.#failure ??= error;
    this.#events.fail(error);
    this.#isNotReady(error);
    for (const call of this.#pending.values())
      call.reject(new Error(`QMP ${call.what}: ${error.message}`));
    this.#pending.clear();
  }

  close(): void {
    this.#server?.close();
    this.#socket?.destroy();
  }
}

// -- QEMU -----------------------------------------------------------------------------------------

/** A QEMU of ours. `await qemu[Symbol.asyncDispose]()`, or `await using`, ends it. */
export interface Qemu extends AsyncDisposable {
  readonly pid: number;
  readonly serial: SerialConsole;
  readonly qmp: QmpClient;
  /** When the process was started, ms on the clock of `performance.now()`. */
  readonly startedAt: number;
  /** Exit code, or 128 + signal. */
  readonly exited: Promise<number>;
  /** What it has written to stderr so far. */
  stderr(): string;
  kill(): Promise<void>;
}

const living = new Map<number, () => void>();
process.on("exit", () => {
  for (const kill of living.values()) kill();
});

/** Ends every QEMU that this process has started. */
export function killAllQemus(): void {
  for (const kill of living.values()) kill();
}

/**
 * Starts a QEMU with a serial console and a QMP connection, and waits until QMP answers.
 * @param argv program and arguments, without any for serial port and QMP
 */
export async function startQemu(argv: readonly string[]): Promise<Qemu> {
  const directory = mkdtempSync(join(tmpdir(), "fsl-test-"));
  const serial = await SerialConsole.listen(join(directory, "serial"));
  const qmp = await QmpClient.listen(join(directory, "qmp"));
  const startedAt = performance.now();
  // The kernel kills QEMU when we die, even by SIGKILL; setpriv executes QEMU in its own place, so
  // the pid is QEMU's.
  const child = Bun.spawn(
    ["setpriv", "--pdeathsig", "KILL", ...argv, ...serial.args, ...qmp.args],
    {
      stdin: "ignore",
      stdout: "ignore",
      stderr: "pipe",
    },
  );
  living.set(child.pid, () => child.kill("SIGKILL"));
  let errors = "";
  const reading = (async () => {
    const decoder = new TextDecoder();
    for await (const chunk of child.stderr) errors += decoder.decode(chunk, { stream: true });
  })();
  const exited = child.exited.then(async (code) => {
    living.delete(child.pid);
    await reading.catch(() => {});
    const reason = new Error(
      `QEMU ended with ${child.signalCode ?? `code ${code}`}: ${errors.trim() || "no message"}`,
    );
    serial.fail(reason);
    qmp.fail(reason);
    serial.close();
    qmp.close();
    rmSync(directory, { recursive: true, force: true });
    return code;
  });
  const kill = async (): Promise<void> => {
    child.kill("SIGKILL");
    await exited;
  };
  try {
    await qmp.ready;
  } catch (error) {
    await kill();
    throw error;
  }
  const { pid } = child;
  return {
    pid,
    serial,
    qmp,
    startedAt,
    exited,
    stderr: () => errors,
    kill,
    [Symbol.asyncDispose]: kill,
  };
}

let versionCache: Promise<string> | undefined;

/** Version of the QEMU that tests use, e.g. `10.0.2`. */
export function qemuVersion(): Promise<string> {
  versionCache ??= (async () => {
    const child = Bun.spawn([QEMU, "--version"], { stdout: "pipe", stderr: "ignore" });
    const version = /version (\d+\.\d+\.\d+)/.exec(await new Response(child.stdout).text())?.[1];
    if (version === undefined) throw new Error(`${QEMU} --version says no version`);
    return version;
  })();
  return versionCache;
}

// -- what can run here ----------------------------------------------------------------------------

/** Why guests cannot be run here, or null when they can. */
export function whyNoGuests(): string | null {
  if (Bun.which(QEMU) === null) return `${QEMU} is not installed; run: npm run setup`;
  if (!existsSync(join(GUEST_DIR, "guest.json")))
    return "the test guests are not built; run: npm run setup";
  return null;
}

/** Why KVM cannot be used here, or null when it can. */
export function whyNoKvm(): string | null {
  try {
    closeSync(openSync("/dev/kvm", "r+"));
    return null;
  } catch (error) {
    return `/dev/kvm cannot be opened (${(error as NodeJS.ErrnoException).code})`;
  }
}

/** Whether FSL_REQUIRE has this word: what cannot run here fails then, and is not skipped. */
export function isRequired(word: string): boolean {
  return (process.env["FSL_REQUIRE"] ?? "").split(",").includes(word);
}

/** Path of a file of the guests: `bzImage`, `initrd.cpio`, `bare.elf`, `guest.json`. */
export function guestFile(name: string): string {
  const reason = whyNoGuests();
  if (reason !== null) throw new Error(reason);
  return join(GUEST_DIR, name);
}

// -- guests ---------------------------------------------------------------------------------------

export interface GuestSpec {
  /**
   * Default linux. The bare guest runs under every KVM, the Linux guest where KVM runs 64-bit
   * kernels.
   */
  readonly guest?: "linux" | "bare";
  /** Default q35. */
  readonly machine?: "pc" | "q35" | "microvm";
  /**
   * More machine properties, e.g. `hpet=off`. Default for microvm: `acpi=off`. With ACPI there a
   * stock kernel under TCG waits for ever for its first timer tick in every other boot.
   */
  readonly machineOptions?: string;
  /** Default tcg. */
  readonly accel?: "tcg" | "kvm";
  /** Default: qemu64 for Linux on TCG, qemu32 for bare, host for Linux on KVM. */
  readonly cpu?: string;
  /** Guest RAM. Default 256 for linux, 64 for bare on TCG, 34 for bare on KVM. */
  readonly memoryMiB?: number;
  /**
   * Linux: how much of it is filled with data, default 64. Bare: end of the tested memory, default
   * all.
   */
  readonly dataMiB?: number;
  /** vCPUs, default 1. */
  readonly smp?: number;
  /**
   * RAM from a backend object, without id and size, e.g. `memory-backend-memfd,share=on`. Its block
   * is named `ram0`.
   */
  readonly memoryBackend?: string;
  /** QEMU arguments for source and destination, e.g. devices. */
  readonly extraArgs?: readonly string[];
  /**
   * Added to the guest's own options: kernel command line (`fsl.tick=10 fsl.huge=1`) or those in
   * bare.c.
   */
  readonly guestOptions?: string;
}

interface FullSpec extends GuestSpec {
  readonly guest: "linux" | "bare";
  readonly machine: "pc" | "q35" | "microvm";
  readonly accel: "tcg" | "kvm";
  readonly memoryMiB: number;
  readonly machineOptions: string;
}

function fullSpec(spec: GuestSpec): FullSpec {
  const { guest = "linux", machine = "q35", accel = "tcg" } = spec;
  const memoryMiB = spec.memoryMiB ?? (guest === "linux" ? 256 : accel === "tcg" ? 64 : 34);
  const machineOptions = spec.machineOptions ?? (machine === "microvm" ? "acpi=off" : "");
  return { ...spec, guest, machine, accel, memoryMiB, machineOptions };
}

function linuxArgs(spec: FullSpec): string[] {
  const options = [
    "console=ttyS0 quiet loglevel=1 nokaslr mitigations=off panic=-1 tsc=reliable",
    "init_on_alloc=0 memhp_default_state=online reboot=t",
    `fsl.data=${spec.dataMiB ?? 64}`,
    spec.guestOptions ?? "",
  ];
  const files = ["-kernel", guestFile("bzImage"), "-initrd", guestFile("initrd.cpio")];
  return [...files, "-append", options.join(" ").trim()];
}

function bareArgs(spec: FullSpec): string[] {
  // Where KVM emulates 32-bit code, a page with all its words takes 6 ms to fill.
  const words = spec.accel === "kvm" ? "words=4 beat=1024" : "";
  const size = spec.dataMiB === undefined ? "" : `size=${spec.dataMiB}`;
  const options = [words, size, spec.guestOptions ?? ""]
    .filter((option) => option !== "")
    .join(" ");
  return ["-kernel", guestFile("bare.elf"), "-append", options];
}

/**
 * The command line of a guest: program and arguments, without any for serial port, QMP and
 * `-incoming`.
 */
export function guestArgv(guestSpec: GuestSpec): string[] {
  const spec = fullSpec(guestSpec);
  const cpu =
    spec.cpu ?? (spec.guest === "bare" ? "qemu32,-pni" : spec.accel === "tcg" ? "qemu64" : "host");
  const backend =
    spec.memoryBackend === undefined
      ? []
      : ["-object", `${spec.memoryBackend},id=ram0,size=${spec.memoryMiB}M`];
  const machine = [
    spec.machine,
    spec.machineOptions,
    backend.length > 0 ? "memory-backend=ram0" : "",
  ];
  return [
    QEMU,
    ..."-nodefaults -no-user-config -no-reboot -display none -machine".split(" "),
    machine.filter((part) => part !== "").join(","),
    ...`-accel ${spec.accel} -cpu ${cpu} -m ${spec.memoryMiB} -smp ${spec.smp ?? 1}`.split(" "),
    ...backend,
    ...(spec.guest === "linux" ? linuxArgs(spec) : bareArgs(spec)),
    ...(spec.extraArgs ?? []),
  ];
}

/** A guest that has said READY and is running. */
export interface BootedGuest {
  readonly qemu: Qemu;
  /** The line `READY …`. */
  readonly ready: string;
  readonly bootMs: number;
}

/** Boots a guest and waits for READY. */
export async function bootGuest(spec: GuestSpec): Promise<BootedGuest> {
  const { dataMiB = 64 } = spec;
  const qemu = await startQemu(guestArgv(spec));
  try {
    // It takes 4-8 s and 7 ms per MiB here; a busy machine may need several times that.
    const ready = await qemu.serial.waitFor(/^READY |^FAILED /, 120_000 + 50 * dataMiB);
    if (ready.text.startsWith("FAILED")) throw new Error(`the guest says: ${ready.text}`);
    return { qemu, ready: ready.text, bootMs: ready.at - qemu.startedAt };
  } catch (error) {
    await qemu.kill();
    throw error;
  }
}

// -- snapshots ------------------------------------------------------------------------------------

export interface SaveOptions {
  /**
   * Save while the guest runs; such a snapshot starts by itself when it is loaded. Default: stop
   * first.
   */
  readonly live?: boolean;
  /** With `live`: MiB per second, so that the guest changes pages meanwhile. Default: no limit. */
  readonly bandwidthMiB?: number;
  /** Number of multifd channels; default: no multifd. */
  readonly multifd?: number;
}

/**
 * However fast the host lets a guest change its memory, a live save comes to an end; at 20 MiB per
 * second when 30 MiB are left.
 */
const LIVE_DOWNTIME_MS = 1_500;

/** Saves a mapped-ram snapshot of a running QEMU; QEMU is in the state `postmigrate` afterwards. */
export async function saveSnapshot(
  qemu: Qemu,
  path: string,
  options: SaveOptions = {},
): Promise<void> {
  const { qmp } = qemu;
  await qmp.setCapabilities(
    options.multifd === undefined ? ["mapped-ram"] : ["mapped-ram", "multifd"],
  );
  const channels = options.multifd === undefined ? {} : { "multifd-channels": options.multifd };
  await qmp.execute("migrate-set-parameters", {
    "max-bandwidth": (options.bandwidthMiB ?? 0) * MIB,
    "downtime-limit": LIVE_DOWNTIME_MS,
    ...channels,
  });
  if (options.live !== true) await qmp.execute("stop");
  const from = qmp.events.length;
  await qmp.execute("migrate", { uri: `file:${path}` });
  await qmp.waitMigrated(from);
}

export interface SnapshotSpec extends GuestSpec, SaveOptions {
  /** Commands for the Linux guest before it is saved, e.g. `["tick 10", "fill 32"]`. */
  readonly commands?: readonly string[];
}

export interface GuestSnapshot {
  readonly path: string;
  /** Command line of a destination, without serial port, QMP and `-incoming`. */
  readonly argv: readonly string[];
  readonly spec: SnapshotSpec;
  readonly qemuVersion: string;
  readonly machineType: string;
  /**
   * Linux guest: checksum of its data, 16 hex digits, as `sum` and `info` print it; bare guest:
   * empty.
   */
  readonly checksum: string;
  readonly memoryMiB: number;
  /** Linux guest: MiB of data. Bare guest: MiB of data pages, rounded. */
  readonly dataMiB: number;
  /** The last `tick` or `beat` line before the guest was stopped (empty when it was saved live). */
  readonly lastLine: string;
  /** Size and allocated bytes of the file when it was made. */
  readonly fileBytes: number;
  readonly diskBytes: number;
  /** How long boot until READY and saving took. */
  readonly bootMs: number;
  readonly saveMs: number;
}

/**
 * The snapshot of a guest that was READY and had printed at least two ticks; from the cache when it
 * was made before. Other processes may ask for the same one at the same time: one of them makes it.
 */
export async function snapshotOf(spec: SnapshotSpec): Promise<GuestSnapshot> {
  const version = await qemuVersion();
  const guest = (JSON.parse(readFileSync(guestFile("guest.json"), "utf8")) as { sha256: string })
    .sha256;
  // The argument list tells all about the guest, except what its files hold.
  const { live, bandwidthMiB, multifd, commands } = spec;
  const key = JSON.stringify([
    RECIPE,
    version,
    guest,
    guestArgv(spec),
    live,
    bandwidthMiB,
    multifd,
    commands,
  ]);
  const { guest: kind, machine, accel, memoryMiB } = fullSpec(spec);
  const hash = createHash("sha256").update(key).digest("hex").slice(0, 12);
  const base = join(SNAPSHOT_DIR, `${kind}-${machine}-${accel}-${memoryMiB}M-${hash}`);
  mkdirSync(SNAPSHOT_DIR, { recursive: true });
  return withLock(`${base}.lock`, async () => {
    if (existsSync(`${base}.json`) && existsSync(`${base}.snap`)) {
      return {
        ...(JSON.parse(readFileSync(`${base}.json`, "utf8")) as GuestSnapshot),
        path: `${base}.snap`,
        argv: guestArgv(spec),
        spec,
      };
    }
    removeStale(guest);
    const made = { ...(await makeSnapshot(spec, `${base}.snap`, version)), guest };
    writeFileSync(`${base}.json`, `${JSON.stringify(made, null, 2)}\n`);
    return made;
  });
}

/** Removes what was made of guests that are no more; not the newest, which somebody may be using. */
function removeStale(guest: string): void {
  const hourAgo = Date.now() - 3_600_000;
  for (const name of readdirSync(SNAPSHOT_DIR)) {
    const path = join(SNAPSHOT_DIR, name);
    if (!name.endsWith(".json") || statSync(path).mtimeMs > hourAgo) continue;
    const { guest: madeOf } = JSON.parse(readFileSync(path, "utf8")) as { guest?: string };
    if (madeOf === guest) continue;
    const base = path.replace(/json$/, "");
    for (const file of ["json", "snap", "snap.fslws"]) rmSync(`${base}${file}`, { force: true });
  }
}

async function makeSnapshot(
  spec: SnapshotSpec,
  path: string,
  version: string,
): Promise<GuestSnapshot> {
  const { guest, memoryMiB, dataMiB = 64 } = fullSpec(spec);
  const { qemu, ready, bootMs } = await bootGuest(spec);
  const unfinished = `${path}.${process.pid}`;
  try {
    const { serial, qmp } = qemu;
    for (const command of spec.commands ?? []) await serial.command(command);
    let checksum = "";
    if (guest === "linux") checksum = (await serial.command("info"))[1] ?? "";
    const isQuiet =
      spec.commands?.includes("tick 0") === true ||
      spec.guestOptions?.includes("fsl.tick=0") === true;
    if (!isQuiet) await serial.waitForNext(/^(tick|beat) /);
    const start = performance.now();
    await saveSnapshot(qemu, unfinished, spec);
    const saveMs = performance.now() - start;
    const machines = await qmp.execute<{ name: string; alias?: string }[]>("query-machines");
    const machine =
      machines.find(({ name, alias }) => [name, alias].includes(fullSpec(spec).machine))?.name ??
      "";
    const { size, blocks } = statSync(unfinished);
    renameSync(unfinished, path);
    const pages = Number(ready.split(" ")[2] ?? 0);
    return {
      path,
      argv: guestArgv(spec),
      spec,
      qemuVersion: version,
      machineType: machine,
      checksum,
      memoryMiB,
      dataMiB: guest === "linux" ? dataMiB : Math.round(pages / 256),
      lastLine:
        spec.live === true
          ? ""
          : (serial.lines.findLast(({ text }) => /^(tick|beat) /.test(text))?.text ?? ""),
      fileBytes: size,
      diskBytes: blocks * 512,
      bootMs: Math.round(bootMs),
      saveMs: Math.round(saveMs),
    };
  } finally {
    await qemu.kill();
    rmSync(unfinished, { force: true });
  }
}

/**
 * Runs `work` while no other process does so under the same lock file; a lock whose owner has died
 * is taken over.
 */
async function withLock<T>(path: string, work: () => Promise<T>): Promise<T> {
  const deadline = performance.now() + 600_000;
  for (;;) {
    try {
      writeFileSync(path, `${process.pid}\n`, { flag: "wx" });
      break;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
      if (performance.now() > deadline) throw new Error(`${path}: still locked after 10 minutes`);
      if (isAbandoned(path)) rmSync(path, { force: true });
      else await Bun.sleep(100); // Another process makes it; files tell nobody when they vanish.
    }
  }
  try {
    return await work();
  } finally {
    rmSync(path, { force: true });
  }
}

function isAbandoned(lock: string): boolean {
  try {
    const pid = Number(readFileSync(lock, "utf8"));
    if (!(pid > 0)) return false;
    return pid !== process.pid && !existsSync(`/proc/${pid}`);
  } catch {
    return false;
  }
}

// -- QEMU's own load, the oracle ------------------------------------------------------------------

export interface OrdinaryLoadOptions {
  /** Leave the guest stopped after its state is loaded (also one that was saved live). */
  readonly paused?: boolean;
  /** Number of multifd channels; default: no multifd. */
  readonly multifd?: number;
  /** More migration capabilities. */
  readonly capabilities?: readonly string[];
  /** Another command line than the snapshot's own. */
  readonly argv?: readonly string[];
}

export interface LoadedGuest {
  readonly qemu: Qemu;
  /** All in ms on the clock of `performance.now()`. */
  readonly times: {
    readonly startedAt: number;
    /** QMP answered: QEMU can take the state. */
    readonly readyAt: number;
    /** `migrate-incoming` was sent. */
    readonly incomingAt: number;
    /** The migration had completed: all RAM is in. */
    readonly loadedAt: number;
    /** The guest runs; NaN with `paused`. */
    readonly resumedAt: number;
  };
  /** The first line of output after the load. */
  firstOutput(timeoutMs?: number): Promise<SerialLine>;
}

/** Loads a snapshot as QEMU itself does it: all RAM first, then the guest runs. */
export async function ordinaryLoad(
  snapshot: Pick<GuestSnapshot, "path" | "argv">,
  options: OrdinaryLoadOptions = {},
): Promise<LoadedGuest> {
  const pausedArgs = options.paused === true ? ["-S"] : [];
  const qemu = await startQemu([
    ...(options.argv ?? snapshot.argv),
    ...pausedArgs,
    "-incoming",
    "defer",
  ]);
  try {
    const { qmp } = qemu;
    const readyAt = performance.now();
    const multifd = options.multifd === undefined ? [] : ["multifd"];
    await qmp.setCapabilities(["mapped-ram", ...multifd, ...(options.capabilities ?? [])]);
    if (options.multifd !== undefined) {
      await qmp.execute("migrate-set-parameters", { "multifd-channels": options.multifd });
    }
    const from = qmp.events.length;
    const incomingAt = performance.now();
    await qmp.execute("migrate-incoming", { uri: `file:${snapshot.path}`, "exit-on-error": false });
    const loadedAt = (await qmp.waitMigrated(from)).at;
    let resumedAt = Number.NaN;
    if (options.paused !== true) {
      const { status } = await qmp.execute<{ status: string }>("query-status");
      if (status !== "running") await qmp.execute("cont");
      resumedAt = (await qmp.waitEvent("RESUME", () => true, 60_000, from)).at;
    }
    return {
      qemu,
      times: { startedAt: qemu.startedAt, readyAt, incomingAt, loadedAt, resumedAt },
      firstOutput: (timeoutMs = 60_000) => qemu.serial.waitFor(/./, timeoutMs),
    };
  } catch (error) {
    await qemu.kill();
    throw error;
  }
}

// -- guest memory, from outside -------------------------------------------------------------------

export interface RamBlock {
  readonly name: string;
  /** Host page size in bytes. */
  readonly pageSize: number;
  /** Used and maximum length in bytes. */
  readonly used: number;
  readonly total: number;
  /** Address in QEMU's address space. */
  readonly address: number;
  readonly readOnly: boolean;
}

const UNIT: Readonly<Record<string, number>> = { KiB: 1024, MiB: 1024 ** 2, GiB: 1024 ** 3 };

/** All RAMBlocks of a QEMU, by its own account. */
export async function ramBlocks(qmp: QmpClient): Promise<RamBlock[]> {
  const row =
    /^\s*(\S.*?)\s+(\d+) ([KMG]iB)\s+0x[0-9a-f]+\s+(0x[0-9a-f]+)\s+(0x[0-9a-f]+)\s+(0x[0-9a-f]+)\s+(ro|rw)\s*$/;
  const blocks: RamBlock[] = [];
  for (const line of (await qmp.hmp("info ramblock")).split("\n")) {
    const [, name, size, unit, used, total, address, access] = row.exec(line) ?? [];
    if (name === undefined || unit === undefined) continue;
    blocks.push({
      name,
      pageSize: Number(size) * (UNIT[unit] ?? 1),
      used: Number(used),
      total: Number(total),
      address: Number(address),
      readOnly: access === "ro",
    });
  }
  if (blocks.length === 0) throw new Error("info ramblock lists no block");
  return blocks;
}

/** Every 4 KiB page of a block, as a 64-bit hash of its bytes. */
export interface BlockPages {
  readonly block: RamBlock;
  readonly hashes: BigUint64Array;
  readonly zeroPages: number;
}

const PAGE = 4096;
const CHUNK = 4 * MIB;
const ZERO_PAGE = new Uint8Array(PAGE);
const ZERO_HASH = Bun.hash.wyhash(ZERO_PAGE);

/**
 * Reads a RAMBlock out of a living QEMU, in pieces of 4 MiB. A page that a userfaultfd still waits
 * for cannot be read: that is an error (EIO), never a zero page.
 */
export function readBlock(pid: number, block: RamBlock): BlockPages {
  const hashes = new BigUint64Array(block.used / PAGE);
  const chunk = new Uint8Array(CHUNK);
  const memory = openSync(`/proc/${pid}/mem`, "r");
  let zeroPages = 0;
  try {
    for (let offset = 0; offset < block.used;) {
      const length = readSync(
        memory,
        chunk,
        0,
        Math.min(CHUNK, block.used - offset),
        block.address + offset,
      );
      const pages = Math.floor(length / PAGE);
      if (pages === 0)
        throw new Error(`${block.name}: cannot read at offset 0x${offset.toString(16)}`);
      for (let page = 0; page < pages; page++) {
        const hash = Bun.hash.wyhash(chunk.subarray(page * PAGE, (page + 1) * PAGE));
        hashes[offset / PAGE + page] = hash;
        if (hash === ZERO_HASH) zeroPages++;
      }
      offset += pages * PAGE;
    }
  } catch (error) {
    throw new Error(`reading ${block.name} of process ${pid}: ${(error as Error).message}`, {
      cause: error,
    });
  } finally {
    closeSync(memory);
  }
  return { block, hashes, zeroPages };
}

/** All of a QEMU's RAM, by block name. Stop the guest first. */
export async function dumpMemory(qemu: {
  readonly pid: number;
  readonly qmp: QmpClient;
}): Promise<Map<string, BlockPages>> {
  return dumpBlocks(qemu.pid, await ramBlocks(qemu.qmp));
}

/** The same for somebody who knows the blocks already (a QEMU whose QMP belongs to fsl). */
export function dumpBlocks(pid: number, blocks: readonly RamBlock[]): Map<string, BlockPages> {
  return new Map(blocks.map((block) => [block.name, readBlock(pid, block)]));
}

/**
 * What differs between two dumps, one line each, at most `limit` lines; empty = all memory is
 * equal.
 */
export function memoryDifferences(
  left: Map<string, BlockPages>,
  right: Map<string, BlockPages>,
  limit = 20,
): string[] {
  const differences: string[] = [];
  for (const name of new Set([...left.keys(), ...right.keys()])) {
    const a = left.get(name);
    const b = right.get(name);
    if (a === undefined || b === undefined || a.hashes.length !== b.hashes.length) {
      differences.push(
        `${name}: ${a?.hashes.length ?? "no"} pages against ${b?.hashes.length ?? "no"} pages`,
      );
      continue;
    }
    for (let page = 0; page < a.hashes.length; page++) {
      if (a.hashes[page] === b.hashes[page]) continue;
      const describe = (hash: bigint | undefined): string =>
        hash === ZERO_HASH ? "zero" : `${hash?.toString(16)}`;
      differences.push(
        `${name} page ${page}: ${describe(a.hashes[page])} against ${describe(b.hashes[page])}`,
      );
      if (differences.length >= limit) return differences;
    }
  }
  return differences;
}
