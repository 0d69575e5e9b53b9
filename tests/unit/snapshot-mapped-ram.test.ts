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

describe("RAMBlock records", () => {
  test("come in file order with their places in the file", () => {
    const built = buildSnapshot({
      blocks: [
        { idstr: "pc.ram", pages: "D".repeat(65) },
        { idstr: "0000:00:02.0/vga.vram", pages: "..D" },
      ],
    });
    const { blocks } = parse(built);
    expect(blocks.map((block) => block.idstr)).toEqual(["pc.ram", "0000:00:02.0/vga.vram"]);
    expect(blocks[0]).toEqual({
      idstr: "pc.ram",
      usedLength: 65 * 4096,
      pageSize: 4096,
      pageCount: 65,
      recordOffset: fieldOffset(built, "pc.ram.name.length"),
      headerOffset: fieldOffset(built, "pc.ram.version"),
      bitmapOffset: fieldOffset(built, "pc.ram.bitmap"),
      bitmapLength: 16,
      pagesOffset: built.blocks[0]?.pagesOffset ?? -1,
      notSaved: false,
      guestPhysicalAddr: null,
    });
  });

  test("keep QEMU's 1 MiB alignment of pages", () => {
    const { blocks } = parse(buildSnapshot({ pagesAlignment: 1024 * 1024 }));
    expect(blocks.map((block) => block.pagesOffset)).toEqual([0x100000, 0x200000]);
  });

  test("keep absolute offsets in a stream that starts at an offset", () => {
    const built = buildSnapshot({ streamOffset: 4097 });
    const layout = parseSnapshot(new CountingSource(built.bytes), { offset: 4097 });
    expect(layout.streamOffset).toBe(4097);
    expect(layout.blocks.map((block) => block.pagesOffset)).toEqual(
      built.blocks.map((block) => block.pagesOffset),
    );
  });

  test("have 64 KiB pages when header and configuration say so", () => {
    const built = buildSnapshot({ targetPageBits: 16, pageSize: 65536, pagesAlignment: 65536 });
    const { blocks, targetPageBits } = parse(built);
    expect(targetPageBits).toBe(16);
    expect(blocks[0]?.pageSize).toBe(65536);
  });

  test("have an address with x-ignore-shared", () => {
    const blocks = [{ idstr: "pc.bios", pages: "D", guestPhysicalAddr: 0xfffc0000 }];
    const layout = parse(
      buildSnapshot({ capabilities: ["x-ignore-shared", "mapped-ram"], blocks }),
    );
    expect(layout.blocks[0]?.guestPhysicalAddr).toBe(0xfffc0000);
    expect(layout.capabilities).toEqual(["x-ignore-shared", "mapped-ram"]);
  });

  test("of a block that was not saved have no bytes in the file", () => {
    const blocks = [
      { idstr: "shared", pages: "DDDD", notSaved: true },
      { idstr: "pc.ram", pages: "D." },
    ];
    const layout = parse(
      buildSnapshot({ capabilities: ["x-ignore-shared", "mapped-ram"], blocks }),
    );
    expect(layout.blocks[0]).toMatchObject({
      idstr: "shared",
      notSaved: true,
      bitmapLength: 0,
      usedLength: 16384,
    });
    expect(layout.blocks[1]).toMatchObject({ idstr: "pc.ram", notSaved: false, bitmapLength: 8 });
  });
});

describe("RAMBlock records are refused", () => {
  const farAway = 2 ** 40;
  const cases: [string, BuilderSpec, ErrorCode, string][] = [
    [
      "header version 2",
      { corrupt: { "pc.ram.version": 2 } },
      "SNAPSHOT_UNSUPPORTED",
      "pc.ram.version",
    ],
    ["header version 0", { corrupt: { "pc.ram.version": 0 } }, "SNAPSHOT_FORMAT", "pc.ram.version"],
    ["page_size 0", { corrupt: { "pc.ram.pageSize": 0 } }, "SNAPSHOT_FORMAT", "pc.ram.pageSize"],
    [
      "page_size 4097",
      { corrupt: { "pc.ram.pageSize": 4097 } },
      "SNAPSHOT_FORMAT",
      "pc.ram.pageSize",
    ],
    [
      "page_size 2 MiB",
      { corrupt: { "pc.ram.pageSize": 2 ** 21 } },
      "SNAPSHOT_FORMAT",
      "pc.ram.pageSize",
    ],
    [
      "page_size unlike the configuration",
      { targetPageBits: 14 },
      "SNAPSHOT_FORMAT",
      "pc.ram.pageSize",
    ],
    [
      "page_size unlike the block before",
      { corrupt: { "pc.bios.pageSize": 8192 } },
      "SNAPSHOT_FORMAT",
      "pc.bios.pageSize",
    ],
    [
      "used_length 0",
      { corrupt: { "pc.ram.usedLength": 0 } },
      "SNAPSHOT_FORMAT",
      "pc.ram.usedLength",
    ],
    [
      "used_length past the total",
      { corrupt: { "pc.ram.usedLength": farAway } },
      "SNAPSHOT_FORMAT",
      "pc.ram.usedLength",
    ],
    [
      "used_length that is no number of pages",
      { corrupt: { "pc.ram.usedLength": 4095 } },
      "SNAPSHOT_FORMAT",
      "pc.ram.usedLength",
    ],
    [
      "a bitmap inside the header",
      { corrupt: { "pc.ram.bitmapOffset": 8 } },
      "SNAPSHOT_FORMAT",
      "pc.ram.bitmapOffset",
    ],
    [
      "a bitmap past the file",
      { corrupt: { "pc.ram.bitmapOffset": farAway } },
      "SNAPSHOT_FORMAT",
      "pc.ram.bitmapOffset",
    ],
    [
      "pages before the bitmap",
      { corrupt: { "pc.ram.pagesOffset": 0 } },
      "SNAPSHOT_FORMAT",
      "pc.ram.pagesOffset",
    ],
    [
      "pages past the file",
      { corrupt: { "pc.ram.pagesOffset": farAway } },
      "SNAPSHOT_FORMAT",
      "pc.ram.pagesOffset",
    ],
    [
      "unaligned pages",
      { corrupt: { "pc.ram.pagesOffset": 4097 } },
      "SNAPSHOT_FORMAT",
      "pc.ram.pagesOffset",
    ],
    [
      "an offset of 2^63",
      { corrupt: { "pc.ram.pagesOffset": 1n << 63n } },
      "SNAPSHOT_FORMAT",
      "pc.ram.pagesOffset",
    ],
    [
      "an empty name",
      { corrupt: { "pc.ram.name.length": 0 } },
      "SNAPSHOT_FORMAT",
      "pc.ram.name.length",
    ],
    [
      "a total without the flag",
      { corrupt: { "ram.total": 0x11000 } },
      "SNAPSHOT_FORMAT",
      "ram.total",
    ],
    ["a total of 0", { corrupt: { "ram.total": 4 } }, "SNAPSHOT_FORMAT", "ram.total"],
    ["a wrong last word", { corrupt: { "ram.eos": 0x210 } }, "SNAPSHOT_FORMAT", "ram.eos"],
  ];
  test.each(cases)("with %s", (_name, spec, code, field) => {
    const built = buildSnapshot(spec);
    const error = refusalOf(() => parse(built));
    expect(error.code).toBe(code);
    expect(error.details).toMatchObject({ fileOffset: fieldOffset(built, field) });
  });

  test("with a total larger than the blocks", () => {
    const built = buildSnapshot({ corrupt: { "ram.total": 2 ** 30 + 4 } });
    const error = refusalOf(() => parse(built));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.details["fileOffset"]).toBe(fieldOffset(built, "ram.eos"));
  });

  test("with a name twice", () => {
    const blocks = [
      { idstr: "d1", pages: "D" },
      { idstr: "d1", pages: "D" },
    ];
    const error = refusalOf(() => parse(buildSnapshot({ blocks })));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.message).toContain("expected each name once, found d1 again");
  });

  test("with offsets 0 and no x-ignore-shared", () => {
    const corrupt = { "pc.ram.bitmapOffset": 0, "pc.ram.pagesOffset": 0 };
    const error = refusalOf(() => parse(buildSnapshot({ corrupt })));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.message).toContain("offsets 0 without x-ignore-shared");
  });

  test("with pages that lie over the next block", () => {
    const corrupt = { "pc.ram.usedLength": 18 * 4096 };
    expect(refusalOf(() => parse(buildSnapshot({ corrupt }))).code).toBe("SNAPSHOT_FORMAT");
  });

  test("with a block of more than 2^32 pages", () => {
    const corrupt = { "ram.total": 2 ** 45 + 4, "pc.ram.usedLength": 2 ** 45 };
    const error = refusalOf(() => parse(buildSnapshot({ corrupt })));
    expect(error.code).toBe("SNAPSHOT_UNSUPPORTED");
  });

  test("with more blocks than any guest has", () => {
    const blocks = Array.from({ length: 4097 }, (_, index) => ({
      idstr: `b${index}`,
      pages: "D",
      notSaved: true,
    }));
    const error = refusalOf(() =>
      parse(buildSnapshot({ capabilities: ["x-ignore-shared", "mapped-ram"], blocks })),
    );
    expect(error.code).toBe("SNAPSHOT_UNSUPPORTED");
    expect(error.message).toContain("at most 4096 blocks");
  });

  test("and the message says what, expected, found, and where", () => {
    const error = refusalOf(() =>
      parse(buildSnapshot({ corrupt: { "pc.ram.pagesOffset": 0x100000 } })),
    );
    expect(error.message).toBe(
      "RAMBlock pc.ram: pages: truncated or unfinished: expected a file of 0x111000 bytes or more, " +
        "found 0x14511 (test.snap at 0x83); copy or save it again",
    );
    expect(error.details).toEqual({
      path: "test.snap",
      idstr: "pc.ram",
      fileOffset: 0x83,
      expected: 83217,
      found: 0x111000,
    });
  });
});
