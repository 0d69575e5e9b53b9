/**
 * Walks a QEMU migration stream in a file from its magic to the end of the file: configuration, RAM section, and
 * every device section with its footer. Reads metadata only, a few KiB per block and per section.
 * Symbols: migration/savevm.c.
 *
 *   header, CONFIGURATION    configuration.ts
 *   sections                 u8 type, be32 section_id, ...                      save_section_header
 *     0x01 START, 0x04 FULL    u8+n name, be32 instance_id, be32 version_id, body, footer
 *     0x02 PART, 0x03 END      body, footer
 *     0x08 COMMAND             be16 command, be16 length, payload; neither section_id nor footer
 *     footer                   u8 0x7e, be32 section_id, the same again         check_section_footer
 *   0x00 EOF, description    vmdescription.ts
 *
 * Bodies: RAM START is mapped-ram.ts; RAM PART and END are one EOS word; FULL bodies have no length in the stream, the
 * description tells it. Order: RAM START, devices that are set up early, PARTs, one COMMAND, RAM END, devices.
 */
import { assert, type FslError } from "../errors.ts";
import { hex } from "../pages.ts";
import { AGAIN, ByteReader, type ByteSource } from "./byte-reader.ts";
import { readConfiguration, type Configuration } from "./configuration.ts";
import { findLastGlobalState, readGlobalState, type GlobalState } from "./global-state.ts";
import { RAM_FLAG_EOS, readRamStartBody, type RAMBlock } from "./mapped-ram.ts";
import { findVmdescription, type DeviceDescription, type Vmdescription } from "./vmdescription.ts";

export type SectionKind = "start" | "part" | "end" | "full" | "command";

/** One section, or a run of RAM PARTs that follow one another (they carry nothing). */
export interface StreamSection {
  readonly kind: SectionKind;
  /** QEMU's number of the section in this file; null for a command. */
  readonly id: number | null;
  /** Name of the device or subsystem; null for a command. */
  readonly name: string | null;
  readonly instanceId: number;
  readonly version: number;
  /** File offset in bytes of the type byte. */
  readonly fileOffset: number;
  /** Bytes from the type byte to the end of the footer. The RAM START section holds nearly the whole file. */
  readonly length: number;
  /** File offset in bytes of the body (payload of a command). */
  readonly bodyOffset: number;
  readonly bodyLength: number;
  /** How many sections this entry stands for: > 1 only for kind `part`. */
  readonly count: number;
  /** Number of the command (11 = SWITCHOVER_START); null for a section. */
  readonly command: number | null;
}

export interface MigrationStream extends Configuration {
  /** In file order. */
  readonly blocks: readonly RAMBlock[];
  /** In file order. Without a description they end with the RAM END section. */
  readonly sections: readonly StreamSection[];
  /** File offset in bytes behind the RAM START section: from here to the end everything is small. */
  readonly tailOffset: number;
  /** File offset in bytes of the device state: what follows the RAM END section. */
  readonly deviceStateOffset: number;
  /** Null when it was saved with suppress-vmdesc=on. */
  readonly vmdescription: Vmdescription | null;
  /**
   * True when the description was there, every section was checked against it, and the file ends with it. False only
   * with suppress-vmdesc=on: then the device state was not looked at, and damage in it shows when QEMU loads it.
   */
  readonly isVerifiedComplete: boolean;
  /** Null when the file has none where it is looked for. */
  readonly globalState: GlobalState | null;
}

const QEMU_VM_EOF = 0x00;
const QEMU_VM_SECTION_START = 0x01;
const QEMU_VM_SECTION_PART = 0x02;
const QEMU_VM_SECTION_END = 0x03;
const QEMU_VM_SECTION_FULL = 0x04;
const QEMU_VM_COMMAND = 0x08;
const QEMU_VM_SECTION_FOOTER = 0x7e;
/** Followed by a blob outside its payload; belongs to postcopy, never to a file. @source savevm.c MIG_CMD_PACKAGED */
const MIG_CMD_PACKAGED = 7;

/** @source migration/ram.c ram_mig_init: register_savevm_live("ram", 0, 4, ...) */
const RAM_SECTION_VERSION = 4;
const FOOTER_LENGTH = 5;

/** One PART per 50 ms of a live save: 14 hours of it. */
const PART_COUNT_MAX = 1_000_000;
/** One is written. */
const COMMAND_COUNT_MAX = 1024;

/**
 * Reads the stream that begins at `streamOffset` and ends with the file.
 * @param streamOffset file offset in bytes of the magic
 * @throws FslError SNAPSHOT_FORMAT, SNAPSHOT_UNSUPPORTED, with `details.fileOffset`
 */
export function readMigrationStream(source: ByteSource, streamOffset: number): MigrationStream {
  const reader = new ByteReader(source, streamOffset);
  const configuration = readConfiguration(reader);
  const walk = new SectionWalk(reader, configuration);
  walk.run();
  const { blocks, ramStart, ramEnd, vmdescription, globalState, sections } = walk;
  assert(ramStart !== null && ramEnd !== null, "the walk saw the whole RAM section");
  return {
    ...configuration,
    blocks,
    sections,
    tailOffset: ramStart.fileOffset + ramStart.length,
    deviceStateOffset: ramEnd.fileOffset + ramEnd.length,
    vmdescription,
    isVerifiedComplete: vmdescription !== null,
    globalState,
  };
}

/** What a section says of itself. */
interface SectionHeader {
  readonly id: number;
  readonly name: string;
  readonly instanceId: number;
  readonly version: number;
}

/** A section whose footer has not been read. */
interface OpenSection extends SectionHeader {
  readonly kind: SectionKind;
  readonly fileOffset: number;
  readonly bodyOffset: number;
}

/** The sections from behind the configuration to the end of the file; results are its public fields. */
class SectionWalk {
  blocks: readonly RAMBlock[] = [];
  readonly sections: StreamSection[] = [];
  ramStart: StreamSection | null = null;
  ramEnd: StreamSection | null = null;
  vmdescription: Vmdescription | null = null;
  globalState: GlobalState | null = null;

  readonly #reader: ByteReader;
  readonly #configuration: Configuration;
  #descriptionWasSought = false;
  #deviceCount = 0;
  #partCount = 0;
  #commandCount = 0;

  constructor(reader: ByteReader, configuration: Configuration) {
    this.#reader = reader;
    this.#configuration = configuration;
  }

  /** Every turn consumes at least one byte and is counted against a limit. */
  run(): void {
    const reader = this.#reader;
    for (;;) {
      const fileOffset = reader.offset;
      if (this.ramEnd !== null && this.#describe(fileOffset) === null) {
        // suppress-vmdesc=on: nothing tells the device sections apart.
        this.globalState = findLastGlobalState(reader.source, fileOffset);
        return;
      }
      const type = reader.readU8("section type");
      if (type === QEMU_VM_EOF) return this.#finish(fileOffset);
      if (type === QEMU_VM_SECTION_START) this.#readRamStart(fileOffset);
      else if (type === QEMU_VM_SECTION_PART) this.#readRamPart(fileOffset);
      else if (type === QEMU_VM_SECTION_END) this.ramEnd = this.#readRamEos("end", fileOffset);
      else if (type === QEMU_VM_SECTION_FULL) this.#readDevice(fileOffset);
      else if (type === QEMU_VM_COMMAND) this.#readCommand(fileOffset);
      else throw reader.damaged(fileOffset, "section", "a section type", `byte ${hex(type)}`);
    }
  }

  // -- sections ---------------------------------------------------------------------------------

  #readRamStart(fileOffset: number): void {
    const reader = this.#reader;
    const header = this.#readSectionHeader();
    const { name, instanceId, version } = header;
    // Other iterable sections (dirty-bitmap, VFIO) have bodies that only their devices can delimit.
    if (name !== "ram") throw reader.unsupported(fileOffset, "START section", "ram", name);
    if (this.ramStart !== null) throw reader.damaged(fileOffset, "RAM START", "one", "a second");
    if (instanceId !== 0 || version !== RAM_SECTION_VERSION) {
      const expected = `instance 0 version ${RAM_SECTION_VERSION}`;
      const found = `instance ${instanceId} version ${version}`;
      throw reader.unsupported(fileOffset, "RAM section", expected, found);
    }
    const { capabilities, targetPageBits } = this.#configuration;
    const bodyOffset = reader.offset;
    this.blocks = readRamStartBody(reader, {
      ignoreShared: capabilities.includes("x-ignore-shared"),
      targetPageSize: targetPageBits === null ? null : 2 ** targetPageBits,
    });
    this.ramStart = this.#close({ kind: "start", fileOffset, bodyOffset, ...header });
  }

  #readRamPart(fileOffset: number): void {
    this.#partCount += 1;
    if (this.#partCount > PART_COUNT_MAX) {
      const expected = `at most ${PART_COUNT_MAX}`;
      throw this.#reader.unsupported(fileOffset, "RAM PART sections", expected, "more");
    }
    const { length } = this.#readRamEos("part", fileOffset);
    const before = this.sections.at(-2);
    if (before?.kind !== "part") return;
    const merged = { ...before, length: before.length + length, count: before.count + 1 };
    this.sections.splice(-2, 2, merged);
  }

  /** RAM PART or END: the section id of RAM, and a body of one EOS word. */
  #readRamEos(kind: "part" | "end", fileOffset: number): StreamSection {
    const reader = this.#reader;
    const what = `RAM ${kind.toUpperCase()}`;
    const id = reader.readU32BE("section id");
    if (this.ramEnd !== null) throw reader.damaged(fileOffset, what, "nothing behind END", "more");
    if (id !== this.ramStart?.id) {
      const expected = `the section id of RAM START, ${this.ramStart?.id ?? "which is missing"}`;
      throw reader.damaged(fileOffset, what, expected, id);
    }
    const bodyOffset = reader.offset;
    const word = reader.readU64BE(what);
    if (word !== RAM_FLAG_EOS) throw reader.damaged(bodyOffset, what, "word 0x10 (EOS)", hex(word));
    const header = { id, name: "ram", instanceId: 0, version: RAM_SECTION_VERSION };
    return this.#close({ kind, fileOffset, bodyOffset, ...header });
  }

  #readDevice(fileOffset: number): void {
    const reader = this.#reader;
    const vmdescription = this.#describe(fileOffset);
    if (vmdescription === null) {
      const what = "snapshot saved with background-snapshot or without vmdescription";
      throw reader.unsupported(fileOffset, what, "RAM END", "a device section");
    }
    const header = this.#readSectionHeader();
    const device = vmdescription.devices[this.#deviceCount];
    this.#deviceCount += 1;
    const mismatch = device === undefined ? "no further device" : mismatchOf(header, device);
    if (device === undefined || mismatch !== null) {
      const found = `${header.name} instance ${header.instanceId} version ${header.version}`;
      throw reader.damaged(fileOffset, "device section", `${mismatch} as described`, found);
    }
    const bodyOffset = reader.offset;
    reader.skip(device.bodyLength, `device ${header.name}`);
    const section = this.#close({ kind: "full", fileOffset, bodyOffset, ...header });
    if (header.name === "globalstate") {
      this.globalState = readGlobalState(reader.source, bodyOffset, section.bodyLength);
    }
  }

  #readCommand(fileOffset: number): void {
    const reader = this.#reader;
    this.#commandCount += 1;
    const command = reader.readU16BE("command");
    const bodyLength = reader.readU16BE("length of the command");
    if (command === MIG_CMD_PACKAGED || this.#commandCount > COMMAND_COUNT_MAX) {
      throw reader.unsupported(fileOffset, "COMMAND", "one that belongs into a file", command);
    }
    const bodyOffset = reader.offset;
    reader.skip(bodyLength, `command ${command}`);
    const length = reader.offset - fileOffset;
    const none = { id: null, name: null, instanceId: 0, version: 0, count: 1 };
    const place = { fileOffset, length, bodyOffset, bodyLength };
    this.sections.push({ kind: "command", command, ...none, ...place });
  }

  #readSectionHeader(): SectionHeader {
    const id = this.#reader.readU32BE("section id");
    const name = this.#reader.readString8("section name");
    const instanceId = this.#reader.readU32BE(`instance id of ${name}`);
    const version = this.#reader.readU32BE(`version of ${name}`);
    return { id, name, instanceId, version };
  }

  /** Reads the footer and files the section. */
  #close(open: OpenSection): StreamSection {
    const reader = this.#reader;
    const footerOffset = reader.offset;
    const what = `footer of section ${open.name}`;
    const mark = reader.readU8(what);
    if (mark !== QEMU_VM_SECTION_FOOTER) throw this.#footerMissing(open, footerOffset, mark);
    const id = reader.readU32BE(what);
    if (id !== open.id) throw reader.damaged(footerOffset, what, `id ${open.id}`, id);
    const length = reader.offset - open.fileOffset;
    const bodyLength = footerOffset - open.bodyOffset;
    const section: StreamSection = { ...open, length, bodyLength, count: 1, command: null };
    this.sections.push(section);
    return section;
  }

  /** Where the first footer is missing and a section begins instead, the saver was told to write none. */
  #footerMissing({ kind, name }: OpenSection, footerOffset: number, mark: number): FslError {
    const found = `byte ${hex(mark)}`;
    if (kind === "start" && mark >= QEMU_VM_SECTION_PART && mark <= QEMU_VM_COMMAND) {
      const what = "snapshot saved with send-section-footer=off";
      return this.#reader.unsupported(footerOffset, what, "section footers", found);
    }
    return this.#reader.damaged(footerOffset, `footer of section ${name}`, "byte 0x7e", found);
  }

  // -- the end of the file ----------------------------------------------------------------------

  /**
   * The description at the end of the file, sought once, when the first device section needs it.
   * @param fileOffset where the walk is; the description lies behind it
   */
  #describe(fileOffset: number): Vmdescription | null {
    if (this.#descriptionWasSought) return this.vmdescription;
    this.#descriptionWasSought = true;
    this.vmdescription = findVmdescription(this.#reader.source, fileOffset);
    if (this.vmdescription === null) this.#checkUndescribedEnd(fileOffset);
    return this.vmdescription;
  }

  /**
   * Without a description the file must at least end as one does: footer of the last section, EOF. Anything else is a
   * file whose saver did not reach the end.
   */
  #checkUndescribedEnd(fileOffset: number): void {
    const { source } = this.#reader;
    const { byteLength } = source;
    const lastOffset = byteLength - FOOTER_LENGTH - 1;
    // Right behind RAM END an EOF alone is left when there are no devices at all.
    if (lastOffset >= fileOffset || byteLength - 1 === fileOffset) {
      const last = source.read(lastOffset, FOOTER_LENGTH + 1);
      if (last[0] === QEMU_VM_SECTION_FOOTER && last[FOOTER_LENGTH] === QEMU_VM_EOF) return;
    }
    const what = "unfinished or truncated snapshot";
    const expected = "the vmdescription, or a section footer and EOF, at its end";
    throw this.#reader.damaged(byteLength, what, expected, "neither", {}, AGAIN);
  }

  /** EOF byte where the description says, every described device seen, and the RAM section ended. */
  #finish(eofOffset: number): void {
    const reader = this.#reader;
    const vmdescription = this.#describe(eofOffset);
    if (eofOffset !== vmdescription?.eofOffset) {
      const expected =
        vmdescription === null ? "RAM END" : `EOF at ${hex(vmdescription.eofOffset)}`;
      throw reader.damaged(eofOffset, "end of the device state", expected, "EOF");
    }
    const { length } = vmdescription.devices;
    if (this.#deviceCount !== length) {
      const found = `${this.#deviceCount} before EOF`;
      throw reader.damaged(eofOffset, "device sections", `${length} as described`, found);
    }
    if (this.ramStart === null) throw reader.damaged(eofOffset, "RAM section", "one", "none");
    if (this.ramEnd === null) {
      // The saver wrote device state but never the bitmaps: every page would be taken for zero.
      const what = "snapshot saved with background-snapshot";
      throw reader.unsupported(eofOffset, what, "a RAM END section", "none");
    }
  }
}

/** What the description says, when the section's header says something else; null when they agree. */
function mismatchOf(header: SectionHeader, device: DeviceDescription): string | null {
  const isSame = header.name === device.name && header.instanceId === device.instanceId;
  if (isSame && (device.version === null || device.version === header.version)) return null;
  const version = device.version === null ? "" : ` version ${device.version}`;
  return `${device.name} instance ${device.instanceId}${version}`;
}
