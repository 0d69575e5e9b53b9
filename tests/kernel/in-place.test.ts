/**
 * RAM that is there already, filled by real helpers of a target that reads its memory back.
 */
import { afterEach, describe, expect, test } from "bun:test";
import { ftruncateSync } from "node:fs";
import { fillInPlace, type InPlaceOptions, type InPlaceRun } from "../../src/load/in-place.ts";
import * as sys from "../../src/sys/native.ts";
import {
  descriptorsOf,
  HelperBench,
  HUGE,
  HUGE_PAGES,
  isOver,
  PAGE,
  type RegionKind,
} from "../helpers/helper-target.ts";
import { until } from "../helpers/kernel-target.ts";

const TIMEOUT_MS = 20_000;
/** More than two packets. */
const CHUNKS = 12;
const PAGES = CHUNKS * HUGE_PAGES;
/** Runs of one page, more than one packet has. */
const SINGLE_RUNS = 600;
const ZERO_PAGE = Bun.hash.crc32(new Uint8Array(PAGE));

let bench: HelperBench | undefined;
afterEach(async () => {
  await bench?.end();
  bench = undefined;
});

/** A target with two helpers, whose memory is all there, with something else in it. */
async function start(kind: RegionKind = "thp", present = PAGES) {
  bench = await HelperBench.start(kind, CHUNKS, 2);
  const junk = new Uint8Array(HUGE).fill(0xa5);
  for (let page = 0; page < present; page += HUGE_PAGES) {
    const length = Math.min(HUGE_PAGES, present - page) * PAGE;
    expect(bench.uffd.copy(bench.addr + page * PAGE, sys.ptrOf(junk), length, 0)).toBe(length);
  }
  const options: InPlaceOptions = {
    helpers: bench.tasks.map(({ record }) => record),
    fileFd: bench.file.fd,
  };
  return { it: bench, options };
}

/** @param offset null = zeros */
function run({ addr }: HelperBench, page: number, pages: number, offset?: null): InPlaceRun {
  return {
    addr: addr + page * PAGE,
    length: pages * PAGE,
    offset: offset === null ? null : page * PAGE,
  };
}

describe("in-place.fillInPlace", () => {
  test.each<RegionKind>(["thp", "shmem", "locked"])(
    "gives memory of kind %s its bytes, and zeros where they belong",
    async (kind) => {
      const { it, options } = await start(kind);
      const before = it.tasks.map(({ record }) => Object.keys(descriptorsOf(record.pid)).length);
      const runs = [run(it, 0, 3000), run(it, 3000, 1500, null), run(it, 4500, PAGES - 4500)];
      expect(await fillInPlace(runs, options)).toBe(true);
      expect(await it.read(0, 3000)).toBe(it.crc(0, 3000));
      expect(await it.read(3000, 1500)).toBe(Bun.hash.crc32(new Uint8Array(1500 * PAGE)));
      expect(await it.read(4500, PAGES - 4500)).toBe(it.crc(4500, PAGES - 4500));
      // The file stays open there for the rest of the load, and nothing else.
      const after = it.tasks.map(({ record }) => Object.keys(descriptorsOf(record.pid)).length);
      expect(after).toEqual(before.map((count) => count + 1));
    },
    TIMEOUT_MS,
  );

  test(
    "of a page that no run has, it leaves what is there",
    async () => {
      const { it, options } = await start();
      const runs = Array.from({ length: SINGLE_RUNS }, (_, index) => run(it, 2 * index, 1));
      expect(await fillInPlace(runs, options)).toBe(true);
      const old = Bun.hash.crc32(new Uint8Array(PAGE).fill(0xa5));
      for (const page of [0, 2, 512, 2 * SINGLE_RUNS - 2]) {
        expect([await it.read(page, 1), await it.read(page + 1, 1)]).toEqual([
          it.crc(page, 1),
          old,
        ]);
      }
    },
    TIMEOUT_MS,
  );

  test("nothing to do is done, and without helpers nothing is", async () => {
    const { it, options } = await start();
    expect(await fillInPlace([], options)).toBe(true);
    expect(await fillInPlace([run(it, 0, 1)], { ...options, helpers: [] })).toBe(false);
  });

  test(
    "a file that was cut short is no success, and says so when no helper is at work any more",
    async () => {
      const { it, options } = await start();
      ftruncateSync(it.file.fd, 5000 * PAGE + 1);
      expect(await fillInPlace([run(it, 0, PAGES)], options)).toBe(false);
      // They can be used for something else.
      expect(await fillInPlace([run(it, 0, 5000)], options)).toBe(true);
      expect(await it.read(0, 5000)).toBe(it.crc(0, 5000));
    },
    TIMEOUT_MS,
  );

  test(
    "a helper that has ended is no success",
    async () => {
      const { it, options } = await start();
      process.kill(it.task.record.pid, "SIGKILL");
      await until(() => isOver(it.task.record.pid) || null, 5000, "the end of a helper");
      expect(await fillInPlace([run(it, 0, PAGES)], options)).toBe(false);
    },
    TIMEOUT_MS,
  );

  test(
    "a helper that somebody has stopped is waited for a second, and ended",
    async () => {
      const { it, options } = await start();
      const { pid } = it.task.record;
      const calls = [run(it, 0, PAGES)];
      const filled = fillInPlace(calls, {
        ...options,
        // Before it is sent anything.
        mayRead: async () => void process.kill(pid, "SIGSTOP"),
      });
      expect(await filled).toBe(false);
      expect(isOver(pid)).toBe(true);
    },
    TIMEOUT_MS,
  );

  test(
    "given up by its caller while a helper waits for a page: that helper is ended",
    async () => {
      const { it, options } = await start("thp", PAGES - 1);
      const reason = new Error("enough");
      const controller = new AbortController();
      const filled = fillInPlace([run(it, 0, PAGES, null)], {
        ...options,
        mayRead: async () => controller.signal.throwIfAborted(),
      });
      const failed = filled.then(
        () => null,
        (error: unknown) => error,
      );
      await until(() => it.hasFault() || null, 5000, "a fault");
      controller.abort(reason);
      expect(await failed).toBe(reason);
      const over = it.tasks.filter(({ record }) => isOver(record.pid));
      expect(over).toHaveLength(1);
      expect(await it.read(0, 1)).toBe(ZERO_PAGE);
    },
    TIMEOUT_MS,
  );
});
