/** `fsl save` and `fsl inspect` of the executable, with a real QEMU. */
import { describe, expect, test } from "bun:test";
import {
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { CAUGHT_SIGNALS } from "../../src/cli/serve.ts";
import { AttachRun } from "../helpers/attach-runs.ts";
import type { Ended, FslProcess } from "../helpers/fault-runs.ts";
import { guestArgv, whyNoGuests } from "../helpers/guests.ts";
import { whyNoExecutable } from "../helpers/load-runs.ts";

const TIMEOUT_MS = 60_000;
const argv = whyNoGuests() === null ? guestArgv({ guest: "bare" }) : [];
/** Its RAM takes a while to look through. */
const big = argv.length > 0 ? guestArgv({ guest: "bare", memoryMiB: 2048, dataMiB: 32 }) : [];

describe.skipIf((whyNoExecutable() ?? whyNoGuests()) !== null)("fsl save", () => {
  test.each([
    ["is complete by its own description", [], true, "complete by its own description"],
    [
      "without a description: that cannot be told",
      ["-machine", "suppress-vmdesc=on"],
      null,
      "no description: completeness cannot be told",
    ],
  ] as const)(
    "a snapshot %s, says it and fsl inspect",
    async (_, qemuArgs, complete, words) => {
      await using run = await AttachRun.start({ argv }, { qemuArgs, incoming: [] });
      await run.serial.waitFor(/^READY /);
      const path = join(run.directory, "guest.snap");
      const save = ["save", path, "--qmp", run.qmpPath, "--then", "cont"];
      const asJson = await run.run(...save, "--json");
      expect(asJson).toMatchObject({ code: 0, stderr: "" });
      expect(JSON.parse(asJson.stdout)).toMatchObject({ path, complete });
      const asText = await run.run(...save);
      expect(asText.code).toBe(0);
      expect(asText.stderr).toContain(`saved ${path}`);
      expect(asText.stderr.includes("the device state was not looked at")).toBe(complete === null);
      const inspected = await run.run("inspect", path);
      expect(inspected.stdout).toContain(words);
      const inspectedJson = await run.run("inspect", path, "--json");
      expect(JSON.parse(inspectedJson.stdout)).toMatchObject({ complete });
    },
    TIMEOUT_MS,
  );

  test.each<[string, readonly string[], { savedLive: boolean; isMultifd: boolean }]>([
    ["stopped", [], { savedLive: false, isMultifd: false }],
    ["--live", ["--live"], { savedLive: true, isMultifd: false }],
    ["--multifd 2", ["--multifd", "2"], { savedLive: false, isMultifd: true }],
  ])(
    "%s, --then cont: the snapshot is complete and the guest runs on",
    async (_, flags, { savedLive, isMultifd }) => {
      await using run = await startRun();
      const before = await run.traits();
      const { code, stderr } = await save(run, ...flags, "--then", "cont");
      expect({ code, stderr }).toEqual({ code: 0, stderr: saved("the guest runs on") });
      expect(await inspect(run)).toMatchObject({ complete: true, savedLive });
      expect((await multifdBytes(run)) > 0).toBe(isMultifd);
      await expectRunning(run, ["guest.snap"]);
      expect(await run.traits()).toEqual(before);
    },
    TIMEOUT_MS,
  );

  test(
    "--then stay is the default: the guest is stopped until cont",
    async () => {
      await using run = await startRun();
      for (const flags of [[], ["--then", "stay"]]) {
        const { code, stderr } = await save(run, ...flags);
        const words = "the guest is stopped, `cont` in QEMU's monitor lets it run on";
        expect({ code, stderr }).toEqual({ code: 0, stderr: saved(words) });
        expect(await run.qmp.execute("query-status")).toMatchObject({ status: "postmigrate" });
        expect(await inspect(run)).toMatchObject({ complete: true });
        await run.qmp.execute("cont");
        await expectRunning(run, ["guest.snap"]);
      }
    },
    TIMEOUT_MS,
  );

  test(
    "--then quit ends QEMU, and the snapshot loads",
    async () => {
      await using run = await startRun();
      const { code, stderr } = await save(run, "--then", "quit");
      expect({ code, stderr }).toEqual({ code: 0, stderr: saved("QEMU has ended") });
      expect(run.processes("qemu-system")).toEqual([]);
      expect(files(run)).toEqual(["guest.snap"]);
      await using target = await AttachRun.start({ argv });
      const loaded = await target.attach({ path: join(run.directory, "guest.snap") }).end();
      expect(loaded.code).toBe(0);
      await target.qmp.execute("cont");
      await target.serial.waitForNext(/^tick \d+ ok/);
    },
    TIMEOUT_MS,
  );

  test.skipIf(process.getuid?.() !== 0)(
    "on a full disk: the guest runs on, and no file is left",
    async () => {
      await using run = await startRun();
      const directory = join(run.directory, "small");
      mkdirSync(directory);
      const mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory];
      expect(Bun.spawnSync(mount).exitCode).toBe(0);
      try {
        const path = join(directory, "guest.snap");
        const { code, stderr } = await run.run("save", path, "--qmp", run.qmpPath);
        expect(stderr).toStartWith(`fsl: save ${path}: QEMU could not write it: `);
        expect(stderr).toEndWith("; the guest is running, as before\n");
        expect(code).toBe(10);
        expect(readdirSync(directory)).toEqual([]);
        await expectRunning(run, ["small"]);
      } finally {
        Bun.spawnSync(["umount", directory]);
      }
    },
    TIMEOUT_MS,
  );

  test(
    "a signal in the middle: the guest runs on, and the file that was there stays",
    async () => {
      await using run = await startRun(big);
      const before = await run.traits();
      writeFileSync(join(run.directory, "guest.snap"), "old");
      for (const signal of CAUGHT_SIGNALS) {
        const ended = await interrupted(run, signal);
        expect({ signal, ...ended }).toEqual({
          signal,
          code: 10,
          stdout: "",
          stderr: "fsl: save: interrupted; the guest is running, as before\n",
        });
        await expectRunning(run, ["guest.snap"]);
        expect(await run.traits()).toEqual(before);
      }
      expect(readFileSync(join(run.directory, "guest.snap"), "utf8")).toBe("old");
    },
    TIMEOUT_MS,
  );

  test(
    "killed in the middle: the file that was there stays, with a part beside it; cont, and it can be saved again",
    async () => {
      await using run = await startRun(big);
      writeFileSync(join(run.directory, "guest.snap"), "old");
      expect((await interrupted(run, "SIGKILL")).code).toBe(137);
      await run.qmp.waitEvent("MIGRATION", ({ status }) => status === "completed");
      expect(await run.qmp.execute("query-status")).toMatchObject({ status: "postmigrate" });
      expect(readFileSync(join(run.directory, "guest.snap"), "utf8")).toBe("old");
      const left = files(run).filter((name) => name !== "guest.snap");
      expect(left).toEqual([expect.stringMatching(/^\.guest\.snap\.fsl-[0-9a-f]+$/)]);
      await run.qmp.execute("cont");
      const again = ["save", "guest.snap", "--qmp", run.qmpPath, "--quiet", "--then", "cont"];
      expect((await run.run(...again)).code).toBe(0);
      await expectRunning(run, files(run));
      expect((await run.run("inspect", "guest.snap")).code).toBe(0);
    },
    TIMEOUT_MS,
  );

  test(
    "a path where there is no file is refused, and the guest is not stopped",
    async () => {
      await using run = await startRun();
      const refused: [make: (path: string) => unknown, found: string][] = [
        [(path) => mkdirSync(path), "a directory"],
        [(path) => Bun.spawnSync(["mkfifo", path]), "a FIFO"],
        [(path) => symlinkSync("/dev/null", path), "a device"],
      ];
      const made: string[] = [];
      for (const [make, found] of refused) {
        const name = found.replace(" ", "-");
        const path = join(run.directory, name);
        make(path);
        made.push(name);
        const { mode, ino } = lstatSync(path);
        const { code, stderr } = await run.run("save", path, "--qmp", run.qmpPath);
        expect({ code, stderr }).toEqual({
          code: 2,
          stderr:
            `fsl: save ${path}: it is ${found}; name a file, or nothing that exists\n` +
            "fsl: try 'fsl save --help'\n",
        });
        expect(lstatSync(path)).toMatchObject({ mode, ino });
      }
      const path = join(run.directory, "none/guest.snap");
      const { code, stderr } = await run.run("save", path, "--qmp", run.qmpPath);
      const words = `the directory ${run.directory}/none does not exist`;
      expect({ code, stderr }).toEqual({ code: 10, stderr: `fsl: save ${path}: ${words}\n` });
      await expectRunning(run, made.sort());
      expect(run.qmp.events.map(({ event }) => event)).not.toContain("STOP");
    },
    TIMEOUT_MS,
  );

  test(
    "gives a file that it replaces its mode back, and any name room",
    async () => {
      await using run = await startRun();
      const folder = join(run.directory, "own");
      mkdirSync(folder);
      const path = join(folder, "é".repeat(127));
      writeFileSync(path, "", { mode: 0o640 });
      const first = await run.run("save", path, "--qmp", run.qmpPath, "--then", "cont");
      expect([first.code, lstatSync(path).mode & 0o777]).toEqual([0, 0o640]);
      const other = join(folder, "new.snap");
      const second = await run.run("save", other, "--qmp", run.qmpPath, "--then", "cont");
      expect([second.code, lstatSync(other).mode & 0o777]).toEqual([0, 0o600]);
      expect(readdirSync(folder).length).toBe(2);
    },
    TIMEOUT_MS,
  );

  test(
    "says that it waits while QEMU does not answer, and nothing of faults",
    async () => {
      await using run = await startRun();
      process.kill(run.pid, "SIGSTOP");
      const fsl = run.fsl("save", "guest.snap", "--qmp", run.qmpPath);
      await fsl.stderr.waitFor(/^fsl: waiting for QEMU, \d/m);
      process.kill(run.pid, "SIGCONT");
      const { code, stderr } = await fsl.end();
      expect(code).toBe(0);
      expect(stderr).not.toMatch(/faults|0 bytes,/);
    },
    TIMEOUT_MS,
  );
});

/** A guest that runs. */
async function startRun(guest = argv): Promise<AttachRun> {
  const run = await AttachRun.start({ argv: guest }, { incoming: [] });
  await run.serial.waitFor(/^READY /);
  return run;
}

function save(run: AttachRun, ...flags: readonly string[]): Promise<Ended> {
  return run.run("save", join(run.directory, "guest.snap"), "--qmp", run.qmpPath, ...flags);
}

/** What is said at the end, after lines of progress that a busy host may see. */
function saved(afterwards: string): string {
  return expect.stringMatching(
    new RegExp(`saved \\S+/guest\\.snap: \\S+ MiB on disk, \\S+ m?s; ${afterwards}\\n$`),
  ) as unknown as string;
}

async function inspect(run: AttachRun): Promise<unknown> {
  const { stdout } = await run.run("inspect", join(run.directory, "guest.snap"), "--json");
  return JSON.parse(stdout);
}

/** What QEMU has written by channels of their own. */
async function multifdBytes(run: AttachRun): Promise<number> {
  const { ram } = await run.qmp.execute<{ ram: Record<string, number> }>("query-migrate");
  return ram["multifd-bytes"] ?? 0;
}

/** What the run's directory holds besides its own. */
function files(run: AttachRun): string[] {
  return readdirSync(run.directory)
    .filter((name) => name !== "run" && name !== "tmp")
    .sort();
}

/** The guest goes on, its monitor is free, and there are these files. */
async function expectRunning(run: AttachRun, names: readonly string[]): Promise<void> {
  expect(await run.qmp.execute("query-status")).toMatchObject({ status: "running" });
  await run.serial.waitForNext(/^tick \d+ ok/);
  expect(files(run)).toEqual([...names]);
}

/** `fsl save` that gets a signal while QEMU, which is held so long, writes. */
async function interrupted(run: AttachRun, signal: NodeJS.Signals): Promise<Ended> {
  const from = run.qmp.events.length;
  const fsl: FslProcess = run.fsl("save", "guest.snap", "--qmp", run.qmpPath, "--quiet");
  await run.qmp.waitEvent("MIGRATION", ({ status }) => status === "active", 10_000, from);
  process.kill(run.pid, "SIGSTOP");
  expect(files(run)).toHaveLength(2);
  fsl.signal(signal);
  // Long enough for the signal to come in first, far below the time that QEMU may take to answer.
  await Bun.sleep(100);
  process.kill(run.pid, "SIGCONT");
  return fsl.end();
}
