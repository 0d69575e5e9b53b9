/**
 * Nothing is allocated per fault: a garbage collection is a pause of milliseconds for whoever waits.
 * The loop runs in this very thread, on the userfaultfd of a process of ours, so that
 * JavaScriptCore's heap can be looked at in the middle of it. Nothing is collected meanwhile: what
 * is allocated makes the heap's capacity grow.
 */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { heapStats } from "bun:jsc";
import { setRange } from "../../src/bits.ts";
import { FaultLoop } from "../../src/load/fault-loop.ts";
import { SUPPLIED, Supply } from "../../src/load/supply.ts";
import type { PageBytes, PageSource } from "../../src/source/page-source.ts";
import { createPageSource } from "../../src/source/snapshot-source.ts";
import { EFD_CLOEXEC, REGISTER_MISSING } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { Uffd } from "../../src/uffd/uffd.ts";
import { mappedBytes, TargetProcess } from "../helpers/kernel-target.ts";
import { hasData, PAGE, pageFile, toucherProgram } from "../helpers/load-serving.ts";
import { BASE, makeState } from "../helpers/load-states.ts";

setDefaultTimeout(60_000);

/** 128 MiB: a power of two, as load-toucher.c wants it; 15,360 of them have data. */
const PAGES = 32_768;
/** Pages that are asked for until most code has been compiled, and then from one look at the heap to the next. */
const WARM_UP = 2000;
const COUNTED = 4400;
/** What is allocated per fault shows in each stretch; a function that is compiled late, in one. */
const STRETCHES = 3;
const ONE = new BigUint64Array([1n]);

/**
 * JavaScriptCore takes memory for its heap by 16 KiB, and `heapStats` itself makes objects. The
 * smallest object has 16 bytes: one for each fault would be 70 KB.
 */
const GROWTH_MAX = 64 * 1024;

/** Bytes by which the heap grows in the stretch where it grows least; each begins with a collection. */
class HeapGrowth {
  #before = Number.NaN;
  #stretches = 0;
  least = Number.POSITIVE_INFINITY;

  /** @param count of pages that have been asked for. @returns whether that is all */
  look(count: number): boolean {
    if (count < WARM_UP || (count - WARM_UP) % COUNTED !== 0) return false;
    if (count > WARM_UP) {
      this.least = Math.min(this.least, heapStats().heapCapacity - this.#before);
      this.#stretches += 1;
    }
    Bun.gc(true);
    this.#before = heapStats().heapCapacity;
    return this.#stretches === STRETCHES;
  }
}

/** Calls back after so many pages have been asked for. What is behind it is the source of every load. */
function counted(source: PageSource, onAsked: (count: number) => void): PageSource {
  let count = 0;
  return {
    readyFd: -1,
    resolve(block: number, page: number, pages: number, answer: PageBytes) {
      source.resolve(block, page, pages, answer);
      count += 1;
      onAsked(count);
    },
    isAtHand: (block, page, pages) => source.isAtHand?.(block, page, pages) ?? false,
    willNeed: (block, page, pages) => source.willNeed?.(block, page, pages),
    release: (block, page, pages) => source.release?.(block, page, pages),
    close: () => source.close(),
  };
}

let kept: unknown;

/** Serves thousands of faults in two blocks. @param perFault done for each. @returns growth in bytes */
async function growthOfFaults(order: string, perFault: (count: number) => void): Promise<number> {
  await using clean = new AsyncDisposableStack();
  const toucher = new TargetProcess(["anon", String(PAGES * PAGE), "0"], toucherProgram());
  clean.defer(() => toucher.kill());
  const region = await toucher.region();
  const uffd = clean.use(new Uffd(region.fd));
  uffd.register(region.addr, region.length, REGISTER_MISSING);
  const file = pageFile(PAGES);
  clean.defer(() => file.close());
  const half = PAGES / 2;
  const data: [number, number][] = [];
  for (let page = 0; page < PAGES; page += 1) if (hasData(page)) data.push([page, page + 1]);
  const { state } = clean.use(
    makeState([
      { pages: half, hostAddr: region.addr, pagesOffset: 0, data: data.filter(([p]) => p < half) },
      {
        pages: half,
        hostAddr: region.addr + half * PAGE,
        pagesOffset: half * PAGE,
        data: data.filter(([p]) => p >= half).map(([p, end]) => [p - half, end - half]),
      },
    ]),
  );
  const stopFd = sys.check(sys.eventfd(0, EFD_CLOEXEC), "eventfd");
  clean.defer(() => void sys.close(stopFd));
  const heap = new HeapGrowth();
  const source = createPageSource({ fd: file.fd }, state.metadata.blocks);
  clean.defer(() => source.close());
  const loop = new FaultLoop({
    state,
    uffd,
    source: counted(source, (count) => {
      perFault(count);
      if (heap.look(count)) sys.write(stopFd, ONE);
    }),
    counters: state.counters(0),
    stopFd,
    pidfd: -1,
    clusterPages: 1,
    movers: [],
    helperPids: [],
    replay: new Int32Array(0),
    onFailure: () => {},
    onRecovered: () => {},
  });
  clean.defer(() => loop.close());
  toucher.say(`touch 1 ${order} 7`);
  expect(loop.run()).toBe("stopped");
  return heap.least;
}

describe("the fault loop", () => {
  test.each([["1 random"], ["1 same"], ["4 random"]])(
    "leaves the heap as it is, for threads that touch %s",
    async (order) => {
      expect(await growthOfFaults(order, () => {})).toBeLessThan(GROWTH_MAX);
    },
  );

  test("would be found out by one small object for each fault", async () => {
    const growth = await growthOfFaults("1 random", (count) => (kept = { count }));
    expect(growth).toBeGreaterThan(GROWTH_MAX);
    expect(kept).toBeDefined();
  });
});

/** Host pages of 64 KiB, so that thousands of them are put together in no time. */
const HOST_PAGE = 16 * PAGE;
const HOST_PAGES = 1000;

/** @returns growth in bytes while thousands of host pages are put together */
function growthOfHostPages(perPage: (count: number) => void): number {
  const pages = (HOST_PAGES * HOST_PAGE) / PAGE;
  const spec = { pages, hostPageSize: HOST_PAGE, hostAddr: BASE };
  using made = makeState([{ ...spec, data: [] }]);
  const [block] = made.state.blocks;
  if (block === undefined) throw new Error("no block");
  // Every other page.
  for (let page = 0; page < pages; page += 2) setRange(block.data, page, page + 1);
  const bytes = mappedBytes(new Uint8Array(PAGE).fill(7));
  const source: PageSource = {
    readyFd: -1,
    resolve(_block, _page, _pages, answer) {
      answer.state = "ready";
      answer.pages = 1;
      answer.errno = 0;
      answer.address = bytes.addr;
    },
    close: () => {},
  };
  /** Takes everything. */
  const uffd = { copy: (_to: number, _from: number, length: number) => length } as unknown as Uffd;
  const supply = new Supply(uffd, source, made.state.counters(0), made.state);
  const heap = new HeapGrowth();
  for (let count = 0; !heap.look(count); count += 1) {
    if (count % HOST_PAGES === 0) block.done.fill(0);
    if (supply.copyHostPage(block, (count % HOST_PAGES) * 16) !== SUPPLIED) throw new Error("no");
    perPage(count);
  }
  supply.close();
  bytes.close();
  return heap.least;
}

describe("huge pages", () => {
  test("are put together without any allocation", () => {
    expect(growthOfHostPages(() => {})).toBeLessThan(GROWTH_MAX);
  });

  test("would be found out by one small object for each", () => {
    expect(growthOfHostPages((count) => (kept = { count }))).toBeGreaterThan(GROWTH_MAX);
  });
});
