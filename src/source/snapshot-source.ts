/**
 * The default page source: a mapping of the snapshot file. UFFDIO_COPY reads straight from it, so
 * the bytes never pass through JavaScript and a file that was truncated gives EFAULT, an ordinary
 * error (JavaScript touching the same mapping would get SIGBUS). Runs in each Worker that supplies
 * pages; blocks only when the file is not in the page cache.
 */
import { FslError } from "../errors.ts";
import { alignDown, alignUp, hex } from "../pages.ts";
import * as sys from "../sys/native.ts";
import {
  EINVAL,
  ENODATA,
  MADV_DONTNEED,
  MADV_RANDOM,
  MADV_WILLNEED,
  MAP_SHARED,
  PROT_READ,
} from "../sys/abi.ts";
import type { PageBytes, PageSource, SourceBlock } from "./page-source.ts";

/** Mappings are made and given back in whole host pages. */
const HOST_PAGE = 4096;

export interface SnapshotSourceOptions {
  /** Descriptor of the snapshot, open for reading in this process; stays the caller's. */
  readonly fd: number;
  /**
   * A file that is not in the page cache: read exactly the pages that are asked for, not the
   * kernel's guess.
   */
  readonly exact?: boolean;
}

interface BlockMapping {
  readonly address: number;
  readonly length: number;
  readonly pageSize: number;
  readonly pagesOffset: number;
  /** Address of page 0: the mapping begins at a host page boundary, the pages region need not. */
  readonly firstPageAddress: number;
}

export class SnapshotPageSource implements PageSource {
  readonly readyFd = -1;
  readonly #mappings: BlockMapping[] = [];
  readonly #fd: number;
  #scratch: Uint8Array | undefined;
  /** For mincore(2): a byte a page. */
  #residency = new Uint8Array(512);

  /** @throws FslError SNAPSHOT_OPEN when the file cannot be mapped */
  constructor(options: SnapshotSourceOptions, blocks: readonly SourceBlock[]) {
    this.#fd = options.fd;
    for (const block of blocks) {
      const mapOffset = alignDown(block.pagesOffset, HOST_PAGE);
      const length = alignUp(block.pagesOffset + block.usedLength - mapOffset, HOST_PAGE);
      const address = sys.mmap(0, length, PROT_READ, MAP_SHARED, options.fd, mapOffset);
      if (address < 0) {
        this.close();
        throw new FslError(
          "SNAPSHOT_OPEN",
          `RAMBlock ${block.idstr}: cannot map ${length} bytes at ${hex(mapOffset)}: ` +
            sys.errnoText(-address),
          { idstr: block.idstr, offset: mapOffset, errno: -address },
        );
      }
      if (options.exact) sys.madvise(address, length, MADV_RANDOM);
      this.#mappings.push({
        address,
        length,
        pageSize: block.pageSize,
        pagesOffset: block.pagesOffset,
        firstPageAddress: address + block.pagesOffset - mapOffset,
      });
    }
  }

  resolve(blockIndex: number, pageIndex: number, pagesMax: number, answer: PageBytes): void {
    const mapping = this.#mappings[blockIndex];
    if (mapping === undefined)
      throw new FslError("INTERNAL", `page source has no block ${blockIndex}`);
    answer.state = "ready";
    answer.address = mapping.firstPageAddress + pageIndex * mapping.pageSize;
    answer.pages = pagesMax;
    answer.errno = 0;
  }

  /** They are in the page cache, by the kernel's word to whoever may write to the file. */
  isAtHand(blockIndex: number, pageIndex: number, pages: number): boolean {
    const mapping = this.#mappings[blockIndex];
    if (mapping === undefined) return false;
    const start = alignDown(mapping.firstPageAddress + pageIndex * mapping.pageSize, HOST_PAGE);
    const end = mapping.firstPageAddress + (pageIndex + pages) * mapping.pageSize;
    const count = Math.ceil((end - start) / HOST_PAGE);
    if (this.#residency.length < count) this.#residency = new Uint8Array(count);
    if (sys.mincore(start, count * HOST_PAGE, this.#residency) < 0) return false;
    for (let index = 0; index < count; index += 1) {
      if (((this.#residency[index] ?? 0) & 1) === 0) return false;
    }
    return true;
  }

  willNeed(blockIndex: number, pageIndex: number, pages: number): void {
    this.#advise(blockIndex, pageIndex, pages, MADV_WILLNEED);
  }

  /**
   * Takes the pages out of this process's page table: else the whole snapshot would count as fsl's
   * memory.
   */
  release(blockIndex: number, pageIndex: number, pages: number): void {
    this.#advise(blockIndex, pageIndex, pages, MADV_DONTNEED);
  }

  /** Reads the page once more by pread, which says EIO where the mapping could only say EFAULT. */
  diagnose(blockIndex: number, pageIndex: number): number {
    const mapping = this.#mappings[blockIndex];
    if (mapping === undefined) return EINVAL;
    const scratch = (this.#scratch ??= new Uint8Array(mapping.pageSize));
    const offset = mapping.pagesOffset + pageIndex * mapping.pageSize;
    const done = sys.pread(this.#fd, sys.ptrOf(scratch), mapping.pageSize, offset);
    if (done < 0) return -done;
    return done < mapping.pageSize ? ENODATA : 0;
  }

  close(): void {
    for (const mapping of this.#mappings) sys.munmap(mapping.address, mapping.length);
    this.#mappings.length = 0;
  }

  #advise(blockIndex: number, pageIndex: number, pages: number, advice: number): void {
    const mapping = this.#mappings[blockIndex];
    if (mapping === undefined) return;
    const start = alignDown(mapping.firstPageAddress + pageIndex * mapping.pageSize, HOST_PAGE);
    const end = mapping.firstPageAddress + (pageIndex + pages) * mapping.pageSize;
    sys.madvise(start, alignUp(end - start, HOST_PAGE), advice);
  }
}

export function createPageSource(
  options: unknown,
  blocks: readonly SourceBlock[],
): SnapshotPageSource {
  return new SnapshotPageSource(options as SnapshotSourceOptions, blocks);
}
