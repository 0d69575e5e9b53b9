import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { setRange, testBit } from "../../src/bits.ts";
import type { ChunkMover } from "../../src/load/chunk-mover.ts";
import { FaultLoop, type PageFailure } from "../../src/load/fault-loop.ts";
import {
  C_EAGER_PAGES,
  C_FAULT_PAGES,
  C_FAULTS,
  C_REDUNDANT_PAGES,
  C_REMOVED_PAGES,
  C_RETRIES,
  C_ZERO_PAGES,
  CHUNK_MOVING,
  CHUNK_SPLIT,
  histogramOf,
  type LoadState,
  MAIN_THREAD,
} from "../../src/load/state.ts";
import type { PageSource } from "../../src/source/page-source.ts";
import { EAGAIN, EEXIST, EFAULT, EIO, ENOENT, ENOMEM, ESRCH } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import {
  BASE,
  type BlockSpec,
  type FakeEvent,
  FakeSource,
  FakeUffd,
  makeState,
  PAGE,
  pendingSource,
  type StateSpec,
} from "../helpers/load-states.ts";

const at = (page: number): number => BASE + page * PAGE;
const fault = (page: number): FakeEvent => ({ fault: at(page) });
const remove = (first: number, end: number): FakeEvent => ({ remove: [at(first), at(end)] });

/** Everything that one run of the loop needs; disposed after each test. */
class Bench implements Disposable {
  readonly uffd: FakeUffd;
  readonly made: ReturnType<typeof makeState>;
  readonly failures: PageFailure[] = [];
  readonly recovered: PageFailure[] = [];
  source: PageSource & Pick<FakeSource, "calls"> = new FakeSource();
  clusterPages = 1;
  movers: readonly ChunkMover[] = [];
  /** Runs of the working set: block, first page, pages. */
  replay: readonly number[] = [];

  constructor(
    batches: readonly (readonly FakeEvent[])[],
    block: BlockSpec,
    options: StateSpec = {},
  ) {
    this.uffd = new FakeUffd(batches);
    this.made = makeState([block], options);
  }

  get state(): LoadState {
    return this.made.state;
  }

  run(): string {
    const loop = new FaultLoop({
      uffd: this.uffd.uffd,
      source: this.source,
      state: this.state,
      counters: this.state.counters(0),
      stopFd: this.uffd.stopFd,
      pidfd: -1,
      clusterPages: this.clusterPages,
      movers: this.movers,
      helperPids: [],
      replay: Int32Array.from(this.replay),
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
    return this.state.counters(0)[counter] ?? 0;
  }

  isDone(page: number): boolean {
    return testBit(this.state.blocks[0]?.done ?? new Int32Array(1), page);
  }

  /** Where a page's bytes came from: 0 for zeros, undefined for a page that is missing. */
  bytes(page: number): number | undefined {
    return this.uffd.memory.get(at(page));
  }

  [Symbol.dispose](): void {
    this.uffd.close();
    this.made[Symbol.dispose]();
  }
}

let benches: Bench[] = [];
beforeEach(() => {
  benches = [];
});
afterEach(() => {
  for (const bench of benches) bench[Symbol.dispose]();
});

function bench(...args: ConstructorParameters<typeof Bench>): Bench {
  const made = new Bench(...args);
  benches.push(made);
  return made;
}

/** The address at which FakeSource says that a page's bytes are. */
const sourceOf = (page: number): number => (page + 1) * PAGE;

describe("FaultLoop.run", () => {
  test("copies the page that faulted and marks it done", () => {
    const b = bench([[fault(3)]], { pages: 8 });
    expect(b.run()).toBe("stopped");
    expect(b.bytes(3)).toBe(sourceOf(3));
    expect([b.isDone(2), b.isDone(3), b.isDone(4)]).toEqual([false, true, false]);
    expect([b.count(C_FAULTS), b.count(C_FAULT_PAGES)]).toEqual([1, 1]);
  });

  test("records a latency for each fault that it served", () => {
    const b = bench([[fault(1), fault(2)], [fault(5)]], { pages: 8 });
    b.run();
    expect(histogramOf(b.state.counters(0)).reduce((sum, count) => sum + count, 0)).toBe(3);
  });

  test("logs the pages in the order of their faults", () => {
    const b = bench([[fault(5), fault(1)], [fault(7)]], { pages: 8 });
    b.run();
    expect([...b.state.faultLog().subarray(0, b.state.faultLogLength)]).toEqual([5, 1, 7]);
  });

  test("announces all pages of a batch before it copies the first", () => {
    const b = bench([[fault(5), fault(1)]], { pages: 8 });
    b.run();
    expect(b.source.calls.map(({ call, page }) => `${call} ${page}`)).toEqual([
      "willNeed 5",
      "willNeed 1",
      "resolve 5",
      "resolve 1",
    ]);
  });

  test("wakes the range when the page is there already", () => {
    const b = bench([[fault(3)]], { pages: 8 });
    b.uffd.answers.push(-EEXIST);
    b.run();
    expect(b.uffd.callsOf("wake")).toMatchObject([{ address: at(3), length: PAGE }]);
    expect([b.isDone(3), b.count(C_REDUNDANT_PAGES)]).toEqual([true, 1]);
  });

  test("serves two threads that fault on one page with one copy", () => {
    const b = bench([[fault(3), fault(3)]], { pages: 8 });
    b.run();
    expect(b.uffd.callsOf("copy")).toHaveLength(1);
    expect(b.bytes(3)).toBe(sourceOf(3));
    expect(b.count(C_FAULTS)).toBe(2);
  });

  test("reads events again and again until a copy that was put off succeeds", () => {
    const b = bench([[fault(3)]], { pages: 8 });
    b.uffd.onIdle = () => {
      if (b.isDone(3)) b.uffd.stop();
    };
    b.uffd.answers.push(...Array.from({ length: 100 }, () => -EAGAIN));
    b.run();
    expect(b.bytes(3)).toBe(sourceOf(3));
    expect(b.count(C_RETRIES)).toBe(100);
  });

  test("gives zeros after a REMOVE that was read while the copy was put off", () => {
    const b = bench([[fault(3)], [remove(2, 5)]], { pages: 8 }, { canDiscard: true });
    b.uffd.onIdle = () => {
      if (b.bytes(3) !== undefined) b.uffd.stop();
    };
    b.run();
    expect(b.bytes(3)).toBe(0);
    expect(b.count(C_REMOVED_PAGES)).toBe(3);
  });

  test("takes every REMOVE of a batch before its faults", () => {
    const b = bench([[fault(3), remove(3, 4)]], { pages: 8 }, { canDiscard: true });
    b.run();
    expect(b.bytes(3)).toBe(0);
    expect(b.source.calls.filter(({ call }) => call === "resolve")).toEqual([]);
  });

  test("clips a REMOVE to the block", () => {
    const b = bench([[{ remove: [BASE - 4 * PAGE, at(2)] }]], { pages: 8 }, { canDiscard: true });
    b.run();
    expect([b.isDone(0), b.isDone(1), b.isDone(2)]).toEqual([true, true, false]);
  });

  test("fills the zero pages around a fault on one, and no data page", () => {
    const b = bench([[fault(5)]], {
      pages: 16,
      data: [
        [2, 3],
        [9, 10],
      ],
    });
    b.run();
    expect([3, 4, 5, 6, 7, 8].map((page) => b.bytes(page))).toEqual([0, 0, 0, 0, 0, 0]);
    expect([b.bytes(2), b.bytes(9), b.bytes(10), b.bytes(1)]).toEqual([
      undefined,
      undefined,
      undefined,
      undefined,
    ]);
    expect([b.count(C_ZERO_PAGES), b.count(C_FAULT_PAGES)]).toEqual([6, 0]);
  });

  test("fills zeros only within one registered range", () => {
    const registered = [BASE, at(4), at(6), at(16)];
    const b = bench([[fault(7)]], { pages: 16, data: [] }, { registered });
    b.run();
    expect([b.bytes(3), b.bytes(5), b.bytes(6), b.bytes(15)]).toEqual([undefined, undefined, 0, 0]);
  });

  test("fills a fault on a page that is done with zeros: it was given back", () => {
    const b = bench([[fault(3)]], { pages: 8 });
    setRange(b.state.blocks[0]?.done ?? new Int32Array(1), 0, 8);
    b.run();
    expect(b.bytes(3)).toBe(0);
  });

  test("fills zeros one by one where a run crosses two areas", () => {
    const b = bench([[fault(0)]], { pages: 4, data: [] });
    b.uffd.answers.push(-ENOENT);
    b.run();
    expect([0, 1, 2, 3].map((page) => b.bytes(page))).toEqual([0, 0, 0, 0]);
  });

  test("goes on where a fill ended early", () => {
    const b = bench([[fault(0)]], { pages: 8, data: [] });
    b.uffd.answers.push(2 * PAGE, PAGE);
    b.run();
    expect(b.count(C_ZERO_PAGES)).toBe(8);
  });

  test("waits with a zero page for which there is no memory, and tries again", () => {
    const b = bench([[fault(0)]], { pages: 1, data: [] });
    b.uffd.quiet();
    b.uffd.answers.push(-ENOMEM, () => {
      b.uffd.stop();
      return undefined;
    });
    expect(b.run()).toBe("stopped");
    expect(b.bytes(0)).toBe(0);
    expect(b.failures).toMatchObject([{ pageIndex: 0, errno: ENOMEM }]);
  });

  test.each([
    ["copy", { pages: 8 }],
    ["fill", { pages: 8, data: [] }],
  ] as const)("ends when a %s says that the target is gone", (_, block) => {
    const b = bench([[fault(3)], [fault(4)]], block);
    b.uffd.answers.push(-ESRCH);
    expect(b.run()).toBe("gone");
    expect(b.uffd.reads).toBe(1);
  });

  test("ends when the target's pidfd is readable", () => {
    const b = bench([], { pages: 8 });
    const ended = sys.check(sys.eventfd(1, 0), "eventfd");
    const loop = new FaultLoop({
      uffd: b.uffd.uffd,
      source: b.source,
      state: b.state,
      counters: b.state.counters(0),
      stopFd: -1,
      pidfd: ended,
      clusterPages: 1,
      movers: [],
      helperPids: [],
      replay: new Int32Array(0),
      onFailure: () => {},
      onRecovered: () => {},
    });
    expect(loop.run()).toBe("gone");
    sys.close(ended);
  });

  test("ends without serving when the state says stop", () => {
    const b = bench([[fault(3)]], { pages: 8 });
    b.state.stop();
    expect(b.run()).toBe("stopped");
    expect(b.uffd.calls).toEqual([]);
  });

  test("leaves a page that cannot be read unserved, tells, and serves it when it can be", () => {
    const b = bench([[fault(3), fault(4)]], { pages: 8, pagesOffset: 0x20000 });
    const source = new FakeSource();
    b.source = source;
    let attempts = 0;
    source.answer = (_, page) => {
      if (page !== 3) return "ready";
      attempts += 1;
      return attempts <= 3 ? EIO : "ready";
    };
    b.uffd.quiet();
    b.uffd.answers.push(
      () => undefined,
      () => {
        b.uffd.stop();
        return undefined;
      },
    );
    b.run();
    expect(b.failures[0]).toEqual({
      idstr: "block0",
      pageIndex: 3,
      fileOffset: 0x20000 + 3 * PAGE,
      errno: EIO,
      attempts: 1,
    });
    expect(b.recovered).toMatchObject([{ pageIndex: 3 }]);
    expect([b.bytes(3), b.bytes(4)]).toEqual([sourceOf(3), sourceOf(4)]);
    expect(b.uffd.callsOf("copy").map(({ address }) => address)).toEqual([at(4), at(3)]);
    expect(b.state.failedPages).toBe(0);
  });

  test("reports the page's own errno when copies fail on unreadable bytes", () => {
    const b = bench([[fault(3)]], { pages: 8 });
    const source = new FakeSource();
    source.reason = EIO;
    b.source = source;
    b.uffd.answers.push(-EFAULT);
    b.run();
    expect(b.failures).toMatchObject([{ pageIndex: 3, errno: EIO }]);
    expect(b.isDone(3)).toBe(false);
    expect(b.state.failedPages).toBe(1);
  });

  test("reports one waiting page once, however many threads fault on it", () => {
    const b = bench([[fault(3), fault(3)], [fault(3)]], { pages: 8 });
    const source = new FakeSource();
    source.answer = () => EIO;
    b.source = source;
    b.run();
    expect(b.failures).toHaveLength(1);
    expect(b.count(C_FAULTS)).toBe(3);
  });

  test("serves a page that comes later when its source says so, and asks no sooner", () => {
    const b = bench([[fault(3)]], { pages: 8 });
    using pending = pendingSource();
    const { source } = pending;
    b.source = source;
    source.answer = () => "pending";
    b.uffd.onIdle = () => {
      source.answer = () => "ready";
      pending.announce();
    };
    b.uffd.answers.push(() => {
      b.uffd.stop();
      return undefined;
    });
    b.run();
    expect(b.bytes(3)).toBe(sourceOf(3));
    expect(source.pagesAsked()).toEqual([3, 3]);
    expect(source.pagesAsked("acknowledge")).toHaveLength(1);
  });

  test("acknowledges a source's news although nobody waits", () => {
    const b = bench([[fault(3)]], { pages: 8 });
    using pending = pendingSource();
    b.source = pending.source;
    pending.announce();
    const { acknowledge } = pending.source;
    pending.source.acknowledge = () => {
      acknowledge.call(pending.source);
      b.uffd.stop();
    };
    b.uffd.onIdle = () => {};
    expect(b.run()).toBe("stopped");
  });

  test("brings in neighbours that have data after everybody was served", () => {
    const b = bench([[fault(5), fault(9)]], {
      pages: 16,
      data: [
        [0, 6],
        [7, 16],
      ],
    });
    b.clusterPages = 4;
    // Nothing more to read: else neighbours give way.
    b.uffd.quiet();
    b.uffd.answers.push(...Array.from({ length: 4 }, () => () => undefined), () => {
      b.uffd.stop();
      return undefined;
    });
    b.run();
    const copied = b.uffd
      .callsOf("copy")
      .map(({ address, length }) => [(address - BASE) / PAGE, length / PAGE]);
    expect(copied).toEqual([
      [5, 1],
      [9, 1],
      [4, 1],
      [7, 1],
      [8, 1],
      [10, 2],
    ]);
    expect(b.bytes(6)).toBeUndefined();
  });

  test("brings in no neighbours while another fault waits", () => {
    const b = bench([[fault(5)], [fault(9)]], { pages: 16 });
    b.clusterPages = 4;
    b.run();
    expect(b.uffd.callsOf("copy").map(({ address }) => address)).toEqual([at(5), at(9)]);
  });

  test("first serves the events that a dead loop had read", () => {
    const b = bench([], { pages: 8 });
    const events = b.state.eventsView();
    events.setUint8(0, 0x12);
    events.setBigUint64(16, BigInt(at(6)), true);
    b.state.eventCount = 1;
    b.run();
    expect(b.bytes(6)).toBe(sourceOf(6));
    expect(b.state.eventCount).toBe(0);
  });

  test("opens the gate that a dead loop had closed", () => {
    const b = bench([], { pages: 8 }, { canDiscard: true });
    b.state.closeGate();
    b.run();
    expect(b.state.enterCopy(1)).toBe(true);
  });

  test("keeps the events of a batch whose serving failed for the next loop", () => {
    const b = bench([[fault(3), fault(4)]], { pages: 8 });
    const source = new FakeSource();
    source.resolve = () => {
      throw new Error("a bug in the source");
    };
    b.source = source;
    expect(() => b.run()).toThrow("a bug in the source");
    expect(b.state.eventCount).toBe(2);
    b.source = new FakeSource();
    b.run();
    expect([b.bytes(3), b.bytes(4)]).toEqual([sourceOf(3), sourceOf(4)]);
  });

  test.each([
    ["a fault outside every block", [{ fault: BASE - PAGE }], /outside every block/],
    ["an event that nobody asked for", [{ type: 0x13 }], /event 0x13: not asked for/],
  ] as const)("refuses %s", (_, batch, message) => {
    const b = bench([batch], { pages: 8 });
    expect(() => b.run()).toThrow(message);
  });

  test("puts a huge page together from data and zeros", () => {
    const hostPageSize = 4 * PAGE;
    const b = bench([[fault(6)]], {
      pages: 8,
      data: [
        [4, 5],
        [6, 7],
      ],
      hostPageSize,
    });
    // The bytes are really read for that, so they must be somewhere.
    const bytes = new Uint8Array(8 * PAGE).fill(0x5a);
    const source = new FakeSource();
    source.resolve = (_block, page, pages, answer) => {
      Object.assign(answer, { state: "ready", address: sys.ptrOf(bytes) + page * PAGE, pages });
    };
    b.source = source;
    let assembled: number[] = [];
    b.uffd.copy = (address, from, length) => {
      const seen = new Uint8Array(sys.view(from, length));
      assembled = [0, 1, 2, 3].map((page) => seen[page * PAGE] ?? -1);
      return address === at(4) ? length : -ENOENT;
    };
    b.run();
    expect(assembled).toEqual([0x5a, 0, 0x5a, 0]);
    expect([4, 5, 6, 7, 3].map((page) => b.isDone(page))).toEqual([true, true, true, true, false]);
  });
});

describe("FaultLoop.run with a working set", () => {
  /** Ends the loop when the last run has been looked at. */
  function replaying(block: BlockSpec, replay: readonly number[]): Bench {
    const b = bench([[]], block);
    b.uffd.quiet();
    b.replay = replay;
    b.source.release = () => b.uffd.stop();
    b.source.isAtHand = () => true;
    return b;
  }

  test("brings its runs while nobody waits, zero pages as zeros", () => {
    const b = replaying({ pages: 600, data: [[0, 100]] }, [0, 4, 3, 0, 500, 1, 0, 90, 1]);
    expect(b.run()).toBe("stopped");
    const brought = [3, 4, 5, 6, 7, 90].map((page) => b.bytes(page));
    expect(brought).toEqual([
      undefined,
      sourceOf(4),
      sourceOf(5),
      sourceOf(6),
      undefined,
      sourceOf(90),
    ]);
    expect(b.bytes(500)).toBe(0);
    expect([b.count(C_FAULTS), b.count(C_EAGER_PAGES)]).toEqual([0, 4]);
  });

  test("leaves to the eager load what is not at hand", () => {
    const b = replaying({ pages: 600 }, [0, 4, 1, 0, 9, 1]);
    b.source.isAtHand = (_block, page) => page === 9;
    b.run();
    expect([b.bytes(4), b.bytes(9)]).toEqual([undefined, sourceOf(9)]);
  });

  test("serves a fault first", () => {
    const b = replaying({ pages: 600 }, [0, 4, 1]);
    b.uffd.queue([fault(300)]);
    b.run();
    expect(b.uffd.callsOf("copy").map(({ address }) => (address - BASE) / PAGE)).toEqual([300, 4]);
  });

  test("brings nothing of a chunk that comes as a whole", () => {
    const b = replaying({ pages: 1024 }, [0, 4, 1, 0, 600, 1]);
    const chunks = b.state.blocks[0]?.chunks;
    chunks?.set([CHUNK_MOVING + 1]);
    b.run();
    expect([b.bytes(4), b.bytes(600)]).toEqual([undefined, sourceOf(600)]);
  });
});

describe("a fault in a chunk that the eager load has in hand", () => {
  /** One fault in page 4, in a chunk that is coming as a whole. */
  function inHand(worker: number, isAtHand: boolean, isBulk = false): Bench {
    const b = bench([[fault(4)]], { pages: 1024 });
    const source = new FakeSource();
    b.source = Object.assign(source, { isAtHand: () => isAtHand });
    b.state.blocks[0]?.chunks.set([CHUNK_MOVING + worker]);
    if (isBulk) b.state.setBulk();
    b.run();
    return b;
  }
  const wordOf = (b: Bench): number | undefined => b.state.blocks[0]?.chunks[0];
  const sinceOf = (b: Bench): number | undefined => b.state.blocks[0]?.chunkFaultNs[0];

  test("gets its page alone, sooner than the chunk, and the chunk is left in hand", () => {
    const b = inHand(1, true);
    expect(b.bytes(4)).toBe(sourceOf(4));
    expect([wordOf(b), sinceOf(b)]).toEqual([CHUNK_MOVING + 1, 0]);
    expect(testBit(b.state.blocks[0]?.done ?? new Int32Array(1), 4)).toBe(true);
  });

  test.each([
    ["the page would have to be read from a disk first", 1, false, false],
    ["the guest reads on and on", 1, true, true],
    ["what was read ahead is being moved", MAIN_THREAD, true, false],
    ["it is brought for a fault", 0, true, false],
  ])("waits for the chunk when %s", (_why, worker, isAtHand, isBulk) => {
    const b = inHand(worker, isAtHand, isBulk);
    expect(b.bytes(4)).toBeUndefined();
    expect(wordOf(b)).toBe(CHUNK_MOVING + worker);
    expect(sinceOf(b)).toBeGreaterThan(0);
  });
});

describe("faults in one untouched chunk after the other, at once", () => {
  const CHUNKS = 10;
  const CHUNK_PAGES = 512;

  /** One in each chunk. @returns the chunks that its helper was given, too */
  function spread(count: number, movable: boolean, helpers = 1): { b: Bench; given: number[] } {
    const given: number[] = [];
    const faults = Array.from({ length: count }, (_, chunk) => fault(chunk * CHUNK_PAGES + 9));
    // In one batch they have one time.
    const b = bench([faults], { pages: CHUNKS * CHUNK_PAGES, movable });
    const helper = {
      ...{ fd: -1, isGone: false, isRunning: false, isFree: true, isFull: true, batch: [] },
      add: (_state: unknown, chunk: number) => given.push(chunk),
      send: () => {},
    };
    b.movers = Array.from({ length: helpers }, () => helper as unknown as ChunkMover);
    b.run();
    return { b, given };
  }

  test("from the eighth on each brings its chunk", () => {
    const { b, given } = spread(CHUNKS, true);
    expect([b.state.isBulk, given]).toEqual([true, [7, 8, 9]]);
    const words = [...(b.state.blocks[0]?.chunks ?? [])];
    expect(words.slice(0, 7)).toEqual(Array(7).fill(CHUNK_SPLIT));
    expect(words.slice(7)).toEqual(Array(3).fill(CHUNK_MOVING));
  });

  test.each([
    ["seven of them", 7, true, 1],
    ["memory that cannot be moved", CHUNKS, false, 1],
    ["no helper", CHUNKS, true, 0],
  ])("are no burst: %s", (_why, count, movable, helpers) => {
    const { b, given } = spread(count, movable, helpers);
    expect([b.state.isBulk, given]).toEqual([false, []]);
    expect(b.count(C_FAULT_PAGES)).toBe(count);
  });
});

test("many faults: the guest reads on and on, and the record of first touches ends", () => {
  const pages = Array.from({ length: 400 }, (_, index) => index);
  const b = bench(
    pages.map((page) => [fault(page)]),
    { pages: 512 },
  );
  b.run();
  expect([b.count(C_FAULTS), b.state.isBulk]).toEqual([400, true]);
  expect(b.state.faultLogLength).toBe(256);
});
