/**
 * The snapshot is deleted, replaced, unmounted, truncated or written to while pages are taken from
 * it.
 */
import { describe, expect, test } from "bun:test";
import {
  chownSync,
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  closeSync,
  renameSync,
  rmSync,
  statSync,
  truncateSync,
  unlinkSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { PHASE_ARMED, PHASE_RUNNING } from "../../src/load/state.ts";
import { testBit } from "../../src/bits.ts";
import { SnapshotGuard } from "../../src/load/guard.ts";
import { openSnapshot } from "../../src/snapshot/snapshot.ts";
import { O_NONBLOCK, O_WRONLY } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import {
  biggestOf,
  FaultRun,
  openLoadState,
  PresentPages,
  someoneWaits,
} from "../helpers/fault-runs.ts";
import { type GuestSnapshot, snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import {
  BARE_OWN_PAGES,
  differencesFromOracle,
  differencesOfBareGuest,
  oracleMemory,
} from "../helpers/load-oracle.ts";
import { until, whyNoExecutable, within } from "../helpers/load-runs.ts";

const TIMEOUT_MS = 120_000;
const reason = whyNoExecutable() ?? whyNoGuests();
/**
 * Slow enough that the load is going on when something is done to the file, for as long as a test
 * takes.
 */
const SLOW = ["--eager-rate", "1M"];
/** fsl may not have a lease on somebody else's file then: it has to look. */
const NO_LEASE = ["setpriv", "--bounding-set", "-lease", "--inh-caps", "-lease", "--"];

/** A copy of a snapshot that may be spoilt. */
class Spoilt implements Disposable {
  readonly directory = mkdtempSync(join(tmpdir(), "fsl-fault-file-"));
  readonly path = join(this.directory, "guest.snap");
  readonly snapshot: GuestSnapshot;

  constructor(snapshot: GuestSnapshot) {
    this.snapshot = snapshot;
    copyFileSync(snapshot.path, this.path);
  }

  [Symbol.dispose](): void {
    rmSync(this.directory, { recursive: true, force: true });
  }
}

/** Goes on as fast as it can from here on, by another fsl, and compares all memory. */
async function expectWholeGuest(run: FaultRun, snapshot: GuestSnapshot): Promise<void> {
  const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
  expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
}

/** What the running bare guest has of its RAM is right; what never came is missing, not zero. */
async function expectRightOrMissing(pid: number, snapshot: GuestSnapshot): Promise<void> {
  const oracle = await oracleMemory(snapshot);
  const state = openLoadState(pid);
  if (state === null) throw new Error("no load state");
  const ram = biggestOf(state.blocks);
  const expected = oracle.get(ram.block.idstr)?.hashes;
  const before = Int32Array.from(ram.done);
  using memory = new PresentPages(pid, ram);
  const [wrong, lost, present]: [number[], number[], number[]] = [[], [], []];
  let missing = 0;
  for (let page = BARE_OWN_PAGES; page < ram.pageCount; page += 1) {
    const hash = memory.hash(page);
    if (hash !== null && hash !== expected?.[page]) wrong.push(page);
    if (!testBit(ram.data, page)) continue;
    if (hash !== null) present.push(page);
    else if (testBit(before, page)) lost.push(page);
    else missing += 1;
  }
  expect({ wrong, lost }).toEqual({ wrong: [], lost: [] });
  expect(present.length).toBeGreaterThan(0);
  expect(missing).toBeGreaterThan(0);
  // A page is in a moment before its bit is set.
  const areDone = (): true | null =>
    present.every((page) => testBit(ram.done, page)) ? true : null;
  await until(areDone, 5000, "the bits of all pages that are in");
  state.unmap();
}

async function shell(...argv: string[]): Promise<void> {
  const child = Bun.spawn(argv, { stdout: "ignore", stderr: "pipe" });
  if ((await child.exited) !== 0) throw new Error(await new Response(child.stderr).text());
}

/** More than a guest gets through before it is noticed, within 0.1 s, that the file's end was changed. */
const LARGE = { guest: "bare", memoryMiB: 384 } as const;

describe.skipIf(reason !== null)("the snapshot while it is loaded", () => {
  test(
    "is deleted: no harm",
    async () => {
      using file = new Spoilt(await snapshotOf({ guest: "bare" }));
      await using run = await FaultRun.start(file.snapshot, {
        path: file.path,
        flags: ["--paused", "--eager-rate", "30M"],
      });
      await run.reached(PHASE_RUNNING);
      unlinkSync(file.path);
      await run.fsl.stderr.waitFor(/all RAM in after/);
      await expectWholeGuest(run, file.snapshot);
    },
    TIMEOUT_MS,
  );

  test(
    "is replaced by another file: no harm",
    async () => {
      using file = new Spoilt(await snapshotOf({ guest: "bare" }));
      await using run = await FaultRun.start(file.snapshot, {
        path: file.path,
        flags: ["--paused", "--eager-rate", "30M"],
      });
      await run.reached(PHASE_RUNNING);
      writeFileSync(`${file.path}.new`, "something else");
      renameSync(`${file.path}.new`, file.path);
      await run.fsl.stderr.waitFor(/all RAM in after/);
      await expectWholeGuest(run, file.snapshot);
    },
    TIMEOUT_MS,
  );

  test.skipIf(process.getuid?.() !== 0)(
    "has its file system unmounted lazily: no harm",
    async () => {
      using file = new Spoilt(await snapshotOf({ guest: "bare" }));
      const mount = join(file.directory, "mount");
      mkdirSync(mount);
      await shell("mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", mount);
      let isMounted = true;
      try {
        copyFileSync(file.path, join(mount, "guest.snap"));
        await using run = await FaultRun.start(file.snapshot, {
          path: join(mount, "guest.snap"),
          flags: ["--paused", "--eager-rate", "30M"],
        });
        await run.reached(PHASE_RUNNING);
        await shell("umount", "--lazy", mount);
        isMounted = false;
        await run.fsl.stderr.waitFor(/all RAM in after/);
        await expectWholeGuest(run, file.snapshot);
      } finally {
        if (isMounted) await shell("umount", "--lazy", mount);
      }
    },
    TIMEOUT_MS,
  );

  test(
    "is to be truncated, with a lease: that waits until all RAM is in, which is hurried",
    async () => {
      using file = new Spoilt(await snapshotOf({ guest: "bare" }));
      const { size } = statSync(file.path);
      await using run = await FaultRun.start(file.snapshot, {
        path: file.path,
        flags: ["--paused", ...SLOW],
      });
      await run.reached(PHASE_RUNNING);
      await run.reached(PHASE_RUNNING);
      // Does not wait, and is refused.
      await expect(shell("truncate", "--size", "0", file.path)).rejects.toThrow(
        "temporarily unavailable",
      );
      const truncating = shell("sh", "-c", ': >"$0"', file.path);
      await run.fsl.stderr.waitFor(/another process wants to write to it and is kept waiting/);
      await run.fsl.stderr.waitFor(/all RAM in after/);
      await within(truncating, 10_000, "the truncation");
      expect(statSync(file.path).size).toBeLessThan(size);
      await expectWholeGuest(run, file.snapshot);
      expect(run.fsl.stderr.text).not.toContain("no page is taken from it");
    },
    TIMEOUT_MS,
  );

  test(
    "is open for writing already: refused before anything has happened",
    async () => {
      using file = new Spoilt(await snapshotOf({ guest: "bare" }));
      const fd = openSync(file.path, "r+");
      try {
        await using run = await FaultRun.start(file.snapshot, { path: file.path });
        const { code, stderr } = await run.fsl.end();
        expect(stderr).toContain(`${file.path}: another process has it open for writing`);
        expect(code).toBe(3);
        expect(await run.leftovers()).toEqual([]);
      } finally {
        closeSync(fd);
      }
    },
    TIMEOUT_MS,
  );

  test.each([
    [
      "truncated",
      (path: string) => truncateSync(path, 20 << 20),
      /it was truncated from \d+ to 20971520 bytes/,
    ],
    [
      "truncated to nothing",
      (path: string) => truncateSync(path, 0),
      /it was truncated from \d+ to 0 bytes/,
    ],
    ["written to", overwrite, /it was written to/],
  ])(
    "is %s, without a lease: noticed, no page is taken any more, the guest waits",
    async (_, spoil, message) => {
      using file = new Spoilt(await snapshotOf(LARGE));
      chownSync(file.path, 65_534, 65_534);
      await using run = await FaultRun.start(file.snapshot, {
        path: file.path,
        flags: [...SLOW, "--grace-ms", "300"],
        prefix: NO_LEASE,
      });
      const pid = await run.qemuPid();
      await run.serial.waitFor(/^beat /);
      spoil(file.path);
      await run.fsl.stderr.waitFor(message);
      await run.fsl.stderr.waitFor(/no page is taken from it any more/);
      await run.fsl.stderr.waitFor(/end QEMU, and load again from an intact copy/);
      expect(run.serial.lines.filter(({ text }) => text.startsWith("tick"))).toEqual([]);
      await expectRightOrMissing(pid, file.snapshot);
      expect(await run.status()).toMatchObject({ pid, served: true });
      run.fsl.signal("SIGTERM");
      const { code, stderr } = await run.fsl.end();
      expect(stderr).not.toContain("all RAM in after");
      expect(code).toBe(9);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "is written to before the state is handed over, without a lease: nothing is handed over",
    async () => {
      using file = new Spoilt(await snapshotOf(LARGE));
      chownSync(file.path, 65_534, 65_534);
      // All of it is filled before that, which takes a while.
      const backend = `memory-backend-file,id=pc.ram,size=384M,share=on,mem-path=${file.path}.ram`;
      const memory = ["-machine", "memory-backend=pc.ram", "-object", backend];
      await using run = await FaultRun.start(file.snapshot, {
        path: file.path,
        argv: [...file.snapshot.argv, ...memory],
        prefix: NO_LEASE,
      });
      await run.reached(PHASE_ARMED);
      overwrite(file.path);
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain(`${file.path}: it was written to; load again from an intact copy`);
      expect(stderr).not.toContain("no page is taken from it any more");
      expect(code).toBe(3);
      expect(run.serial.lines).toEqual([]);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "is written to while QEMU loads it itself (--mode copy), without a lease: the guest never runs",
    async () => {
      using file = new Spoilt(await snapshotOf(LARGE));
      chownSync(file.path, 65_534, 65_534);
      await using run = await FaultRun.start(file.snapshot, {
        path: file.path,
        flags: ["--mode", "copy"],
        prefix: NO_LEASE,
      });
      const pid = await run.qemuPid();
      await run.qmp.ready;
      process.kill(pid, "SIGSTOP");
      overwrite(file.path);
      process.kill(pid, "SIGCONT");
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain(`${file.path}: it was written to; load again from an intact copy`);
      expect(code).toBe(3);
      expect(run.serial.lines).toEqual([]);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "is written to, with --on-error kill: QEMU is killed at once",
    async () => {
      using file = new Spoilt(await snapshotOf({ guest: "bare" }));
      chownSync(file.path, 65_534, 65_534);
      await using run = await FaultRun.start(file.snapshot, {
        path: file.path,
        flags: [...SLOW, "--on-error", "kill"],
        prefix: NO_LEASE,
      });
      await run.serial.waitFor(/^beat /);
      overwrite(file.path);
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain("is killed: its snapshot was changed");
      expect(code).toBe(9);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "is written to after fsl was killed: fsl resume refuses it, and takes an intact copy",
    async () => {
      const snapshot = await snapshotOf({ guest: "bare" });
      using file = new Spoilt(snapshot);
      await shell("cp", "--preserve=timestamps", snapshot.path, file.path);
      await shell("cp", "--preserve=timestamps", snapshot.path, `${file.path}.copy`);
      await using run = await FaultRun.start(snapshot, { path: file.path, flags: SLOW });
      const pid = await run.qemuPid();
      await run.serial.waitFor(/^beat /);
      await run.fsl.kill();
      overwrite(file.path);
      const refused = await (await run.resume()).end();
      expect(refused.stderr).toContain("found another or changed file");
      expect(refused.code).toBe(7);
      await someoneWaits(pid);
      const resumed = await run.resume("--snapshot", `${file.path}.copy`);
      expect((await resumed.end()).code).toBe(0);
      expect(await differencesOfBareGuest(snapshot, { pid, qmp: run.qmp })).toEqual([]);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(whyNoGuests() !== null)("SnapshotGuard", () => {
  /** What the guard says, in order, and waits for it. */
  function listen(guard: SnapshotGuard): {
    told: string[];
    next: (what: string) => Promise<unknown>;
  } {
    const told: string[] = [];
    guard.listen({
      onWriter: () => told.push("writer"),
      onHold: (isHeld) => told.push(isHeld ? "held" : "released"),
      onChanged: (why, isTooLate) => told.push(`changed: ${why}${isTooLate ? ", too late" : ""}`),
    });
    const next = (what: string) => until(() => (told.includes(what) ? true : null), 5000, what);
    return { told, next };
  }

  test(
    "goes on when the one who wanted to write has gone away",
    async () => {
      using file = new Spoilt(await snapshotOf({ guest: "bare" }));
      using snapshot = openSnapshot(file.path);
      const guard = new SnapshotGuard(snapshot, 800);
      expect(guard.isLeased).toBe(true);
      const { told, next } = listen(guard);
      expect(sys.errnoName(sys.open(file.path, O_WRONLY | O_NONBLOCK, 0))).toBe("EAGAIN");
      await next("released");
      expect(told).toEqual(["writer", "held", "released"]);
      expect(guard.isLeased).toBe(true);
      expect(guard.look()).toBe(true);
      guard.close();
      closeSync(openSync(file.path, "r+"));
    },
    TIMEOUT_MS,
  );

  test(
    "lets the one who waits in when the time is over, and says that before",
    async () => {
      using file = new Spoilt(await snapshotOf({ guest: "bare" }));
      using snapshot = openSnapshot(file.path);
      const guard = new SnapshotGuard(snapshot, 800);
      const { told, next } = listen(guard);
      const writing = shell("sh", "-c", ': >"$0"', file.path);
      const change = "changed: another process waited to write to it, and was let in";
      await until(() => (told.length === 3 ? true : null), 5000, "the change");
      expect(told.slice(0, 2)).toEqual(["writer", "held"]);
      expect(told[2]).toBeOneOf([
        change,
        "changed: it was truncated from " + snapshot.identity.size + " to 0 bytes",
      ]);
      await next(told[2] ?? "");
      await within(writing, 5000, "the writer");
      expect(guard.look()).toBe(false);
      expect(guard.isTooLate).toBe(false);
      guard.close();
    },
    TIMEOUT_MS,
  );
});

/** Other bytes of the same length in the whole second half. */
function overwrite(path: string): void {
  const { size } = statSync(path);
  const fd = openSync(path, "r+");
  writeSync(fd, Buffer.alloc(1 << 20, 0xa5), 0, 1 << 20, size - (8 << 20));
  closeSync(fd);
}
