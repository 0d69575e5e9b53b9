import { describe, expect, test } from "bun:test";
import { mkdirSync, mkdtempSync, realpathSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { ArgsDef } from "citty";
import {
  byteSize,
  checkArguments,
  socketPath,
  splitAtDashes,
  wholeNumber,
} from "../../src/cli/arguments.ts";
import { formatBytes, formatMs, formatTable } from "../../src/cli/format.ts";
import { workingSet } from "../../src/cli/load.ts";
import { exitCodeOf } from "../../src/cli/serve.ts";
import { FslError } from "../../src/errors.ts";

function usageError(act: () => unknown): string {
  try {
    act();
  } catch (error) {
    if (error instanceof FslError && error.code === "USAGE") return error.message;
    throw error;
  }
  throw new Error("was not refused");
}

const args = {
  snapshot: { type: "positional", required: true },
  quiet: { type: "boolean", alias: "q" },
  rate: { type: "string" },
} satisfies ArgsDef;

describe("arguments.splitAtDashes", () => {
  test.each([
    [["a", "--", "b", "--", "c"], { own: ["a"], behind: ["b", "--", "c"] }],
    [["a", "b"], { own: ["a", "b"], behind: null }],
    [["--"], { own: [], behind: [] }],
    [[], { own: [], behind: null }],
  ])("splits %j", (argv, expected) => {
    expect(splitAtDashes(argv)).toEqual(expected);
  });
});

describe("arguments.checkArguments", () => {
  test.each([
    [["snap"]],
    [["snap", "-q", "--rate", "5"]],
    [["--rate=5", "snap", "--quiet"]],
    [["snap", "--help"]],
  ])("takes %j", (own) => {
    checkArguments(own, args);
  });

  test.each([
    [["snap", "--nope"], "Unknown option '--nope'"],
    [["snap", "-x"], "Unknown option '-x'"],
    [["snap", "other"], "unexpected argument 'other'"],
    [["snap", "--rate"], "Option '--rate <value>' argument missing"],
    [["snap", "--quiet=yes"], "Option '-q, --quiet' does not take an argument"],
  ])("refuses %j", (own, message) => {
    expect(usageError(() => checkArguments(own, args))).toBe(message);
  });
});

describe("arguments.wholeNumber", () => {
  test.each([
    ["1", 1],
    ["8", 8],
    ["007", 7],
  ])("reads %s", (text, value) => {
    expect(wholeNumber(text, "n", 1, 8)).toBe(value);
  });

  test.each(["0", "9", "-1", "1.5", "", " 1", "1e0", "0x1", "١", "99999999999999999999"])(
    "refuses '%s'",
    (text) => {
      expect(usageError(() => wholeNumber(text, "n", 1, 8))).toBe(
        `--n: expected 1..8, found '${text}'`,
      );
    },
  );
});

describe("arguments.byteSize", () => {
  test.each([
    ["0", 0],
    ["4096", 4096],
    ["64K", 65536],
    ["1m", 1048576],
    ["1MiB", 1048576],
    ["2G", 2 ** 31],
    ["1T", 2 ** 40],
    ["0x1000", 4096],
  ])("reads %s", (text, bytes) => {
    expect(byteSize(text, "rate")).toBe(bytes);
  });

  test.each([
    ["a/qmp.sock", "a/qmp.sock"],
    ["unix:/run/vm.qmp,server=on,wait=off", "/run/vm.qmp"],
    ["unix:vm.qmp", "vm.qmp"],
  ])("takes the socket %s for %s", (text, path) => {
    expect(socketPath(text)).toBe(path);
  });

  test("has the default working set beside the file itself, and none where that is no place", () => {
    const folder = mkdtempSync(join(tmpdir(), "fsl-cli-"));
    try {
      writeFileSync(join(folder, "vm.snap"), "");
      mkdirSync(join(folder, "links"));
      const link = join(folder, "links", "latest.snap");
      symlinkSync("../vm.snap", link);
      const beside = { workingSet: join(realpathSync(folder), "vm.snap.fslws") };
      expect(workingSet(undefined, link)).toEqual(beside);
      expect(workingSet(undefined, "/dev/null")).toEqual({});
      expect(workingSet(undefined, join(folder, "none.snap"))).toEqual({});
      expect(workingSet("none", link)).toEqual({});
      expect(workingSet("own.fslws", link)).toEqual({ workingSet: "own.fslws" });
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  test.each(["", "K", "1X", "1.5M", "-1", "1 M", "0x", "9999999999999T", "1e6"])(
    "refuses '%s'",
    (text) => {
      expect(usageError(() => byteSize(text, "rate"))).toBe(
        `--rate: expected a size such as 512K or 100M, found '${text}'`,
      );
    },
  );
});

describe("format", () => {
  test.each([
    [0, "0 bytes"],
    [1023, "1023 bytes"],
    [1024, "1 KiB"],
    [1536, "1.50 KiB"],
    [41.4 * 2 ** 20, "41.4 MiB"],
    [2 ** 50, "1024 TiB"],
  ])("says %d bytes as %s", (bytes, text) => {
    expect(formatBytes(bytes)).toBe(text);
  });

  test.each([
    [0.04, "0.0 ms"],
    [9.96, "10.0 ms"],
    [123.4, "123 ms"],
    [1240, "1.24 s"],
  ])("says %d ms as %s", (ms, text) => {
    expect(formatMs(ms)).toBe(text);
  });

  test("aligns a table's columns by what is seen of them", () => {
    expect(
      formatTable(
        [
          ["é", "1"],
          ["abc", "22"],
        ],
        [1],
      ),
    ).toBe("é     1\nabc  22");
  });
});

describe("serve.exitCodeOf", () => {
  test.each([
    [{ exitCode: 0, signal: null }, false, 0],
    [{ exitCode: 1, signal: null }, false, 1],
    [{ exitCode: null, signal: "SIGKILL" }, false, 137],
    [{ exitCode: null, signal: "SIGTERM" }, false, 143],
    [{ exitCode: null, signal: "SIGSEGV" }, false, 139],
    [{ exitCode: null, signal: "SIGKILL" }, true, 9],
  ] as const)("turns %j, supply failed %s, into %d", (exit, supplyFailed, code) => {
    expect(exitCodeOf(exit, supplyFailed)).toBe(code);
  });
});

/** Runs the command line from source. */
function fsl(...argv: readonly string[]): { code: number; stdout: string; stderr: string } {
  const main = join(import.meta.dir, "../../src/cli/main.ts");
  const done = Bun.spawnSync([process.execPath, main, ...argv], {
    env: { ...process.env, NO_COLOR: "" },
    stdin: "ignore",
  });
  return { code: done.exitCode, stdout: done.stdout.toString(), stderr: done.stderr.toString() };
}

/** Without the padding at the ends of lines. */
const trimmed = (text: string): string => text.replace(/[ ]+$/gm, "").trimEnd();

describe("fsl --help", () => {
  test("shows the commands on stdout, plain when it is no terminal", () => {
    const { code, stdout, stderr } = fsl("--help");
    expect([code, stderr, stdout.includes("\u001b")]).toEqual([0, "", false]);
    expect(trimmed(stdout)).toMatchSnapshot();
  });

  test.each(["load", "resume", "status"])(
    "shows every flag of %s with its unit and default",
    (command) => {
      const { code, stdout, stderr } = fsl(command, "--help");
      expect([code, stderr, stdout.includes("\u001b")]).toEqual([0, "", false]);
      expect(trimmed(stdout)).toMatchSnapshot();
    },
  );

  test("says on stderr what there is when no command is named, and fails", () => {
    const { code, stdout, stderr } = fsl();
    expect([code, stdout]).toEqual([2, ""]);
    expect(stderr).toContain("COMMANDS");
  });

  test("prints the version of package.json", () => {
    expect(fsl("--version")).toEqual({ code: 0, stdout: "0.1.0\n", stderr: "" });
  });

  test.each([
    [["nosuch"], /unknown command 'nosuch', expected one of load, /],
    [["load"], /Missing required positional argument: SNAPSHOT/],
    [["load", "--", "qemu"], /Missing required positional argument: SNAPSHOT/],
    [["load", "a.snap"], /no QEMU command line: expected it behind --, found none/],
    [["load", "a.snap", "--"], /no QEMU command line/],
    [["load", "a.snap", "--qmp", "sock", "--", "qemu"], /--qmp .*: nothing is to follow behind --/],
    [["load", "a.snap", "--pid", "1", "--", "qemu"], /--pid goes with --qmp only/],
    [["load", "a.snap", "--qmp", "sock", "--pid", "0"], /--pid: expected 1\.\.4194304, found '0'/],
    [["load", "a.snap", "--detach"], /no QEMU command line/],
    [["load", "a.snap", "b.snap", "--", "qemu"], /unexpected argument 'b.snap'/],
    [["load", "a.snap", "--nope", "--", "qemu"], /Unknown option '--nope'/],
    [["load", "a.snap", "--mode", "fast", "--", "qemu"], /--mode \(fast\).*lazy, copy/],
    [["load", "a.snap", "--eager-workers", "9", "--", "qemu"], /--eager-workers: expected 1\.\.8/],
    [["load", "a.snap", "--eager-rate", "fast", "--", "qemu"], /--eager-rate: expected a size/],
    [["load", "a.snap", "--offset", "-1", "--", "qemu"], /--offset/],
    [["load", "a.snap", "--grace-ms", "soon", "--", "qemu"], /--grace-ms: expected 0\.\.3600000/],
    [["inspect", "a.snap", "--", "qemu"], /'fsl inspect' takes nothing behind --/],
  ])("refuses %j with exit code 2", (argv, message) => {
    const { code, stdout, stderr } = fsl(...argv);
    expect(stderr).toMatch(message);
    expect([code, stdout]).toEqual([2, ""]);
  });
});
