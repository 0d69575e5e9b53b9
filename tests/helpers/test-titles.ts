/**
 * The titles of a test file's tests, read from its source as the formatter leaves it: what stands in
 * a table of `each` is put in where the table is written out in the file, and `%s` stays otherwise.
 */

export interface TestTitle {
  readonly kind: "test" | "describe";
  readonly text: string;
}

/** A string that is the first argument of `test`, `describe` or what their `each`… give, before a function. */
const TITLE =
  /(?:\b(?:test|describe)(?:[A-Z]\w*)?|\))\(\s*("(?:[^"\\\n]|\\.)+"),\s*(?:async\s*)?\(/g;
/** Also `testMoving` and others of declare.ts and kvm.ts. */
const HEAD = /^ *(test|describe)(?:[A-Z]\w*)?\b/gm;
/** Texts that may hold brackets come first. */
const TOKEN = /"(?:[^"\\\n]|\\.)*"|`[^`]*`|\/(?:[^/\\\n]|\\.)+\/|[[\](){},]/g;

export function titlesIn(source: string): TestTitle[] {
  const heads = [...source.matchAll(HEAD)];
  return [...source.matchAll(TITLE)].flatMap(({ index, 1: literal = "" }) => {
    const head = heads.findLast((candidate) => candidate.index <= index);
    if (head === undefined) return [];
    const kind = head[1] as TestTitle["kind"];
    const title = JSON.parse(literal) as string;
    const call = source.slice(head.index, index + 1);
    const table = call.indexOf(".each");
    const isNamed = table >= 0 && title.includes("%s");
    const cells = isNamed ? firstCells(tableOf(call.slice(table), source)) : [];
    const texts = cells.length > 0 ? cells.map((cell) => title.replace("%s", () => cell)) : [title];
    return texts.map((text) => ({ kind, text }));
  });
}

/** From where the list begins that `each` is given, right there or by its name; else empty. */
function tableOf(call: string, source: string): string {
  const name = /^\.each\(([A-Z_]+)\)/.exec(call)?.[1];
  if (name === undefined) return call.slice(call.indexOf("([") + 1);
  const start = new RegExp(`^const ${name}\\b[^=]* = (?=\\[)`, "m").exec(source);
  return start === null ? "" : source.slice(start.index + start[0].length);
}

/** The strings of a list; of a list of rows, the first of each. */
function firstCells(table: string): string[] {
  if (!table.startsWith("[")) return [];
  const cells: string[] = [];
  let depth = 0;
  let isFirst = false;
  for (const [token] of table.matchAll(TOKEN)) {
    if (token.startsWith('"')) {
      if (depth === 1 || (depth === 2 && isFirst)) cells.push(JSON.parse(token) as string);
    }
    if ("[({".includes(token)) depth += 1;
    if ("])}".includes(token)) depth -= 1;
    isFirst = token === "[";
    if (depth === 0) break;
  }
  return cells;
}
