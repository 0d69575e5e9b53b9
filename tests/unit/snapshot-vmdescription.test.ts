import { describe, expect, test } from "bun:test";

import { findVmdescription } from "../../src/snapshot/vmdescription.ts";
import { CountingSource, refusalOf } from "../helpers/snapshot-builder.ts";

/** `before` stands for device state; then EOF, type, length, JSON. */
function tailWith(json: string, before: readonly number[] = [0x7e, 0, 0, 0, 3]): CountingSource {
  const text = new TextEncoder().encode(json);
  const length = [24, 16, 8, 0].map((shift) => (text.length >>> shift) & 0xff);
  return new CountingSource(Uint8Array.from([...before, 0x00, 0x06, ...length, ...text]));
}

function devicesOf(...devices: object[]): string {
  return JSON.stringify({ page_size: 4096, devices });
}

function lengthOf(device: object): number | undefined {
  const source = tailWith(devicesOf({ name: "d", instance_id: 0, version: 1, ...device }));
  return findVmdescription(source, 0)?.devices[0]?.bodyLength;
}

describe("findVmdescription", () => {
  test("finds EOF byte and JSON, and reads the tail once", () => {
    const source = tailWith(devicesOf());
    expect(findVmdescription(source, 0)).toEqual({
      eofOffset: 5,
      jsonOffset: 11,
      jsonLength: 31,
      devices: [],
    });
    expect(source.reads).toBe(1);
  });

  test.each([1, 0x100, 0x6000, 0x10000, 0x20600])(
    "finds a JSON whose length has zero bytes in it: %i",
    (length) => {
      const padding = Math.max(0, length - devicesOf({ name: "", instance_id: 0, size: 1 }).length);
      const json = devicesOf({ name: "x".repeat(padding), instance_id: 0, size: 1 });
      expect(findVmdescription(tailWith(json), 0)?.jsonLength).toBe(json.length);
    },
  );

  test("is not misled by device state that looks like a prefix", () => {
    const before = [0x00, 0x06, 0x00, 0x00, 0x00, 0x2a, 0x7b, 0x00, 0x00, 0x06];
    expect(findVmdescription(tailWith(devicesOf(), before), 0)?.eofOffset).toBe(before.length);
  });

  test("reads further back when the JSON is longer than the first window", () => {
    const json = devicesOf({
      name: "d",
      instance_id: 0,
      version: 1,
      fields: [{ name: "x".repeat(700_000), size: 3 }],
    });
    const source = tailWith(json);
    expect(findVmdescription(source, 0)?.devices[0]?.bodyLength).toBe(3);
    expect(source.reads).toBe(2);
  });

  test.each([
    ["there is none", [0x7e, 0, 0, 0, 3, 0x00]],
    ["the length is wrong", [0x00, 0x06, 0, 0, 0, 3, 0x7b, 0x7d]],
    ["it is no object", [0x00, 0x06, 0, 0, 0, 2, 0x5b, 0x5d]],
    ["the type is another", [0x00, 0x07, 0, 0, 0, 2, 0x7b, 0x7d]],
    ["the file is too short", [0x06, 0, 0, 0]],
    ["the file is empty", []],
  ])("is null when %s", (_name, bytes) => {
    expect(findVmdescription(new CountingSource(Uint8Array.from(bytes)), 0)).toBeNull();
  });

  test("does not look before the given offset", () => {
    expect(findVmdescription(tailWith(devicesOf()), 6)).toBeNull();
  });

  test.each([
    ["no JSON", "{nonsense}"],
    ["no devices", '{"page_size":4096}'],
    ["devices that are no array", '{"devices":{}}'],
    ["a device that is no object", '{"devices":[7]}'],
    ["a device without name", '{"devices":[{"instance_id":0,"size":1}]}'],
    ["a device without instance", '{"devices":[{"name":"d","size":1}]}'],
    ["a negative size", '{"devices":[{"name":"d","instance_id":0,"fields":[{"size":-1}]}]}'],
    [
      "a size that is no integer",
      '{"devices":[{"name":"d","instance_id":0,"fields":[{"size":1.5}]}]}',
    ],
    ["a field without size", '{"devices":[{"name":"d","instance_id":0,"fields":[{"name":"a"}]}]}'],
    [
      "a negative array_len",
      '{"devices":[{"name":"d","instance_id":0,"fields":[{"size":1,"array_len":-2}]}]}',
    ],
    [
      "a size beyond the file",
      '{"devices":[{"name":"d","instance_id":0,"fields":[{"size":999999999}]}]}',
    ],
    [
      "sizes beyond 2^53",
      '{"devices":[{"name":"d","instance_id":0,"fields":[{"size":9e15,"array_len":9000}]}]}',
    ],
    [
      "a subsection without name",
      '{"devices":[{"name":"d","instance_id":0,"subsections":[{"fields":[]}]}]}',
    ],
  ])("refuses %s", (_name, json) => {
    const error = refusalOf(() => findVmdescription(tailWith(json), 0));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.details["fileOffset"]).toBe(11);
  });

  test("refuses bytes that are no UTF-8", () => {
    const json = devicesOf({ name: "d" });
    const source = tailWith(json);
    const bytes = source.read(0, source.byteLength);
    bytes[30] = 0xff;
    expect(refusalOf(() => findVmdescription(new CountingSource(bytes), 0)).code).toBe(
      "SNAPSHOT_FORMAT",
    );
  });

  test("refuses subsections nested beyond reason", () => {
    let state: object = { fields: [] };
    for (let depth = 0; depth < 40; depth++)
      state = { subsections: [{ vmsd_name: "s", ...state }] };
    const json = devicesOf({ name: "d", instance_id: 0, ...state });
    expect(refusalOf(() => findVmdescription(tailWith(json), 0)).code).toBe("SNAPSHOT_FORMAT");
  });

  test.each(["[", '{"a":'])("refuses millions of %s in bounded time", (open) => {
    const text = new TextEncoder().encode(`{"devices":${open.repeat(4_000_000 / open.length)}`);
    const bytes = new Uint8Array(6 + text.length);
    new DataView(bytes.buffer).setUint32(2, text.length);
    bytes[1] = 6;
    bytes.set(text, 6);
    const error = refusalOf(() => findVmdescription(new CountingSource(bytes), 0));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.message).toContain("nesting");
  });

  test("is null when the last NUL is farther from the end than any JSON is long", () => {
    const bytes = new Uint8Array(20 * 1024 * 1024).fill(0x20);
    bytes[0] = 0;
    const source = new CountingSource(bytes);
    expect(findVmdescription(source, 0)).toBeNull();
    expect(source.bytesRead).toBeLessThan(48 * 1024 * 1024);
  });
});

describe("length of a device's state", () => {
  test("is the sum of its fields", () => {
    expect(
      lengthOf({
        fields: [
          { name: "a", size: 4 },
          { name: "b", size: 10 },
        ],
      }),
    ).toBe(14);
  });

  test("counts an array field once per element", () => {
    expect(lengthOf({ fields: [{ name: "a", array_len: 3, size: 4 }] })).toBe(12);
  });

  test("takes indexed elements one by one", () => {
    expect(
      lengthOf({
        fields: [
          { name: "a", index: 0, size: 4 },
          { name: "a", index: 1, size: 5 },
        ],
      }),
    ).toBe(9);
  });

  test("takes a struct's own size and nothing nested", () => {
    const struct = { vmsd_name: "inner", fields: [{ name: "x", size: 99 }] };
    expect(lengthOf({ fields: [{ name: "a", type: "struct", struct, size: 7 }] })).toBe(7);
  });

  test("adds the header of a subsection", () => {
    expect(
      lengthOf({
        fields: [{ size: 1 }],
        subsections: [{ vmsd_name: "abc", fields: [{ size: 2 }] }],
      }),
    ).toBe(12);
  });

  test("is the device's size when it has no fields", () => {
    expect(lengthOf({ size: 77 })).toBe(77);
  });

  test("does not count an old-style size twice", () => {
    expect(lengthOf({ size: 77, fields: [{ name: "data", size: 77, type: "buffer" }] })).toBe(77);
  });
});
