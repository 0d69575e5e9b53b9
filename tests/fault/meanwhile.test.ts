/** What people do with a guest while its RAM still comes in: all of it is served right. */
import { describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { testBit } from "../../src/bits.ts";
import { PHASE_RUNNING } from "../../src/load/state.ts";
import { biggestOf, FaultRun, openLoadState, PresentPages } from "../helpers/fault-runs.ts";
import { gdb, whyNoGdb } from "../helpers/gdb.ts";
import {
  ordinaryLoad,
  type QmpClient,
  snapshotOf,
  type SnapshotSpec,
  startQemu,
  whyNoGuests,
} from "../helpers/guests.ts";
import { differencesFromOracle, oracleMemory } from "../helpers/load-oracle.ts";
import { whyNoExecutable, within } from "../helpers/load-runs.ts";
import { Tracer, whyNoStrace } from "../helpers/strace.ts";

const TIMEOUT_MS = 120_000;
const reason = whyNoExecutable() ?? whyNoGuests();
const SLOW = ["--eager-rate", "256K"];
const MIB = 1 << 20;
const PAGE = 4096;

class Directory implements Disposable {
  readonly path = mkdtempSync(join(tmpdir(), "fsl-fault-meanwhile-"));
  file(name: string): string {
    return join(this.path, name);
  }
  [Symbol.dispose](): void {
    rmSync(this.path, { recursive: true, force: true });
  }
}

/** A guest whose RAM hardly comes in by itself. */
async function loading(spec: SnapshotSpec, flags: readonly string[] = []): Promise<FaultRun> {
  const run = await FaultRun.start(await snapshotOf(spec), { flags: [...SLOW, ...flags] });
  await run.reached(PHASE_RUNNING);
  return run;
}

async function expectRightData(run: FaultRun, spec: SnapshotSpec): Promise<void> {
  const { checksum } = await snapshotOf(spec);
  const [verdict, , found] = await run.serial.command("sum");
  expect([verdict, found]).toEqual(["ok", checksum]);
  expect((await run.serial.command("verify"))[0]).toBe("ok");
}

/** The load was going on all the while. */
async function expectStillLoading(run: FaultRun): Promise<void> {
  expect(await run.status()).toMatchObject({ served: true, phase: "running" });
}

/** A file's pages as the oracle has them. */
function hashesOf(path: string): BigUint64Array {
  const bytes = readFileSync(path);
  return BigUint64Array.from({ length: Math.ceil(bytes.length / PAGE) }, (_, page) =>
    Bun.hash.wyhash(bytes.subarray(page * PAGE, (page + 1) * PAGE)),
  );
}

describe.skipIf(reason !== null)("while RAM comes in", () => {
  test(
    "stop and cont",
    async () => {
      await using run = await loading({});
      for (let round = 0; round < 3; round += 1) {
        await run.qmp.execute("stop");
        expect(await run.qmp.execute<object>("query-status")).toMatchObject({ running: false });
        await run.qmp.execute("cont");
        await run.serial.waitForNext(/^tick /);
      }
      await expectStillLoading(run);
      await expectRightData(run, {});
    },
    TIMEOUT_MS,
  );

  test(
    "pmemsave: the file has the snapshot's memory",
    async () => {
      using directory = new Directory();
      const snapshot = await snapshotOf({ guest: "bare" });
      await using run = await loading({ guest: "bare" }, ["--paused"]);
      const [ours, theirs] = [directory.file("ours"), directory.file("theirs")];
      const range = { val: 0, size: 64 * MIB };
      await expectStillLoading(run);
      await run.qmp.execute("pmemsave", { ...range, filename: ours });
      const { qemu } = await ordinaryLoad(snapshot, { paused: true });
      await using _ = qemu;
      await qemu.qmp.execute("pmemsave", { ...range, filename: theirs });
      expect(readFileSync(ours).equals(readFileSync(theirs))).toBe(true);
    },
    TIMEOUT_MS,
  );

  test(
    "dump-guest-memory: the dump has the snapshot's memory",
    async () => {
      using directory = new Directory();
      const snapshot = await snapshotOf({ guest: "bare" });
      await using run = await loading({ guest: "bare" }, ["--paused"]);
      const { qemu } = await ordinaryLoad(snapshot, { paused: true });
      await using _ = qemu;
      const dumps: Buffer[] = [];
      for (const qmp of [run.qmp, qemu.qmp]) {
        const path = directory.file(`dump-${dumps.length}`);
        await qmp.execute("dump-guest-memory", { paging: false, protocol: `file:${path}` });
        dumps.push(readFileSync(path));
      }
      expect(dumps[0]?.length).toBeGreaterThan(64 * MIB);
      expect(dumps[0]?.equals(dumps[1] ?? Buffer.alloc(0))).toBe(true);
    },
    TIMEOUT_MS,
  );

  test(
    "another migration to a file: QEMU's own load of it has the snapshot's memory",
    async () => {
      using directory = new Directory();
      const snapshot = await snapshotOf({ guest: "bare" });
      await using run = await loading({ guest: "bare" }, ["--paused"]);
      const path = directory.file("again.snap");
      await run.qmp.setCapabilities(["mapped-ram"]);
      await run.qmp.execute("migrate-set-parameters", { "max-bandwidth": 0 });
      const from = run.qmp.events.length;
      await run.qmp.execute("migrate", { uri: `file:${path}` });
      await run.qmp.waitMigrated(from);
      expect(statSync(path).size).toBeGreaterThan(32 * MIB);
      const { qemu } = await ordinaryLoad({ path, argv: snapshot.argv }, { paused: true });
      await using _ = qemu;
      expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "a migration to another host: the guest there has the right data",
    async () => {
      using directory = new Directory();
      const { argv, checksum } = await snapshotOf({});
      await using run = await loading({});
      await run.serial.waitFor(/^tick /);
      await expectStillLoading(run);
      await using there = await startQemu([...argv, "-incoming", "defer"]);
      const uri = `unix:${directory.file("migration")}`;
      await there.qmp.execute("migrate-incoming", { uri });
      await run.qmp.setCapabilities([]);
      const from = run.qmp.events.length;
      await run.qmp.execute("migrate", { uri });
      await run.qmp.waitMigrated(from);
      const [verdict, , found] = await there.serial.command("sum");
      expect([verdict, found]).toEqual(["ok", checksum]);
      expect((await there.serial.command("verify"))[0]).toBe("ok");
    },
    TIMEOUT_MS,
  );

  /** Waits for the end of a job; rejects with its error. */
  async function concluded(qmp: QmpClient, id: string): Promise<void> {
    await qmp.waitEvent("JOB_STATUS_CHANGE", (job) => job.id === id && job.status === "concluded");
    const jobs = await qmp.execute<{ id: string; error?: string }[]>("query-jobs");
    expect(jobs.find((job) => job.id === id)?.error).toBeUndefined();
  }

  // In place, so that the command line of source and destination is the same.
  const image = join(tmpdir(), "fsl-fault-guest-disk.qcow2");
  const devices = { vmstate: "image0", devices: ["image0"] };
  test
    .skipIf(Bun.which("qemu-img") === null)
    .each<[string, (qmp: QmpClient) => Promise<void>, (qmp: QmpClient) => Promise<void>]>([
      [
        "savevm",
        async (qmp) => expect(await qmp.hmp("savevm inside")).toBe(""),
        async (qmp) => expect(await qmp.hmp("loadvm inside")).toBe(""),
      ],
      [
        "snapshot-save",
        async (qmp) => {
          await qmp.execute("snapshot-save", { "job-id": "save", tag: "inside", ...devices });
          await concluded(qmp, "save");
        },
        async (qmp) => {
          await qmp.execute("snapshot-load", { "job-id": "load", tag: "inside", ...devices });
          await concluded(qmp, "load");
        },
      ],
    ])(
    "%s into a qcow2 disk: a fresh QEMU's own load of it has the right data",
    async (_, save, load) => {
      const create = ["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"];
      try {
        expect(Bun.spawnSync(create).exitCode).toBe(0);
        const file = `driver=file,filename=${image},node-name=file0`;
        const blockdevs = [
          "-blockdev",
          file,
          "-blockdev",
          "driver=qcow2,file=file0,node-name=image0",
        ];
        const spec = { extraArgs: [...blockdevs, "-device", "virtio-blk-pci,drive=image0"] };
        const { argv, checksum } = await snapshotOf(spec);
        await using run = await loading(spec);
        await run.serial.waitFor(/^tick /);
        await expectStillLoading(run);
        await save(run.qmp);
        await expectRightData(run, spec);
        await run.qmp.execute("quit");
        expect(await within(run.fsl.exited, 10_000, "the end")).toBe(0);
        await using fresh = await startQemu([...argv, "-S"]);
        await load(fresh.qmp);
        await fresh.qmp.execute("cont");
        const [verdict, , found] = await fresh.serial.command("sum");
        expect([verdict, found]).toEqual(["ok", checksum]);
        expect((await fresh.serial.command("verify"))[0]).toBe("ok");
      } finally {
        rmSync(image, { force: true });
      }
    },
    TIMEOUT_MS,
  );

  test.skipIf(whyNoGdb() !== null)(
    "gdb attached and detached again, with vCPUs that wait for pages",
    async () => {
      const spec = { smp: 2 };
      await using run = await loading(spec);
      await run.serial.waitFor(/^tick /);
      const pid = String(await run.qemuPid());
      const sum = run.serial.waitForNext(/^SUM /, 60_000);
      run.serial.send("sum 2\n");
      for (let round = 0; round < 3; round += 1) {
        const { code, stdout } = await gdb(["-p", pid], ["info threads", "detach"]);
        expect(stdout).toMatch(/^\* 1 +Thread /m);
        expect(stdout).toContain("detached]");
        expect(code).toBe(0);
      }
      await expectStillLoading(run);
      const { checksum } = await snapshotOf(spec);
      const [, verdict, , found] = (await sum).text.split(" ");
      expect([verdict, found]).toEqual(["ok", checksum]);
      await expectRightData(run, spec);
    },
    TIMEOUT_MS,
  );

  test.skipIf(whyNoGdb() !== null)(
    "gdb reads RAM: what is missing is refused by the kernel, never zero; then every byte is right",
    async () => {
      using directory = new Directory();
      const snapshot = await snapshotOf({ guest: "bare" });
      await using run = await FaultRun.start(snapshot, {
        flags: ["--paused", "--eager-rate", "8M"],
      });
      await run.reached(PHASE_RUNNING);
      const pid = await run.qemuPid();
      const state = openLoadState(pid);
      if (state === null) throw new Error("no load state");
      const { block, data, done, pageCount } = biggestOf(state.blocks);
      const isMissing = (page: number): boolean => testBit(data, page) && !testBit(done, page);
      const addressOf = (page: number): number => block.hostAddr + page * PAGE;
      const dump = (path: string, start: number, end: number): string =>
        `dump binary memory ${path} ${addressOf(start)} ${addressOf(end)}`;
      const expected = (await oracleMemory(snapshot)).get(block.idstr)?.hashes;

      // The eager load comes to the middle last.
      const middle = Math.floor(pageCount * 0.6);
      const pages = Array.from({ length: 8 }, (_, i) => middle - i * 64).filter(isMissing);
      expect(pages.length).toBeGreaterThan(0);
      const path = (page: number): string => directory.file(`page-${page}`);
      const commands = pages.map((page) => dump(path(page), page, page + 1));
      const { stderr } = await gdb(["-p", String(pid)], [...commands, "detach"]);
      const stillMissing = pages.filter(isMissing);
      state.unmap();
      expect(stillMissing.length).toBeGreaterThan(0);
      for (const page of stillMissing)
        expect(stderr).toContain(
          `Cannot access memory at address 0x${addressOf(page).toString(16)}`,
        );
      for (const page of pages) {
        if (existsSync(path(page))) expect(hashesOf(path(page))[0]).toBe(expected?.[page]);
      }

      await run.fsl.stderr.waitFor(/all RAM in after/, 60_000);
      const whole = directory.file("whole");
      expect((await gdb(["-p", String(pid)], [dump(whole, 0, pageCount), "detach"])).code).toBe(0);
      const found = hashesOf(whole);
      expect(found.length).toBe(pageCount);
      expect(found.findIndex((hash, page) => hash !== expected?.[page])).toBe(-1);
      expect(await differencesFromOracle(snapshot, { pid, qmp: run.qmp })).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test.skipIf(whyNoGdb() !== null)(
    "gdb connected to QEMU's own stub reads RAM that is missing",
    async () => {
      using directory = new Directory();
      const snapshot = await snapshotOf({ guest: "bare" });
      await using run = await loading({ guest: "bare" }, ["--paused"]);
      const [stub, ours, theirs] = ["stub", "ours", "theirs"].map((name) => directory.file(name));
      await run.qmp.ready;
      await run.qmp.hmp(`gdbserver unix:${stub},server=on,wait=off`);
      const [start, length] = [16 * MIB, 8 * MIB];
      const dump = `dump binary memory ${ours} ${start} ${start + length}`;
      await expectStillLoading(run);
      const { code, stderr } = await gdb([], [`target remote ${stub}`, dump, "detach"]);
      expect(stderr).not.toContain("Cannot access memory");
      expect(code).toBe(0);
      await expectStillLoading(run);
      const { qemu } = await ordinaryLoad(snapshot, { paused: true });
      await using _ = qemu;
      await qemu.qmp.execute("pmemsave", { val: start, size: length, filename: theirs });
      expect(readFileSync(ours ?? "").equals(readFileSync(theirs ?? ""))).toBe(true);
      // The stub lets the guest run when gdb leaves.
      await run.serial.waitForNext(/^tick \d+ ok/);
      expect(run.serial.lines.filter(({ text }) => text.includes("BAD"))).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test.skipIf(whyNoStrace() !== null)(
    "strace attached and detached again",
    async () => {
      await using run = await loading({});
      await run.serial.waitFor(/^tick /);
      const sum = run.serial.command("sum");
      for (let round = 0; round < 3; round += 1) {
        const tracer = await Tracer.attach(await run.qemuPid());
        expect(await tracer.detach()).toContain("detached");
      }
      const { checksum } = await snapshotOf({});
      const [verdict, , found] = await sum;
      expect([verdict, found]).toEqual(["ok", checksum]);
      await expectRightData(run, {});
    },
    TIMEOUT_MS,
  );

  const disk = join(tmpdir(), "fsl-fault-guest-disk.img");
  const words = "what the disk has ";
  const pattern = Buffer.alloc(24 * MIB, words);
  const pagesOfPattern = new Set(
    Array.from(words, (_, at) => Bun.hash.wyhash(pattern.subarray(at, at + PAGE))),
  );
  const md5 = new Bun.CryptoHasher("md5").update(pattern).digest("hex");
  test.each(["native", "io_uring", "threads"])(
    "a disk with aio=%s and cache=none reads into RAM that is missing",
    async (aio) => {
      // In place, so that the command line of source and destination is the same.
      writeFileSync(disk, pattern);
      try {
        const drive = `file=${disk},if=none,id=disk0,format=raw,cache=none,aio=${aio}`;
        const spec = {
          extraArgs: ["-drive", drive, "-device", "virtio-blk-pci,drive=disk0"],
          // Most of the free memory, into which the disk is read, has bytes in the snapshot.
          commands: ["fill 96", "free 96"],
        };
        await using run = await loading(spec);
        await run.serial.waitFor(/^tick /);
        const pid = await run.qemuPid();
        const state = openLoadState(pid);
        if (state === null) throw new Error("no load state");
        const ram = biggestOf(state.blocks);
        const before = Int32Array.from(ram.done);
        run.serial.send("shell\n");
        const line = run.serial.waitForNext(/^[0-9a-f]{32} {2}\/dev\/vda/, 60_000);
        run.serial.send("md5sum /dev/vda\n");
        expect((await line).text.slice(0, 32)).toBe(md5);
        using memory = new PresentPages(pid, ram);
        let readIntoMissing = 0;
        for (let page = 0; page < ram.pageCount; page += 1) {
          if (!testBit(ram.data, page) || testBit(before, page)) continue;
          if (pagesOfPattern.has(memory.hash(page) ?? 0n)) readIntoMissing += 1;
        }
        state.unmap();
        expect(readIntoMissing).toBeGreaterThan(pattern.length / PAGE / 2);
        run.serial.send("exit\n");
        await run.serial.waitForNext(/^tick /);
        await expectStillLoading(run);
        await expectRightData(run, spec);
      } finally {
        rmSync(disk, { force: true });
      }
    },
    TIMEOUT_MS,
  );

  test(
    "a dimm is unplugged: the load comes to its end without it",
    async () => {
      const memory = "-m 256,slots=2,maxmem=1G";
      const backend = "memory-backend-ram,id=more,size=128M";
      const spec = {
        extraArgs: [
          ...memory.split(" "),
          "-object",
          backend,
          "-device",
          "pc-dimm,id=dimm1,memdev=more",
        ],
        guestOptions: "movable_node memhp_default_state=online_movable",
      };
      await using run = await FaultRun.start(await snapshotOf(spec), {
        flags: ["--eager-rate", "8M"],
      });
      await run.reached(PHASE_RUNNING);
      await run.serial.waitFor(/^tick /);
      await run.qmp.execute("device_del", { id: "dimm1" });
      await run.qmp.waitEvent("DEVICE_DELETED", ({ device }) => device === "dimm1", 30_000);
      await run.qmp.execute("object-del", { id: "more" });
      await run.fsl.stderr.waitFor(/all RAM in after/, 60_000);
      await expectRightData(run, spec);
      await run.qmp.execute("quit");
      expect(await within(run.fsl.exited, 10_000, "the end")).toBe(0);
    },
    TIMEOUT_MS,
  );
});
