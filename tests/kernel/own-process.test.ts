/** What fsl does to its own process beside the load: it must leave it as it was. */
import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { rehearseFaults } from "../../src/load/rehearsal.ts";
import * as sys from "../../src/sys/native.ts";
import { releaseProgramText } from "../../src/sys/program-text.ts";

const MiB = 1024 * 1024;

/** Descriptors, without that of the listing itself. */
function descriptors(): number {
  return readdirSync("/proc/self/fd").length;
}

function mappingsOf(name: string): number {
  const lines = readFileSync("/proc/self/maps", "latin1").split("\n");
  return lines.filter((line) => line.includes(name)).length;
}

function fileMemory(): number {
  const kib = /^RssFile:\s+(\d+) kB$/m.exec(readFileSync("/proc/self/status", "latin1"))?.[1];
  return Number(kib) * 1024;
}

describe("rehearse", () => {
  test("serves its faults, and leaves no descriptor and no memory behind", () => {
    sys.load();
    const count = (): number[] => [
      descriptors(),
      mappingsOf("fsl-rehearsal"),
      mappingsOf("fsl-state"),
    ];
    const before = count();
    // All 96 pages with bytes but the twelve that came with faults.
    expect(rehearseFaults()).toEqual({ faults: 8, eagerPages: 84 });
    expect(count()).toEqual(before);
  });
});

describe("releaseProgramText", () => {
  test("gives the code's memory back, and the program goes on", () => {
    const before = fileMemory();
    expect(releaseProgramText()).toBeGreaterThan(10 * MiB);
    const after = fileMemory();
    expect(before - after).toBeGreaterThan(5 * MiB);
    expect(JSON.parse(JSON.stringify({ still: ["here"] }))).toEqual({ still: ["here"] });
  });
});
