/**
 * Can a library be preloaded into this program? Only the dynamic loader honours LD_PRELOAD, so the
 * program must be an ELF file with a PT_INTERP program header. A script is no such program: the
 * library would run in its shell.
 *
 * ELF64 little-endian, offsets used here: 0 magic (4), 4 class (u8, 2 = 64 bit), 5 data (u8, 1 =
 * little-endian), 32 e_phoff (u64), 54 e_phentsize (u16), 56 e_phnum (u16); a program header: 0
 * p_type (u32, 3 = PT_INTERP), 8 p_offset (u64), 32 p_filesz (u64). Source: elf(5).
 */
import { closeSync, openSync, readSync } from "node:fs";

const HEADER_LENGTH = 64;
const PROGRAM_HEADER_LENGTH = 56;
/** Program headers of one file; real ones have about a dozen. */
const PROGRAM_HEADERS_MAX = 256;
const PT_INTERP = 3;
const INTERPRETER_LENGTH_MAX = 4096;

/**
 * The dynamic loader that a program asks for, e.g. `/lib64/ld-linux-x86-64.so.2`.
 * @returns null for anything that is no dynamically linked 64-bit little-endian ELF file, or cannot
 * be read
 */
export function readElfInterpreter(path: string): string | null {
  let fd: number;
  try {
    fd = openSync(path, "r");
  } catch {
    return null; // Starting it will fail with the real reason.
  }
  try {
    return findInterpreter((offset, length) => {
      const bytes = Buffer.alloc(length);
      return readSync(fd, bytes, 0, length, offset) === length ? bytes : null;
    });
  } catch {
    return null;
  } finally {
    closeSync(fd);
  }
}

/** True for glibc's loader (musl's is called `ld-musl-…`). */
export function isGlibcInterpreter(interpreter: string | null): boolean {
  return interpreter !== null && /(?:^|\/)ld(?:64)?(?:-linux[^/]*)?\.so\.\d+$/.test(interpreter);
}

/** @param read gives `length` bytes at `offset`, or null when the file has fewer */
export function findInterpreter(
  read: (offset: number, length: number) => Buffer | null,
): string | null {
  const header = read(0, HEADER_LENGTH);
  if (header === null || header.readUInt32BE(0) !== 0x7f454c46) return null;
  if (header[4] !== 2 || header[5] !== 1) return null;
  const tableOffset = Number(header.readBigUInt64LE(32));
  const entryLength = header.readUInt16LE(54);
  const entryCount = Math.min(header.readUInt16LE(56), PROGRAM_HEADERS_MAX);
  if (entryLength < PROGRAM_HEADER_LENGTH) return null;
  for (let index = 0; index < entryCount; index++) {
    const entry = read(tableOffset + index * entryLength, PROGRAM_HEADER_LENGTH);
    if (entry === null) return null;
    if (entry.readUInt32LE(0) !== PT_INTERP) continue;
    const length = Number(entry.readBigUInt64LE(32));
    if (length < 2 || length > INTERPRETER_LENGTH_MAX) return null;
    return (
      read(Number(entry.readBigUInt64LE(8)), length)
        ?.toString("latin1")
        .replace(/\0.*$/s, "") ?? null
    );
  }
  return null;
}

const PT_LOAD = 1;
const PF_W = 2;

/**
 * What of a library is only read: its segments that cannot be written to, each where it belongs from address 0 on.
 * Whoever runs it so may use nothing that is relocated.
 */
export function readImage(library: Uint8Array): { bytes: Uint8Array; entry: number } {
  const file = Buffer.from(library.buffer, library.byteOffset, library.length);
  const tableOffset = Number(file.readBigUInt64LE(32));
  const [entryLength, entryCount] = [file.readUInt16LE(54), file.readUInt16LE(56)];
  const segments = Array.from({ length: entryCount }, (_, index) => {
    const at = tableOffset + index * entryLength;
    return {
      isWanted: file.readUInt32LE(at) === PT_LOAD && (file.readUInt32LE(at + 4) & PF_W) === 0,
      offset: Number(file.readBigUInt64LE(at + 8)),
      addr: Number(file.readBigUInt64LE(at + 16)),
      length: Number(file.readBigUInt64LE(at + 32)),
    };
  }).filter(({ isWanted }) => isWanted);
  const bytes = new Uint8Array(Math.max(...segments.map(({ addr, length }) => addr + length)));
  for (const { offset, addr, length } of segments) {
    bytes.set(file.subarray(offset, offset + length), addr);
  }
  return { bytes, entry: Number(file.readBigUInt64LE(24)) };
}
