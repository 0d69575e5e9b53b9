/**
 * Memory that runs out while a guest is loaded: a tmpfs that is too small for its RAM, a control
 * group's limit. Huge pages: huge-pages.test.ts.
 */
import { describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, mkdtempSync, rmdirSync, statfsSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { PHASE_RUNNING } from "../../src/load/state.ts";
import { FaultRun } from "../helpers/fault-runs.ts";
import {
  type GuestSnapshot,
  snapshotOf,
  type SnapshotSpec,
  whyNoGuests,
} from "../helpers/guests.ts";
import { differencesFromOracle, differencesOfBareGuest } from "../helpers/load-oracle.ts";
import { until, whyNoExecutable } from "../helpers/load-runs.ts";
import { withArgument } from "../helpers/matrix-guests.ts";

const TIMEOUT_MS = 60_000;
const MIB = 1 << 20;
const reason =
  whyNoExecutable() ?? whyNoGuests() ?? (process.getuid?.() === 0 ? null : "mount needs root");
const RAM: SnapshotSpec = { guest: "bare", memoryBackend: "memory-backend-ram" };

/** A tmpfs of its own. */
class Tmpfs implements AsyncDisposable {
  readonly directory = mkdtempSync(join(tmpdir(), "fsl-fault-memory-"));
  readonly ram = join(this.directory, "ram");

  static async mount(size: string): Promise<Tmpfs> {
    const tmpfs = new Tmpfs();
    await Bun.$`mount -t tmpfs -o size=${size} tmpfs ${tmpfs.directory}`.quiet();
    return tmpfs;
  }

  async resize(size: string | number): Promise<void> {
    await Bun.$`mount -o remount,size=${size} ${this.directory}`.quiet();
  }

  get usedBytes(): number {
    const { blocks, bfree, bsize } = statfsSync(this.directory);
    return (blocks - bfree) * bsize;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Bun.$`umount --lazy ${this.directory}`.quiet();
    rmdirSync(this.directory);
  }
}

/** The guest's RAM is a file there. */
function loadInto(
  { ram }: Tmpfs,
  snapshot: GuestSnapshot,
  flags: readonly string[] = [],
): Promise<FaultRun> {
  const backend = `memory-backend-file,share=on,mem-path=${ram}`;
  const argv = withArgument(snapshot.argv, "memory-backend-ram", backend);
  return FaultRun.start(snapshot, { argv, flags });
}

const NO_MEMORY = /RAMBlock ram0: page \d+ .*the host has no memory for it/;

describe.skipIf(reason !== null)("a tmpfs that is too small for the guest's RAM", () => {
  test(
    "is waited for: when it is bigger the load comes to its end, every byte right",
    async () => {
      const snapshot = await snapshotOf(RAM);
      await using tmpfs = await Tmpfs.mount("20m");
      await using run = await loadInto(tmpfs, snapshot, ["--paused"]);
      await run.fsl.stderr.waitFor(NO_MEMORY);
      expect(await run.status()).toMatchObject({ served: true, phase: "running" });
      expect(run.fsl.stderr.text).not.toMatch(/all RAM in after/);
      await tmpfs.resize("100m");
      await run.fsl.stderr.waitFor(/all RAM in after/);
      const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
      expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "is waited for while the guest runs: its vCPU waits, then every byte is right",
    async () => {
      const snapshot = await snapshotOf(RAM);
      await using tmpfs = await Tmpfs.mount("20m");
      await using run = await loadInto(tmpfs, snapshot);
      await run.fsl.stderr.waitFor(/no memory for it.*the vCPU that needs it waits/);
      await tmpfs.resize("100m");
      await run.fsl.stderr.waitFor(/all RAM in after/);
      const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
      expect(await differencesOfBareGuest(snapshot, qemu)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "after the load, for memory that was zero: QEMU dies of SIGBUS as without fsl, which is said",
    async () => {
      const snapshot = await snapshotOf({ ...RAM, guest: "linux" });
      await using tmpfs = await Tmpfs.mount("300m");
      await using run = await loadInto(tmpfs, snapshot);
      await run.fsl.stderr.waitFor(/all RAM in after/);
      await tmpfs.resize(tmpfs.usedBytes);
      run.serial.send("fill 96\n");
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain(
        "QEMU died of SIGBUS: the host had no page for its memory (huge pages or a tmpfs have run out)",
      );
      expect(code).toBe(135);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );
});

/** Where control groups with a limit of memory can be made, and what the limit is called there. */
const GROUPS = [
  { root: "/sys/fs/cgroup", sign: "memory.max", limit: "memory.max", swap: "memory.swap.max" },
  {
    root: "/sys/fs/cgroup/memory",
    sign: "memory.limit_in_bytes",
    limit: "memory.limit_in_bytes",
    swap: "memory.memsw.limit_in_bytes",
  },
];

/** A control group; its processes must have ended when it is disposed of. */
class MemoryGroup implements AsyncDisposable {
  readonly #directory: string;

  private constructor(directory: string) {
    this.#directory = directory;
  }

  /** Null where there can be none. */
  static make(bytes: number): MemoryGroup | null {
    for (const { root, sign, limit, swap } of GROUPS) {
      const directory = join(root, `fsl-test-${process.pid}`);
      try {
        mkdirSync(directory);
      } catch {
        continue;
      }
      if (existsSync(join(directory, sign))) {
        writeFileSync(join(directory, limit), String(bytes));
        const swapFile = join(directory, swap);
        if (existsSync(swapFile)) {
          writeFileSync(swapFile, swap === "memory.swap.max" ? "0" : String(bytes));
        }
        return new MemoryGroup(directory);
      }
      rmdirSync(directory);
    }
    return null;
  }

  add(pid: number): void {
    writeFileSync(join(this.#directory, "cgroup.procs"), String(pid));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const remove = (): true | null => {
      try {
        rmdirSync(this.#directory);
        return true;
      } catch {
        return null; // A process of it is still ending.
      }
    };
    await until(remove, 10_000, "the end of a control group");
  }
}

const probe = reason === null ? MemoryGroup.make(MIB) : null;
await probe?.[Symbol.asyncDispose]();

describe.skipIf(probe === null)("a control group's limit of memory", () => {
  test(
    "is exceeded by the guest's RAM: the kernel kills QEMU, fsl ends as it did",
    async () => {
      const snapshot = await snapshotOf({ guest: "bare" });
      await using group = MemoryGroup.make(16 * MIB);
      await using run = await FaultRun.start(snapshot, { flags: ["--eager-rate", "8M"] });
      await run.reached(PHASE_RUNNING);
      group?.add(await run.qemuPid());
      const { code, stderr } = await run.fsl.end();
      expect(stderr).toContain("QEMU ended before all RAM was in");
      expect(code).toBe(137);
      expect(run.serial.lines.filter(({ text }) => text.includes("BAD"))).toEqual([]);
      expect(await run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );
});
