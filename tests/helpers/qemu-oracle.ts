/**
 * A real QEMU that writes snapshots and answers questions about itself: the independent side of the parser's tests. Its
 * own small QMP client over a unix socket in a private directory; nothing of src/ is used.
 */
import { spawn, type ChildProcess } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { createConnection, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** The QEMU that tests use; FSL_QEMU names another one. */
export const QEMU_BINARY = process.env["FSL_QEMU"] ?? "qemu-system-x86_64";

/** A QEMU that does not answer within this time is broken. */
const ANSWER_TIMEOUT_MS = 30_000;
/** QEMU makes its socket 50 to 150 ms after its start. */
const CONNECT_TIMEOUT_MS = 20_000;

/** One line of `info ramblock`. */
export interface OracleBlock {
  readonly idstr: string;
  readonly usedLength: number;
  readonly maxLength: number;
}

export interface SaveOptions {
  /** Beside mapped-ram. */
  readonly capabilities?: readonly string[];
  readonly parameters?: Readonly<Record<string, unknown>>;
  /** Keeps the guest running while it is saved. */
  readonly live?: boolean;
  /** `file:PATH,offset=N` */
  readonly offset?: number;
  /** Runs while a live save is under way; the save goes on meanwhile. */
  readonly during?: () => Promise<void>;
}

type Reply = Readonly<Record<string, unknown>>;

export class QemuOracle {
  /** Private directory; gone after `close`. */
  readonly directory: string;
  readonly #child: ChildProcess;
  readonly #exited: Promise<void>;
  #socket: Socket | null = null;
  #buffered = "";
  #replies: Reply[] = [];
  #wake: () => void = () => {};
  #errors = "";

  private constructor(args: readonly string[], inherited: readonly number[]) {
    this.directory = mkdtempSync(join(tmpdir(), "fsl-oracle-"));
    const monitor = `unix:${join(this.directory, "qmp")},server=on,wait=off`;
    const qemu = [QEMU_BINARY, "-nodefaults", "-display", "none", "-qmp", monitor, ...args];
    // util-linux's setpriv lets QEMU die with this process, whatever ends it.
    const wrapper = Bun.which("setpriv") === null ? [] : ["setpriv", "--pdeathsig", "KILL"];
    const [binary = "", ...rest] = [...wrapper, ...qemu];
    this.#child = spawn(binary, rest, { stdio: ["ignore", "ignore", "pipe", ...inherited] });
    this.#exited = new Promise((resolve) => {
      this.#child.once("close", () => resolve());
      this.#child.once("error", (error) => {
        this.#errors += String(error);
        resolve();
      });
    });
    this.#child.stderr?.on("data", (text: Buffer) => (this.#errors += text.toString()));
    void this.#exited.then(() => this.#wake());
  }

  /**
   * Starts QEMU with these arguments (machine, memory, devices) and connects to it.
   * @param inherited descriptors that QEMU gets as 3, 4, ...
   */
  static async start(
    args: readonly string[],
    inherited: readonly number[] = [],
  ): Promise<QemuOracle> {
    const qemu = new QemuOracle(args, inherited);
    try {
      await qemu.#connect();
      await qemu.command("qmp_capabilities");
      return qemu;
    } catch (error) {
      await qemu.close();
      throw error;
    }
  }

  /** Runs a QMP command. @returns its `return` value */
  async command(execute: string, args: object = {}): Promise<unknown> {
    this.#replies = [];
    this.#socket?.write(`${JSON.stringify({ execute, arguments: args })}\n`);
    const deadlineMs = performance.now() + ANSWER_TIMEOUT_MS;
    for (;;) {
      const reply = this.#replies.find((each) => "return" in each || "error" in each);
      if (reply !== undefined && "error" in reply) {
        throw new Error(`${execute}: ${JSON.stringify(reply["error"])}`);
      }
      if (reply !== undefined) return reply["return"];
      await this.#arrival(execute, deadlineMs);
    }
  }

  /** Runs a human monitor command. @returns its text */
  async humanCommand(line: string): Promise<string> {
    const text = await this.command("human-monitor-command", { "command-line": line });
    return String(text);
  }

  /** QEMU's own list of RAM blocks. */
  async blocks(): Promise<OracleBlock[]> {
    const text = await this.humanCommand("info ramblock");
    const pattern = /^\s*(\S.*?)\s+\d+ [KMG]iB\s+0x\w+\s+(0x\w+)\s+(0x\w+)/gm;
    return [...text.matchAll(pattern)].map(([, idstr = "", used = "", max = ""]) => ({
      idstr,
      usedLength: Number(used),
      maxLength: Number(max),
    }));
  }

  /** Versioned machine type as QEMU has it, e.g. `pc-q35-10.0`. */
  async machineType(): Promise<string> {
    const type = await this.command("qom-get", { path: "/machine", property: "type" });
    return String(type).replace(/-machine$/, "");
  }

  /** The guest's physical memory, as QEMU reads it. @param length bytes, at most a few MiB */
  async physicalMemory(address: number, length: number): Promise<Uint8Array> {
    const path = join(this.directory, "memory");
    await this.command("pmemsave", { val: address, size: length, filename: path });
    return new Uint8Array(await Bun.file(path).arrayBuffer());
  }

  /** Saves to `path` and waits until it is done. The guest is stopped first unless `live`. */
  async save(path: string, options: SaveOptions = {}): Promise<void> {
    const capabilities = ["mapped-ram", ...(options.capabilities ?? [])];
    await this.command("migrate-set-capabilities", {
      capabilities: capabilities.map((capability) => ({ capability, state: true })),
    });
    const parameters = { "max-bandwidth": 0, ...options.parameters };
    await this.command("migrate-set-parameters", parameters);
    if (options.live !== true) await this.command("stop");
    const suffix = options.offset === undefined ? "" : `,offset=${options.offset}`;
    await this.command("migrate", { uri: `file:${path}${suffix}` });
    await options.during?.();
    await this.migrated();
  }

  /** Loads `path` into a QEMU that was started with `-incoming defer`, and waits until it is done. */
  async load(path: string): Promise<void> {
    await this.command("migrate-set-capabilities", {
      capabilities: [{ capability: "mapped-ram", state: true }],
    });
    await this.command("migrate-incoming", { uri: `file:${path}`, "exit-on-error": false });
    await this.migrated();
  }

  /** Waits until a migration is over. */
  async migrated(): Promise<void> {
    for (;;) {
      const answer = (await this.command("query-migrate")) as Reply;
      if (answer["status"] === "completed") return;
      if (answer["status"] === "failed")
        throw new Error(`migrate: ${String(answer["error-desc"])}`);
      await Bun.sleep(20);
    }
  }

  /** Kills QEMU and removes its directory. */
  async close(): Promise<void> {
    this.#socket?.destroy();
    this.#child.kill("SIGKILL");
    await this.#exited;
    rmSync(this.directory, { recursive: true, force: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async #connect(): Promise<void> {
    const deadlineMs = performance.now() + CONNECT_TIMEOUT_MS;
    for (;;) {
      const socket = await tryConnect(join(this.directory, "qmp"));
      if (socket !== null) {
        this.#socket = socket;
        socket.on("data", (data: Buffer) => this.#take(data.toString()));
        return;
      }
      const isOver = this.#child.exitCode !== null || this.#child.signalCode !== null;
      if (isOver || this.#errors.startsWith("Error") || performance.now() > deadlineMs) {
        throw new Error(`${QEMU_BINARY} has no monitor: ${this.#errors}`);
      }
      await Bun.sleep(10);
    }
  }

  #take(text: string): void {
    const lines = (this.#buffered + text).split("\n");
    this.#buffered = lines.pop() ?? "";
    for (const line of lines) {
      if (line.trim() !== "") this.#replies.push(JSON.parse(line) as Reply);
    }
    this.#wake();
  }

  async #arrival(what: string, deadlineMs: number): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) {
      throw new Error(`${what}: QEMU has ended: ${this.#errors}`);
    }
    const waitMs = deadlineMs - performance.now();
    if (waitMs <= 0) throw new Error(`${what}: no answer from QEMU: ${this.#errors}`);
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, waitMs);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

/**
 * A guest of 512 bytes for a floppy disk. It fills 0x10000-0x8ffff with 0x5a and sets the byte at 0x7000 to 1; at the
 * first key it fills the same range with zeros and sets the byte to 2. All the while it writes to 0x90000-0x97fff, so
 * that a live save has more than one pass.
 */
export function bootSector(): Uint8Array {
  const code = [
    [0xfa], //                          cli
    [0x31, 0xc0], //                    xor ax, ax
    [0x8e, 0xd8], //                    mov ds, ax
    [0x8e, 0xd0], //                    mov ss, ax
    [0xbc, 0x00, 0x7c], //              mov sp, 0x7c00
    [0xb8, 0x5a, 0x5a], //              mov ax, 0x5a5a
    [0xe8, 0x30, 0x00], //              call fill
    [0xc6, 0x06, 0x00, 0x70, 0x01], //       mov byte [0x7000], 1
    [0xe8, 0x17, 0x00], //        wait: call dirty
    [0xe4, 0x64], //                    in al, 0x64
    [0xa8, 0x01], //                    test al, 1
    [0x74, 0xf7], //                    jz wait
    [0xe4, 0x60], //                    in al, 0x60
    [0x31, 0xc0], //                    xor ax, ax
    [0xe8, 0x1b, 0x00], //              call fill
    [0xc6, 0x06, 0x00, 0x70, 0x02], //       mov byte [0x7000], 2
    [0xe8, 0x02, 0x00], //        spin: call dirty
    [0xeb, 0xfb], //                    jmp spin
    [0xb8, 0x00, 0x90], //       dirty: mov ax, 0x9000
    [0x8e, 0xc0], //                    mov es, ax
    [0x43], //                          inc bx
    [0x89, 0xd8], //                    mov ax, bx
    [0x31, 0xff], //                    xor di, di
    [0xb9, 0x00, 0x40], //              mov cx, 0x4000
    [0xfc], //                          cld
    [0xf3, 0xab], //                    rep stosw
    [0xc3], //                          ret
    [0xba, 0x00, 0x10], //        fill: mov dx, 0x1000
    [0x8e, 0xc2], //              next: mov es, dx
    [0x31, 0xff], //                    xor di, di
    [0xb9, 0x00, 0x80], //              mov cx, 0x8000
    [0xfc], //                          cld
    [0xf3, 0xab], //                    rep stosw
    [0x80, 0xc6, 0x10], //              add dh, 0x10
    [0x80, 0xfe, 0x90], //              cmp dh, 0x90
    [0x72, 0xee], //                    jb next
    [0xc3], //                          ret
  ].flat();
  const sector = new Uint8Array(512);
  sector.set(code);
  sector.set([0x55, 0xaa], 510);
  return sector;
}

/**
 * Saves a live guest of `bootSector` so that pages are written as data first and are zero in the end: their bytes stay
 * in the file, their bits are clear.
 */
export async function saveWithStalePages(qemu: QemuOracle, path: string): Promise<void> {
  await waitForByte(qemu, 1);
  await qemu.save(path, {
    live: true,
    // Slow enough that the key comes in the middle of the first pass over the memory.
    parameters: { "max-bandwidth": 512 * 1024 },
    during: async () => {
      await waitForPages(qemu, 60);
      await qemu.humanCommand("sendkey a");
      await waitForByte(qemu, 2);
      await qemu.command("migrate-set-parameters", { "max-bandwidth": 0 });
    },
  });
}

/** Waits until the guest has set its byte at 0x7000. */
async function waitForByte(qemu: QemuOracle, value: number): Promise<void> {
  for (let attempt = 0; attempt < 1000; attempt++) {
    const [byte] = await qemu.physicalMemory(0x7000, 1);
    if (byte === value) return;
    await Bun.sleep(20);
  }
  throw new Error(`the guest did not get to ${value}`);
}

/** Waits until a live save has written so many pages, in ascending order of address. */
async function waitForPages(qemu: QemuOracle, pages: number): Promise<void> {
  for (let attempt = 0; attempt < 1000; attempt++) {
    const answer = (await qemu.command("query-migrate")) as { ram?: Record<string, number> };
    if ((answer.ram?.["normal"] ?? 0) >= pages) return;
    await Bun.sleep(10);
  }
  throw new Error(`the save did not get to ${pages} pages`);
}

function tryConnect(path: string): Promise<Socket | null> {
  return new Promise((resolve) => {
    const socket = createConnection(path);
    socket.once("connect", () => resolve(socket));
    socket.once("error", () => resolve(null));
  });
}

/** The first line of `--version`; null when there is no QEMU. */
export function qemuVersion(): string | null {
  const binary = Bun.which(QEMU_BINARY);
  if (binary === null) return null;
  const { stdout } = Bun.spawnSync([binary, "--version"]);
  return stdout.toString().split("\n")[0] ?? null;
}
