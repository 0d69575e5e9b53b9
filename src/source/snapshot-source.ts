/**
 * The default page source: a mapping of the snapshot file. UFFDIO_COPY reads straight from it, so
 * the bytes never pass through JavaScript and a file that was truncated gives EFAULT, an ordinary
 * error (JavaScript touching the same mapping would get SIGBUS). Runs in each Worker that supplies
 * pages; blocks only when the file is not in the page cache.
 *
 * A few pages that are in the page cache are read into a buffer instead. To map them, and to take them
 * out of the page table again, which every CPU of this process has to be told of, takes longer: four
 * threads that touch pages at random got 115,000 a second from the buffer, and 58,000 from the mapping.
 */
import { FslError } from "../errors.ts";
import { alignDown, alignUp, hex } from "../pages.ts";
import { HOST_PAGE_LENGTH } from "../sys/host-pages.ts";
import * as sys from "../sys/native.ts";
import {
  EINVAL,
  ENODATA,
  ENOSYS,
  EOPNOTSUPP,
  MADV_DONTNEED,
  MADV_RANDOM,
  MADV_WILLNEED,
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  MAP_SHARED,
  PROT_READ,
  PROT_WRITE,
} from "../sys/abi.ts";
import type { PageBytes, PageSource, SourceBlock } from "./page-source.ts";

/** What is read into a buffer, bytes at most: it fits into the cache of a CPU. */
const READ_MAX = 64 * 1024;

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
  readonly usedLength: number;
  readonly pageSize: number;
  readonly pagesOffset: number;
  /** Address of page 0: the mapping begins at a host page boundary, the pages region need not. */
  readonly firstPageAddress: number;
  /** Something of it may be in this process's page table. */
  isTouched: boolean;
}

export class SnapshotPageSource implements PageSource {
  readonly readyFd = -1;
  readonly #mappings: BlockMapping[] = [];
  readonly #fd: number;
  /** Address of READ_MAX bytes; 0 = not made yet. */
  #buffer = 0;
  /** False where the file system cannot say what is in the page cache. */
  #canRead = true;
  #scratch: Uint8Array | undefined;
  /** For mincore(2): a byte a page. */
  #residency = new Uint8Array(512);

  /** @throws FslError SNAPSHOT_OPEN when the file cannot be mapped */
  constructor(options: SnapshotSourceOptions, blocks: readonly SourceBlock[]) {
    this.#fd = options.fd;
    for (const block of blocks) {
      const mapOffset = alignDown(block.pagesOffset, HOST_PAGE_LENGTH);
      const length = alignUp(block.pagesOffset + block.usedLength - mapOffset, HOST_PAGE_LENGTH);
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
        usedLength: block.usedLength,
        pageSize: block.pageSize,
        pagesOffset: block.pagesOffset,
        firstPageAddress: address + block.pagesOffset - mapOffset,
        isTouched: false,
      });
    }
  }

  resolve(blockIndex: number, pageIndex: number, pagesMax: number, answer: PageBytes): void {
    const mapping = this.#mappings[blockIndex];
    if (mapping === undefined)
      throw new FslError("INTERNAL", `page source has no block ${blockIndex}`);
    answer.state = "ready";
    answer.pages = pagesMax;
    answer.errno = 0;
    const length = pagesMax * mapping.pageSize;
    const isRead = this.#canRead && length <= READ_MAX && this.#read(mapping, pageIndex, length);
    if (!isRead) mapping.isTouched = true;
    answer.isAtHand = isRead;
    answer.address = isRead
      ? this.#buffer
      : mapping.firstPageAddress + pageIndex * mapping.pageSize;
  }

  /** Into the buffer. @returns false when not all of it is in the page cache, or it cannot be read */
  #read(mapping: BlockMapping, pageIndex: number, length: number): boolean {
    if (this.#buffer === 0) this.#makeBuffer();
    const offset = mapping.pagesOffset + pageIndex * mapping.pageSize;
    const done = sys.preadAtHand(this.#fd, this.#buffer, length, offset);
    if (done === -EOPNOTSUPP || done === -ENOSYS) this.#canRead = false;
    return done === length;
  }

  #makeBuffer(): void {
    const protection = PROT_READ | PROT_WRITE;
    this.#buffer = sys.check(
      sys.mmap(0, READ_MAX, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
      "mmap of a page buffer",
    );
  }

  /** They are in the page cache, by the kernel's word to whoever may write to the file. */
  isAtHand(blockIndex: number, pageIndex: number, pages: number): boolean {
    const mapping = this.#mappings[blockIndex];
    if (mapping === undefined) return false;
    const start = alignDown(
      mapping.firstPageAddress + pageIndex * mapping.pageSize,
      HOST_PAGE_LENGTH,
    );
    const end = mapping.firstPageAddress + (pageIndex + pages) * mapping.pageSize;
    const count = Math.ceil((end - start) / HOST_PAGE_LENGTH);
    if (this.#residency.length < count) this.#residency = new Uint8Array(count);
    if (sys.mincore(start, count * HOST_PAGE_LENGTH, this.#residency) < 0) return false;
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
    const mapping = this.#mappings[blockIndex];
    if (mapping?.isTouched !== true) return;
    this.#advise(blockIndex, pageIndex, pages, MADV_DONTNEED);
    if (pages * mapping.pageSize >= mapping.usedLength) mapping.isTouched = false;
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
    if (this.#buffer !== 0) sys.munmap(this.#buffer, READ_MAX);
    this.#buffer = 0;
    for (const mapping of this.#mappings) sys.munmap(mapping.address, mapping.length);
    this.#mappings.length = 0;
  }

  #advise(blockIndex: number, pageIndex: number, pages: number, advice: number): void {
    const mapping = this.#mappings[blockIndex];
    if (mapping === undefined) return;
    const start = alignDown(
      mapping.firstPageAddress + pageIndex * mapping.pageSize,
      HOST_PAGE_LENGTH,
    );
    const end = mapping.firstPageAddress + (pageIndex + pages) * mapping.pageSize;
    sys.madvise(start, alignUp(end - start, HOST_PAGE_LENGTH), advice);
  }
}

export function createPageSource(
  options: unknown,
  blocks: readonly SourceBlock[],
): SnapshotPageSource {
  return new SnapshotPageSource(options as SnapshotSourceOptions, blocks);
}
