/**
 * A page source that fsl does not know: a module as a user would write it, named by
 * `source: { module, options }`. It is several of them, by `kind`:
 *
 *   pread    reads the snapshot's pages into a buffer of its own
 *   pattern  makes pages up: each is filled with words that say which page it is
 *   later    reads like pread, but a page is never there when it is first asked for
 *   thread   pages come from another thread, which reads them one by one and says so by an eventfd
 *   dying    like pread, but throws once, in the Worker that asks for page `failPage` first
 *   failing  like pread, but page `failPage` cannot be read until the file `marker` is there
 */
import { closeSync, existsSync, openSync, readSync, writeFileSync } from "node:fs";
import type { CreatePageSource, PageBytes, PageSource, SourceBlock } from "../../src/index.ts";
import { EFD_NONBLOCK, EIO } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";

export interface TestSourceOptions {
  readonly kind: "pread" | "pattern" | "later" | "thread" | "dying" | "failing";
  readonly path: string;
  readonly failPage?: number;
  /** A file that says that it has thrown: Workers share no memory of ours. */
  readonly marker?: string;
}

const PAGES_MAX = 64;
const ONE = new BigUint64Array([1n]);

/** The page that kind `pattern` makes up. */
export function patternPage(blockIndex: number, pageIndex: number, pageSize: number): Uint8Array {
  const words = new Uint32Array(pageSize / 4);
  for (let word = 0; word < words.length; word += 1) {
    words[word] = Math.imul(pageIndex * 1024 + word + 1, 2_654_435_761) ^ (blockIndex + 1);
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
    const { pageSize, pagesOffset } = block;
    const pages = this.#readable(pageIndex, Math.min(pagesMax, PAGES_MAX));
    answer.state = pages > 0 ? "ready" : "failed";
    answer.errno = pages > 0 ? 0 : EIO;
    for (let page = pageIndex; page < pageIndex + pages; page += 1) {
      if (this.options.kind === "dying" && page === this.options.failPage) this.#dieOnce();
      const at = (page - pageIndex) * pageSize;
      const part = this.#buffer.subarray(at, at + pageSize);
      if (this.options.kind === "pattern") part.set(patternPage(blockIndex, page, pageSize));
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

const SLOTS = 1024;
/** Words of a slot: what is asked for (page + 1), and its state. */
const SLOT_WORDS = 2;
const FREE = 0;
const ASKED = 1;
const HERE = 2;

/** Pages of one block come from a thread; a table of slots says which. */
class ThreadSource implements PageSource {
  readonly readyFd = sys.check(sys.eventfd(0, EFD_NONBLOCK), "eventfd");
  readonly #slots = new Int32Array(new SharedArrayBuffer(SLOTS * SLOT_WORDS * 4 + 4));
  readonly #bytes = new Uint8Array(new SharedArrayBuffer(SLOTS * 4096));
  readonly #thread: Worker;
  #given: number | undefined;

  constructor(options: TestSourceOptions, blocks: readonly SourceBlock[]) {
    this.#thread = new Worker(new URL("load-source-thread.ts", import.meta.url).href);
    const [block] = blocks;
    this.#thread.postMessage({
      path: options.path,
      pagesOffset: block?.pagesOffset,
      slots: this.#slots,
      bytes: this.#bytes,
      readyFd: this.readyFd,
    });
  }

  resolve(_block: number, page: number, _pagesMax: number, answer: PageBytes): void {
    // The page that was given last has been copied.
    if (this.#given !== undefined) Atomics.store(this.#slots, this.#given * SLOT_WORDS + 1, FREE);
    this.#given = undefined;
    const slot = page % SLOTS;
    const state = Atomics.load(this.#slots, slot * SLOT_WORDS + 1);
    if (state === HERE && this.#slots[slot * SLOT_WORDS] === page) {
      this.#given = slot;
      answer.state = "ready";
      answer.address = sys.ptrOf(this.#bytes) + slot * 4096;
      answer.pages = 1;
      return;
    }
    answer.state = "pending";
    // A slot that is taken by another page: asked for again when that one has been copied.
    if (state === HERE) Atomics.store(this.#slots, slot * SLOT_WORDS + 1, FREE);
    if (state === ASKED) return;
    this.#slots[slot * SLOT_WORDS] = page;
    Atomics.store(this.#slots, slot * SLOT_WORDS + 1, ASKED);
    Atomics.add(this.#slots, SLOTS * SLOT_WORDS, 1);
    Atomics.notify(this.#slots, SLOTS * SLOT_WORDS);
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
  return new TestSource(test, blocks);
};
