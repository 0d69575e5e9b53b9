/**
 * The library as others use it: from the packed package, by `bun`, compiled, and with page sources
 * of their own.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { copyFileSync, existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { dumpMemory, type GuestSnapshot, snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import { differencesFromOracle } from "../helpers/load-oracle.ts";
import { FslRun, plainEnvironment, whyNoExecutable } from "../helpers/load-runs.ts";
import { patternPage, type TestSourceOptions } from "../helpers/load-sources.ts";
import { openSnapshot } from "../../src/index.ts";

const TIMEOUT_MS = 60_000;
const ROOT = join(import.meta.dir, "../..");
const HELPERS = join(ROOT, "tests/helpers");
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

beforeAll(async () => {
  if (skip) return;
  snapshot = await snapshotOf({ guest: "bare" });
  project = mkdtempSync(join(tmpdir(), "fsl-load-test-"));
  elsewhere = mkdtempSync(join(tmpdir(), "fsl-load-test-"));
  writeFileSync(join(project, "package.json"), '{ "type": "module" }\n');
  await installPackage(join(project, "node_modules/fsl"));
  copyFileSync(join(HELPERS, "load-script.ts"), join(project, "script.ts"));
}, TIMEOUT_MS);

afterAll(() => {
  for (const path of [project, elsewhere]) if (path) rmSync(path, { recursive: true, force: true });
});

async function expectLoads(program: readonly string[], cwd: string): Promise<void> {
  await using run = await FslRun.start(snapshot, { program, cwd, flags: ["--paused"] });
  const report = await run.complete();
  expect(report).toMatchObject({ complete: true, mode: "lazy" });
  expect(await differencesFromOracle(snapshot, { pid: await run.qemuPid(), qmp: run.qmp })).toEqual(
    [],
  );
  await run.qmp.execute("quit");
  expect(await run.end()).toBe(0);
  expect(run.stdout.text).toMatch(/^blocks pc\.ram /);
  expect(run.leftovers()).toEqual([]);
}

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
      const app = join(elsewhere, "app");
      const build = Bun.spawnSync(
        [process.execPath, "build", "--compile", "script.ts", "--outfile", app],
        { cwd: project, env: plainEnvironment() },
      );
      expect(build.stderr.toString()).not.toMatch(/error/i);
      expect(build.exitCode).toBe(0);
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
  /** Runs the script in this repository, where the test's source is. */
  async function load(options: Omit<TestSourceOptions, "path">): Promise<FslRun> {
    const spec = {
      module: join(HELPERS, "load-sources.ts"),
      options: { path: snapshot.path, ...options },
    };
    const flags = ["--paused", "--source", JSON.stringify(spec)];
    return FslRun.start(snapshot, {
      program: [process.execPath, "script.ts"],
      cwd: project,
      flags,
    });
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
    "decides every byte of the data pages, and none of the zero pages",
    async () => {
      await using run = await load({ kind: "pattern" });
      await run.complete();
      const ram = (await dumpMemory({ pid: await run.qemuPid(), qmp: run.qmp })).get("pc.ram");
      using opened = openSnapshot(snapshot.path);
      const block = opened.blocks.find(({ idstr }) => idstr === "pc.ram");
      if (block === undefined || ram === undefined) throw new Error("no pc.ram");
      const bitmap = opened.pageBitmap(block);
      const zero = Bun.hash.wyhash(new Uint8Array(4096));
      const wrong = [...ram.hashes.keys()].filter((page) => {
        const expected = bitmap.has(page) ? Bun.hash.wyhash(patternPage(0, page, 4096)) : zero;
        return ram.hashes[page] !== expected;
      });
      expect(wrong).toEqual([]);
      expect(bitmap.dataPages).toBeGreaterThan(10_000);
    },
    TIMEOUT_MS,
  );

  test.each([
    ["near the beginning", 600],
    ["half-way", 8000],
  ])(
    "may break down once, %s: its Worker is replaced and every page comes",
    async (_, failPage) => {
      using opened = openSnapshot(snapshot.path);
      const block = opened.blocks.find(({ idstr }) => idstr === "pc.ram");
      if (block === undefined) throw new Error("no pc.ram");
      const bitmap = opened.pageBitmap(block);
      let page = failPage;
      while (!bitmap.has(page)) page += 1;
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
