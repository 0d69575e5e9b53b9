/**
 * What the runtime's own start costs: an empty program that `bun build --compile` has made, beside fsl
 * doing next to nothing. Nobody can be sooner in starting QEMU.
 */
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { ROOT } from "../build-shim.ts";
import { type Summary, summarize } from "./statistics.ts";

/** Starts of each in a round. */
const STARTS = 10;

/** From the start of a process to its end, ms. */
export interface StartResult {
  readonly empty: Summary | null;
  /** `fsl --version` */
  readonly fsl: Summary | null;
}

export async function measureStart(
  fsl: string,
  rounds: number,
  log: (line: string) => void,
): Promise<StartResult> {
  const program = emptyProgram();
  const [empty, own]: [number[], number[]] = [[], []];
  for (let start = 0; start < rounds * STARTS; start += 1) {
    empty.push(await msOf([program]));
    own.push(await msOf([fsl, "--version"]));
  }
  const result = { empty: summarize(empty), fsl: summarize(own) };
  const said = (summary: Summary | null): string => summary?.median.toFixed(1) ?? "-";
  log(`start: an empty program ${said(result.empty)} ms, fsl --version ${said(result.fsl)} ms`);
  return result;
}

async function msOf(command: readonly string[]): Promise<number> {
  const from = performance.now();
  const child = Bun.spawn([...command], { stdio: ["ignore", "ignore", "inherit"] });
  if ((await child.exited) !== 0) throw new Error(`${command.join(" ")}: failed`);
  return performance.now() - from;
}

/** Made once, in .cache. */
function emptyProgram(): string {
  const directory = join(ROOT, ".cache", "bench");
  const program = join(directory, `empty-${Bun.version}`);
  if (existsSync(program)) return program;
  mkdirSync(directory, { recursive: true });
  const source = join(directory, "empty.ts");
  writeFileSync(source, "export {};\n");
  const options = ["--compile", "--bytecode", "--minify", `--outfile=${program}`];
  const { success, stderr } = Bun.spawnSync([process.execPath, "build", source, ...options]);
  if (!success) throw new Error(`bun build of an empty program: ${stderr.toString()}`);
  return program;
}
