/**
 * The same code in every way of running: plain bun, a program of somebody else's compiled with `bun
 * build --compile` (which names no extra entry points), and one bundled to a folder. In each the
 * shim loads in the main thread and in Workers, and nothing is written to a temporary directory.
 */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

setDefaultTimeout(30_000);

const ROOT = join(import.meta.dir, "../..");
const folder = mkdtempSync(join(tmpdir(), "fsl-standalone-"));
const temporary = join(folder, "tmp");

/** Starts each Worker, waits until it has loaded the shim, and says where its code came from. */
const PROGRAM = `
import * as sys from ${JSON.stringify(join(ROOT, "src/sys/native.ts"))};
import { preloadBytes } from ${JSON.stringify(join(ROOT, "src/sys/preload.ts"))};
import { startWorker, workerUrl } from ${JSON.stringify(join(ROOT, "src/sys/worker.ts"))};
const result = { tid: sys.gettid() > 0, preload: preloadBytes().length > 1000, workers: [] };
for (const name of ["fault-worker", "eager-worker"]) {
  const worker = startWorker(name);
  const answer = await new Promise((resolve) => {
    worker.onmessage = (event) => resolve(event.data.type);
    worker.onerror = (event) => resolve("error: " + event.message);
    setTimeout(() => resolve("nothing"), 10000).unref();
  });
  result.workers.push([workerUrl(name), answer]);
  worker.terminate();
}
console.log(JSON.stringify(result));
process.exit(0);
`;

interface Result {
  readonly tid: boolean;
  readonly preload: boolean;
  readonly workers: readonly (readonly [url: string, answer: string])[];
}

beforeAll(() => {
  mkdirSync(temporary);
  writeFileSync(join(folder, "user.ts"), PROGRAM);
});

afterAll(() => {
  rmSync(folder, { recursive: true, force: true });
});

function run(
  command: readonly string[],
  environment: Record<string, string> = {},
  cwd = folder,
): string {
  const done = Bun.spawnSync([...command], {
    cwd,
    env: { ...process.env, TMPDIR: temporary, BUN_TMPDIR: temporary, ...environment },
    stdout: "pipe",
    stderr: "pipe",
    timeout: 25_000,
  });
  expect(`${done.exitCode} ${done.stderr}`).toBe("0 ");
  return done.stdout.toString();
}

function answers(text: string): Result {
  return JSON.parse(text) as Result;
}

describe("plain bun", () => {
  test("starts Workers from their sources", () => {
    const { tid, preload, workers } = answers(run([process.execPath, "user.ts"]));
    expect([tid, preload]).toEqual([true, true]);
    expect(workers).toEqual([
      [`file://${ROOT}/src/load/fault-worker.ts`, "loaded"],
      [`file://${ROOT}/src/load/eager-worker.ts`, "loaded"],
    ]);
  });
});

describe("bun build --compile of somebody else's program", () => {
  test("starts Workers from the executable, writes no temporary file, needs no TMPDIR", () => {
    const path = join(folder, "user");
    Bun.spawnSync([process.execPath, "build", "--compile", "user.ts", "--outfile", path], {
      cwd: folder,
    });
    const { tid, preload, workers } = answers(run([path]));
    expect([tid, preload]).toEqual([true, true]);
    expect(workers.map(([, answer]) => answer)).toEqual(["loaded", "loaded"]);
    expect(workers.map(([url]) => url.startsWith("/$bunfs/root/"))).toEqual([true, true]);
    expect(readdirSync(temporary)).toEqual([]);
    const nowhere = { TMPDIR: "/nonexistent", BUN_TMPDIR: "/nonexistent" };
    expect(answers(run([path], nowhere)).workers.map(([, answer]) => answer)).toEqual([
      "loaded",
      "loaded",
    ]);
  });
});

describe("bun build --outdir", () => {
  test("starts Workers from the files beside the bundle, from any directory", () => {
    const bundle = [process.execPath, "build", "--target", "bun", "user.ts", "--outdir", "bundle"];
    Bun.spawnSync(bundle, { cwd: folder });
    const { workers } = answers(run([process.execPath, "bundle/user.js"]));
    expect(workers.map(([, answer]) => answer)).toEqual(["loaded", "loaded"]);
    expect(workers.map(([url]) => url.startsWith(`file://${folder}/bundle/`))).toEqual([
      true,
      true,
    ]);
  });
});

describe("dist/fsl", () => {
  test("runs no code of the folder that it is started in, and takes no environment from there", () => {
    const foreign = join(folder, "foreign");
    mkdirSync(foreign);
    writeFileSync(join(foreign, "bunfig.toml"), 'preload = ["./preload.ts"]\n');
    writeFileSync(join(foreign, "preload.ts"), 'console.error("preloaded");\n');
    writeFileSync(join(foreign, ".env"), "FSL_TRACE_FFI=1\n");
    // That both are heeded where nobody forbids it, or there would be nothing to forbid.
    const done = Bun.spawnSync([process.execPath, "-e", "console.log(process.env.FSL_TRACE_FFI)"], {
      cwd: foreign,
    });
    expect(`${done.stdout}${done.stderr}`).toBe("1\npreloaded\n");
    const version = run([join(ROOT, "dist/fsl"), "--version"], {}, foreign);
    expect(version).toMatch(/^[0-9.]+\n$/);
    // It calls the shim, which would be traced to stderr.
    expect(JSON.parse(run([join(ROOT, "dist/fsl"), "doctor", "--json"], {}, foreign))).toBeObject();
  });

  test.each(["--version", "status", "doctor --json"])(
    "%s: a result that cannot be written is an error, one that nobody reads on is none",
    (line) => {
      const fsl = [join(ROOT, "dist/fsl"), ...line.split(" ")];
      const to = (where: string): string => {
        const command = ["sh", "-c", `"$0" "$@" ${where}`, ...fsl];
        const { exitCode, stderr } = Bun.spawnSync(command, { stderr: "pipe" });
        return `${exitCode} ${stderr}`;
      };
      expect(to(">/dev/full")).toMatch(/^2 .*standard output cannot be written \(ENOSPC\)/);
      expect(to("| true")).toBe("0 ");
    },
  );

  test("loads no library of the folder that it is started in, also where it cannot load its own", () => {
    const foreign = join(folder, "libraries");
    mkdirSync(foreign);
    for (const name of ["libc.so.6", "libc.musl-x86_64.so.1", "libc.musl-aarch64.so.1"]) {
      writeFileSync(join(foreign, name), "no library, which would be said");
    }
    // Nothing can be loaded without it.
    const env = { ...process.env, BUN_JSC_useJIT: "0" };
    const command = [join(ROOT, "dist/fsl"), "doctor", "--json"];
    const { stdout, stderr } = Bun.spawnSync(command, { cwd: foreign, env });
    const said = `${stdout}${stderr}`;
    expect(said).toContain("shim: cannot be loaded");
    expect(said).not.toContain(foreign);
    expect(said).not.toContain("musl");
  });

  test("starts at once and writes no temporary file", () => {
    const path = join(ROOT, "dist/fsl");
    if (!existsSync(path)) throw new Error("dist/fsl is not there; run: npm run build");
    run([path, "--version"]);
    const startNs = Bun.nanoseconds();
    run([path, "doctor", "--json"]);
    const tookMs = (Bun.nanoseconds() - startNs) / 1e6;
    expect(readdirSync(temporary)).toEqual([]);
    // 40 ms on an idle machine; doctor starts QEMU once to ask its version.
    expect(tookMs).toBeLessThan(2000);
  });
});
