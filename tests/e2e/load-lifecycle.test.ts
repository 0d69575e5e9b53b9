/**
 * From the start of `fsl load` to its end: exit codes, signals, terminals, progress, and what stays
 * in QEMU.
 */
import { describe, expect, test } from "bun:test";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { constants, tmpdir } from "node:os";
import { join } from "node:path";
import {
  dumpMemory,
  guestArgv,
  memoryDifferences,
  type QmpClient,
  ramBlocks,
  saveSnapshot,
  snapshotOf,
  startQemu,
  whyNoGuests,
} from "../helpers/guests.ts";
import {
  childrenOf,
  FSL,
  FslRun,
  isRunning,
  openFiles,
  plainEnvironment,
  until,
  Watched,
  whyNoExecutable,
  within,
} from "../helpers/load-runs.ts";

const TIMEOUT_MS = 60_000;
const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;
const bare = () => snapshotOf({ guest: "bare" });

describe.skipIf(skip)("fsl load's exit code", () => {
  test(
    "is QEMU's when the guest powers off",
    async () => {
      await using run = await FslRun.start(await snapshotOf({ machine: "q35" }));
      await run.serial.waitFor(/^tick /);
      run.serial.send("poweroff\n");
      expect(await run.end()).toBe(0);
      expect(run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test.each([
    [24, "SIGXCPU"],
    [34, "the first real-time signal"],
    [64, "the last"],
  ])(
    "is 128 + %i when QEMU dies of %s",
    async (number) => {
      await using run = await FslRun.start(await bare());
      await run.serial.waitFor(/^tick \d+ ok/);
      Bun.spawnSync(["kill", `-${number}`, String(await run.qemuPid())]);
      expect(await run.end()).toBe(128 + number);
      expect(run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test.each([
    ["while RAM comes in", ["--eager-rate", "4K"]],
    ["when all RAM is in", []],
  ])(
    "is 137 when QEMU is killed %s",
    async (_, flags) => {
      await using run = await FslRun.start(await bare(), { flags });
      await run.serial.waitFor(/^tick \d+ ok/);
      if (flags.length === 0) await run.complete();
      process.kill(await run.qemuPid(), "SIGKILL");
      expect(await run.end()).toBe(137);
      expect(run.report().complete).toBe(flags.length === 0);
      expect(run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(skip || process.getuid?.() !== 0)("fsl load of a QEMU that is confined", () => {
  const weaker = "on,obsolete=deny,spawn=deny,resourcecontrol=deny";
  const sandbox = `${weaker},elevateprivileges=deny`;
  test.each<[string, readonly string[], readonly string[]]>([
    ["in a sandbox", [], ["-sandbox", sandbox]],
    ["as another user", [], ["-run-with", "user=nobody"]],
    // Where QEMU may not change its user it dies of trying.
    ["in both", [], ["-sandbox", weaker, "-run-with", "user=nobody"]],
    // A program that starts QEMU in its own place: ptrace, where the library is not loaded twice.
    ["in a sandbox, started by another program", ["env"], ["-sandbox", sandbox]],
    ["as another user, started by another program", ["env"], ["-run-with", "user=nobody"]],
  ])(
    "%s, brings all its pages",
    async (_, starter, qemuArgs) => {
      const snapshot = await bare();
      const argv = [...starter, ...snapshot.argv];
      await using run = await FslRun.start(snapshot, { argv, qemuArgs });
      await run.complete();
      expect(run.report()).toMatchObject({ complete: true });
      // It checks every page over and over.
      expect((await run.serial.waitForNext(/^tick /)).text).toMatch(/ ok$/);
      await run.qmp.execute("quit");
      expect(await run.end()).toBe(0);
      expect(run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(skip)("fsl load and signals", () => {
  test.each([
    ["SIGTERM", "while RAM comes in", ["--eager-rate", "4K"]],
    ["SIGINT", "while RAM comes in", ["--eager-rate", "4K"]],
    ["SIGHUP", "when all RAM is in", []],
    ["SIGTERM", "when all RAM is in", []],
  ] as const)(
    "%s ends QEMU in order %s",
    async (signal, _, flags) => {
      await using run = await FslRun.start(await bare(), { flags });
      await run.serial.waitFor(/^tick \d+ ok/);
      if (flags.length === 0) await run.complete();
      await run.qmp.ready;
      run.signal(signal);
      await run.qmp.waitEvent("SHUTDOWN");
      expect(await run.end()).toBe(0);
      expect(run.stderr.text).not.toMatch(/killed/);
      expect(run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test.each(["SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGXCPU"] as const)(
    "%s is passed on, and fsl serves as long as QEMU lives",
    async (signal) => {
      await using run = await FslRun.start(await bare(), { flags: ["--eager-rate", "4K"] });
      await run.serial.waitFor(/^tick \d+ ok/);
      const pid = await run.qemuPid();
      // A QEMU that dies of it says so by fsl's exit code; another one goes on.
      run.signal(signal);
      await Bun.sleep(200);
      if (isRunning(pid)) {
        expect((await run.serial.waitForNext(/^tick /)).text).toMatch(/ ok$/);
        run.signal("SIGQUIT");
        expect(await run.end()).toBe(128 + constants.signals.SIGQUIT);
      } else {
        expect(await run.end()).toBe(128 + constants.signals[signal]);
      }
      expect(run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "SIGTERM ends a QEMU that has only just been started",
    async () => {
      await using run = await FslRun.start(await bare());
      const pid = await run.qemuPid();
      run.signal("SIGTERM");
      // 0: this test was so slow that the guest ran already.
      expect([143, 0]).toContain(await run.end());
      expect(isRunning(pid)).toBe(false);
      expect(run.stderr.text).not.toMatch(/^fsl: /m);
      expect(run.leftovers()).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "SIGSTOP and SIGCONT of fsl only delay the guest",
    async () => {
      await using run = await FslRun.start(await bare(), { flags: ["--eager-rate", "1M"] });
      await run.serial.waitFor(/^beat /);
      run.signal("SIGSTOP");
      await until(
        () => (/State:\s+T/.test(readFileSync(`/proc/${run.pid}/status`, "latin1")) ? true : null),
        5000,
        "a stop",
      );
      run.signal("SIGCONT");
      expect((await run.serial.waitForNext(/^tick /)).text).toMatch(/ ok$/);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(skip)("fsl load's progress", () => {
  test(
    "is one plain line a second when stderr is no terminal",
    async () => {
      await using run = await FslRun.start(await bare(), {
        flags: ["--paused", "--eager-rate", "16M"],
      });
      await run.stderr.waitFor(
        /^fsl: \d+% of 41\.\d MiB, [\d.]+ [KM]iB\/s, \d+ faults, 1\.\d\d s$/m,
      );
      await run.complete();
      expect(run.stderr.text).not.toContain("\u001b");
      expect(run.stderr.text).not.toContain("\r");
      expect(run.stdout.text).toBe("");
    },
    TIMEOUT_MS,
  );

  test(
    "is not shown with --quiet, and nothing else is",
    async () => {
      await using run = await FslRun.start(await bare(), {
        flags: ["--quiet", "--eager-rate", "16M"],
      });
      await run.serial.waitFor(/^tick \d+ ok/);
      await until(() => (Bun.file(run.reportPath).size > 0 ? true : null), 30_000, "the report");
      await run.qmp.execute("quit");
      expect(await run.end()).toBe(0);
      expect([run.stderr.text, run.stdout.text]).toEqual(["", ""]);
    },
    TIMEOUT_MS,
  );
});

interface TerminalRun extends AsyncDisposable {
  readonly screen: Watched;
  readonly directory: string;
  type(text: string): void;
  exited: Promise<number>;
}

/** A shell command line on a terminal of its own. */
function onTerminal(command: string): TerminalRun {
  const directory = mkdtempSync(join(tmpdir(), "fsl-load-test-"));
  const screen = new Watched();
  const decoder = new TextDecoder();
  const child = Bun.spawn(["setpriv", "--pdeathsig", "KILL", "sh", "-c", command], {
    cwd: directory,
    env: plainEnvironment({ XDG_RUNTIME_DIR: directory, TMPDIR: directory, TERM: "xterm" }),
    terminal: {
      cols: 120,
      rows: 30,
      data: (_, data) => screen.append(decoder.decode(data, { stream: true })),
    },
  });
  return {
    screen,
    directory,
    exited: child.exited,
    type: (text) => void child.terminal?.write(text),
    async [Symbol.asyncDispose]() {
      const all = [child.pid];
      for (const pid of all) all.push(...childrenOf(pid));
      for (const pid of all.toReversed()) if (isRunning(pid)) process.kill(pid, "SIGKILL");
      await child.exited;
      child.terminal?.close();
      rmSync(directory, { recursive: true, force: true });
    },
  };
}

function quoted(words: readonly string[]): string {
  return words.map((word) => `'${word}'`).join(" ");
}

describe.skipIf(skip)("fsl load on a terminal", () => {
  /**
   * Says terminal modes before and after, and the exit code in between; Ctrl-C ends the load only.
   */
  function script(path: string, flags: string, argv: readonly string[]): string {
    const load = `${FSL} load ${path} --working-set none ${flags} -- ${quoted(argv)}`;
    return `trap : INT; echo before $(stty -g); ${load}; echo code $?; echo after $(stty -g)`;
  }

  async function modes(run: TerminalRun): Promise<[string, string, string]> {
    // fsl's own words are of things before and after, too.
    const [, after = ""] = await run.screen.waitFor(/^after (\S+)/m);
    const [, before = ""] = await run.screen.waitFor(/^before (\S+)/m);
    const [, code = ""] = await run.screen.waitFor(/^code (\d+)/m);
    expect(await within(run.exited, 10_000, "the shell")).toBe(0);
    return [before, code, after];
  }

  test(
    "gives the guest the terminal, and gives it back as it was",
    async () => {
      const snapshot = await snapshotOf({ machine: "q35" });
      const argv = [...snapshot.argv, "-serial", "mon:stdio"];
      await using run = onTerminal(script(snapshot.path, "--quiet", argv));
      await run.screen.waitFor(/tick \d+/);
      run.type("info\n");
      await run.screen.waitFor(new RegExp(`INFO 64 ${snapshot.checksum}`));
      // Ctrl-C is the guest's: its program on the console ends no QEMU.
      run.type("\u0003");
      const seen = run.screen.text.length;
      await run.screen.waitFor(new RegExp(`^[^]{${seen}}[^]*tick \\d+`));
      run.type("\u0001x");
      const [before, code, after] = await modes(run);
      expect(code).toBe("0");
      expect(after).toBe(before);
      expect(run.screen.text).toMatch(/QEMU: Terminated/);
    },
    TIMEOUT_MS,
  );

  test(
    "of -nographic is the guest's and its monitor's, as without fsl",
    async () => {
      const noDefaults = ["-nodefaults", "-display", "none"];
      const own = guestArgv({ machine: "q35" }).filter((word) => !noDefaults.includes(word));
      const argv = [...own, "-nographic", "-nic", "none", "-vga", "none", "-parallel", "none"];
      const path = join(tmpdir(), `fsl-load-test-nographic-${process.pid}.snap`);
      try {
        await using qemu = await startQemu(argv);
        await qemu.serial.waitFor(/READY /, 30_000);
        await saveSnapshot(qemu, path);
        await qemu.kill();
        await using run = onTerminal(script(path, "--quiet", argv));
        await run.screen.waitFor(/tick \d+/);
        // Ctrl-C is the guest's.
        run.type("\u0003");
        let seen = run.screen.text.length;
        await run.screen.waitFor(new RegExp(`^[^]{${seen}}[^]*tick \\d+`));
        run.type("\u0001c");
        await run.screen.waitFor(/\(qemu\) /);
        run.type("info status\r");
        await run.screen.waitFor(/VM status: running/);
        run.type("\u0001c");
        seen = run.screen.text.length;
        await run.screen.waitFor(new RegExp(`^[^]{${seen}}[^]*tick \\d+`));
        run.type("\u0001x");
        const [before, code, after] = await modes(run);
        expect(code).toBe("0");
        expect(after).toBe(before);
      } finally {
        rmSync(path, { force: true });
      }
    },
    TIMEOUT_MS,
  );

  test(
    "ends QEMU on Ctrl-C when the terminal is not the guest's, and draws one line of progress",
    async () => {
      const snapshot = await bare();
      const argv = [...snapshot.argv, "-serial", "null"];
      // One that runs would ask for all of its RAM in half a second.
      await using run = onTerminal(script(snapshot.path, "--eager-rate 1M --paused", argv));
      await run.screen.waitFor(/fsl: \d+% of 41\.\d MiB/);
      // Drawn over and over in one place.
      await run.screen.waitFor(/(\r[^\n\r]{3}fsl: \d+%[^\n\r]*){3}/);
      expect(run.screen.text).toContain("\r\u001b[Kfsl: ");
      run.type("\u0003");
      const [before, code, after] = await modes(run);
      expect(code).toBe("0");
      expect(after).toBe(before);
    },
    TIMEOUT_MS,
  );

  test(
    "gives the terminal back when QEMU is killed",
    async () => {
      const snapshot = await bare();
      const pidFile = "qemu.pid";
      const argv = [...snapshot.argv, "-serial", "mon:stdio", "-pidfile", pidFile];
      await using run = onTerminal(script(snapshot.path, "--quiet", argv));
      await run.screen.waitFor(/tick \d+ ok/);
      process.kill(Number(readFileSync(join(run.directory, pidFile), "utf8")), "SIGKILL");
      const [before, code, after] = await modes(run);
      expect(code).toBe("137");
      expect(after).toBe(before);
    },
    TIMEOUT_MS,
  );
});

/** fsl puts them back when the guest runs, or would if it were not to stay stopped. */
async function settingsBack(qmp: QmpClient): Promise<void> {
  for (let left = 500; left > 0; left -= 1) {
    const all = await qmp.execute<{ capability: string; state: boolean }[]>(
      "query-migrate-capabilities",
    );
    if (!all.some(({ capability, state }) => capability === "mapped-ram" && state)) return;
    await Bun.sleep(2);
  }
  throw new Error("mapped-ram is still on");
}

describe.skipIf(skip)("a QEMU after its load", () => {
  test(
    "has nothing of fsl's any more but the monitor",
    async () => {
      const snapshot = await bare();
      await using fresh = await startQemu([...snapshot.argv, "-incoming", "defer"]);
      await using run = await FslRun.start(snapshot);
      await run.serial.waitFor(/^tick \d+ ok/);
      await run.complete();
      const pid = await run.qemuPid();
      // The summary is printed when all that is done.
      const files = openFiles(pid).filter((link) => /userfaultfd|fsl-/.test(link));
      expect(files).toEqual([]);
      expect(childrenOf(run.pid).filter(isRunning)).toEqual([pid]);
      expect(await run.qmp.execute("query-fdsets")).toEqual([]);
      for (const query of ["query-migrate-capabilities", "query-migrate-parameters"]) {
        expect(await run.qmp.execute<unknown>(query)).toEqual(
          await fresh.qmp.execute<unknown>(query),
        );
      }
      const ram = (await ramBlocks(run.qmp)).find(({ name }) => name === "pc.ram");
      const areas = readFileSync(`/proc/${pid}/smaps`, "latin1").split(
        /^(?=[0-9a-f]+-[0-9a-f]+ )/m,
      );
      const [start = 0, end = 0] = [ram?.address, (ram?.address ?? 0) + (ram?.used ?? 0)];
      const within = areas.filter((text) => {
        const [, from = "", to = ""] = /^([0-9a-f]+)-([0-9a-f]+) /.exec(text) ?? [];
        return Number.parseInt(from, 16) < end && Number.parseInt(to, 16) > start;
      });
      expect(within).toHaveLength(1);
      expect(areas.filter((text) => /^VmFlags:.* um /m.test(text))).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "can be saved by its user while it is still being loaded",
    async () => {
      const directory = mkdtempSync(join(tmpdir(), "fsl-load-test-"));
      const path = join(directory, "early.snap");
      try {
        const snapshot = await bare();
        await using first = await FslRun.start(snapshot, {
          flags: ["--paused", "--eager-rate", "8M"],
        });
        const { qmp } = first;
        await first.hasState();
        await settingsBack(qmp);
        await qmp.setCapabilities(["mapped-ram"]);
        const from = qmp.events.length;
        await qmp.execute("migrate", { uri: `file:${path}` });
        await qmp.waitMigrated(from);
        await first.complete();
        const saved = await dumpMemory({ pid: await first.qemuPid(), qmp });
        await qmp.execute("quit");
        expect(await first.end()).toBe(0);
        const flags = ["--paused"];
        await using second = await FslRun.start({ path, argv: snapshot.argv }, { flags });
        await second.complete();
        const loaded = await dumpMemory({ pid: await second.qemuPid(), qmp: second.qmp });
        expect(memoryDifferences(loaded, saved)).toEqual([]);
      } finally {
        rmSync(directory, { recursive: true, force: true });
      }
    },
    TIMEOUT_MS,
  );

  test(
    "goes on when its user migrates it at the moment in which the load is over",
    async () => {
      const directory = mkdtempSync(join(tmpdir(), "fsl-load-test-"));
      try {
        await using run = await FslRun.start(await bare(), {
          flags: ["--paused", "--eager-rate", "16M"],
        });
        const { qmp } = run;
        await run.hasState();
        await settingsBack(qmp);
        await qmp.setCapabilities([]);
        await qmp.execute("migrate-set-parameters", { "max-bandwidth": 65_536 });
        await qmp.execute("migrate", { uri: `file:${join(directory, "slow.snap")}` });
        const report = await run.complete();
        expect(report.complete).toBe(true);
        expect(run.stderr.text).not.toContain("migration settings");
        await qmp.execute("migrate_cancel");
        await qmp.waitEvent("MIGRATION", ({ status }) => status === "cancelled");
        await qmp.execute("cont");
        expect((await run.serial.waitFor(/^tick /)).text).toMatch(/ ok$/);
        await qmp.execute("quit");
        expect(await run.end()).toBe(0);
        expect(run.leftovers()).toEqual([]);
      } finally {
        rmSync(directory, { recursive: true, force: true });
      }
    },
    TIMEOUT_MS,
  );

  test(
    "can be saved again, and that snapshot loads",
    async () => {
      const snapshot = await bare();
      const directory = mkdtempSync(join(tmpdir(), "fsl-load-test-"));
      const path = join(directory, "again.snap");
      try {
        await using first = await FslRun.start(snapshot);
        await first.serial.waitFor(/^tick \d+ ok/);
        await first.complete();
        const { qmp } = first;
        await qmp.setCapabilities(["mapped-ram"]);
        await qmp.execute("stop");
        const from = qmp.events.length;
        await qmp.execute("migrate", { uri: `file:${path}` });
        await qmp.waitMigrated(from);
        const saved = await dumpMemory({ pid: await first.qemuPid(), qmp });
        await using second = await FslRun.start(
          { path, argv: snapshot.argv },
          { flags: ["--paused"] },
        );
        await second.complete();
        const loaded = await dumpMemory({ pid: await second.qemuPid(), qmp: second.qmp });
        expect(memoryDifferences(loaded, saved)).toEqual([]);
        await second.qmp.execute("cont");
        const ticks = first.serial.lines.filter(({ text }) => text.startsWith("tick"));
        const next = Number(ticks.at(-1)?.text.split(" ")[1]) + 1;
        expect((await second.serial.waitFor(/^tick /)).text).toBe(`tick ${next} ok`);
      } finally {
        rmSync(directory, { recursive: true, force: true });
      }
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(skip)("the executable", () => {
  test(
    "needs no TMPDIR",
    async () => {
      const env = { TMPDIR: "/nonexistent/tmp" };
      await using run = await FslRun.start(await bare(), { env });
      expect((await run.serial.waitFor(/^tick /)).text).toMatch(/ ok$/);
      expect((await run.complete()).complete).toBe(true);
    },
    TIMEOUT_MS,
  );

  test("writes nothing to TMPDIR and needs nothing beside it", async () => {
    const directory = mkdtempSync(join(tmpdir(), "fsl-load-test-"));
    try {
      const child = Bun.spawn([FSL, "doctor", "--json"], {
        cwd: "/",
        env: { PATH: process.env["PATH"] ?? "", TMPDIR: directory },
        stdout: "pipe",
        stderr: "pipe",
      });
      expect(await new Response(child.stdout).json()).toBeObject();
      await child.exited;
      expect([
        ...new Bun.Glob("**").scanSync({ cwd: directory, onlyFiles: false, dot: true }),
      ]).toEqual([]);
    } finally {
      rmSync(directory, { recursive: true, force: true });
    }
  });
});
