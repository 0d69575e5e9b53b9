/**
 * Start of a migration stream: header and CONFIGURATION section. Big-endian. Symbols: QEMU migration/savevm.c.
 *
 *   0  be32  0x5145564d "QEVM"             QEMU_VM_FILE_MAGIC
 *   4  be32  version 3                     QEMU_VM_FILE_VERSION; 2 is obsolete
 *   8  u8    0x07 CONFIGURATION            QEMU_VM_CONFIGURATION; absent with send-configuration=off
 *   9  be32  length L
 *  13  L     versioned machine type        no terminator
 *  ..        subsections                   vmstate_configuration; only those that apply
 *
 *   subsection   u8 0x05, u8+n name, be32 version 1, body; neither terminator nor footer
 *     configuration/target-page-bits   be32 bits                       never on x86
 *     configuration/capabilities       be32 count, count times u8+n    those that are on, of the two that are recorded
 *     configuration/uuid               16 bytes                        with -uuid and capability validate-uuid
 */
import { hex } from "../pages.ts";
import type { ByteReader } from "./byte-reader.ts";

export interface Configuration {
  /** Versioned machine type, e.g. `pc-q35-10.0`. */
  readonly machineType: string;
  /** Capabilities that the saver recorded; `mapped-ram` always, perhaps `x-ignore-shared`. */
  readonly capabilities: readonly string[];
  /** Canonical text of the guest's UUID; null when not recorded. */
  readonly uuid: string | null;
  /** log2 of the target page size; null when not recorded. */
  readonly targetPageBits: number | null;
}

const QEMU_VM_FILE_MAGIC = 0x5145564d;
const QEMU_VM_FILE_VERSION = 3;
const QEMU_VM_SECTION_START = 0x01;
const QEMU_VM_SECTION_FULL = 0x04;
const QEMU_VM_SUBSECTION = 0x05;
const QEMU_VM_CONFIGURATION = 0x07;

/** Machine type names are 8 to 40 bytes; QEMU itself has no limit. */
const MACHINE_TYPE_LENGTH_MAX = 255;
/** QEMU 11 knows about 25 capabilities, and records two of them. */
const CAPABILITY_COUNT_MAX = 256;
/** 4 KiB to 64 KiB: what QEMU's targets have. */
const PAGE_BITS_MIN = 12;
const PAGE_BITS_MAX = 16;

/**
 * Reads magic, version and configuration, and leaves the reader at the first section.
 * @throws FslError SNAPSHOT_FORMAT, SNAPSHOT_UNSUPPORTED
 */
export function readConfiguration(reader: ByteReader): Configuration {
  readHeader(reader);
  const startOffset = reader.offset;
  readSectionType(reader);
  const machineType = readMachineType(reader);

  let targetPageBits: number | null = null;
  let capabilities: readonly string[] = [];
  let uuid: string | null = null;
  const seen = new Set<string>();
  // No section begins with 0x05, so the first other byte ends the configuration.
  while (reader.peekU8("section type") === QEMU_VM_SUBSECTION) {
    const at = reader.offset;
    const name = readSubsectionHeader(reader);
    if (seen.has(name)) throw reader.damaged(at, "configuration", "each subsection once", name);
    seen.add(name);
    if (name === "configuration/target-page-bits") targetPageBits = readTargetPageBits(reader);
    else if (name === "configuration/capabilities") capabilities = readCapabilities(reader);
    else if (name === "configuration/uuid") uuid = formatUuid(reader.readBytes(16, "uuid"));
    else throw reader.unsupported(at, "configuration", "a subsection that fsl knows", name);
  }
  if (!capabilities.includes("mapped-ram")) {
    const what = "snapshot saved without mapped-ram";
    const found = capabilities.length === 0 ? "none" : capabilities.join(", ");
    const advice = "save it with 'fsl save', or with the capability mapped-ram on";
    throw reader.unsupported(startOffset, what, "capability mapped-ram", found, {}, advice);
  }
  return { machineType, capabilities, uuid, targetPageBits };
}

function readHeader(reader: ByteReader): void {
  const at = reader.offset;
  const what = "not a QEMU migration stream";
  const expected = "magic 0x5145564d (QEVM)";
  const advice = "a snapshot is a file that 'fsl save' or QEMU's own migration has written";
  // A file this short is no snapshot that was cut, but something else.
  if (reader.source.byteLength - at < 8) {
    throw reader.damaged(at, what, expected, "the file's end", {}, advice);
  }
  const magic = reader.readU32BE("magic");
  if (magic !== QEMU_VM_FILE_MAGIC) {
    throw reader.damaged(at, what, expected, `${hex(magic)}${kindOf(magic)}`, {}, advice);
  }
  const version = reader.readU32BE("stream version");
  if (version === QEMU_VM_FILE_VERSION) return;
  throw reader.unsupported(at + 4, "stream version", `${QEMU_VM_FILE_VERSION}`, version);
}

/** What is given for a snapshot by mistake: `, a qcow2 image`; empty when it is none of those. */
function kindOf(magic: number): string {
  if (magic === 0x514649fb) return ", a qcow2 image";
  if (magic === 0x7f454c46) return ", an ELF file";
  if (magic === 0x28b52ffd) return ", a zstd file";
  return magic >>> 16 === 0x1f8b ? ", a gzip file" : "";
}

function readSectionType(reader: ByteReader): void {
  const at = reader.offset;
  const type = reader.readU8("CONFIGURATION section");
  if (type === QEMU_VM_CONFIGURATION) return;
  if (type === QEMU_VM_SECTION_START || type === QEMU_VM_SECTION_FULL) {
    // Neither the machine type nor mapped-ram itself can be seen then, and QEMU would have to be told as well.
    const what = "snapshot saved with send-configuration=off";
    throw reader.unsupported(at, what, "a CONFIGURATION section", `section type ${hex(type)}`);
  }
  throw reader.damaged(at, "CONFIGURATION section", "byte 0x7", `byte ${hex(type)}`);
}

function readMachineType(reader: ByteReader): string {
  const at = reader.offset;
  const length = reader.readU32BE("length of the machine type");
  if (length === 0 || length > MACHINE_TYPE_LENGTH_MAX) {
    throw reader.damaged(at, "machine type", `1 to ${MACHINE_TYPE_LENGTH_MAX} bytes`, length);
  }
  return reader.readString(length, "machine type");
}

function readSubsectionHeader(reader: ByteReader): string {
  reader.readU8("subsection");
  const name = reader.readString8("subsection name");
  const at = reader.offset;
  const version = reader.readU32BE(`version of ${name}`);
  if (version !== 1) throw reader.unsupported(at, name, "version 1", version);
  return name;
}

function readTargetPageBits(reader: ByteReader): number {
  const at = reader.offset;
  const bits = reader.readU32BE("target page bits");
  if (bits >= PAGE_BITS_MIN && bits <= PAGE_BITS_MAX) return bits;
  throw reader.unsupported(at, "target page bits", `${PAGE_BITS_MIN} to ${PAGE_BITS_MAX}`, bits);
}

function readCapabilities(reader: ByteReader): string[] {
  const at = reader.offset;
  const count = reader.readU32BE("capability count");
  if (count > CAPABILITY_COUNT_MAX) {
    throw reader.damaged(at, "capabilities", `at most ${CAPABILITY_COUNT_MAX}`, count);
  }
  return Array.from({ length: count }, () => reader.readString8("capability name"));
}

/** `00112233-4455-6677-8899-aabbccddeeff` */
function formatUuid(bytes: Uint8Array): string {
  const digits = Buffer.from(bytes).toString("hex");
  return digits.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}
