import { describe, expect, test } from "bun:test";

import type { ErrorCode } from "../../src/errors.ts";
import { parseSnapshot } from "../../src/snapshot/snapshot.ts";
import {
  buildSnapshot,
  CountingSource,
  fieldOffset,
  refusalOf,
  type BuilderSpec,
  type BuiltSnapshot,
} from "../helpers/snapshot-builder.ts";

function parse(built: BuiltSnapshot) {
  return parseSnapshot(new CountingSource(built.bytes));
}

/** A file of its own: the first bytes of a good one, then something else. */
function withBytes(built: BuiltSnapshot, endOffset: number, ...bytes: number[]): CountingSource {
  const file = new Uint8Array(Math.max(built.bytes.length, endOffset + bytes.length));
  file.set(built.bytes.subarray(0, endOffset));
  file.set(bytes, endOffset);
  return new CountingSource(file.subarray(0, endOffset + bytes.length));
}

describe("sections", () => {
  test("are listed in file order, PARTs in one entry", () => {
    const built = buildSnapshot({ parts: 3, devices: [{ name: "timer" }] });
    const { sections } = parse(built);
    expect(sections.map((section) => [section.kind, section.name, section.count])).toEqual([
      ["start", "ram", 1],
      ["part", "ram", 3],
      ["command", null, 1],
      ["end", "ram", 1],
      ["full", "timer", 1],
      ["full", "globalstate", 1],
    ]);
    const part = sections[1];
    expect(part?.fileOffset).toBe(fieldOffset(built, "part0.type"));
    expect(part?.length).toBe(3 * 18);
    expect(sections[2]?.command).toBe(11);
  });

  test("follow one another without gaps to the EOF byte", () => {
    const built = buildSnapshot();
    const { sections, vmdescription } = parse(built);
    sections.slice(1).forEach((section, index) => {
      const before = sections[index];
      expect(section.fileOffset).toBe((before?.fileOffset ?? 0) + (before?.length ?? 0));
    });
    expect(vmdescription?.eofOffset).toBe(fieldOffset(built, "eof"));
    const last = sections.at(-1);
    expect((last?.fileOffset ?? 0) + (last?.length ?? 0)).toBe(fieldOffset(built, "eof"));
  });

  test("of devices have the size that fields, arrays and subsections add up to", () => {
    const subsections = [
      { name: "s/one", fields: [3], subsections: [{ name: "s/two", fields: [[2, 5] as const] }] },
    ];
    const built = buildSnapshot({
      devices: [{ name: "dev", instanceId: 7, version: 9, state: { fields: [8], subsections } }],
    });
    const section = parse(built).sections.find((each) => each.name === "dev");
    // u8 type, str8 name, be32 version, body: 6 + 5 + 3 and 6 + 5 + 10.
    const subsectionsLength = 1 + 1 + 5 + 4 + 3 + (1 + 1 + 5 + 4 + 10);
    expect(section).toMatchObject({
      kind: "full",
      instanceId: 7,
      version: 9,
      bodyLength: 8 + subsectionsLength,
    });
    expect(section?.bodyOffset).toBe(fieldOffset(built, "device.dev.body"));
  });

  test("of old-style devices have the size of their data field", () => {
    const built = buildSnapshot({
      devices: [{ name: "slirp", version: 5, oldStyle: true, state: { fields: [321] } }],
    });
    expect(parse(built).sections.find((each) => each.name === "slirp")?.bodyLength).toBe(321);
  });

  test("of early devices stand between RAM START and the first PART", () => {
    const early = { name: "0000:00:10.0/virtio-mem-device-early", early: true };
    const kinds = parse(buildSnapshot({ devices: [{ name: "timer" }, early] })).sections.map(
      (each) => each.kind,
    );
    expect(kinds).toEqual(["start", "full", "part", "command", "end", "full", "full"]);
  });

  test("may lack PARTs, COMMAND and devices", () => {
    const built = buildSnapshot({
      parts: 0,
      switchoverCommand: false,
      devices: [],
      runState: null,
    });
    expect(parse(built).sections.map((each) => each.kind)).toEqual(["start", "end"]);
    expect(parse(built).globalState).toBeNull();
  });

  test("of a long live save are walked quickly", () => {
    const built = buildSnapshot({ parts: 100_000 });
    const source = new CountingSource(built.bytes);
    expect(parseSnapshot(source).sections[1]?.count).toBe(100_000);
    expect(source.reads).toBeLessThan(60);
  });
});

describe("sections are refused", () => {
  const cases: [string, BuilderSpec, ErrorCode, string][] = [
    [
      "with RAM version 3",
      { corrupt: { "ram.start.version": 3 } },
      "SNAPSHOT_UNSUPPORTED",
      "ram.start.type",
    ],
    [
      "with another RAM instance",
      { corrupt: { "ram.start.instanceId": 1 } },
      "SNAPSHOT_UNSUPPORTED",
      "ram.start.type",
    ],
    [
      "with a START that is not RAM",
      { corrupt: { "ram.start.name": 0x726170 } },
      "SNAPSHOT_UNSUPPORTED",
      "ram.start.type",
    ],
    [
      "with a PART of another section",
      { corrupt: { "part0.id": 9 } },
      "SNAPSHOT_FORMAT",
      "part0.type",
    ],
    [
      "with pages in a PART",
      { corrupt: { "part1.word": 0x1008 } },
      "SNAPSHOT_FORMAT",
      "part1.word",
    ],
    ["with an END of another section", { corrupt: { "end.id": 9 } }, "SNAPSHOT_FORMAT", "end.type"],
    ["with RAM behind its END", { corrupt: { "part1.type": 3 } }, "SNAPSHOT_FORMAT", "end.type"],
    [
      "with a wrong footer",
      { corrupt: { "ram.start.footer": 0 } },
      "SNAPSHOT_FORMAT",
      "ram.start.footer",
    ],
    [
      "without section footers",
      { corrupt: { "ram.start.footer": 0x02 } },
      "SNAPSHOT_UNSUPPORTED",
      "ram.start.footer",
    ],
    [
      "with a footer of another section",
      { corrupt: { "end.footerId": 1 } },
      "SNAPSHOT_FORMAT",
      "end.footer",
    ],
    ["with an unknown type", { corrupt: { "end.type": 0x42 } }, "SNAPSHOT_FORMAT", "end.type"],
    [
      "with a postcopy package",
      { corrupt: { "command.number": 7 } },
      "SNAPSHOT_UNSUPPORTED",
      "command.type",
    ],
    [
      "with a device that is not described",
      { corrupt: { "device.cpu.name": 0x787878 } },
      "SNAPSHOT_FORMAT",
      "device.cpu.type",
    ],
    [
      "with another instance than described",
      { corrupt: { "device.cpu.instanceId": 1 } },
      "SNAPSHOT_FORMAT",
      "device.cpu.type",
    ],
    [
      "with another version than described",
      { corrupt: { "device.cpu.version": 2 } },
      "SNAPSHOT_FORMAT",
      "device.cpu.type",
    ],
    [
      "with a damaged device footer",
      { corrupt: { "device.cpu.footer": 0 } },
      "SNAPSHOT_FORMAT",
      "device.cpu.footer",
    ],
    [
      "with an early EOF",
      { corrupt: { "device.cpu.type": 0 } },
      "SNAPSHOT_FORMAT",
      "device.cpu.type",
    ],
  ];
  test.each(cases)("%s", (_name, spec, code, field) => {
    const built = buildSnapshot(spec);
    const error = refusalOf(() => parse(built));
    expect(error.code).toBe(code);
    expect(error.details).toMatchObject({ fileOffset: fieldOffset(built, field) });
  });

  test("when a described device is missing", () => {
    const json =
      '{"devices":[{"name":"timer","instance_id":0,"version":1,"fields":[{"size":4}]},' +
      '{"name":"x","instance_id":0,"size":1}]}';
    const built = buildSnapshot({ devices: [{ name: "timer" }], runState: null, json });
    const error = refusalOf(() => parse(built));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.message).toContain("expected 2 as described, found 1 before EOF");
  });

  test("when no RAM section was written", () => {
    const built = buildSnapshot({ devices: [], runState: null });
    const at = fieldOffset(built, "ram.start.type");
    const json = [...'{"devices":[]}'].map((letter) => letter.charCodeAt(0));
    const error = refusalOf(() =>
      parseSnapshot(withBytes(built, at, 0, 6, 0, 0, 0, json.length, ...json)),
    );
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.message).toContain("RAM section: expected one, found none");
  });
});

describe("a snapshot that was not finished, or whose RAM was not", () => {
  test("is refused when it has no tail", () => {
    const built = buildSnapshot();
    const bytes = built.bytes.slice(0, fieldOffset(built, "device.cpu.body"));
    const error = refusalOf(() => parseSnapshot(new CountingSource(bytes)));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.message).toContain("unfinished or truncated snapshot");
  });

  test("is refused as background-snapshot when devices are there but no RAM END", () => {
    const error = refusalOf(() => parse(buildSnapshot({ ramEnd: false })));
    expect(error.code).toBe("SNAPSHOT_UNSUPPORTED");
    expect(error.message).toContain("background-snapshot");
  });

  test("is refused as background-snapshot without description too", () => {
    const error = refusalOf(() => parse(buildSnapshot({ ramEnd: false, vmdescription: false })));
    expect(error.code).toBe("SNAPSHOT_UNSUPPORTED");
    expect(error.message).toContain("background-snapshot");
  });
});

describe("a snapshot saved with suppress-vmdesc=on", () => {
  test("is accepted up to its RAM END, and says that the rest was not checked", () => {
    const built = buildSnapshot({ vmdescription: false });
    const layout = parse(built);
    expect(layout.vmdescription).toBeNull();
    expect(layout.isVerifiedComplete).toBe(false);
    expect(layout.sections.at(-1)?.kind).toBe("end");
    expect(layout.deviceStateOffset).toBe(fieldOffset(built, "device.timer.type"));
  });

  test("has its run state found at the end of the file", () => {
    const built = buildSnapshot({ vmdescription: false, runState: "running" });
    expect(parse(built).globalState?.nameOffset).toBe(fieldOffset(built, "runState.name"));
  });

  test("has no run state when globalstate is not the last device", () => {
    expect(parse(buildSnapshot({ vmdescription: false, runState: null })).globalState).toBeNull();
  });

  test("is refused when the file does not end like one", () => {
    const built = buildSnapshot({ vmdescription: false });
    const error = refusalOf(() => parseSnapshot(new CountingSource(built.bytes.slice(0, -1))));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.details["fileOffset"]).toBe(built.bytes.length - 1);
  });

  test("with a described tail counts as verified", () => {
    expect(parse(buildSnapshot()).isVerifiedComplete).toBe(true);
  });
});
