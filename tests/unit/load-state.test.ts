import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { closeSync, fstatSync, ftruncateSync, openSync, readSync, writeSync } from "node:fs";
import { FslError } from "../../src/errors.ts";
import { setRange, testBit } from "../../src/bits.ts";
import { LoadState, PHASE_ARMED, PHASE_RUNNING, WORKERS_MAX } from "../../src/load/state.ts";
import { MFD_CLOEXEC } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { BASE, makeState, PAGE } from "../helpers/load-states.ts";

let made: ReturnType<typeof makeState>;
/** What is adopted: the state itself, or a copy of it. */
let stateFd: number;
beforeEach(() => {
  made = makeState([{ pages: 100, data: [[3, 7]] }, { pages: 65 }], { canDiscard: true });
  stateFd = made.fd;
});
afterEach(() => {
  if (stateFd !== made.fd) closeSync(stateFd);
  made[Symbol.dispose]();
});

function adopt(takeOver = true): LoadState {
  return LoadState.adopt(stateFd, fstatSync(stateFd).size, takeOver);
}

/** A copy that is as long as it is made: the state itself is sealed. */
function resized(by: (length: number) => number): void {
  const { size } = fstatSync(made.fd);
  const bytes = new Uint8Array(size);
  const fd = openSync(`/proc/self/fd/${made.fd}`, "r");
  readSync(fd, bytes, 0, size, 0);
  closeSync(fd);
  stateFd = sys.check(sys.memfdCreate("fsl-test", MFD_CLOEXEC), "memfd_create");
  writeSync(stateFd, bytes);
  ftruncateSync(stateFd, by(size));
}

/** Overwrites 32-bit words of the file. */
function write(offset: number, ...words: readonly number[]): void {
  const fd = openSync(`/proc/self/fd/${made.fd}`, "r+");
  writeSync(fd, new Int32Array(words), 0, words.length * 4, offset);
  closeSync(fd);
}

function refusal(): FslError {
  try {
    adopt().unmap();
  } catch (error) {
    if (error instanceof FslError) return error;
    throw error;
  }
  throw new Error("was not refused");
}

function replaceMetadata(text: string): void {
  const bytes = new TextEncoder().encode(text);
  const fd = openSync(`/proc/self/fd/${made.fd}`, "r+");
  writeSync(fd, bytes, 0, bytes.length, 0x1000);
  closeSync(fd);
  write(8, bytes.length);
}

function metadata(): Record<string, unknown> {
  const bytes = new Uint8Array(0x10000);
  const length = new Int32Array(1);
  const fd = openSync(`/proc/self/fd/${made.fd}`, "r");
  readSync(fd, new Uint8Array(length.buffer), 0, 4, 8);
  readSync(fd, bytes, 0, bytes.length, 0x1000);
  closeSync(fd);
  return JSON.parse(new TextDecoder().decode(bytes.subarray(0, length[0] ?? 0))) as Record<
    string,
    unknown
  >;
}

describe("LoadState.adopt", () => {
  test("finds everything that the first fsl left", () => {
    const { state } = made;
    setRange(state.blocks[1]?.done ?? new Int32Array(0), 64, 65);
    state.phase = PHASE_RUNNING;
    state.eventCount = 5;
    state.counters(3)[2] = 42;
    const adopted = adopt();
    expect(adopted.metadata).toEqual(state.metadata);
    expect([adopted.phase, adopted.eventCount, adopted.counters(3)[2]]).toEqual([
      PHASE_RUNNING,
      5,
      42,
    ]);
    const [first, second] = adopted.blocks;
    expect([2, 3, 6, 7].map((page) => testBit(first?.data ?? new Int32Array(4), page))).toEqual([
      false,
      true,
      true,
      false,
    ]);
    expect(testBit(second?.done ?? new Int32Array(4), 64)).toBe(true);
    adopted.unmap();
  });

  test("lets go of what dead Workers held", () => {
    const { state } = made;
    state.enterCopy(4);
    state.closeGate();
    state.stop();
    const adopted = adopt();
    expect([adopted.copiesInFlight, adopted.stopped, adopted.enterCopy(1)]).toEqual([
      false,
      false,
      true,
    ]);
    adopted.unmap();
  });

  test("only looks when it is not to take over", () => {
    made.state.stop();
    adopt(false).unmap();
    expect(made.state.stopped).toBe(true);
  });

  test.each<[string, () => void, RegExp]>([
    ["an empty file", () => resized(() => 0), /expected at least \d+ bytes, found 0/],
    ["a file that was cut", () => resized((length) => length - PAGE), /do not fit|found/],
    ["a longer file", () => resized((length) => length + PAGE), /do not fit/],
    ["another magic", () => write(0, 0x31313131), /magic 0x314c5346 version \d+, found 0x31313131/],
    ["another version", () => write(4, 99), /found 0x314c5346 version 99/],
    ["metadata of no length", () => write(8, 0), /metadata of 0 bytes/],
    ["metadata of a negative length", () => write(8, -1), /metadata of -1 bytes/],
    ["metadata longer than its place", () => write(8, 0x10001), /metadata of 65537 bytes/],
    ["metadata that is cut", () => write(8, 20), /metadata/],
    ["metadata that is no object", () => replaceMetadata("7"), /metadata|load state/],
    ["metadata that is null", () => replaceMetadata("null"), /metadata|load state/],
    ["metadata without blocks", () => replaceMetadata("{}"), /metadata|load state/],
    [
      "blocks that are no blocks",
      () => replaceMetadata(JSON.stringify({ ...metadata(), blocks: [1, null] })),
      /metadata|load state/,
    ],
    [
      "a block with pages of no length",
      () => {
        const text = JSON.stringify(metadata()).replaceAll('"pageSize":4096', '"pageSize":0');
        replaceMetadata(text);
      },
      /metadata|load state/,
    ],
    ...(
      [
        ["a pid that is none", { pid: -1 }],
        ["a control path that is none", { controlPath: "run/qmp" }],
        ["a control path that is a number", { controlPath: 7 }],
        ["no word of who ends with whom", { endsWithFsl: 1 }],
      ] as const
    ).map(([what, target]): [string, () => void, RegExp] => [
      `a target with ${what}`,
      () => {
        const { target: before, ...rest } = metadata() as { target: object };
        replaceMetadata(JSON.stringify({ ...rest, target: { ...before, ...target } }));
      },
      /metadata is damaged/,
    ]),
    ...(
      [
        ["no place of the snapshot", { snapshotPath: "snap" }],
        ["no source", { source: "file:///tmp/evil.js" }],
        ["no word of what is watched", { watched: null }],
        ["ranges of no length", { registered: [BASE, BASE] }],
        ["half a range", { registered: [BASE] }],
        ["a range before its block", { registered: [BASE - PAGE, BASE + PAGE] }],
        ["a range beyond its block", { registered: [BASE, BASE + 101 * PAGE] }],
        ["a range that is cut across a page", { registered: [BASE, BASE + 100] }],
        ["a range of no address", { registered: [BASE, "x"] }],
      ] as const
    ).map(([what, change]): [string, () => void, RegExp] => [
      what,
      () => replaceMetadata(JSON.stringify({ ...metadata(), ...change })),
      /metadata is damaged/,
    ]),
    [
      "blocks of absurd lengths",
      () => {
        const text = JSON.stringify(metadata()).replaceAll(
          `"usedLength":${100 * PAGE}`,
          '"usedLength":1e300',
        );
        replaceMetadata(text);
      },
      /load state/,
    ],
  ])("refuses %s", (_, damage, message) => {
    damage();
    const error = refusal();
    expect(error.message).toMatch(message);
    expect(error.code).toBe("TARGET_LOST");
  });
});

describe("LoadState", () => {
  test("begins armed, with nothing done", () => {
    const { state } = made;
    expect([state.phase, state.eventCount, state.faultLogLength, state.failedPages]).toEqual([
      PHASE_ARMED,
      0,
      0,
      0,
    ]);
    expect(state.blocks.map(({ done }) => done.every((word) => word === 0))).toEqual([true, true]);
  });

  test("numbers pages through all blocks", () => {
    expect(made.state.blocks.map(({ firstPage, pageCount }) => [firstPage, pageCount])).toEqual([
      [0, 100],
      [100, 65],
    ]);
  });

  test("keeps the bitmaps and counters of all Workers apart", () => {
    const { state } = made;
    const views = state.blocks.flatMap(({ data, done }) => [data, done] as ArrayBufferView[]);
    for (let worker = 0; worker < WORKERS_MAX; worker += 1) views.push(state.counters(worker));
    views.push(state.faultLog(), state.eventsView());
    const places = views
      .map(({ byteOffset, byteLength }) => [byteOffset, byteOffset + byteLength] as const)
      .toSorted(([a], [b]) => a - b);
    const overlaps = places.filter(([start], index) => start < (places[index - 1]?.[1] ?? 0));
    expect(overlaps).toEqual([]);
  });

  test("lets one side of the gate through at a time", () => {
    const { state } = made;
    expect(state.enterCopy(1)).toBe(true);
    state.closeGate();
    expect([state.enterCopy(2), state.copiesInFlight]).toEqual([false, true]);
    state.leaveCopy(1);
    expect(state.copiesInFlight).toBe(false);
    state.openGate();
    expect(state.enterCopy(2)).toBe(true);
  });

  test("hands out each chunk once", () => {
    const { state } = made;
    expect([state.takeChunk(), state.takeChunk(), state.takeChunk()]).toEqual([0, 1, 2]);
    state.resetChunks();
    expect(state.takeChunk()).toBe(0);
  });

  test("says which page could last not be read", () => {
    const { state } = made;
    expect(state.lastFailure).toBeNull();
    state.lastFailure = { idstr: "block1", pageIndex: 3, errno: 5 };
    expect(state.lastFailure).toMatchObject({ idstr: "block1", pageIndex: 3, errno: 5 });
    expect(state.lastFailure?.fileOffset).toBe(0x10_0000 + 2 ** 32 + 3 * PAGE);
  });

  test("can be described anew, for whoever finds it", () => {
    using made = makeState([{ pages: 64 }]);
    const { state, fd } = made;
    const metadata = { ...state.metadata, target: { ...state.metadata.target, pid: 4711 } };
    state.describe(metadata);
    expect(state.handle.metadata).toBe(metadata);
    const found = LoadState.adopt(fd, fstatSync(fd).size, false);
    expect(found.metadata).toEqual(metadata);
    found.unmap();
  });

  test("is the same memory for a Worker that attaches", () => {
    const attached = LoadState.attach(made.state.handle);
    attached.stop();
    expect(made.state.stopped).toBe(true);
    expect(attached.blocks[0]?.block.hostAddr).toBe(BASE);
  });
});
