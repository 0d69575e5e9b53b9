/**
 * Memory that is written before the guest runs: by real Workers, and by helpers, into a target that reads it back.
 */
import { afterEach, describe, expect, test } from "bun:test";
import { existsSync, ftruncateSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { isFslError } from "../../src/errors.ts";
import { fillInWorker, fillMemory, type FillJob, type FillOptions } from "../../src/load/fill.ts";
import { PageReader } from "../../src/load/page-reader.ts";
import { Crew } from "../../src/load/workers.ts";
import type { PageSourceSpec } from "../../src/source/page-source.ts";
import * as sys from "../../src/sys/native.ts";
import {
  HelperBench,
  HUGE,
  HUGE_PAGES,
  isOver,
  PAGE,
  type RegionKind,
} from "../helpers/helper-target.ts";
import { until } from "../helpers/kernel-target.ts";
import type { TestSourceOptions } from "../helpers/load-sources.ts";

const TIMEOUT_MS = 20_000;
/** Several pieces for each Worker. */
const CHUNKS = 12;
const PAGES = CHUNKS * HUGE_PAGES;
/** Pages without data are these; not at a seam. */
const ZERO_FROM = 3000;
const ZERO_END = 4500;
const JUNK = 0xa5;

let it: HelperBench | undefined;
let crew: Crew | undefined;
let reader: PageReader | undefined;
let directory: string | undefined;
afterEach(async () => {
  crew?.dismiss();
  reader?.close();
  await it?.end();
  if (directory !== undefined) rmSync(directory, { recursive: true });
  it = crew = reader = directory = undefined;
});

interface Scene {
  readonly it: HelperBench;
  readonly job: FillJob;
  readonly options: FillOptions;
}

/** A target whose memory is all there, with something else in it. */
async function start(kind: RegionKind = "thp", source?: PageSourceSpec): Promise<Scene> {
  const bench = await HelperBench.start(kind, CHUNKS, 2);
  it = bench;
  const junk = new Uint8Array(HUGE).fill(JUNK);
  for (let chunk = 0; chunk < CHUNKS; chunk += 1) {
    expect(bench.uffd.copy(bench.chunk(chunk), sys.ptrOf(junk), HUGE, 0)).toBe(HUGE);
  }
  const data = new Int32Array(PAGES / 32).fill(-1);
  for (let page = ZERO_FROM; page < ZERO_END; page += 1) {
    data[page >> 5] = (data[page >> 5] ?? 0) & ~(1 << (page & 31));
  }
  const place = { idstr: "ram0", pageSize: PAGE, pagesOffset: 0 };
  const whole = [{ first: 0, end: PAGES }];
  const job = { ...place, hostAddr: bench.addr, data, zeros: whole, contents: whole };
  const { pid } = bench.target;
  reader = new PageReader({
    source: source ?? { options: { fd: bench.file.fd } },
    blocks: [{ ...place, usedLength: PAGES * PAGE }],
    snapshotPath: "/the/snapshot",
    pidfd: sys.check(sys.pidfdOpen(pid, 0), "pidfd_open"),
  });
  crew = new Crew();
  const mayRead = async (): Promise<void> => {};
  const options = { pid, reader, helpers: [], fileFd: bench.file.fd, crew, width: 2, mayRead };
  return { it: bench, job, options: { ...options, survives: true } };
}

/** A source of somebody else's: see load-sources.ts. */
function source(kind: TestSourceOptions["kind"], more: Partial<TestSourceOptions> = {}) {
  directory = mkdtempSync(join(tmpdir(), "fsl-fill-"));
  const path = join(directory, "snapshot");
  const module = join(import.meta.dir, "../helpers/load-sources.ts");
  return { module, options: { kind, path, marker: join(directory, "marker"), ...more } };
}

async function expectAll({ it }: Scene): Promise<void> {
  const zeros = ZERO_END - ZERO_FROM;
  expect(await it.read(0, ZERO_FROM)).toBe(it.crc(0, ZERO_FROM));
  expect(await it.read(ZERO_FROM, zeros)).toBe(Bun.hash.crc32(new Uint8Array(zeros * PAGE)));
  expect(await it.read(ZERO_END, PAGES - ZERO_END)).toBe(it.crc(ZERO_END, PAGES - ZERO_END));
}

async function refused(work: Promise<unknown>): Promise<unknown> {
  return work.then(
    () => "was not refused",
    (error: unknown) => error,
  );
}

/** For `mayRead`: throws when the Workers have long begun, which takes 0.1 s. */
function givenUp(reason: Error): () => Promise<void> {
  const fromMs = performance.now();
  return async () => {
    if (performance.now() - fromMs > 500) throw reason;
  };
}

describe("fill.fillMemory", () => {
  test.each<RegionKind>(["thp", "shmem", "locked"])(
    "has Workers give memory of kind %s its bytes, and zeros where they belong",
    async (kind) => {
      const scene = await start(kind);
      await fillMemory([scene.job], scene.options);
      await expectAll(scene);
    },
    TIMEOUT_MS,
  );

  test(
    "writes neither zeros nor bytes where it is not told to, however it is done",
    async () => {
      const scene = await start();
      const helpers = scene.it.tasks.map(({ record }) => record);
      const job = {
        ...scene.job,
        zeros: [{ first: ZERO_FROM + 10, end: ZERO_END }],
        contents: [
          { first: 1, end: 2000 },
          { first: 2001, end: PAGES },
        ],
      };
      const junk = (pages: number): number =>
        Bun.hash.crc32(new Uint8Array(pages * PAGE).fill(JUNK));
      for (const by of [helpers, []]) {
        await fillMemory([job], { ...scene.options, helpers: by });
        expect(await scene.it.read(0, 1)).toBe(junk(1));
        expect(await scene.it.read(2000, 1)).toBe(junk(1));
        expect(await scene.it.read(ZERO_FROM, 10)).toBe(junk(10));
        expect(await scene.it.read(2001, 999)).toBe(scene.it.crc(2001, 999));
        expect(await scene.it.read(PAGES - 1, 1)).toBe(scene.it.crc(PAGES - 1, 1));
      }
    },
    TIMEOUT_MS,
  );

  test(
    "a helper that has ended is no obstacle",
    async () => {
      const scene = await start();
      const helpers = scene.it.tasks.map(({ record }) => record);
      process.kill(scene.it.task.record.pid, "SIGKILL");
      await until(() => isOver(scene.it.task.record.pid) || null, 5000, "the end of a helper");
      await fillMemory([scene.job], { ...scene.options, helpers });
      await expectAll(scene);
    },
    TIMEOUT_MS,
  );

  test(
    "a Worker that dies is none either",
    async () => {
      const dying = source("dying", { failPage: 2000 });
      const scene = await start("thp", dying);
      await Bun.write(dying.options.path, scene.it.bytes);
      await fillMemory([scene.job], scene.options);
      expect(existsSync(dying.options.marker)).toBe(true);
      await expectAll(scene);
    },
    TIMEOUT_MS,
  );

  test(
    "says which page cannot be read",
    async () => {
      const scene = await start();
      ftruncateSync(scene.it.file.fd, 5000 * PAGE + 1);
      const error = await refused(fillMemory([scene.job], scene.options));
      expect(isFslError(error) && error.code).toBe("SNAPSHOT_OPEN");
      // The last piece in which a page is missing may be another Worker's.
      expect(String(error)).toMatch(
        /snapshot \/the\/snapshot: page [56]\d\d\d of RAMBlock ram0 at 0x1[0-9a-f]{6} cannot be read/,
      );
    },
    TIMEOUT_MS,
  );

  test(
    "says that the target has ended",
    async () => {
      const scene = await start();
      await scene.it.target.kill();
      const error = await refused(fillMemory([scene.job], scene.options));
      expect(isFslError(error) && error.code).toBe("TARGET_LOST");
    },
    TIMEOUT_MS,
  );

  test(
    "given up by its caller, it writes nothing any more, and its Workers can do something else",
    async () => {
      const never = source("never");
      const scene = await start("thp", never);
      await Bun.write(never.options.path, scene.it.bytes);
      const reason = new Error("enough");
      const mayRead = givenUp(reason);
      const error = await refused(fillMemory([scene.job], { ...scene.options, mayRead }));
      expect(error).toBe(reason);
      const fromFile = new PageReader({
        ...scene.options.reader.options,
        source: { options: { fd: scene.it.file.fd } },
      });
      await fillMemory([scene.job], { ...scene.options, reader: fromFile });
      fromFile.close();
      await expectAll(scene);
    },
    TIMEOUT_MS,
  );
});

describe("fill.fillMemory given up while the snapshot hangs", () => {
  test.each([
    ["of a target that lives on, it says what may come yet", true],
    ["of one that is to be ended, it says why", false],
  ])(
    "%s, after a second",
    async (_, survives) => {
      const stuck = source("stuck");
      const scene = await start("thp", stuck);
      await Bun.write(stuck.options.path, scene.it.bytes);
      const reason = new Error("enough");
      const mayRead = givenUp(reason);
      const job = { ...scene.job, zeros: [] };
      const fromMs = performance.now();
      const error = await refused(
        fillMemory([job], { ...scene.options, mayRead, survives, width: 1 }),
      );
      expect(performance.now() - fromMs).toBeGreaterThan(900);
      if (!survives) return expect(error).toBe(reason);
      expect(isFslError(error) && error.code).toBe("TARGET_LOST");
      expect(String(error)).toContain(
        `process ${scene.it.target.pid}: what fsl could not read in time may be written to its memory yet; end it`,
      );
    },
    TIMEOUT_MS,
  );
});

describe("fill.fillInWorker", () => {
  test(
    "reads nothing while it is told to wait",
    async () => {
      const { it, job, options } = await start();
      const control = new Int32Array(new SharedArrayBuffer(12));
      control[1] = 1;
      const { pid, reader } = options;
      const jobs = [{ ...job, zeros: [] }];
      let isOver = false;
      const filled = fillInWorker({ role: "fill", pid, jobs, reader: reader.options, control });
      filled.then(() => {
        isOver = true;
      });
      await Bun.sleep(50);
      expect(isOver).toBe(false);
      expect(await it.read(0, 1)).toBe(Bun.hash.crc32(new Uint8Array(PAGE).fill(JUNK)));
      Atomics.store(control, 1, 0);
      expect(await filled).toBe(null);
      expect(await it.read(0, ZERO_FROM)).toBe(it.crc(0, ZERO_FROM));
    },
    TIMEOUT_MS,
  );
});
