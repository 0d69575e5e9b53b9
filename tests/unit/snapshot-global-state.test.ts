import { describe, expect, test } from "bun:test";

import { encodeRunState } from "../../src/snapshot/global-state.ts";
import { parseSnapshot } from "../../src/snapshot/snapshot.ts";
import {
  buildSnapshot,
  CountingSource,
  fieldOffset,
  refusalOf,
  type BuiltSnapshot,
} from "../helpers/snapshot-builder.ts";

function parse(built: BuiltSnapshot) {
  return parseSnapshot(new CountingSource(built.bytes));
}

describe("run state", () => {
  test.each(["running", "paused", "postmigrate"])("%s is found in globalstate", (runState) => {
    const built = buildSnapshot({ runState });
    expect(parse(built).globalState).toEqual({
      runState,
      sizeOffset: fieldOffset(built, "runState.size"),
      nameOffset: fieldOffset(built, "runState.name"),
      nameLength: 32,
    });
  });

  test.each([0, 1, 33, 0xffffffff])("with a size of %i is refused", (size) => {
    const built = buildSnapshot({ corrupt: { "runState.size": size } });
    const error = refusalOf(() => parse(built));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.details["fileOffset"]).toBe(fieldOffset(built, "runState.size"));
  });
});

describe("encodeRunState", () => {
  test("makes it another one, and nothing else", () => {
    const built = buildSnapshot({ runState: "finish-migrate" });
    const before = parse(built).globalState;
    if (before === null) throw new Error("no run state");
    const bytes = encodeRunState(before, "running");
    const changed = { ...built, bytes: Uint8Array.from(built.bytes) };
    changed.bytes.set(bytes, before.sizeOffset);
    expect(parse(changed).globalState).toEqual({ ...before, runState: "running" });
    const differing = [...changed.bytes.keys()].filter(
      (at) => changed.bytes[at] !== built.bytes[at],
    );
    expect(differing.at(0)).toBe(before.sizeOffset + 3);
    expect(differing.at(-1)).toBeLessThan(before.nameOffset + before.nameLength);
  });
});

describe("a globalstate of another layout", () => {
  test("that is too short for a name gives no run state", () => {
    const devices = [{ name: "globalstate", state: { fields: [35] } }];
    expect(parse(buildSnapshot({ devices, runState: null })).globalState).toBeNull();
  });
});
