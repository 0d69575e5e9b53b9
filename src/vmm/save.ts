/**
 * Saves a running QEMU as a mapped-ram snapshot.
 *
 * The file is written beside its final place under an unpredictable name, checked, brought to the
 * disk and renamed: at its path there is the old file or the whole new one, never a part. QEMU gets
 * an open descriptor (so it may run as another user or see other mounts), and the path only if it
 * cannot. Whatever fails: the migration is cancelled, the file removed, QEMU's settings put back,
 * and a guest that ran before runs again. The error says how the guest is then.
 */
import {
  closeSync,
  constants,
  fchmodSync,
  fchownSync,
  fstatSync,
  fsync,
  fsyncSync,
  lstatSync,
  openSync,
  realpathSync,
  renameSync,
  rmSync,
  type Stats,
  statSync,
} from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { FslError, isFslError } from "../errors.ts";
import { freeFdset } from "./fdset.ts";
import {
  CAPABILITIES_IN_THE_WAY,
  type MigrationChanges,
  MigrationSettings,
  PARAMETERS_IN_THE_WAY,
} from "./migration-settings.ts";
import { randomHex } from "../sys/random.ts";
import * as native from "../sys/native.ts";
import { listenerOf } from "./control.ts";
import { connectSocket } from "./qmp-connect.ts";
import { QmpClient, isRecord } from "./qmp.ts";

export interface SaveOptions {
  /** QMP socket of the QEMU; nobody else may be connected to it. */
  readonly qmpPath: string;
  /** File to write; a regular one that is there is replaced when the new one is complete. */
  readonly path: string;
  /** The guest runs on while its RAM is saved, and is stopped for the rest only. */
  readonly live: boolean;
  /** 1..255: RAM is saved by so many channels at once; one stream when left out. */
  readonly multifdChannels?: number;
  /** What QEMU does afterwards: end, run on, or stay stopped. */
  readonly afterwards: "quit" | "cont" | "stay";
  /**
   * Told of QEMU's process before anything is asked of it; throws when that cannot be saved
   * (`refuseUnserved`). 0 where the kernel does not say which it is.
   */
  readonly checkProcess?: (pid: number) => void;
  /** Checks the complete file before it is renamed; throws when it is not sound. */
  readonly verify: (path: string) => void | Promise<void>;
  /** Called a few times a second. */
  readonly onProgress?: (progress: SaveProgress) => void;
  /** Aborting it ends the save, and everything is as before. */
  readonly signal?: AbortSignal;
}

export interface SaveProgress {
  /** RAM that has been dealt with, zero pages counted too. */
  readonly transferredBytes: number;
  readonly totalBytes: number;
}

/** Off the main thread: a signal is heeded meanwhile. */
function flush(fd: number): Promise<void> {
  return new Promise((resolve, reject) => {
    fsync(fd, (error) => (error === null ? resolve() : reject(error)));
  });
}

/** A client that is connected already keeps ours waiting without a word. */
const GREETING_TIMEOUT_MS = 10_000;
const PROGRESS_PERIOD_MS = 200;
/** A guest that writes faster than the disk is stopped after so many rounds through its RAM. */
const LIVE_ROUNDS_MAX = 5;
/** How long QEMU may take to give a migration up. */
const CANCEL_TIMEOUT_MS = 30_000;
const CANCEL_CHECK_MS = 50;
const SETTLE_CHECK_MS = 2;
/** How long QEMU may take to end after `quit`. */
const QUIT_TIMEOUT_MS = 30_000;

/** S_ISVTX and S_IWOTH. */
const STICKY_AND_WRITABLE = 0o1002;

/** Run states in which a guest can be saved. @source QEMU qapi/run-state.json RunState */
const SAVABLE_STATES = ["running", "paused", "prelaunch", "suspended", "watchdog", "io-error"];
/** States of a migration in which nothing is under way. */
const IDLE_MIGRATIONS = ["none", "completed", "failed", "cancelled"];

/**
 * Saves the guest. Returns when the snapshot is complete at its path and QEMU is as `afterwards` says.
 * @throws FslError USAGE when there is something else than a regular file at the path; SAVE_FAILED
 * when the guest cannot be saved (`details.aborted` when `signal` said so); TARGET_LOST when QEMU
 * cannot be reached or ends; TARGET_MISMATCH when its version cannot do it. `details.isComplete`:
 * the snapshot is there, and QEMU is not as `afterwards` says.
 */
export async function saveSnapshot(options: SaveOptions): Promise<void> {
  const output = SaveFile.create(options.path);
  try {
    using qmp = connectChecked(options);
    const save = new Save(qmp, options);
    await save.prepare();
    try {
      await save.run(output);
      await options.verify(output.path);
      await output.toDisk();
      throwIfAborted(options.signal);
      output.commit();
    } catch (error) {
      throw withGuestState(error, await save.undo());
    }
    await save.finish();
  } finally {
    output.close();
  }
}

function connectChecked({ qmpPath, checkProcess }: SaveOptions): QmpClient {
  const socket = connectSocket(qmpPath);
  try {
    checkProcess?.(listenerOf(socket));
  } catch (error) {
    native.close(socket);
    throw error;
  }
  const peer = `QEMU at ${qmpPath}`;
  return QmpClient.open(socket, { peer, greetingTimeoutMs: GREETING_TIMEOUT_MS });
}

/** The new file, under its temporary name. */
class SaveFile {
  readonly path: string;
  /** Open for reading and writing; the file position does not matter. */
  readonly fd: number;
  readonly #finalPath: string;
  #isCommitted = false;

  private constructor(path: string, fd: number, finalPath: string) {
    this.path = path;
    this.fd = fd;
    this.#finalPath = finalPath;
  }

  static create(path: string): SaveFile {
    checkReplaceable(path);
    const finalPath = followLink(resolve(path));
    const name = `.${shortName(basename(finalPath))}.fsl-${randomHex(12)}`;
    const temporaryPath = join(dirname(finalPath), name);
    const { O_CREAT, O_EXCL, O_RDWR, O_NOFOLLOW } = constants;
    try {
      const fd = openSync(temporaryPath, O_CREAT | O_EXCL | O_RDWR | O_NOFOLLOW, 0o600);
      return new SaveFile(temporaryPath, fd, finalPath);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "ENOENT") throw noDirectory(finalPath);
      throw fileError("create a file beside it", finalPath, error);
    }
  }

  /** Brings the file to the disk: it may take long, and can be interrupted afterwards. */
  async toDisk(): Promise<void> {
    try {
      await flush(this.fd);
    } catch (error) {
      throw fileError("write it", this.#finalPath, error);
    }
  }

  /** Gives the file its name. After `toDisk`. */
  commit(): void {
    try {
      this.#takeMode();
      renameSync(this.path, this.#finalPath);
      this.#isCommitted = true;
      const directory = openSync(dirname(this.#finalPath), "r");
      try {
        fsyncSync(directory);
      } finally {
        closeSync(directory);
      }
    } catch (error) {
      throw fileError("write it", this.#finalPath, error);
    }
  }

  /** Who could read the file that is replaced can read the new one; only its owner may have said so. */
  #takeMode(): void {
    const old = statusBy(lstatSync, this.#finalPath);
    if (old?.isFile() !== true || old.uid !== process.geteuid?.()) return;
    try {
      fchownSync(this.fd, old.uid, old.gid);
    } catch {
      return; // Not one of our groups: what the mode gives was meant for that one.
    }
    fchmodSync(this.fd, old.mode & 0o777);
  }

  /** Removes what was not committed. */
  close(): void {
    closeSync(this.fd);
    if (!this.#isCommitted) rmSync(this.path, { force: true });
  }
}

/** So much of it that a file system has room for what is added: bytes, not letters, and no half letter. */
function shortName(name: string): string {
  return new TextDecoder().decode(Buffer.from(name).subarray(0, 200), { stream: true });
}

/** One save: what it changed in QEMU, and how to put that back. */
class Save {
  readonly #qmp: QmpClient;
  readonly #options: SaveOptions;
  #settings: MigrationSettings | null = null;
  #fdset = 0;
  #isFdsetUsed = false;
  #stateBefore = "";
  #isStarted = false;

  constructor(qmp: QmpClient, options: SaveOptions) {
    this.#qmp = qmp;
    this.#options = options;
  }

  /** Asks; changes nothing. */
  async prepare(): Promise<void> {
    const [, settings, state, migration, fdsets] = await Promise.all([
      this.#qmp.ready,
      MigrationSettings.read(this.#qmp),
      this.#runState(),
      this.#qmp.request("query-migrate"),
      this.#qmp.execute("query-fdsets"),
    ]);
    checkSavable(state, statusOf(migration));
    this.#settings = settings;
    this.#fdset = freeFdset(fdsets);
    this.#stateBefore = state;
    throwIfAborted(this.#options.signal);
  }

  /** Writes the snapshot. The guest is stopped when this returns. */
  async run(output: SaveFile): Promise<void> {
    await this.#settings?.apply(saveChanges(this.#options.multifdChannels));
    if (!this.#options.live) await this.#request("stop");
    const uri = await this.#handOver(output);
    const watch = this.#watch();
    try {
      this.#isStarted = true;
      await this.#request("migrate", { uri });
      await watch.ended;
    } finally {
      watch.stop();
    }
    await this.#settle("completed");
    if (fstatSync(output.fd).size > 0) return;
    throw new FslError(
      "SAVE_FAILED",
      "save: QEMU wrote the snapshot somewhere else: it sees other files",
    );
  }

  /** After success. A step that fails does not keep the next one from being taken. */
  async finish(): Promise<void> {
    const { afterwards, path } = this.#options;
    type Step = [consequence: string, take: () => Promise<void>];
    const putBack: Step = ["QEMU's migration settings are not put back", () => this.#putBack()];
    const steps: Record<SaveOptions["afterwards"], Step[]> = {
      stay: [putBack],
      cont: [putBack, ["the guest does not run on", () => this.#request("cont")]],
      quit: [["QEMU was not ended", () => this.#quit()]], // Its settings end with it.
    };
    const failures: FslError[] = [];
    for (const [consequence, take] of steps[afterwards]) {
      try {
        await take();
      } catch (error) {
        if (!isFslError(error)) throw error;
        const reason = error.message.replace(/^save: /, "");
        const message = `save: ${path} is complete, but ${consequence}: ${reason}`;
        const details = { ...error.details, path, isComplete: true };
        failures.push(new FslError(error.code, message, details, error));
      }
    }
    // The last one is what was asked for; without a connection both fail for the same reason.
    const failure = failures.at(-1);
    if (failure !== undefined) throw failure;
  }

  async #quit(): Promise<void> {
    await this.#request("quit").catch((error: unknown) => {
      if (!this.#qmp.isClosed) throw error; // It may be gone before it has answered.
    });
    const closed = await Promise.race([this.#qmp.closed, Bun.sleep(QUIT_TIMEOUT_MS)]);
    if (closed !== undefined) return;
    throw new FslError(
      "SAVE_FAILED",
      `save: QEMU did not end within ${QUIT_TIMEOUT_MS} ms of quit`,
    );
  }

  /**
   * After failure: as before. What goes wrong here is not reported; the error that led here is, and
   * a lost connection leaves nothing to do.
   * @returns the run state of the guest before the save and now; null when QEMU does not say
   */
  async undo(): Promise<GuestStates | null> {
    const before = this.#stateBefore;
    let now = "";
    const steps = [
      () => this.#cancel(),
      () => this.#putBack(),
      async () => {
        if (before === "running" && (await this.#runState()) !== before)
          await this.#request("cont");
      },
      async () => {
        now = await this.#runState();
      },
    ];
    for (const step of steps) {
      try {
        await step();
      } catch (error) {
        if (!isFslError(error)) throw error;
      }
    }
    return now === "" ? null : { before, now };
  }

  /** @returns the URI that QEMU is to write to */
  async #handOver(output: SaveFile): Promise<string> {
    const fd = openSync(`/proc/self/fd/${output.fd}`, constants.O_WRONLY);
    try {
      const args = { "fdset-id": this.#fdset };
      const reply = await this.#qmp.execute("add-fd", args, { fd });
      this.#isFdsetUsed = reply.ok;
      if (reply.ok) return `file:/dev/fdset/${this.#fdset}`;
    } finally {
      closeSync(fd);
    }
    // A relay between the two has dropped the descriptor, so QEMU is given the path.
    if (!output.path.includes(",offset=")) return `file:${output.path}`;
    throw new FslError("SAVE_FAILED", "save: QEMU takes no path that holds `,offset=`");
  }

  /** Waits for the end of the migration, reports how far it is, and ends a live save in time. */
  #watch(): { ended: Promise<void>; stop: () => void } {
    const { promise, resolve: end, reject } = Promise.withResolvers<void>();
    promise.catch(() => {});
    let isAsking = false;
    let isStopping = false;
    const look = async (): Promise<void> => {
      if (isAsking) return;
      isAsking = true;
      try {
        const progress = await this.#qmp.request("query-migrate");
        const status = statusOf(progress);
        if (status === "completed") end();
        if (status === "failed" || status === "cancelled") {
          reject(saveFailed(this.#options.path, progress, status));
        }
        this.#report(progress);
        if (this.#options.live && !isStopping && roundsOf(progress) > LIVE_ROUNDS_MAX) {
          isStopping = true;
          await this.#request("stop");
        }
      } catch (error) {
        reject(error);
      } finally {
        isAsking = false;
      }
    };
    const stopEvents = this.#qmp.onEvent(({ name, data }) => {
      if (name === "MIGRATION" && data["status"] === "completed") end();
      else if (name === "MIGRATION") look();
    });
    const timer = setInterval(look, PROGRESS_PERIOD_MS);
    const onAbort = (): void => reject(aborted());
    this.#options.signal?.addEventListener("abort", onAbort);
    if (this.#options.signal?.aborted === true) onAbort();
    this.#qmp.closed.then(reject);
    const stop = (): void => {
      stopEvents();
      clearInterval(timer);
      this.#options.signal?.removeEventListener("abort", onAbort);
    };
    return { ended: promise, stop };
  }

  #report(progress: unknown): void {
    const ram = isRecord(progress) ? progress["ram"] : undefined;
    if (!isRecord(ram)) return;
    const totalBytes = Number(ram["total"] ?? 0);
    const remainingBytes = Number(ram["remaining"] ?? 0);
    this.#options.onProgress?.({ transferredBytes: totalBytes - remainingBytes, totalBytes });
  }

  async #cancel(): Promise<void> {
    if (!this.#isStarted) return; // What query-migrate tells is of an earlier one.
    const deadlineMs = performance.now() + CANCEL_TIMEOUT_MS;
    let status = statusOf(await this.#qmp.request("query-migrate"));
    if (!IDLE_MIGRATIONS.includes(status)) await this.#request("migrate_cancel");
    while (!IDLE_MIGRATIONS.includes(status) && performance.now() < deadlineMs) {
      await Bun.sleep(CANCEL_CHECK_MS);
      status = statusOf(await this.#qmp.request("query-migrate"));
    }
    await this.#settle(status);
  }

  /**
   * QEMU says how a migration ended a moment before it sets the run state accordingly. A `cont` in
   * between would run the guest in a state that says it is stopped.
   */
  async #settle(migration: string): Promise<void> {
    const deadlineMs = performance.now() + CANCEL_TIMEOUT_MS;
    while (performance.now() < deadlineMs) {
      const state = await this.#runState();
      if (migration === "completed" ? state === "postmigrate" : state !== "finish-migrate") return;
      await Bun.sleep(SETTLE_CHECK_MS);
    }
    throw new FslError(
      "SAVE_FAILED",
      `save: the migration is ${migration}, but QEMU goes on with it`,
    );
  }

  async #putBack(): Promise<void> {
    if (this.#isFdsetUsed) await this.#qmp.execute("remove-fd", { "fdset-id": this.#fdset });
    this.#isFdsetUsed = false;
    await this.#settings?.restore();
  }

  async #runState(): Promise<string> {
    return statusOf(await this.#qmp.request("query-status"));
  }

  /** A command whose refusal means that the guest cannot be saved. */
  async #request(command: string, args?: Record<string, unknown>): Promise<void> {
    const reply = await this.#qmp.execute(command, args);
    if (reply.ok) return;
    throw new FslError("SAVE_FAILED", `save: QEMU refused ${command}: ${reply.description}`, {
      command,
      description: reply.description,
    });
  }
}

function saveChanges(multifdChannels: number | undefined): MigrationChanges {
  const off = CAPABILITIES_IN_THE_WAY.map((name) => [name, false]);
  const channels = multifdChannels === undefined ? {} : { "multifd-channels": multifdChannels };
  return {
    capabilities: {
      ...Object.fromEntries(off),
      "mapped-ram": true,
      events: true,
      multifd: multifdChannels !== undefined,
    },
    // 0 is no limit; the default is 128 MiB/s, meant for networks. Direct I/O (QEMU 9.1) would need
    // a second descriptor.
    parameters: { ...PARAMETERS_IN_THE_WAY, "max-bandwidth": 0, "direct-io": false, ...channels },
  };
}

function checkSavable(runState: string, migration: string): void {
  if (!IDLE_MIGRATIONS.includes(migration)) {
    throw new FslError("SAVE_FAILED", `save: QEMU is busy with a migration (${migration})`, {
      migration,
    });
  }
  if (SAVABLE_STATES.includes(runState)) return;
  const hint = RUN_STATE_HINTS[runState] ?? "";
  throw new FslError(
    "SAVE_FAILED",
    `save: a guest in run state ${runState} cannot be saved${hint}`,
    {
      runState,
    },
  );
}

const RUN_STATE_HINTS: Readonly<Record<string, string>> = {
  inmigrate: ": it waits for a state itself",
  postmigrate: ": it was saved or migrated already and has not run since; `cont` first",
};

/** The `status` member of an answer, `none` when there is none. */
function statusOf(value: unknown): string {
  return isRecord(value) && typeof value["status"] === "string" ? value["status"] : "none";
}

/** How often a live save has gone through the guest's RAM. */
function roundsOf(progress: unknown): number {
  const ram = isRecord(progress) ? progress["ram"] : undefined;
  return isRecord(ram) ? Number(ram["dirty-sync-count"] ?? 0) : 0;
}

function saveFailed(path: string, progress: unknown, status: string): FslError {
  const given = isRecord(progress) ? progress["error-desc"] : undefined;
  const description = typeof given === "string" ? given : `the migration was ${status}`;
  return new FslError("SAVE_FAILED", `save ${path}: QEMU could not write it: ${description}`, {
    path,
    description,
  });
}

/** Run states of a guest whose save has failed. */
interface GuestStates {
  readonly before: string;
  readonly now: string;
}

/**
 * Adds how the guest is after a save that failed. One that was stopped before is `postmigrate` once
 * all is written, and QEMU knows no way back from there but to let it run.
 */
function withGuestState(error: unknown, states: GuestStates | null): unknown {
  if (!isFslError(error) || states === null) return error;
  const { before, now } = states;
  const hint = now === "postmigrate" || now === "paused" ? "; `cont` lets it run" : "";
  const guest =
    now === before
      ? `the guest is ${now}, as before`
      : `the guest was ${before} and is ${now} now${hint}`;
  const details = { ...error.details, runState: now };
  return new FslError(error.code, `${error.message}; ${guest}`, details, error.cause);
}

function aborted(): FslError {
  return new FslError("SAVE_FAILED", "save: interrupted", { aborted: true });
}

function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted === true) throw aborted();
}

function fileError(what: string, path: string, error: unknown): FslError {
  const errno = (error as NodeJS.ErrnoException).code ?? String(error);
  return new FslError(
    "SAVE_FAILED",
    `save ${path}: cannot ${what} (${errno})`,
    { path, errno },
    error,
  );
}

function noDirectory(path: string): FslError {
  const directory = dirname(path);
  return new FslError("SAVE_FAILED", `save ${path}: the directory ${directory} does not exist`, {
    path,
    errno: "ENOENT",
  });
}

/**
 * The new file is to take the place of an old one, never of a device, or of a link whose file could
 * not be found: that would be replaced itself.
 * @throws FslError USAGE
 */
function checkReplaceable(path: string): void {
  const status = statusOfFile(path);
  if (status === null || status.isFile()) return;
  const found = kindOf(status);
  throw new FslError("USAGE", `save ${path}: it is ${found}; name a file, or nothing that exists`, {
    path,
    found,
  });
}

/** Of what is at the path, links followed; of a link itself when it leads nowhere. Null: nothing. */
function statusOfFile(path: string): Stats | null {
  return statusBy(statSync, path) ?? statusBy(lstatSync, path);
}

/** Null: what cannot be looked at is not written to either, and creating the new file says why. */
function statusBy(look: (path: string) => Stats, path: string): Stats | null {
  try {
    return look(path);
  } catch {
    return null;
  }
}

function kindOf(status: Stats): string {
  if (status.isDirectory()) return "a directory";
  if (status.isSymbolicLink()) return "a symbolic link to what cannot be reached";
  if (status.isFIFO()) return "a FIFO";
  if (status.isSocket()) return "a socket";
  return "a device";
}

/**
 * A symbolic link stays; the file that it points to is replaced. Not by another user's link in a folder where
 * everybody can make one, whatever fs.protected_symlinks says.
 * @source proc_sys_fs(5) protected_symlinks
 * @throws FslError USAGE for such a link
 */
function followLink(path: string): string {
  const link = statusBy(lstatSync, path);
  const folder = statusBy(statSync, dirname(path));
  if (link?.isSymbolicLink() === true && folder !== null) {
    const isOpenToAll = (folder.mode & STICKY_AND_WRITABLE) === STICKY_AND_WRITABLE;
    if (isOpenToAll && link.uid !== process.geteuid?.() && link.uid !== folder.uid) {
      const found = `found a symbolic link of user ${link.uid} in a folder that everybody can write to`;
      throw new FslError("USAGE", `save: ${path}: expected a file, ${found}; name another place`, {
        path,
      });
    }
  }
  try {
    return realpathSync(path);
  } catch {
    return path; // There is none yet.
  }
}
