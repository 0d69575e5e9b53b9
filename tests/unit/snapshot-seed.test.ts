import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import {
  closeSync,
  fstatSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { planSeed, writeSeed } from "../../src/snapshot/seed.ts";
import { openSnapshot } from "../../src/snapshot/snapshot.ts";
import {
  buildSnapshot,
  fieldOffset,
  refusalOf,
  type BuilderSpec,
  type BuiltSnapshot,
} from "../helpers/snapshot-builder.ts";

let directory = "";
beforeAll(() => {
  directory = mkdtempSync(join(tmpdir(), "fsl-seed-"));
});
afterAll(() => rmSync(directory, { recursive: true }));

const spec: BuilderSpec = {
  blocks: [
    { idstr: "pc.ram", pages: `DD..S${".".repeat(40)}D` },
    { idstr: "pc.bios", pages: `D.D${"S".repeat(40)}D` },
  ],
};

function seedOf(built: BuiltSnapshot, lazyIdstrs: readonly string[], offset = 0): Uint8Array {
  const path = join(directory, "a.snap");
  const seedPath = join(directory, "a.seed");
  writeFileSync(path, built.bytes);
  using snapshot = openSnapshot(path, { offset });
  const fd = openSync(seedPath, "w+");
  try {
    writeSeed(planSeed(snapshot, new Set(lazyIdstrs)), snapshot.fd, fd);
  } finally {
    closeSync(fd);
  }
  return readFileSync(seedPath);
}

function isZero(bytes: Uint8Array): boolean {
  return bytes.every((byte) => byte === 0);
}

describe("planSeed", () => {
  test("copies everything but bitmap and pages of the lazy block", () => {
    const built = buildSnapshot(spec);
    const seed = seedOf(built, ["pc.ram"]);
    const bitmapOffset = fieldOffset(built, "pc.ram.bitmap");
    const pagesEnd = (built.blocks[0]?.pagesOffset ?? 0) + (built.blocks[0]?.usedLength ?? 0);
    expect(seed.length).toBe(built.bytes.length);
    expect(seed.subarray(0, bitmapOffset)).toEqual(
      Buffer.from(built.bytes.subarray(0, bitmapOffset)),
    );
    expect(isZero(seed.subarray(bitmapOffset, pagesEnd))).toBe(true);
    const record = fieldOffset(built, "pc.bios.name.length");
    const biosPages = built.blocks[1]?.pagesOffset ?? 0;
    expect(seed.subarray(record, biosPages)).toEqual(
      Buffer.from(built.bytes.subarray(record, biosPages)),
    );
    expect(seed.at(biosPages)).toBe(built.bytes[biosPages] ?? -1);
  });

  test("copies no stale bytes farther than a gap from data", () => {
    const built = buildSnapshot(spec);
    const seed = seedOf(built, ["pc.ram"]);
    const biosPages = built.blocks[1]?.pagesOffset ?? 0;
    expect(isZero(seed.subarray(biosPages + 3 * 4096, biosPages + 43 * 4096))).toBe(true);
    expect(isZero(seed.subarray(biosPages + 43 * 4096, biosPages + 44 * 4096))).toBe(false);
  });

  test("copies the tail of the stream byte for byte", () => {
    const built = buildSnapshot(spec);
    const seed = seedOf(built, ["pc.ram", "pc.bios"]);
    const tail = fieldOffset(built, "ram.eos");
    expect(seed.subarray(tail)).toEqual(Buffer.from(built.bytes.subarray(tail)));
  });

  test("keeps offsets, and leaves out what stands before the stream", () => {
    const built = buildSnapshot({ ...spec, streamOffset: 5000 });
    const seed = seedOf(built, ["pc.ram"], 5000);
    expect(isZero(seed.subarray(0, 5000))).toBe(true);
    expect(seed.subarray(5000, 5008)).toEqual(Buffer.from(built.bytes.subarray(5000, 5008)));
  });

  test("keeps the records of blocks that were not saved", () => {
    const blocks = [
      { idstr: "a", pages: "DD", notSaved: true },
      { idstr: "pc.ram", pages: "D" },
      { idstr: "z", pages: "DD", notSaved: true },
    ];
    const built = buildSnapshot({ capabilities: ["x-ignore-shared", "mapped-ram"], blocks });
    expect(seedOf(built, [])).toEqual(Buffer.from(built.bytes));
  });

  test("reads no bitmap of a lazy block", () => {
    writeFileSync(join(directory, "b.snap"), buildSnapshot(spec).bytes);
    using snapshot = openSnapshot(join(directory, "b.snap"));
    const asked: string[] = [];
    const source = {
      blocks: snapshot.blocks,
      streamOffset: 0,
      fileLength: snapshot.fileLength,
      pageBitmap: (block: (typeof snapshot.blocks)[number]) => {
        asked.push(block.idstr);
        return snapshot.pageBitmap(block);
      },
    };
    planSeed(source, new Set(["pc.ram"]));
    expect(asked).toEqual(["pc.bios"]);
  });

  test("is an assertion failure for a name that the snapshot does not have", () => {
    writeFileSync(join(directory, "b.snap"), buildSnapshot(spec).bytes);
    using snapshot = openSnapshot(join(directory, "b.snap"));
    expect(() => planSeed(snapshot, new Set(["ram"]))).toThrow("lazy block ram is in the snapshot");
  });
});

describe("writeSeed", () => {
  test("drops what the file held, leaves holes, and leaves the position at 0", () => {
    const built = buildSnapshot({ ...spec, pagesAlignment: 1024 * 1024 });
    const path = join(directory, "c.snap");
    const seedPath = join(directory, "c.seed");
    writeFileSync(path, built.bytes);
    writeFileSync(seedPath, new Uint8Array(5_000_000).fill(0x55));
    using snapshot = openSnapshot(path);
    const fd = openSync(seedPath, "r+");
    try {
      writeSeed(planSeed(snapshot, new Set(["pc.ram", "pc.bios"])), snapshot.fd, fd);
      const stat = fstatSync(fd);
      expect(stat.size).toBe(built.bytes.length);
      expect(stat.blocks * 512).toBeLessThan(200_000);
      const head = new Uint8Array(4);
      readSync(fd, head, 0, 4, null);
      expect([...head]).toEqual([0x51, 0x45, 0x56, 0x4d]);
    } finally {
      closeSync(fd);
    }
  });

  test("copies a piece larger than its buffer", () => {
    const built = buildSnapshot({ blocks: [{ idstr: "big", pages: "D".repeat(300) }] });
    expect(seedOf(built, [])).toEqual(Buffer.from(built.bytes));
  });

  test("says so when the snapshot became shorter", () => {
    const path = join(directory, "d.snap");
    writeFileSync(path, buildSnapshot(spec).bytes);
    using snapshot = openSnapshot(path);
    const plan = planSeed(snapshot, new Set());
    truncateSync(path, 1000);
    const fd = openSync(join(directory, "d.seed"), "w");
    try {
      const error = refusalOf(() => writeSeed(plan, snapshot.fd, fd));
      expect(error.code).toBe("SNAPSHOT_FORMAT");
      expect(error.details["fileOffset"]).toBe(1000);
    } finally {
      closeSync(fd);
    }
  });

  test("names the system's reason when the seed cannot be written", () => {
    const path = join(directory, "e.snap");
    writeFileSync(path, buildSnapshot(spec).bytes);
    using snapshot = openSnapshot(path);
    const fd = openSync(path, "r");
    try {
      const error = refusalOf(() => writeSeed(planSeed(snapshot, new Set()), snapshot.fd, fd));
      expect(error.code).toBe("HOST_UNSUPPORTED");
      expect(error.details["reason"]).toBe("EINVAL");
    } finally {
      closeSync(fd);
    }
  });
});
