/**
 * Bundles the Workers' entry points into build/, each into one file with all that it imports.
 * src/sys/worker.ts embeds these files, so that a program compiled with `bun build --compile`
 * carries them without naming them.
 */
import { existsSync, readdirSync, renameSync } from "node:fs";
import { basename, join } from "node:path";
import { BUILD, modifiedMs, newestMs, ROOT } from "./build-shim.ts";

/** Entry points, from the project's root. */
export const WORKER_ENTRIES = ["src/load/fault-worker.ts", "src/load/eager-worker.ts"] as const;
const EMPTY = 'throw new Error("this Worker was not there when fsl was built");\n';

export async function buildWorkers(log: (line: string) => void): Promise<void> {
  const sources = readdirSync(join(ROOT, "src"), { recursive: true, encoding: "utf8" })
    .filter((name) => name.endsWith(".ts"))
    .map((name) => join(ROOT, "src", name));
  const newest = newestMs([...sources, join(BUILD, "libraries.json"), import.meta.path]);
  for (const source of WORKER_ENTRIES) {
    const name = basename(source, ".ts");
    const entry = join(ROOT, source);
    const path = join(BUILD, `${name}.bundle.js`);
    if (modifiedMs(path) >= newest) continue;
    const partPath = `${path}.${process.pid}`;
    await Bun.write(partPath, existsSync(entry) ? await bundle(entry) : EMPTY);
    renameSync(partPath, path);
    log(`built build/${name}.bundle.js, ${Bun.file(path).size} bytes`);
  }
}

async function bundle(entry: string): Promise<string> {
  const result = await Bun.build({ entrypoints: [entry], target: "bun", minify: true });
  const [output, ...rest] = result.outputs;
  if (output === undefined || rest.length > 0) {
    throw new Error(`${entry}: expected one output file, found ${result.outputs.length}`);
  }
  return output.text();
}

if (import.meta.main) await buildWorkers(console.log);
