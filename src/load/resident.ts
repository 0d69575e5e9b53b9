/**
 * Pages that are in the target's memory already. They never fault, so whatever they hold would be what the guest sees:
 * they are looked for after the ranges are registered (nothing can appear unnoticed from then on) and corrected before
 * the state is handed over. Runs on the main thread.
 *
 * Writing goes through /proc/PID/mem: it never blocks (EIO on a missing page), where process_vm_writev would wait for the
 * page that only we can bring. @source Linux fs/proc/base.c mem_rw, fs/proc/task_mmu.c pagemap_read
 */
import { closeSync, openSync, readSync, writeSync } from "node:fs";
import { FslError } from "../errors.ts";
import { alignDown, hex, MiB } from "../pages.ts";
import type { PageBitmap } from "../snapshot/page-bitmap.ts";

const HOST_PAGE = 4096;
const PAGEMAP_ENTRY = 8;
/** Bits of the upper half of a pagemap entry: page present (63), swapped (62). */
const PRESENT_OR_SWAPPED = 0xc0000000;
/** Pagemap entries read at once: 512 KiB, 256 MiB of guest memory. */
const PAGEMAP_WINDOW = 65536;

/**
 * Half-open host page ranges of [startAddr, startAddr + length) that are present or swapped, by address.
 * Page tables that do not exist cost the kernel next to nothing; a populated 4 GiB costs about 8 MiB of reading.
 */
export function* residentRanges(
  pid: number,
  startAddr: number,
  length: number,
): Generator<{ startAddr: number; endAddr: number }> {
  const fd = openSync(`/proc/${pid}/pagemap`, "r");
  try {
    const buffer = Buffer.alloc(PAGEMAP_WINDOW * PAGEMAP_ENTRY);
    const upper = new Uint32Array(buffer.buffer, buffer.byteOffset, PAGEMAP_WINDOW * 2);
    let runStart = -1;
    const endAddr = startAddr + length;
    for (let addr = startAddr; addr < endAddr; ) {
      const entries = Math.min(PAGEMAP_WINDOW, (endAddr - addr) / HOST_PAGE);
      const wanted = entries * PAGEMAP_ENTRY;
      const offset = (addr / HOST_PAGE) * PAGEMAP_ENTRY;
      const done = readSync(fd, buffer, 0, wanted, offset);
      if (done !== wanted) {
        throw new FslError("TARGET_LOST", `pagemap at ${hex(addr)}: expected ${wanted} bytes, found ${done}`);
      }
      for (let index = 0; index < entries; index += 1) {
        const there = ((upper[2 * index + 1] ?? 0) & PRESENT_OR_SWAPPED) !== 0;
        const pageAddr = addr + index * HOST_PAGE;
        if (there && runStart < 0) runStart = pageAddr;
        if (!there && runStart >= 0) {
          yield { startAddr: runStart, endAddr: pageAddr };
          runStart = -1;
        }
      }
      addr += entries * HOST_PAGE;
    }
    if (runStart >= 0) yield { startAddr: runStart, endAddr };
  } finally {
    closeSync(fd);
  }
}

/** Writes snapshot bytes and zeros straight into a target's memory, in bounded pieces. */
export class MemoryWriter {
  readonly #fd: number;
  readonly #snapshotFd: number;
  readonly #buffer = Buffer.alloc(MiB);
  readonly #zeros = Buffer.alloc(MiB);

  /** @throws FslError HOST_UNSUPPORTED without the privilege to write the target's memory */
  constructor(pid: number, snapshotFd: number) {
    try {
      this.#fd = openSync(`/proc/${pid}/mem`, "r+");
    } catch (error) {
      throw new FslError(
        "HOST_UNSUPPORTED",
        `memory of process ${pid}: cannot be opened for writing: ${String(error)}; run fsl as root`,
        { pid },
        error,
      );
    }
    this.#snapshotFd = snapshotFd;
  }

  /**
   * Gives the pages [firstPage, endPage) of a block the bytes that the snapshot has for them, zeros for clear bits.
   * @param hostAddr address of page 0 in the target
   * @param pagesOffset file offset of page 0
   */
  writePages(
    bitmap: PageBitmap,
    hostAddr: number,
    pagesOffset: number,
    pageSize: number,
    firstPage: number,
    endPage: number,
  ): void {
    let page = firstPage;
    while (page < endPage) {
      const isData = bitmap.has(page);
      let runEnd = page + 1;
      while (runEnd < endPage && bitmap.has(runEnd) === isData) runEnd += 1;
      const addr = hostAddr + page * pageSize;
      const length = (runEnd - page) * pageSize;
      if (isData) this.#copy(pagesOffset + page * pageSize, addr, length);
      else this.#zero(addr, length);
      page = runEnd;
    }
  }

  close(): void {
    closeSync(this.#fd);
  }

  #copy(fileOffset: number, addr: number, length: number): void {
    for (let at = 0; at < length; ) {
      const wanted = Math.min(MiB, length - at);
      let done: number;
      try {
        done = readSync(this.#snapshotFd, this.#buffer, 0, wanted, fileOffset + at);
      } catch (error) {
        throw readError(fileOffset + at, wanted, String(error), error);
      }
      if (done === 0) throw readError(fileOffset + at, wanted, "found the end of the file", undefined);
      this.#write(this.#buffer, done, addr + at);
      at += done;
    }
  }

  #zero(addr: number, length: number): void {
    for (let at = 0; at < length; ) {
      const part = Math.min(MiB, length - at);
      this.#write(this.#zeros, part, addr + at);
      at += part;
    }
  }

  #write(buffer: Buffer, length: number, addr: number): void {
    for (let at = 0; at < length; ) {
      const done = writeSync(this.#fd, buffer, at, length - at, addr + at);
      if (done <= 0) throw new FslError("TARGET_LOST", `memory at ${hex(addr + at)}: nothing could be written`);
      at += done;
    }
  }
}

function readError(fileOffset: number, length: number, text: string, cause: unknown): FslError {
  return new FslError(
    "SNAPSHOT_OPEN",
    `snapshot: expected ${length} bytes at ${hex(fileOffset)}, ${text}`,
    { offset: fileOffset, length },
    cause,
  );
}

/** The host-page-aligned half-open page range that covers [startAddr, endAddr), clipped to a block. */
export function pagesOf(
  startAddr: number,
  endAddr: number,
  hostAddr: number,
  pageSize: number,
  pageCount: number,
): { first: number; end: number } {
  const first = Math.max(0, alignDown(startAddr - hostAddr, pageSize) / pageSize);
  const end = Math.min(pageCount, Math.ceil((endAddr - hostAddr) / pageSize));
  return { first, end };
}
