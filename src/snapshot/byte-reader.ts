/**
 * Bounded reading of a file that may be damaged or hostile. `ByteSource` is the only way in: the parser asks it for
 * windows of a few KiB and never for more than the file holds, so a lie in a length field costs nothing. `ByteReader`
 * is a big-endian cursor on top; every failure is an FslError that knows its file offset.
 *
 * Everything in a QEMU migration stream is big-endian, except the page bitmaps (see page-bitmap.ts).
 */
import { readSync } from "node:fs";

import { assert, FslError, type ErrorDetails } from "../errors.ts";
import { hex } from "../pages.ts";

/** A file, or memory in tests. Reads are exact: all bytes or an FslError. */
export interface ByteSource {
  /** How messages call the file: its path. */
  readonly name: string;
  /** Length in bytes at the time of opening. */
  readonly byteLength: number;
  /** Bytes [offset, offset + length). The range lies within the source; the caller may keep the result. */
  read(offset: number, length: number): Uint8Array;
}

/** Bytes read at once after a jump: one block record with its header, or one section header. */
const JUMP_WINDOW_LENGTH = 4096;
/** Bytes read at once when the reader goes on where its window ended. */
const SEQUENTIAL_WINDOW_LENGTH = 65536;
/** Longest single field; the longest real one is a 255-byte name. */
const FIELD_LENGTH_MAX = 4096;

/** Names of QEMU hold printable ASCII only. */
const NOT_PRINTABLE = /[^\x20-\x7e]/;

/** What helps with a file that ends too soon. */
export const AGAIN = "copy or save it again";

/** SNAPSHOT_FORMAT: `what: expected E, found F (file at 0x...)`. @param advice what to do; "" = nothing to say */
export function damaged(
  source: ByteSource,
  fileOffset: number,
  what: string,
  expected: string,
  found: string | number,
  details: ErrorDetails = {},
  advice = "",
): FslError {
  return refusal("SNAPSHOT_FORMAT", source, fileOffset, what, expected, found, details, advice);
}

/** SNAPSHOT_UNSUPPORTED: sound as far as it was read, but not something fsl loads. */
export function unsupported(
  source: ByteSource,
  fileOffset: number,
  what: string,
  expected: string,
  found: string | number,
  details: ErrorDetails = {},
  advice = "",
): FslError {
  const code = "SNAPSHOT_UNSUPPORTED";
  return refusal(code, source, fileOffset, what, expected, found, details, advice);
}

function refusal(
  code: "SNAPSHOT_FORMAT" | "SNAPSHOT_UNSUPPORTED",
  source: ByteSource,
  fileOffset: number,
  what: string,
  expected: string,
  found: string | number,
  details: ErrorDetails,
  advice: string,
): FslError {
  const place = `${source.name} at ${hex(fileOffset)}`;
  const end = advice === "" ? "" : `; ${advice}`;
  const message = `${what}: expected ${expected}, found ${found} (${place})${end}`;
  return new FslError(code, message, {
    path: source.name,
    fileOffset,
    expected,
    found,
    ...details,
  });
}

/** Reads an open descriptor with pread; does not own it. */
export class FileByteSource implements ByteSource {
  readonly name: string;
  readonly byteLength: number;
  readonly #fd: number;

  constructor(fd: number, name: string, byteLength: number) {
    this.#fd = fd;
    this.name = name;
    this.byteLength = byteLength;
  }

  /** @throws FslError SNAPSHOT_OPEN on an I/O error, SNAPSHOT_FORMAT when the file became shorter meanwhile */
  read(offset: number, length: number): Uint8Array {
    assert(
      offset >= 0 && length >= 0 && offset + length <= this.byteLength,
      "read within the file",
    );
    const bytes = new Uint8Array(length);
    let doneLength = 0;
    while (doneLength < length) {
      const readLength = preadSome(this.#fd, bytes, doneLength, offset + doneLength, this.name);
      if (readLength === 0) {
        throw damaged(
          this,
          offset + doneLength,
          "snapshot",
          `a file of ${this.byteLength} bytes`,
          `its end: the file was truncated after it was opened`,
        );
      }
      doneLength += readLength;
    }
    return bytes;
  }
}

/** One pread; EINTR and the like surface as SNAPSHOT_OPEN with the system's own reason. */
function preadSome(
  fd: number,
  bytes: Uint8Array,
  from: number,
  offset: number,
  name: string,
): number {
  try {
    return readSync(fd, bytes, from, bytes.length - from, offset);
  } catch (cause) {
    const reason = systemReason(cause);
    throw new FslError(
      "SNAPSHOT_OPEN",
      `snapshot: cannot read ${bytes.length - from} bytes: ${reason} (${name} at ${hex(offset)})`,
      { path: name, fileOffset: offset, reason },
      cause,
    );
  }
}

/** `ENOENT` of a Node system error; else its text. */
export function systemReason(error: unknown): string {
  if (error instanceof Error && "code" in error && typeof error.code === "string")
    return error.code;
  return String(error);
}

/** Big-endian cursor with one small window. Positions are absolute file offsets in bytes. */
export class ByteReader {
  readonly source: ByteSource;
  #offset: number;
  #window: Uint8Array = new Uint8Array(0);
  #view = new DataView(this.#window.buffer);
  #windowOffset = 0;

  /** @param offset file offset of the first byte to read, 0 <= offset */
  constructor(source: ByteSource, offset = 0) {
    this.source = source;
    this.#offset = offset;
  }

  /** File offset of the next byte. */
  get offset(): number {
    return this.#offset;
  }

  get atEnd(): boolean {
    return this.#offset >= this.source.byteLength;
  }

  /** Goes to an absolute file offset; `what` names the thing that is expected there. */
  seek(offset: number, what: string): void {
    if (!Number.isSafeInteger(offset) || offset < 0 || offset > this.source.byteLength) {
      throw this.pastEnd(this.#offset, what, offset);
    }
    this.#offset = offset;
  }

  skip(length: number, what: string): void {
    this.seek(this.#offset + length, what);
  }

  readU8(what: string): number {
    const at = this.#take(1, what);
    return this.#view.getUint8(at);
  }

  readU16BE(what: string): number {
    const at = this.#take(2, what);
    return this.#view.getUint16(at);
  }

  readU32BE(what: string): number {
    const at = this.#take(4, what);
    return this.#view.getUint32(at);
  }

  /** @throws FslError SNAPSHOT_FORMAT when the value is 2^53 or more: no offset or length of a real file is */
  readU64BE(what: string): number {
    const fieldOffset = this.#offset;
    const at = this.#take(8, what);
    const high = this.#view.getUint32(at);
    const low = this.#view.getUint32(at + 4);
    if (high >= 0x200000) {
      const found = `0x${((BigInt(high) << 32n) | BigInt(low)).toString(16)}`;
      throw damaged(this.source, fieldOffset, what, "a number below 2^53", found);
    }
    return high * 0x100000000 + low;
  }

  /** The next byte without going on, or -1 at the end of the file. */
  peekU8(what: string): number {
    if (this.atEnd) return -1;
    const value = this.readU8(what);
    this.#offset -= 1;
    return value;
  }

  /** A copy of the next bytes. @param length 0..4096 */
  readBytes(length: number, what: string): Uint8Array {
    const at = this.#take(length, what);
    return this.#window.slice(at, at + length);
  }

  /** QEMU's counted string: u8 length, then that many bytes; no terminator. */
  readString8(what: string): string {
    return this.readString(this.readU8(`length of ${what}`), what);
  }

  /**
   * A name of `length` bytes. Names of QEMU are printable ASCII; anything else means that this is no name.
   * @param length 0..4096
   */
  readString(length: number, what: string): string {
    const textOffset = this.#offset;
    const at = this.#take(length, what);
    const { buffer, byteOffset } = this.#window;
    const text = Buffer.from(buffer, byteOffset + at, length).toString("latin1");
    const strangeIndex = text.search(NOT_PRINTABLE);
    if (strangeIndex >= 0) {
      const found = `byte ${hex(text.charCodeAt(strangeIndex))}`;
      throw damaged(this.source, textOffset + strangeIndex, what, "printable ASCII", found);
    }
    return text;
  }

  /** See `damaged`; of this reader's source. */
  damaged(
    fileOffset: number,
    what: string,
    expected: string,
    found: string | number,
    details: ErrorDetails = {},
    advice = "",
  ): FslError {
    return damaged(this.source, fileOffset, what, expected, found, details, advice);
  }

  /** See `unsupported`; of this reader's source. */
  unsupported(
    fileOffset: number,
    what: string,
    expected: string,
    found: string | number,
    details: ErrorDetails = {},
    advice = "",
  ): FslError {
    return unsupported(this.source, fileOffset, what, expected, found, details, advice);
  }

  /** The error for something that would reach past the end of the file. */
  pastEnd(
    fieldOffset: number,
    what: string,
    endOffset: number,
    details: ErrorDetails = {},
  ): FslError {
    const { name, byteLength } = this.source;
    return new FslError(
      "SNAPSHOT_FORMAT",
      `${what}: truncated or unfinished: expected a file of ${hex(endOffset)} bytes or more, ` +
        `found ${hex(byteLength)} (${name} at ${hex(fieldOffset)}); ${AGAIN}`,
      { path: name, fileOffset: fieldOffset, expected: byteLength, found: endOffset, ...details },
    );
  }

  /** Makes sure that the next `length` bytes are in the window, goes past them, returns their place in the window. */
  #take(length: number, what: string): number {
    assert(length >= 0 && length <= FIELD_LENGTH_MAX, `field length ${length}`);
    const startOffset = this.#offset;
    const endOffset = startOffset + length;
    if (endOffset > this.source.byteLength) throw this.pastEnd(startOffset, what, endOffset);
    const windowEnd = this.#windowOffset + this.#window.length;
    if (startOffset < this.#windowOffset || endOffset > windowEnd)
      this.#fill(startOffset, windowEnd);
    this.#offset = endOffset;
    return startOffset - this.#windowOffset;
  }

  #fill(startOffset: number, windowEnd: number): void {
    const isSequential =
      startOffset <= windowEnd && startOffset >= this.#windowOffset && windowEnd > 0;
    const wantedLength = isSequential ? SEQUENTIAL_WINDOW_LENGTH : JUMP_WINDOW_LENGTH;
    const length = Math.min(wantedLength, this.source.byteLength - startOffset);
    this.#window = this.source.read(startOffset, length);
    this.#view = new DataView(
      this.#window.buffer,
      this.#window.byteOffset,
      this.#window.byteLength,
    );
    this.#windowOffset = startOffset;
  }
}
