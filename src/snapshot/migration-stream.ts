/**
 * Walks a QEMU migration stream in a file from its magic to the end of the file: configuration, RAM section, and every
 * device section with its footer. Reads metadata only: a few KiB per block and per section. Symbols: migration/savevm.c.
 *
 *   header         be32 0x5145564d "QEVM", be32 version 3                       qemu_savevm_state_header
 *   CONFIGURATION  u8 0x07, be32 length, machine type, subsections              vmstate_configuration
 *     subsection   u8 0x05, u8+n name, be32 version 1, body; no terminator, no footer
 *   sections       u8 type, be32 section_id, ...                                save_section_header
 *     0x01 START, 0x04 FULL    u8+n name, be32 instance_id, be32 version_id, body, footer
 *     0x02 PART, 0x03 END      body, footer
 *     0x08 COMMAND             be16 command, be16 length, payload; neither section_id nor footer
 *     0x7e footer              be32 section_id, the same again                  check_section_footer
 *   0x00 EOF, then the JSON description (vmdescription.ts)
 *
 * Bodies: RAM START is mapped-ram.ts; RAM PART and END are one EOS word; FULL bodies have no length in the stream, the
 * description tells it.
 */
import { assert, type FslError } from "../errors.ts";
import { hex } from "../pages.ts";
import { ByteReader, damaged, unsupported, type ByteSource } from "./byte-reader.ts";
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

/** Run state that the guest was saved in, and where it stands in the file. */
export interface GlobalState {
  /** QEMU's RunState, e.g. `running` (live save) or `paused` (saved after `stop`). */
  readonly runState: string;
  /** File offset in bytes of be32 "length of the name with its NUL". */
  readonly sizeOffset: number;
  /** File offset in bytes of the name, NUL-padded. */
  readonly nameOffset: number;
  /** Bytes reserved for the name. */
  readonly nameLength: number;
}

export interface MigrationStream {
  /** Versioned machine type, e.g. `pc-q35-10.0`. */
  readonly machineType: string;
  /** Capabilities that the saver recorded; `mapped-ram` always, perhaps `x-ignore-shared`. */
  readonly capabilities: readonly string[];
  /** Canonical text of the guest's UUID; null when not recorded (needs capability validate-uuid). */
  readonly uuid: string | null;
  /** log2 of the target page size; null when not recorded (x86 never does). */
  readonly targetPageBits: number | null;
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

const QEMU_VM_FILE_MAGIC = 0x5145564d;
const QEMU_VM_FILE_VERSION = 3;
const QEMU_VM_EOF = 0x00;
const QEMU_VM_SECTION_START = 0x01;
const QEMU_VM_SECTION_PART = 0x02;
const QEMU_VM_SECTION_END = 0x03;
const QEMU_VM_SECTION_FULL = 0x04;
const QEMU_VM_SUBSECTION = 0x05;
const QEMU_VM_CONFIGURATION = 0x07;
const QEMU_VM_COMMAND = 0x08;
const QEMU_VM_SECTION_FOOTER = 0x7e;
/** Followed by a blob outside its payload; belongs to postcopy, never to a file. @source savevm.c MIG_CMD_PACKAGED */
const MIG_CMD_PACKAGED = 7;

/** @source migration/ram.c ram_save_setup: register_savevm_live("ram", 0, 4, ...) */
const RAM_SECTION_VERSION = 4;
const FOOTER_LENGTH = 5;

/** Machine type names are 8 to 40 bytes; QEMU itself has no limit. */
const MACHINE_TYPE_LENGTH_MAX = 255;
/** QEMU 11 knows about 25 capabilities, and records two of them. */
const CAPABILITY_COUNT_MAX = 256;
/** One PART per 50 ms of a live save: 14 hours of it. */
const PART_COUNT_MAX = 1_000_000;
/** One is written. */
const COMMAND_COUNT_MAX = 1024;
/** uint32 size, then 32 bytes of name; older releases reserve 100. @source migration/global_state.c */
const GLOBAL_STATE_NAME_LENGTH = 32;
const GLOBAL_STATE_BODY_LENGTH = 104;

/**
 * Reads the stream that begins at `streamOffset` and ends with the file.
 * @param streamOffset file offset in bytes of the magic
 * @throws FslError SNAPSHOT_FORMAT, SNAPSHOT_UNSUPPORTED, with `details.fileOffset`
 */
export function readMigrationStream(source: ByteSource, streamOffset: number): MigrationStream {
  const reader = new ByteReader(source, streamOffset);
  readHeader(reader);
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

function readHeader(reader: ByteReader): void {
  const { source } = reader;
  const magicOffset = reader.offset;
  if (source.byteLength - magicOffset < 8)
    throw notAStream(source, magicOffset, "the end of the file");
  const magic = reader.readU32BE("magic");
  if (magic !== QEMU_VM_FILE_MAGIC) throw notAStream(source, magicOffset, hex(magic));
  const version = reader.readU32BE("stream version");
  if (version !== QEMU_VM_FILE_VERSION) {
    throw unsupported(source, magicOffset + 4, "stream version", "3", version);
  }
}

function notAStream(source: ByteSource, magicOffset: number, found: string): Error {
  return damaged(
    source,
    magicOffset,
    "not a QEMU migration stream",
    "magic 0x5145564d (QEVM)",
    found,
  );
}

interface Configuration {
  readonly machineType: string;
  readonly capabilities: readonly string[];
  readonly uuid: string | null;
  readonly targetPageBits: number | null;
}

function readConfiguration(reader: ByteReader): Configuration {
  const { source } = reader;
  const startOffset = reader.offset;
  const type = reader.readU8("CONFIGURATION section");
  if (type !== QEMU_VM_CONFIGURATION) {
    // Without it neither the machine type nor mapped-ram itself can be seen, and QEMU would have to be told as well.
    const isSection = type === QEMU_VM_SECTION_START || type === QEMU_VM_SECTION_FULL;
    const found = isSection ? "a stream saved with send-configuration=off" : `byte ${hex(type)}`;
    throw (isSection ? unsupported : damaged)(
      source,
      startOffset,
      "CONFIGURATION section",
      "byte 0x7",
      found,
    );
  }
  const lengthOffset = reader.offset;
  const nameLength = reader.readU32BE("length of the machine type");
  if (nameLength === 0 || nameLength > MACHINE_TYPE_LENGTH_MAX) {
    throw damaged(
      source,
      lengthOffset,
      "machine type",
      `1 to ${MACHINE_TYPE_LENGTH_MAX} bytes`,
      nameLength,
    );
  }
  const machineType = reader.readString(nameLength, "machine type");

  let targetPageBits: number | null = null;
  let capabilities: readonly string[] = [];
  let uuid: string | null = null;
  const seen = new Set<string>();
  // No section begins with 0x05, so the first other byte ends the configuration.
  while (reader.peekU8("section type") === QEMU_VM_SUBSECTION) {
    const subsectionOffset = reader.offset;
    const name = readSubsectionHeader(reader);
    if (seen.has(name))
      throw damaged(source, subsectionOffset, "configuration", "each subsection once", name);
    seen.add(name);
    if (name === "configuration/target-page-bits") targetPageBits = readTargetPageBits(reader);
    else if (name === "configuration/capabilities") capabilities = readCapabilities(reader);
    else if (name === "configuration/uuid") uuid = formatUuid(reader.readBytes(16, "uuid"));
    else
      throw unsupported(
        source,
        subsectionOffset,
        "configuration",
        "a subsection that fsl knows",
        name,
      );
  }
  if (!capabilities.includes("mapped-ram")) {
    const found = capabilities.length === 0 ? "none" : capabilities.join(", ");
    throw unsupported(
      source,
      startOffset,
      "snapshot without mapped-ram",
      "capability mapped-ram",
      found,
    );
  }
  return { machineType, capabilities, uuid, targetPageBits };
}

function readSubsectionHeader(reader: ByteReader): string {
  reader.readU8("subsection");
  const name = reader.readString8("subsection name");
  const versionOffset = reader.offset;
  const version = reader.readU32BE(`version of ${name}`);
  if (version !== 1) throw unsupported(reader.source, versionOffset, name, "version 1", version);
  return name;
}

function readTargetPageBits(reader: ByteReader): number {
  const fieldOffset = reader.offset;
  const bits = reader.readU32BE("target page bits");
  if (bits < 12 || bits > 16) {
    throw unsupported(reader.source, fieldOffset, "target page bits", "12 to 16", bits);
  }
  return bits;
}

function readCapabilities(reader: ByteReader): string[] {
  const countOffset = reader.offset;
  const count = reader.readU32BE("capability count");
  if (count > CAPABILITY_COUNT_MAX) {
    throw damaged(
      reader.source,
      countOffset,
      "capabilities",
      `at most ${CAPABILITY_COUNT_MAX}`,
      count,
    );
  }
  const names: string[] = [];
  for (let index = 0; index < count; index++) names.push(reader.readString8("capability name"));
  return names;
}

function formatUuid(bytes: Uint8Array): string {
  const digits = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  const groups = [
    digits.slice(0, 8),
    digits.slice(8, 12),
    digits.slice(12, 16),
    digits.slice(16, 20),
    digits.slice(20),
  ];
  return groups.join("-");
}

/** The sections from behind the configuration to the end of the file; results are its public fields. */
class SectionWalk {
  readonly blocks: RAMBlock[] = [];
  readonly sections: StreamSection[] = [];
  ramStart: StreamSection | null = null;
  ramEnd: StreamSection | null = null;
  vmdescription: Vmdescription | null = null;
  globalState: GlobalState | null = null;

  readonly #reader: ByteReader;
  readonly #source: ByteSource;
  readonly #configuration: Configuration;
  #tailWasSought = false;
  #deviceCount = 0;
  #partCount = 0;
  #commandCount = 0;

  constructor(reader: ByteReader, configuration: Configuration) {
    this.#reader = reader;
    this.#source = reader.source;
    this.#configuration = configuration;
  }

  /** Every turn consumes at least one byte and is counted against a limit. */
  run(): void {
    for (;;) {
      const fileOffset = this.#reader.offset;
      if (this.ramEnd !== null && this.#describe(fileOffset) === null)
        return this.#acceptUndescribed(fileOffset);
      const type = this.#reader.readU8("section type");
      if (type === QEMU_VM_EOF) return this.#finish(fileOffset);
      if (type === QEMU_VM_SECTION_START) this.#ramStart(fileOffset);
      else if (type === QEMU_VM_SECTION_PART) this.#ramPart(fileOffset);
      else if (type === QEMU_VM_SECTION_END) this.#ramEnd(fileOffset);
      else if (type === QEMU_VM_SECTION_FULL) this.#full(fileOffset);
      else if (type === QEMU_VM_COMMAND) this.#command(fileOffset);
      else
        throw damaged(this.#source, fileOffset, "section", "a section type", `byte ${hex(type)}`);
    }
  }

  #ramStart(fileOffset: number): void {
    const { name, ...header } = this.#readSectionHeader();
    // Other iterable sections (dirty-bitmap, VFIO) have bodies that only their devices can delimit.
    if (name !== "ram") throw unsupported(this.#source, fileOffset, "START section", "ram", name);
    if (this.ramStart !== null)
      throw damaged(this.#source, fileOffset, "RAM section", "one", "a second START");
    if (header.instanceId !== 0 || header.version !== RAM_SECTION_VERSION) {
      const found = `instance ${header.instanceId} version ${header.version}`;
      throw unsupported(this.#source, fileOffset, "RAM section", "instance 0 version 4", found);
    }
    const { capabilities, targetPageBits } = this.#configuration;
    const bodyOffset = this.#reader.offset;
    const blocks = readRamStartBody(this.#reader, {
      ignoreShared: capabilities.includes("x-ignore-shared"),
      targetPageSize: targetPageBits === null ? null : 2 ** targetPageBits,
    });
    this.blocks.push(...blocks);
    this.ramStart = this.#close({ kind: "start", fileOffset, bodyOffset, name, ...header });
  }

  #ramPart(fileOffset: number): void {
    this.#partCount += 1;
    if (this.#partCount > PART_COUNT_MAX) {
      throw unsupported(
        this.#source,
        fileOffset,
        "RAM PART sections",
        `at most ${PART_COUNT_MAX}`,
        "more",
      );
    }
    const section = this.#ramEosSection("part", fileOffset);
    const before = this.sections.at(-2);
    if (before?.kind !== "part") return;
    this.sections.length -= 2;
    this.sections.push({
      ...before,
      length: before.length + section.length,
      count: before.count + 1,
    });
  }

  #ramEnd(fileOffset: number): void {
    this.ramEnd = this.#ramEosSection("end", fileOffset);
  }

  /** RAM PART or END: the section id of RAM, and a body of one EOS word. */
  #ramEosSection(kind: "part" | "end", fileOffset: number): StreamSection {
    const id = this.#reader.readU32BE("section id");
    if (this.ramStart === null || id !== this.ramStart.id || this.ramEnd !== null) {
      const expected =
        this.ramEnd !== null ? "nothing of RAM behind its END" : "the id of a RAM START section";
      throw damaged(
        this.#source,
        fileOffset,
        `${kind.toUpperCase()} section`,
        expected,
        `id ${id}`,
      );
    }
    const bodyOffset = this.#reader.offset;
    const word = this.#reader.readU64BE("RAM word");
    if (word !== RAM_FLAG_EOS) {
      throw damaged(
        this.#source,
        bodyOffset,
        `RAM ${kind.toUpperCase()} section`,
        "word 0x10 (EOS)",
        hex(word),
      );
    }
    return this.#close({
      kind,
      fileOffset,
      bodyOffset,
      id,
      name: "ram",
      instanceId: 0,
      version: RAM_SECTION_VERSION,
    });
  }

  #full(fileOffset: number): void {
    const vmdescription = this.#describe(fileOffset);
    if (vmdescription === null) {
      const expected =
        "the RAM END section (is it a background-snapshot, or an early device without vmdescription?)";
      throw unsupported(this.#source, fileOffset, "device section", expected, "a FULL section");
    }
    const { name, ...header } = this.#readSectionHeader();
    const device = vmdescription.devices[this.#deviceCount];
    this.#checkDevice(fileOffset, name, header, device);
    this.#deviceCount += 1;
    const bodyOffset = this.#reader.offset;
    this.#reader.skip(device?.bodyLength ?? 0, `device ${name}`);
    const section = this.#close({ kind: "full", fileOffset, bodyOffset, name, ...header });
    if (name === "globalstate") this.globalState = readGlobalState(this.#source, section);
  }

  #checkDevice(
    fileOffset: number,
    name: string,
    header: { instanceId: number; version: number },
    device: DeviceDescription | undefined,
  ): void {
    const found = `${name} instance ${header.instanceId} version ${header.version}`;
    if (device === undefined)
      throw damaged(this.#source, fileOffset, "device section", "no further device", found);
    const isSame = name === device.name && header.instanceId === device.instanceId;
    // A handler of the old style has no version in the description.
    const isSameVersion = device.version === -1 || header.version === device.version;
    if (isSame && isSameVersion) return;
    const expected = `${device.name} instance ${device.instanceId} version ${device.version} as described`;
    throw damaged(this.#source, fileOffset, "device section", expected, found);
  }

  #command(fileOffset: number): void {
    this.#commandCount += 1;
    const command = this.#reader.readU16BE("command");
    const bodyLength = this.#reader.readU16BE("length of the command");
    if (command === MIG_CMD_PACKAGED || this.#commandCount > COMMAND_COUNT_MAX) {
      throw unsupported(
        this.#source,
        fileOffset,
        "COMMAND",
        "one that belongs into a file",
        command,
      );
    }
    const bodyOffset = this.#reader.offset;
    this.#reader.skip(bodyLength, `command ${command}`);
    const length = this.#reader.offset - fileOffset;
    const place = { fileOffset, length, bodyOffset, bodyLength, count: 1, command };
    this.sections.push({
      kind: "command",
      id: null,
      name: null,
      instanceId: 0,
      version: 0,
      ...place,
    });
  }

  #readSectionHeader(): { id: number; name: string; instanceId: number; version: number } {
    const id = this.#reader.readU32BE("section id");
    const name = this.#reader.readString8("section name");
    const instanceId = this.#reader.readU32BE(`instance id of ${name}`);
    const version = this.#reader.readU32BE(`version of ${name}`);
    return { id, name, instanceId, version };
  }

  /** Reads the footer and files the section. */
  #close(open: Omit<StreamSection, "length" | "bodyLength" | "count" | "command">): StreamSection {
    const footerOffset = this.#reader.offset;
    const what = `footer of section ${open.name}`;
    const mark = this.#reader.readU8(what);
    if (mark !== QEMU_VM_SECTION_FOOTER) throw this.#noFooter(footerOffset, open, mark);
    const id = this.#reader.readU32BE(what);
    if (id !== open.id) throw damaged(this.#source, footerOffset, what, `id ${open.id}`, id);
    const length = this.#reader.offset - open.fileOffset;
    const bodyLength = footerOffset - open.bodyOffset;
    const section: StreamSection = { ...open, length, bodyLength, count: 1, command: null };
    this.sections.push(section);
    return section;
  }

  /** Where the first footer is missing and a section begins instead, the saver was told to write none. */
  #noFooter(
    footerOffset: number,
    open: { kind: SectionKind; name: string | null },
    mark: number,
  ): FslError {
    const isSection = mark >= QEMU_VM_SECTION_PART && mark <= QEMU_VM_COMMAND;
    if (open.kind === "start" && isSection) {
      const what = "snapshot saved with send-section-footer=off";
      return unsupported(this.#source, footerOffset, what, "section footers", `byte ${hex(mark)}`);
    }
    const what = `footer of section ${open.name}`;
    return damaged(this.#source, footerOffset, what, "byte 0x7e", `byte ${hex(mark)}`);
  }

  /**
   * The description at the end of the file, sought once, when the first device section needs it.
   * @param fileOffset where the walk is; the description lies behind it
   */
  #describe(fileOffset: number): Vmdescription | null {
    if (!this.#tailWasSought) {
      this.#tailWasSought = true;
      this.vmdescription = findVmdescription(this.#source, fileOffset);
      if (this.vmdescription === null) this.#checkUndescribedTail(fileOffset);
    }
    return this.vmdescription;
  }

  /** EOF byte where the description says, every described device seen, and the RAM section ended. */
  #finish(eofOffset: number): void {
    const vmdescription = this.#describe(eofOffset);
    if (vmdescription === null || eofOffset !== vmdescription.eofOffset) {
      const expected =
        vmdescription === null ? "a section" : `EOF at ${hex(vmdescription.eofOffset)}`;
      throw damaged(this.#source, eofOffset, "end of the device state", expected, "EOF");
    }
    const { devices } = vmdescription;
    if (this.#deviceCount !== devices.length) {
      const found = `${this.#deviceCount} before EOF`;
      throw damaged(
        this.#source,
        eofOffset,
        "device sections",
        `${devices.length} as described`,
        found,
      );
    }
    if (this.ramStart === null)
      throw damaged(this.#source, eofOffset, "RAM section", "one", "none");
    if (this.ramEnd === null) {
      // The saver wrote device state but never the bitmaps: every page would be taken for zero.
      const expected = "a RAM END section";
      throw unsupported(
        this.#source,
        eofOffset,
        "snapshot saved with background-snapshot",
        expected,
        "none",
      );
    }
  }

  /**
   * Without a description the file must at least end as one does: footer of the last section, EOF. Anything else is a
   * file whose saver did not reach the end.
   */
  #checkUndescribedTail(fileOffset: number): void {
    const { byteLength } = this.#source;
    const tailOffset = byteLength - FOOTER_LENGTH - 1;
    // Right behind RAM END an EOF alone is left when there are no devices at all.
    if (tailOffset >= fileOffset || byteLength - 1 === fileOffset) {
      const tail = this.#source.read(tailOffset, FOOTER_LENGTH + 1);
      if (tail[0] === QEMU_VM_SECTION_FOOTER && tail[FOOTER_LENGTH] === QEMU_VM_EOF) return;
    }
    const expected = "the vmdescription, or a section footer and EOF, at its end";
    throw damaged(
      this.#source,
      byteLength,
      "unfinished or truncated snapshot",
      expected,
      "neither",
    );
  }

  /** suppress-vmdesc=on: device sections cannot be told apart; QEMU writes `globalstate` last, so look for it there. */
  #acceptUndescribed(deviceStateOffset: number): void {
    const { byteLength } = this.#source;
    const headerLength = 1 + 4 + 1 + "globalstate".length + 4 + 4;
    const fileOffset = byteLength - 1 - FOOTER_LENGTH - GLOBAL_STATE_BODY_LENGTH - headerLength;
    if (fileOffset < deviceStateOffset) return;
    const header = this.#source.read(fileOffset, headerLength);
    const name = Buffer.from(header).toString("latin1", 6, 6 + "globalstate".length);
    if (header[0] !== QEMU_VM_SECTION_FULL || name !== "globalstate") return;
    const bodyOffset = fileOffset + headerLength;
    this.globalState = readGlobalState(this.#source, {
      bodyOffset,
      bodyLength: GLOBAL_STATE_BODY_LENGTH,
    });
  }
}

/** @source QEMU migration/global_state.c vmstate_globalstate */
function readGlobalState(
  source: ByteSource,
  { bodyOffset, bodyLength }: Pick<StreamSection, "bodyOffset" | "bodyLength">,
): GlobalState {
  if (bodyLength !== GLOBAL_STATE_BODY_LENGTH) {
    throw unsupported(
      source,
      bodyOffset,
      "globalstate",
      `${GLOBAL_STATE_BODY_LENGTH} bytes`,
      bodyLength,
    );
  }
  const reader = new ByteReader(source, bodyOffset);
  const size = reader.readU32BE("globalstate");
  const nameOffset = reader.offset;
  if (size < 2 || size > GLOBAL_STATE_NAME_LENGTH) {
    throw damaged(source, bodyOffset, "globalstate", "a run state of 1 to 31 bytes", size - 1);
  }
  const runState = reader.readString(size - 1, "run state");
  return { runState, sizeOffset: bodyOffset, nameOffset, nameLength: GLOBAL_STATE_NAME_LENGTH };
}
