/**
 * Parses QEMU's table of RAMBlocks (`x-query-ramblock`, or `info ramblock` of the human monitor;
 * the same text). There is no structured command for it. Columns, from the right, because a name
 * may hold spaces and overflow its 24 characters: RO (`ro`/`rw`), HVA, Total, Used, Offset
 * (hexadecimal, 16 digits), PSize (`4 KiB`), name.
 *
 * The text comes from a process that a guest may have broken into: it is bounded and checked here,
 * and against the kernel's account in process-maps.ts.
 */
import { FslError } from "../errors.ts";
import { GiB, KiB, MiB, hex } from "../pages.ts";

/** One line of the table. */
export interface RamblockLine {
  readonly idstr: string;
  /** Host page size, bytes, a power of two of at least 4096. */
  readonly pageSize: number;
  /** Used length, bytes. */
  readonly length: number;
  /** Maximum length, bytes, at least `length`. */
  readonly maxLength: number;
  /** Address in QEMU, bytes, page-aligned. */
  readonly hostAddr: number;
  readonly readOnly: boolean;
}

/** Characters of the whole table: 4096 lines of 255 + 100 characters are 1.4 MB. */
export const TABLE_LENGTH_MAX = 2 * MiB;
/** Blocks; a guest with 256 dimms has some 300. */
export const BLOCK_COUNT_MAX = 4096;
/** Characters of one line: longer ones are not looked at, matching them would take long. */
const LINE_LENGTH_MAX = 1024;
/** Bytes of a RAMBlock's name (QEMU RAMBlock.idstr is char[256]). */
const IDSTR_LENGTH_MAX = 255;
/**
 * First address that is not a user address: 2^47 on x86-64; 2^52 on aarch64 with large addresses.
 */
const ADDRESS_END_MAX = 2 ** 52;

const HEADER = /^\s*Block Name\s+PSize\s+Offset\s+Used\s+Total\s+HVA\s+RO\s*$/;
const NUMBER = "\\s+0x([0-9a-f]{16})";
/** Name, page size and unit, offset, used, total, address, access. */
const LINE = new RegExp(
  `^\\s*(\\S(?:.*\\S)?)\\s+(\\d{1,4}) ([KMG])iB${NUMBER.repeat(4)}\\s+(ro|rw)\\s*$`,
);
const UNIT_BYTES: Readonly<Record<string, number>> = { K: KiB, M: MiB, G: GiB };

/**
 * @returns blocks in QEMU's order
 * @throws FslError TARGET_MISMATCH when the text is not such a table (QEMU before 8.0 prints no
 * addresses)
 * @source QEMU system/physmem.c ram_block_format
 */
export function parseRamblocks(text: string): RamblockLine[] {
  if (text.length > TABLE_LENGTH_MAX) {
    throw refused(`expected at most ${TABLE_LENGTH_MAX} characters, found ${text.length}`);
  }
  const [header, ...lines] = text.split(/\r?\n/).filter((line) => line.trim() !== "");
  if (header === undefined || !HEADER.test(header)) {
    throw refused(`expected a header line with HVA and RO, found ${quote(header ?? "")}`);
  }
  if (lines.length > BLOCK_COUNT_MAX) {
    throw refused(`expected at most ${BLOCK_COUNT_MAX} blocks, found ${lines.length}`);
  }
  const blocks = lines.map(parseLine);
  const names = new Set<string>();
  for (const block of blocks) {
    if (names.has(block.idstr)) throw refused(`name ${quote(block.idstr)} appears twice`);
    names.add(block.idstr);
  }
  return blocks;
}

function parseLine(line: string): RamblockLine {
  const fields = line.length <= LINE_LENGTH_MAX ? LINE.exec(line) : null;
  if (fields === null) throw refused(`line ${quote(line)} cannot be read`);
  const [
    ,
    idstr = "",
    pageCount = "",
    pageUnit = "",
    ,
    used = "",
    total = "",
    address = "",
    access = "",
  ] = fields;
  const block = {
    idstr,
    pageSize: Number(pageCount) * (UNIT_BYTES[pageUnit] ?? 0),
    length: Number.parseInt(used, 16),
    maxLength: Number.parseInt(total, 16),
    hostAddr: Number.parseInt(address, 16),
    readOnly: access === "ro",
  };
  checkBlock(block);
  return block;
}

function checkBlock(block: RamblockLine): void {
  const { idstr, pageSize, length, maxLength, hostAddr } = block;
  const name = quote(idstr);
  if (Buffer.byteLength(idstr) > IDSTR_LENGTH_MAX) throw refused(`name ${name} is too long`);
  if (pageSize < 4 * KiB || !Number.isInteger(Math.log2(pageSize))) {
    throw refused(`page size ${pageSize} of ${name} is no power of two from 4096`);
  }
  if (length > maxLength) throw refused(`${name} uses ${length} of ${maxLength} bytes`);
  if (hostAddr === 0 || hostAddr % pageSize !== 0)
    throw refused(`${name} is at ${hex(hostAddr)}, unaligned`);
  if (!(hostAddr + maxLength <= ADDRESS_END_MAX))
    throw refused(`${name} ends past every user address`);
}

function quote(text: string): string {
  return JSON.stringify(text.slice(0, 160));
}

function refused(why: string): FslError {
  return new FslError("TARGET_MISMATCH", `QEMU's table of RAMBlocks: ${why}`);
}
