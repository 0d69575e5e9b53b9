/** docs/guests.md says what the tests show: each of its rows is a test, and each test a row. */
import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";

const PAGE = readFileSync(join(import.meta.dir, "../../docs/guests.md"), "utf8");
const FILES = readdirSync(import.meta.dir).filter((name) =>
  /^matrix-(?!table).*\.test\.ts$/.test(name),
);

/** First and last column of every table's rows. */
const ROWS = PAGE.split("\n")
  .map((line) => /^\| (.+?) \|.*\| (matrix-[a-z]+) \|$/.exec(line))
  .filter((match) => match !== null)
  .map(([, name = "", file = ""]): [string, string] => [name, file]);

function sourceOf(file: string): string {
  return readFileSync(join(import.meta.dir, file), "utf8");
}

/** String literals of a test file; test names with %s as patterns. */
function namesIn(source: string): { literals: Set<string>; patterns: RegExp[] } {
  const literals = new Set([...source.matchAll(/"([^"\n]+)"/g)].map(([, text = ""]) => text));
  const patterns = [...literals]
    .filter((text) => text.includes("%s") && text !== "%s")
    .map((text) => new RegExp(`^${text.replace("%s", "(.+)")}$`));
  return { literals, patterns };
}

describe("docs/guests.md", () => {
  test.each(ROWS)("%s", (name, file) => {
    const { literals, patterns } = namesIn(sourceOf(`${file}.test.ts`));
    const byPattern = patterns.map((pattern) => pattern.exec(name)?.[1]);
    const isTested = literals.has(name) || byPattern.some((part) => literals.has(part ?? ""));
    expect(isTested).toBe(true);
  });

  test("has a row for every test that has a name of its own", () => {
    const rows = new Set(ROWS.map(([name]) => name));
    const named = FILES.flatMap((file) => {
      // A table's first column, or a test's own name.
      const source = sourceOf(file);
      const tables = [...source.matchAll(/test\.each[^(]*\(\[(.*?)\n {2}\]\)/gs)];
      const cells = tables.flatMap(([, table = ""]) => [
        ...table.matchAll(/^ {4}\[\s*"([^"\n]+)"/gm),
      ]);
      const tests = [...source.matchAll(/^ {2}test[^(]*(?:\([^)]*\))?\(\n {4}"([^"\n]+)"/gm)];
      return [...cells, ...tests].map(([, name = ""]) => name);
    });
    const missing = named.filter(
      (name) =>
        !name.includes("%s") && !rows.has(name) && !/^(shared memory|huge pages)$/.test(name),
    );
    expect(named.length).toBeGreaterThan(40);
    expect(missing).toEqual([]);
  });
});
