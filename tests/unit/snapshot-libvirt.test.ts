import { describe, expect, test } from "bun:test";

import { readLibvirtHeader } from "../../src/snapshot/libvirt.ts";
import { parseSnapshot } from "../../src/snapshot/snapshot.ts";
import { buildSnapshot, CountingSource, refusalOf } from "../helpers/snapshot-builder.ts";

interface HeaderFields {
  magic?: string;
  version?: number;
  dataLength?: number;
  wasRunning?: number;
  format?: number;
  isBigEndian?: boolean;
}

const XML = "<domain type='kvm'><name>demo</name></domain>";
const COOKIE = "<cookie/>";
const DATA_LENGTH = 4000;
const STREAM_OFFSET = 92 + DATA_LENGTH;

/** A libvirt header with XML, cookie and padding before a mapped-ram stream. */
function imageOf(fields: HeaderFields = {}): CountingSource {
  const { bytes } = buildSnapshot({ streamOffset: STREAM_OFFSET });
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  const text = (offset: number, value: string): void => {
    [...value].forEach((letter, index) => view.setUint8(offset + index, letter.charCodeAt(0)));
  };
  bytes.fill(0, 0, STREAM_OFFSET);
  text(0, fields.magic ?? "LibvirtQemudSave");
  const words = [
    fields.version ?? 2,
    fields.dataLength ?? DATA_LENGTH,
    fields.wasRunning ?? 1,
    fields.format ?? 6,
    XML.length + 1,
  ];
  words.forEach((word, index) =>
    view.setUint32(16 + index * 4, word, !(fields.isBigEndian ?? false)),
  );
  text(92, XML);
  text(92 + XML.length + 1, COOKIE);
  return new CountingSource(bytes);
}

describe("readLibvirtHeader", () => {
  test("gives the stream's offset and the domain XML without its cookie", () => {
    expect(readLibvirtHeader(imageOf())).toEqual({
      streamOffset: STREAM_OFFSET,
      wasRunning: true,
      domainXml: XML,
    });
  });

  test("reads a header of the other byte order", () => {
    const header = readLibvirtHeader(imageOf({ isBigEndian: true, wasRunning: 0 }));
    expect(header).toMatchObject({ streamOffset: STREAM_OFFSET, wasRunning: false });
  });

  test("is null for a plain snapshot, and for a file shorter than the header", () => {
    expect(readLibvirtHeader(new CountingSource(buildSnapshot().bytes))).toBeNull();
    expect(readLibvirtHeader(new CountingSource(new Uint8Array(91)))).toBeNull();
  });

  test.each([
    ["an unfinished image", { magic: "LibvirtQemudPart" }, "SNAPSHOT_FORMAT"],
    ["version 3", { version: 3 }, "SNAPSHOT_UNSUPPORTED"],
    ["a compressed image", { format: 5 }, "SNAPSHOT_UNSUPPORTED"],
    ["an unknown format", { format: 99 }, "SNAPSHOT_UNSUPPORTED"],
    ["no XML", { dataLength: 0 }, "SNAPSHOT_FORMAT"],
    ["an XML past the file", { dataLength: 12_000_000 }, "SNAPSHOT_FORMAT"],
    ["an XML of 4 GiB", { dataLength: 0xffffffff }, "SNAPSHOT_FORMAT"],
  ])("refuses %s", (_name, fields, code) => {
    expect(refusalOf(() => readLibvirtHeader(imageOf(fields))).code as string).toBe(code);
  });
});

describe("parseSnapshot of a libvirt image", () => {
  test("starts behind the header by itself", () => {
    const layout = parseSnapshot(imageOf());
    expect(layout.streamOffset).toBe(STREAM_OFFSET);
    expect(layout.libvirt?.domainXml).toBe(XML);
    expect(layout.blocks.map((block) => block.idstr)).toEqual(["pc.ram", "pc.bios"]);
  });

  test("ignores the header when it is given an offset", () => {
    const layout = parseSnapshot(imageOf(), { offset: STREAM_OFFSET });
    expect(layout.libvirt).toBeNull();
    expect(layout.machineType).toBe("pc-q35-10.0");
  });

  test("refuses one whose stream is not where the header says", () => {
    const error = refusalOf(() => parseSnapshot(imageOf({ dataLength: DATA_LENGTH - 4 })));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.details["fileOffset"]).toBe(STREAM_OFFSET - 4);
  });
});
