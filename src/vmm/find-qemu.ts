/** The QEMU system emulators on PATH, and their versions. */
import { accessSync, constants, readdirSync } from "node:fs";
import { delimiter, join } from "node:path";

export interface FoundQemu {
  readonly path: string;
  /** e.g. `10.0.2`; null when it does not say. */
  readonly version: string | null;
}

/** A program that does not answer `--version` in this time is listed without one. */
const VERSION_TIMEOUT_MS = 5000;

export async function findQemus(searchPath = process.env["PATH"] ?? ""): Promise<FoundQemu[]> {
  const found = new Map<string, string>();
  for (const directory of searchPath.split(delimiter).filter(Boolean)) {
    for (const name of listed(directory)) {
      const path = join(directory, name);
      if (/^qemu-system-[\w-]+$/.test(name) && !found.has(name) && isExecutable(path)) {
        found.set(name, path);
      }
    }
  }
  return Promise.all(
    [...found.values()].map(async (path) => ({ path, version: await versionOf(path) })),
  );
}

function listed(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch {
    // A directory of PATH that does not exist holds no programs.
    return [];
  }
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

async function versionOf(path: string): Promise<string | null> {
  const child = Bun.spawn([path, "--version"], {
    stdin: "ignore",
    stdout: "pipe",
    stderr: "ignore",
    timeout: VERSION_TIMEOUT_MS,
  });
  const text = await new Response(child.stdout).text();
  await child.exited;
  return /version (\d+\.\d+(?:\.\d+)*)/.exec(text)?.[1] ?? null;
}
