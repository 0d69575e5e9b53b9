/**
 * Contents of the files behind shared memory and huge pages: old contents of a file on tmpfs or
 * hugetlbfs, or what was allocated for it. Such a page does not fault either, though it is in
 * nobody's page table: the kernel takes it from the file. Looked for when pages in memory are, see
 * resident.ts. Runs on the main thread.
 * @source Linux mm/shmem.c shmem_get_folio_gfp (a folio that is there, written or only allocated,
 * is no userfault)
 */
import { closeSync, fstatSync, openSync, readdirSync, readSync, statSync } from "node:fs";
import { ENXIO, SEEK_DATA, SEEK_HOLE } from "../sys/abi.ts";
import { HOST_PAGE_LENGTH } from "../sys/host-pages.ts";
import * as sys from "../sys/native.ts";
import { FslError } from "../errors.ts";
import { hex } from "../pages.ts";
import { processFileError, ProcessMaps } from "../vmm/process-maps.ts";
import { type AddressRange, appendRange, openProcessFile } from "./resident.ts";

/** A part of a file that is mapped. */
interface FileArea extends AddressRange {
  /** File offset of startAddr in bytes. */
  readonly offset: number;
  readonly inode: number;
}

/** A file with more extents than this is looked at page by page. */
const EXTENTS_MAX = 65_536;
/** Bytes of a block of st_blocks. @source stat(2) */
const STAT_BLOCK = 512;

/**
 * Ranges of [startAddr, startAddr + length) that the file behind them has pages for, by address.
 * The range must be registered already.
 * @param pageSize bytes of the region's host pages
 * @throws FslError TARGET_LOST when the target's maps cannot be read
 */
export function contentRanges(
  pid: number,
  startAddr: number,
  length: number,
  pageSize: number,
): AddressRange[] {
  const endAddr = startAddr + length;
  return fileAreas(pid, startAddr, endAddr).flatMap((area) => {
    const fd = openFileOf(pid, area.inode);
    if (fd < 0) return probe(pid, area, pageSize);
    try {
      const allocated = fstatSync(fd).blocks * STAT_BLOCK;
      if (allocated === 0) return [];
      // hugetlbfs has no SEEK_DATA of its own, and few pages.
      if (pageSize > HOST_PAGE_LENGTH) return probe(pid, area, pageSize);
      return extents(fd, area, allocated) ?? probe(pid, area, pageSize);
    } finally {
      closeSync(fd);
    }
  });
}

/**
 * Ranges of [startAddr, startAddr + length) for which the file behind them may hold something else than zeros, by
 * address. For memory that is not registered: nothing of it is touched, as that would allocate it. What was only
 * allocated is zero.
 */
export function writtenRanges(
  pid: number,
  startAddr: number,
  length: number,
  pageSize: number,
): AddressRange[] {
  return fileAreas(pid, startAddr, startAddr + length).flatMap((area) => {
    const whole = { startAddr: area.startAddr, endAddr: area.endAddr };
    const fd = area.inode === 0 ? -1 : openFileOf(pid, area.inode);
    if (fd < 0) return [whole];
    try {
      if (fstatSync(fd).blocks === 0) return [];
      return (pageSize > HOST_PAGE_LENGTH ? null : dataRanges(fd, area)) ?? [whole];
    } finally {
      closeSync(fd);
    }
  });
}

/** By SEEK_DATA; null when there are too many of them, or the file system does not say. */
function dataRanges(fd: number, area: FileArea): AddressRange[] | null {
  const ranges: AddressRange[] = [];
  const areaEnd = area.offset + area.endAddr - area.startAddr;
  for (let at = area.offset; at < areaEnd;) {
    const data = sys.lseek(fd, at, SEEK_DATA);
    if (data === -ENXIO || data >= areaEnd) return ranges;
    const hole = data < 0 ? data : sys.lseek(fd, data, SEEK_HOLE);
    if (hole <= data || ranges.length === EXTENTS_MAX) return null;
    const toAddr = area.startAddr - area.offset;
    ranges.push({ startAddr: toAddr + data, endAddr: Math.min(area.endAddr, toAddr + hole) });
    at = hole;
  }
  return ranges;
}

function fileAreas(pid: number, startAddr: number, endAddr: number): FileArea[] {
  const areas = [...ProcessMaps.read(pid).areas(startAddr, endAddr - startAddr)];
  return areas.map((area) => {
    const from = Math.max(area.startAddr, startAddr);
    return {
      startAddr: from,
      endAddr: Math.min(area.endAddr, endAddr),
      offset: area.offset + from - area.startAddr,
      inode: area.inode,
    };
  });
}

/**
 * A new open file of the target's file with that inode number, or -1; QEMU keeps its memory's files
 * open.
 */
function openFileOf(pid: number, inode: number): number {
  for (const name of descriptorsOf(pid)) {
    const path = `/proc/${pid}/fd/${name}`;
    try {
      const status = statSync(path);
      if (status.ino === inode && status.isFile()) return openSync(path, "r");
    } catch {
      continue; // Closed meanwhile, or not to be opened.
    }
  }
  return -1;
}

function descriptorsOf(pid: number): string[] {
  try {
    return readdirSync(`/proc/${pid}/fd`);
  } catch (error) {
    throw processFileError(pid, "fd", error);
  }
}

/**
 * By SEEK_DATA; null when the file has pages that it does not show: allocated, but never written.
 */
function extents(fd: number, area: FileArea, allocated: number): AddressRange[] | null {
  const ranges: AddressRange[] = [];
  const { size } = fstatSync(fd);
  let seen = 0;
  for (let at = 0; at < size;) {
    const data = sys.lseek(fd, at, SEEK_DATA);
    if (data < 0) break;
    const hole = sys.lseek(fd, data, SEEK_HOLE);
    at = hole < 0 ? size : hole;
    seen += at - data;
    const startAddr = Math.max(area.startAddr, area.startAddr + data - area.offset);
    const endAddr = Math.min(area.endAddr, area.startAddr + at - area.offset);
    if (startAddr < endAddr) ranges.push({ startAddr, endAddr });
    if (ranges.length > EXTENTS_MAX) return null;
  }
  return seen < allocated ? null : ranges;
}

/**
 * Page by page, by reading a byte of each through /proc/PID/mem: EIO is a page that would fault.
 * About 1 µs each.
 * @source Linux fs/proc/base.c mem_rw, mm/gup.c
 */
function probe(pid: number, area: FileArea, pageSize: number): AddressRange[] {
  const fd = openProcessFile(pid, "mem", "r");
  const byte = Buffer.alloc(1);
  const ranges: AddressRange[] = [];
  try {
    for (let addr = area.startAddr; addr < area.endAddr; addr += pageSize) {
      if (!isReadable(fd, byte, addr)) continue;
      appendRange(ranges, addr, addr + pageSize);
    }
  } finally {
    closeSync(fd);
  }
  return ranges;
}

function isReadable(fd: number, byte: Buffer, addr: number): boolean {
  try {
    return readSync(fd, byte, 0, 1, addr) === 1;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "EIO") return false;
    throw new FslError("TARGET_LOST", `memory at ${hex(addr)}: ${String(error)}`, {}, error);
  }
}
