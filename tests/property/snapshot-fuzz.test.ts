import { expect, test } from "bun:test";

import { fuzzSnapshots } from "./snapshot-fuzz.ts";

const SEED = Number(process.env["FSL_SEED"] ?? Date.now() % 1_000_000_000);

test(
  "damaged snapshots of QEMU are refused or parsed, and nothing else",
  () => {
    console.log(`fuzz seed ${SEED} (FSL_SEED=${SEED} repeats it)`);
    const report = fuzzSnapshots(4000, SEED);
    expect(report.failures).toEqual([]);
    // Mutations that reach nothing would prove nothing.
    expect(Object.keys(report.outcomes).length).toBeGreaterThan(2);
    expect(report.refusals).toBeGreaterThan(60);
  },
  { timeout: 120_000 },
);
