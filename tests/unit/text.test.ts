/** Text from elsewhere, as it is printed. */
import { describe, expect, test } from "bun:test";
import { formatTable } from "../../src/cli/format.ts";
import { FslError } from "../../src/errors.ts";
import { printable, printableLines } from "../../src/text.ts";

describe("printable", () => {
  test.each([
    ["pc.ram", "pc.ram"],
    ["größe → 日本 🙂", "größe → 日本 🙂"],
    ["\u001b[2J\u0007", "\\x1b[2J\\x07"],
    ["a\r\nfsl: all is well", "a\\x0d\\x0afsl: all is well"],
    ["\u009b31m\u007f\u0000", "\\x9b31m\\x7f\\x00"],
    ["snap\u202egnp.exe\u2066\u2028", "snap\\u202egnp.exe\\u2066\\u2028"],
  ])("shows %j", (text, expected) => {
    expect(printable(text)).toBe(expected);
  });

  test("leaves the breaks of lines to text of many", () => {
    const xml = "<domain>\n\t<name>\u001b]0;x\u0007</name>\r\n</domain>";
    expect(printableLines(xml)).toBe("<domain>\n\t<name>\\x1b]0;x\\x07</name>\\x0d\n</domain>");
  });
});

describe("what is printed", () => {
  test("of an error is one line that a terminal does not obey", () => {
    const state = "run\u001b[8mning\n";
    expect(new FslError("TARGET_MISMATCH", `found ${state}`, { state })).toMatchObject({
      message: "found run\\x1b[8mning\\x0a",
      details: { state },
    });
  });

  test("in a table keeps its columns", () => {
    const rows = [
      ["a\u001b[1m", "x"],
      ["b", "y\n"],
    ];
    expect(formatTable(rows)).toBe("a\\x1b[1m  x\nb         y\\x0a");
  });
});
