/**
 * All memory that `fsl load` brings in equals, byte for byte, what QEMU's own load of the same file
 * brings in.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import {
  closeSync,
  ftruncateSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import {
  type GuestSnapshot,
  ramBlocks,
  type SnapshotSpec,
  snapshotOf,
  whyNoGuests,
} from "../helpers/guests.ts";
import { differencesFromOracle } from "../helpers/load-oracle.ts";
import * as sys from "../../src/sys/native.ts";
import { FslRun, whyNoExecutable } from "../helpers/load-runs.ts";
import { specialSnapshot, type TemporarySnapshot } from "../helpers/load-snapshots.ts";
import type { LoadReport } from "../../src/index.ts";

const TIMEOUT_MS = 60_000;
const MIB = 2 ** 20;
const PAGE = 4096;
const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;

const LIVE: SnapshotSpec = {
  guest: "bare",
  live: true,
  bandwidthMiB: 20,
  guestOptions: "churn=4096",
};
const CACHED: readonly [string, SnapshotSpec][] = [
  ["pc", { machine: "pc" }],
  ["q35", { machine: "q35" }],
  ["microvm", { machine: "microvm" }],
  ["a guest saved live, with stale pages in the file", LIVE],
  ["a guest saved by multifd", { guest: "bare", multifd: 2 }],
];

const TINY: SnapshotSpec = {
  machine: "microvm",
  machineOptions: "acpi=off",
  memoryMiB: 3,
  guestOptions: "beat=64",
};

/** Backends m0, m1 … of so many MiB. */
function backends(...sizes: readonly number[]): string[] {
  return sizes.flatMap((size, index) => [
    "-object",
    `memory-backend-ram,id=m${index},size=${size}M`,
  ]);
}

function numaNodes(count: number): string[] {
  return Array.from({ length: count }, (_, index) => ["-numa", `node,memdev=m${index}`]).flat();
}

/** How many virtual memory areas each writable RAMBlock of a MiB and more consists of. */
async function ramAreas(run: FslRun): Promise<[string, number][]> {
  const maps = readFileSync(`/proc/${await run.qemuPid()}/maps`, "latin1").split("\n");
  const blocks = (await ramBlocks(run.qmp)).filter(
    ({ used, readOnly }) => used >= MIB && !readOnly,
  );
  return blocks.map(({ name, address, used }) => {
    const areas = maps.filter((line) => {
      const [start = 0, end = 0] = (line.split(" ")[0] ?? "")
        .split("-")
        .map((text) => Number.parseInt(text, 16));
      return start < address + used && end > address;
    });
    return [name, areas.length];
  });
}

interface Loaded extends AsyncDisposable {
  readonly run: FslRun;
  readonly report: LoadReport;
}

/** Loads it stopped, waits until all RAM is in, and compares. */
async function expectEqualMemory(
  snapshot: GuestSnapshot,
  flags: readonly string[] = [],
  argv = snapshot.argv,
): Promise<Loaded> {
  const run = await FslRun.start(snapshot, { flags: ["--paused", ...flags], argv });
  try {
    await run.qmp.ready;
    const report = await run.complete();
    expect(report.complete).toBe(true);
    expect(await run.qmp.execute<object>("query-status")).toMatchObject({ running: false });
    const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
    expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
    return { run, report, [Symbol.asyncDispose]: () => run[Symbol.asyncDispose]() };
  } catch (error) {
    await run[Symbol.asyncDispose]();
    throw error;
  }
}

/** Data pages of the blocks that were loaded lazily. */
function lazyDataPages(report: LoadReport): number {
  const lazy = report.blocks.filter(({ way }) => way === "lazy");
  return lazy.reduce((sum, { dataBytes }) => sum + dataBytes / PAGE, 0);
}

describe.skipIf(skip)("fsl load --paused", () => {
  test.each(CACHED)(
    "brings in all memory of %s",
    async (_, spec) => {
      await using loaded = await expectEqualMemory(await snapshotOf(spec));
      const { report } = loaded;
      const { fault, eager } = report.pages;
      expect(report.blocks.some(({ way }) => way === "lazy")).toBe(true);
      expect(fault + eager).toBe(lazyDataPages(report));
    },
    TIMEOUT_MS,
  );

  test.each(CACHED)(
    "--mode copy brings in all memory of %s",
    async (_, spec) => {
      await using loaded = await expectEqualMemory(await snapshotOf(spec), ["--mode", "copy"]);
      expect(loaded.report).toMatchObject({
        mode: "copy",
        pages: { fault: 0, eager: 0, zero: 0 },
        faults: 0,
      });
    },
    TIMEOUT_MS,
  );

  test(
    "brings in all memory of a guest with graphics memory and a network card",
    async () => {
      const extraArgs = ["-device", "VGA,romfile=", "-device", "e1000,romfile="];
      using snapshot = await specialSnapshot({ guest: "bare", extraArgs }, {});
      await using loaded = await expectEqualMemory(snapshot);
      const ways = new Map(
        loaded.report.blocks.map(({ idstr, way }) => [idstr.replace(/^.*\//, ""), way]),
      );
      expect([ways.get("pc.ram"), ways.get("vga.vram")]).toEqual(["lazy", "seed"]);
    },
    TIMEOUT_MS,
  );

  test.each<[string, SnapshotSpec]>([
    ["on two NUMA nodes", { extraArgs: [...backends(32, 32), ...numaNodes(2)] }],
    [
      "with a memory device",
      {
        extraArgs: [
          "-m",
          "64M,slots=2,maxmem=512M",
          ...backends(64),
          "-device",
          "pc-dimm,memdev=m0",
        ],
      },
    ],
    ["whose memory is locked by QEMU", { extraArgs: ["-overcommit", "mem-lock=on"] }],
    ["with four vCPUs and a balloon", { smp: 4, extraArgs: ["-device", "virtio-balloon-pci"] }],
    ["with much more memory than data", { memoryMiB: 1024, dataMiB: 48 }],
    ["that is so small that QEMU loads all of it", TINY],
  ])(
    "brings in all memory of a guest %s",
    async (_, spec) => {
      using snapshot = await specialSnapshot({ guest: "bare", ...spec }, {});
      await using loaded = await expectEqualMemory(snapshot);
      const areas = await ramAreas(loaded.run);
      // One area for each block: what was split while it was loaded has merged again.
      expect(areas.filter(([, count]) => count !== 1)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test.each([
    ["saved without looking for zero pages", { parameters: { "zero-page-detection": "none" } }, []],
    ["that begins in the middle of a file", { offset: 3 * MIB }, ["--offset", "3M"]],
  ] as const)(
    "brings in all memory of a snapshot %s",
    async (_, save, flags) => {
      using snapshot = await specialSnapshot({ guest: "bare" }, save);
      await using _loaded = await expectEqualMemory(snapshot, flags);
    },
    TIMEOUT_MS,
  );

  test(
    "brings in the same memory with the working set of the load before",
    async () => {
      const snapshot = await snapshotOf({ guest: "bare" });
      const path = `${snapshot.path}.${process.pid}.fslws`;
      try {
        const flags = ["--working-set", path, "--eager-rate", "1M"];
        await using first = await FslRun.start(snapshot, { flags });
        await first.serial.waitFor(/^tick \d+ ok/);
        await first.complete();
        await first.qmp.execute("quit");
        expect(await first.end()).toBe(0);
        await using _loaded = await expectEqualMemory(snapshot, ["--working-set", path]);
      } finally {
        rmSync(path, { force: true });
      }
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(skip)("fsl load into other kinds of memory", () => {
  const spec: SnapshotSpec = { guest: "bare", memoryBackend: "memory-backend-ram", dataMiB: 48 };
  const file = `/dev/shm/fsl-load-test-${process.pid}`;
  let snapshot: TemporarySnapshot;
  beforeAll(async () => {
    if (!skip) snapshot = await specialSnapshot(spec, {});
  }, TIMEOUT_MS);
  afterAll(() => {
    snapshot?.[Symbol.dispose]();
    rmSync(file, { force: true });
  });

  /** The same guest, its RAM from another backend. */
  function withBackend(backend: string): string[] {
    return snapshot.argv.map((argument) =>
      argument.startsWith("memory-backend-ram,")
        ? argument.replace("memory-backend-ram", backend)
        : argument,
    );
  }

  function wayOf(report: LoadReport): string | undefined {
    return report.blocks.find(({ idstr }) => idstr === "ram0")?.way;
  }

  test.each([
    ["private memory that QEMU has touched already", "memory-backend-ram,prealloc=on"],
    ["private memory of a memfd", "memory-backend-memfd,share=off"],
    ["shared memory of a memfd", "memory-backend-memfd,share=on"],
    ["shared memory of a memfd that is there already", "memory-backend-memfd,share=on,prealloc=on"],
    ["a new file in memory", `memory-backend-file,share=on,mem-path=${file}`],
  ])(
    "brings in all memory: %s",
    async (_, backend) => {
      rmSync(file, { force: true });
      await using loaded = await expectEqualMemory(snapshot, [], withBackend(backend));
      expect(wayOf(loaded.report)).toBe("lazy");
    },
    TIMEOUT_MS,
  );

  test.each([
    ["old contents", "share=on"],
    ["old contents", "share=off"],
    ["pages that were only allocated", "share=on"],
    ["pages that were only allocated", "share=off"],
  ])(
    "brings in all memory over a file in memory with %s, %s",
    async (contents, share) => {
      const fd = openSync(file, "w");
      ftruncateSync(fd, 64 * MIB);
      // Where the snapshot has data and where it has zeros; in nobody's page table.
      const junk = new Uint8Array(MIB).fill(0xa5);
      for (const offset of [0, 5, 20, 47, 50, 63]) {
        if (contents === "old contents") writeSync(fd, junk, 0, MIB, offset * MIB);
        else expect(sys.fallocate(fd, 0, offset * MIB, MIB)).toBe(0);
      }
      closeSync(fd);
      const argv = withBackend(`memory-backend-file,${share},mem-path=${file}`);
      await using loaded = await expectEqualMemory(snapshot, [], argv);
      expect(wayOf(loaded.report)).toBe("lazy");
    },
    TIMEOUT_MS,
  );

  test(
    "brings in all memory: huge pages, lazily",
    async () => {
      const setting = "/proc/sys/vm/nr_hugepages";
      const before = readFileSync(setting, "utf8");
      writeFileSync(setting, String(Number(before) + 32));
      try {
        expect(Number(readFileSync(setting, "utf8"))).toBe(Number(before) + 32);
        const argv = withBackend("memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=on");
        await using loaded = await expectEqualMemory(snapshot, [], argv);
        expect(wayOf(loaded.report)).toBe("lazy");
      } finally {
        writeFileSync(setting, before);
      }
    },
    TIMEOUT_MS,
  );

  test.each([
    ["private memory", "memory-backend-ram", "lazy"],
    ["shared memory", "memory-backend-memfd,share=on", "fill"],
  ])(
    "brings in all memory of a guest with a balloon: %s",
    async (_, backend, way) => {
      const balloon = { ...spec, extraArgs: ["-device", "virtio-balloon-pci"] };
      using own = await specialSnapshot(balloon, {});
      const argv = own.argv.map((argument) => argument.replace(/^memory-backend-ram/, backend));
      await using loaded = await expectEqualMemory(own, [], argv);
      expect(wayOf(loaded.report)).toBe(way);
    },
    TIMEOUT_MS,
  );
});
