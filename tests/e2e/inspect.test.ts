/**
 * `fsl inspect` of real snapshots, held against QEMU's own account and against the file's bytes,
 * read without anything of src/.
 */
import { beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, statSync } from "node:fs";
import {
  type GuestSnapshot,
  type SnapshotSpec,
  snapshotOf,
  whyNoGuests,
} from "../helpers/guests.ts";
import { FSL, whyNoExecutable } from "../helpers/load-runs.ts";
import { type OracleBlock, QemuOracle } from "../helpers/qemu-oracle.ts";

setDefaultTimeout(120_000);
const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;
const PAGE = 4096;
/** A section begins with its type and ends with a footer. */
const SECTION_FULL = 0x04;
const SECTION_FOOTER = 0x7e;
const FOOTER_BYTES = 5;

const GUESTS: [string, SnapshotSpec][] = [
  ["Linux on q35", {}],
  ["the bare guest on pc", { guest: "bare", machine: "pc" }],
  ["the bare guest on microvm", { guest: "bare", machine: "microvm" }],
];

/** What is used here of the JSON. */
interface Inspected {
  readonly path: string;
  readonly fileLength: number;
  readonly bytesOnDisk: number;
  readonly machineType: string;
  readonly runState: string;
  readonly savedLive: boolean;
  readonly complete: boolean;
  readonly blocks: readonly Block[];
  readonly devices: readonly Device[];
}

interface Block {
  readonly idstr: string;
  readonly length: number;
  readonly pageSize: number;
  readonly dataPages: number;
  readonly zeroPages: number;
  readonly bitmapOffset: number;
  readonly pagesOffset: number;
  readonly saved: boolean;
  readonly bytesOnDisk: number;
}

interface Device {
  readonly name: string;
  readonly instanceId: number;
  readonly version: number;
  readonly fileOffset: number;
  readonly length: number;
}

/** A device or one of its parts in the description that QEMU writes at the end of the file. */
interface Described {
  readonly name?: string;
  readonly instance_id?: number;
  readonly vmsd_name?: string;
  readonly version: number;
  readonly fields?: readonly { readonly size: number; readonly array_len?: number }[];
  readonly subsections?: readonly Described[];
}

async function inspect(...args: string[]): Promise<string> {
  const child = Bun.spawn([FSL, "inspect", ...args], { stdout: "pipe", stderr: "pipe" });
  const [stdout, stderr] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  expect({ code: await child.exited, stderr }).toEqual({ code: 0, stderr: "" });
  return stdout;
}

/** The blocks of a QEMU with the guest's command line. */
async function blocksByQemu({ argv }: GuestSnapshot): Promise<OracleBlock[]> {
  await using qemu = await QemuOracle.start([...argv.slice(1), "-S"]);
  return await qemu.blocks(); // QEMU lives until then.
}

function describedDevices(bytes: Buffer): readonly Described[] {
  const tail = bytes.subarray(-2_000_000);
  const text = tail.subarray(tail.lastIndexOf('{"configuration"')).toString();
  return (JSON.parse(text) as { devices: Described[] }).devices;
}

/** Bytes of a device's state by the description; a subsection has type, name and version. */
function stateBytes({ fields = [], subsections = [] }: Described): number {
  const own = fields.map(({ size, array_len: count = 1 }) => size * count);
  const parts = subsections.map((part) => 6 + (part.vmsd_name ?? "").length + stateBytes(part));
  return [...own, ...parts].reduce((sum, bytes) => sum + bytes, 0);
}

/** Type, section number, name with its length, instance, version; the footer. */
function sectionBytes(device: Described): number {
  return 14 + (device.name ?? "").length + stateBytes(device) + FOOTER_BYTES;
}

/** Set bits of a block's bitmap, which has whole 64-bit words. */
function bitsIn(bytes: Buffer, { bitmapOffset, length }: Block): number {
  const end = bitmapOffset + Math.ceil(length / PAGE / 64) * 8;
  return bytes
    .subarray(bitmapOffset, end)
    .reduce((sum, byte) => sum + byte.toString(2).replaceAll("0", "").length, 0);
}

/** Pages with a byte that is not zero; a guest that was stopped leaves no stale ones. */
function pagesWithData(bytes: Buffer, { pagesOffset, length }: Block): number {
  const zero = Buffer.alloc(PAGE);
  return Array.from({ length: length / PAGE }, (_, page) => pagesOffset + page * PAGE).filter(
    (at) => bytes.compare(zero, 0, PAGE, at, at + PAGE) !== 0,
  ).length;
}

/** The rows below a heading of the text form, up to an empty line, by column. */
function rowsBelow(text: string, heading: string): string[][] {
  const lines = text.split("\n");
  const from = lines.findIndex((line) => line.startsWith(heading)) + 1;
  const end = lines.indexOf("", from);
  return lines.slice(from, end < 0 ? undefined : end).map((line) => line.split(/ {2,}/));
}

describe.skipIf(skip).each(GUESTS)("fsl inspect of %s", (_, spec) => {
  let snapshot: GuestSnapshot;
  let bytes: Buffer;
  let found: Inspected;
  beforeAll(async () => {
    if (skip) return;
    snapshot = await snapshotOf(spec);
    bytes = readFileSync(snapshot.path);
    found = JSON.parse(await inspect("--json", snapshot.path)) as Inspected;
  });

  test("names the file, the machine and the run state", () => {
    expect(found).toMatchObject({
      path: snapshot.path,
      fileLength: bytes.length,
      machineType: snapshot.machineType,
      runState: "paused",
      savedLive: false,
      complete: true,
    });
  });

  test("has QEMU's own names and lengths of the RAMBlocks", async () => {
    const byQemu = await blocksByQemu(snapshot);
    expect(found.blocks.map(({ idstr, length }) => [idstr, length])).toEqual(
      byQemu.map(({ idstr, usedLength }) => [idstr, usedLength]),
    );
  });

  test("counts the data pages that the bitmap has, and that have data; the rest is zero", () => {
    expect(found.blocks.length).toBeGreaterThan(0);
    expect(found.blocks.map(({ dataPages }) => dataPages)).toEqual(
      found.blocks.map((block) => bitsIn(bytes, block)),
    );
    expect(found.blocks.map(({ dataPages }) => dataPages)).toEqual(
      found.blocks.map((block) => pagesWithData(bytes, block)),
    );
    expect(found.blocks.map(({ dataPages, zeroPages }) => (dataPages + zeroPages) * PAGE)).toEqual(
      found.blocks.map(({ length }) => length),
    );
    expect(new Set(found.blocks.map(({ pageSize }) => pageSize))).toEqual(new Set([PAGE]));
  });

  test("has as many bytes on disk as the file system", () => {
    const allocated = statSync(snapshot.path).blocks * 512;
    // The file system also counts the rest of the last page, and its own tables of the file.
    expect(found.bytesOnDisk).toBeGreaterThan(allocated * 0.99);
    expect(found.bytesOnDisk).toBeLessThanOrEqual(allocated);
    for (const block of found.blocks) {
      expect(block.bytesOnDisk).toBeGreaterThanOrEqual(block.dataPages * PAGE);
      expect(block.bytesOnDisk).toBeLessThanOrEqual(block.length);
    }
    const inBlocks = found.blocks.reduce((sum, block) => sum + block.bytesOnDisk, 0);
    expect(inBlocks).toBeLessThan(found.bytesOnDisk);
  });

  test("has the device sections that the description at the end of the file has", () => {
    const described = describedDevices(bytes);
    expect(
      found.devices.map(({ name, instanceId, version, length }) => {
        return { name, instanceId, version, length };
      }),
    ).toEqual(
      described.map((device) => ({
        name: device.name ?? "",
        instanceId: device.instance_id ?? -1,
        version: device.version,
        length: sectionBytes(device),
      })),
    );
  });

  test("says where the device sections are, apart from each other and from the pages", () => {
    const marks = found.devices.map(({ name, fileOffset, length }) => [
      bytes[fileOffset],
      bytes.toString("latin1", fileOffset + 6, fileOffset + 6 + name.length),
      bytes[fileOffset + length - FOOTER_BYTES],
    ]);
    expect(marks).toEqual(found.devices.map(({ name }) => [SECTION_FULL, name, SECTION_FOOTER]));
    const places = [
      ...found.devices.map(({ fileOffset, length }) => [fileOffset, fileOffset + length]),
      ...found.blocks.map(({ pagesOffset, length }) => [pagesOffset, pagesOffset + length]),
      [bytes.length, bytes.length],
    ].toSorted(([a = 0], [b = 0]) => a - b);
    const overlaps = places.filter(([, end = 0], index) => end > (places[index + 1]?.[0] ?? end));
    expect(overlaps).toEqual([]);
  });

  test("shows the same numbers as text", async () => {
    const text = await inspect(snapshot.path);
    const blocks = rowsBelow(text, "RAMBlock");
    expect(blocks.map(([name, , data, zero, , , at]) => [name, data, zero, at])).toEqual(
      found.blocks.map(({ idstr, dataPages, zeroPages, pagesOffset }) => [
        idstr,
        `${dataPages}`,
        `${zeroPages}`,
        `0x${pagesOffset.toString(16)}`,
      ]),
    );
    const devices = rowsBelow(text, "device section");
    expect(devices.map(([name, instance, version]) => [name, instance, version])).toEqual(
      found.devices.map(({ name, instanceId, version }) => [name, `${instanceId}`, `${version}`]),
    );
    expect(text).toMatch(new RegExp(`^machine type +${snapshot.machineType}$`, "m"));
    // Sizes are rounded to people's units.
    const sizes = blocks.flatMap(([, length = "", , , data = "", disk = ""]) => [
      length,
      data,
      disk,
    ]);
    const exact = found.blocks.flatMap(({ length, dataPages, bytesOnDisk }) => [
      length,
      dataPages * PAGE,
      bytesOnDisk,
    ]);
    const wrong = sizes.filter((size, index) => {
      const bytes = exact[index] ?? 0;
      return Math.abs(bytesOf(size) - bytes) > bytes / 100;
    });
    expect(wrong).toEqual([]);
  });
});

/** `1.5 MiB` in bytes. */
function bytesOf(size: string): number {
  const [number, unit = ""] = size.split(" ");
  return Number(number) * 1024 ** ["bytes", "KiB", "MiB", "GiB"].indexOf(unit);
}
