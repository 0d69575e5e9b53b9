/**
 * `fsl load --qmp`: a QEMU of somebody else's gets its state, and lives on as if nothing had been.
 */
import { beforeAll, describe, expect, test } from "bun:test";
import { readdirSync, readFileSync, rmSync, statSync, truncateSync, writeFileSync } from "node:fs";
import { createConnection } from "node:net";
import { dirname, join } from "node:path";
import * as native from "../../src/sys/native.ts";
import { AttachRun, type QemuTraits, socketExists } from "../helpers/attach-runs.ts";
import type { FslProcess } from "../helpers/fault-runs.ts";
import { type GuestSnapshot, snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import { differencesFromOracle } from "../helpers/load-oracle.ts";
import { isOver } from "../helpers/helper-target.ts";
import { until } from "../helpers/kernel-target.ts";
import { nameOf, openFiles, whyNoExecutable } from "../helpers/load-runs.ts";
import { TWO_NODES, withNode } from "../helpers/load-snapshots.ts";
import { isUserfaultfdRefused, NOBODY, Published } from "../helpers/published.ts";
import { askQmp } from "../helpers/qemu-vmm.ts";
import { failing, Tracer, whyNoStrace } from "../helpers/strace.ts";

const TIMEOUT_MS = 60_000;
const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;
/** Other bytes, and zeros in other places. */
const OTHER = { guestOptions: "seed=2 zero=5" };
const isRoot = process.getuid?.() === 0;
/** A file on a disk: no memory that pages could be brought into one by one. */
const DISK = join(import.meta.dir, `../../.cache/fsl-attach-load-${process.pid}`);

let snapshot: GuestSnapshot;
/** The same machine with other memory. */
let other: GuestSnapshot;

beforeAll(async () => {
  if (skip) return;
  snapshot = await snapshotOf({ guest: "bare" });
  other = await snapshotOf({ guest: "bare", ...OTHER });
}, TIMEOUT_MS);

const inmigrate = { status: "inmigrate" };

/** Pids of the helper tasks in a process's memory. */
function helpersOf(pid: number): number[] {
  return readdirSync("/proc")
    .map(Number)
    .filter((one) => one > 0 && nameOf(one) === "fsl-helper" && native.kcmpVm(pid, one) === 0);
}

describe.skipIf(skip)("fsl load --qmp", () => {
  async function bringsIn(
    qemuArgs: readonly string[],
    prefix: readonly string[] = [],
  ): Promise<void> {
    await using run = await AttachRun.start(snapshot, {
      qemuArgs,
      prefix,
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
  }

  test.each<[string, readonly string[]]>([
    ["an ordinary QEMU", []],
    ["one in a sandbox", ["-sandbox", "on,elevateprivileges=deny,spawn=deny"]],
    ["one that went into the background", ["-daemonize"]],
  ])("brings in all memory of %s and leaves it", (_, qemuArgs) => bringsIn(qemuArgs), TIMEOUT_MS);

  test.skipIf(!isRoot)(
    "brings in all memory of one of another user and leaves it",
    () => bringsIn(["-run-with", "user=nobody"]),
    TIMEOUT_MS,
  );

  test.skipIf(!isRoot)(
    "brings in all memory of one that cannot see the snapshot and leaves it",
    () => {
      const script = 'mount -t tmpfs none "$0" && exec "$@"';
      return bringsIn([], ["unshare", "--mount", "sh", "-c", script, dirname(snapshot.path)]);
    },
    TIMEOUT_MS,
  );

  test.each<[string, readonly string[], boolean]>([
    ["helper tasks of its own", [], true],
    ["none in a sandbox, whose filter would kill QEMU for them", ["-sandbox", "on"], false],
  ])(
    "has %s",
    async (_, qemuArgs, hasHelpers) => {
      await using run = await AttachRun.start(snapshot, { qemuArgs });
      const load = run.attach(snapshot, "--paused", "--eager-rate", "1M");
      await run.reached("running");
      const helpers = helpersOf(run.pid);
      expect(helpers.length > 0).toBe(hasHelpers);
      expect((await run.traits()).children).toEqual([]);
      load.signal("SIGTERM"); // It hurries.
      expect((await load.end()).code).toBe(0);
      await until(() => helpers.every(isOver) || null, 5000, "the end of helpers");
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

  test.skipIf(whyNoStrace() !== null)(
    "takes a QEMU in which a fsl died before it had handed over the state",
    async () => {
      const own = await snapshotOf(TWO_NODES);
      const otherMemory = await snapshotOf({ ...TWO_NODES, ...OTHER });
      try {
        // A block that is loaded in full, in pieces: it dies at the third.
        const onDisk = `memory-backend-file,share=on,mem-path=${DISK}`;
        // Without helpers.
        const argv = [...withNode(own.argv, "n1", onDisk), "-sandbox", "on"];
        await using run = await AttachRun.start(own, { argv });
        const before = await run.traits();
        const killed = failing("process_vm_writev:signal=SIGKILL:when=3");
        await run.attachBy(killed, otherMemory, "--paused").end();
        expect(openFiles(run.pid)).toContain("/memfd:fsl-state (deleted)");
        expect((await run.status(run.pid))?.phase).toBe("armed");
        expect(await run.traits()).not.toEqual(before);
        const { code, stderr } = await run.attach(own, "--paused").end();
        expect([code, stderr]).toEqual([0, expect.stringContaining("a dead fsl has left")]);
        expect(await differencesFromOracle(own, run)).toEqual([]);
        expect(await run.traits()).toEqual(before);
      } finally {
        rmSync(DISK, { force: true });
      }
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
  async function loadOrdinarily(run: AttachRun, memory = other): Promise<void> {
    await run.qmp.execute("stop");
    await run.qmp.setCapabilities(["mapped-ram"]);
    const from = run.qmp.events.length;
    await run.qmp.execute("migrate-incoming", { uri: `file:${memory.path}` });
    await run.qmp.waitMigrated(from);
    expect(await differencesFromOracle(memory, run)).toEqual([]);
  }

  const LIMIT = "descriptor limit of ";

  test(
    "when it has too few descriptors, however far the load came",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const reasons = new Set<string>();
      const open = run.openCount();
      for (let limit = open; ; limit += 1) {
        expect(limit).toBeLessThan(open + 30);
        await Bun.$`prlimit --pid ${run.pid} --nofile=${limit}:1024`.quiet();
        const { code, stderr } = await run.attach(snapshot, "--paused").end();
        if (code === 0) break;
        const reason = stderr.replace(/^.*?fsl: /s, "").trim();
        reasons.add(reason.startsWith(LIMIT) ? LIMIT : reason);
        expect([6, 8], stderr).toContain(code);
        expect(await run.traits()).toEqual(before);
        expect(await run.qmp.execute("query-status")).toMatchObject(inmigrate);
        // `setup` is the state of one that has begun, and cannot begin again.
        expect(await run.qmp.execute("query-migrate")).not.toHaveProperty("status");
      }
      expect(reasons.size).toBeGreaterThan(2);
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "when it has a descriptor for all but its own of the seed; the command that is told mends that",
    async () => {
      /** Sets the lowest limit at which all that fsl itself gives it has room. */
      async function refuse(run: AttachRun): Promise<string> {
        const open = run.openCount();
        // fsl leaves three there.
        for (let limit = open + 2; ; limit += 1) {
          expect(limit).toBeLessThan(open + 30);
          await Bun.$`prlimit --pid ${run.pid} --nofile=${limit}:1024`.quiet();
          const { code, stderr } = await run.attach(snapshot, "--paused").end();
          expect([6, 8], stderr).toContain(code);
          if (stderr.includes(LIMIT)) return stderr;
        }
      }
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const stderr = await refuse(run);
      expect(stderr).toMatch(
        /descriptor limit of .*: expected room for at least 8 more, found 0 \((\d+) of \1 are open\)/,
      );
      // What fsl gave it is gone again: there is room for the one descriptor that this takes.
      await expectAsItWas(run, before);
      await using mended = await AttachRun.start(snapshot);
      const [, command = ""] = /; run: (prlimit .*)$/m.exec(await refuse(mended)) ?? [];
      await Bun.$`${command.split(" ")}`.quiet();
      expect((await mended.attach(snapshot, "--paused").end()).code).toBe(0);
      expect(await differencesFromOracle(snapshot, mended)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "when it has no descriptor for the seed",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const open = run.openCount();
      for (let limit = open + 3; ; limit -= 1) {
        expect(limit).toBeGreaterThanOrEqual(open);
        await Bun.$`prlimit --pid ${run.pid} --nofile=${limit}:1024`.quiet();
        const { code, stderr } = await run.attach(snapshot, "--paused").end();
        expect(code).not.toBe(0);
        if (stderr.includes("add-fd")) break;
      }
      await Bun.$`prlimit --pid ${run.pid} --nofile=1024:1024`.quiet();
      expect(await run.traits()).toEqual(before);
      await loadOrdinarily(run);
    },
    TIMEOUT_MS,
  );

  const SHM = `/dev/shm/fsl-attach-load-${process.pid}`;
  const OLD_OR_ZERO = [0xa5, 0];
  test.each([
    ["preallocated", "memory-backend-ram,prealloc=on"],
    ["with old contents", `memory-backend-file,share=on,mem-path=${SHM}`],
  ])(
    "when a block cannot be written, after one that was %s was corrected",
    async (_, backend) => {
      const own = await snapshotOf(TWO_NODES);
      const otherMemory = await snapshotOf({ ...TWO_NODES, ...OTHER });
      writeFileSync(SHM, Buffer.alloc(32 << 20, OLD_OR_ZERO[0]));
      try {
        const onDisk = `memory-backend-file,share=on,mem-path=${DISK}`;
        const argv = withNode(withNode(own.argv, "n1", onDisk), "n0", backend);
        await using run = await AttachRun.start(own, { argv });
        const before = await run.traits();
        // Somebody takes the file away that is to be filled after it.
        const { size } = statSync(DISK);
        truncateSync(DISK, 0);
        const { code, stderr } = await run.attach(own, "--paused").end();
        truncateSync(DISK, size);
        expect(stderr).toContain(
          "32 MiB of RAM are in QEMU's memory already: filled before the guest runs",
        );
        expect(stderr).toMatch(/cannot be written: EIO.*its file was cut short/);
        expect(code).toBe(8);
        expect(await run.traits()).toEqual(before);
        // Each page is as it was, or zero again: nothing of the snapshot is left.
        expect(OLD_OR_ZERO).toEqual(expect.arrayContaining([...new Set(readFileSync(SHM))]));
        writeFileSync(SHM, Buffer.alloc(32 << 20), { flag: "r+" });
        await loadOrdinarily(run, otherMemory);
      } finally {
        for (const path of [SHM, DISK]) rmSync(path, { force: true });
      }
    },
    TIMEOUT_MS,
  );

  test.skipIf(whyNoStrace() !== null)(
    "where process_vm_writev is forbidden, as in some containers, /proc/PID/mem does",
    async () => {
      const own = await snapshotOf(TWO_NODES);
      const onDisk = `memory-backend-file,share=on,mem-path=${DISK}`;
      const argv = withNode(
        withNode(own.argv, "n1", onDisk),
        "n0",
        "memory-backend-ram,prealloc=on",
      );
      try {
        await using run = await AttachRun.start(own, { argv });
        const load = run.attachBy(failing("process_vm_writev:error=EPERM"), own, "--paused");
        const { code, stderr } = await load.end();
        expect(stderr).toContain(
          "32 MiB of RAM are in QEMU's memory already: filled before the guest runs",
        );
        expect(code).toBe(0);
        expect(await differencesFromOracle(own, run)).toEqual([]);
      } finally {
        rmSync(DISK, { force: true });
      }
    },
    TIMEOUT_MS,
  );

  /** As left by a load that was refused: everything is as before, and QEMU can be given a state. */
  async function expectAsItWas(run: AttachRun, before: QemuTraits): Promise<void> {
    expect(await run.traits()).toEqual(before);
    expect(await run.qmp.execute("query-status")).toMatchObject(inmigrate);
    using readable = new Published(other);
    await loadOrdinarily(run, { ...other, path: readable.snapshot });
  }

  /** Nothing is made in it but a userfaultfd. */
  const SANDBOX = ["-sandbox", "on"];
  const AS_ROOT = "run fsl as root, or as QEMU's user";
  /** It may make no userfaultfd: the device is needed. And it can read what everybody can. */
  const OF_NOBODY = ["-run-with", "user=nobody"];
  const UFFD = "anon_inode:[userfaultfd]";
  test
    .skipIf(!isRoot || whyNoStrace() !== null)
    .each<
      [string, readonly string[], string, string | ((pid: number) => string) | undefined, string]
    >([
      [
        "its memory cannot be opened",
        [],
        "open,openat:error=EACCES",
        (pid) => `/proc/${pid}/mem`,
        `its memory cannot be opened (EACCES); ${AS_ROOT}`,
      ],
      ["ptrace is refused", [], "ptrace:error=EPERM", undefined, "failed (EPERM); " + AS_ROOT],
      [
        "pidfd_getfd is refused",
        SANDBOX,
        "pidfd_getfd:error=EPERM",
        undefined,
        `(EPERM); ${AS_ROOT}`,
      ],
      [
        "userfaultfd is refused, and /dev/userfaultfd",
        OF_NOBODY,
        "open,openat:error=EACCES",
        "/dev/userfaultfd",
        "/dev/userfaultfd cannot be opened (EACCES); run: setfacl",
      ],
      [
        "kcmp is refused",
        OF_NOBODY,
        "kcmp:error=EPERM",
        undefined,
        `userfaultfd: kcmp in qemu-system-x86`,
      ],
      ["UFFDIO_API is refused", [], "ioctl:error=EPERM:when=1", UFFD, "UFFDIO_API: EPERM"],
      [
        "UFFDIO_REGISTER is refused",
        [],
        "ioctl:error=EPERM:when=2",
        UFFD,
        "UFFDIO_REGISTER: EPERM",
      ],
      [
        "its page map cannot be read",
        [],
        "open,openat:error=EACCES",
        (pid) => `/proc/${pid}/pagemap`,
        `pagemap cannot be read (EACCES); ${AS_ROOT}`,
      ],
    ])(
    "when %s",
    async (_, qemuArgs, calls, path, message) => {
      await using run = await AttachRun.start(snapshot, { qemuArgs });
      const before = await run.traits();
      const only = typeof path === "function" ? path(run.pid) : path;
      const load = run.attachBy(failing(calls, only), snapshot, "--paused");
      const { code, stderr } = await load.end();
      expect({ code, stderr }).toEqual({ code: 6, stderr: expect.stringContaining(message) });
      await expectAsItWas(run, before);
    },
    TIMEOUT_MS,
  );

  test.skipIf(whyNoStrace() !== null)(
    "when somebody else traces it",
    async () => {
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      await using tracer = await Tracer.attach(run.pid);
      const { code, stderr } = await run.attach(snapshot, "--paused").end();
      expect(stderr).toContain(`(EPERM); process ${tracer.pid} traces it already`);
      expect(code).toBe(6);
      await tracer.detach();
      await expectAsItWas(run, before);
    },
    TIMEOUT_MS,
  );

  test.skipIf(!isRoot)(
    "when it is root's, and fsl is not",
    async () => {
      using published = new Published(snapshot);
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const { code, stderr } = await run.attachAs(NOBODY, published).end();
      expect(stderr).toContain(`its memory cannot be opened (EACCES); ${AS_ROOT}`);
      expect(code).toBe(6);
      await expectAsItWas(run, before);
    },
    TIMEOUT_MS,
  );

  test.skipIf(!isRoot || !isUserfaultfdRefused())(
    "when it is an ordinary user's own, who then gets access to /dev/userfaultfd",
    async () => {
      using published = new Published(snapshot);
      const { argv } = published;
      await using run = await AttachRun.start(snapshot, { argv, uid: NOBODY });
      const before = await run.traits();
      const { code, stderr } = await run.attachAs(NOBODY, published).end();
      expect(stderr).toContain("/dev/userfaultfd cannot be opened (EACCES); run: setfacl");
      expect(code).toBe(6);
      expect(await run.traits()).toEqual(before);
      const device = await published.withDevice();
      expect((await run.attachAs(NOBODY, published, device).end()).code).toBe(0);
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
      expect(await run.traits()).toEqual(before);
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
