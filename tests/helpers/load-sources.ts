/**
 * A page source that fsl does not know: a module as a user would write it, named by
 * `source: { module, options }`. It is several of them, by `kind`:
 *
 *   pread    reads the snapshot's pages into a buffer of its own
 *   pattern  makes pages up: each is filled with words that say which page it is
 *   later    reads like pread, but a page is never there when it is first asked for
 *   thread   pages come from another thread, which reads them one by one and says so by an eventfd
 *   dying    like pread, but throws once, in the Worker that asks for page `failPage` first
 *   never    is asked for pages, and has none
 *   stuck    like pread, but each answer takes 3 s, as that of a disk that hangs
 *   failing  like pread, but page `failPage` cannot be read until the file `marker` is there
 */
import { closeSync, existsSync, openSync, readSync, writeFileSync } from "node:fs";
import type { CreatePageSource, PageBytes, PageSource, SourceBlock } from "../../src/index.ts";
import { EFD_NONBLOCK, EIO } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";

export interface TestSourceOptions {
  readonly kind: "pread" | "pattern" | "later" | "thread" | "never" | "stuck" | "dying" | "failing";
  readonly path: string;
  readonly failPage?: number;
  /** A file that says that it has thrown: Workers share no memory of ours. */
  readonly marker?: string;
}

const PAGES_MAX = 64;
const STUCK_MS = 3000;
const ONE = new BigUint64Array([1n]);

/** The page that kind `pattern` makes up. */
export function patternPage(idstr: string, pageIndex: number, pageSize: number): Uint8Array {
  const words = new Uint32Array(pageSize / 4);
  const block = Bun.hash.crc32(idstr);
  for (let word = 0; word < words.length; word += 1) {
    words[word] = Math.imul(pageIndex * 1024 + word + 1, 2_654_435_761) ^ block;
  }
  return new Uint8Array(words.buffer);
}

class TestSource implements PageSource {
  readonly readyFd: number = -1;
  readonly #fd: number;
  // SAFETY: stays referenced by this object while the kernel reads from it.
  readonly #buffer: Uint8Array;

  readonly options: TestSourceOptions;
  readonly blocks: readonly SourceBlock[];

  constructor(options: TestSourceOptions, blocks: readonly SourceBlock[]) {
    this.options = options;
    this.blocks = blocks;
    this.#fd = openSync(options.path, "r");
    this.#buffer = new Uint8Array(PAGES_MAX * 4096);
  }

  resolve(blockIndex: number, pageIndex: number, pagesMax: number, answer: PageBytes): void {
    const block = this.blocks[blockIndex];
    if (block === undefined) throw new Error(`no block ${blockIndex}`);
    const { idstr, pageSize, pagesOffset } = block;
    if (this.options.kind === "stuck") Bun.sleepSync(STUCK_MS);
    const pages = this.#readable(pageIndex, Math.min(pagesMax, PAGES_MAX));
    answer.state = pages > 0 ? "ready" : "failed";
    answer.errno = pages > 0 ? 0 : EIO;
    for (let page = pageIndex; page < pageIndex + pages; page += 1) {
      if (this.options.kind === "dying" && page === this.options.failPage) this.#dieOnce();
      const at = (page - pageIndex) * pageSize;
      const part = this.#buffer.subarray(at, at + pageSize);
      if (this.options.kind === "pattern") part.set(patternPage(idstr, page, pageSize));
      else readSync(this.#fd, part, 0, pageSize, pagesOffset + page * pageSize);
    }
    answer.address = sys.ptrOf(this.#buffer);
    answer.pages = pages;
  }

  /** How many of the pages can be read. */
  #readable(pageIndex: number, pages: number): number {
    const { kind, failPage = -1, marker = "" } = this.options;
    const isIn = failPage >= pageIndex && failPage < pageIndex + pages;
    return kind !== "failing" || !isIn || existsSync(marker) ? pages : failPage - pageIndex;
  }

  #dieOnce(): void {
    const { marker = "" } = this.options;
    if (existsSync(marker)) return;
    writeFileSync(marker, "");
    throw new Error("the source breaks down");
  }

  close(): void {
    closeSync(this.#fd);
  }
}

/** Every page is asked for twice: the first time it is not there. */
class LaterSource extends TestSource {
  override readonly readyFd = sys.check(sys.eventfd(0, EFD_NONBLOCK), "eventfd");
  readonly #asked = new Set<number>();
  readonly #here = new Set<number>();

  override resolve(block: number, page: number, _pagesMax: number, answer: PageBytes): void {
    const key = block * 2 ** 32 + page;
    if (!this.#here.has(key)) {
      this.#asked.add(key);
      answer.state = "pending";
      sys.write(this.readyFd, ONE);
      return;
    }
    super.resolve(block, page, 1, answer);
  }

  acknowledge(): void {
    sys.read(this.readyFd, new BigUint64Array(1), 8);
    for (const key of this.#asked) this.#here.add(key);
    this.#asked.clear();
  }

  override close(): void {
    super.close();
    sys.close(this.readyFd);
  }
}

class NeverSource extends TestSource {
  override readonly readyFd = sys.check(sys.eventfd(0, EFD_NONBLOCK), "eventfd");

  override resolve(_block: number, _page: number, _pagesMax: number, answer: PageBytes): void {
    answer.state = "pending";
  }
}

const SLOTS = 1024;
/** Words of a slot: page and block that are asked for, and its state. */
const SLOT_WORDS = 3;
const SLOT_STATE = 2;
const FREE = 0;
const ASKED = 1;
const HERE = 2;

/** Pages come from a thread; a table of slots says which. */
class ThreadSource implements PageSource {
  readonly readyFd = sys.check(sys.eventfd(0, EFD_NONBLOCK), "eventfd");
  readonly #slots = new Int32Array(new SharedArrayBuffer(SLOTS * SLOT_WORDS * 4 + 4));
  readonly #bytes = new Uint8Array(new SharedArrayBuffer(SLOTS * 4096));
  readonly #thread: Worker;
  #given: number | undefined;

  constructor(options: TestSourceOptions, blocks: readonly SourceBlock[]) {
    this.#thread = new Worker(new URL("load-source-thread.ts", import.meta.url).href);
    this.#thread.postMessage({
      path: options.path,
      pagesOffsets: blocks.map(({ pagesOffset }) => pagesOffset),
      slots: this.#slots,
      bytes: this.#bytes,
      readyFd: this.readyFd,
    });
  }

  resolve(block: number, page: number, _pagesMax: number, answer: PageBytes): void {
    // The page that was given last has been copied.
    if (this.#given !== undefined) this.#setState(this.#given, FREE);
    this.#given = undefined;
    const slot = page % SLOTS;
    const at = slot * SLOT_WORDS;
    const state = Atomics.load(this.#slots, at + SLOT_STATE);
    if (state === HERE && this.#slots[at] === page && this.#slots[at + 1] === block) {
      this.#given = slot;
      answer.state = "ready";
      answer.address = sys.ptrOf(this.#bytes) + slot * 4096;
      answer.pages = 1;
      return;
    }
    answer.state = "pending";
    // A slot that is taken by another page: asked for again when that one has been copied.
    if (state === HERE) this.#setState(slot, FREE);
    if (state === ASKED) return;
    this.#slots[at] = page;
    this.#slots[at + 1] = block;
    this.#setState(slot, ASKED);
    Atomics.add(this.#slots, SLOTS * SLOT_WORDS, 1);
    Atomics.notify(this.#slots, SLOTS * SLOT_WORDS);
  }

  #setState(slot: number, state: number): void {
    Atomics.store(this.#slots, slot * SLOT_WORDS + SLOT_STATE, state);
  }

  acknowledge(): void {
    sys.read(this.readyFd, new BigUint64Array(1), 8);
  }

  close(): void {
    this.#thread.terminate();
  }
}

export const createPageSource: CreatePageSource = (options, blocks) => {
  const test = options as TestSourceOptions;
  if (test.kind === "later") return new LaterSource(test, blocks);
  if (test.kind === "thread") return new ThreadSource(test, blocks);
  if (test.kind === "never") return new NeverSource(test, blocks);
  return new TestSource(test, blocks);
};
