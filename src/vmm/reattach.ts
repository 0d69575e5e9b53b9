/**
 * A QEMU whose fsl has died, found again. Nothing is asked of it before its faults are served: with
 * a vCPU (or its main loop, while it loads devices) waiting for a page, QMP answers nobody.
 */
import { constants } from "node:os";
import { FslError } from "../errors.ts";
import * as native from "../sys/native.ts";
import { type ExitWatch, watchExit } from "./exit-watch.ts";
import { dropLeftSeeds } from "./fdset.ts";
import { type MigrationChanges, MigrationSettings } from "./migration-settings.ts";
import { connectQmp } from "./qmp-connect.ts";
import { isRecord, type QmpClient } from "./qmp.ts";
import { USERFAULTFD_NAME } from "./qemu.ts";
import { removeRuntimeDirectoryOf } from "./runtime-directory.ts";
import type { ExitStatus, FoundTarget, StateProgress, TargetRecord } from "./target.ts";

/** A QEMU that has just been freed from a wait has a whole device state to load first. */
const GREETING_TIMEOUT_MS = 60_000;

/**
 * @param record what the dead fsl left in the load state
 * @throws FslError TARGET_LOST when the process has ended
 */
export function reattachQemu(record: TargetRecord): FoundTarget {
  return new ReattachedQemu(record);
}

class ReattachedQemu implements FoundTarget {
  readonly description: string;
  readonly pid: number;
  readonly pidfd: number;
  readonly exited: Promise<ExitStatus>;
  readonly endsWithFsl: boolean;
  readonly #record: TargetRecord;
  readonly #watch: ExitWatch;
  #qmp: QmpClient | null = null;
  #isClosed = false;

  constructor(record: TargetRecord) {
    this.#record = record;
    this.endsWithFsl = record.endsWithFsl;
    this.pid = record.pid;
    this.description = `QEMU (pid ${record.pid})`;
    const pidfd = native.pidfdOpen(record.pid, 0);
    if (pidfd < 0) {
      throw new FslError("TARGET_LOST", `${this.description}: ${native.errnoText(-pidfd)}`, {
        pid: record.pid,
      });
    }
    this.pidfd = pidfd;
    this.#watch = watchExit(pidfd, record.pid);
    this.exited = this.#watch.exited.then((status) => {
      this.#qmp?.close();
      this.#removeControl();
      return status;
    });
  }

  async stateProgress(): Promise<StateProgress> {
    const reply = await this.#control().request("query-migrate");
    const status = isRecord(reply) ? reply["status"] : undefined;
    if (status === "completed") return "loaded";
    if (status === "failed") return "failed";
    return status === undefined ? "none" : "loading";
  }

  async resume(): Promise<void> {
    const resumed = this.#control().request("cont");
    void this.putSettingsBack(); // Sent along.
    await resumed;
  }

  /** What QEMU refuses or does not answer is tried again at the end. */
  async putSettingsBack(): Promise<void> {
    await this.#settings(this.#control())
      .restore()
      .catch(() => {});
  }

  async pause(): Promise<void> {
    await this.#control().request("stop", undefined, { timeoutMs: Number.POSITIVE_INFINITY });
  }

  async dropDescriptor(name: string): Promise<void> {
    await this.#control().request("closefd", { fdname: name });
  }

  async release(): Promise<void> {
    const qmp = this.#control();
    await qmp.execute("closefd", { fdname: USERFAULTFD_NAME });
    await dropLeftSeeds(qmp, this.pid);
    await this.#settings(qmp).restore();
    qmp.close();
    this.#qmp = null;
    // The load is over: nobody will come back for it.
    this.#removeControl();
  }

  signal(signal: NodeJS.Signals): void {
    native.pidfdSendSignal(this.pidfd, constants.signals[signal]); // ESRCH: it has ended already.
  }

  kill(): void {
    this.signal("SIGKILL");
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#watch.stop();
    this.#qmp?.close();
    native.close(this.pidfd);
  }

  /** Those that the dead fsl changed. */
  #settings(qmp: QmpClient): MigrationSettings {
    return MigrationSettings.changedBefore(qmp, this.#record.undo as MigrationChanges);
  }

  #control(): QmpClient {
    const { controlPath } = this.#record;
    if (controlPath === null) {
      throw new FslError(
        "TARGET_LOST",
        `${this.description}: has no QMP socket that can be connected to again`,
      );
    }
    if (this.#qmp === null) {
      this.#qmp = connectQmp(controlPath, { greetingTimeoutMs: GREETING_TIMEOUT_MS });
      // QEMU's end shows first as the end of its connection.
      this.#qmp.closed.then(() => this.#watch.hint());
    }
    return this.#qmp;
  }

  /** Never a socket of the user's own. */
  #removeControl(): void {
    const { controlPath, isControlPrivate } = this.#record;
    if (controlPath !== null && isControlPrivate) removeRuntimeDirectoryOf(controlPath);
  }
}
