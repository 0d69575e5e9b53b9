/**
 * Load states, page sources and userfaultfds for tests of the loops. The fake userfaultfd answers
 * by a script and keeps its own account of what is in memory, independent of the load state; the
 * loops run on it in the test's own thread.
 */
import { setRange } from "../../src/bits.ts";
import { LoadState, type StateBlock, type StateMetadata } from "../../src/load/state.ts";
import type { PageBytes, PageSource } from "../../src/source/page-source.ts";
import { EAGAIN, EFD_NONBLOCK } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import type { Uffd } from "../../src/uffd/uffd.ts";

export const PAGE = 4096;
export const BASE = 0x7f00_0000_0000;
/** No script needs more: a loop that never ends must not hang the test run. */
const READS_MAX = 200_000;
const ONE = new BigUint64Array([1n]);

export interface BlockSpec {
  readonly pages: number;
  /** Half-open runs of pages that the file has; default: all. */
  readonly data?: readonly (readonly [number, number])[];
  readonly hostAddr?: number;
  readonly hostPageSize?: number;
  readonly pagesOffset?: number;
  readonly movable?: boolean;
}

export interface StateSpec {
  readonly canDiscard?: boolean;
  /** Default: every block as a whole. */
  readonly registered?: readonly number[];
  readonly source?: unknown;
}

/** A load state with blocks `block0`, `block1` …; the caller disposes it. */
export function makeState(
  specs: readonly BlockSpec[],
  options: StateSpec = {},
): { state: LoadState; fd: number } & Disposable {
  const blocks = specs.map((spec, index): StateBlock => ({
    idstr: `block${index}`,
    hostAddr: spec.hostAddr ?? BASE + index * 2 ** 32,
    usedLength: spec.pages * PAGE,
    pageSize: PAGE,
    hostPageSize: spec.hostPageSize ?? PAGE,
    pagesOffset: spec.pagesOffset ?? 0x10_0000 + index * 2 ** 32,
    movable: spec.movable ?? false,
  }));
  const metadata: StateMetadata = {
    target: {
      pid: process.pid,
      controlPath: null,
      isControlOwn: false,
      isControlPrivate: false,
      endsWithFsl: true,
      undo: null,
    },
    paused: false,
    snapshotPath: "/dev/null",
    snapshotIdentity: {},
    blocks,
    registered:
      options.registered ?? blocks.flatMap((b) => [b.hostAddr, b.hostAddr + b.usedLength]),
    canDiscard: options.canDiscard ?? false,
    watched: { balloons: false, helpers: false },
    serving: {},
    source: options.source ?? { options: null },
  };
  const { state, fd } = LoadState.create(metadata);
  for (const [index, { pages, data }] of specs.entries()) {
    const words = state.blocks[index]?.data;
    for (const [start, end] of data ?? [[0, pages]]) if (words) setRange(words, start, end);
  }
  return {
    state,
    fd,
    [Symbol.dispose]() {
      state.unmap();
      sys.close(fd);
    },
  };
}

/** Calls to a source, as the loops make them. */
export interface SourceCall {
  readonly call: "resolve" | "willNeed" | "release" | "acknowledge";
  readonly block: number;
  readonly page: number;
  readonly pages: number;
}

/**
 * A source whose pages are at 0x1000 × (page + 1), and come, come later or fail as `answer` says.
 * It only names addresses: the fake userfaultfd does not read them.
 */
export class FakeSource implements PageSource {
  readyFd = -1;
  readonly calls: SourceCall[] = [];
  closed = false;
  /** For a page: "ready", "pending", or the errno of a failure. Default: ready. */
  answer: (block: number, page: number) => "ready" | "pending" | number = () => "ready";
  /** What `diagnose` says. */
  reason = 0;

  resolve(block: number, page: number, pages: number, answer: PageBytes): void {
    this.calls.push({ call: "resolve", block, page, pages });
    const first = this.answer(block, page);
    let ready = 0;
    while (ready < pages && this.answer(block, page + ready) === "ready") ready += 1;
    answer.state = first === "ready" || first === "pending" ? first : "failed";
    answer.errno = typeof first === "number" ? first : 0;
    answer.address = (page + 1) * PAGE;
    answer.pages = ready;
  }

  willNeed(block: number, page: number, pages: number): void {
    this.calls.push({ call: "willNeed", block, page, pages });
  }

  release(block: number, page: number, pages: number): void {
    this.calls.push({ call: "release", block, page, pages });
  }

  acknowledge(): void {
    this.calls.push({ call: "acknowledge", block: 0, page: 0, pages: 0 });
    sys.read(this.readyFd, new BigUint64Array(1), 8);
  }

  diagnose(): number {
    return this.reason;
  }

  close(): void {
    this.closed = true;
  }

  pagesAsked(call: SourceCall["call"] = "resolve"): number[] {
    return this.calls.filter((c) => c.call === call).map(({ page }) => page);
  }
}

/** A source that can say when pages have come. `announce` makes its descriptor readable. */
export function pendingSource(): { source: FakeSource; announce: () => void } & Disposable {
  const source = new FakeSource();
  source.readyFd = sys.check(sys.eventfd(0, EFD_NONBLOCK), "eventfd");
  return {
    source,
    announce: () => void sys.write(source.readyFd, ONE),
    [Symbol.dispose]: () => void sys.close(source.readyFd),
  };
}

/** An event of the script. */
export type FakeEvent =
  | { readonly fault: number }
  | { readonly remove: readonly [number, number] }
  | { readonly type: number };

/** What a call of the fake came to. */
export interface UffdCall {
  readonly call: "copy" | "zero" | "wake" | "poison";
  readonly address: number;
  readonly length: number;
  readonly source: number;
  readonly result: number;
}

/**
 * A userfaultfd by script: `batches` are the events of successive reads; when they are used up,
 * `onIdle` is called at each read, which by default ends the loop. `answers` are given to copies
 * and fills before the fake's own judgement, first come first.
 */
export class FakeUffd {
  readonly fd = sys.check(sys.eventfd(0, EFD_NONBLOCK), "eventfd");
  readonly stopFd = sys.check(sys.eventfd(0, EFD_NONBLOCK), "eventfd");
  readonly calls: UffdCall[] = [];
  /**
   * Result of the next copy or fill, or what makes it: called with the call's address and length.
   */
  readonly answers: (number | ((address: number, length: number) => number | undefined))[] = [];
  /** Pages in memory: address to where the bytes came from, 0 for zeros. */
  readonly memory = new Map<number, number>();
  onIdle: () => void = () => this.stop();
  reads = 0;
  #isQuiet = false;
  readonly #batches: (readonly FakeEvent[])[] = [];

  constructor(batches: readonly (readonly FakeEvent[])[] = []) {
    for (const batch of batches) this.queue(batch);
    // Always readable: the loop comes back until `onIdle` ends it.
    sys.write(this.fd, ONE);
  }

  /** As the loops want it. */
  get uffd(): Uffd {
    return this as unknown as Uffd;
  }

  queue(batch: readonly FakeEvent[]): void {
    this.#batches.push(batch);
  }

  stop(): void {
    sys.write(this.stopFd, ONE);
  }

  /** When the batches are used up there is nothing to read, instead of reads that find nothing. */
  quiet(): void {
    this.#isQuiet = true;
  }

  readEvents(bufferAddr: number): number {
    this.reads += 1;
    if (this.reads > READS_MAX) throw new Error("the loop reads for ever");
    const batch = this.#batches.shift();
    if (batch === undefined) {
      this.onIdle();
      return 0;
    }
    if (this.#isQuiet && this.#batches.length === 0) sys.read(this.fd, new BigUint64Array(1), 8);
    const events = new DataView(sys.view(bufferAddr, Math.max(1, batch.length) * 32));
    for (const [index, event] of batch.entries()) {
      const at = index * 32;
      if ("fault" in event) {
        events.setUint8(at, 0x12);
        events.setBigUint64(at + 16, BigInt(event.fault), true);
      } else if ("remove" in event) {
        events.setUint8(at, 0x15);
        events.setBigUint64(at + 8, BigInt(event.remove[0]), true);
        events.setBigUint64(at + 16, BigInt(event.remove[1]), true);
        for (let a = event.remove[0]; a < event.remove[1]; a += PAGE) this.memory.delete(a);
      } else {
        events.setUint8(at, event.type);
      }
    }
    return batch.length;
  }

  copy(address: number, source: number, length: number): number {
    return this.#fill("copy", address, length, source);
  }

  zeropage(address: number, length: number): number {
    return this.#fill("zero", address, length, 0);
  }

  wake(address: number, length: number): boolean {
    this.calls.push({ call: "wake", address, length, source: 0, result: 0 });
    return true;
  }

  /** Calls of one kind. */
  callsOf(call: UffdCall["call"]): UffdCall[] {
    return this.calls.filter((c) => c.call === call);
  }

  close(): void {
    sys.close(this.fd);
    sys.close(this.stopFd);
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #fill(call: "copy" | "zero", address: number, length: number, source: number): number {
    const answer = this.answers.shift();
    const scripted = typeof answer === "function" ? answer(address, length) : answer;
    const result = scripted ?? this.#untilPresent(address, length);
    if (result > 0) {
      for (let at = 0; at < result; at += PAGE) {
        this.memory.set(address + at, call === "zero" ? 0 : source + at);
      }
    }
    this.calls.push({ call, address, length, source, result });
    return result;
  }

  /**
   * As the kernel does it: nothing while a REMOVE waits to be read, else up to the first page that
   * is there.
   */
  #untilPresent(address: number, length: number): number {
    if (this.#batches.flat().some((event) => "remove" in event)) return -EAGAIN;
    let done = 0;
    while (done < length && !this.memory.has(address + done)) done += PAGE;
    return done === 0 ? -17 : done;
  }
}
