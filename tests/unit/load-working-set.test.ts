import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { FslError } from "../../src/errors.ts";
import {
  growWorkingSet,
  identityFits,
  parseWorkingSet,
  planReplay,
  readWorkingSet,
  type WorkingSet,
  writeWorkingSet,
} from "../../src/load/working-set.ts";
import { makeState } from "../helpers/load-states.ts";

const IDENTITY = { size: 4096, mtimeNs: "17", streamOffset: 0 };

function setOf(...pages: readonly number[]): WorkingSet {
  return { identity: IDENTITY, pages: pages.map((pageIndex) => ({ idstr: "block0", pageIndex })) };
}

let folder = "";
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "fsl-working-set-test-"));
});
afterEach(() => {
  rmSync(folder, { recursive: true, force: true });
});

describe("working-set file", () => {
  test("reads what was written, in its order", () => {
    const path = join(folder, "a.fslws");
    const set = {
      identity: IDENTITY,
      pages: [
        { idstr: "pc.ram", pageIndex: 70 },
        { idstr: "ram1", pageIndex: 2 },
        { idstr: "pc.ram", pageIndex: 3 },
      ],
    };
    writeWorkingSet(path, set);
    expect(readWorkingSet(path)).toEqual(set);
  });

  test("is nobody else's to read, and leaves no other file", () => {
    const path = join(folder, "a.fslws");
    writeWorkingSet(path, setOf(1));
    expect(statSync(path).mode & 0o777).toBe(0o600);
    expect(readdirSync(folder)).toEqual(["a.fslws"]);
  });

  test("leaves no file when the folder cannot be written", () => {
    expect(() => writeWorkingSet(join(folder, "no", "a.fslws"), setOf(1))).toThrow();
    expect(readdirSync(folder)).toEqual([]);
  });

  test("is null when it is not there", () => {
    expect(readWorkingSet(join(folder, "none"))).toBeNull();
  });

  test("is refused when it is cut anywhere", () => {
    const path = join(folder, "a.fslws");
    writeWorkingSet(path, setOf(1, 2, 3));
    const bytes = readFileSync(path);
    const codes = Array.from({ length: bytes.length }, (_, length) =>
      codeOf(bytes.subarray(0, length)),
    );
    expect(new Set(codes)).toEqual(new Set(["SNAPSHOT_FORMAT"]));
  });

  test.each([
    ["another version", 7, 2],
    ["a length of JSON that does not fit", 8, 0xff],
    ["a page count that does not fit", 12, 0xff],
    ["JSON that is none", 16, 0x2c],
    ["a block that is not listed", -8, 9],
  ])("is refused with %s", (_what, offset, byte) => {
    const path = join(folder, "a.fslws");
    writeWorkingSet(path, setOf(1, 2, 3));
    const bytes = readFileSync(path);
    bytes[offset < 0 ? bytes.length + offset : offset] = byte;
    expect(codeOf(bytes)).toBe("SNAPSHOT_FORMAT");
  });

  test("is refused before it is read when it is too long", () => {
    const path = join(folder, "a.fslws");
    writeFileSync(path, Buffer.alloc(700_000));
    expect(() => readWorkingSet(path)).toThrow("expected at most");
  });

  test("belongs to one snapshot", () => {
    expect(identityFits(IDENTITY, { ...IDENTITY })).toBeTrue();
    expect(identityFits(IDENTITY, { ...IDENTITY, mtimeNs: "18" })).toBeFalse();
  });
});

function codeOf(bytes: Buffer): string {
  try {
    parseWorkingSet(bytes, "test");
    return "none";
  } catch (error) {
    return error instanceof FslError ? error.code : String(error);
  }
}

describe("working-set.planReplay", () => {
  test("keeps the order and merges neighbours", () => {
    using made = makeState([{ pages: 2048 }]);
    const runs = planReplay(setOf(700, 5, 4, 6, 1500), made.state);
    expect([...runs]).toEqual([0, 700, 1, 0, 4, 3, 0, 1500, 1]);
  });

  test("leaves out pages outside and blocks that are not there, and keeps zero pages apart", () => {
    using made = makeState([{ pages: 1024, data: [[0, 10]] }]);
    const pages = [
      { idstr: "block0", pageIndex: 10 },
      { idstr: "block0", pageIndex: 5000 },
      { idstr: "other", pageIndex: 1 },
      { idstr: "block0", pageIndex: 9 },
      { idstr: "block0", pageIndex: 8 },
      { idstr: "block0", pageIndex: 11 },
    ];
    expect([...planReplay({ pages }, made.state)]).toEqual([0, 10, 1, 0, 8, 2, 0, 11, 1]);
  });

  test("brings huge pages as a whole: a set may be of ordinary memory", () => {
    using made = makeState([{ pages: 2048, hostPageSize: 2 ** 21, data: [[512, 1024]] }]);
    const runs = planReplay(setOf(1, 700, 600, 2, 1600), made.state);
    expect([...runs]).toEqual([0, 1, 0, 0, 700, 0, 0, 1600, 0]);
  });

  test("brings a chunk with many pages as a whole, once", () => {
    using made = makeState([{ pages: 2048 }]);
    const dense = Array.from({ length: 64 }, (_, index) => 520 + 2 * index);
    const runs = planReplay(setOf(1, ...dense, 3), made.state);
    expect([...runs]).toEqual([0, 1, 1, 0, 520, 0, 0, 3, 1]);
  });
});

describe("working-set.growWorkingSet", () => {
  test("takes the fault log as it is the first time", () => {
    using made = makeState([{ pages: 64 }, { pages: 64 }]);
    made.state.faultLog().set([7, 64 + 3, 7]);
    const grown = growWorkingSet(null, IDENTITY, made.state, 3);
    expect(grown?.pages).toEqual([
      { idstr: "block0", pageIndex: 7 },
      { idstr: "block1", pageIndex: 3 },
    ]);
  });

  test("puts what is new behind what is known", () => {
    using made = makeState([{ pages: 64 }]);
    made.state.faultLog().set([1, 10, 11, 12, 13, 14, 15, 16, 17]);
    const grown = growWorkingSet(setOf(1, 2), IDENTITY, made.state, 9);
    expect(grown?.pages.map(({ pageIndex }) => pageIndex)).toEqual([
      1, 2, 10, 11, 12, 13, 14, 15, 16, 17,
    ]);
  });

  test("is not written again for one new page", () => {
    using made = makeState([{ pages: 64 }]);
    made.state.faultLog().set([1, 10]);
    expect(growWorkingSet(setOf(1, 2), IDENTITY, made.state, 2)).toBeNull();
  });

  test("records no further than it is told", () => {
    using made = makeState([{ pages: 64 }]);
    made.state.faultLog().set([4, 5, 6]);
    expect(growWorkingSet(null, IDENTITY, made.state, 1)?.pages).toHaveLength(1);
  });
});
