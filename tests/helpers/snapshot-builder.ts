/**
 * Writes mapped-ram snapshots field by field, for tests. It shares nothing with the parser (no constants, no helpers):
 * otherwise both could be wrong together. Every field that is written gets a name, so that a test can say
 * `corrupt: { "pc.ram.version": 2 }` and an error's file offset can be held against `fields`.
 */
import { isFslError, type FslError } from "../../src/errors.ts";

export interface BuilderBlock {
  readonly idstr: string;
  /** One letter per page: D data, . zero, S zero with stale bytes in the file. */
  readonly pages: string;
  readonly guestPhysicalAddr?: number;
  /** Writes offsets 0/0 and neither bitmap nor pages (x-ignore-shared of QEMU 11). */
  readonly notSaved?: boolean;
}

export interface BuilderState {
  /** Bytes per field; a pair is [size, array_len]. */
  readonly fields: readonly (number | readonly [number, number])[];
  readonly subsections?: readonly (BuilderState & { readonly name: string })[];
}

export interface BuilderDevice {
  readonly name: string;
  readonly instanceId?: number;
  readonly version?: number;
  /** Stands between RAM START and the first PART. */
  readonly early?: boolean;
  /** Absent: four bytes in one field. */
  readonly state?: BuilderState;
  /** The description says `size` and has no fields, as old-style handlers do. */
  readonly oldStyle?: boolean;
}

export interface BuilderSpec {
  /** Offset of the stream in the file, bytes; the bytes before it are 0xaa. */
  readonly streamOffset?: number;
  readonly machineType?: string;
  readonly capabilities?: readonly string[];
  readonly targetPageBits?: number;
  readonly uuid?: readonly number[];
  readonly pageSize?: number;
  readonly blocks?: readonly BuilderBlock[];
  /** The writer of QEMU aligns pages to 1 MiB; small values keep test files small. */
  readonly pagesAlignment?: number;
  readonly parts?: number;
  readonly switchoverCommand?: boolean;
  readonly ramEnd?: boolean;
  readonly devices?: readonly BuilderDevice[];
  /** Run state in a last `globalstate` device; null = no such device. */
  readonly runState?: string | null;
  /** false = as with suppress-vmdesc=on. */
  readonly vmdescription?: boolean;
  /** Replaces the JSON text. */
  readonly json?: string;
  /** Values put over fields after building, by field name; big-endian, in the field's own size. */
  readonly corrupt?: Readonly<Record<string, number | bigint>>;
}

export interface BuiltField {
  readonly offset: number;
  readonly size: number;
}

export interface BuiltSnapshot {
  readonly bytes: Uint8Array;
  readonly fields: ReadonlyMap<string, BuiltField>;
  /** Names in file order. */
  readonly blocks: readonly BuiltBlock[];
}

export interface BuiltBlock {
  readonly idstr: string;
  readonly usedLength: number;
  readonly headerOffset: number;
  readonly bitmapOffset: number;
  readonly pagesOffset: number;
  readonly pages: string;
}

/** A small sound snapshot; `spec` replaces parts of it. */
export function buildSnapshot(spec: BuilderSpec = {}): BuiltSnapshot {
  const writer = new Writer();
  const built: BuiltBlock[] = [];
  const streamOffset = spec.streamOffset ?? 0;
  writer.fill(streamOffset, 0xaa);

  writer.be32("magic", 0x5145564d);
  writer.be32("streamVersion", 3);
  writeConfiguration(writer, spec);

  const ramId = 2;
  const devices = allDevices(spec);
  writeSectionHeader(writer, "ram.start", 0x01, ramId, "ram", 0, 4);
  writeBlocks(writer, spec, built);
  writer.be64("ram.eos", 0x10);
  writeFooter(writer, "ram.start", ramId);

  let nextId = 3;
  for (const device of devices.filter((each) => each.early === true))
    writeDevice(writer, nextId++, device);
  for (let part = 0; part < (spec.parts ?? 2); part++)
    writeRamEos(writer, `part${part}`, 0x02, ramId);
  if (spec.switchoverCommand ?? true) {
    writer.u8("command.type", 0x08);
    writer.be16("command.number", 11);
    writer.be16("command.length", 0);
  }
  if (spec.ramEnd ?? true) writeRamEos(writer, "end", 0x03, ramId);
  for (const device of devices.filter((each) => each.early !== true))
    writeDevice(writer, nextId++, device);
  writer.u8("eof", 0x00);
  if (spec.vmdescription ?? true) {
    const json = spec.json ?? describe(devices);
    writer.u8("vmdescription.type", 0x06);
    writer.be32("vmdescription.length", new TextEncoder().encode(json).length);
    writer.raw("vmdescription.json", new TextEncoder().encode(json));
  }
  const bytes = writer.finish();
  for (const [name, value] of Object.entries(spec.corrupt ?? {}))
    patch(bytes, writer.fields, name, value);
  return { bytes, fields: writer.fields, blocks: built };
}

/** Offset of a named field; the test is wrong when there is none. */
export function fieldOffset(built: BuiltSnapshot, name: string): number {
  const field = built.fields.get(name);
  if (field === undefined)
    throw new Error(`no field ${name}; there are ${[...built.fields.keys()].join(" ")}`);
  return field.offset;
}

/** What a page of the file holds: never zero, and different for neighbours and blocks. */
export function pageByte(blockIndex: number, pageIndex: number): number {
  return 1 + ((blockIndex * 37 + pageIndex * 11) % 250);
}

const DEFAULT_BLOCKS: readonly BuilderBlock[] = [
  { idstr: "pc.ram", pages: "DD..D...S..DDDDD." },
  { idstr: "pc.bios", pages: "D" },
];

const DEFAULT_DEVICES: readonly BuilderDevice[] = [
  { name: "timer" },
  { name: "0000:00:02.0/vga", instanceId: 0, version: 3, state: { fields: [1, [4, 3], 16] } },
  { name: "cpu", state: { fields: [8], subsections: [{ name: "cpu/msr", fields: [[8, 2]] }] } },
];

interface PlacedDevice extends BuilderDevice {
  /** The body is a globalstate with this run state. */
  readonly runState?: string;
}

function allDevices(spec: BuilderSpec): readonly PlacedDevice[] {
  const devices = spec.devices ?? DEFAULT_DEVICES;
  const runState = spec.runState === undefined ? "paused" : spec.runState;
  if (runState === null) return devices;
  return [
    ...devices,
    { name: "globalstate", version: 1, state: { fields: [4, 32, 1, 1, 66] }, runState },
  ];
}

function writeConfiguration(writer: Writer, spec: BuilderSpec): void {
  const machineType = spec.machineType ?? "pc-q35-10.0";
  writer.u8("configuration", 0x07);
  writer.be32("machineType.length", machineType.length);
  writer.text("machineType", machineType);
  if (spec.targetPageBits !== undefined) {
    writeSubsectionHeader(writer, "configuration/target-page-bits");
    writer.be32("targetPageBits", spec.targetPageBits);
  }
  const capabilities = spec.capabilities ?? ["mapped-ram"];
  if (capabilities.length > 0) {
    writeSubsectionHeader(writer, "configuration/capabilities");
    writer.be32("capabilities.count", capabilities.length);
    for (const name of capabilities) writer.str8(`capability.${name}`, name);
  }
  if (spec.uuid !== undefined) {
    writeSubsectionHeader(writer, "configuration/uuid");
    writer.raw("uuid", Uint8Array.from(spec.uuid));
  }
}

function writeSubsectionHeader(writer: Writer, name: string): void {
  writer.u8(`${name}.type`, 0x05);
  writer.str8(`${name}.name`, name);
  writer.be32(`${name}.version`, 1);
}

function writeBlocks(writer: Writer, spec: BuilderSpec, built: BuiltBlock[]): void {
  const pageSize = spec.pageSize ?? 4096;
  const blocks = spec.blocks ?? DEFAULT_BLOCKS;
  const total = blocks.reduce((sum, block) => sum + block.pages.length * pageSize, 0);
  writer.be64("ram.total", total + 4);
  blocks.forEach((block, blockIndex) => {
    const { idstr, pages } = block;
    const usedLength = pages.length * pageSize;
    writer.str8(`${idstr}.name`, idstr);
    writer.be64(`${idstr}.usedLength`, usedLength);
    if (spec.capabilities?.includes("x-ignore-shared") === true) {
      writer.be64(`${idstr}.guestPhysicalAddr`, block.guestPhysicalAddr ?? 0);
    }
    const headerOffset = writer.offset;
    const bitmapLength = Math.ceil(pages.length / 64) * 8;
    const alignment = spec.pagesAlignment ?? 4096;
    const bitmapOffset = block.notSaved === true ? 0 : headerOffset + 28;
    const pagesOffset =
      block.notSaved === true
        ? 0
        : Math.ceil((bitmapOffset + bitmapLength) / alignment) * alignment;
    writer.be32(`${idstr}.version`, 1);
    writer.be64(`${idstr}.pageSize`, pageSize);
    writer.be64(`${idstr}.bitmapOffset`, bitmapOffset);
    writer.be64(`${idstr}.pagesOffset`, pagesOffset);
    built.push({ idstr, usedLength, headerOffset, bitmapOffset, pagesOffset, pages });
    if (block.notSaved === true) return;

    writer.raw(`${idstr}.bitmap`, bitmapBytes(pages, bitmapLength));
    writer.seek(pagesOffset);
    [...pages].forEach((letter, pageIndex) => {
      const byte = letter === "." ? 0 : pageByte(blockIndex, pageIndex);
      writer.fill(pageSize, byte);
    });
  });
}

/** Page i is bit i & 7 of byte i >> 3. */
function bitmapBytes(pages: string, length: number): Uint8Array {
  const bytes = new Uint8Array(length);
  [...pages].forEach((letter, page) => {
    const at = Math.floor(page / 8);
    if (letter === "D") bytes[at] = (bytes[at] ?? 0) + 2 ** (page % 8);
  });
  return bytes;
}

function writeSectionHeader(
  writer: Writer,
  mark: string,
  type: number,
  id: number,
  name: string,
  instanceId: number,
  version: number,
): void {
  writer.u8(`${mark}.type`, type);
  writer.be32(`${mark}.id`, id);
  writer.str8(`${mark}.name`, name);
  writer.be32(`${mark}.instanceId`, instanceId);
  writer.be32(`${mark}.version`, version);
}

function writeFooter(writer: Writer, mark: string, id: number): void {
  writer.u8(`${mark}.footer`, 0x7e);
  writer.be32(`${mark}.footerId`, id);
}

function writeRamEos(writer: Writer, mark: string, type: number, id: number): void {
  writer.u8(`${mark}.type`, type);
  writer.be32(`${mark}.id`, id);
  writer.be64(`${mark}.word`, 0x10);
  writeFooter(writer, mark, id);
}

function writeDevice(writer: Writer, id: number, device: PlacedDevice): void {
  const { name, instanceId = 0, version = 1 } = device;
  const mark = `device.${name}`;
  writeSectionHeader(writer, mark, 0x04, id, name, instanceId, version);
  writer.mark(`${mark}.body`, 0);
  if (device.runState !== undefined) writeRunState(writer, device.runState);
  else writeState(writer, device.state ?? { fields: [4] });
  writeFooter(writer, mark, id);
}

function writeRunState(writer: Writer, runState: string): void {
  writer.be32("runState.size", runState.length + 1);
  writer.text("runState.name", runState);
  writer.fill(32 - runState.length + 2 + 66, 0);
}

/** Bytes that look like section types and footers, so that nobody finds sections by searching. */
function writeState(writer: Writer, state: BuilderState): void {
  for (const field of state.fields) {
    const [size, count] = typeof field === "number" ? [field, 1] : field;
    for (let index = 0; index < size * count; index++)
      writer.fill(1, [0x00, 0x06, 0x7e, 0x04, 0x03][index % 5] ?? 0);
  }
  for (const subsection of state.subsections ?? []) {
    writer.fill(1, 0x05);
    writer.fill(1, subsection.name.length);
    for (const letter of subsection.name) writer.fill(1, letter.charCodeAt(0));
    for (const byte of [0, 0, 0, 1]) writer.fill(1, byte);
    writeState(writer, subsection);
  }
}

function describe(devices: readonly BuilderDevice[]): string {
  const inStreamOrder = [
    ...devices.filter((each) => each.early),
    ...devices.filter((each) => !each.early),
  ];
  const entries = inStreamOrder.map((device) => {
    const { name, instanceId = 0, version = 1, state = { fields: [4] } } = device;
    if (device.oldStyle === true) {
      const size = state.fields.reduce<number>(
        (sum, f) => sum + (typeof f === "number" ? f : f[0] * f[1]),
        0,
      );
      return {
        name,
        instance_id: instanceId,
        size,
        fields: [{ name: "data", size, type: "buffer" }],
      };
    }
    return { name, instance_id: instanceId, vmsd_name: name, version, ...describeState(state) };
  });
  return JSON.stringify({
    configuration: { vmsd_name: "configuration", version: 1 },
    page_size: 4096,
    devices: entries,
  });
}

function describeState(state: BuilderState): object {
  const fields = state.fields.map((field, index) => {
    const [size, count] = typeof field === "number" ? [field, 1] : field;
    return { name: `f${index}`, ...(count === 1 ? {} : { array_len: count }), type: "uint8", size };
  });
  const subsections = (state.subsections ?? []).map((each) => ({
    vmsd_name: each.name,
    version: 1,
    ...describeState(each),
  }));
  return subsections.length === 0 ? { fields } : { fields, subsections };
}

function patch(
  bytes: Uint8Array,
  fields: ReadonlyMap<string, BuiltField>,
  name: string,
  value: number | bigint,
): void {
  const field = fields.get(name);
  if (field === undefined)
    throw new Error(`no field ${name}; there are ${[...fields.keys()].join(" ")}`);
  let rest = BigInt(value);
  for (let index = field.size - 1; index >= 0; index--) {
    bytes[field.offset + index] = Number(rest & 0xffn);
    rest >>= 8n;
  }
}

class Writer {
  readonly fields = new Map<string, BuiltField>();
  offset = 0;
  #bytes = new Uint8Array(65536);
  #end = 0;

  u8(name: string, value: number): void {
    this.#number(name, BigInt(value), 1);
  }
  be16(name: string, value: number): void {
    this.#number(name, BigInt(value), 2);
  }
  be32(name: string, value: number): void {
    this.#number(name, BigInt(value), 4);
  }
  be64(name: string, value: number | bigint): void {
    this.#number(name, BigInt(value), 8);
  }
  str8(name: string, text: string): void {
    this.u8(`${name}.length`, text.length);
    this.text(name, text);
  }
  text(name: string, text: string): void {
    this.raw(
      name,
      Uint8Array.from(text, (letter) => letter.charCodeAt(0)),
    );
  }
  raw(name: string, bytes: Uint8Array): void {
    this.mark(name, bytes.length);
    this.#reserve(bytes.length).set(bytes, this.offset - bytes.length);
  }
  fill(length: number, byte: number): void {
    this.#reserve(length).fill(byte, this.offset - length, this.offset);
  }
  mark(name: string, size: number): void {
    this.fields.set(name, { offset: this.offset, size });
  }
  seek(offset: number): void {
    this.fill(offset - this.offset, 0);
  }
  finish(): Uint8Array {
    return this.#bytes.slice(0, this.#end);
  }

  #number(name: string, value: bigint, size: number): void {
    this.mark(name, size);
    const bytes = this.#reserve(size);
    for (let index = 0; index < size; index++) {
      bytes[this.offset - 1 - index] = Number((value >> BigInt(8 * index)) & 0xffn);
    }
  }
  #reserve(length: number): Uint8Array {
    this.offset += length;
    this.#end = Math.max(this.#end, this.offset);
    while (this.#end > this.#bytes.length) {
      const larger = new Uint8Array(this.#bytes.length * 2);
      larger.set(this.#bytes);
      this.#bytes = larger;
    }
    return this.#bytes;
  }
}

/** The FslError that `action` throws; anything else fails the test. */
export function refusalOf(action: () => unknown): FslError {
  try {
    action();
  } catch (error) {
    if (isFslError(error)) return error;
    throw error;
  }
  throw new Error("expected an FslError, but nothing was thrown");
}

/** A byte source over memory that counts, and refuses to be asked for anything outside. */
export class CountingSource {
  readonly name: string;
  readonly byteLength: number;
  reads = 0;
  bytesRead = 0;
  readonly #bytes: Uint8Array;

  constructor(bytes: Uint8Array, name = "test.snap") {
    this.#bytes = bytes;
    this.name = name;
    this.byteLength = bytes.length;
  }

  read(offset: number, length: number): Uint8Array {
    if (!(offset >= 0 && length >= 0 && offset + length <= this.byteLength)) {
      throw new Error(`read of [${offset}, ${offset + length}) outside ${this.byteLength} bytes`);
    }
    this.reads += 1;
    this.bytesRead += length;
    return this.#bytes.slice(offset, offset + length);
  }
}
