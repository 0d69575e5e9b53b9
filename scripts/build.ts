/**
 * Builds everything that is not TypeScript run as it is: the shim and the preload library for both
 * architectures, the Workers' bundles, and the executable dist/fsl. What is newer than its sources
 * is left alone.
 *
 *   bun scripts/build.ts [--quiet] [--no-executable]
 *
 * `--bytecode` is worth its 2 MB: `fsl --version` takes 16 ms with it and 37 ms without (an empty
 * program takes 5). It needs `--format=esm` because of the top-level await. `--compile-jit-policy`: the
 * main thread's code runs 50 times as often before it is compiled. Hardly any of it does, and the
 * compilers took 25 ms of CPU time from QEMU's start: it is ready 8 to 10 ms sooner.
 * `--no-compile-autoload-…`: whatever folder fsl is started in, no code and no environment of that folder's
 * bunfig.toml and .env; it runs as root.
 */
import { existsSync, mkdirSync, readdirSync, renameSync } from "node:fs";
import { join } from "node:path";
import { BUILD, buildShim, modifiedMs, newestMs, ROOT, run } from "./build-shim.ts";
import { buildWorkers, WORKER_ENTRIES } from "./build-workers.ts";

const MAIN = "src/cli/main.ts";
/** Where the executable has its Workers, which are entry points too, so that they have bytecode. */
const WORKERS_FOLDER = "/$bunfs/root/load";
const EXECUTABLE = join(ROOT, "dist", "fsl");

function buildExecutable(log: (line: string) => void): void {
  if (!existsSync(join(ROOT, MAIN))) {
    log(`${MAIN} is not there yet: no executable`);
    return;
  }
  const inputs = [join(ROOT, "src"), BUILD].flatMap((folder) =>
    readdirSync(folder, { recursive: true, encoding: "utf8" })
      .filter((name) => /\.(ts|js|json)$/.test(name))
      .map((name) => join(folder, name)),
  );
  const newest = newestMs([...inputs, join(ROOT, "package.json"), import.meta.path]);
  if (modifiedMs(EXECUTABLE) >= newest) {
    log(`${executableText()}, newer than its sources`);
    return;
  }
  mkdirSync(join(ROOT, "dist"), { recursive: true });
  const options = [
    ...["--minify", "--sourcemap=none", "--bytecode", "--format=esm", "--compile-jit-policy=50"],
    ...["--no-compile-autoload-dotenv", "--no-compile-autoload-bunfig"],
    ...["--root=src", `--define=FSL_WORKERS=${JSON.stringify(WORKERS_FOLDER)}`],
  ];
  const partPath = `${EXECUTABLE}.${process.pid}`;
  const entries = [MAIN, ...WORKER_ENTRIES];
  run([process.execPath, "build", "--compile", ...options, ...entries, "--outfile", partPath]);
  // In one step: a program that is running cannot be written to.
  renameSync(partPath, EXECUTABLE);
  log(`${executableText()}, built`);
}

function executableText(): string {
  return `dist/fsl, ${(Bun.file(EXECUTABLE).size / 1e6).toFixed(1)} MB`;
}

const isQuiet = process.argv.includes("--quiet");
const log = (line: string): void => {
  if (!isQuiet) console.log(line);
};
buildShim(log);
await buildWorkers(log);
if (!process.argv.includes("--no-executable")) buildExecutable(log);
