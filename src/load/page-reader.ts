/**
 * Data pages before the guest runs, in order: what the seed, the blocks that are filled in full and
 * the corrections of resident pages are written from. Asks a page source of its own, so that no
 * byte of RAM comes from anywhere else. Where the source says `pending` it waits for `readyFd`, and
 * lets events through meanwhile.
 */
import { FslError } from "../errors.ts";
import { hex, MiB } from "../pages.ts";
import { makeSource } from "../source/make-source.ts";
import type { PageBytes, PageSource, PageSourceSpec, SourceBlock } from "../source/page-source.ts";
import { EFAULT, POLLIN } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import { nextBit } from "../bits.ts";

/** Bytes asked for at once: to write them takes some 2 ms. */
export const PIECE_LENGTH = 8 * MiB;
/** Longest wait in one go, ms: so long may signals and messages be kept waiting. */
const WAIT_MS = 5;

export interface PageReaderOptions {
  readonly source: PageSourceSpec;
  /** Every block that has data. */
  readonly blocks: readonly SourceBlock[];
  /** Names the snapshot in errors. */
  readonly snapshotPath: string;
  /** Of the target: without it there is nobody to wait for pages for. */
  readonly pidfd: number;
  /** Awaited before each piece: it may take its time, or throw. */
  readonly mayRead?: (() => Promise<void>) | undefined;
}

/** Takes the bytes of `pages` pages from `page` on; they are at `address` until it returns. */
export type WritePages = (address: number, page: number, pages: number) => void | Promise<void>;

export class PageReader {
  readonly options: PageReaderOptions;
  readonly #answer: PageBytes = { state: "ready", address: 0, pages: 0, errno: 0 };
  /** Made at first use: most loads have nothing to read before the guest runs. */
  #source: PageSource | undefined;

  constructor(options: PageReaderOptions) {
    this.options = options;
  }

  /**
   * Hands the data pages of [first, end) of a block to `write`, in order.
   * @param data the block's page bitmap
   * @throws FslError SNAPSHOT_OPEN when a page cannot be read, TARGET_LOST when the target ends
   * while a page is waited for; what `mayRead` throws
   */
  async each(
    idstr: string,
    data: Int32Array,
    first: number,
    end: number,
    write: WritePages,
  ): Promise<void> {
    let page = nextBit(data, first, end, true);
    if (page >= end) return;
    const source = (this.#source ??= await makeSource(this.options.source, this.options.blocks));
    const index = this.#indexOf(idstr);
    const { pageSize } = this.#blockOf(idstr);
    const answer = this.#answer;
    while (page < end) {
      await this.options.mayRead?.();
      const pagesMax = nextBit(data, page, Math.min(end, page + PIECE_LENGTH / pageSize), false);
      source.resolve(index, page, pagesMax - page, answer);
      if (answer.state === "failed") throw this.unreadable(idstr, page, answer.errno);
      if (answer.state === "pending") {
        source.willNeed?.(index, page, pagesMax - page);
        await this.#wait(source);
        continue;
      }
      const { pages } = answer;
      await write(answer.address, page, pages);
      source.release?.(index, page, pages);
      page = nextBit(data, page + pages, end, true);
    }
  }

  /** For who could not take the bytes that it was handed: the source's reason, if it has one. */
  diagnose(idstr: string, page: number): FslError | null {
    const errno = this.#source?.diagnose?.(this.#indexOf(idstr), page) ?? 0;
    return errno === 0 ? null : this.unreadable(idstr, page, errno);
  }

  unreadable(idstr: string, page: number, errno = EFAULT): FslError {
    const { source, snapshotPath } = this.options;
    const { pagesOffset, pageSize } = this.#blockOf(idstr);
    const offset = pagesOffset + page * pageSize;
    const [where, at] =
      source.module === undefined
        ? [`snapshot ${snapshotPath}`, ` at ${hex(offset)}`]
        : [`page source ${source.module}`, ""];
    return new FslError(
      "SNAPSHOT_OPEN",
      `${where}: page ${page} of RAMBlock ${idstr}${at} cannot be read: ${sys.errnoText(errno)}`,
      { path: source.module ?? snapshotPath, idstr, page, offset, errno },
    );
  }

  /** Idempotent. */
  close(): void {
    this.#source?.close();
    this.#source = undefined;
  }

  /** Until the source may have more. */
  async #wait(source: PageSource): Promise<void> {
    const { pidfd } = this.options;
    const revents = new Int32Array(2);
    sys.poll(Int32Array.of(source.readyFd, pidfd), revents, 2, POLLIN, WAIT_MS);
    if (revents[1]) throw new FslError("TARGET_LOST", "QEMU ended while its memory was written");
    if (revents[0]) source.acknowledge?.();
    await new Promise<void>((resolve) => setImmediate(resolve));
  }

  #indexOf(idstr: string): number {
    return this.options.blocks.findIndex((block) => block.idstr === idstr);
  }

  #blockOf(idstr: string): SourceBlock {
    const block = this.options.blocks.find((one) => one.idstr === idstr);
    if (block === undefined) throw new FslError("INTERNAL", `no pages of RAMBlock ${idstr}`);
    return block;
  }
}
