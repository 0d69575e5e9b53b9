import { afterEach, describe, expect, test } from "bun:test";
import { setRange } from "../../src/bits.ts";
import { EagerLoop } from "../../src/load/eager-loop.ts";
import type { PageFailure } from "../../src/load/fault-loop.ts";
import { orderChunks } from "../../src/load/order.ts";
import {
  C_EAGER_PAGES,
  C_REDUNDANT_PAGES,
  C_RETRIES,
  type LoadState,
} from "../../src/load/state.ts";
import { EAGAIN, EIO, ENOENT, ESRCH } from "../../src/sys/abi.ts";
import {
  BASE,
  type BlockSpec,
  FakeSource,
  FakeUffd,
  makeState,
  PAGE,
  pendingSource,
  type StateSpec,
} from "../helpers/load-states.ts";

const WORKER = 1;
const CHUNK_PAGES = 512;
const sourceOf = (page: number): number => (page + 1) * PAGE;

class Bench implements Disposable {
  readonly uffd = new FakeUffd();
  readonly made: ReturnType<typeof makeState>;
  readonly failures: PageFailure[] = [];
  readonly recovered: PageFailure[] = [];
  source = new FakeSource();
  replay: readonly number[] = [];
  bytesPerSecond = 0;
  pieceLength = 256 * 1024;
  pendingMax = 2 ** 24;

  constructor(blocks: readonly BlockSpec[], options: StateSpec = {}) {
    this.made = makeState(blocks, options);
  }

  get state(): LoadState {
    return this.made.state;
  }

  run(): string {
    const loop = new EagerLoop({
      uffd: this.uffd.uffd,
      source: this.source,
      state: this.state,
      counters: this.state.counters(WORKER),
      workerIndex: WORKER,
      pieceLength: this.pieceLength,
      order: orderChunks(this.state.blocks),
      replay: Int32Array.from(this.replay),
      movers: [],
      bytesPerSecond: this.bytesPerSecond,
      pendingMax: this.pendingMax,
      onFailure: (failure) => this.failures.push(failure),
      onRecovered: (failure) => this.recovered.push(failure),
    });
    try {
      return loop.run();
    } finally {
      loop.close();
    }
  }

  count(counter: number): number {
    return this.state.counters(WORKER)[counter] ?? 0;
  }

  /** Copies as [first page, pages]. */
  copies(): number[][] {
    return this.uffd
      .callsOf("copy")
      .map(({ address, length }) => [(address - BASE) / PAGE, length / PAGE]);
  }

  bytes(page: number): number | undefined {
    return this.uffd.memory.get(BASE + page * PAGE);
  }

  [Symbol.dispose](): void {
    this.uffd.close();
    this.made[Symbol.dispose]();
  }
}

const benches: Bench[] = [];
afterEach(() => {
  for (const bench of benches.splice(0)) bench[Symbol.dispose]();
});

function bench(...args: ConstructorParameters<typeof Bench>): Bench {
  const made = new Bench(...args);
  benches.push(made);
  return made;
}

describe("EagerLoop.run", () => {
  test("copies data pages, and no zero page", () => {
    const b = bench([
      {
        pages: 1000,
        data: [
          [3, 5],
          [700, 702],
        ],
      },
    ]);
    expect(b.run()).toBe("finished");
    expect(b.copies()).toEqual([
      [3, 2],
      [700, 2],
    ]);
    expect([b.bytes(3), b.bytes(701)]).toEqual([sourceOf(3), sourceOf(701)]);
    expect(b.count(C_EAGER_PAGES)).toBe(4);
  });

  test("copies no more than a piece at once", () => {
    const b = bench([{ pages: 40 }]);
    b.pieceLength = 16 * PAGE;
    b.run();
    expect(b.copies()).toEqual([
      [0, 16],
      [16, 16],
      [32, 8],
    ]);
  });

  test("leaves out what came by faults", () => {
    const b = bench([{ pages: 10 }]);
    setRange(b.state.blocks[0]?.done ?? new Int32Array(1), 2, 8);
    b.run();
    expect(b.copies()).toEqual([
      [0, 2],
      [8, 2],
    ]);
  });

  test("goes on behind a page that is there already", () => {
    const b = bench([{ pages: 10 }]);
    b.uffd.memory.set(BASE + 4 * PAGE, 1);
    expect(b.run()).toBe("finished");
    expect(b.count(C_EAGER_PAGES)).toBe(9);
    expect(b.count(C_REDUNDANT_PAGES)).toBe(1);
    expect(b.bytes(4)).toBe(1);
  });

  test("copies page by page where a run crosses areas, and goes past what is not mapped", () => {
    const b = bench([{ pages: 4 }]);
    b.uffd.answers.push(-ENOENT, () => undefined, -ENOENT);
    expect(b.run()).toBe("finished");
    expect(b.copies().slice(1)).toEqual([
      [0, 1],
      [1, 1],
      [2, 1],
      [3, 1],
    ]);
    expect([b.bytes(0), b.bytes(1), b.bytes(3)]).toEqual([sourceOf(0), undefined, sourceOf(3)]);
  });

  test("waits while copies are put off", () => {
    const b = bench([{ pages: 4 }]);
    b.uffd.answers.push(-EAGAIN, -EAGAIN, -EAGAIN);
    expect(b.run()).toBe("finished");
    expect([b.count(C_EAGER_PAGES), b.count(C_RETRIES)]).toEqual([4, 3]);
  });

  test("gives chunks back to the source once, when they are complete", () => {
    const b = bench([{ pages: 2 * CHUNK_PAGES }]);
    b.run();
    const released = b.source.calls.filter(({ call }) => call === "release");
    expect(released.map(({ page, pages }) => [page, pages])).toEqual([
      [0, CHUNK_PAGES],
      [CHUNK_PAGES, CHUNK_PAGES],
    ]);
  });

  test("goes past a page that cannot be read, tells once, and brings it when it can be", () => {
    const b = bench([{ pages: 2 * CHUNK_PAGES, pagesOffset: 0x40000 }]);
    let attempts = 0;
    b.source.answer = (_, page) => {
      if (page !== 7) return "ready";
      attempts += 1;
      return attempts <= 4 ? EIO : "ready";
    };
    expect(b.run()).toBe("finished");
    expect(b.failures[0]).toEqual({
      idstr: "block0",
      pageIndex: 7,
      fileOffset: 0x40000 + 7 * PAGE,
      errno: EIO,
      attempts: 1,
    });
    expect(b.recovered).toMatchObject([{ pageIndex: 7 }]);
    expect(b.bytes(7)).toBe(sourceOf(7));
    // All the rest came before the second attempt.
    expect(b.copies().at(-1)).toEqual([7, 1]);
    const released = b.source.calls.filter(({ call }) => call === "release");
    expect(released.map(({ page }) => page)).toEqual([CHUNK_PAGES, 0]);
  });

  test("brings pages that come later as soon as the source has news", () => {
    const b = bench([{ pages: 8 }]);
    using pending = pendingSource();
    b.source = pending.source;
    const here = new Set<number>();
    b.source.answer = (_, page) => {
      if (here.has(page)) return "ready";
      here.add(page);
      pending.announce();
      return "pending";
    };
    expect(b.run()).toBe("finished");
    expect(b.count(C_EAGER_PAGES)).toBe(8);
    expect(b.failures).toEqual([]);
    expect(b.source.pagesAsked("acknowledge").length).toBeGreaterThan(0);
  });

  /** A source that holds what it was asked for until it says that all of it is there. */
  function lateSource(b: Bench, pending: ReturnType<typeof pendingSource>) {
    const { source } = pending;
    const asked = new Set<number>();
    const here = new Set<number>();
    const late = { most: 0, deliver: (): boolean => asked.size > 0 };
    b.source = source;
    source.answer = (_, page) => {
      if (here.has(page)) return "ready";
      // What a resolve looks at beyond its first page has not been asked for.
      if (source.calls.at(-1)?.page !== page) return 0;
      asked.add(page);
      late.most = Math.max(late.most, asked.size);
      pending.announce();
      return "pending";
    };
    const { acknowledge } = source;
    source.acknowledge = () => {
      acknowledge.call(source);
      if (!late.deliver()) return pending.announce();
      for (const page of asked) here.add(page);
      asked.clear();
    };
    return late;
  }

  test("asks for no more pages than it may while others are pending, and brings all", () => {
    const b = bench([{ pages: 4 * CHUNK_PAGES }]);
    using pending = pendingSource();
    const late = lateSource(b, pending);
    b.pendingMax = 600 * PAGE;
    // Nothing is given until the loop has come to wait for it.
    let asks = 0;
    late.deliver = () => (asks += 1) % 3 === 0;
    expect(b.run()).toBe("finished");
    expect(b.count(C_EAGER_PAGES)).toBe(4 * CHUNK_PAGES);
    expect(late.most).toBeGreaterThan(500);
    expect(late.most).toBeLessThanOrEqual(600);
  });

  test("asks for no more than that of the working set either, and brings it before the rest", () => {
    const b = bench([{ pages: 4 * CHUNK_PAGES }]);
    using pending = pendingSource();
    const late = lateSource(b, pending);
    let asks = 0;
    late.deliver = () => (asks += 1) % 3 === 0;
    b.pendingMax = 4 * PAGE;
    const set = [1500, 3, 700, 1200, 9, 2000, 11, 1300];
    b.replay = set.flatMap((page) => [0, page, 1]);
    b.uffd.copy = (address, from, length) => {
      b.uffd.calls.push({ call: "copy", address, length, source: from, result: length });
      if (b.copies().length === set.length) b.state.stop();
      return length;
    };
    expect(b.run()).toBe("stopped");
    expect(b.copies().toSorted(([a = 0], [c = 0]) => a - c)).toEqual(
      set.toSorted((a, c) => a - c).map((page) => [page, 1]),
    );
    expect(late.most).toBeLessThanOrEqual(4);
  });

  test("skips a huge page that cannot be read as a whole", () => {
    const hostPageSize = 4 * PAGE;
    const b = bench([{ pages: 8, hostPageSize }]);
    b.source.answer = (_, page) => (page < 4 ? EIO : "ready");
    b.uffd.copy = (address, from, length) => {
      b.state.stop();
      b.uffd.calls.push({ call: "copy", address, length, source: from, result: length });
      return length;
    };
    // The bytes are really read for that: there are none at the fake's addresses.
    b.source.resolve = (_block, page, pages, answer) => {
      const failed = page < 4;
      Object.assign(answer, {
        state: failed ? "failed" : "ready",
        errno: failed ? EIO : 0,
        address: b.state.eventsAddress,
        pages: Math.min(pages, 2),
      });
    };
    expect(b.run()).toBe("stopped");
    expect(b.failures.map(({ pageIndex }) => pageIndex)).toEqual([0]);
    expect(b.copies()).toEqual([[4, 4]]);
  });

  test("ends when a copy says that the target is gone", () => {
    const b = bench([{ pages: 2 * CHUNK_PAGES }]);
    b.uffd.answers.push(-ESRCH);
    expect(b.run()).toBe("gone");
    expect(b.copies()).toHaveLength(1);
  });

  test("ends at once when it is told to, however low its rate is", () => {
    const b = bench([{ pages: CHUNK_PAGES }]);
    b.bytesPerSecond = 1;
    b.uffd.answers.push(() => {
      b.state.stop();
      return undefined;
    });
    expect(b.run()).toBe("stopped");
    expect(b.copies()).toEqual([[0, 1]]);
  });

  test("brings the working set first, in its order", () => {
    const b = bench([{ pages: 4 * CHUNK_PAGES }]);
    b.replay = [0, 1500, 2, 0, 3, 1];
    b.run();
    expect(b.copies().slice(0, 2)).toEqual([
      [1500, 2],
      [3, 1],
    ]);
    expect(b.count(C_EAGER_PAGES)).toBe(4 * CHUNK_PAGES);
  });

  test("copies nothing that was given back", () => {
    const b = bench([{ pages: 8 }], { canDiscard: true });
    setRange(b.state.blocks[0]?.done ?? new Int32Array(1), 0, 4);
    b.run();
    expect(b.copies()).toEqual([[4, 4]]);
    expect(b.state.copiesInFlight).toBe(false);
  });
});
