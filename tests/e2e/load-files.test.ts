/** Files that the user names by mistake: nothing of theirs is written over, nothing hangs. */
import { afterAll, describe, expect, test } from "bun:test";
import {
  copyFileSync,
  existsSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import { FSL, FslRun, until, whyNoExecutable } from "../helpers/load-runs.ts";

const TIMEOUT_MS = 60_000;
const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;
const folder = mkdtempSync(join(tmpdir(), "fsl-load-files-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const SPEC = { guest: "bare" } as const;

/** A snapshot that may be destroyed. */
async function ownSnapshot(): Promise<string> {
  const path = join(folder, "own.snap");
  copyFileSync((await snapshotOf(SPEC)).path, path);
  return path;
}

function load(...args: readonly string[]): { code: number; stderr: string } {
  const { exitCode, stderr } = Bun.spawnSync([FSL, "load", ...args], { timeout: 20_000 });
  return { code: exitCode, stderr: stderr.toString() };
}

describe.skipIf(skip)("a file that is named by mistake", () => {
  test.each([
    ["--working-set", "the snapshot"],
    ["--report", "the snapshot"],
  ])(
    "%s: %s is refused and left as it is",
    async (flag, found) => {
      const path = await ownSnapshot();
      const before = statSync(path);
      const link = join(folder, `link${flag}`);
      symlinkSync(path, link);
      for (const name of [path, link]) {
        const { code, stderr } = load(path, flag, name, "--", "qemu-system-x86_64");
        expect([code, stderr]).toEqual([
          2,
          expect.stringContaining(`${flag}: expected a file of its`),
        ]);
        expect(stderr).toContain(`found ${found}`);
      }
      expect([statSync(path).size, statSync(path).mtimeMs]).toEqual([before.size, before.mtimeMs]);
    },
    TIMEOUT_MS,
  );

  test("--working-set: a FIFO, a directory and a device are refused", async () => {
    const fifo = join(folder, "fifo");
    expect(Bun.spawnSync(["mkfifo", fifo]).exitCode).toBe(0);
    for (const path of [fifo, folder, "/dev/null"]) {
      const { code, stderr } = load("a.snap", "--working-set", path, "--", "qemu-system-x86_64");
      expect([code, stderr]).toEqual([2, expect.stringContaining("found no regular file")]);
    }
    expect(statSync("/dev/null").isCharacterDevice()).toBe(true);
  });

  test(
    "--working-set: somebody else's file is neither used nor written over",
    async () => {
      const path = join(folder, "important.txt");
      writeFileSync(path, "what nobody has a copy of\n");
      const snapshot = await snapshotOf(SPEC);
      await using run = await FslRun.start(snapshot, { flags: ["--working-set", path] });
      await run.complete();
      expect(run.stderr.text).toContain("found something else; it is left alone; not used");
      expect(readFileSync(path, "utf8")).toBe("what nobody has a copy of\n");
    },
    TIMEOUT_MS,
  );

  test(
    "--report: is its owner's alone, whatever the umask, and a load that fails leaves none",
    async () => {
      const report = join(folder, "fresh.json");
      const before = process.umask(0);
      try {
        load("/nonexistent", "--report", report, "--", "qemu-system-x86_64");
        expect(existsSync(report)).toBe(false);
        await using run = await FslRun.start(await snapshotOf({ guest: "bare" }));
        await until(() => (existsSync(run.reportPath) ? true : null), TIMEOUT_MS, "the report");
        expect(statSync(run.reportPath).mode & 0o777).toBe(0o600);
      } finally {
        process.umask(before);
      }
    },
    TIMEOUT_MS,
  );

  test("--report: an earlier one is not emptied by a load that fails", () => {
    const report = join(folder, "report.json");
    writeFileSync(report, "{}");
    const { code } = load("/nonexistent", "--report", report, "--", "qemu-system-x86_64");
    expect([code, readFileSync(report, "utf8")]).toEqual([3, "{}"]);
  });

  test("--report and --working-set want a file each", () => {
    const both = join(folder, "both");
    const flags = ["--report", both, "--working-set", both];
    const { code, stderr } = load("a.snap", ...flags, "--", "qemu-system-x86_64");
    expect([code, stderr]).toEqual([2, expect.stringContaining("found the working set")]);
  });

  test.each([
    [["", "--", "true"], "expected an argument, found ''"],
    [["a.snap", "--working-set", "", "--", "true"], "--working-set: expected a value, found ''"],
    [["a.snap", "qemu", "-M", "q35"], "QEMU's own command line stands behind --"],
  ])("%j says what is missing", (args, message) => {
    const { code, stderr } = load(...args);
    expect([code, stderr]).toEqual([2, expect.stringContaining(message)]);
    expect(stderr).toContain("try 'fsl load --help'");
  });

  test.each([
    ["/etc/passwd", "is not executable"],
    ["/etc", "is a directory"],
    ["/nonexistent/qemu", "does not exist"],
    ["no-such-qemu", "was not found in PATH"],
  ])("program %s %s", async (program, message) => {
    const { code, stderr } = load((await snapshotOf(SPEC)).path, "--", program);
    expect([code, stderr]).toEqual([2, expect.stringContaining(`"${program}" ${message}`)]);
  });
});
