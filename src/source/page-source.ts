/**
 * Where page bytes come from: the seam of the whole loader. A page source lives in each Worker that
 * supplies pages (the fault loop and the eager Workers have one each) and, for what is written
 * before the guest runs, on the main thread or in eager Workers, too; it is called synchronously,
 * and never blocks on a vCPU or on the main thread. It answers with an *address*: the kernel reads
 * straight from there, the bytes never pass through JavaScript.
 */

/**
 * What a source needs to know of a block: name and sizes. Structured-cloneable. Not every source of
 * a load is made with the same blocks: what says which block it is is its name, not its index.
 */
export interface SourceBlock {
  readonly idstr: string;
  /** Length of the block in bytes. */
  readonly usedLength: number;
  /** Bytes per page of the bitmap (4096 on x86_64). */
  readonly pageSize: number;
  /** File offset in bytes of page 0. */
  readonly pagesOffset: number;
}

/** The answer of `resolve`, filled in place: nothing is allocated per fault. */
export interface PageBytes {
  /**
   * ready: `address` holds `pages` pages. pending: the pages arrive later (poll `readyFd`). failed:
   * `errno` says why.
   */
  state: "ready" | "pending" | "failed";
  /** Address of the bytes in this process; valid until the next call of `resolve`. */
  address: number;
  /** How many pages from `pageIndex` on the answer covers; 1 <= pages <= pagesMax. */
  pages: number;
  /** Positive errno of a failed read, else 0. */
  errno: number;
  /** Whoever reads the bytes waits for nothing. Absent or false: nobody knows. */
  isAtHand?: boolean;
}

export interface PageSource {
  /**
   * A descriptor that polls readable when a pending page may have arrived, or -1 when nothing is
   * ever pending.
   */
  readonly readyFd: number;
  /**
   * Finds the bytes of data pages. The caller asks only for pages whose bitmap bit is set.
   * @param blockIndex index into the blocks that the source was made with
   * @param pageIndex first page, 0-based
   * @param pagesMax how many pages the caller would take, >= 1
   * @param answer filled in place
   */
  resolve(blockIndex: number, pageIndex: number, pagesMax: number, answer: PageBytes): void;
  /** Whether the bytes of all these pages can be had without waiting. Absent: nobody knows. */
  isAtHand?(blockIndex: number, pageIndex: number, pages: number): boolean;
  /** Hint: these pages will be asked for soon. Must not block. */
  willNeed?(blockIndex: number, pageIndex: number, pages: number): void;
  /**
   * Hint: the bytes behind these pages are not needed for now. Nearly all were copied; the others
   * are asked for again.
   */
  release?(blockIndex: number, pageIndex: number, pages: number): void;
  /**
   * Why the bytes of a page cannot be read: a positive errno, or 0 when they can. May block on I/O.
   */
  diagnose?(blockIndex: number, pageIndex: number): number;
  /** Called when `readyFd` polled readable, before pending pages are asked for again. */
  acknowledge?(): void;
  close(): void;
}

/**
 * Describes a source so that any Worker can make its own: a module that exports `createPageSource`,
 * and its options.
 */
export interface PageSourceSpec {
  /** URL or absolute path of the module; absent = the snapshot file itself. */
  readonly module?: string;
  /** Structured-cloneable options, handed to `createPageSource` as they are. */
  readonly options: unknown;
}

/** The export that a page source module must have. */
export type CreatePageSource = (
  options: unknown,
  blocks: readonly SourceBlock[],
) => PageSource | Promise<PageSource>;
