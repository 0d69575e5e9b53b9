/**
 * What `fsl load` refuses or cannot do: exit codes and messages, and that nothing is left behind.
 */
import { beforeAll, describe, expect, test } from "bun:test";
import {
  chmodSync,
  closeSync,
  copyFileSync,
  openSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { type GuestSnapshot, guestArgv, QEMU, snapshotOf, whyNoGuests } from "../helpers/guests.ts";
import { FSL, FslRun, type FslOptions, whyNoExecutable } from "../helpers/load-runs.ts";
import { specialSnapshot } from "../helpers/load-snapshots.ts";
import { buildSnapshot, fieldOffset } from "../helpers/snapshot-builder.ts";

const TIMEOUT_MS = 60_000;
/** In the low bits of the word that says how much RAM there is. */
const RAM_SAVE_FLAG_MEM_SIZE = 4;
const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;

let snapshot: GuestSnapshot;
beforeAll(async () => {
  if (!skip) snapshot = await snapshotOf({ guest: "bare" });
}, TIMEOUT_MS);

interface Refusal {
  readonly code: number;
  readonly stderr: string;
}

/** Runs it to its end, and expects nothing to be left of it. */
async function refused(options: FslOptions): Promise<Refusal> {
  await using run = await FslRun.start(snapshot, options);
  const code = await run.end();
  expect(run.leftovers()).toEqual([]);
  expect(run.stdout.text).toBe("");
  return { code, stderr: run.stderr.text };
}

/** Most memory that a process has had, bytes; 0 when it has ended. */
function peakOf(pid: number): number {
  try {
    const status = readFileSync(`/proc/${pid}/status`, "latin1");
    return Number(/^VmHWM:\s+(\d+) kB$/m.exec(status)?.[1] ?? 0) * 1024;
  } catch {
    return 0;
  }
}

/** A block of so many bytes, all of them zero pages: a sparse file. */
function writeHugeSnapshot(path: string, length: number): void {
  const [bitmapOffset, pagesOffset] = [2 ** 20, 2 ** 30];
  const built = buildSnapshot({
    machineType: "pc-q35-10.0",
    blocks: [{ idstr: "pc.ram", pages: "." }],
    corrupt: {
      "ram.total": length + RAM_SAVE_FLAG_MEM_SIZE,
      "pc.ram.usedLength": length,
      "pc.ram.bitmapOffset": bitmapOffset,
      "pc.ram.pagesOffset": pagesOffset,
    },
  });
  const fd = openSync(path, "w");
  const [start, rest] = [
    built.bytes.subarray(0, fieldOffset(built, "pc.ram.bitmap")),
    built.bytes.subarray(fieldOffset(built, "ram.eos")),
  ];
  writeSync(fd, start, 0, start.length, 0);
  writeSync(fd, rest, 0, rest.length, pagesOffset + length);
  closeSync(fd);
}

/** The snapshot's own command line with one argument changed. */
function argvWith(option: string, value: string): string[] {
  const argv = [...snapshot.argv];
  argv[argv.indexOf(option) + 1] = value;
  return argv;
}

describe.skipIf(skip)("fsl load refuses", () => {
  const temporary = join(tmpdir(), `fsl-load-errors-${process.pid}`);

  test.each<[string, () => FslOptions, number, RegExp]>([
    [
      "a snapshot that is not there",
      () => ({ path: "/nonexistent/vm.snap" }),
      3,
      /^fsl: snapshot: cannot open: ENOENT, it does not exist \(\/nonexistent\/vm\.snap\)$/m,
    ],
    [
      "a directory",
      () => ({ path: "/etc" }),
      3,
      /expected a regular file, found a directory \(\/etc\)/,
    ],
    [
      "a file that is no snapshot",
      () => ({ path: process.execPath }),
      4,
      /not a QEMU migration stream: expected magic 0x5145564d/,
    ],
    [
      "more memory than was saved",
      () => ({ argv: argvWith("-m", "128") }),
      7,
      /RAMBlock pc\.ram: snapshot has 64 MiB, QEMU has 128 MiB; start QEMU with -m 64M/,
    ],
    [
      "less memory than was saved",
      () => ({ argv: argvWith("-m", "32") }),
      7,
      /RAMBlock pc\.ram: snapshot has 64 MiB, QEMU has 32 MiB; start QEMU with -m 64M/,
    ],
    [
      "more vCPUs than were saved, by -smp",
      () => ({ qemuArgs: ["-smp", "2"] }),
      7,
      /vCPUs: snapshot has 1, QEMU has 2; start QEMU with -smp 1$/m,
    ],
    [
      "more vCPUs than were saved, which QEMU is asked for",
      () => ({ argv: argvWith("-smp", "sockets=1,cores=2") }),
      7,
      /vCPUs: snapshot has 1, QEMU has 2; start QEMU with -smp 1$/m,
    ],
    [
      "another machine type",
      () => ({ argv: argvWith("-machine", "pc") }),
      7,
      /machine type: snapshot has pc-q35-[\d.]+, QEMU runs pc-i440fx-[\d.]+; start QEMU with -machine pc-q35-/,
    ],
    [
      "an -incoming of the user's",
      () => ({ qemuArgs: ["-incoming", "tcp:0:4444"] }),
      2,
      /option -incoming is refused: fsl load adds its own; leave it out/,
    ],
    [
      "a -loadvm of the user's",
      () => ({ qemuArgs: ["--loadvm", "x"] }),
      2,
      /option --loadvm is refused/,
    ],
    ["-daemonize", () => ({ qemuArgs: ["-daemonize"] }), 2, /option -daemonize is refused/],
    [
      "a QEMU that is not there",
      () => ({ argv: ["qemu-system-nowhere", "-m", "64"], bare: true }),
      2,
      /program "qemu-system-nowhere" was not found in PATH/,
    ],
    ["an unknown flag", () => ({ flags: ["--fast"] }), 2, /Unknown option '--fast'/],
    [
      "a surplus argument",
      () => ({ flags: ["other.snap"] }),
      2,
      /unexpected argument 'other\.snap'/,
    ],
    [
      "an offset behind the end of the file",
      () => ({ flags: ["--offset", "1T"] }),
      4,
      /snapshot|stream|offset/i,
    ],
  ])(
    "%s",
    async (_, options, code, message) => {
      const refusal = await refused(options());
      expect(refusal.stderr).toMatch(message);
      expect(refusal.code).toBe(code);
      // Not with a stack: none of these is a bug.
      expect(refusal.stderr).not.toMatch(/^\s+at |this is a bug/m);
    },
    TIMEOUT_MS,
  );

  test(
    "a file of some KiB that says it has 8 TiB of RAM, without taking memory for it",
    async () => {
      const path = `${temporary}-huge`;
      try {
        writeHugeSnapshot(path, 8 * 2 ** 40);
        const command = ["load", path, "--working-set", "none", "--", ...snapshot.argv];
        const child = Bun.spawn([FSL, ...command, "-serial", "null"], {
          stdin: "ignore",
          stderr: "pipe",
        });
        // The kernel's maximum for a child counts what its parent had when it was started.
        let highest = 0;
        while (child.exitCode === null) {
          highest = Math.max(highest, peakOf(child.pid));
          await Bun.sleep(1);
        }
        expect(await new Response(child.stderr).text()).toMatch(
          /RAMBlock pc\.ram: snapshot has 8388608 MiB, QEMU has 64 MiB/,
        );
        expect(child.exitCode).toBe(7);
        // Its bitmap alone would be 256 MiB.
        expect(highest).toBeGreaterThan(8 * 2 ** 20);
        expect(highest).toBeLessThan(128 * 2 ** 20);
      } finally {
        rmSync(path, { force: true });
      }
    },
    TIMEOUT_MS,
  );

  test.each([
    ["its first bytes only", 100],
    ["half of its pages", 30 * 2 ** 20],
    ["all but its last byte", -1],
  ])(
    "a snapshot that was cut: %s",
    async (_, length) => {
      copyFileSync(snapshot.path, temporary);
      truncateSync(temporary, length > 0 ? length : Bun.file(temporary).size + length);
      const { code, stderr } = await refused({ path: temporary });
      rmSync(temporary);
      expect(stderr).toMatch(/^fsl: .*\(.*fsl-load-errors/m);
      expect(code).toBe(4);
    },
    TIMEOUT_MS,
  );

  test(
    "an empty file",
    async () => {
      writeFileSync(temporary, "");
      const { code, stderr } = await refused({ path: temporary });
      rmSync(temporary);
      expect(stderr).toMatch(/^fsl: /m);
      expect(code).toBe(4);
    },
    TIMEOUT_MS,
  );

  test(
    "a snapshot that was not saved as mapped-ram",
    async () => {
      using plain = await specialSnapshot({ guest: "bare" }, { mappedRam: false });
      const { code, stderr } = await refused({ path: plain.path });
      expect(stderr).toMatch(/mapped-ram/);
      expect(code).toBe(5);
    },
    TIMEOUT_MS,
  );
});

describe.skipIf(skip)("fsl load and a QEMU that fails", () => {
  test(
    "shows QEMU's own words when it does not even start, and names its exit code",
    async () => {
      const { code, stderr } = await refused({ qemuArgs: ["-device", "nosuchdevice"] });
      expect(stderr).toMatch(/'nosuchdevice' is not a valid device model name/);
      expect(stderr).toMatch(/ended with exit code 1 before it could take a state/);
      expect(code).toBe(8);
    },
    TIMEOUT_MS,
  );

  test(
    "shows QEMU's own words when devices differ, and ends it",
    async () => {
      const extraArgs = ["-device", "pci-bridge,chassis_nr=1,id=b1"];
      using other = await specialSnapshot({ guest: "bare", extraArgs }, {});
      const argv = guestArgv({ guest: "bare" });
      const { code, stderr } = await refused({ path: other.path, argv });
      expect(stderr).toMatch(/Unknown savevm section|unknown section|vmstate/i);
      expect(stderr).toMatch(/could not load the device state/);
      expect(code).toBe(7);
    },
    TIMEOUT_MS,
  );

  test(
    "says so when a program is no QEMU at all",
    async () => {
      const { code, stderr } = await refused({ argv: ["true"], bare: true });
      expect(stderr).toMatch(/ended with exit code 0 before it could take a state/);
      expect(code).toBe(8);
    },
    TIMEOUT_MS,
  );

  test(
    "takes a QEMU behind a wrapper script",
    async () => {
      const wrapper = join(tmpdir(), `fsl-load-errors-${process.pid}.sh`);
      writeFileSync(wrapper, `#!/bin/sh\n${QEMU} "$@"\nexit $((40 + $?))\n`);
      chmodSync(wrapper, 0o700);
      try {
        await using run = await FslRun.start(snapshot, {
          argv: [wrapper, ...snapshot.argv.slice(1)],
        });
        await run.serial.waitFor(/^tick \d+ ok/);
        await run.complete();
        await run.qmp.execute("quit");
        expect(await run.end()).toBe(40);
        expect(run.leftovers()).toEqual([]);
      } finally {
        rmSync(wrapper);
      }
    },
    TIMEOUT_MS,
  );
});
