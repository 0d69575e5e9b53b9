/**
 * A QEMU whose fsl has died, found again. Nothing is asked of it before its faults are served: with
 * a vCPU (or its main loop, while it loads devices) waiting for a page, QMP answers nobody.
 */
import { FslError } from "../errors.ts";
import * as native from "../sys/native.ts";
import { nodeOs } from "../sys/node-os.ts";
import { type ExitWatch, watchExit } from "./exit-watch.ts";
import { Control } from "./control.ts";
import { dropLeftSeeds } from "./fdset.ts";
import { watchHotplugOf } from "./hotplug-watch.ts";
import { MigrationSettings, parseUndo } from "./migration-settings.ts";
import { isRecord, type QmpClient } from "./qmp.ts";
import { holdBy, pauseBy, USERFAULTFD_NAME } from "./qemu.ts";
import { removeRuntimeDirectoryOf } from "./runtime-directory.ts";
import type {
  ExitStatus,
  FoundTarget,
  HotplugWants,
  StateProgress,
  TargetRecord,
} from "./target.ts";

/**
 * @param record what the dead fsl left in the load state
 * @param notice what a person may want to know of the connection
 * @throws FslError TARGET_LOST when the process has ended
 */
export function reattachQemu(record: TargetRecord, notice?: (text: string) => void): FoundTarget {
  return new ReattachedQemu(record, notice);
}

class ReattachedQemu implements FoundTarget {
  readonly description: string;
  readonly pid: number;
  readonly pidfd: number;
  readonly exited: Promise<ExitStatus>;
  readonly endsWithFsl: boolean;
  readonly #record: TargetRecord;
  readonly #watch: ExitWatch;
  readonly #control: Control;
  #isClosed = false;

  constructor(record: TargetRecord, notice?: (text: string) => void) {
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
      this.#control.close();
      this.#removeControl();
      return status;
    });
    const { pid, controlPath, isControlOwn } = record;
    const { description, exited } = this;
    this.#control = new Control({ description, pid, controlPath, isControlOwn, exited }, null, {
      // QEMU's end shows first as the end of its connection.
      onConnected: (qmp) => void qmp.closed.then(() => this.#watch.hint()),
      notice,
    });
  }

  async stateProgress(): Promise<StateProgress> {
    const qmp = await this.#control.open(true);
    const patience = { timeoutMs: Number.POSITIVE_INFINITY };
    const reply = await qmp.request("query-migrate", undefined, patience);
    const status = isRecord(reply) ? reply["status"] : undefined;
    if (status === "completed") return "loaded";
    if (status === "failed") return "failed";
    return status === undefined ? "none" : "loading";
  }

  async resume(): Promise<void> {
    await this.#control.ask(async (qmp) => {
      const resumed = qmp.request("cont");
      // Sent along. What QEMU refuses or does not answer is tried again at the end.
      void this.#restore(qmp).catch(() => {});
      await resumed;
    });
  }

  async putSettingsBack(): Promise<void> {
    await this.#control.ask((qmp) => this.#restore(qmp)).catch(() => {});
  }

  async pause(): Promise<void> {
    await this.#control.ask((qmp) => pauseBy(qmp));
  }

  async hold(): Promise<boolean> {
    return this.#control.ask((qmp) => holdBy(qmp));
  }

  watchHotplug(
    wants: HotplugWants,
    found: (type: string) => void,
    lost: (error: FslError) => void,
  ): () => void {
    return watchHotplugOf(this.#control, wants, found, lost);
  }

  async dropDescriptor(name: string): Promise<void> {
    await this.#control.ask(async (qmp, isAgain) => {
      // The second time there may be none any more.
      if (isAgain) await qmp.execute("closefd", { fdname: name });
      else await qmp.request("closefd", { fdname: name });
    });
  }

  async release(): Promise<void> {
    await this.#control.ask(async (qmp) => {
      await qmp.execute("closefd", { fdname: USERFAULTFD_NAME });
      await dropLeftSeeds(qmp, this.pid);
      await this.#restore(qmp);
    });
    this.#control.close();
    // The load is over: nobody will come back for it.
    this.#removeControl();
  }

  signal(signal: NodeJS.Signals): void {
    native.pidfdSendSignal(this.pidfd, nodeOs().constants.signals[signal]); // ESRCH: it has ended already.
  }

  kill(): void {
    this.signal("SIGKILL");
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    // Whoever closes this may have learned of QEMU's end before the watch has.
    this.#watch.hint();
    this.#watch.stop();
    this.#control.close();
    native.close(this.pidfd);
  }

  /** Migration settings that the dead fsl changed. */
  #restore(qmp: QmpClient): Promise<void> {
    return MigrationSettings.changedBefore(qmp, parseUndo(this.#record.undo)).restore();
  }

  /** Never a socket of the user's own. */
  #removeControl(): void {
    const { controlPath, isControlPrivate } = this.#record;
    if (controlPath !== null && isControlPrivate) removeRuntimeDirectoryOf(controlPath);
  }
}
