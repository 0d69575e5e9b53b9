/**
 * The tail of a migration stream: EOF byte and JSON description of the device state. Two uses: it is the only sign
 * that the saver reached the end (bitmaps are written last, so an unfinished file looks like one full of zero pages),
 * and the only source of the lengths of device sections, which have no length field.
 *
 *   offset  size  field                               QEMU migration/savevm.c
 *   0       u8    0x00  EOF                           QEMU_VM_EOF
 *   1       u8    0x06  VMDESCRIPTION                 QEMU_VM_VMDESCRIPTION, off with suppress-vmdesc=on
 *   2       be32  length L
 *   6       L     UTF-8 JSON, the last byte of the file
 */
import { FslError } from "../errors.ts";
import { hex } from "../pages.ts";
import { damaged, type ByteSource } from "./byte-reader.ts";

/** Length of one device's section body, from the JSON. */
export interface DeviceDescription {
  readonly name: string;
  readonly instanceId: number;
  /** Null for a handler of the old style, whose description has none. */
  readonly version: number | null;
  /** Bytes between section header and footer. */
  readonly bodyLength: number;
}

export interface Vmdescription {
  /** File offset in bytes of the EOF byte. */
  readonly eofOffset: number;
  /** File offset in bytes of the JSON text. */
  readonly jsonOffset: number;
  /** Bytes of the JSON text. */
  readonly jsonLength: number;
  /** FULL sections in stream order, early ones included. */
  readonly devices: readonly DeviceDescription[];
}

/** Bytes before the JSON: EOF, type, length. */
const PREFIX_LENGTH = 6;
/** 150 times the largest seen (103 KB); the length's first byte is 0, which the search relies on. */
const JSON_LENGTH_MAX = 16 * 1024 * 1024 - 1;
/** Bytes of the tail that are read first; holds the JSON of an ordinary guest. */
const FIRST_WINDOW_LENGTH = 256 * 1024;
/** Subsections of subsections; QEMU nests two or three deep. */
const SUBSECTION_DEPTH_MAX = 32;
/** Deepest nesting of the JSON itself; real ones reach about 20. */
const JSON_DEPTH_MAX = 512;
/** Texts up to this size, which real ones have, cannot nest deep enough to hurt. */
const JSON_LENGTH_HARMLESS = 1024 * 1024;
/** Guests have dozens of devices; each pc-dimm, each virtio queue set is one. */
const DEVICE_COUNT_MAX = 65536;

/**
 * Finds and reads the description at the end of the file. JSON text holds no NUL, so the last NUL of the file lies in
 * the four bytes of the length field, whose first byte is 0 for every length below 16 MiB: four places to look at.
 * @param startOffset file offset before which no description can begin
 * @returns null when the file does not end with one
 * @throws FslError SNAPSHOT_FORMAT when there is one that makes no sense
 */
export function findVmdescription(source: ByteSource, startOffset: number): Vmdescription | null {
  const place = findJson(source, startOffset);
  if (place === null) return null;
  const { jsonOffset, jsonLength, text } = place;
  const devices = describeDevices(source, jsonOffset, text);
  return { eofOffset: jsonOffset - PREFIX_LENGTH, jsonOffset, jsonLength, devices };
}

interface JsonPlace {
  readonly jsonOffset: number;
  readonly jsonLength: number;
  readonly text: Uint8Array;
}

function findJson(source: ByteSource, startOffset: number): JsonPlace | null {
  const { byteLength } = source;
  const longestTail = Math.min(JSON_LENGTH_MAX + PREFIX_LENGTH, byteLength - startOffset);
  for (let windowLength = FIRST_WINDOW_LENGTH; ; windowLength *= 8) {
    const tailLength = Math.min(windowLength, longestTail);
    if (tailLength < PREFIX_LENGTH) return null;
    const tail = source.read(byteLength - tailLength, tailLength);
    const lastNul = tail.lastIndexOf(0);
    // The prefix may begin up to five bytes before the last NUL; a window that starts in between is too short.
    if (lastNul >= PREFIX_LENGTH) return matchPrefix(tail, lastNul, byteLength - tailLength);
    if (tailLength === longestTail) return matchPrefix(tail, lastNul, byteLength - tailLength);
  }
}

function matchPrefix(tail: Uint8Array, lastNul: number, tailOffset: number): JsonPlace | null {
  const view = new DataView(tail.buffer, tail.byteOffset, tail.byteLength);
  // lastNul is byte 2, 3, 4 or 5 of the prefix.
  for (let prefix = lastNul - 5; prefix <= lastNul - 2; prefix++) {
    if (prefix < 0 || prefix + PREFIX_LENGTH > tail.length) continue;
    const jsonStart = prefix + PREFIX_LENGTH;
    const isPrefix = tail[prefix] === 0x00 && tail[prefix + 1] === 0x06;
    if (
      !isPrefix ||
      view.getUint32(prefix + 2) !== tail.length - jsonStart ||
      tail[jsonStart] !== 0x7b
    )
      continue;
    return {
      jsonOffset: tailOffset + jsonStart,
      jsonLength: tail.length - jsonStart,
      text: tail.subarray(jsonStart),
    };
  }
  return null;
}

function describeDevices(
  source: ByteSource,
  jsonOffset: number,
  text: Uint8Array,
): DeviceDescription[] {
  const bad = (where: string, expected: string, found: string): FslError =>
    damaged(source, jsonOffset, `vmdescription: ${where}`, expected, found);

  const root = parseJson(source, jsonOffset, text);
  const entries = isObject(root) ? root["devices"] : undefined;
  if (!Array.isArray(entries)) throw bad("devices", "an array", typeof entries);
  if (entries.length > DEVICE_COUNT_MAX) {
    throw bad("devices", `at most ${DEVICE_COUNT_MAX}`, String(entries.length));
  }
  return entries.map((entry: unknown, index) => {
    if (!isObject(entry)) throw bad(`device ${index}`, "an object", typeof entry);
    const { name } = entry;
    if (typeof name !== "string") throw bad(`device ${index}`, "a name", typeof name);
    const instanceId = entry["instance_id"];
    if (!isCount(instanceId)) throw bad(`device ${name}`, "an instance_id", String(instanceId));
    const version = entry["version"];
    const bodyLength = bodyLengthOf(entry, 0);
    if (bodyLength === null || bodyLength > source.byteLength) {
      throw bad(
        `device ${name}`,
        "sizes that add up",
        bodyLength === null ? "a field without" : String(bodyLength),
      );
    }
    return { name, instanceId, version: isCount(version) ? version : null, bodyLength };
  });
}

function parseJson(source: ByteSource, jsonOffset: number, text: Uint8Array): unknown {
  // The engine's parser takes seconds and a GiB for millions of open brackets.
  if (text.length > JSON_LENGTH_HARMLESS && nestsDeeper(text, JSON_DEPTH_MAX)) {
    throw damaged(
      source,
      jsonOffset,
      "vmdescription",
      `nesting of at most ${JSON_DEPTH_MAX}`,
      "more",
    );
  }
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(text));
  } catch (cause) {
    // A SyntaxError, bad UTF-8, or the engine's own limit on nesting.
    const reason = cause instanceof Error ? cause.message : String(cause);
    const message = `vmdescription: not JSON: ${reason} (${source.name} at ${hex(jsonOffset)})`;
    throw new FslError(
      "SNAPSHOT_FORMAT",
      message,
      { path: source.name, fileOffset: jsonOffset, reason },
      cause,
    );
  }
}

function nestsDeeper(text: Uint8Array, depthMax: number): boolean {
  let depth = 0;
  let isInString = false;
  for (let index = 0; index < text.length; index++) {
    const byte = text[index];
    if (byte === 0x22 /* " */) isInString = !isInString;
    else if (byte === 0x5c /* \ */) index += 1;
    else if (isInString) continue;
    else if (byte === 0x5b || byte === 0x7b /* [ { */) depth += 1;
    else if (byte === 0x5d || byte === 0x7d /* ] } */) depth -= 1;
    if (depth > depthMax) return true;
  }
  return false;
}

/**
 * Bytes that a described state takes in the stream: fields are `size` times `array_len`, a subsection adds its header
 * (u8 0x05, counted name, be32 version). The size of a struct includes what is nested in it.
 * @returns null when a size is missing or is no count
 * @source QEMU migration/vmstate.c vmstate_save_state_v, vmsd_desc_field_end
 */
function bodyLengthOf(state: Record<string, unknown>, depth: number): number | null {
  if (depth > SUBSECTION_DEPTH_MAX) return null;
  const { fields, subsections, size } = state;
  // Old-style handlers have no vmsd: `size` beside one field `data` of the same size, or `size` alone.
  if (fields === undefined && subsections === undefined) return isCount(size) ? size : null;
  let total = 0;
  for (const field of asArray(fields)) {
    if (!isObject(field) || !isCount(field["size"])) return null;
    const count = field["array_len"] ?? 1;
    if (!isCount(count)) return null;
    total += field["size"] * count;
  }
  for (const subsection of asArray(subsections)) {
    if (!isObject(subsection) || typeof subsection["vmsd_name"] !== "string") return null;
    const nestedLength = bodyLengthOf(subsection, depth + 1);
    if (nestedLength === null) return null;
    total += 1 + 1 + subsection["vmsd_name"].length + 4 + nestedLength;
  }
  return Number.isSafeInteger(total) ? total : null;
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function asArray(value: unknown): readonly unknown[] {
  return Array.isArray(value) ? value : [];
}

function isCount(value: unknown): value is number {
  return typeof value === "number" && Number.isSafeInteger(value) && value >= 0;
}
