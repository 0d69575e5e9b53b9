/**
 * Brings pages into the target: asks the page source for bytes, copies them, marks them done. The
 * fault loop and every eager Worker have one each; the kernel and the shared bitmaps arbitrate
 * between them. Allocates nothing per call. Blocks only where the page source does (a file that is
 * not in the page cache).
 *
 * A page is marked done after its copy succeeded, never before. A done page is never copied again:
 * a fault on one means that the guest gave it back, and what it gets then is zero.
 */
import * as sys from "../sys/native.ts";
import {
  EFAULT,
  ENOMEM,
  ESTALE,
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  PROT_READ,
  PROT_WRITE,
} from "../sys/abi.ts";
import type { PageBytes, PageSource } from "../source/page-source.ts";
import {
  COPY_CHANGED,
  COPY_EXISTS,
  COPY_GONE,
  COPY_NO_MEMORY,
  COPY_RETRY,
  COPY_SOURCE,
  type Uffd,
} from "../uffd/uffd.ts";
import { FslError } from "../errors.ts";
import { nextMissing, setRange } from "../bits.ts";
import { residentRanges } from "./resident.ts";
import { add, type BlockState, C_REDUNDANT_PAGES, C_RETRIES, type LoadState } from "./state.ts";

/** What came of an attempt to supply pages. */
export const SUPPLIED = 0;
/** The address space is changing: read events first, then try again. */
export const RETRY = 1;
/** The source has not got the bytes yet. */
export const PENDING = 2;
/** The source cannot read the bytes; `errno` says why. */
export const FAILED = 3;
/** The target has ended. */
export const GONE = 4;
/** Somebody else is bringing it and wakes whoever waits. */
export const COMING = 5;
export type Outcome = 0 | 1 | 2 | 3 | 4 | 5;

export class Supply {
  readonly #uffd: Uffd;
  readonly #source: PageSource;
  readonly #counters: Float64Array;
  readonly #load: Pick<LoadState, "halted" | "metadata">;
  readonly #answer: PageBytes = {
    state: "ready",
    address: 0,
    pages: 0,
    errno: 0,
    isAtHand: false,
  };
  readonly #selfPid = process.pid;
  /** Where a host page larger than the bitmap's page is put together; made at first use. */
  #assemblyAddress = 0;
  #assembly = new Uint8Array(0);

  /** Pages brought in by the last call, before it ended with its outcome. */
  pagesDone = 0;
  /**
   * After FAILED: positive errno, and the page that cannot be read. After PENDING: the page that is
   * not there yet.
   */
  errno = 0;
  failedPage = 0;
  /** Answers of the source in a row for which nobody had to wait. */
  atHandInARow = 0;

  /** @param load says whose memory it is, and when the source is not to be asked any more */
  constructor(
    uffd: Uffd,
    source: PageSource,
    counters: Float64Array,
    load: Pick<LoadState, "halted" | "metadata">,
  ) {
    this.#load = load;
    this.#uffd = uffd;
    this.#source = source;
    this.#counters = counters;
  }

  /**
   * Copies the data pages [pageIndex, pageIndex + pages) of a block; every one must have its data
   * bit set. For a block with larger host pages use `copyHostPage`.
   */
  copyRun(state: BlockState, pageIndex: number, pages: number): Outcome {
    return this.#supplyRun(state, pageIndex, pages, false);
  }

  /** Fills the pages [pageIndex, pageIndex + pages) with zeros and marks them done. */
  zeroRun(state: BlockState, pageIndex: number, pages: number): Outcome {
    return this.#supplyRun(state, pageIndex, pages, true);
  }

  #supplyRun(state: BlockState, pageIndex: number, pages: number, isZero: boolean): Outcome {
    const { block } = state;
    const answer = this.#answer;
    this.pagesDone = 0;
    this.errno = 0;
    let at = pageIndex;
    const end = pageIndex + pages;
    let pagesMax = pages;
    while (at < end) {
      let asked = Math.min(end - at, pagesMax);
      if (!isZero) {
        if (this.#load.halted) return this.#failed(at, ESTALE);
        this.#source.resolve(state.index, at, asked, answer);
        this.atHandInARow = answer.isAtHand === true ? this.atHandInARow + 1 : 0;
        if (answer.state === "pending") return this.#pending(at);
        if (answer.state === "failed") return this.#failed(at, answer.errno);
        asked = answer.pages;
      }
      const address = block.hostAddr + at * block.pageSize;
      const length = asked * block.pageSize;
      const supplied = isZero
        ? this.#uffd.zeropage(address, length, 0)
        : this.#uffd.copy(address, answer.address, length, 0);
      if (supplied > 0) {
        const suppliedPages = supplied / block.pageSize;
        setRange(state.done, at, at + suppliedPages);
        this.pagesDone += suppliedPages;
        at += suppliedPages;
        continue;
      }
      switch (supplied) {
        case COPY_EXISTS:
          // Somebody else brought this page; waiters of a copy that lost the race may still sleep.
          this.#uffd.wake(address, block.pageSize);
          setRange(state.done, at, at + 1);
          if (!isZero) add(this.#counters, C_REDUNDANT_PAGES, 1);
          at += 1;
          break;
        case COPY_RETRY:
          add(this.#counters, C_RETRIES, 1);
          return RETRY;
        case COPY_GONE:
          return GONE;
        case COPY_CHANGED:
          // Not one registered area: two of them (then page by page), or unmapped, and nobody can
          // touch it any more.
          if (asked === 1) {
            setRange(state.done, at, at + 1);
            at += 1;
          }
          pagesMax = 1;
          break;
        case COPY_NO_MEMORY:
          return this.#failed(at, ENOMEM);
        case COPY_SOURCE:
          if (isZero) throw unexpected("UFFDIO_ZEROPAGE", address, length, supplied);
          return this.#failed(at, this.#source.diagnose?.(state.index, at) || EFAULT);
        default:
          throw unexpected(isZero ? "UFFDIO_ZEROPAGE" : "UFFDIO_COPY", address, length, supplied);
      }
    }
    return SUPPLIED;
  }

  /**
   * Brings in one whole host page that is larger than the snapshot's page: put together in a
   * buffer, data where the bitmap has it and zeros elsewhere, and copied at once (hugetlb knows no
   * ZEROPAGE and no smaller copy).
   * @param firstPage index of the host page's first snapshot page
   */
  copyHostPage(state: BlockState, firstPage: number): Outcome {
    const { block } = state;
    const pages = block.hostPageSize / block.pageSize;
    this.pagesDone = 0;
    this.errno = 0;
    this.#clearAssembly(block.hostPageSize);
    const end = firstPage + pages;
    let at = nextMissing(state.data, state.done, firstPage, end, true);
    while (at < end) {
      const runEnd = nextMissing(state.data, state.done, at, end, false);
      if (this.#load.halted) return this.#failed(at, ESTALE);
      const answer = this.#answer;
      this.#source.resolve(state.index, at, runEnd - at, answer);
      if (answer.state === "pending") return this.#pending(at);
      if (answer.state === "failed") return this.#failed(at, answer.errno);
      const target = this.#assemblyAddress + (at - firstPage) * block.pageSize;
      const length = answer.pages * block.pageSize;
      // A copy within this process by the kernel: bytes that cannot be read give EFAULT, not
      // SIGBUS.
      const copied = sys.processVmReadv(this.#selfPid, answer.address, target, length);
      if (copied !== length) {
        const failedPage = at + (copied > 0 ? Math.floor(copied / block.pageSize) : 0);
        return this.#failed(failedPage, this.#source.diagnose?.(state.index, failedPage) || EFAULT);
      }
      at = nextMissing(state.data, state.done, at + answer.pages, end, true);
    }
    const address = block.hostAddr + firstPage * block.pageSize;
    const copied = this.#uffd.copy(address, this.#assemblyAddress, block.hostPageSize, 0);
    switch (copied) {
      case block.hostPageSize:
        setRange(state.done, firstPage, end);
        this.pagesDone = pages;
        return SUPPLIED;
      case COPY_EXISTS:
        // Linux says so of a page that is not there, too, when no huge page is left for it: to take
        // that for done would let the guest go on with zeros.
        // @source Linux mm/hugetlb.c hugetlb_mfill_atomic_pte
        if (!this.#isThere(address, block.hostPageSize)) return this.#failed(firstPage, ENOMEM);
        this.#uffd.wake(address, block.hostPageSize);
        setRange(state.done, firstPage, end);
        add(this.#counters, C_REDUNDANT_PAGES, pages);
        return SUPPLIED;
      case COPY_RETRY:
        add(this.#counters, C_RETRIES, 1);
        return RETRY;
      case COPY_GONE:
        return GONE;
      case COPY_CHANGED:
        setRange(state.done, firstPage, end);
        return SUPPLIED;
      case COPY_NO_MEMORY:
        return this.#failed(firstPage, ENOMEM);
      default:
        throw unexpected("UFFDIO_COPY", address, block.hostPageSize, copied);
    }
  }

  close(): void {
    if (this.#assemblyAddress !== 0) sys.munmap(this.#assemblyAddress, this.#assembly.length);
    this.#assemblyAddress = 0;
    this.#assembly = new Uint8Array(0);
  }

  /** By the target's page table. False also when that cannot be read. */
  #isThere(address: number, length: number): boolean {
    try {
      return residentRanges(this.#load.metadata.target.pid, address, length).length > 0;
    } catch {
      return false;
    }
  }

  #failed(page: number, errno: number): Outcome {
    this.failedPage = page;
    this.errno = errno;
    return FAILED;
  }

  #pending(page: number): Outcome {
    this.failedPage = page;
    return PENDING;
  }

  /** The buffer has zeros, and room for `length` bytes. */
  #clearAssembly(length: number): void {
    if (this.#assembly.length < length) {
      this.close();
      this.#assemblyAddress = sys.check(
        sys.mmap(0, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
        "mmap of a host page buffer",
      );
      this.#assembly = new Uint8Array(sys.view(this.#assemblyAddress, length));
      // The kernel has just cleared it.
      return;
    }
    this.#assembly.fill(0, 0, length);
  }
}

function unexpected(what: string, address: number, length: number, result: number): FslError {
  return new FslError(
    "INTERNAL",
    `${what} of ${length} bytes at 0x${address.toString(16)}: unexpected ${sys.errnoText(-result)}`,
    { address, length, errno: -result },
  );
}
