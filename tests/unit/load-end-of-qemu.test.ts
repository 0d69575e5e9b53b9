/** A QEMU that says SHUTDOWN and then does not end. */
import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import * as sys from "../../src/sys/native.ts";
import { type QemuProcess, QemuTarget } from "../../src/vmm/qemu.ts";
import { FakeMonitor, GREETING, until } from "../helpers/qemu-vmm.ts";

let monitor: FakeMonitor;
let child: Bun.Subprocess;
let target: QemuTarget;
let pidfd: number;

beforeEach(() => {
  const opened = FakeMonitor.open();
  monitor = opened.monitor;
  child = Bun.spawn(["sleep", "60"]);
  pidfd = sys.check(sys.pidfdOpen(child.pid, 0), "pidfd_open");
  const exited = child.exited.then(() => ({
    exitCode: child.exitCode,
    signal: child.signalCode === null ? null : String(child.signalCode),
  }));
  const process: QemuProcess = {
    description: "sleep",
    pid: child.pid,
    pidfd,
    exited,
    preloadSocket: -1,
    controlPath: null,
    isControlOwn: false,
    runsStartedProgram: true,
    isSpawned: true,
    endsWithFsl: false,
    startsStopped: false,
    hasNoDiscards: false,
    hasPlainMemory: true,
    vcpus: 1,
    hasDefaultSettings: false,
    identify: () => {},
    close: () => {},
  };
  target = new QemuTarget(process, opened.client);
});

afterEach(async () => {
  child.kill("SIGKILL");
  await child.exited;
  monitor.close();
  sys.close(pidfd);
});

describe("QemuTarget after SHUTDOWN", () => {
  test("wakes a QEMU that leaves a command without an answer", async () => {
    monitor.send(GREETING);
    await until(() => monitor.named("x-query-ramblock").length > 0, "the first question");
    monitor.event("SHUTDOWN", { guest: true, reason: "guest-shutdown" });
    expect(await target.exited).toEqual({ exitCode: null, signal: "SIGTERM" });
  });

  test("leaves a QEMU alone that answers: it was told to stay", async () => {
    const known = ["x-query-ramblock", "qom-get", "qom-list"];
    const more = [
      "query-migrate-capabilities",
      "query-migrate-parameters",
      "human-monitor-command",
    ];
    for (const name of [...known, ...more]) monitor.replies[name] = { return: {} };
    monitor.send(GREETING);
    await until(() => monitor.named("qom-list").length > 1, "the last question");
    monitor.event("SHUTDOWN", { guest: true, reason: "guest-shutdown" });
    // Longer than it would take to be woken.
    expect(await Promise.race([target.exited, Bun.sleep(1500)])).toBeUndefined();
  });
});
