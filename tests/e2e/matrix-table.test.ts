/**
 * The tables of the documentation say what the tests show: each row of docs/guests.md is a test, and
 * each of those tests a row; each row of docs/failures.md names tests that there are.
 */
import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { type TestTitle, titlesIn } from "../helpers/test-titles.ts";

const ROOT = join(import.meta.dir, "../..");

/** Titles of the tests, by the name of their file without `.test.ts`; two tiers may have one each. */
const TITLES = new Map<string, TestTitle[]>();
for (const tier of ["unit", "property", "kernel", "e2e", "fault"]) {
  const directory = join(ROOT, "tests", tier);
  for (const file of readdirSync(directory)) {
    if (!file.endsWith(".test.ts")) continue;
    const name = file.replace(".test.ts", "");
    const titles = titlesIn(readFileSync(join(directory, file), "utf8"));
    TITLES.set(name, [...(TITLES.get(name) ?? []), ...titles]);
  }
}

function testsOf(file: string): string[] {
  const titles = TITLES.get(file) ?? [];
  return titles.filter(({ kind }) => kind === "test").map(({ text }) => text);
}

/** Cells of the rows of a page's tables. */
function rowsOf(page: string): string[][] {
  return readFileSync(join(ROOT, "docs", page), "utf8")
    .split("\n")
    .filter((line) => line.startsWith("| ") && line.endsWith(" |"))
    .map((line) => line.slice(2, -2).split(" | "));
}

describe("docs/guests.md", () => {
  const rows = rowsOf("guests.md")
    .map((cells): [string, string] => [cells[0] ?? "", cells.at(-1) ?? ""])
    .filter(([, file]) => file.startsWith("matrix-"));

  test.each(rows)("%s", (name, file) => {
    expect(testsOf(file)).toContain(name);
  });

  test("has a row for every test", () => {
    const files = [...TITLES.keys()].filter((file) => /^matrix-(?!table)/.test(file));
    const names = new Set(rows.map(([name]) => name));
    const titles = files.flatMap(testsOf);
    expect(titles.length).toBeGreaterThan(40);
    expect(titles.filter((title) => !names.has(title))).toEqual([]);
  });
});

/** A title begins so; "…" stands for anything. */
function isTitle(titles: readonly TestTitle[], name: string): boolean {
  if (!/\w/.test(name)) return false;
  const parts = name.split(/ ?…/).map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  const pattern = new RegExp(`^${parts.join(".*")}(?!\\w)`);
  return titles.some(({ text }) => pattern.test(text));
}

/** All of a list with commas between are titles; there may be commas in these too. */
function areTitles(titles: readonly TestTitle[], names: string): boolean {
  if (isTitle(titles, names)) return true;
  for (let at = names.indexOf(", "); at >= 0; at = names.indexOf(", ", at + 1)) {
    if (isTitle(titles, names.slice(0, at)) && areTitles(titles, names.slice(at + 2))) return true;
  }
  return false;
}

describe("docs/failures.md", () => {
  const rows = rowsOf("failures.md")
    .filter((cells) => cells.length === 3 && cells[2] !== "test")
    .map((cells): [string, string] => [cells[0] ?? "", cells[2] ?? ""]);

  test("has its rows", () => {
    expect(rows.length).toBeGreaterThan(60);
  });

  /** `file: title …, title; file`: a file alone stands for all its tests. */
  test.each(rows)("%s", (_, named) => {
    for (const reference of named.split("; ")) {
      const [file = "", ...names] = reference.split(": ");
      const titles = TITLES.get(file) ?? [];
      expect([reference, titles.length > 0]).toEqual([reference, true]);
      if (names.length === 0) continue;
      expect([reference, areTitles(titles, names.join(": "))]).toEqual([reference, true]);
    }
  });
});
