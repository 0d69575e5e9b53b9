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

describe("configuration", () => {
  test("gives machine type and capabilities", () => {
    const layout = parse(buildSnapshot({ machineType: "pc-i440fx-10.0" }));
    expect(layout.machineType).toBe("pc-i440fx-10.0");
    expect(layout.capabilities).toEqual(["mapped-ram"]);
    expect(layout.uuid).toBeNull();
    expect(layout.targetPageBits).toBeNull();
  });

  test("gives the uuid in its canonical form", () => {
    const uuid = [
      0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
    ];
    expect(parse(buildSnapshot({ uuid })).uuid).toBe("00112233-4455-6677-8899-aabbccddeeff");
  });

  const cases: [string, BuilderSpec, ErrorCode, string][] = [
    ["another magic", { corrupt: { magic: 0x7f454c46 } }, "SNAPSHOT_FORMAT", "magic"],
    [
      "stream version 2",
      { corrupt: { streamVersion: 2 } },
      "SNAPSHOT_UNSUPPORTED",
      "streamVersion",
    ],
    [
      "stream version 4",
      { corrupt: { streamVersion: 4 } },
      "SNAPSHOT_UNSUPPORTED",
      "streamVersion",
    ],
    ["no capability mapped-ram", { capabilities: [] }, "SNAPSHOT_UNSUPPORTED", "configuration"],
    [
      "only another capability",
      { capabilities: ["x-ignore-shared"] },
      "SNAPSHOT_UNSUPPORTED",
      "configuration",
    ],
    [
      "a section where it should be (send-configuration=off)",
      { corrupt: { configuration: 1 } },
      "SNAPSHOT_UNSUPPORTED",
      "configuration",
    ],
    [
      "nonsense where it should be",
      { corrupt: { configuration: 0x33 } },
      "SNAPSHOT_FORMAT",
      "configuration",
    ],
    [
      "an empty machine type",
      { corrupt: { "machineType.length": 0 } },
      "SNAPSHOT_FORMAT",
      "machineType.length",
    ],
    [
      "a machine type of 4 GiB",
      { corrupt: { "machineType.length": 0xffffffff } },
      "SNAPSHOT_FORMAT",
      "machineType.length",
    ],
    [
      "4 billion capabilities",
      { corrupt: { "capabilities.count": 0xffffffff } },
      "SNAPSHOT_FORMAT",
      "capabilities.count",
    ],
    [
      "a newer subsection",
      { corrupt: { "configuration/capabilities.version": 2 } },
      "SNAPSHOT_UNSUPPORTED",
      "configuration/capabilities.version",
    ],
    ["target pages of 2 MiB", { targetPageBits: 21 }, "SNAPSHOT_UNSUPPORTED", "targetPageBits"],
  ];
  test.each(cases)("is refused with %s", (_name, spec, code, field) => {
    const built = buildSnapshot(spec);
    const error = refusalOf(() => parse(built));
    expect(error.code).toBe(code);
    expect(error.details).toMatchObject({ fileOffset: fieldOffset(built, field) });
  });

  test("is refused with a subsection that fsl does not know", () => {
    const built = buildSnapshot();
    const at = fieldOffset(built, "configuration/capabilities.type");
    const error = refusalOf(() => parseSnapshot(withBytes(built, at, 5, 1, 0x78, 0, 0, 0, 1, 1)));
    expect(error.code).toBe("SNAPSHOT_UNSUPPORTED");
    expect(error.details["fileOffset"]).toBe(at);
  });

  test("of an empty file is refused as no migration stream", () => {
    const error = refusalOf(() => parseSnapshot(new CountingSource(new Uint8Array(0))));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.message).toContain("not a QEMU migration stream");
  });

  test.each([
    ["qcow2", [0x51, 0x46, 0x49, 0xfb], "0x514649fb, a qcow2 image"],
    ["ELF", [0x7f, 0x45, 0x4c, 0x46], "0x7f454c46, an ELF file"],
    ["gzip", [0x1f, 0x8b, 0x08, 0x00], "0x1f8b0800, a gzip file"],
    ["zstd", [0x28, 0xb5, 0x2f, 0xfd], "0x28b52ffd, a zstd file"],
    ["no known", [0x7b, 0x0a, 0x20, 0x20], "0x7b0a2020"],
  ])("of a file with %s magic is refused, and named", (_, magic, found) => {
    const error = refusalOf(() =>
      parseSnapshot(new CountingSource(Uint8Array.of(...magic, 0, 0, 0, 0))),
    );
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.message).toBe(
      "not a QEMU migration stream: expected magic 0x5145564d (QEVM), " +
        `found ${found} (test.snap at 0x0); ` +
        "a snapshot is a file that 'fsl save' or QEMU's own migration has written",
    );
  });

  test("at an offset past the end is refused as no migration stream", () => {
    const source = new CountingSource(buildSnapshot().bytes);
    expect(refusalOf(() => parseSnapshot(source, { offset: 2 ** 40 })).code).toBe(
      "SNAPSHOT_FORMAT",
    );
  });
});
