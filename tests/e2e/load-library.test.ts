/**
 * The library as others use it: from the packed package, by `bun`, compiled, and with page sources
 * of their own.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { dumpMemory, type GuestSnapshot, snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import { differencesFromOracle } from "../helpers/load-oracle.ts";
import { FslRun, plainEnvironment, whyNoExecutable } from "../helpers/load-runs.ts";
import { patternPage, type TestSourceOptions } from "../helpers/load-sources.ts";
import { specialSnapshot, type TemporarySnapshot } from "../helpers/load-snapshots.ts";
import { type LoadReport, openSnapshot } from "../../src/index.ts";

const TIMEOUT_MS = 60_000;
const ROOT = join(import.meta.dir, "../..");
const HELPERS = join(ROOT, "tests/helpers");
/** Backends for a guest's memory. */
const SHARED = "memory-backend-memfd,share=on";
const TOUCHED = "memory-backend-ram,prealloc=on";
const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;

let snapshot: GuestSnapshot;
/**
 * A project of somebody else's, with the package installed; and a folder with nothing in it but the
 * compiled script.
 */
let project: string;
let elsewhere: string;

/** Installs exactly the files that the package would hold, but for the 100 MB of the executable. */
async function installPackage(into: string): Promise<void> {
  const child = Bun.spawn(["npm", "pack", "--dry-run", "--json", "--ignore-scripts"], {
    cwd: ROOT,
    stdout: "pipe",
    stderr: "ignore",
  });
  const [packed] = (await new Response(child.stdout).json()) as { files: { path: string }[] }[];
  for (const { path } of packed?.files ?? []) {
    if (path.startsWith("dist/")) continue;
    mkdirSync(join(into, dirname(path)), { recursive: true });
    copyFileSync(join(ROOT, path), join(into, path));
  }
}

/** The script in README.md. */
function readmeExample(): string {
  const [, example, ...more] = readFileSync(join(ROOT, "README.md"), "utf8").split("```ts\n");
  if (example === undefined || more.length > 0) throw new Error("README.md: expected one script");
  return example.slice(0, example.indexOf("```"));
}

/** The same, with the snapshot and the command line that it is started with. */
function forThisGuest(example: string): string {
  const script = example
    .replaceAll('"guest.snap"', 'process.argv[2] ?? ""')
    .replace(/argv: \[.*?\]/, 'argv: process.argv.slice(process.argv.indexOf("--") + 1)');
  if (script.match(/process\.argv\[2\]/g)?.length !== 2 || !script.includes("argv.slice")) {
    throw new Error("README.md: the script has no snapshot or no command line any more");
  }
  return script;
}

/** What `bun init` sets, and everything else that is strict. */
const STRICT = {
  target: "esnext",
  lib: ["esnext"],
  module: "preserve",
  moduleResolution: "bundler",
  types: ["bun"],
  allowImportingTsExtensions: true,
  verbatimModuleSyntax: true,
  isolatedModules: true,
  noEmit: true,
  skipLibCheck: true,
  strict: true,
  exactOptionalPropertyTypes: true,
  noFallthroughCasesInSwitch: true,
  noImplicitOverride: true,
  noImplicitReturns: true,
  noPropertyAccessFromIndexSignature: true,
  noUncheckedIndexedAccess: true,
  noUnusedLocals: true,
  noUnusedParameters: true,
};

beforeAll(async () => {
  if (skip) return;
  snapshot = await snapshotOf({ guest: "bare" });
  project = mkdtempSync(join(tmpdir(), "fsl-load-test-"));
  elsewhere = mkdtempSync(join(tmpdir(), "fsl-load-test-"));
  writeFileSync(join(project, "package.json"), '{ "type": "module" }\n');
  await installPackage(join(project, "node_modules/fsl"));
  copyFileSync(join(HELPERS, "load-script.ts"), join(project, "script.ts"));
  writeFileSync(join(project, "readme.ts"), readmeExample());
  writeFileSync(join(project, "readme-run.ts"), forThisGuest(readmeExample()));
}, TIMEOUT_MS);

afterAll(() => {
  for (const path of [project, elsewhere]) if (path) rmSync(path, { recursive: true, force: true });
});

/** The first data page of a block, from one page on. */
function dataPage({ path }: GuestSnapshot, name: string, from: number): number {
  using opened = openSnapshot(path);
  const block = opened.blocks.find(({ idstr }) => idstr === name);
  const run = block && opened.pageBitmap(block).nextDataRun(from);
  if (run === undefined || run === null) throw new Error(`no data page ${from} of ${name}`);
  return run.startIndex;
}

async function expectLoads(
  program: readonly string[],
  cwd: string,
  flags: readonly string[] = [],
): Promise<FslRun> {
  await using run = await FslRun.start(snapshot, { program, cwd, flags: ["--paused", ...flags] });
  const report = await run.complete();
  expect(report).toMatchObject({ complete: true, mode: "lazy" });
  expect(await differencesFromOracle(snapshot, { pid: await run.qemuPid(), qmp: run.qmp })).toEqual(
    [],
  );
  await run.qmp.execute("quit");
  expect(await run.end()).toBe(0);
  expect(run.stdout.text).toMatch(/^blocks pc\.ram /);
  expect(run.leftovers()).toEqual([]);
  return run;
}

describe.skipIf(skip)("what is begun before QEMU is ready", () => {
  test.each([
    ["for the right memory is gone on with", 0, 0],
    ["for other memory is begun again", 0x20_0000, 1],
    ["for memory that cannot be one block's is begun again", 0x1000, 1],
  ])(
    "%s",
    async (_what, shift, times) => {
      const flags = ["--shift-guess", String(shift)];
      const run = await expectLoads([process.execPath, "script.ts"], project, flags);
      expect(run.stdout.text).toContain("guessed 1");
      expect(run.stdout.text.match(/the fault loop starts again/g) ?? []).toHaveLength(times);
    },
    TIMEOUT_MS,
  );
});

/** Compiles a script of the project. @returns the program, in a folder with nothing else of it */
function compile(script: string): string {
  const app = join(elsewhere, "app");
  const build = Bun.spawnSync([process.execPath, "build", "--compile", script, "--outfile", app], {
    cwd: project,
    env: plainEnvironment(),
  });
  expect(build.stderr.toString()).not.toMatch(/error/i);
  expect(build.exitCode).toBe(0);
  return app;
}

/** Lets the guest of README's script run until all its RAM is in, and end. */
async function expectReadmeRuns(program: readonly string[], cwd: string): Promise<void> {
  await using run = await FslRun.start(snapshot, { program, cwd });
  await run.stdout.waitFor(/^\d[\d.]* \d+$/m); // residentMs and faults
  expect(run.stdout.text).toMatch(
    new RegExp(`^${snapshot.machineType} \\[\\s+\\[ "pc.ram", ${snapshot.memoryMiB * 2 ** 20} \\]`),
  );
  expect((await run.serial.waitForNext(/^tick /)).text).toMatch(/ ok$/);
  await run.qmp.execute("quit");
  expect(await run.end()).toBe(0);
  expect(run.leftovers()).toEqual([]);
}

describe.skipIf(skip)("the script in README.md", () => {
  test(
    "runs by bun",
    () => expectReadmeRuns([process.execPath, "readme-run.ts"], project),
    TIMEOUT_MS,
  );

  test("runs compiled", () => expectReadmeRuns([compile("readme-run.ts")], elsewhere), TIMEOUT_MS);

  test(
    "passes a strict type check, with the package's sources",
    async () => {
      // Dependencies of the package, and what the project itself would install for its check.
      for (const name of ["citty", "consola", "@types", "bun-types", "undici-types"]) {
        symlinkSync(join(ROOT, "node_modules", name), join(project, "node_modules", name));
      }
      const settings = { compilerOptions: STRICT, files: ["readme.ts", "script.ts"] };
      writeFileSync(join(project, "tsconfig.json"), JSON.stringify(settings));
      const tsc = join(ROOT, "node_modules/.bin/tsc");
      const child = Bun.spawn([tsc, "-p", project], { stdout: "pipe", stderr: "pipe" });
      expect(await new Response(child.stdout).text()).toBe("");
      expect(await child.exited).toBe(0);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(skip)("the package", () => {
  test(
    "loads a snapshot from a script that bun runs",
    async () => {
      await expectLoads([process.execPath, "script.ts"], project);
    },
    TIMEOUT_MS,
  );

  test(
    "loads a snapshot from a script that is compiled, in a folder of its own",
    async () => {
      const app = compile("script.ts");
      const away = `${project}.away`;
      await Bun.$`mv ${project} ${away}`.quiet();
      try {
        await expectLoads([app], elsewhere);
      } finally {
        await Bun.$`mv ${away} ${project}`.quiet();
      }
    },
    TIMEOUT_MS,
  );

  test(
    "throws an FslError of its own for what cannot be loaded",
    async () => {
      const argv = snapshot.argv.map((argument) => (argument === "64" ? "128" : argument));
      const program = [process.execPath, "script.ts"];
      await using run = await FslRun.start(snapshot, { program, cwd: project, argv });
      expect(await run.end()).toBe(7);
      expect(run.stderr.text).toMatch(/^TARGET_MISMATCH: .*start QEMU with -m 64M$/m);
      expect(run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test("holds what it needs, and no tests", () => {
    const files = [...new Bun.Glob("**").scanSync({ cwd: join(project, "node_modules/fsl") })];
    for (const file of [
      "src/index.ts",
      "build/libraries.json",
      "build/fault-worker.bundle.js",
      "LICENSE",
    ]) {
      expect(files).toContain(file);
    }
    expect(
      files.filter((file) => /(^|\/)(tests|scripts)\/|kernel-target|bench/.test(file)),
    ).toEqual([]);
  });
});

describe.skipIf(skip)("a page source of somebody else's", () => {
  /** A guest with a balloon: shared memory is filled in full before it runs. */
  let ballooned: TemporarySnapshot;
  beforeAll(async () => {
    if (skip) return;
    const memoryBackend = "memory-backend-ram";
    const extraArgs = ["-device", "virtio-balloon-pci"];
    ballooned = await specialSnapshot({ guest: "bare", memoryBackend, extraArgs }, {});
  }, TIMEOUT_MS);
  afterAll(() => ballooned?.[Symbol.dispose]());

  /** Runs the script in this repository, where the test's source is. */
  async function load(
    options: Omit<TestSourceOptions, "path">,
    from: GuestSnapshot = snapshot,
    backend = "memory-backend-ram",
  ): Promise<FslRun> {
    const spec = {
      module: join(HELPERS, "load-sources.ts"),
      options: { path: from.path, ...options },
    };
    const flags = ["--paused", "--source", JSON.stringify(spec)];
    return FslRun.start(from, {
      program: [process.execPath, "script.ts"],
      cwd: project,
      flags,
      argv: from.argv.map((argument) => argument.replace(/^memory-backend-ram/, backend)),
    });
  }

  /** Data pages that are not the source's, and zero pages that are not zero, of every RAMBlock. */
  async function wrongPages(run: FslRun, from: GuestSnapshot): Promise<string[]> {
    const memory = await dumpMemory({ pid: await run.qemuPid(), qmp: run.qmp });
    using opened = openSnapshot(from.path);
    const zero = Bun.hash.wyhash(new Uint8Array(4096));
    return opened.blocks.flatMap((block) => {
      const hashes = memory.get(block.idstr)?.hashes;
      if (hashes === undefined) return [`${block.idstr}: not there`];
      const bitmap = opened.pageBitmap(block);
      return [...hashes.keys()]
        .filter((page) => {
          const isData = page < block.pageCount && bitmap.has(page);
          const made = patternPage(block.idstr, page, 4096);
          return hashes[page] !== (isData ? Bun.hash.wyhash(made) : zero);
        })
        .map((page) => `${block.idstr} page ${page}`);
    });
  }

  /** How the blocks with data got it. */
  function waysOf({ blocks }: LoadReport): Set<string> {
    return new Set(blocks.filter(({ dataBytes }) => dataBytes > 0).map(({ way }) => way));
  }

  test.each(["pread", "later", "thread"] as const)(
    "takes the default's place: %s",
    async (kind) => {
      await using run = await load({ kind });
      const report = await run.complete();
      expect(report.complete).toBe(true);
      const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
      expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
      await run.qmp.execute("cont");
      expect((await run.serial.waitFor(/^tick /)).text).toMatch(/ ok$/);
    },
    TIMEOUT_MS,
  );

  test.each(["pread", "later", "thread"] as const)(
    "serves a running guest's faults: %s",
    async (kind) => {
      const spec = {
        module: join(HELPERS, "load-sources.ts"),
        options: { path: snapshot.path, kind },
      };
      const flags = ["--source", JSON.stringify(spec)];
      const program = [process.execPath, "script.ts"];
      await using run = await FslRun.start(snapshot, { program, cwd: project, flags });
      expect((await run.serial.waitFor(/^tick 1 /)).text).toBe("tick 1 ok");
      expect((await run.complete()).faults).toBeGreaterThan(0);
      expect((await run.serial.waitForNext(/^tick /)).text).toMatch(/ ok$/);
    },
    TIMEOUT_MS,
  );

  test(
    "decides every byte of the data pages of every RAMBlock, and none of the zero pages",
    async () => {
      await using run = await load({ kind: "pattern" });
      const report = await run.complete();
      // What travels in the seed is the source's too.
      expect(waysOf(report)).toEqual(new Set(["lazy", "seed"]));
      expect(await wrongPages(run, snapshot)).toEqual([]);
      expect(report.blocks.find(({ way }) => way === "lazy")?.dataBytes).toBeGreaterThan(4e7);
    },
    TIMEOUT_MS,
  );

  test(
    "decides every byte of blocks that are filled before resume",
    async () => {
      await using run = await load({ kind: "pattern" }, ballooned, SHARED);
      expect(waysOf(await run.complete())).toEqual(new Set(["fill", "seed"]));
      expect(await wrongPages(run, ballooned)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "decides every byte of pages that QEMU has touched before",
    async () => {
      await using run = await load({ kind: "pattern" }, ballooned, TOUCHED);
      expect(waysOf(await run.complete())).toEqual(new Set(["lazy", "seed"]));
      expect(run.stdout.text).toContain("info 64 MiB of RAM are in QEMU's memory already");
      expect(await wrongPages(run, ballooned)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test.each([
    ["later", SHARED],
    ["thread", SHARED],
    ["later", TOUCHED],
    ["thread", TOUCHED],
  ] as const)(
    "is waited for before the guest runs: %s, %s",
    async (kind, backend) => {
      await using run = await load({ kind }, ballooned, backend);
      expect((await run.complete()).complete).toBe(true);
      const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
      expect(await differencesFromOracle(ballooned, qemu)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test.each([
    ["a block that is filled", SHARED],
    ["a page that QEMU has touched", TOUCHED],
  ])(
    "that cannot read %s is an error that says so, and QEMU is ended",
    async (_, backend) => {
      const failPage = dataPage(ballooned, "ram0", 8000);
      await using run = await load({ kind: "failing", failPage }, ballooned, backend);
      expect(await run.end()).toBe(3);
      expect(run.stderr.text).toMatch(
        new RegExp(
          `^SNAPSHOT_OPEN: page source .*: page ${failPage} of RAMBlock ram0 cannot be read: .*EIO`,
          "m",
        ),
      );
      expect(run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test.each([
    ["near the beginning", 600],
    ["half-way", 8000],
  ])(
    "may break down once, %s: its Worker is replaced and every page comes",
    async (_, failPage) => {
      const page = dataPage(snapshot, "pc.ram", failPage);
      rmSync(join(elsewhere, `died-${failPage}`), { force: true });
      const marker = join(elsewhere, `died-${failPage}`);
      await using run = await load({ kind: "dying", failPage: page, marker });
      const report = await run.complete();
      expect(existsSync(marker)).toBe(true);
      expect(run.stdout.text).toMatch(
        /warn (fault|eager) Worker failed: the source breaks down; another one takes over/,
      );
      expect(report.complete).toBe(true);
      const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
      expect(await differencesFromOracle(snapshot, qemu)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "that does not exist is refused before the guest has its state, and QEMU is ended",
    async () => {
      const flags = ["--source", JSON.stringify({ module: "/nonexistent.ts", options: null })];
      const program = [process.execPath, "script.ts"];
      await using run = await FslRun.start(snapshot, { program, cwd: project, flags });
      expect(await run.end()).not.toBe(0);
      expect(run.stderr.text).toMatch(/nonexistent\.ts/);
      expect(run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );
});
