import { describe, expect, test } from "bun:test";
import packageJson from "../../package.json";
import { bugReport } from "../../src/cli/bug.ts";
import { FslError } from "../../src/errors.ts";

const FIRST = `fsl: a bug in fsl ${packageJson.version}, please report it with these lines and the command:`;

describe("bugReport", () => {
  test("asks for a report, then says the error and where it was thrown", () => {
    const lines = bugReport(new TypeError("no such thing")).split("\n");
    expect(lines.slice(0, 2)).toEqual([FIRST, "fsl: TypeError: no such thing"]);
    expect(lines[2]).toMatch(/^ +at .*cli-bug\.test\.ts:\d+:\d+/);
  });

  test("says what an error was caused by", () => {
    const cause = new Error("deeper", { cause: new RangeError("deepest") });
    const lines = bugReport(new FslError("INTERNAL", "no plan", {}, cause)).split("\n");
    expect(lines.slice(0, 4)).toEqual([
      FIRST,
      "fsl: FslError: no plan",
      "fsl: because of Error: deeper",
      "fsl: because of RangeError: deepest",
    ]);
  });

  test("shows no code that came with a stack, and no endless stack", () => {
    const error = new Error("first line\nsecond line");
    const frames = Array.from(
      { length: 100 },
      (_, at) => `    at f${at} (/$bunfs/root/fsl:1:${at})`,
    );
    error.stack = ["Error: first line", "1 | var a=1,b=2;", "        ^", ...frames].join("\n");
    const report = bugReport(error);
    expect(report).not.toContain("var a=1");
    expect(report.split("\n").length).toBeLessThan(20);
  });

  test("takes what is no error at all", () => {
    expect(bugReport("a text")).toBe(`${FIRST}\nfsl: a text`);
  });
});
