/**
 * The run state that the guest was saved in: body of the device section `globalstate`, which decides whether a guest
 * runs after an ordinary load. @source QEMU migration/global_state.c vmstate_globalstate
 *
 *   0   be32  size: length of the name with its NUL
 *   4   32    name of a RunState, e.g. `running` (live save) or `paused` (saved after `stop`), NUL-padded
 *   36  68    flags and reserve; in older releases all 100 bytes are the name's
 */
import { ByteReader, type ByteSource } from "./byte-reader.ts";

/** Run state that the guest was saved in, and where it stands in the file. */
export interface GlobalState {
  /** QEMU's RunState, e.g. `running` or `paused`. */
  readonly runState: string;
  /** File offset in bytes of the size field. */
  readonly sizeOffset: number;
  /** File offset in bytes of the name. */
  readonly nameOffset: number;
  /** Bytes reserved for the name. */
  readonly nameLength: number;
}

const NAME_LENGTH = 32;
const BODY_LENGTH = 104;
/** u8 type FULL, be32 id, u8 name length, name, be32 instance, be32 version. */
const SECTION_NAME = "globalstate";
const HEADER_LENGTH = 1 + 4 + 1 + SECTION_NAME.length + 4 + 4;
/** Footer and EOF. */
const TRAILER_LENGTH = 5 + 1;

/**
 * @param bodyLength bytes of the section's body
 * @returns null when the body is too short to be the one that is known
 * @throws FslError SNAPSHOT_FORMAT when the size makes no sense
 */
export function readGlobalState(
  source: ByteSource,
  bodyOffset: number,
  bodyLength: number,
): GlobalState | null {
  if (bodyLength < 4 + NAME_LENGTH) return null;
  const reader = new ByteReader(source, bodyOffset);
  const size = reader.readU32BE("globalstate");
  const nameOffset = reader.offset;
  if (size < 2 || size > NAME_LENGTH) {
    const expected = `a run state of 1 to ${NAME_LENGTH - 1} bytes`;
    throw reader.damaged(bodyOffset, "globalstate", expected, size - 1);
  }
  const runState = reader.readString(size - 1, "run state");
  return { runState, sizeOffset: bodyOffset, nameOffset, nameLength: NAME_LENGTH };
}

/** Bytes for `sizeOffset` that make it another run state, e.g. `running`. */
export function encodeRunState({ nameLength }: GlobalState, runState: string): Uint8Array {
  const bytes = Buffer.alloc(4 + nameLength);
  bytes.writeUInt32BE(runState.length + 1);
  bytes.write(runState, 4, "latin1");
  return bytes;
}

/**
 * Looks for the section where QEMU writes it: last, right before EOF at the end of the file. For files without a
 * description, whose sections cannot be told apart.
 * @param startOffset file offset before which no section can begin
 * @returns null when another device is the last (one that was plugged in later)
 */
export function findLastGlobalState(source: ByteSource, startOffset: number): GlobalState | null {
  const bodyOffset = source.byteLength - TRAILER_LENGTH - BODY_LENGTH;
  const fileOffset = bodyOffset - HEADER_LENGTH;
  if (fileOffset < startOffset) return null;
  const header = Buffer.from(source.read(fileOffset, HEADER_LENGTH));
  const name = header.toString("latin1", 6, 6 + SECTION_NAME.length);
  if (header[0] !== 0x04 || header[5] !== SECTION_NAME.length || name !== SECTION_NAME) return null;
  return readGlobalState(source, bodyOffset, BODY_LENGTH);
}
