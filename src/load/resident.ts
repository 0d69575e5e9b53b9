/**
 * Pages that are in the target's memory already. They never fault, so whatever they hold would be
 * what the guest sees: they are looked for after the ranges are registered (nothing can appear
 * unnoticed from then on) and corrected before the state is handed over. Runs on the main thread.
 *
 * @source Linux fs/proc/task_mmu.c pagemap_read, do_pagemap_scan
 */
import { closeSync, openSync, readSync } from "node:fs";
import { FslError } from "../errors.ts";
import { EINVAL, ENOTTY } from "../sys/abi.ts";
import { HOST_PAGE_LENGTH } from "../sys/host-pages.ts";
import * as sys from "../sys/native.ts";
import { hex } from "../pages.ts";
import { processFileError } from "../vmm/process-maps.ts";
import type { BlockPlace } from "./memory-writer.ts";

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
const SCAN = { SIZE: 0, START: 2, END: 3, VEC: 5, VEC_LEN: 6, ANYOF: 10, RETURN: 11 };
const SCAN_WORDS = 12;
/** PAGE_IS_PRESENT | PAGE_IS_SWAPPED */
const PRESENT_OR_SWAPPED = (1n << 3n) | (1n << 4n);
/** struct page_region: start, end, categories. */
const REGION_WORDS = 3;
const REGIONS_AT_ONCE = 1024;

/**
 * By the PAGEMAP_SCAN ioctl (Linux 6.7); null when the kernel has none.
 * @source Linux fs/proc/task_mmu.c do_pagemap_scan
 */
export function scanPagemap(fd: number, startAddr: number, endAddr: number): AddressRange[] | null {
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
    if (count < REGIONS_AT_ONCE) break;
    // Not from the kernel's walk_end: where the walk has come to its end, that is where it was when its own
    // buffer (of 512 regions) was last full.
    addr = Number(regions[(count - 1) * REGION_WORDS + 1]);
  }
  return ranges;
}

const PAGEMAP_ENTRY = 8;
/** Bits of the upper half of a pagemap entry: page present (63), swapped (62). */
const UPPER_PRESENT_OR_SWAPPED = 0xc0000000;
/** Pagemap entries read at once: 512 KiB, 256 MiB of guest memory. */
const PAGEMAP_WINDOW = 65536;

/** By reading one entry a page; for kernels before PAGEMAP_SCAN. */
export function readPagemap(fd: number, startAddr: number, length: number): AddressRange[] {
  const buffer = Buffer.alloc(PAGEMAP_WINDOW * PAGEMAP_ENTRY);
  const words = new Uint32Array(buffer.buffer, buffer.byteOffset, PAGEMAP_WINDOW * 2);
  const ranges: AddressRange[] = [];
  const endAddr = startAddr + length;
  for (let addr = startAddr; addr < endAddr;) {
    const entries = Math.min(PAGEMAP_WINDOW, (endAddr - addr) / HOST_PAGE_LENGTH);
    const wanted = entries * PAGEMAP_ENTRY;
    const done = readSync(fd, buffer, 0, wanted, (addr / HOST_PAGE_LENGTH) * PAGEMAP_ENTRY);
    if (done !== wanted) {
      throw new FslError(
        "TARGET_LOST",
        `pagemap at ${hex(addr)}: expected ${wanted} bytes, found ${done}`,
      );
    }
    // Nobody has touched most of it: all entries say the same then, which is seen at once.
    const isUniform = buffer
      .subarray(PAGEMAP_ENTRY, wanted)
      .equals(buffer.subarray(0, wanted - PAGEMAP_ENTRY));
    const isAbsent = isUniform && ((words[1] ?? 0) & UPPER_PRESENT_OR_SWAPPED) === 0;
    for (let index = isAbsent ? entries : 0; index < entries; index += 1) {
      if (((words[2 * index + 1] ?? 0) & UPPER_PRESENT_OR_SWAPPED) === 0) continue;
      const pageAddr = addr + index * HOST_PAGE_LENGTH;
      appendRange(ranges, pageAddr, pageAddr + HOST_PAGE_LENGTH);
    }
    addr += entries * HOST_PAGE_LENGTH;
  }
  return ranges;
}

/** Ranges that touch become one. */
export function appendRange(ranges: AddressRange[], startAddr: number, endAddr: number): void {
  const last = ranges.at(-1);
  if (last?.endAddr === startAddr)
    ranges[ranges.length - 1] = { startAddr: last.startAddr, endAddr };
  else ranges.push({ startAddr, endAddr });
}

/** Half-open range of page indexes. */
export interface PageSpan {
  readonly first: number;
  readonly end: number;
}

/** How many pages they are. */
export function pagesIn(spans: readonly PageSpan[]): number {
  return spans.reduce((sum, { first, end }) => sum + end - first, 0);
}

/** The host pages of a block that ranges cover, clipped to it, by address; those that touch or overlap are one. */
export function spansOf(
  ranges: readonly AddressRange[],
  { hostAddr, pageSize, pageCount }: Omit<BlockPlace, "idstr"> & { readonly pageCount: number },
): PageSpan[] {
  const spans: PageSpan[] = [];
  for (const { startAddr, endAddr } of ranges.toSorted((a, b) => a.startAddr - b.startAddr)) {
    const first = Math.max(0, Math.floor((startAddr - hostAddr) / pageSize));
    const end = Math.min(pageCount, Math.ceil((endAddr - hostAddr) / pageSize));
    const last = spans.at(-1);
    if (last === undefined || first > last.end) spans.push({ first, end });
    else spans[spans.length - 1] = { first: last.first, end: Math.max(last.end, end) };
  }
  return spans;
}
