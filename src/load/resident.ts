/**
 * Pages that are in the target's memory already. They never fault, so whatever they hold would be
 * what the guest sees: they are looked for after the ranges are registered (nothing can appear
 * unnoticed from then on) and corrected before the state is handed over. Runs on the main thread.
 *
 * Of `MemoryWriter` only for pages that were found present: process_vm_writev would wait for a missing one, which
 * only we can bring. @source Linux fs/proc/base.c mem_rw, fs/proc/task_mmu.c pagemap_read, mm/process_vm_access.c
 */
import { closeSync, openSync, readSync } from "node:fs";
import { FslError } from "../errors.ts";
import { EFAULT, EINVAL, ENOTTY } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import { alignDown, hex, MiB } from "../pages.ts";
import { processFileError } from "../vmm/process-maps.ts";
import { nextBit } from "../bits.ts";
import type { PageReader } from "./page-reader.ts";

const HOST_PAGE = 4096;

/** Half-open address range. */
export interface AddressRange {
  readonly startAddr: number;
  readonly endAddr: number;
}

/**
 * Ranges of [startAddr, startAddr + length) that are present or swapped, by address. Page tables
 * that do not exist cost the kernel next to nothing.
 * @throws FslError TARGET_LOST when the target's page map cannot be read: it has ended
 */
export function residentRanges(pid: number, startAddr: number, length: number): AddressRange[] {
  const fd = openProcessFile(pid, "pagemap", "r");
  try {
    return scanPagemap(fd, startAddr, startAddr + length) ?? readPagemap(fd, startAddr, length);
  } finally {
    closeSync(fd);
  }
}

/** @throws FslError TARGET_LOST when the target has ended, HOST_UNSUPPORTED when it is refused */
export function openProcessFile(pid: number, name: "pagemap" | "mem", flags: "r" | "r+"): number {
  try {
    return openSync(`/proc/${pid}/${name}`, flags);
  } catch (error) {
    throw processFileError(pid, name, error);
  }
}

/** struct pm_scan_arg: u64 words. @source Linux include/uapi/linux/fs.h */
const PAGEMAP_SCAN = 0xc0606610;
const SCAN = { SIZE: 0, START: 2, END: 3, WALK_END: 4, VEC: 5, VEC_LEN: 6, ANYOF: 10, RETURN: 11 };
const SCAN_WORDS = 12;
/** PAGE_IS_PRESENT | PAGE_IS_SWAPPED */
const PRESENT_OR_SWAPPED = (1n << 3n) | (1n << 4n);
/** struct page_region: start, end, categories. */
const REGION_WORDS = 3;
const REGIONS_AT_ONCE = 1024;

/** By the PAGEMAP_SCAN ioctl (Linux 6.7); null when the kernel has none. */
function scanPagemap(fd: number, startAddr: number, endAddr: number): AddressRange[] | null {
  const regions = new BigUint64Array(REGIONS_AT_ONCE * REGION_WORDS);
  const argument = new BigUint64Array(SCAN_WORDS);
  argument[SCAN.SIZE] = BigInt(argument.byteLength);
  argument[SCAN.END] = BigInt(endAddr);
  argument[SCAN.VEC] = BigInt(sys.ptrOf(regions));
  argument[SCAN.VEC_LEN] = BigInt(REGIONS_AT_ONCE);
  argument[SCAN.ANYOF] = PRESENT_OR_SWAPPED;
  argument[SCAN.RETURN] = PRESENT_OR_SWAPPED;
  const ranges: AddressRange[] = [];
  for (let addr = startAddr; addr < endAddr;) {
    argument[SCAN.START] = BigInt(addr);
    const count = sys.ioctl(fd, PAGEMAP_SCAN, sys.ptrOf(argument));
    if (count === -ENOTTY || count === -EINVAL) return null;
    if (count < 0) {
      throw new FslError("TARGET_LOST", `page map at ${hex(addr)}: ${sys.errnoText(-count)}`);
    }
    for (let index = 0; index < count; index += 1) {
      appendRange(
        ranges,
        Number(regions[index * REGION_WORDS]),
        Number(regions[index * REGION_WORDS + 1]),
      );
    }
    const walkEnd = Number(argument[SCAN.WALK_END]);
    if (walkEnd <= addr) break;
    addr = walkEnd;
  }
  return ranges;
}

const PAGEMAP_ENTRY = 8;
/** Bits of the upper half of a pagemap entry: page present (63), swapped (62). */
const UPPER_PRESENT_OR_SWAPPED = 0xc0000000;
/** Pagemap entries read at once: 512 KiB, 256 MiB of guest memory. */
const PAGEMAP_WINDOW = 65536;

/** By reading one entry a page; for kernels before PAGEMAP_SCAN. */
function readPagemap(fd: number, startAddr: number, length: number): AddressRange[] {
  const buffer = Buffer.alloc(PAGEMAP_WINDOW * PAGEMAP_ENTRY);
  const words = new Uint32Array(buffer.buffer, buffer.byteOffset, PAGEMAP_WINDOW * 2);
  const ranges: AddressRange[] = [];
  const endAddr = startAddr + length;
  for (let addr = startAddr; addr < endAddr;) {
    const entries = Math.min(PAGEMAP_WINDOW, (endAddr - addr) / HOST_PAGE);
    const wanted = entries * PAGEMAP_ENTRY;
    const done = readSync(fd, buffer, 0, wanted, (addr / HOST_PAGE) * PAGEMAP_ENTRY);
    if (done !== wanted) {
      throw new FslError(
        "TARGET_LOST",
        `pagemap at ${hex(addr)}: expected ${wanted} bytes, found ${done}`,
      );
    }
    for (let index = 0; index < entries; index += 1) {
      if (((words[2 * index + 1] ?? 0) & UPPER_PRESENT_OR_SWAPPED) === 0) continue;
      const pageAddr = addr + index * HOST_PAGE;
      appendRange(ranges, pageAddr, pageAddr + HOST_PAGE);
    }
    addr += entries * HOST_PAGE;
  }
  return ranges;
}

/** Ranges that touch become one. */
function appendRange(ranges: AddressRange[], startAddr: number, endAddr: number): void {
  const last = ranges.at(-1);
  if (last?.endAddr === startAddr)
    ranges[ranges.length - 1] = { startAddr: last.startAddr, endAddr };
  else ranges.push({ startAddr, endAddr });
}

/** What `MemoryWriter` needs to know of a block, and where it is in the target. */
export interface ResidentBlock {
  readonly idstr: string;
  readonly pageSize: number;
  /** Address of page 0. */
  readonly hostAddr: number;
}

/** Writes data pages and zeros straight into a target's memory. */
export class MemoryWriter {
  readonly #pid: number;
  readonly #fd: number;
  readonly #zeros = Buffer.alloc(MiB);

  /**
   * @throws FslError HOST_UNSUPPORTED without the privilege to write the target's memory, TARGET_LOST
   * when it has ended
   */
  constructor(pid: number) {
    this.#pid = pid;
    this.#fd = openProcessFile(pid, "mem", "r+");
  }

  /**
   * Gives the pages [first, end) of a block the bytes that the source has for them, zeros for clear
   * bits.
   * @param data the block's page bitmap
   */
  async writePages(
    reader: PageReader,
    { idstr, pageSize, hostAddr }: ResidentBlock,
    data: Int32Array,
    first: number,
    end: number,
  ): Promise<void> {
    for (let page = nextBit(data, first, end, false); page < end;) {
      const runEnd = nextBit(data, page, end, true);
      this.zero(hostAddr + page * pageSize, (runEnd - page) * pageSize);
      page = nextBit(data, runEnd, end, false);
    }
    await reader.each(idstr, data, first, end, (address, page, pages) =>
      this.#write(address, pages * pageSize, hostAddr + page * pageSize, () => {
        // The kernel does not say how far it came.
        for (let failed = page; failed < page + pages; failed += 1) {
          const error = reader.diagnose(idstr, failed);
          if (error !== null) return error;
        }
        return reader.unreadable(idstr, page);
      }),
    );
  }

  close(): void {
    closeSync(this.#fd);
  }

  /** Zeros over memory that is there. */
  zero(addr: number, length: number): void {
    for (let at = 0; at < length;) {
      const part = Math.min(MiB, length - at);
      this.#write(sys.ptrOf(this.#zeros), part, addr + at);
      at += part;
    }
  }

  /**
   * process_vm_writev(2) takes two thirds of the time, and a write to /proc/PID/mem tells what is wrong: EFAULT is
   * about our side, EIO about the target's.
   * @param diagnose the reader's error
   */
  #write(localAddr: number, length: number, addr: number, diagnose?: () => FslError): void {
    for (let at = 0; at < length;) {
      const quickly = sys.processVmWritev(this.#pid, addr + at, localAddr + at, length - at);
      const done =
        quickly > 0 ? quickly : sys.pwrite(this.#fd, localAddr + at, length - at, addr + at);
      if (done === -EFAULT && diagnose !== undefined) throw diagnose();
      if (done <= 0) {
        throw new FslError(
          "TARGET_LOST",
          `memory at ${hex(addr + at)}: cannot be written: ${sys.errnoText(-done)}`,
        );
      }
      at += done;
    }
  }
}

/** Half-open range of page indexes. */
export interface PageSpan {
  readonly first: number;
  readonly end: number;
}

/** The pages of a block that ranges cover, by address; those that touch or overlap are one. */
export function spansOf(
  ranges: readonly AddressRange[],
  { hostAddr, pageSize, pageCount }: ResidentBlock & { readonly pageCount: number },
): PageSpan[] {
  const spans: PageSpan[] = [];
  for (const { startAddr, endAddr } of ranges.toSorted((a, b) => a.startAddr - b.startAddr)) {
    const { first, end } = pagesOf(startAddr, endAddr, hostAddr, pageSize, pageCount);
    const last = spans.at(-1);
    if (last === undefined || first > last.end) spans.push({ first, end });
    else spans[spans.length - 1] = { first: last.first, end: Math.max(last.end, end) };
  }
  return spans;
}

/**
 * The host-page-aligned half-open page range that covers [startAddr, endAddr), clipped to a block.
 */
export function pagesOf(
  startAddr: number,
  endAddr: number,
  hostAddr: number,
  pageSize: number,
  pageCount: number,
): PageSpan {
  const first = Math.max(0, alignDown(startAddr - hostAddr, pageSize) / pageSize);
  const end = Math.min(pageCount, Math.ceil((endAddr - hostAddr) / pageSize));
  return { first, end };
}
