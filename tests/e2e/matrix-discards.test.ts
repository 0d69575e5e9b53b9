/**
 * Memory that the guest gives back while it is loaded (docs/guests.md, "Discards"), by a Linux
 * guest with the real drivers: it never gets the snapshot's bytes back, and the rest of it stays
 * right.
 */
import { describe, expect, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { C_EAGER_PAGES, type LoadState, MAIN_THREAD } from "../../src/load/state.ts";
import { openLoadState } from "../helpers/fault-runs.ts";
import { guestArgv, whyNoGuests } from "../helpers/guests.ts";
import { FslRun, openFiles, until, whyNoExecutable } from "../helpers/load-runs.ts";
import {
  bytesDiscarded,
  discarded,
  lookAtDiscarded,
  traceArgs,
} from "../helpers/matrix-discards.ts";
import {
  type MatrixSave,
  MATRIX_TIMEOUT_MS,
  type MatrixSnapshot,
  MIB,
  saveGuest,
  withArgument,
  hugePages,
} from "../helpers/matrix-guests.ts";

const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;
/**
 * Slow enough that most of it is missing when the guest begins to give back. In memory that can be
 * moved two chunks at a time are two helper tasks of one Worker.
 */
const FLAGS = ["--eager-rate", "12M", "--eager-workers", "2"];

/** Without helper tasks, page by page by several Workers. */
const MANY = 4;
const MANY_FLAGS = ["--eager-rate", "12M", "--eager-workers", `${MANY}`];
/** Those of the preloaded library are of another program's memory, and in a sandbox none are made anew. */
const WITHOUT_HELPERS = { prefix: ["env"], sandbox: ["-sandbox", "on"] };

const SMALL = { memoryMiB: 160, dataMiB: 16 };

/** A guest whose free memory holds data: it was filled and freed. */
const SAVE: MatrixSave = {
  ready: /^tick /,
  prepare: async ({ serial }) => {
    await serial.command("fill 64");
    await serial.command("free 64");
  },
};

/** Longer than the guest's driver waits before it reports what is free (2 s). */
const REPORT_MS = 2500;

/** The same for a guest that reports free pages: it must not report those before it is saved. */
const SAVE_REPORTING: MatrixSave = {
  ...SAVE,
  prepare: async ({ serial }) => {
    await serial.command("fill 64");
    await Bun.sleep(REPORT_MS);
    await serial.command("free 64");
  },
};

interface Given {
  readonly snapshot: MatrixSnapshot;
  readonly run: FslRun;
  readonly trace: string;
}

const HUGE_PAGES = 512;

/** Huge pages that khugepaged has made since the host was started; not those of MADV_COLLAPSE. */
function pagesCollapsed(): number {
  const path = "/sys/kernel/mm/transparent_hugepage/khugepaged/pages_collapsed";
  return existsSync(path) ? Number(readFileSync(path, "utf8")) : 0;
}

/** Eager Workers that have brought pages; what was read ahead is the main thread's. */
function workersOf(state: LoadState): number {
  const numbers = Array.from({ length: MAIN_THREAD - 1 }, (_, index) => index + 1);
  return numbers.filter((number) => (state.counters(number)[C_EAGER_PAGES] ?? 0) > 0).length;
}

interface Way {
  readonly save?: MatrixSave;
  readonly flags?: readonly string[];
  readonly workers?: number;
  /** What stands before QEMU's command line when it is loaded. */
  readonly prefix?: readonly string[];
  readonly sandbox?: readonly string[];
}

const RACE: Way = { flags: MANY_FLAGS, workers: MANY, ...WITHOUT_HELPERS };

/** Loads it slowly, has the guest give memory back, and looks at every page of that. */
async function giveBack(
  argv: readonly string[],
  give: (given: Given) => Promise<void>,
  { save = SAVE, flags = FLAGS, workers = 1, prefix = [], sandbox = [] }: Way = {},
): Promise<void> {
  using snapshot = await saveGuest(argv, save);
  const trace = join(snapshot.directory, "trace");
  const collapsedBefore = pagesCollapsed();
  await using run = await FslRun.start(snapshot, {
    flags,
    argv: [...prefix, ...snapshot.argv],
    qemuArgs: [...traceArgs(trace), ...sandbox],
  });
  await run.serial.waitFor(/^tick /);
  const state = await until(() => openLoadState(run.pid), MATRIX_TIMEOUT_MS, "a load state");
  await give({ snapshot, run, trace });
  expect(run.stderr.text).not.toMatch(/all RAM in after/);
  await run.qmp.execute("stop");
  const report = await run.complete(MATRIX_TIMEOUT_MS);
  // Until fsl has nothing left to do: huge pages may have been given back meanwhile.
  await until(
    () => (openFiles(run.pid).includes(snapshot.path) ? null : true),
    MATRIX_TIMEOUT_MS,
    "the end of the load",
  );
  expect(workersOf(state)).toBe(workers);
  state.unmap();
  const found = await lookAtDiscarded(run, snapshot.path, trace);
  // Long zero extents are not registered: no event comes from there.
  expect(report.removedPages).toBeGreaterThanOrEqual(found.dataPages);
  expect(found.dataPages).toBeGreaterThan(4096);
  expect(found.revived).toBe(0);
  // They are still the host's: nothing has brought zeros there either.
  // But for what the kernel's own thread has made huge pages of.
  const byKernel = HUGE_PAGES * (pagesCollapsed() - collapsedBefore);
  expect(found.absent + byKernel).toBeGreaterThan(0.97 * found.pages);
  await run.qmp.execute("cont");
  expect((await run.serial.command("verify"))[0]).toBe("ok");
}

describe.skipIf(skip)("memory given back while it is loaded", () => {
  test.each<[string, Way]>([
    ["balloon inflated", {}],
    ["balloon inflated without helper tasks, while four eager Workers race", RACE],
  ])(
    "%s",
    async (_, way) => {
      const argv = guestArgv({ ...SMALL, extraArgs: ["-device", "virtio-balloon-pci"] });
      const inflate = async ({ run, trace }: Given): Promise<void> => {
        await run.qmp.execute("balloon", { value: 112 * MIB });
        await discarded(trace, 46 * MIB);
      };
      // Every page counts as data, so that whole chunks are.
      const parameters = { "zero-page-detection": "none" };
      await giveBack(argv, inflate, { ...way, save: { ...SAVE, parameters } });
    },
    MATRIX_TIMEOUT_MS,
  );

  test.each<[string, Way]>([
    ["free pages reported", {}],
    ["free pages reported without helper tasks, while four eager Workers race", RACE],
  ])(
    "%s",
    async (_, way) => {
      const device = "virtio-balloon-pci,free-page-reporting=on";
      // The driver reports only while 64 MiB and more are free.
      const argv = guestArgv({ dataMiB: 16, extraArgs: ["-device", device] });
      await giveBack(argv, reportFree, { ...way, save: SAVE_REPORTING });
    },
    MATRIX_TIMEOUT_MS,
  );

  test(
    "virtio-mem unplugged",
    async () => {
      const linux = guestArgv({ dataMiB: 16, memoryMiB: 160 });
      const argv = linux.map((argument, index) =>
        linux[index - 1] === "-m" ? "160,slots=1,maxmem=1G" : argument,
      );
      const device = "virtio-mem-pci,id=vm0,memdev=vmem,requested-size=128M,block-size=2M";
      const backend = "memory-backend-ram,id=vmem,size=256M";
      await giveBack([...argv, "-object", backend, "-device", device], async ({ run, trace }) => {
        const path = "/machine/peripheral/vm0";
        await run.qmp.execute("qom-set", { path, property: "requested-size", value: 0 });
        // All that is not plugged in when the state is loaded, and then some.
        await discarded(trace, (128 + 48) * MIB);
      });
    },
    MATRIX_TIMEOUT_MS,
  );

  test.each([
    ["shared memory", "memory-backend-memfd,share=on", 0],
    ["huge pages", "memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=on", 136],
  ])(
    "free pages reported in %s, which was loaded in full before resume",
    async (_, backend, pages) => {
      using _reserved = await hugePages(pages);
      const extraArgs = ["-device", "virtio-balloon-pci,free-page-reporting=on"];
      const memory = { dataMiB: 16, memoryBackend: "memory-backend-ram" };
      const argv = guestArgv({ ...memory, extraArgs });
      using snapshot = await saveGuest(argv, SAVE_REPORTING);
      const trace = join(snapshot.directory, "trace");
      const other = withArgument(argv, "memory-backend-ram", backend);
      const options = { flags: FLAGS, argv: other, qemuArgs: traceArgs(trace) };
      await using run = await FslRun.start(snapshot, options);
      await run.serial.waitFor(/^tick /);
      const report = await run.complete();
      expect(report.blocks.find(({ idstr }) => idstr === "ram0")?.way).toBe("fill");
      expect(run.stderr.text).toContain("ram0 is loaded in full before resume: the guest can give");
      await reportFree({ snapshot, run, trace });
      await run.qmp.execute("stop");
      const found = await lookAtDiscarded(run, snapshot.path, trace);
      expect([found.revived, found.dataPages > 4096]).toEqual([0, true]);
      await run.qmp.execute("cont");
      expect((await run.serial.command("verify"))[0]).toBe("ok");
    },
    MATRIX_TIMEOUT_MS,
  );

  /** Pages given back may hold the snapshot's bytes; nothing that the guest uses is wrong. */
  test.each([
    ["by request: balloon inflated and deflated in shared memory", "virtio-balloon-pci", balloon],
    [
      "by request: free pages reported in shared memory",
      "virtio-balloon-pci,free-page-reporting=on",
      reportFree,
    ],
  ])(
    "%s",
    async (_, device, give) => {
      const spec = { dataMiB: 16, memoryBackend: "memory-backend-memfd,share=on" };
      const argv = guestArgv({ ...spec, extraArgs: ["-device", device] });
      using snapshot = await saveGuest(argv, SAVE_REPORTING);
      const trace = join(snapshot.directory, "trace");
      const flags = [...FLAGS, "--lazy-despite-discards"];
      await using run = await FslRun.start(snapshot, { flags, qemuArgs: traceArgs(trace) });
      await run.serial.waitFor(/^tick /);
      await give({ snapshot, run, trace });
      expect(run.stderr.text).not.toMatch(/all RAM in after/);
      await run.qmp.execute("stop");
      const { blocks } = await run.complete(MATRIX_TIMEOUT_MS);
      expect(blocks.find(({ idstr }) => idstr === "ram0")?.way).toBe("lazy");
      expect((await lookAtDiscarded(run, snapshot.path, trace)).dataPages).toBeGreaterThan(1024);
      await run.qmp.execute("cont");
      // All of the memory that was given back is used again.
      await run.qmp.execute("balloon", { value: 256 * MIB });
      await run.serial.command("fill 64");
      expect((await run.serial.command("verify"))[0]).toBe("ok");
      expect((await run.serial.command("sum"))[0]).toBe("ok");
    },
    MATRIX_TIMEOUT_MS,
  );
});

async function balloon({ run, trace }: Given): Promise<void> {
  await run.qmp.execute("balloon", { value: 160 * MIB });
  await discarded(trace, 64 * MIB);
}

async function reportFree({ run, trace }: Given): Promise<void> {
  await run.serial.command("fill 48");
  // What was free before has been reported before, perhaps, and is in use now.
  const before = bytesDiscarded(trace);
  await run.serial.command("free 48");
  await discarded(trace, 40 * MIB, before);
}
