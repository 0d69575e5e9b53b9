/** Real files of QEMU 10.0.2 held against what QEMU said of itself (tests/fixtures/README.md). */
import { describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";

import { planSeed } from "../../src/snapshot/seed.ts";
import { parseSnapshot, readPageBitmap, type SnapshotLayout } from "../../src/snapshot/snapshot.ts";
import { CountingSource, refusalOf } from "../helpers/snapshot-builder.ts";

interface Facts {
  readonly machineType: string;
  readonly fileLength: number;
  readonly blocks: readonly {
    readonly idstr: string;
    readonly usedLength: number;
    readonly headerOffset: number;
    readonly bitmapOffset: number;
    readonly pagesOffset: number;
    readonly dataPages: number;
    readonly stalePages: number;
  }[];
  readonly devices: readonly object[];
}

const DIRECTORY = join(import.meta.dir, "../fixtures");

function load(name: string): { source: CountingSource; facts: Facts } {
  const packed = readFileSync(join(DIRECTORY, `${name}.snap.zst`));
  const facts = JSON.parse(readFileSync(join(DIRECTORY, `${name}.json`), "utf8")) as Facts;
  return { source: new CountingSource(Bun.zstdDecompressSync(packed), name), facts };
}

function parse(
  name: string,
  offset?: number,
): { layout: SnapshotLayout; source: CountingSource; facts: Facts } {
  const { source, facts } = load(name);
  return { layout: parseSnapshot(source, offset === undefined ? {} : { offset }), source, facts };
}

const COMPLETE: [string, number][] = [
  ["pc", 0],
  ["q35", 0],
  ["microvm", 0],
  ["pc-9.2", 0],
  ["multifd", 0],
  ["all-pages", 0],
  ["offset-4097", 4097],
  ["x-ignore-shared", 0],
  ["validate-uuid", 0],
  ["virtio-mem", 0],
  ["stale-pages", 0],
  ["fdset", 0],
];

describe.each(COMPLETE)("snapshot %s of QEMU 10.0.2", (name, offset) => {
  test("has the machine, the length and the blocks that QEMU says", () => {
    const { layout, source, facts } = parse(name, offset);
    expect(layout.machineType).toBe(facts.machineType);
    expect(layout.fileLength).toBe(facts.fileLength);
    const blocks = layout.blocks.map((block) => {
      const { idstr, usedLength, headerOffset, bitmapOffset, pagesOffset } = block;
      const { dataPages } = readPageBitmap(source, block);
      return { idstr, usedLength, headerOffset, bitmapOffset, pagesOffset, dataPages };
    });
    // Stale pages are nothing that a parser can see.
    expect(blocks.map((block, index) => ({ ...facts.blocks[index], ...block }))).toEqual([
      ...facts.blocks,
    ]);
    expect(facts.blocks).toMatchObject(blocks);
  });

  test("has the device sections that QEMU's description lists", () => {
    const { layout, facts } = parse(name, offset);
    const devices = layout.sections
      .filter((section) => section.kind === "full")
      .map((section) => ({
        name: section.name,
        instanceId: section.instanceId,
        version: section.version,
      }));
    expect(devices).toEqual(facts.devices as typeof devices);
    expect(layout.isVerifiedComplete).toBe(true);
  });

  test("is opened with few reads, and seeded with little more than its device state", () => {
    const { layout, source } = parse(name, offset);
    expect(source.reads).toBeLessThan(25);
    const lazy = new Set(layout.blocks.map((block) => block.idstr));
    const plan = planSeed(
      { ...layout, pageBitmap: (block) => readPageBitmap(source, block) },
      lazy,
    );
    const tailLength = layout.fileLength - layout.tailOffset;
    expect(plan.copyLength).toBeLessThan(tailLength + 1024);
  });
});

describe("snapshot variants of QEMU 10.0.2", () => {
  test("all-pages has every bit set", () => {
    const { layout, source } = parse("all-pages");
    for (const block of layout.blocks) {
      expect(readPageBitmap(source, block).nextZeroRun(0)).toBeNull();
    }
  });

  test("offset-4097 is not found at offset 0", () => {
    const error = refusalOf(() => parse("offset-4097", 0));
    expect(error.message).toContain("not a QEMU migration stream");
  });

  test("suppress-vmdesc has blocks and run state, and is not verified", () => {
    const { layout, facts } = parse("suppress-vmdesc");
    expect(layout.blocks.map((block) => block.idstr)).toEqual(
      facts.blocks.map((block) => block.idstr),
    );
    expect(layout.isVerifiedComplete).toBe(false);
    expect(layout.globalState?.runState).toBe("paused");
  });

  test("background-snapshot is refused: it has no bitmaps", () => {
    const error = refusalOf(() => parse("background-snapshot"));
    expect(error.code).toBe("SNAPSHOT_UNSUPPORTED");
    expect(error.message).toContain("background-snapshot");
  });

  test("x-ignore-shared has addresses and both capabilities", () => {
    const { layout } = parse("x-ignore-shared");
    expect(layout.capabilities).toEqual(["x-ignore-shared", "mapped-ram"]);
    expect(layout.blocks.every((block) => block.guestPhysicalAddr !== null)).toBe(true);
  });

  test("validate-uuid has the uuid", () => {
    expect(parse("validate-uuid").layout.uuid).toBe("00112233-4455-6677-8899-aabbccddeeff");
  });

  test("virtio-mem has its early section right behind RAM START", () => {
    const section = parse("virtio-mem").layout.sections[1];
    expect(section?.kind).toBe("full");
    expect(section?.name).toEndWith("/virtio-mem-device-early");
  });

  test("stale-pages has clear bits over pages that the file still holds", () => {
    const { layout, facts } = parse("stale-pages");
    expect(facts.blocks[0]?.stalePages).toBeGreaterThan(40);
    expect(layout.globalState?.runState).toBe("running");
  });

  test("pc was saved paused, with its SWITCHOVER_START command; 9.2 has none", () => {
    const { layout } = parse("pc");
    expect(layout.globalState?.runState).toBe("paused");
    expect(layout.sections.some((section) => section.command === 11)).toBe(true);
    expect(parse("pc-9.2").layout.sections.some((section) => section.kind === "command")).toBe(
      false,
    );
  });
});
