/**
 * The big fuzz: the cases of tests/property/snapshot-fuzz.test.ts by the million, in as many
 * processes as there are CPUs. It ends after FUZZ_MS at the latest, and says how far it came.
 */
import { expect, test } from "bun:test";
import { availableParallelism } from "node:os";
import { join } from "node:path";

const PROGRAM = join(import.meta.dir, "../property/snapshot-fuzz.ts");
const SEED = Number(process.env["FSL_SEED"] ?? Date.now() % 1_000_000_000);
const CASES = 2_000_000;
/** A batch takes half a minute; one that does not end in ten times that hangs. */
const BATCH_CASES = 40_000;
const BATCH_MS_MAX = 300_000;
const FUZZ_MS = 2_400_000;
/** A machine that has not done so many in that time is of no use for this. */
const CASES_MIN = 200_000;

/** @returns what it printed if a case failed, or if it did not come to its end; else empty */
async function runBatch(seed: number): Promise<string> {
  const argv = [process.execPath, PROGRAM, "--cases", String(BATCH_CASES), "--seed", String(seed)];
  const child = Bun.spawn(argv, {
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
    timeout: BATCH_MS_MAX,
    killSignal: "SIGKILL",
  });
  const [stdout, stderr] = await Promise.all([child.stdout.text(), child.stderr.text()]);
  const code = await child.exited;
  const isWhole = code === 0 && stdout.includes(`seed ${seed}: ${BATCH_CASES} cases`);
  return isWhole ? "" : `seed ${seed} ended with ${child.signalCode ?? code}: ${stdout}${stderr}`;
}

test(
  "damaged snapshots of QEMU, two million of them, are refused or parsed, and nothing else",
  async () => {
    const endMs = performance.now() + FUZZ_MS;
    const failures: string[] = [];
    let begun = 0;
    let done = 0;
    const work = async (): Promise<void> => {
      while (begun < CASES && performance.now() < endMs && failures.length === 0) {
        const seed = SEED + begun;
        begun += BATCH_CASES;
        const failure = await runBatch(seed);
        if (failure !== "") failures.push(failure);
        else done += BATCH_CASES;
      }
    };
    await Promise.all(Array.from({ length: availableParallelism() }, work));
    console.log(`fuzz seed ${SEED} (FSL_SEED=${SEED} repeats it): ${done} cases`);
    expect(failures).toEqual([]);
    expect(done).toBeGreaterThanOrEqual(CASES_MIN);
  },
  FUZZ_MS + BATCH_MS_MAX + 60_000,
);
