/**
 * Runs the test tiers in order: `bun scripts/test.ts [TIER …] [--soak] [--name PATTERN]`. Ends with
 * the plain line `N passed, N failed, N skipped`.
 *
 * A tier that cannot run here is skipped, and its reason is printed; so is a test that needs KVM, or what this
 * kernel has not.
 * FSL_REQUIRE=kernel,e2e,fault,kvm turns such a skip into a failure. A tier that runs no test at
 * all has failed. So has one that leaves processes behind.
 */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { isRequired, whyNoGuests } from "../tests/helpers/guests.ts";
import { printChecks, runChecks } from "./check.ts";

const ROOT = join(import.meta.dir, "..");
const MARK = "FSL_TEST_RUN";

interface Tier {
  readonly name: string;
  /** Why it cannot run here, or null. */
  readonly missing: () => string | null;
  /** Limit of one test that sets none itself, and of the whole tier. */
  readonly testSeconds: number;
  readonly tierSeconds: number;
}

interface Counts {
  passed: number;
  failed: number;
  skipped: number;
}

function whyNoUserfaultfd(): string | null {
  const setting = "/proc/sys/vm/unprivileged_userfaultfd";
  if (!existsSync(setting)) return "this kernel has no userfaultfd";
  if (process.getuid?.() === 0) return null;
  if (readFileSync(setting, "utf8").trim() === "1") return null;
  return "userfaultfd needs root here; run the tests as root";
}

function whyNoExecutable(): string | null {
  return existsSync(join(ROOT, "dist/fsl")) ? null : "dist/fsl is not there; run: npm run build";
}

const whyNoEnd2End = (): string | null => whyNoUserfaultfd() ?? whyNoGuests() ?? whyNoExecutable();

const TIERS: readonly Tier[] = [
  { name: "check", missing: () => null, testSeconds: 60, tierSeconds: 60 },
  { name: "unit", missing: () => null, testSeconds: 10, tierSeconds: 120 },
  { name: "property", missing: () => null, testSeconds: 60, tierSeconds: 180 },
  { name: "kernel", missing: whyNoUserfaultfd, testSeconds: 30, tierSeconds: 180 },
  { name: "e2e", missing: whyNoEnd2End, testSeconds: 120, tierSeconds: 900 },
  { name: "fault", missing: whyNoEnd2End, testSeconds: 120, tierSeconds: 600 },
];

/** Runs only with --soak. */
const SOAK: Tier = { name: "soak", missing: whyNoEnd2End, testSeconds: 1800, tierSeconds: 7200 };

// -- processes left behind ------------------------------------------------------------------------

/** Processes, not this one's children only, whose environment says that they come from this run. */
function marked(mark: string): { pid: number; name: string }[] {
  return readdirSync("/proc")
    .filter((entry) => /^\d+$/.test(entry) && Number(entry) !== process.pid)
    .flatMap((entry) => {
      try {
        const environment = readFileSync(`/proc/${entry}/environ`, "latin1").split("\0");
        if (!environment.includes(`${MARK}=${mark}`)) return [];
        return [{ pid: Number(entry), name: readFileSync(`/proc/${entry}/comm`, "utf8").trim() }];
      } catch {
        return []; // It has ended meanwhile, or it is somebody else's.
      }
    });
}

/** Waits until the run's processes are gone; ends those that stay, and says which they were. */
async function endLeftovers(mark: string): Promise<string[]> {
  const deadline = performance.now() + 2000;
  let left = marked(mark);
  while (left.length > 0 && performance.now() < deadline) {
    // A killed process needs a moment until it is reaped; nobody tells a stranger.
    await Bun.sleep(20);
    left = marked(mark);
  }
  for (const { pid } of left) process.kill(pid, "SIGKILL");
  return left.map(({ pid, name }) => `${name} (pid ${pid}) was left running`);
}

// -- running a tier -------------------------------------------------------------------------------

/**
 * The counts of a JUnit report: attributes of its root element, and the names of the skipped tests.
 */
function readReport(path: string): Counts & { skippedNames: string[] } {
  const empty = { passed: 0, failed: 0, skipped: 0, skippedNames: [] };
  if (!existsSync(path)) return empty;
  const xml = readFileSync(path, "utf8");
  const root = /<testsuites[^>]*>/.exec(xml)?.[0] ?? "";
  const attribute = (name: string): number =>
    Number(new RegExp(`\\b${name}="(\\d+)"`).exec(root)?.[1] ?? 0);
  const failed = attribute("failures") + attribute("errors");
  const skipped = attribute("skipped");
  const skippedTest = /<testcase name="([^"]*)"[^>]*>\s*<skipped/g;
  const skippedNames = [...xml.matchAll(skippedTest)].map(([, name]) => name ?? "");
  return { passed: attribute("tests") - failed - skipped, failed, skipped, skippedNames };
}

/** Lines in front of a failed test's name that belong to it, at most. */
const FAILURE_LINES = 60;

/** What was printed of the tests that failed: told again at the end, where it is looked for. */
const failures: string[] = [];

/** A failure that no test stands for. */
function fail(tier: Tier, problem: string): void {
  const line = `FAILED: ${tier.name}: ${problem}`;
  console.log(line);
  failures.push(line);
}

/** Passes on what `bun test` prints on stderr, and keeps what it says of failed tests. */
async function passOn(output: ReadableStream<Uint8Array>, tier: Tier): Promise<void> {
  const decoder = new TextDecoder();
  let lines: string[] = [];
  let rest = "";
  for await (const bytes of output) {
    process.stderr.write(bytes);
    const whole = (rest + decoder.decode(bytes, { stream: true })).split("\n");
    rest = whole.pop() ?? "";
    for (const line of whole) {
      const [, result] = /^(\((?:pass|fail|skip|todo)\)|[✓✗»✎]) /.exec(Bun.stripANSI(line)) ?? [];
      if (result === undefined) {
        lines.push(line);
        continue;
      }
      // At its end it may name those that failed once more itself.
      const isKnown = failures.some((failure) => failure.includes(line));
      if ((result === "(fail)" || result === "✗") && !isKnown) {
        const told = [...lines.slice(-FAILURE_LINES), line].join("\n");
        failures.push(`${told}\n  (tier ${tier.name})`);
      }
      lines = [];
    }
  }
}

async function runTests(tier: Tier, options: readonly string[]): Promise<Counts> {
  const folder = join(ROOT, "tests", tier.name);
  const hasTests =
    existsSync(folder) &&
    readdirSync(folder, { recursive: true, encoding: "utf8" }).some((name) =>
      name.endsWith(".test.ts"),
    );
  if (!hasTests) return { passed: 0, failed: 0, skipped: 0 };
  const directory = mkdtempSync(join(tmpdir(), "fsl-tier-"));
  const report = join(directory, "junit.xml");
  const mark = `${tier.name}-${process.pid}-${Date.now()}`;
  const timeout = ["--timeout", String(tier.testSeconds * 1000)];
  const reporter = ["--reporter=junit", `--reporter-outfile=${report}`];
  const child = Bun.spawn(
    [process.execPath, "test", `./tests/${tier.name}/`, ...timeout, ...reporter, ...options],
    {
      cwd: ROOT,
      env: { ...process.env, [MARK]: mark },
      stdin: "ignore",
      stdout: "inherit",
      stderr: "pipe",
      timeout: tier.tierSeconds * 1000,
      killSignal: "SIGKILL",
    },
  );
  const passedOn = passOn(child.stderr, tier);
  const exitCode = await child.exited;
  const { skippedNames, ...counts } = readReport(report);
  rmSync(directory, { recursive: true, force: true });
  for (const name of skippedNames) console.log(`skipped: ${tier.name}: ${name}`);
  const problems = await endLeftovers(mark);
  await passedOn; // Behind the leftovers, which may hold the pipe open.
  // A file that cannot be loaded, an error between tests, or a limit reached: no test case stands
  // for it.
  if (child.signalCode !== null) problems.push(`ended by ${child.signalCode}`);
  else if (exitCode !== 0 && counts.failed === 0) problems.push(`bun test ended with ${exitCode}`);
  for (const problem of problems) fail(tier, problem);
  counts.failed += problems.length;
  return counts;
}

async function runCheckTier(): Promise<Counts> {
  const results = await runChecks();
  printChecks(results);
  const failed = results.filter(({ problems }) => problems.length > 0).length;
  return { passed: results.length - failed, failed, skipped: 0 };
}

async function runTier(tier: Tier, options: readonly string[]): Promise<Counts> {
  const reason = tier.missing();
  if (reason !== null) {
    const required = isRequired(tier.name);
    if (required) fail(tier, reason);
    else console.log(`skipped: ${tier.name}: ${reason}`);
    return { passed: 0, failed: required ? 1 : 0, skipped: required ? 0 : 1 };
  }
  const counts = tier.name === "check" ? await runCheckTier() : await runTests(tier, options);
  if (counts.passed + counts.failed === 0) {
    fail(tier, "no test ran");
    counts.failed++;
  }
  return counts;
}

// -- main -----------------------------------------------------------------------------------------

const { values, positionals: wanted } = parseArgs({
  allowPositionals: true,
  options: { soak: { type: "boolean", default: false }, name: { type: "string" } },
});
const { soak: isSoak, name: pattern } = values;
const available = isSoak ? [...TIERS, SOAK] : TIERS;
for (const name of wanted) {
  if (available.some((tier) => tier.name === name)) continue;
  console.error(`test: no tier "${name}": ${available.map((tier) => tier.name).join(", ")}`);
  process.exit(2);
}
if (isSoak) process.env.FSL_SOAK = "1";

const options = pattern === undefined ? [] : ["--test-name-pattern", pattern];
const total: Counts = { passed: 0, failed: 0, skipped: 0 };
const summary: string[] = [];
for (const tier of available.filter(({ name }) => wanted.length === 0 || wanted.includes(name))) {
  console.log(`\n== ${tier.name}`);
  const start = performance.now();
  const counts = await runTier(tier, options);
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  const { passed, failed, skipped } = counts;
  summary.push(
    `${tier.name.padEnd(9)} passed ${passed}, failed ${failed}, skipped ${skipped} in ${seconds} s`,
  );
  total.passed += passed;
  total.failed += failed;
  total.skipped += skipped;
}
if (failures.length > 0) console.log(`\n== what failed\n\n${failures.join("\n\n")}`);
console.log(`\n${summary.join("\n")}\n`);
console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);
process.exitCode = total.failed > 0 ? 1 : 0;
