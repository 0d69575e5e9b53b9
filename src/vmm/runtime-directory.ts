/**
 * A private directory for QMP sockets: made with an unpredictable name and mode 0700, in a place of
 * the caller's own.
 */
import { lstatSync, mkdtempSync, rmdirSync, rmSync, unlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";
import { FslError } from "../errors.ts";

/**
 * Makes the directory: in XDG_RUNTIME_DIR, in /run for root, else in TMPDIR.
 * @throws FslError HOST_UNSUPPORTED when none of them can be written
 */
export function makeRuntimeDirectory(
  env: Readonly<Record<string, string | undefined>> = process.env,
): string {
  const tried: string[] = [];
  for (const base of candidates(env)) {
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
  if (!/^fsl-\w{6}$/.test(basename(directory))) return;
  try {
    unlinkSync(socketPath);
    rmdirSync(directory);
  } catch {
    // See removeRuntimeDirectory.
  }
}

function candidates(env: Readonly<Record<string, string | undefined>>): string[] {
  const bases: string[] = [];
  const runtime = env["XDG_RUNTIME_DIR"];
  if (runtime !== undefined && isOwnedByCaller(runtime)) bases.push(runtime);
  if (process.getuid?.() === 0) bases.push("/run");
  bases.push(tmpdir());
  return bases;
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
