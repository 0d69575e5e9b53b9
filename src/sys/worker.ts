/**
 * Starts the Workers of a load, wherever this code runs. A Worker needs a file to start from:
 *
 *   plain `bun`, from source or as a package      its source, src/load/NAME.ts
 *   the executable dist/fsl                       an entry point of its own (scripts/build.ts), for which
 *                                                 there is bytecode: 20 ms less CPU time in each load
 *   anybody's own program, made with              build/NAME.bundle.js, one file with all that it
 *   `bun build --compile`                         imports, which the import below embeds: nobody
 *                                                 has to name extra entry points
 *   a program bundled with `bun build --outdir`   the same file, copied beside the bundle
 *
 * The reference is for other projects: their compilers do not look for declarations in src/.
 */
// oxlint-disable-next-line typescript/triple-slash-reference -- It is no module that can be imported.
/// <reference path="./bundles.d.ts" />
import { existsSync } from "node:fs";
import eagerBundle from "../../build/eager-worker.bundle.js" with { type: "file" };
import faultBundle from "../../build/fault-worker.bundle.js" with { type: "file" };

/** Folder of the Workers' entry points in the executable; defined by its build, and only there. */
declare const FSL_WORKERS: string | undefined;

export type WorkerName = "fault-worker" | "eager-worker";

const BUNDLES: Readonly<Record<WorkerName, string>> = {
  "eager-worker": eagerBundle,
  "fault-worker": faultBundle,
};

/** Starts a Worker. Errors, also those of its start, come as `error` events of the Worker. */
export function startWorker(name: WorkerName): Worker {
  return new Worker(workerUrl(name));
}

/** Where a Worker's code is. */
export function workerUrl(name: WorkerName): string {
  if (typeof FSL_WORKERS === "string") return `${FSL_WORKERS}/${name}.js`;
  if (!import.meta.url.includes("/$bunfs/")) {
    const source = new URL(`../load/${name}.ts`, import.meta.url);
    if (existsSync(source)) return source.href;
  }
  const bundle = BUNDLES[name];
  return bundle.startsWith("/") ? bundle : new URL(bundle, import.meta.url).href;
}
