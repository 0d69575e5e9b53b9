/**
 * `fsl load --qmp`: a QEMU of somebody else's gets its state, and lives on as if nothing had been.
 */
import { beforeAll, describe, expect, test } from "bun:test";
import { createConnection } from "node:net";
import { dirname, join } from "node:path";
import { AttachRun, socketExists } from "../helpers/attach-runs.ts";
import type { FslProcess } from "../helpers/fault-runs.ts";
import { type GuestSnapshot, snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import { differencesFromOracle } from "../helpers/load-oracle.ts";
import { openFiles, whyNoExecutable } from "../helpers/load-runs.ts";
import { askQmp } from "../helpers/qemu-vmm.ts";

const TIMEOUT_MS = 60_000;
const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;
const isRoot = process.getuid?.() === 0;

let snapshot: GuestSnapshot;
/** The same machine with other memory. */
let other: GuestSnapshot;

beforeAll(async () => {
  if (skip) return;
  snapshot = await snapshotOf({ guest: "bare" });
  other = await snapshotOf({
    guest: "bare",
    guestOptions: "churn=4096",
    live: true,
    bandwidthMiB: 20,
  });
}, TIMEOUT_MS);

const inmigrate = { status: "inmigrate" };

describe.skipIf(skip)("fsl load --qmp", () => {
  test.each<[string, string, readonly string[], (path: string) => readonly string[]]>([
    ["an ordinary QEMU", "user", [], () => []],
    ["one in a sandbox", "user", ["-sandbox", "on,elevateprivileges=deny,spawn=deny"], () => []],
    ["one that went into the background", "user", ["-daemonize"], () => []],
    ["one of another user", "root", ["-run-with", "user=nobody"], () => []],
    [
      "one that cannot see the snapshot",
      "root",
      [],
      (path) => {
        const script = 'mount -t tmpfs none "$0" && exec "$@"';
        return ["unshare", "--mount", "sh", "-c", script, dirname(path)];
      },
    ],
  ])(
    "brings in all memory of %s and leaves it",
    async (_, who, qemuArgs, prefix) => {
      if (who === "root" && !isRoot) return;
      await using run = await AttachRun.start(snapshot, {
        qemuArgs,
        prefix: prefix(snapshot.path),
      });
      const before = await run.traits();
      const { code, stderr } = await run.attach(snapshot, "--paused").end();
      expect({ code, stderr }).toEqual({
        code: 0,
        stderr: expect.stringContaining("all RAM in after") as unknown as string,
      });
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
      expect(await run.traits()).toEqual(before);
      expect(await run.status(run.pid)).toBeNull();
      // Its monitor is free again.
      expect(await askQmp(run.qmpPath, "query-status")).toMatchObject({ running: false });
      await run.qmp.execute("cont");
      await run.serial.waitForNext(/^tick \d+ ok/);
      expect(run.files()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "shown by fsl status; a signal only makes it hurry",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const load = run.attach(snapshot, "--paused", "--eager-rate", "1M");
      await run.reached("running");
      expect(await run.status(run.pid)).toMatchObject({ served: true, phase: "running" });
      load.signal("SIGTERM");
      const { code, stderr } = await load.end(20_000);
      expect([code, stderr]).toEqual([0, expect.stringMatching(/SIGTERM: QEMU needs fsl/)]);
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "lets the guest run at once, but for one with -S",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const load = run.attach(snapshot);
      await run.serial.waitFor(/^tick \d+ ok/);
      expect((await load.end()).code).toBe(0);
      expect(run.serial.lines.filter(({ text }) => text.includes("BAD"))).toEqual([]);
      await using stopped = await AttachRun.start(snapshot, { qemuArgs: ["-S"] });
      expect((await stopped.attach(snapshot).end()).code).toBe(0);
      expect(await stopped.qmp.execute("query-status")).toMatchObject({ status: "paused" });
    },
    TIMEOUT_MS,
  );

  test(
    "--mode copy lets QEMU load everything itself",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      expect((await run.attach(snapshot, "--mode", "copy", "--paused").end()).code).toBe(0);
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
      expect(await run.traits()).toEqual(before);
    },
    TIMEOUT_MS,
  );

  test(
    "killed: the guest waits, and fsl resume goes on and keeps QEMU's own socket",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const load = run.attach(snapshot, "--paused", "--eager-rate", "4M");
      await run.reached("running");
      await load.kill();
      expect(await run.status(run.pid)).toMatchObject({ served: false });
      const again = await run.attach(snapshot).end();
      expect(again.stderr).toContain(`go on with: fsl resume --pid ${run.pid}`);
      expect(again.code).toBe(8);
      const resumed = await run.resume(run.pid);
      expect([resumed.code, resumed.stderr]).toEqual([0, expect.stringContaining("all RAM is in")]);
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
      expect(await run.traits()).toEqual(before);
      expect(socketExists(run.qmpPath)).toBe(true);
    },
    TIMEOUT_MS,
  );

  test(
    "takes a QEMU in which a fsl died before it had handed over the state",
    async () => {
      let isArmed = false;
      for (let round = 0; round < 15 && !isArmed; round += 1) {
        await using run = await AttachRun.start(snapshot);
        const before = await run.traits();
        const load = run.attach(other, "--paused");
        // It stays so for a millisecond only: no pause between two looks.
        const { pid } = run;
        const endMs = performance.now() + 10_000;
        while (!openFiles(pid).includes("/memfd:fsl-state (deleted)")) {
          if (performance.now() > endMs) throw new Error("no load state");
        }
        await load.kill();
        const status = await run.status(run.pid);
        if (status?.phase !== "armed") continue;
        isArmed = true;
        expect(await run.traits()).not.toEqual(before);
        const { code, stderr } = await run.attach(snapshot, "--paused").end();
        expect([code, stderr]).toEqual([0, expect.stringContaining("a dead fsl has left")]);
        expect(await differencesFromOracle(snapshot, run)).toEqual([]);
        expect(await run.traits()).toEqual(before);
      }
      expect(isArmed).toBe(true);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(skip)("fsl load --qmp --pid through a relay", () => {
  /** The relay of tests/helpers/qmp-relay.ts, in front of QEMU's monitor. */
  async function relayOf(run: AttachRun, what: string, command: string): Promise<string> {
    const path = `${run.qmpPath}-relay`;
    const program = join(import.meta.dir, "../helpers/qmp-relay.ts");
    const argv = [process.execPath, program, path, run.qmpPath, what, command];
    const child = Bun.spawn(["setpriv", "--pdeathsig", "KILL", ...argv], {
      stdio: ["ignore", "pipe", "inherit"],
      env: run.env,
    });
    const { value } = await child.stdout.getReader().read();
    expect(new TextDecoder().decode(value)).toBe("ready\n");
    return path;
  }

  function loadThrough(run: AttachRun, path: string, ...flags: readonly string[]): FslProcess {
    const own = ["--qmp", path, "--pid", String(run.pid), "--working-set", "none"];
    return run.fsl("load", snapshot.path, ...own, ...flags);
  }

  test.each([
    ["while QEMU takes its state", "migrate-incoming"],
    ["when the guest is to run", "cont"],
    ["when fsl lets go", "remove-fd"],
  ])(
    "that closes %s: the connection is made again, and all is as it should be",
    async (_, command) => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const path = await relayOf(run, "cut", command);
      const { code, stderr } = await loadThrough(run, path).end();
      expect([code, stderr]).toEqual([0, expect.stringContaining("it was made again")]);
      await run.serial.waitForNext(/^tick \d+ ok/);
      await run.serial.waitForNext(/^tick \d+ ok/);
      expect(run.serial.lines.filter(({ text }) => text.includes("BAD"))).toEqual([]);
      expect(await run.traits()).toEqual(before);
      expect(run.processes("qemu-system")).toEqual([run.pid]);
    },
    TIMEOUT_MS,
  );

  test(
    "that ends for good: QEMU is not ended, gets its pages, and can be let go on by hand",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const path = await relayOf(run, "gone", "migrate-incoming");
      const { code, stderr } = await loadThrough(run, path).end();
      expect(stderr).toMatch(/could not be resumed: .*; its pages are served all the same/);
      expect(stderr).toMatch(/^fsl: .*resume it by QMP's cont$/m);
      expect(code).toBe(8);
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
      expect(await run.status(run.pid)).toMatchObject({ phase: "finished", served: false });
      // What is left in it goes with the next fsl, by the socket that there is.
      expect((await run.resume(run.pid, "--qmp", run.qmpPath)).code).toBe(0);
      expect(await run.traits()).toEqual(before);
      await run.qmp.execute("cont");
      await run.serial.waitForNext(/^tick \d+ ok/);
    },
    TIMEOUT_MS,
  );

  test(
    "that answers two seconds late: fsl waits",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const path = await relayOf(run, "late", "migrate-incoming");
      const startedMs = performance.now();
      expect((await loadThrough(run, path).end()).code).toBe(0);
      expect(performance.now() - startedMs).toBeGreaterThan(2000);
      await run.serial.waitForNext(/^tick \d+ ok/);
      expect(run.serial.lines.filter(({ text }) => text.includes("BAD"))).toEqual([]);
      expect(await run.traits()).toEqual(before);
    },
    TIMEOUT_MS,
  );

  test(
    "that refuses to hand the state over: QEMU is as it was",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const path = await relayOf(run, "fail", "migrate-incoming");
      const { code, stderr } = await loadThrough(run, path).end();
      expect(stderr).toContain("refused to take the state: refused by the relay");
      expect(code).toBe(8);
      expect(await run.traits()).toEqual(before);
      expect(await run.qmp.execute("query-status")).toMatchObject(inmigrate);
      expect((await run.attach(snapshot, "--paused").end()).code).toBe(0);
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "that refuses to let the guest run: it is told, and every page comes",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const path = await relayOf(run, "fail", "cont");
      const { code, stderr } = await loadThrough(run, path).end();
      expect(stderr).toMatch(/QMP cont: .* refused it: refused by the relay; its pages are/);
      expect(code).toBe(8);
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
      expect(await run.traits()).toEqual(before);
      await run.qmp.execute("cont");
      await run.serial.waitForNext(/^tick \d+ ok/);
      expect(run.serial.lines.filter(({ text }) => text.includes("BAD"))).toEqual([]);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(skip)("fsl load --qmp leaves QEMU as it was", () => {
  /** Whoever started it can still give it a state, here one of other memory. */
  async function loadOrdinarily(run: AttachRun): Promise<void> {
    await run.qmp.execute("stop");
    await run.qmp.setCapabilities(["mapped-ram"]);
    const from = run.qmp.events.length;
    await run.qmp.execute("migrate-incoming", { uri: `file:${other.path}` });
    await run.qmp.waitMigrated(from);
    expect(await differencesFromOracle(other, run)).toEqual([]);
  }

  test(
    "when it has too few descriptors, however far the load came",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const reasons = new Set<string>();
      for (let limit = run.openCount(); limit < 60; limit += 1) {
        await Bun.$`prlimit --pid ${run.pid} --nofile=${limit}:1024`.quiet();
        const { code, stderr } = await run.attach(snapshot, "--paused").end();
        if (code === 0) break;
        reasons.add(stderr.replace(/^.*?fsl: /s, "").trim());
        expect([6, 8], stderr).toContain(code);
        expect(await run.traits()).toEqual(before);
        expect(await run.qmp.execute("query-status")).toMatchObject(inmigrate);
        if (reasons.size > 2) break;
      }
      expect(reasons.size).toBeGreaterThan(1);
    },
    TIMEOUT_MS,
  );

  test(
    "when the last step before the hand-over fails",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      // The seed is the last descriptor of all: one too many.
      const open = run.openCount();
      for (let limit = open + 3; ; limit -= 1) {
        await Bun.$`prlimit --pid ${run.pid} --nofile=${limit}:1024`.quiet();
        const { code, stderr } = await run.attach(snapshot, "--paused").end();
        expect(code).not.toBe(0);
        if (stderr.includes("add-fd") || limit < open) break;
      }
      await Bun.$`prlimit --pid ${run.pid} --nofile=1024:1024`.quiet();
      expect(await run.traits()).toEqual(before);
      await loadOrdinarily(run);
    },
    TIMEOUT_MS,
  );

  test(
    "when the snapshot does not fit",
    async () => {
      const argv = snapshot.argv.with(snapshot.argv.indexOf("-m") + 1, "128");
      await using run = await AttachRun.start(snapshot, { argv });
      const before = await run.traits();
      const { code, stderr } = await run.attach(snapshot).end();
      expect([code, stderr]).toEqual([7, expect.stringContaining("start QEMU with -m 64M")]);
      expect(await run.traits()).toEqual(before);
      expect(await run.qmp.execute("query-status")).toMatchObject(inmigrate);
    },
    TIMEOUT_MS,
  );

  test(
    "when a signal comes first",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const busy = createConnection(run.qmpPath);
      await new Promise((resolve) => busy.once("data", resolve));
      const load = run.attach(snapshot);
      await Bun.sleep(300);
      load.signal("SIGTERM");
      const { code, stderr } = await load.end(5000);
      expect([code, stderr]).toEqual([143, expect.stringContaining("ended by SIGTERM before")]);
      busy.destroy();
      expect(await run.traits()).toEqual(before);
      await loadOrdinarily(run);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(skip)("fsl load --qmp refuses", () => {
  test(
    "a QEMU that is not waiting",
    async () => {
      await using run = await AttachRun.start(snapshot, { incoming: [] });
      const { code, stderr } = await run.attach(snapshot).end();
      expect(stderr).toMatch(/^fsl: QEMU is not waiting for a state: .* found running/m);
      expect(code).toBe(7);
      await run.serial.waitForNext(/^tick \d+ ok/);
    },
    TIMEOUT_MS,
  );

  test(
    "a monitor that is busy, after a bounded time",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const busy = createConnection(run.qmpPath);
      await new Promise((resolve) => busy.once("data", resolve));
      const { code, stderr } = await run.attach(snapshot).end(20_000);
      expect(stderr).toMatch(/no QMP greeting within \d+ ms; another client may be connected/);
      expect(code).toBe(8);
      busy.destroy();
    },
    TIMEOUT_MS,
  );

  test(
    "a pid that is another process's",
    async () => {
      await using run = await AttachRun.start(snapshot);
      await using second = await AttachRun.start(snapshot);
      const before = await second.traits();
      for (const pid of [second.pid, process.pid]) {
        const { code, stderr } = await run.attach(snapshot, "--pid", String(pid)).end();
        expect(stderr).toMatch(/QEMU says it is at|is not the QEMU that answers/);
        expect(code).toBe(7);
      }
      expect(await second.traits()).toEqual(before);
      expect((await run.attach(snapshot, "--pid", String(run.pid)).end()).code).toBe(0);
    },
    TIMEOUT_MS,
  );

  test(
    "the second of two loaders, whichever monitor it has",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const loads = [run.attach(snapshot, "--paused"), run.attach(snapshot, "--paused")];
      const ends = await Promise.all(loads.map((load) => load.end()));
      expect(ends.map(({ code }) => code).sort()).toEqual([0, 8]);
      const refusal = ends.find(({ code }) => code === 8)?.stderr;
      expect(refusal).toContain("another fsl is at work on it");
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
    },
    TIMEOUT_MS,
  );
});
