/** A real gdb: the machine's, or the one that scripts/setup.sh has unpacked. */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";

const PACKAGES = join(import.meta.dir, "../../.cache/packages");
const UNPACKED = join(PACKAGES, "gdb/usr/bin/gdb");
const TRIED = join(PACKAGES, "gdb-tried");
/** gdb reads QEMU's symbols first: 1 s here, several on a busy machine. */
const GDB_TIMEOUT_MS = 60_000;

export interface GdbRun {
  /** Null when it did not come to its end in time. */
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** Why there is no gdb here, or null. */
export function whyNoGdb(): string | null {
  if (gdbPath() !== null) return null;
  const tried = existsSync(TRIED) ? readFileSync(TRIED, "utf8").trim() : "";
  return tried === "" ? "gdb is missing; run: sh scripts/setup.sh gdb" : `no gdb: ${tried}`;
}

function gdbPath(): string | null {
  return Bun.which("gdb") ?? (existsSync(UNPACKED) ? UNPACKED : null);
}

/**
 * Runs gdb commands one after the other, as `gdb -batch -ex …` does: what fails is told on stderr,
 * and the rest is done all the same.
 */
export async function gdb(args: readonly string[], commands: readonly string[]): Promise<GdbRun> {
  const path = gdbPath();
  if (path === null) throw new Error(whyNoGdb() ?? "");
  const libraries = ["usr/lib", "lib"].map((at) =>
    join(PACKAGES, "gdb", at, process.arch === "arm64" ? "aarch64-linux-gnu" : "x86_64-linux-gnu"),
  );
  const env = { ...process.env, DEBUGINFOD_URLS: "" };
  const child = Bun.spawn(
    [path, "-nx", "-batch", ...args, ...commands.flatMap((c) => ["-ex", c])],
    {
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
      env: path === UNPACKED ? { ...env, LD_LIBRARY_PATH: libraries.join(":") } : env,
      timeout: GDB_TIMEOUT_MS,
      killSignal: "SIGKILL",
    },
  );
  const [stdout, stderr] = await Promise.all([child.stdout.text(), child.stderr.text()]);
  await child.exited;
  return { code: child.exitCode, stdout, stderr };
}
