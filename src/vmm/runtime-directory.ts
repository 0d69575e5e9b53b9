/**
 * A private directory for QMP sockets: made with an unpredictable name and mode 0700, in a place of
 * the caller's own.
 */
import { lstatSync, mkdtempSync, readdirSync, rmdirSync, rmSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { FslError } from "../errors.ts";
import { ECONNREFUSED } from "../sys/abi.ts";
import * as native from "../sys/native.ts";
import { nodeOs } from "../sys/node-os.ts";

/** Name of the socket in it. */
export const CONTROL_NAME = "qmp";
const DIRECTORY_NAME = /^fsl-\w{6}$/;
/** A directory is younger while its fsl is about to bind the socket. */
const STALE_MS = 60_000;

/**
 * Makes the directory: in XDG_RUNTIME_DIR, in /run for root, else in TMPDIR.
 * @throws FslError HOST_UNSUPPORTED when none of them can be written
 */
export function makeRuntimeDirectory(
  env: Readonly<Record<string, string | undefined>> = process.env,
): string {
  const tried: string[] = [];
  for (const base of runtimeBases(env)) {
    try {
      return mkdtempSync(join(base, "fsl-"));
    } catch (error) {
      tried.push(`${base} (${(error as NodeJS.ErrnoException).code ?? String(error)})`);
    }
  }
  throw new FslError(
    "HOST_UNSUPPORTED",
    `no directory for the QMP socket: tried ${tried.join(", ")}`,
  );
}

/** Removes such a directory with what is in it. Never throws: it may be gone already. */
export function removeRuntimeDirectory(path: string): void {
  try {
    rmSync(path, { recursive: true, force: true });
  } catch {
    // Nothing depends on it any more; an empty 0700 directory is left, which the host's clean-up
    // takes.
  }
}

/**
 * Removes the directory of a socket that a dead fsl made. The path comes out of what that fsl left
 * behind, so only what has its shape goes, and only the socket and an empty directory.
 */
export function removeRuntimeDirectoryOf(socketPath: string): void {
  const directory = dirname(socketPath);
  if (!DIRECTORY_NAME.test(basename(directory))) return;
  try {
    // QEMU removes its socket itself when it ends in order.
    rmSync(socketPath, { force: true });
    rmdirSync(directory);
  } catch {
    // See removeRuntimeDirectory.
  }
}

/**
 * Removes what a fsl that was killed has left of its own user's in `base`, when the QEMU of it has
 * ended too: an empty directory, or one with a socket that nobody has. Never throws.
 */
export function removeStaleDirectories(base: string): void {
  for (const socketPath of controlPaths(base)) {
    const directory = dirname(socketPath);
    try {
      const { uid, mtimeMs } = lstatSync(directory);
      if (uid !== process.getuid?.() || Date.now() - mtimeMs < STALE_MS) continue;
      if (readdirSync(directory).length === 0) rmdirSync(directory);
      else if (native.unixIsBound(socketPath) === -ECONNREFUSED)
        removeRuntimeDirectoryOf(socketPath);
    } catch {
      // Gone meanwhile, or not to be removed.
    }
  }
}

/** Where the QMP sockets of loads are, or were: one path for each directory in `base`. */
export function controlPaths(base: string): string[] {
  try {
    const names = readdirSync(base).filter((name) => DIRECTORY_NAME.test(name));
    return names.map((name) => join(base, name, CONTROL_NAME));
  } catch {
    return [];
  }
}

/** Where `makeRuntimeDirectory` makes them. */
export function* runtimeBases(
  env: Readonly<Record<string, string | undefined>> = process.env,
): Generator<string> {
  const runtime = env["XDG_RUNTIME_DIR"];
  if (runtime !== undefined && isOwnedByCaller(runtime)) yield runtime;
  if (process.getuid?.() === 0) yield "/run";
  yield nodeOs().tmpdir();
}

/**
 * XDG_RUNTIME_DIR survives `sudo` and then belongs to somebody else, who could swap what is in it.
 */
function isOwnedByCaller(path: string): boolean {
  try {
    const status = lstatSync(path);
    return status.isDirectory() && status.uid === process.getuid?.() && (status.mode & 0o022) === 0;
  } catch {
    return false;
  }
}
