/**
 * Everything about the sources that can be checked without running them: `bun scripts/check.ts`.
 * Also the tier `check` of scripts/test.ts. Each rule says what to do instead.
 */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, normalize, relative } from "node:path";
import { EXIT_CODES } from "../src/errors.ts";

const ROOT = join(import.meta.dir, "..");
const FOLDERS = ["src", "shim", "tests", "scripts"];
/** The formatter wraps code at 100 columns; comments and strings it leaves alone. */
const COLUMNS_MAX = 120;

export interface CheckResult {
  readonly name: string;
  /** What is wrong, one line each; empty = all is well. */
  readonly problems: readonly string[];
}

// -- tools --------------------------------------------------------------------------------------

async function tool(command: readonly string[]): Promise<string[]> {
  const environment = { ...process.env, PATH: `${ROOT}/node_modules/.bin:${process.env.PATH}` };
  const child = Bun.spawn([...command], {
    cwd: ROOT,
    env: environment,
    stdout: "pipe",
    stderr: "pipe",
  });
  const [output, errors] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  if ((await child.exited) === 0) return [];
  const lines = `${output}\n${errors}`.split("\n").filter((line) => line.trim() !== "");
  return lines.length > 0 ? lines : [`${command.join(" ")} failed without a word`];
}

// -- sources ------------------------------------------------------------------------------------

interface SourceFile {
  /** Relative to the repository. */
  readonly path: string;
  readonly text: string;
  readonly lines: readonly string[];
}

function readSources(folders: readonly string[], pattern: RegExp): SourceFile[] {
  return folders
    .filter((folder) => existsSync(join(ROOT, folder)))
    .flatMap((folder) =>
      readdirSync(join(ROOT, folder), { recursive: true, encoding: "utf8" })
        .filter((name) => pattern.test(name))
        .sort()
        .map((name) => {
          const text = readFileSync(join(ROOT, folder, name), "utf8");
          return { path: join(folder, name), text, lines: text.split("\n") };
        }),
    );
}

/** `path:line: message` for each line of code (comments left out) that matches. */
function linesThatMatch(
  files: readonly SourceFile[],
  pattern: RegExp,
  message: string,
  withComments = false,
): string[] {
  return files.flatMap(({ path, lines }) =>
    lines.flatMap((line, index) => {
      const isComment = /^\s*(\/\/|\/?\*|#)/.test(line);
      if ((isComment && !withComments) || !pattern.test(line)) return [];
      return [`${path}:${index + 1}: ${message}`];
    }),
  );
}

// -- layers -------------------------------------------------------------------------------------

/**
 * Which layer may import which, beside itself. `cli → index → load → {snapshot, source, vmm,
 * uffd}`.
 */
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  cli: ["index"],
  index: ["load", "snapshot", "source", "vmm", "uffd", "errors", "pages", "text"],
  load: ["snapshot", "source", "vmm", "uffd", "sys", "bits", "errors", "pages"],
  snapshot: ["bits", "errors", "pages"],
  source: ["sys", "errors", "pages"],
  vmm: ["sys", "errors", "pages"],
  uffd: ["sys", "errors", "pages"],
  sys: ["errors", "pages"],
  pages: ["errors"],
  errors: ["text"],
  text: [],
  bits: [],
};

/** What a type-only import may reach beside that. */
const MAY_IMPORT_TYPES: Readonly<Record<string, readonly string[]>> = { source: ["snapshot"] };

interface Import {
  readonly specifier: string;
  readonly isTypeOnly: boolean;
}

function importsOf(text: string): Import[] {
  const found: Import[] = [];
  const statement = /^(?:import|export)\s+(type\s)?(?:[^"';]*?\sfrom\s+)?"([^"]+)"/gm;
  for (const [, type, specifier = ""] of text.matchAll(statement)) {
    found.push({ specifier, isTypeOnly: type !== undefined });
  }
  for (const [, specifier = ""] of text.matchAll(/\bimport\(\s*"([^"]+)"/g)) {
    found.push({ specifier, isTypeOnly: false });
  }
  return found;
}

function layerOf(path: string): string {
  const [first = "", ...rest] = relative("src", path).split("/");
  return rest.length > 0 ? first : first.replace(/\.ts$/, "");
}

/** Exported for its test. */
export function layerProblems(path: string, text: string): string[] {
  const layer = layerOf(path);
  const allowed = MAY_IMPORT[layer];
  if (allowed === undefined) {
    return [`${path}: "${layer}" is no layer; add it to MAY_IMPORT in scripts/check.ts`];
  }
  return importsOf(text).flatMap(({ specifier, isTypeOnly }) => {
    if (!specifier.startsWith(".")) return [];
    const target = normalize(join(dirname(path), specifier));
    if (!target.startsWith("src/")) return [];
    const imported = layerOf(target);
    const types = isTypeOnly ? (MAY_IMPORT_TYPES[layer] ?? []) : [];
    if (imported === layer || allowed.includes(imported) || types.includes(imported)) return [];
    const list = allowed.length > 0 ? allowed.join(", ") : "nothing";
    return [`${path}: ${layer} may import ${list}, not ${specifier}`];
  });
}

// -- exports ------------------------------------------------------------------------------------

/** What files take from others: names in the braces of an import or re-export, `namespace.name`. */
function importedNames(files: readonly SourceFile[]): ReadonlySet<string> {
  const names = new Set<string>();
  for (const { text } of files) {
    for (const [, list = ""] of text.matchAll(/\{([^{}]*)\}\s*(?:from\b|= await import\()/g)) {
      for (const [name] of list.matchAll(/\w+/g)) names.add(name);
    }
    for (const [, space] of text.matchAll(/^import \* as (\w+)/gm)) {
      const members = text.matchAll(new RegExp(`\\b${space}\\.(\\w+)`, "g"));
      for (const [, name = ""] of members) names.add(name);
    }
  }
  return names;
}

/** A type is of use without an import where an exported function of its own file names it. */
export function exportProblems(
  files: readonly SourceFile[],
  importers: readonly SourceFile[],
): string[] {
  const imported = importedNames(importers);
  const declaration =
    /^export (?:async |abstract )*(const|let|function\*?|class|interface|type) (\w+)/gm;
  return files.flatMap(({ path, text }) =>
    [...text.matchAll(declaration)].flatMap(([, kind = "", name = ""]) => {
      const isType = kind === "interface" || kind === "type";
      const uses = text.match(new RegExp(`\\b${name}\\b`, "g"))?.length ?? 0;
      if (imported.has(name) || (isType && uses > 1)) return [];
      return [`${path}: nobody imports ${name}: ${uses > 1 ? "do not export it" : "delete it"}`];
    }),
  );
}

// -- tidy rules ---------------------------------------------------------------------------------

/** Where a thing belongs, and nowhere else. */
const CONFINED: readonly { what: string; pattern: RegExp; home: RegExp; instead: string }[] = [
  {
    what: "bun:ffi",
    pattern: /"bun:ffi"/,
    home: /^src\/sys\/native\.ts$/,
    instead: "call the typed functions of src/sys/native.ts",
  },
  {
    what: "consola and citty",
    pattern: /from "(consola|citty)["/]/,
    home: /^src\/cli\//,
    instead: "return values, throw FslError, or take a logger",
  },
  {
    what: "process.exit",
    pattern: /\bprocess\.exit\(/,
    home: /^src\/cli\/main\.ts$/,
    instead: "throw FslError; src/cli/main.ts ends the process",
  },
];

function readmeProblems(): string[] {
  const path = join(ROOT, "README.md");
  if (!existsSync(path)) return [];
  const rows = readFileSync(path, "utf8").matchAll(/^\|\s*(\d+)\s*\|\s*`?([A-Z_]+)`?\s*\|/gm);
  const written = new Map([...rows].map(([, exit, code]) => [code ?? "", Number(exit)]));
  const problems: string[] = [];
  for (const [code, exit] of Object.entries(EXIT_CODES)) {
    if (written.get(code) === exit) continue;
    problems.push(
      `README.md: ${code}: expected exit code ${exit}, found ${written.get(code) ?? "no row"}`,
    );
  }
  for (const code of written.keys()) {
    if (!(code in EXIT_CODES)) problems.push(`README.md: ${code} is not in src/errors.ts`);
  }
  return problems;
}

/** Put together from pieces, so that this file does not break its own rule. */
const UNFINISHED = new RegExp(`\\b(${["FIX", "ME"].join("")}|${["X", "XX"].join("")})\\b`);

/** Runs all checks. */
export async function runChecks(): Promise<CheckResult[]> {
  const typescript = readSources(FOLDERS, /\.ts$/);
  const source = typescript.filter(({ path }) => path.startsWith("src/"));
  const all = readSources(FOLDERS, /\.(ts|c|h|S|sh|ld)$/);
  const [format, lint, types] = await Promise.all([
    tool(["bun", "fmt", "--check", "src", "tests", "scripts"]),
    tool(["oxlint", "--deny-warnings", "src", "tests", "scripts"]),
    tool(["tsc", "--noEmit"]),
  ]);
  return [
    { name: "format (mend it with: npm run format)", problems: format },
    { name: "lint", problems: lint },
    { name: "types", problems: types },
    { name: "layers", problems: source.flatMap(({ path, text }) => layerProblems(path, text)) },
    { name: "exports", problems: exportProblems(source, typescript) },
    ...CONFINED.map(({ what, pattern, home, instead }) => ({
      name: `${what} only where it belongs`,
      problems: linesThatMatch(
        source.filter(({ path }) => !home.test(path)),
        pattern,
        instead,
      ),
    })),
    {
      name: "nothing unfinished",
      problems: linesThatMatch(all, UNFINISHED, "finish it, or write TODO(issue)", true),
    },
    {
      name: `no line beyond ${COLUMNS_MAX} columns`,
      problems: linesThatMatch(all, new RegExp(`^.{${COLUMNS_MAX + 1},}$`, "u"), "break it", true),
    },
    { name: "exit codes in README.md", problems: readmeProblems() },
  ];
}

/** Prints one line per check and the problems of those that failed. */
export function printChecks(results: readonly CheckResult[]): void {
  for (const { name, problems } of results) {
    console.log(`${problems.length === 0 ? "ok  " : "FAIL"} ${name}`);
    for (const problem of problems.slice(0, 50)) console.log(`       ${problem}`);
    if (problems.length > 50) console.log(`       … ${problems.length - 50} more lines`);
  }
}

if (import.meta.main) {
  const results = await runChecks();
  printChecks(results);
  process.exitCode = results.some(({ problems }) => problems.length > 0) ? 1 : 0;
}
