/** The parser for all layouts: what is built is what is read; what is cut or damaged is an FslError. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import fc from "fast-check";
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { isFslError } from "../../src/errors.ts";
import { PageBitmap } from "../../src/snapshot/page-bitmap.ts";
import { planSeed, writeSeed } from "../../src/snapshot/seed.ts";
import { openSnapshot, parseSnapshot, readPageBitmap } from "../../src/snapshot/snapshot.ts";
import {
  buildSnapshot,
  CountingSource,
  type BuilderBlock,
  type BuilderDevice,
  type BuilderSpec,
  type BuilderState,
  type BuiltSnapshot,
} from "../helpers/snapshot-builder.ts";

const SEED = Number(process.env["FSL_SEED"] ?? Date.now() % 1_000_000_000);
console.log(`property seed ${SEED} (FSL_SEED=${SEED} repeats it)`);
// A loaded machine may be ten times slower.
setDefaultTimeout(60_000);
fc.configureGlobal({ seed: SEED, includeErrorInReport: true });

// -- layouts ------------------------------------------------------------------------------------

const name = fc.stringMatching(/^[a-zA-Z0-9:./@_-]{1,40}$/);
const pages = fc
  .array(fc.tuple(fc.constantFrom("D", ".", "S"), fc.integer({ min: 1, max: 20 })), {
    minLength: 1,
    maxLength: 6,
  })
  .map((runs) => runs.map(([letter, count]) => letter.repeat(count)).join(""));

const fields = fc.array(
  fc.oneof(
    fc.integer({ min: 0, max: 40 }),
    fc.tuple(fc.integer({ min: 1, max: 8 }), fc.integer({ min: 0, max: 9 })),
  ),
  { maxLength: 4 },
);
const leaf: fc.Arbitrary<BuilderState> = fc.record({ fields });
const state: fc.Arbitrary<BuilderState> = fc.record({
  fields,
  subsections: fc.array(
    fc.tuple(name, leaf).map(([subsection, inner]) => ({ name: subsection, ...inner })),
    { maxLength: 2 },
  ),
});

const device: fc.Arbitrary<BuilderDevice> = fc.record({
  name: name.filter((text) => text !== "globalstate" && text !== "ram"),
  instanceId: fc.integer({ min: 0, max: 5 }),
  version: fc.integer({ min: 0, max: 99 }),
  early: fc.boolean(),
  state,
});

function layouts(options: { withSwitches: boolean }): fc.Arbitrary<BuilderSpec> {
  const blocks = fc.uniqueArray(
    fc.record({ idstr: name, pages, guestPhysicalAddr: fc.nat(), notSaved: fc.boolean() }),
    { minLength: 1, maxLength: 5, selector: (block) => block.idstr },
  );
  return fc
    .record({
      streamOffset: fc.constantFrom(0, 0, 1, 4097),
      machineType: name,
      withSharing: fc.boolean(),
      uuid: fc.option(
        fc.array(fc.integer({ min: 0, max: 255 }), { minLength: 16, maxLength: 16 }),
        {
          nil: undefined,
        },
      ),
      blocks,
      pagesAlignment: fc.constantFrom(4096, 8192, 65536),
      parts: fc.integer({ min: 0, max: 4 }),
      switchoverCommand: fc.boolean(),
      devices: fc.array(device, { maxLength: 4 }),
      runState: fc.constantFrom("running", "paused", null),
      vmdescription: options.withSwitches ? fc.boolean() : fc.constant(true),
    })
    .map(({ withSharing, blocks: drawn, uuid, vmdescription, devices, ...rest }) => ({
      ...rest,
      ...(uuid === undefined ? {} : { uuid }),
      vmdescription,
      capabilities: withSharing ? ["x-ignore-shared", "mapped-ram"] : ["mapped-ram"],
      blocks: drawn.map((block) => ({ ...block, notSaved: withSharing && block.notSaved })),
      // Without a description an early device cannot be passed.
      devices: devices.map((each) => ({ ...each, early: vmdescription && each.early === true })),
    }));
}

function parse(built: BuiltSnapshot, spec: BuilderSpec) {
  return parseSnapshot(new CountingSource(built.bytes), { offset: spec.streamOffset ?? 0 });
}

/** What the parser must say of the blocks, from the builder's account. */
function expectedBlocks(spec: BuilderSpec, built: BuiltSnapshot): object[] {
  return built.blocks.map(
    ({ idstr, usedLength, headerOffset, bitmapOffset, pagesOffset }, index) => {
      const drawn: BuilderBlock | undefined = spec.blocks?.[index];
      const notSaved = drawn?.notSaved === true;
      const guestPhysicalAddr =
        spec.capabilities?.length === 2 ? (drawn?.guestPhysicalAddr ?? 0) : null;
      return {
        idstr,
        usedLength,
        headerOffset,
        bitmapOffset,
        pagesOffset,
        notSaved,
        guestPhysicalAddr,
      };
    },
  );
}

// -- properties ---------------------------------------------------------------------------------

describe("for all layouts", () => {
  test("the blocks that are built are the blocks that are read", () => {
    fc.assert(
      fc.property(layouts({ withSwitches: true }), (spec) => {
        const built = buildSnapshot(spec);
        const layout = parse(built, spec);
        const wanted = expectedBlocks(spec, built);
        expect(layout.blocks).toMatchObject(wanted);
        expect(layout.blocks.length).toBe(wanted.length);
        expect(layout.machineType).toBe(spec.machineType ?? "");
      }),
      { numRuns: 300 },
    );
  });

  test("every bitmap has the bits of its pages", () => {
    fc.assert(
      fc.property(layouts({ withSwitches: true }), (spec) => {
        const built = buildSnapshot(spec);
        const source = new CountingSource(built.bytes);
        for (const [index, block] of parse(built, spec).blocks.entries()) {
          if (block.notSaved) continue;
          const bitmap = readPageBitmap(source, block);
          const letters = [...(built.blocks[index]?.pages ?? "")];
          expect(letters.map((_, page) => (bitmap.has(page) ? "D" : "."))).toEqual(
            letters.map((letter) => (letter === "D" ? "D" : ".")),
          );
        }
      }),
      { numRuns: 100 },
    );
  });

  test("sections follow one another without a gap, devices in their order", () => {
    fc.assert(
      fc.property(layouts({ withSwitches: false }), (spec) => {
        const built = buildSnapshot(spec);
        const layout = parse(built, spec);
        let offset = layout.sections[0]?.fileOffset ?? -1;
        for (const section of layout.sections) {
          expect(section.fileOffset).toBe(offset);
          offset += section.length;
        }
        expect(offset).toBe(layout.vmdescription?.eofOffset ?? -1);
        const drawn = spec.devices ?? [];
        const names = [
          ...drawn.filter((each) => each.early),
          ...drawn.filter((each) => !each.early),
        ];
        const found = layout.sections
          .filter(({ kind }) => kind === "full")
          .map((each) => each.name);
        expect(found.filter((each) => each !== "globalstate")).toEqual(
          names.map((each) => each.name),
        );
      }),
      { numRuns: 150 },
    );
  });

  test("only metadata is read", () => {
    fc.assert(
      fc.property(layouts({ withSwitches: true }), (spec) => {
        const built = buildSnapshot(spec);
        const source = new CountingSource(built.bytes);
        const layout = parseSnapshot(source, { offset: spec.streamOffset ?? 0 });
        const sections = layout.sections.length + (spec.devices?.length ?? 0);
        expect(source.reads).toBeLessThan(20 + 3 * (layout.blocks.length + sections));
      }),
      { numRuns: 100 },
    );
  });
});

describe("for all bitmaps", () => {
  const bits = fc.tuple(
    fc.array(fc.tuple(fc.boolean(), fc.integer({ min: 1, max: 90 })), { maxLength: 12 }),
    fc.integer({ min: 0, max: 255 }),
  );

  function draw([runs, tail]: readonly [readonly (readonly [boolean, number])[], number]): {
    bitmap: PageBitmap;
    letters: boolean[];
  } {
    const letters = runs.flatMap(([bit, count]) => Array<boolean>(count).fill(bit));
    const bytes = new Uint8Array(Math.ceil(letters.length / 64) * 8);
    letters.forEach((bit, page) => {
      if (bit) bytes[page >> 3] = (bytes[page >> 3] ?? 0) | (1 << (page & 7));
    });
    // Whatever stands behind the last page must not matter.
    for (let page = letters.length; page < bytes.length * 8; page++) {
      if ((tail >> (page & 7)) & 1) bytes[page >> 3] = (bytes[page >> 3] ?? 0) | (1 << (page & 7));
    }
    return { bitmap: new PageBitmap(bytes, letters.length), letters };
  }

  /** Run by run, page by page. */
  function naiveRun(letters: readonly boolean[], fromIndex: number, bit: boolean): object | null {
    const startIndex = letters.findIndex((each, page) => page >= fromIndex && each === bit);
    if (startIndex < 0) return null;
    const endIndex = letters.findIndex((each, page) => page > startIndex && each !== bit);
    return { startIndex, endIndex: endIndex < 0 ? letters.length : endIndex };
  }

  test("runs and counts are those of a naive loop, from every page", () => {
    fc.assert(
      fc.property(bits, (drawn) => {
        const { bitmap, letters } = draw(drawn);
        expect(bitmap.dataPages).toBe(letters.filter(Boolean).length);
        for (let from = 0; from <= letters.length; from += 1 + (from % 7)) {
          expect(bitmap.nextDataRun(from)).toEqual(naiveRun(letters, from, true) as never);
          expect(bitmap.nextZeroRun(from)).toEqual(naiveRun(letters, from, false) as never);
        }
      }),
      { numRuns: 200 },
    );
  });

  test("data runs and zero runs together cover every page once", () => {
    fc.assert(
      fc.property(bits, (drawn) => {
        const { bitmap, letters } = draw(drawn);
        const seen: (boolean | undefined)[] = Array.from({ length: letters.length });
        for (const [bit, next] of [
          [true, "nextDataRun"],
          [false, "nextZeroRun"],
        ] as const) {
          for (let run = bitmap[next](0); run !== null; run = bitmap[next](run.endIndex)) {
            for (let page = run.startIndex; page < run.endIndex; page++) seen[page] = bit;
          }
        }
        expect(seen).toEqual(letters);
      }),
      { numRuns: 200 },
    );
  });
});

describe("damage", () => {
  /** Parses; the only thing that may be thrown is an FslError about the file. */
  function mustRefuse(bytes: Uint8Array, offset: number): void {
    try {
      const layout = parseSnapshot(new CountingSource(bytes), { offset });
      // A cut behind a footer and a zero byte looks like a file saved with suppress-vmdesc=on; it is marked as such.
      if (!layout.isVerifiedComplete && bytes.at(-1) === 0 && bytes.at(-6) === 0x7e) return;
    } catch (error) {
      if (isFslError(error) && error.code.startsWith("SNAPSHOT_")) {
        expect(error.details["fileOffset"]).toBeNumber();
        return;
      }
      throw error;
    }
    throw new Error("a damaged file was accepted");
  }

  test("a file cut at the edge of any field, and beside it, is refused", () => {
    fc.assert(
      fc.property(layouts({ withSwitches: true }), (spec) => {
        const built = buildSnapshot(spec);
        for (const { offset, size } of built.fields.values()) {
          for (const cut of [offset - 1, offset, offset + 1, offset + size]) {
            if (cut <= 0 || cut >= built.bytes.length) continue;
            mustRefuse(built.bytes.subarray(0, cut), spec.streamOffset ?? 0);
          }
        }
      }),
      { numRuns: 60 },
    );
  });

  test("a small file cut at every byte is refused", () => {
    const blocks = [{ idstr: "pc.ram", pages: "D" }];
    const built = buildSnapshot({ blocks });
    for (let cut = 0; cut < built.bytes.length; cut++) mustRefuse(built.bytes.subarray(0, cut), 0);
  });

  test("bytes behind the end are refused", () => {
    const built = buildSnapshot();
    for (const extra of [0x00, 0x20, 0x7d, 0xff]) {
      const longer = new Uint8Array(built.bytes.length + 1).fill(extra);
      longer.set(built.bytes);
      mustRefuse(longer, 0);
    }
  });

  test("absurd values in any field are refused or change nothing that matters", () => {
    const absurd = [
      0n,
      1n,
      0x7fn,
      0xffn,
      0xffffn,
      0x7fffffffn,
      0xffffffffn,
      2n ** 53n,
      2n ** 63n - 1n,
    ];
    fc.assert(
      fc.property(
        layouts({ withSwitches: true }),
        fc.nat(),
        fc.constantFrom(...absurd),
        (spec, pick, value) => {
          const numbers = [...buildSnapshot(spec).fields].filter(
            ([, { size }]) => size <= 8 && size > 0,
          );
          const [field] = numbers[pick % numbers.length] ?? ["magic"];
          const built = buildSnapshot({ ...spec, corrupt: { [field]: value } });
          const source = new CountingSource(built.bytes);
          try {
            const layout = parseSnapshot(source, { offset: spec.streamOffset ?? 0 });
            for (const block of layout.blocks) {
              if (!block.notSaved) readPageBitmap(source, block);
              expect(block.pagesOffset + (block.notSaved ? 0 : block.usedLength)).toBeLessThan(
                built.bytes.length,
              );
            }
          } catch (error) {
            if (!isFslError(error)) throw error;
          }
          expect(source.reads).toBeLessThan(500);
          expect(source.bytesRead).toBeLessThan(4 * built.bytes.length + 1_000_000);
        },
      ),
      { numRuns: 1000 },
    );
  });
});

describe("for all layouts and all choices of lazy blocks", () => {
  let directory = "";
  beforeAll(() => {
    directory = mkdtempSync(join(tmpdir(), "fsl-seed-property-"));
  });
  afterAll(() => rmSync(directory, { recursive: true }));

  test("the seed is the snapshot, but for lazy bitmaps and pages, which are zero", () => {
    fc.assert(
      fc.property(layouts({ withSwitches: true }), fc.nat(), (spec, choice) => {
        const built = buildSnapshot(spec);
        const path = join(directory, "a.snap");
        writeFileSync(path, built.bytes);
        using snapshot = openSnapshot(path, { offset: spec.streamOffset ?? 0 });
        const lazy = new Set(
          built.blocks.filter((_, index) => (choice >> index) & 1).map((block) => block.idstr),
        );
        const seedPath = join(directory, "a.seed");
        const fd = openSync(seedPath, "w");
        const plan = planSeed(snapshot, lazy);
        try {
          writeSeed(plan, snapshot.fd, fd);
        } finally {
          closeSync(fd);
        }
        const seed = readFileSync(seedPath);
        expect(seed.length).toBe(built.bytes.length);
        checkSeed(seed, spec, built, lazy);
        // The seed is itself a snapshot, with the same places and empty lazy blocks.
        using again = openSnapshot(seedPath, { offset: spec.streamOffset ?? 0 });
        expect(again.blocks).toEqual(snapshot.blocks as never);
        for (const block of again.blocks) {
          if (block.notSaved) continue;
          const before = snapshot.pageBitmap(block).dataPages;
          expect(again.pageBitmap(block).dataPages).toBe(lazy.has(block.idstr) ? 0 : before);
        }
      }),
      { numRuns: 100 },
    );
  });

  /** Every byte that QEMU reads, in one array of expectations: from the snapshot, zero, or of no matter. */
  function checkSeed(
    seed: Uint8Array,
    spec: BuilderSpec,
    built: BuiltSnapshot,
    lazy: ReadonlySet<string>,
  ): void {
    const wanted = Uint8Array.from(built.bytes);
    const doesNotMatter = new Uint8Array(built.bytes.length);
    wanted.fill(0, 0, spec.streamOffset ?? 0);
    built.blocks.forEach((block, index) => {
      if (spec.blocks?.[index]?.notSaved === true) return;
      const pagesEnd = block.pagesOffset + block.usedLength;
      if (lazy.has(block.idstr)) {
        wanted.fill(0, block.bitmapOffset, pagesEnd);
        return;
      }
      [...block.pages].forEach((letter, page) => {
        if (letter === "D") return;
        const offset = block.pagesOffset + page * 4096;
        doesNotMatter.fill(1, offset, offset + 4096);
      });
    });
    const firstWrong = seed.findIndex(
      (byte, offset) => byte !== wanted[offset] && doesNotMatter[offset] === 0,
    );
    expect(firstWrong).toBe(-1);
  }
});
