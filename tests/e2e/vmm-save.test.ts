/**
 * Saving a real guest: what is there afterwards, and that everything is as before when it fails.
 */
import {
  afterAll,
  afterEach,
  beforeEach,
  describe,
  expect,
  setDefaultTimeout,
  test,
} from "bun:test";
import {
  existsSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  readlinkSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { type SaveOptions, saveSnapshot } from "../../src/vmm/save.ts";
import {
  askQmp,
  bootDrive,
  bootSector,
  expectRefusal,
  guestArgv,
  OwnQemu,
  refusalOf,
  Scratch,
  until,
} from "../helpers/qemu-vmm.ts";

setDefaultTimeout(60_000);

const scratch = new Scratch();
const disk = scratch.file("disk.img", bootSector());
/** RAM that takes a while to write. */
const noise = scratch.file("noise", crypto.getRandomValues(new Uint8Array(65_536)));
let qemu: OwnQemu;
let directory: string;
let path: string;
let run = 0;

beforeEach(async () => {
  directory = join(scratch.path, `run-${run++}`);
  mkdirSync(directory);
  path = join(directory, "guest.snap");
  qemu = await OwnQemu.start(scratch, guestArgv("pc", ...bootDrive(disk)));
});

afterEach(async () => {
  await qemu[Symbol.asyncDispose]();
});

afterAll(() => scratch[Symbol.dispose]());

function save(options: Partial<SaveOptions> = {}): Promise<void> {
  const defaults = { live: false, afterwards: "stay", verify: () => {} } as const;
  return saveSnapshot({ qmpPath: qemu.qmpPath, path, ...defaults, ...options });
}

async function runState(): Promise<string> {
  return ((await qemu.ask("query-status")) as { status: string }).status;
}

async function capabilitiesOn(): Promise<string[]> {
  const list = (await qemu.ask("query-migrate-capabilities")) as {
    capability: string;
    state: boolean;
  }[];
  return list.filter(({ state }) => state).map(({ capability }) => capability);
}

/**
 * What must hold after every failure: the guest runs, nothing is left, QEMU's settings are its own.
 */
async function expectUndone(files: string[] = []): Promise<void> {
  expect(readdirSync(directory)).toEqual(files);
  expect(await runState()).toBe("running");
  expect(await capabilitiesOn()).toEqual([]);
  expect(await qemu.ask("query-fdsets")).toEqual([]);
  expect(await qemu.ask("query-migrate-parameters")).toMatchObject({
    "max-bandwidth": 134217728,
    "multifd-channels": 2,
  });
}

describe("saveSnapshot", () => {
  test.each([
    ["stopped", {}],
    ["stopped, by four channels", { multifdChannels: 4 }],
    ["live", { live: true }],
    ["live, by two channels", { live: true, multifdChannels: 2 }],
  ])("saves a guest %s", async (_how, options) => {
    await save({ ...options, afterwards: "cont" });
    await expectUndone(["guest.snap"]);
    const { mode, size } = statSync(path);
    expect(mode & 0o777).toBe(0o600);
    expect(size).toBeGreaterThan(64 * 1024 * 1024);
    expect(readFileSync(path).subarray(0, 4).toString("latin1")).toBe("QEVM");
  });

  test.each([
    ["stay", "postmigrate"],
    ["cont", "running"],
  ] as const)("afterwards: %s leaves the guest %s", async (afterwards, status) => {
    await save({ afterwards });
    expect(await runState()).toBe(status);
  });

  test("afterwards: quit ends QEMU in order", async () => {
    await save({ afterwards: "quit" });
    expect(await qemu.exited).toBe(0);
    expect(existsSync(path)).toBe(true);
  });

  test("leaves a guest that was stopped before stopped", async () => {
    await qemu.ask("stop");
    await save();
    expect(await runState()).toBe("postmigrate");
  });

  test("tells how far it is", async () => {
    const seen: number[] = [];
    await save({
      onProgress: ({ transferredBytes, totalBytes }) => seen.push(transferredBytes / totalBytes),
    });
    expect(seen.every((part) => part >= 0 && part <= 1)).toBe(true);
    expect(seen.length).toBeGreaterThan(0);
  });

  test("replaces the file that is there, and keeps a symbolic link", async () => {
    const real = join(directory, "real.snap");
    writeFileSync(real, "old");
    symlinkSync("real.snap", path);
    await save({ afterwards: "cont" });
    expect(readlinkSync(path)).toBe("real.snap");
    expect(statSync(real).size).toBeGreaterThan(64 * 1024 * 1024);
    expect(readdirSync(directory).sort()).toEqual(["guest.snap", "real.snap"]);
  });

  test("checks the file before anybody can see it under its name", async () => {
    let checked = "";
    await save({
      verify: (temporary) => {
        checked = temporary;
        expect(existsSync(path)).toBe(false);
        expect(statSync(temporary).size).toBeGreaterThan(0);
      },
    });
    expect(checked).toStartWith(join(directory, ".guest.snap.fsl-"));
    expect(existsSync(checked)).toBe(false);
  });
});

describe("saveSnapshot that fails", () => {
  test("keeps the old file when the new one is not sound", async () => {
    writeFileSync(path, "old");
    const failing = save({
      verify: () => {
        throw new Error("not sound");
      },
    });
    expect(failing).rejects.toThrow("not sound");
    await failing.catch(() => {});
    await expectUndone(["guest.snap"]);
    expect(readFileSync(path, "utf8")).toBe("old");
  });

  test("is undone when it is aborted before it starts", async () => {
    const error = await refusalOf(save({ signal: AbortSignal.abort() }));
    expectRefusal(error, "SAVE_FAILED", /interrupted/);
    expect(error.details).toMatchObject({ aborted: true });
    await expectUndone();
  });

  test.each([
    ["stopped", false],
    ["live", true],
  ])("is undone when it is aborted in the middle, %s", async (_how, live) => {
    await using big = await OwnQemu.start(scratch, [
      ...guestArgv("pc", "-m", "1536", ...bootDrive(disk)),
      // Not zero, so it is written: a file mapped as RAM again and again would be shared, this is
      // not.
      ...Array.from({ length: 64 }, (_, index) => [
        "-device",
        `loader,file=${noise},addr=${0x10000000 + index * 65_536},force-raw=on`,
      ]).flat(),
    ]);
    await qemu[Symbol.asyncDispose]();
    qemu = big;
    const abort = new AbortController();
    const saving = save({ live, signal: abort.signal, onProgress: () => abort.abort() });
    expectRefusal(await refusalOf(saving), "SAVE_FAILED", /interrupted/);
    await expectUndone();
    await save({ live, afterwards: "cont" });
    await expectUndone(["guest.snap"]);
  });

  test("is undone at once when it fails before it starts, after an earlier save", async () => {
    await save({ afterwards: "cont" });
    const startedMs = performance.now();
    const saving = save({ multifdChannels: 256 }); // QEMU takes 255 at most.
    expectRefusal(await refusalOf(saving), "TARGET_MISMATCH", /multifd.channels/i);
    expect(performance.now() - startedMs).toBeLessThan(10_000);
    await expectUndone(["guest.snap"]);
  });

  test("is undone when QEMU refuses", async () => {
    await qemu.ask("object-add", { "qom-type": "memory-backend-ram", id: "m0", size: 4096 });
    // A second save without the guest having run in between is refused.
    await save();
    const error = await refusalOf(save({ path: join(directory, "second.snap") }));
    expectRefusal(error, "SAVE_FAILED", /postmigrate cannot be saved: .* `cont` first/);
    expect(readdirSync(directory)).toEqual(["guest.snap"]);
    expect(await runState()).toBe("postmigrate");
  });

  test("says so when QEMU waits for a state itself", async () => {
    await using waiting = await OwnQemu.start(scratch, guestArgv("pc", "-incoming", "defer"));
    const error = await refusalOf(save({ qmpPath: waiting.qmpPath }));
    expectRefusal(error, "SAVE_FAILED", /inmigrate cannot be saved/);
    expect(readdirSync(directory)).toEqual([]);
  });

  test("says so when QEMU dies in the middle, and leaves no file", async () => {
    const saving = save({
      onProgress: () => process.kill(qemu.pid, "SIGKILL"),
      verify: () => {
        process.kill(qemu.pid, "SIGKILL");
        throw new Error("too fast to be killed in the middle");
      },
    });
    await saving.catch(() => {});
    expect(saving).rejects.toThrow();
    await qemu.exited;
    expect(readdirSync(directory)).toEqual([]);
  });

  test.each([
    ["a directory that is not there", () => join(directory, "none/x.snap"), /ENOENT/],
    ["a file as directory", () => join(disk, "x.snap"), /ENOTDIR/],
  ])("says so with %s", async (_what, target, message) => {
    expectRefusal(await refusalOf(save({ path: target() })), "SAVE_FAILED", message);
    await expectUndone();
  });

  test("says so when nobody listens", async () => {
    const error = await refusalOf(save({ qmpPath: join(directory, "none") }));
    expectRefusal(error, "TARGET_LOST", /cannot connect \(ENOENT\); start QEMU with -qmp unix:/);
    expect(readdirSync(directory)).toEqual([]);
  });
});

describe("saveSnapshot on a full disk", () => {
  const isRoot = process.getuid?.() === 0;

  test.skipIf(!isRoot)("leaves the guest running and no file", async () => {
    const mount = Bun.spawnSync(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", directory]);
    expect(mount.exitCode).toBe(0);
    try {
      const error = await refusalOf(save());
      expect(error.code).toBe("SAVE_FAILED");
      await expectUndone();
      expect(await askQmp(qemu.qmpPath, "query-status")).toMatchObject({ status: "running" });
    } finally {
      Bun.spawnSync(["umount", directory]);
    }
    await until(() => readdirSync(directory).length === 0, "unmounted");
  });
});
