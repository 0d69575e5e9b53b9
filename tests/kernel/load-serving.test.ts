/**
 * The fault loop and the eager load in their Workers, on a real userfaultfd: contents and fault
 * counts.
 */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { F_GETFL, F_SETFL, O_NONBLOCK } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { until, within } from "../helpers/kernel-target.ts";
import {
  countDataPages,
  type MemoryKind,
  PAGE,
  Rig,
  toucherProgram,
} from "../helpers/load-serving.ts";

setDefaultTimeout(30_000);

const MIB = 2 ** 20;
/** 16 MiB: a power of two, as load-toucher.c wants it. */
const PAGES = 4096;
const DATA_PAGES = countDataPages(PAGES);
const RIGHT = { wrong: 0, first: 0, discards: 0 };
/** Slow enough that the touching threads are always in the middle of it. */
const SLOWLY = { bytesPerSecond: 16 * MIB };

/** Runs of zero pages, cut where the fault loop cuts them: at every 512th page. */
function zeroRuns(): number {
  let runs = 0;
  let wasData = true;
  for (let page = 0; page < PAGES; page += 1) {
    const isData = page % 8 < 5 && Math.floor(page / 64) % 4 !== 3;
    if (!isData && (wasData || page % 512 === 0)) runs += 1;
    wasData = isData;
  }
  return runs;
}

let hugePages = 0;
const SETTING = "/proc/sys/vm/nr_hugepages";
beforeAll(() => {
  toucherProgram();
  const before = Number(readFileSync(SETTING, "utf8"));
  writeFileSync(SETTING, String(before + 8));
  hugePages = Number(readFileSync(SETTING, "utf8")) - before;
}, 120_000);
afterAll(() => {
  writeFileSync(SETTING, String(Number(readFileSync(SETTING, "utf8")) - hugePages));
});

const KINDS: readonly MemoryKind[] = ["anon", "shmem", "hugetlb"];

describe("faults alone", () => {
  test("bring each data page once and each run of zeros once, for one thread", async () => {
    await using rig = await Rig.start({ pages: PAGES, clusterPages: 1 });
    expect(await rig.order("touch 1 same 1")).toEqual(RIGHT);
    const { faults, pages } = rig.report();
    expect(pages).toEqual({ fault: DATA_PAGES, eager: 0, zero: PAGES - DATA_PAGES });
    expect(faults).toBe(DATA_PAGES + zeroRuns());
    expect(rig.report().complete).toBe(true);
    expect(rig.latency().histogram.reduce((sum, { count }) => sum + count, 0)).toBe(faults);
  });

  test.each([
    ["the same pages in the same order", "touch 8 same 1"],
    ["the same pages, each in its own order", "touch 8 random 2"],
    ["different pages", "touch 8 parts 3"],
  ])("bring each page once for eight threads that touch %s", async (_, command) => {
    await using rig = await Rig.start({ pages: PAGES, clusterPages: 1 });
    expect(await rig.order(command)).toEqual(RIGHT);
    const { faults, pages } = rig.report();
    expect(pages.fault).toBe(DATA_PAGES);
    expect(faults).toBeGreaterThanOrEqual(DATA_PAGES);
    expect(faults).toBeLessThanOrEqual(8 * PAGES);
  });

  test("bring the same pages with clusters, by no more faults", async () => {
    await using rig = await Rig.start({ pages: PAGES, clusterPages: 16 });
    expect(await rig.order("touch 1 same 1")).toEqual(RIGHT);
    const { faults, pages } = rig.report();
    expect(pages.fault).toBe(DATA_PAGES);
    // How many fewer is a matter of time: neighbours give way to the next fault.
    expect(faults).toBeLessThanOrEqual(DATA_PAGES + zeroRuns());
  });

  test.each(KINDS)("bring right pages for eight threads: %s", async (kind) => {
    await using rig = await Rig.start({ pages: PAGES, kind });
    expect(await rig.order("touch 8 random 4")).toEqual(RIGHT);
    expect(rig.report().complete).toBe(true);
    expect(await rig.order("sweep")).toEqual(RIGHT);
  });

  test("fault once for each huge page", async () => {
    await using rig = await Rig.start({ pages: PAGES, kind: "hugetlb" });
    expect(await rig.order("touch 1 same 1")).toEqual(RIGHT);
    expect(rig.report().faults).toBe(PAGES / 512);
  });

  test.each(KINDS)("let threads write at once to what has just come: %s", async (kind) => {
    await using rig = await Rig.start({ pages: PAGES, kind });
    expect(await rig.order("write 8 5")).toEqual(RIGHT);
    expect(await rig.order("sweep")).toEqual(RIGHT);
  });
});

describe("the eager load", () => {
  test.each(KINDS)(
    "brings everything when nobody touches anything, and lets go: %s",
    async (kind) => {
      await using rig = await Rig.start({ pages: PAGES, kind });
      expect(await rig.bringRest()).toBe(true);
      const { faults, pages, redundantPages } = rig.report();
      expect([faults, pages.fault, pages.zero, redundantPages]).toEqual([0, 0, 0, 0]);
      // A huge page comes as a whole, zeros and all.
      expect(pages.eager).toBe(kind === "hugetlb" ? PAGES : DATA_PAGES);
      await rig.serving.finish();
      // Nothing of ours serves any more: what is zero comes from the kernel.
      expect(await rig.order("touch 4 random 6")).toEqual(RIGHT);
    },
  );

  test.each([1, 2, 8])("is shared by %d Workers without a page brought twice", async (workers) => {
    await using rig = await Rig.start({ pages: PAGES, eager: { workers } });
    expect(await rig.bringRest()).toBe(true);
    expect(rig.report().pages.eager).toBe(DATA_PAGES);
    expect(rig.report().redundantPages).toBe(0);
  });

  test.each(KINDS)("and the faults of eight threads bring every page right: %s", async (kind) => {
    await using rig = await Rig.start({
      pages: PAGES,
      kind,
      eager: { ...SLOWLY, pieceLength: 32 * 1024 },
    });
    const rest = rig.bringRest();
    const verdicts = await Promise.all([rig.order("touch 8 random 7"), rest]);
    expect(verdicts).toEqual([RIGHT, true]);
    const { pages, redundantPages } = rig.report();
    const brought = pages.fault + pages.eager + redundantPages;
    expect(brought).toBeGreaterThanOrEqual(kind === "hugetlb" ? PAGES : DATA_PAGES);
    await rig.serving.finish();
    expect(await rig.order("sweep")).toEqual(RIGHT);
  });

  test("and writing threads do not undo one another", async () => {
    await using rig = await Rig.start({
      pages: PAGES,
      eager: { ...SLOWLY, pieceLength: 16 * 1024 },
    });
    const rest = rig.bringRest();
    expect(await rig.order("write 8 8")).toEqual(RIGHT);
    expect(await rest).toBe(true);
    await rig.serving.finish();
    expect(await rig.order("sweep")).toEqual(RIGHT);
  });

  test("ends soon after all has come by faults, however low its rate is", async () => {
    await using rig = await Rig.start({ pages: PAGES, eager: { bytesPerSecond: 1, workers: 2 } });
    const rest = rig.bringRest();
    expect(await rig.order("touch 2 random 9")).toEqual(RIGHT);
    expect(await rest).toBe(true);
    expect(rig.report().pages.eager).toBeLessThanOrEqual(4);
  });
});

describe("memory given back while it is loaded", () => {
  const options = { pages: PAGES, canDiscard: true, eager: { ...SLOWLY, pieceLength: 16 * 1024 } };

  test.each(["anon", "shmem"] as const)(
    "is zero from then on, and never the snapshot's, 8000 times: %s",
    async (kind) => {
      // Shared memory: MADV_DONTNEED takes it out of the page table only, its contents stay.
      const command = kind === "anon" ? "discard 4 2000 10" : "touch 4 random 10";
      await using rig = await Rig.start({ ...options, kind });
      const rest = rig.bringRest();
      const verdict = await rig.order(command);
      expect(verdict).toMatchObject({ wrong: 0 });
      expect(await rest).toBe(true);
      await rig.serving.finish();
      expect(await rig.order("sweep")).toEqual(RIGHT);
      if (kind === "anon") expect(rig.report().removedPages).toBeGreaterThanOrEqual(2000);
    },
  );

  test("is zero without an eager load too", async () => {
    await using rig = await Rig.start({ ...options, clusterPages: 16 });
    expect(await rig.order("discard 8 1000 11")).toMatchObject({ wrong: 0, discards: 8000 });
    expect(await rig.order("sweep")).toEqual(RIGHT);
    expect(rig.report().complete).toBe(true);
  });

  test("is zero when it is given back and loaded by many Workers at full speed", async () => {
    await using rig = await Rig.start({ pages: PAGES, canDiscard: true, eager: { workers: 4 } });
    const discards = rig.order("discard 8 1000 12");
    const rest = rig.bringRest();
    expect(await discards).toMatchObject({ wrong: 0, discards: 8000 });
    expect(await rest).toBe(true);
    expect(await rig.order("sweep")).toEqual(RIGHT);
  });

  test("is zero with huge pages", async () => {
    await using rig = await Rig.start({ ...options, kind: "hugetlb" });
    const rest = rig.bringRest();
    expect(await rig.order("discard 2 200 13")).toMatchObject({ wrong: 0, discards: 400 });
    expect(await rest).toBe(true);
    expect(await rig.order("sweep")).toEqual(RIGHT);
  });
});

describe("page sources of somebody else's", () => {
  const module = join(import.meta.dir, "../helpers/load-sources.ts");
  let directory = "";
  beforeAll(() => {
    directory = mkdtempSync(join(tmpdir(), "fsl-load-test-"));
  });
  afterAll(() => rmSync(directory, { recursive: true, force: true }));

  test.each(["pread", "later", "thread"])("serve faults and the eager load: %s", async (kind) => {
    const source = { module, options: { kind } };
    await using rig = await Rig.start({ pages: PAGES, source, eager: SLOWLY });
    const rest = rig.bringRest();
    expect(await rig.order("touch 4 random 14")).toEqual(RIGHT);
    expect(await rest).toBe(true);
    await rig.serving.finish();
    expect(await rig.order("sweep")).toEqual(RIGHT);
  });

  test("leave a thread waiting while a page cannot be read, and serve it later", async () => {
    const flag = join(directory, "readable");
    const source = { module, options: { kind: "failing", failPage: 100, marker: flag } };
    await using rig = await Rig.start({ pages: PAGES, source });
    const touched = rig.order("touch 1 same 15");
    await until(() => (rig.serving.failures().length > 0 ? true : null), 10_000, "a failure");
    expect(rig.serving.failures()).toMatchObject([
      { idstr: "ram", pageIndex: 100, fileOffset: 100 * PAGE, errno: 5 },
    ]);
    // The thread has come to page 100 and no further.
    expect(rig.report().pages.fault).toBeLessThan(DATA_PAGES);
    writeFileSync(flag, "");
    expect(await touched).toEqual(RIGHT);
    await until(() => (rig.serving.failures().length === 0 ? true : null), 10_000, "the recovery");
    expect(rig.messages.filter((text) => /could be read again/.test(text))).toHaveLength(1);
  });

  test("do not keep the eager load from the pages that can be read", async () => {
    const flag = join(directory, "readable-later");
    const source = { module, options: { kind: "failing", failPage: 100, marker: flag } };
    await using rig = await Rig.start({ pages: PAGES, source });
    const rest = rig.bringRest();
    await until(() => (rig.serving.missingPages() === 1 ? true : null), 10_000, "all but one page");
    writeFileSync(flag, "");
    expect(await rest).toBe(true);
    expect(await rig.order("sweep")).toEqual(RIGHT);
  });

  test.each([
    ["the fault Worker", false],
    ["an eager Worker", true],
  ])("may end %s: another one takes over, and every page comes", async (_, eagerly) => {
    const marker = join(directory, `died-${eagerly}`);
    const source = { module, options: { kind: "dying", failPage: 1032, marker } };
    await using rig = await Rig.start({ pages: PAGES, source, canDiscard: true });
    const rest = eagerly ? rig.bringRest() : undefined;
    if (eagerly) expect(await rest).toBe(true);
    expect(await rig.order("touch 8 random 16")).toEqual(RIGHT);
    expect(existsSync(marker)).toBe(true);
    expect(rig.messages).toContain(
      `${eagerly ? "eager" : "fault"} Worker failed: the source breaks down; another one takes over`,
    );
    expect(rig.report().complete).toBe(true);
  });
});

describe("serving", () => {
  test("goes on when somebody makes the userfaultfd blocking", async () => {
    await using rig = await Rig.start({ pages: PAGES });
    // As QEMU does it with every descriptor that it is given by getfd.
    expect(sys.fcntl(rig.uffd.fd, F_SETFL, 0)).toBe(0);
    expect(await rig.order("touch 2 random 17")).toEqual(RIGHT);
    expect(sys.fcntl(rig.uffd.fd, F_GETFL, 0) & O_NONBLOCK).toBe(O_NONBLOCK);
    sys.fcntl(rig.uffd.fd, F_SETFL, 0);
    expect(await rig.order("sweep")).toEqual(RIGHT);
  });

  test("ends when the target is killed with faults unserved", async () => {
    const source = {
      module: join(import.meta.dir, "../helpers/load-sources.ts"),
      options: { kind: "failing", failPage: 100, marker: "/nonexistent" },
    };
    await using rig = await Rig.start({ pages: PAGES, source });
    const rest = rig.bringRest();
    rig.toucher.say("touch 99 1 same 1");
    await until(() => (rig.serving.failures().length > 0 ? true : null), 10_000, "a failure");
    rig.toucher.child.kill("SIGKILL");
    expect(await within(rest, 10_000, "the end")).toBe(false);
  });

  test("ends behind the target, whose memory is gone before it has ended", async () => {
    await using rig = await Rig.start({
      pages: PAGES,
      eager: { bytesPerSecond: 64 * 1024 },
      exitLagMs: 300,
    });
    const rest = rig.bringRest();
    await until(() => (rig.report().pages.eager > 0 ? true : null), 10_000, "the first page");
    rig.toucher.child.kill("SIGKILL");
    expect([await within(rest, 10_000, "the end"), rig.isExitTold]).toEqual([false, true]);
  });

  test("makes threads wait while nobody serves, and goes on where it was", async () => {
    await using rig = await Rig.start({ pages: PAGES, clusterPages: 1 });
    process.kill(rig.toucher.pid, "SIGSTOP");
    process.kill(rig.toucher.pid, "SIGCONT");
    expect(await rig.order("touch 4 random 18")).toEqual(RIGHT);
  });
});
