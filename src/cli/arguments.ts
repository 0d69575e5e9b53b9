/** Strict arguments: citty itself accepts unknown flags and surplus positionals in silence. */
import { parseArgs } from "node:util";
import type { ArgsDef } from "citty";
import { FslError } from "../index.ts";

/** Everything before the first `--`, and everything behind it (null when there is none). */
export function splitAtDashes(argv: readonly string[]): { own: string[]; behind: string[] | null } {
  const at = argv.indexOf("--");
  if (at < 0) return { own: [...argv], behind: null };
  return { own: argv.slice(0, at), behind: argv.slice(at + 1) };
}

/**
 * @throws FslError USAGE for a flag that the command does not have, a missing value, a surplus
 * argument, an empty one (a variable of the shell that is not set)
 * @param hint what to say beside that a flag is not known
 */
export function checkArguments(own: readonly string[], args: ArgsDef, hint = ""): void {
  const options: Record<string, { type: "boolean" | "string"; short?: string }> = {
    help: { type: "boolean", short: "h" },
  };
  let positionalsMax = 0;
  for (const [name, arg] of Object.entries(args)) {
    if (arg.type === "positional") {
      positionalsMax += 1;
      continue;
    }
    const alias = "alias" in arg && typeof arg.alias === "string" ? { short: arg.alias } : {};
    options[name] = { type: arg.type === "boolean" ? "boolean" : "string", ...alias };
  }
  let positionals: string[];
  let values: Record<string, unknown>;
  try {
    ({ positionals, values } = parseArgs({
      args: [...own],
      options,
      allowPositionals: true,
      strict: true,
    }));
  } catch (error) {
    const text = error instanceof Error ? error.message : String(error);
    // Some of its texts are of several lines.
    const [sentence = text] = text.split(". ");
    throw new FslError("USAGE", `${sentence.replace(/\s+/g, " ").replace(/\.$/, "")}${hint}`);
  }
  const empty = Object.keys(values).find((name) => values[name] === "");
  if (empty !== undefined) throw new FslError("USAGE", `--${empty}: expected a value, found ''`);
  if (positionals.includes("")) throw new FslError("USAGE", "expected an argument, found ''");
  const surplus = positionals[positionalsMax];
  if (surplus !== undefined) throw new FslError("USAGE", `unexpected argument '${surplus}'`);
}

/** Linux's limit, /proc/sys/kernel/pid_max. */
export const PID_MAX = 4_194_304;

/** A whole number within bounds. @throws FslError USAGE */
export function wholeNumber(text: string, flag: string, minimum: number, maximum: number): number {
  const value = /^\d{1,15}$/.test(text) ? Number(text) : Number.NaN;
  if (!(value >= minimum && value <= maximum)) {
    throw new FslError("USAGE", `--${flag}: expected ${minimum}..${maximum}, found '${text}'`);
  }
  return value;
}

/** The path of a socket, also as QEMU's -qmp has it: `unix:PATH,server=on,wait=off`. */
export function socketPath(text: string): string {
  return /^unix:([^,]+)/.exec(text)?.[1] ?? text;
}

const UNITS: Readonly<Record<string, number>> = {
  "": 1,
  K: 2 ** 10,
  M: 2 ** 20,
  G: 2 ** 30,
  T: 2 ** 40,
};

/** A size as QEMU writes it: `4096`, `64K`, `1M`, `0x1000`; in bytes. @throws FslError USAGE */
export function byteSize(text: string, flag: string): number {
  if (/^0x[0-9a-f]{1,13}$/i.test(text)) return Number(text);
  const match = /^(\d{1,15})([KMGT]?)(?:i?B)?$/i.exec(text);
  const bytes =
    match === null ? Number.NaN : Number(match[1]) * (UNITS[(match[2] ?? "").toUpperCase()] ?? NaN);
  if (!Number.isSafeInteger(bytes)) {
    throw new FslError("USAGE", `--${flag}: expected a size such as 512K or 100M, found '${text}'`);
  }
  return bytes;
}
