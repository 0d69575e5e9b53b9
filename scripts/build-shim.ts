/**
 * Compiles the shim and the preload library for both architectures into build/, free-standing: no
 * libc, nothing NEEDED, so that one file serves glibc and musl hosts. A library that is newer than
 * its sources is left alone.
 */
import { mkdirSync, readdirSync, readFileSync, renameSync, statSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";

export const ROOT = join(import.meta.dir, "..");
const SHIM = join(ROOT, "shim");
export const BUILD = join(ROOT, "build");
const CACHE = join(ROOT, ".cache", "zig");
const EMBEDDED = join(BUILD, "libraries.json");
const ARCHITECTURES = ["x86_64", "aarch64"] as const;
const LIBRARIES = {
  shim: ["abi.c", "memory.c", "posix.c", "remote.c", "task.c", "uffd.c"],
  preload: ["helper.c", "memory.c", "preload.c", "task.c"],
} as const;
const FLAGS = [
  "-std=c11",
  "-O2",
  "-Wall",
  "-Wextra",
  "-Werror",
  "-ffreestanding",
  "-fno-stack-protector",
  "-nostdlib",
  "-shared",
  "-fPIC",
  "-fvisibility=hidden",
  "-s",
  "-Wl,-z,noexecstack",
];

/** Newest modification time of the files in ms, 0 when there are none. */
export function newestMs(paths: readonly string[]): number {
  return Math.max(0, ...paths.map((path) => statSync(path).mtimeMs));
}

/** Modification time in ms, 0 when the file does not exist. */
export function modifiedMs(path: string): number {
  return statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0;
}

/** Runs a command to its end. @throws Error with its output when it fails */
export function run(command: readonly string[], environment: Record<string, string> = {}): void {
  const done = Bun.spawnSync([...command], {
    cwd: ROOT,
    env: { ...process.env, ...environment },
    stdout: "pipe",
    stderr: "pipe",
  });
  if (done.exitCode === 0) return;
  const output = `${done.stdout}${done.stderr}`.trimEnd();
  throw new Error(`${command.join(" ")}: exit code ${done.exitCode}\n${output}`);
}

/**
 * The compiler itself where its package is installed; the launcher beside it costs 0.1 s a call.
 */
function zigPath(): string {
  const arch = process.arch === "arm64" ? "arm64" : "x64";
  const direct = join(ROOT, "node_modules/@oven", `zig-linux-${arch}`, "zig");
  if (modifiedMs(direct) > 0) return direct;
  return Bun.which("zig") ?? join(ROOT, "node_modules/.bin/zig");
}

/** Compiles a program for this host, for the tests. */
export function compileProgram(
  sources: readonly string[],
  path: string,
  flags: readonly string[] = [],
): void {
  const arch = process.arch === "arm64" ? "aarch64" : "x86_64";
  const target = ["-target", `${arch}-linux-gnu`];
  const partPath = `${path}.${process.pid}`;
  mkdirSync(BUILD, { recursive: true });
  const options = ["-O2", "-Wall", "-Wextra", ...flags];
  run([zigPath(), "cc", ...target, ...options, ...sources, "-o", partPath], {
    ZIG_GLOBAL_CACHE_DIR: CACHE,
    ZIG_LOCAL_CACHE_DIR: CACHE,
  });
  renameSync(partPath, path);
}

/** Where src/vmm/injection.ts begins; ELF's e_entry. */
const ENTRY = "-Wl,-e,injection_entry";

function compile(library: keyof typeof LIBRARIES, arch: string, path: string): void {
  const files = LIBRARIES[library].map((file) => join("shim", file));
  const flags = library === "preload" ? [...FLAGS, ENTRY] : FLAGS;
  const partPath = `${path}.${process.pid}`;
  run([zigPath(), "cc", "-target", `${arch}-linux-gnu`, ...flags, ...files, "-o", partPath], {
    ZIG_GLOBAL_CACHE_DIR: CACHE,
    ZIG_LOCAL_CACHE_DIR: CACHE,
  });
  // In one step: whoever runs meanwhile has the old library or the new one.
  renameSync(partPath, path);
}

/**
 * Builds what is out of date, and build/libraries.json, which is how src/sys/embedded.ts gets
 * them.
 */
export function buildShim(log: (line: string) => void): void {
  mkdirSync(BUILD, { recursive: true });
  const sources = readdirSync(SHIM).map((name) => join(SHIM, name));
  const newest = newestMs([...sources, import.meta.path]);
  const encoded: Record<string, string> = {};
  let isStale = modifiedMs(EMBEDDED) < newest;
  for (const library of ["shim", "preload"] as const) {
    for (const arch of ARCHITECTURES) {
      const path = join(BUILD, `fsl-${library}-${arch}.so`);
      if (modifiedMs(path) < newest) {
        compile(library, arch, path);
        log(`built build/${basename(path)}, ${statSync(path).size} bytes`);
        isStale = true;
      }
      encoded[`${library}-${arch}`] = readFileSync(path).toString("base64");
    }
  }
  if (isStale) writeFileSync(EMBEDDED, `${JSON.stringify(encoded, null, 1)}\n`);
}

if (import.meta.main) buildShim(console.log);
