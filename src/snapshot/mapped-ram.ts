/**
 * RAMBlock records of a mapped-ram stream: the body of the `ram` START section. Read by QEMU 9.0 and later; symbols are
 * of migration/ram.c. All integers are big-endian, nothing is aligned.
 *
 *   START body (ram_save_setup / parse_ramblocks):
 *     be64   total | 0x004 (MEM_SIZE)   total = sum of used_length, a multiple of 4096; there is no block count
 *     block records until their used_length add up to total
 *     be64   0x010 (EOS)
 *
 *   block record (parse_ramblock):
 *     u8+n   block id                   unique
 *     be64   used_length                bytes
 *     be64   guest physical address     only with capability x-ignore-shared
 *     28 B   MappedRamHeader            mapped_ram_setup_ramblock / mapped_ram_read_header
 *
 *   MappedRamHeader, packed:
 *      0  be32  version                 1; QEMU also takes 0, no writer makes it
 *      4  be64  page_size               target page size; QEMU 10 divides by it unchecked
 *     12  be64  bitmap_offset           absolute file offset, even in a stream that starts at an offset
 *     20  be64  pages_offset            absolute; writer aligns to 1 MiB, reader wants page_size
 *
 * The stream goes on at pages_offset + used_length. With x-ignore-shared (QEMU 11.0) both offsets 0 mean that the block
 * was not saved; the stream then goes on right behind the header.
 */
import type { FslError } from "../errors.ts";
import { hex } from "../pages.ts";
import type { ByteReader } from "./byte-reader.ts";

/** QEMU's named piece of guest RAM, as the snapshot has it. Structured-cloneable. */
export interface RAMBlock {
  readonly idstr: string;
  /** Length of the block in bytes, a multiple of pageSize, > 0. */
  readonly usedLength: number;
  /** Bytes per bit of the bitmap: the target's page size, 4096 on x86_64. */
  readonly pageSize: number;
  /** usedLength / pageSize. */
  readonly pageCount: number;
  /** File offset in bytes of the bitmap; 0 when notSaved. */
  readonly bitmapOffset: number;
  /** Bytes of the bitmap: one bit per page, rounded up to 64 bits; 0 when notSaved. */
  readonly bitmapLength: number;
  /** File offset in bytes of page 0; page i lies at pagesOffset + i * pageSize; 0 when notSaved. */
  readonly pagesOffset: number;
  /** File offset in bytes of the block's record (its name). */
  readonly recordOffset: number;
  /** File offset in bytes of the 28-byte MappedRamHeader. */
  readonly headerOffset: number;
  /** True when the saver left the block out (shared memory under x-ignore-shared): its bytes are not in the file. */
  readonly notSaved: boolean;
  /** Address within the memory region's container; null without x-ignore-shared. */
  readonly guestPhysicalAddr: number | null;
}

/** How block records are written, from the CONFIGURATION section. */
export interface BlockRecordFormat {
  /** Capability x-ignore-shared: records carry an address, and blocks may be left out. */
  readonly ignoreShared: boolean;
  /** Page size in bytes that the configuration promises; null when it says nothing. */
  readonly targetPageSize: number | null;
}

/** @source migration/ram.c RAM_SAVE_FLAG_MEM_SIZE */
const RAM_FLAG_MEM_SIZE = 0x004;
/** @source migration/ram.c RAM_SAVE_FLAG_EOS */
export const RAM_FLAG_EOS = 0x010;
/** Low bits of a RAM word that are flags, the rest is a length. @source ram.c parse: TARGET_PAGE_MASK of 4 KiB pages */
const RAM_FLAGS_SPAN = 4096;

/** @source migration/ram.c MAPPED_RAM_HDR_VERSION */
const MAPPED_RAM_VERSION = 1;
/** Bytes of a MappedRamHeader. */
export const MAPPED_RAM_HEADER_LENGTH = 28;

/** More than any guest: every block costs a memory region with a name, and KVM has 32764 memory slots at most. */
const BLOCK_COUNT_MAX = 4096;
/** 2^32 pages, 16 TiB of 4 KiB pages: page indexes stay 32-bit numbers, and a bitmap within 512 MiB. */
const BLOCK_PAGES_MAX = 2 ** 32;
/** Target page sizes of QEMU: 4 KiB everywhere that fsl runs, up to 64 KiB on arm64. */
const PAGE_SIZE_MIN = 4096;
const PAGE_SIZE_MAX = 65536;

/**
 * Reads the body of the `ram` START section from its first word to the EOS word and leaves the reader behind it.
 * @throws FslError SNAPSHOT_FORMAT, SNAPSHOT_UNSUPPORTED
 */
export function readRamStartBody(reader: ByteReader, format: BlockRecordFormat): RAMBlock[] {
  const wordOffset = reader.offset;
  const word = reader.readU64BE("RAM size word");
  const flags = word % RAM_FLAGS_SPAN;
  if (flags !== RAM_FLAG_MEM_SIZE) {
    const expected = `flags ${hex(RAM_FLAG_MEM_SIZE)} (MEM_SIZE)`;
    throw reader.damaged(wordOffset, "RAM size word", expected, `flags ${hex(flags)}`);
  }
  const totalLength = word - flags;
  if (totalLength === 0) throw reader.damaged(wordOffset, "RAM size word", "RAM", "0 bytes");

  const blocks = readBlocks(reader, totalLength, format);
  const endOffset = reader.offset;
  const endWord = reader.readU64BE("end of RAM START");
  if (endWord !== RAM_FLAG_EOS) {
    const expected = `word ${hex(RAM_FLAG_EOS)} (EOS)`;
    throw reader.damaged(endOffset, "end of RAM START", expected, hex(endWord));
  }
  return blocks;
}

function readBlocks(
  reader: ByteReader,
  totalLength: number,
  format: BlockRecordFormat,
): RAMBlock[] {
  const what = "RAMBlock list";
  const blocks: RAMBlock[] = [];
  const idstrs = new Set<string>();
  let pageSize = format.targetPageSize;
  let remainingLength = totalLength;
  while (remainingLength > 0) {
    const at = reader.offset;
    if (blocks.length === BLOCK_COUNT_MAX) {
      throw reader.unsupported(at, what, `at most ${BLOCK_COUNT_MAX} blocks`, "more");
    }
    const record = readRecord(reader, format.ignoreShared);
    checkSizes(reader, record, remainingLength, pageSize);
    const block = toBlock(record);
    if (idstrs.has(block.idstr)) {
      throw reader.damaged(at, what, "each name once", `${block.idstr} again`);
    }
    if (!block.notSaved) {
      checkRegions(reader, block);
      reader.seek(block.pagesOffset + block.usedLength, `RAMBlock ${block.idstr}`);
    } else if (!format.ignoreShared) {
      const found = "offsets 0 without x-ignore-shared";
      throw refuse(reader, block, block.headerOffset, "bitmap and pages", found);
    }
    idstrs.add(block.idstr);
    // One target page size per machine: the first block speaks for all.
    pageSize ??= block.pageSize;
    remainingLength -= block.usedLength;
    blocks.push(block);
  }
  return blocks;
}

/** The fields of a block record as they stand in the file. */
interface BlockRecord {
  readonly idstr: string;
  readonly recordOffset: number;
  readonly usedLength: number;
  readonly guestPhysicalAddr: number | null;
  readonly headerOffset: number;
  readonly pageSize: number;
  readonly bitmapOffset: number;
  readonly pagesOffset: number;
}

/** Only what must be right for reading on is checked here: name and header version. */
function readRecord(reader: ByteReader, ignoreShared: boolean): BlockRecord {
  const recordOffset = reader.offset;
  const idstr = reader.readString8("RAMBlock name");
  if (idstr === "") throw reader.damaged(recordOffset, "RAMBlock name", "a name", "an empty one");
  const what = `RAMBlock ${idstr}`;
  const usedLength = reader.readU64BE(`${what}: used_length`);
  const guestPhysicalAddr = ignoreShared ? reader.readU64BE(`${what}: address`) : null;

  const headerOffset = reader.offset;
  const version = reader.readU32BE(`${what}: mapped-ram header`);
  if (version > MAPPED_RAM_VERSION) {
    throw reader.unsupported(headerOffset, what, "header version 1", version, { idstr });
  }
  if (version < MAPPED_RAM_VERSION) {
    throw reader.damaged(headerOffset, what, "header version 1", version, { idstr });
  }
  const pageSize = reader.readU64BE(`${what}: page_size`);
  const bitmapOffset = reader.readU64BE(`${what}: bitmap_offset`);
  const pagesOffset = reader.readU64BE(`${what}: pages_offset`);
  const offsets = { recordOffset, headerOffset, bitmapOffset, pagesOffset };
  return { idstr, usedLength, guestPhysicalAddr, pageSize, ...offsets };
}

/**
 * Lengths and page size: whole pages, within the total, few enough to count.
 * @param pageSizeWanted bytes; null when nothing has told it yet
 */
function checkSizes(
  reader: ByteReader,
  record: BlockRecord,
  remainingLength: number,
  pageSizeWanted: number | null,
): void {
  const { idstr, recordOffset, headerOffset, usedLength, pageSize } = record;
  const lengthOffset = recordOffset + 1 + idstr.length;
  const pageSizeOffset = headerOffset + 4;
  if (usedLength === 0 || usedLength > remainingLength) {
    const expected = `used_length of 1 to ${remainingLength} bytes`;
    throw refuse(reader, record, lengthOffset, expected, usedLength);
  }
  const isPowerOfTwo = Number.isInteger(Math.log2(pageSize));
  if (!isPowerOfTwo || pageSize < PAGE_SIZE_MIN || pageSize > PAGE_SIZE_MAX) {
    const expected = `page_size ${PAGE_SIZE_MIN} to ${PAGE_SIZE_MAX}, a power of two`;
    throw refuse(reader, record, pageSizeOffset, expected, pageSize);
  }
  if (pageSizeWanted !== null && pageSize !== pageSizeWanted) {
    throw refuse(reader, record, pageSizeOffset, `page_size ${pageSizeWanted}`, pageSize);
  }
  if (usedLength % pageSize !== 0) {
    throw refuse(reader, record, lengthOffset, `used_length in pages of ${pageSize}`, usedLength);
  }
  if (usedLength / pageSize > BLOCK_PAGES_MAX) {
    const what = `RAMBlock ${idstr}`;
    const expected = `at most ${BLOCK_PAGES_MAX} pages`;
    throw reader.unsupported(lengthOffset, what, expected, usedLength / pageSize, { idstr });
  }
}

function toBlock(record: BlockRecord): RAMBlock {
  const pageCount = record.usedLength / record.pageSize;
  const notSaved = record.bitmapOffset === 0 && record.pagesOffset === 0;
  // QEMU writes whole `unsigned long`s; 64-bit savers only.
  const bitmapLength = notSaved ? 0 : Math.ceil(pageCount / 64) * 8;
  return { ...record, pageCount, bitmapLength, notSaved };
}

/**
 * Header < bitmap < pages < end of file. The next record follows the pages, so blocks that pass here one after the
 * other are disjoint and in file order. QEMU checks none of it but the alignment.
 */
function checkRegions(reader: ByteReader, block: RAMBlock): void {
  const { byteLength } = reader.source;
  const { idstr, headerOffset, bitmapOffset, bitmapLength, pagesOffset, pageSize } = block;
  const headerEnd = headerOffset + MAPPED_RAM_HEADER_LENGTH;
  const bitmapEnd = bitmapOffset + bitmapLength;
  const pagesEnd = pagesOffset + block.usedLength;
  const bitmapField = headerOffset + 12;
  const pagesField = headerOffset + 20;
  if (bitmapOffset < headerEnd) {
    const expected = `bitmap_offset at or behind ${hex(headerEnd)}`;
    throw refuse(reader, block, bitmapField, expected, hex(bitmapOffset));
  }
  if (bitmapEnd > byteLength) {
    throw reader.pastEnd(bitmapField, `RAMBlock ${idstr}: bitmap`, bitmapEnd, { idstr });
  }
  if (pagesOffset < bitmapEnd) {
    const expected = `pages_offset at or behind the bitmap's end ${hex(bitmapEnd)}`;
    throw refuse(reader, block, pagesField, expected, hex(pagesOffset));
  }
  if (pagesOffset % pageSize !== 0) {
    const expected = `pages_offset in steps of ${pageSize}`;
    throw refuse(reader, block, pagesField, expected, hex(pagesOffset));
  }
  if (pagesEnd > byteLength) {
    throw reader.pastEnd(pagesField, `RAMBlock ${idstr}: pages`, pagesEnd, { idstr });
  }
}

/** SNAPSHOT_FORMAT that names the block. */
function refuse(
  reader: ByteReader,
  { idstr }: BlockRecord,
  fileOffset: number,
  expected: string,
  found: string | number,
): FslError {
  return reader.damaged(fileOffset, `RAMBlock ${idstr}`, expected, found, { idstr });
}
