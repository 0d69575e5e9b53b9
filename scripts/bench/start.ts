/**
 * What the runtime's own start costs: programs that `bun build --compile` has made and that do nothing,
 * beside fsl doing next to nothing. Nobody can be sooner in starting QEMU.
 */
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { ROOT } from "../build-shim.ts";
import { type Summary, summarize } from "./statistics.ts";

/** Starts of each in a round. */
const STARTS = 10;

/** From the start of a process to its end, and the CPU time that it took, ms. */
export interface Start {
  readonly ms: Summary | null;
  readonly cpuMs: Summary | null;
}

export interface StartResult {
  readonly empty: Start;
  /** The same with a Worker that does nothing. */
  readonly worker: Start;
  /** `fsl --version` */
  readonly fsl: Start;
}

const EMPTY = "export {};\n";
const WITH_WORKER = `
const code = new Blob(["postMessage(0)"], { type: "text/javascript" });
new Worker(URL.createObjectURL(code)).onmessage = () => process.exit();
`;

export async function measureStart(
  fsl: string,
  rounds: number,
  log: (line: string) => void,
): Promise<StartResult> {
  const commands = {
    empty: [compiled("empty", EMPTY)],
    worker: [compiled("worker", WITH_WORKER)],
    fsl: [fsl, "--version"],
  };
  const found = { empty: newRuns(), worker: newRuns(), fsl: newRuns() };
  const names = Object.keys(commands) as (keyof StartResult)[];
  for (let start = 0; start < rounds * STARTS; start += 1) {
    for (const name of names) await run(commands[name], found[name]);
  }
  const [empty, worker, own] = names.map((name) => summary(found[name]));
  const result = { empty, worker, fsl: own } as StartResult;
  const said = ({ ms, cpuMs }: Start): string =>
    `${ms?.median.toFixed(1) ?? "-"} ms, CPU ${cpuMs?.median.toFixed(1) ?? "-"} ms`;
  log(
    `start: an empty program ${said(result.empty)}; with a Worker ${said(result.worker)}; ` +
      `fsl --version ${said(result.fsl)}`,
  );
  return result;
}

interface Runs {
  readonly ms: number[];
  readonly cpuMs: number[];
}

const newRuns = (): Runs => ({ ms: [], cpuMs: [] });

function summary({ ms, cpuMs }: Runs): Start {
  return { ms: summarize(ms), cpuMs: summarize(cpuMs) };
}

async function run(command: readonly string[], runs: Runs): Promise<void> {
  const from = performance.now();
  const child = Bun.spawn([...command], { stdio: ["ignore", "ignore", "inherit"] });
  if ((await child.exited) !== 0) throw new Error(`${command.join(" ")}: failed`);
  runs.ms.push(performance.now() - from);
  runs.cpuMs.push(Number(child.resourceUsage()?.cpuTime.total ?? 0) / 1000);
}

/** Made once, in .cache. */
function compiled(name: string, text: string): string {
  const directory = join(ROOT, ".cache", "bench");
  const program = join(directory, `${name}-${Bun.version}`);
  if (existsSync(program)) return program;
  mkdirSync(directory, { recursive: true });
  const source = join(directory, `${name}.ts`);
  writeFileSync(source, text);
  const options = ["--compile", "--bytecode", "--minify", `--outfile=${program}`];
  const { success, stderr } = Bun.spawnSync([process.execPath, "build", source, ...options]);
  if (!success) throw new Error(`bun build of ${source}: ${stderr.toString()}`);
  return program;
}
