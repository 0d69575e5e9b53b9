/**
 * Load states that nobody should believe: any process can hold a memfd of that name, and a control
 * socket can be somebody else's by now. `fsl status` and `fsl resume` say so, and do nothing of what
 * is in them.
 */
import { describe, expect, test } from "bun:test";
import {
  closeSync,
  existsSync,
  fchmodSync,
  fchownSync,
  fstatSync,
  openSync,
  readFileSync,
  readSync,
  renameSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { LoadState, PHASE_RUNNING, STATE_SEALS, type StateMetadata } from "../../src/load/state.ts";
import { F_ADD_SEALS, MFD_ALLOW_SEALING, MFD_CLOEXEC } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { printableLines } from "../../src/text.ts";
import { AttachRun, MarkedRun } from "../helpers/attach-runs.ts";
import { descriptors } from "../helpers/fault-runs.ts";
import { snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import { differencesFromOracle } from "../helpers/load-oracle.ts";
import { whyNoExecutable } from "../helpers/load-runs.ts";

const TIMEOUT_MS = 60_000;
const NOBODY = 65_534;
const BARE = { guest: "bare" } as const;
const isRoot = process.getuid?.() === 0;
const reason = whyNoExecutable() ?? whyNoGuests() ?? (isRoot ? null : "other users need root");

interface Forgery {
  /** Owner of the memfd, and user of the process that holds it. */
  readonly uid?: number;
  readonly mode?: number;
  readonly isSealed?: boolean;
  readonly pid?: number;
  readonly module?: string;
  /** Overwrites the first bytes. */
  readonly header?: number;
}

/** A process that holds a forged load state: of a running guest that waits for pages. */
async function forge(run: MarkedRun, forgery: Forgery): Promise<number> {
  const { uid = 0, mode = 0o600, isSealed = true } = forgery;
  const flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  const fd = sys.check(sys.memfdCreate("fsl-state", flags), "memfd_create");
  const ids = [`--reuid=${uid}`, `--regid=${uid}`, "--clear-groups", "--pdeathsig=KILL"];
  const child = Bun.spawn(["setpriv", ...ids, "sleep", "60"], {
    stdio: ["ignore", "ignore", "ignore", fd],
    env: run.env,
  });
  child.unref();
  const [line = ""] = readFileSync(`/proc/${child.pid}/maps`, "latin1").split("\n");
  const hostAddr = Number.parseInt(line, 16);
  const options = { fd: -1 };
  const { module } = forgery;
  const metadata: StateMetadata = {
    target: {
      pid: forgery.pid ?? child.pid,
      controlPath: join(run.directory, "qmp"),
      isControlOwn: true,
      isControlPrivate: false,
      endsWithFsl: false,
      undo: null,
    },
    paused: false,
    snapshotPath: "/etc/passwd\u001b]0;owned\u0007",
    snapshotIdentity: {},
    blocks: [
      {
        idstr: "pc.ram\u001b[2J",
        hostAddr,
        usedLength: 4096,
        pageSize: 4096,
        hostPageSize: 4096,
        pagesOffset: 0,
        movable: false,
      },
    ],
    registered: [hostAddr, hostAddr + 4096],
    canDiscard: false,
    watched: { balloons: false, helpers: false },
    serving: {},
    source: module === undefined ? { options } : { module, options },
  };
  const { state, fd: genuine } = LoadState.create(metadata);
  state.phase = PHASE_RUNNING;
  state.blocks[0]?.data.fill(1, 0, 1);
  state.lastFailure = { idstr: metadata.blocks[0]?.idstr ?? "", pageIndex: 0, errno: 5 };
  const bytes = new Uint8Array(fstatSync(genuine).size);
  readSync(genuine, bytes, 0, bytes.length, 0);
  state.unmap();
  closeSync(genuine);
  writeSync(fd, bytes);
  if (forgery.header !== undefined) writeSync(fd, Int32Array.of(forgery.header), 0, 4, 0);
  fchownSync(fd, uid, uid);
  fchmodSync(fd, mode);
  if (isSealed) sys.check(sys.fcntl(fd, F_ADD_SEALS, STATE_SEALS), "F_ADD_SEALS");
  closeSync(fd);
  return child.pid;
}

/** A module that leaves a mark when it is run. */
function evilModule(run: MarkedRun): { module: string; mark: string } {
  const module = join(run.directory, "evil.ts");
  const mark = join(run.directory, "mark");
  writeFileSync(module, `require("node:fs").writeFileSync(${JSON.stringify(mark)}, "");\n`);
  return { module, mark };
}

describe.skipIf(reason !== null)("a forged load state", () => {
  test(
    "of another user is no load to fsl status, and nothing of it is done by fsl resume",
    async () => {
      await using run = new MarkedRun();
      const { module, mark } = evilModule(run);
      const pid = await forge(run, { uid: NOBODY, module });
      const words =
        `process ${pid}: its load state is not to be trusted: ` +
        "expected one of user 0, found one of user 65534";
      const status = await run.run("status");
      expect([status.code, status.stderr]).toEqual([0, expect.stringContaining(words)]);
      const loads: { pid: number }[] = JSON.parse((await run.run("status", "--json")).stdout);
      expect(loads.filter((load) => load.pid === pid)).toEqual([]);
      // Of this machine, where somebody else may be at work: that one's load is nothing to be touched.
      if (loads.length === 0) {
        expect(status.stdout).toBe("no load is going on\n");
        const any = await run.run("resume");
        expect([any.code, any.stderr]).toEqual([8, expect.stringContaining("no load waits")]);
      }
      for (const flags of [[], ["--source", module]]) {
        const { code, stderr } = await run.run("resume", "--pid", String(pid), ...flags);
        expect([code, stderr]).toEqual([7, expect.stringContaining(words)]);
      }
      expect(existsSync(mark)).toBe(false);
    },
    TIMEOUT_MS,
  );

  test.each<[string, Forgery, number, RegExp]>([
    ["that others may write to", { mode: 0o666 }, 7, /expected mode 600, found 666/],
    ["that may be cut short", { isSealed: false }, 7, /not sealed against being cut short/],
    ["of another process", { pid: 1 }, 8, /its load state is that of process 1/],
    ["that is none", { header: 7 }, 8, /load state: expected magic/],
    ["of memory that no userfaultfd watches", {}, 8, /its userfaultfd is gone/],
  ])(
    "%s is refused, in words",
    async (_, forgery, expected, words) => {
      await using run = new MarkedRun();
      const pid = await forge(run, forgery);
      const { code, stderr } = await run.run("resume", "--pid", String(pid));
      expect([code, stderr]).toEqual([expected, expect.stringMatching(words)]);
    },
    TIMEOUT_MS,
  );

  test(
    "with a module of its own has it run for nobody but who names it",
    async () => {
      await using run = new MarkedRun();
      const { module, mark } = evilModule(run);
      const pid = await forge(run, { module });
      const { code, stderr } = await run.run("resume", "--pid", String(pid));
      expect([code, stderr]).toEqual([7, expect.stringContaining("page source: expected none")]);
      expect(existsSync(mark)).toBe(false);
    },
    TIMEOUT_MS,
  );

  test(
    "with an escape sequence in it does not reach the terminal",
    async () => {
      await using run = new MarkedRun();
      const pid = await forge(run, {});
      const { code, stdout } = await run.run("status");
      expect([code, stdout]).toEqual([0, expect.stringContaining(String(pid))]);
      expect(stdout).toContain("pc.ram\\x1b[2J at file offset");
      expect(stdout).toContain("/etc/passwd\\x1b]0;owned\\x07");
      expect(stdout).toBe(printableLines(stdout));
      expect((await run.status(pid))?.snapshotPath).toBe("/etc/passwd\u001b]0;owned\u0007");
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(reason !== null)("a QEMU of another user", () => {
  test(
    "holds the load state, and cannot write to it",
    async () => {
      const snapshot = await snapshotOf(BARE);
      await using run = await AttachRun.start(snapshot, { qemuArgs: ["-run-with", "user=nobody"] });
      const load = run.attach(snapshot, "--paused", "--eager-rate", "4M");
      await run.reached("running");
      const [number] = descriptors(run.pid).find(([, link]) => link.includes("fsl-state")) ?? [];
      expect(number).toBeDefined();
      const { uid, mode } = fstatOf(`/proc/${run.pid}/fd/${number}`);
      expect([uid, mode & 0o777]).toEqual([0, 0o600]);
      // QEMU itself opens the file, as whoever has taken it over would.
      const filename = `/proc/self/fd/${number}`;
      const write = run.qmp.execute("pmemsave", { val: 0, size: 4096, filename });
      expect(await write.catch((error: Error) => error.message)).toMatch(/Permission denied/);
      load.signal("SIGTERM");
      expect((await load.end()).code).toBe(0);
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
    },
    TIMEOUT_MS,
  );

  test(
    "has its control socket taken by another process: that is not spoken to",
    async () => {
      const snapshot = await snapshotOf(BARE);
      await using run = await AttachRun.start(snapshot);
      const before = await run.traits();
      const load = run.attach(snapshot, "--paused", "--eager-rate", "4M");
      await run.reached("running");
      await load.kill();
      const moved = `${run.qmpPath}-moved`;
      renameSync(run.qmpPath, moved);
      let heard = "";
      const impostor = createServer((socket) => {
        socket.on("data", (bytes) => {
          heard += String(bytes);
        });
        socket.on("error", () => {});
        const version = { qemu: { major: 10, minor: 0, micro: 2 }, package: "" };
        socket.write(`${JSON.stringify({ QMP: { version, capabilities: [] } })}\n`);
      });
      await new Promise<void>((resolve) => impostor.listen(run.qmpPath, resolve));
      try {
        const { code, stderr } = await run.resume(run.pid);
        expect(stderr).toContain(
          `expected process ${run.pid} to listen there, found ${process.pid}`,
        );
        expect([code, heard]).toEqual([8, ""]);
        // All RAM is in; what is left is taken out by the socket that is QEMU's.
        expect((await run.resume(run.pid, "--qmp", moved)).code).toBe(0);
      } finally {
        impostor.close();
      }
      expect(await differencesFromOracle(snapshot, run)).toEqual([]);
      expect(await run.traits()).toEqual(before);
    },
    TIMEOUT_MS,
  );
});

function fstatOf(path: string): { uid: number; mode: number } {
  const fd = openSync(path, "r");
  try {
    return fstatSync(fd);
  } finally {
    closeSync(fd);
  }
}
