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
  chmodSync,
  existsSync,
  lchownSync,
  lstatSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  readlinkSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { openSnapshot } from "../../src/index.ts";
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

/** A guest that takes a while to save, in place of the one that each test has. */
async function useBigQemu(): Promise<void> {
  await qemu[Symbol.asyncDispose]();
  qemu = await OwnQemu.start(scratch, [
    ...guestArgv("pc", "-m", "1536", ...bootDrive(disk)),
    // Not zero, so it is written: a file mapped as RAM again and again would be shared, this is not.
    ...Array.from({ length: 64 }, (_, index) => [
      "-device",
      `loader,file=${noise},addr=${0x10000000 + index * 65_536},force-raw=on`,
    ]).flat(),
  ]);
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
    await expect(failing).rejects.toThrow("not sound");
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
    await useBigQemu();
    const abort = new AbortController();
    const saving = save({ live, signal: abort.signal, onProgress: () => abort.abort() });
    expectRefusal(await refusalOf(saving), "SAVE_FAILED", /interrupted/);
    await expectUndone();
    await save({ live, afterwards: "cont" });
    await expectUndone(["guest.snap"]);
  });

  test("is undone when it is aborted while the complete file is brought to the disk", async () => {
    const abort = new AbortController();
    const verify = (): void => void setImmediate(() => abort.abort());
    const error = await refusalOf(save({ signal: abort.signal, afterwards: "quit", verify }));
    expectRefusal(error, "SAVE_FAILED", /interrupted/);
    await expectUndone();
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
    await useBigQemu();
    const saving = save({
      onProgress: () => process.kill(qemu.pid, "SIGKILL"),
      verify: () => {
        throw new Error("too fast to be killed in the middle");
      },
    });
    expectRefusal(await refusalOf(saving), "TARGET_LOST", /^QMP: connection to QEMU at /);
    await qemu.exited;
    expect(readdirSync(directory)).toEqual([]);
  });

  test.each([
    [
      "a directory that is not there",
      () => join(directory, "none/x.snap"),
      /none\/x\.snap: the directory \S+\/none does not exist$/,
    ],
    ["a file as directory", () => join(disk, "x.snap"), /ENOTDIR/],
  ])("says so with %s", async (_what, target, message) => {
    expectRefusal(await refusalOf(save({ path: target() })), "SAVE_FAILED", message);
    await expectUndone();
  });

  test.each([
    ["a directory", () => mkdirSync(path)],
    ["a FIFO", () => Bun.spawnSync(["mkfifo", path])],
    ["a socket", () => symlinkSync(qemu.qmpPath, path)],
    ["a device", () => symlinkSync("/dev/null", path)],
    ["a symbolic link to what cannot be reached", () => symlinkSync("none", path)],
  ])("writes over no file that is %s", async (what, make) => {
    make();
    const { ino, mode } = lstatSync(path);
    const error = await refusalOf(save({ qmpPath: join(directory, "never asked") }));
    expectRefusal(error, "USAGE", new RegExp(`^save ${path}: it is ${what}; name a file`));
    expect(lstatSync(path)).toMatchObject({ ino, mode });
    await expectUndone(["guest.snap"]);
  });

  test("follows no link of another user in a folder where everybody can make one", async () => {
    const shared = join(directory, "shared");
    mkdirSync(shared);
    chmodSync(shared, 0o1777);
    const precious = join(directory, "precious");
    writeFileSync(precious, "precious");
    const link = join(shared, "guest.snap");
    symlinkSync(precious, link);
    lchownSync(link, 65_534, 65_534);
    const qmpPath = join(directory, "never asked");
    const error = await refusalOf(save({ path: link, qmpPath }));
    expectRefusal(error, "USAGE", /found a symbolic link of user 65534 in a folder that everybody/);
    expect(readFileSync(precious, "utf8")).toBe("precious");
    expect(readdirSync(shared)).toEqual(["guest.snap"]);
    rmSync(shared, { recursive: true });
    rmSync(precious);
    await expectUndone();
  });

  test.each([
    ["running", "running", /the guest is running, as before$/],
    ["paused", "postmigrate", /was paused and is postmigrate now; `cont` lets it run$/],
  ])("says how a guest is that was %s, when all is written", async (before, after, words) => {
    if (before === "paused") await qemu.ask("stop");
    // A directory that comes into the way when the path was looked at already.
    const error = await refusalOf(save({ verify: () => mkdirSync(path) }));
    expectRefusal(error, "SAVE_FAILED", /cannot write it \(EISDIR\)/);
    expectRefusal(error, "SAVE_FAILED", words);
    expect(error.details).toMatchObject({ path, runState: after });
    expect(await runState()).toBe(after);
    await qemu.ask("cont");
    await expectUndone(["guest.snap"]);
    expect(readdirSync(path)).toEqual([]);
  });

  test.each([
    ["nobody listens", () => join(directory, "none"), "ENOENT", "start QEMU with -qmp unix:"],
    ["QMP is a file", () => disk, "ECONNREFUSED", "it is not a socket$"],
    ["QMP is a directory", () => scratch.path, "ECONNREFUSED", "it is not a socket$"],
    ["QEMU has ended", () => endedQemu(), "ECONNREFUSED", "the QEMU that listened there has ended"],
  ])("says so when %s", async (_what, socket, errno, hint) => {
    const error = await refusalOf(save({ qmpPath: await socket() }));
    const message = new RegExp(`cannot connect \\(${errno}\\); ${hint}`);
    expectRefusal(error, "TARGET_LOST", message);
    expect(readdirSync(directory)).toEqual([]);
  });

  /** The socket of a QEMU that was killed stays. */
  async function endedQemu(): Promise<string> {
    await qemu[Symbol.asyncDispose]();
    return qemu.qmpPath;
  }
});

describe("saveSnapshot that is complete and cannot do what comes afterwards", () => {
  test.each([
    ["cont", /the guest does not run on: QMP: connection/],
    ["stay", /settings are not put back: QMP: connection/],
  ] as const)("says so when QEMU dies before %s", async (afterwards, words) => {
    const verify = async (): Promise<void> => {
      await qemu[Symbol.asyncDispose]();
    };
    const error = await refusalOf(save({ afterwards, verify }));
    expectRefusal(error, "TARGET_LOST", new RegExp(`^save: ${path} is complete, but `));
    expectRefusal(error, "TARGET_LOST", words);
    expect(error.details).toMatchObject({ path, isComplete: true });
    expect(readdirSync(directory)).toEqual(["guest.snap"]);
    openSnapshot(path).close();
  });

  test("says so when QEMU refuses cont", async () => {
    // It lets go of its disk for whoever gets the guest, and cannot take it back when another has it.
    const image = scratch.file("shared.img", bootSector());
    const argv = guestArgv("pc", "-drive", `file=${image},format=raw,if=ide`);
    await qemu[Symbol.asyncDispose]();
    qemu = await OwnQemu.start(scratch, argv);
    let other: OwnQemu | undefined;
    const verify = async (): Promise<void> => {
      other = await OwnQemu.start(scratch, argv);
      await other.ask("query-status"); // It answers when it has its disk.
    };
    try {
      const error = await refusalOf(save({ afterwards: "cont", verify }));
      expectRefusal(
        error,
        "SAVE_FAILED",
        /is complete, but the guest does not run on: QEMU refused cont: .*lock/,
      );
    } finally {
      await other?.[Symbol.asyncDispose]();
    }
    expect(readdirSync(directory)).toEqual(["guest.snap"]);
    await qemu.ask("cont");
    await expectUndone(["guest.snap"]);
  });
});

describe("saveSnapshot on a full disk", () => {
  const isRoot = process.getuid?.() === 0;

  test.skipIf(!isRoot)("leaves the guest running and no file", async () => {
    const mount = Bun.spawnSync(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", directory]);
    expect(mount.exitCode).toBe(0);
    try {
      const error = await refusalOf(save());
      expectRefusal(error, "SAVE_FAILED", new RegExp(`^save ${path}: QEMU could not write it: `));
      await expectUndone();
      expect(await askQmp(qemu.qmpPath, "query-status")).toMatchObject({ status: "running" });
    } finally {
      Bun.spawnSync(["umount", directory]);
    }
    await until(() => readdirSync(directory).length === 0, "unmounted");
  });
});
