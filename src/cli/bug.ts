/** What fsl says of its own bugs: enough for a report, and no line of its minified code. */
import { printableLines } from "../index.ts";
import packageJson from "../../package.json";

/** Lines of a stack that are shown. */
const FRAMES_MAX = 12;

/** @returns lines for stderr, the request to report it first */
export function bugReport(error: unknown): string {
  const isError = error instanceof Error;
  const lines = [
    `fsl: a bug in fsl ${packageJson.version}, please report it with these lines and the command:`,
    `fsl: ${isError ? `${error.name}: ${error.message}` : String(error)}`,
  ];
  for (let cause = isError ? error.cause : undefined; cause instanceof Error; cause = cause.cause)
    lines.push(`fsl: because of ${cause.name}: ${cause.message}`);
  const stack = isError ? (error.stack ?? "") : "";
  lines.push(...stack.split("\n").filter(isFrame).slice(0, FRAMES_MAX));
  return printableLines(lines.join("\n"));
}

function isFrame(line: string): boolean {
  return /^\s+at /.test(line);
}
