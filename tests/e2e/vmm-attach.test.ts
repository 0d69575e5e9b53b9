/** QEMUs that somebody else has started: taken, given a state and left, or left as they were. */
import {
  afterAll,
  afterEach,
  beforeAll,
  describe,
  expect,
  setDefaultTimeout,
  test,
} from "bun:test";
import { closeSync, openSync, readFileSync } from "node:fs";
import { createConnection, createServer } from "node:net";
import { join } from "node:path";
import { REGISTER_MISSING } from "../../src/sys/abi.ts";
import * as native from "../../src/sys/native.ts";
import { type AttachOptions, attachQemu } from "../../src/vmm/attach.ts";
import type { QemuTarget } from "../../src/vmm/qemu.ts";
import { saveSnapshot } from "../../src/vmm/save.ts";
import {
  bootDrive,
  bootSector,
  descriptorLinks,
  expectRefusal,
  guestArgv,
  ownDescriptors,
  OwnQemu,
  refusalOf,
  Scratch,
  stopProcess,
  until,
} from "../helpers/qemu-vmm.ts";

setDefaultTimeout(60_000);

const scratch = new Scratch();
const disk = scratch.file("disk.img", bootSector());
const snapshotPath = join(scratch.path, "guest.snap");
const argv = guestArgv("pc", ...bootDrive(disk));
const isRoot = process.getuid?.() === 0;
let qemu: OwnQemu | undefined;
let target: QemuTarget | undefined;

beforeAll(async () => {
  await using saved = await OwnQemu.start(scratch, argv);
  const { qmpPath } = saved;
  const verify = (): void => {};
  await saveSnapshot({ qmpPath, path: snapshotPath, live: false, afterwards: "quit", verify });
});

afterEach(async () => {
  await target?.abandon();
  target?.close();
  await qemu?.[Symbol.asyncDispose]();
  target = undefined;
  qemu = undefined;
});

afterAll(() => scratch[Symbol.dispose]());

async function start(
  extra: readonly string[] = [],
  before: readonly string[] = [],
): Promise<OwnQemu> {
  qemu = await OwnQemu.start(scratch, [...before, ...argv, ...extra, "-incoming", "defer"]);
  return qemu;
}

function attach(options: Partial<AttachOptions> = {}): QemuTarget {
  target = attachQemu({ qmpPath: qemu?.qmpPath ?? "", ...options });
  return target;
}

async function capabilitiesOn(): Promise<string[]> {
  const list = (await qemu?.ask("query-migrate-capabilities")) as {
    capability: string;
    state: boolean;
  }[];
  return list.filter(({ state }) => state).map(({ capability }) => capability);
}

/** Loads the whole snapshot as seed, with a userfaultfd that is proved by use. */
async function loadAll(taken: QemuTarget): Promise<void> {
  const info = await taken.connect();
  const fd = await taken.takeUserfaultfd();
  const out = new BigUint64Array(2);
  const ram = info.regions.find(({ idstr }) => idstr === "pc.ram");
  expect(native.uffdApi(fd, 0, out)).toBe(0);
  expect(native.uffdRegister(fd, ram?.hostAddr ?? 0, ram?.length ?? 0, REGISTER_MISSING, out)).toBe(
    0,
  );
  expect(native.uffdUnregister(fd, ram?.hostAddr ?? 0, ram?.length ?? 0)).toBe(0);
  native.close(fd);
  const seed = openSync(snapshotPath, "r");
  try {
    taken.giveSeed(seed);
    await (
      await taken.loadState(0)
    ).loaded;
  } finally {
    closeSync(seed);
  }
  await taken.resume();
  await taken.release();
}

async function expectLoaded(pid: number): Promise<void> {
  expect(await qemu?.ask("query-status")).toMatchObject({ status: "running" });
  expect(await capabilitiesOn()).toEqual([]);
  expect(await qemu?.ask("query-fdsets")).toEqual([]);
  const links = descriptorLinks(pid);
  expect(links.filter((link) => link.includes("userfaultfd"))).toEqual([]);
}

describe("attachQemu", () => {
  test("gives it a state, and leaves it running with its own settings", async () => {
    const { pid } = await start();
    const before = ownDescriptors().length;
    const taken = attach();
    expect(taken.pid).toBe(pid);
    expect(taken.description).toContain(`(pid ${pid})`);
    await loadAll(taken);
    await expectLoaded(pid);
    taken.close();
    expect(ownDescriptors().length).toBe(before);
  });

  test("takes one in a sandbox", async () => {
    const { pid } = await start(["-sandbox", "on,elevateprivileges=deny,spawn=deny"]);
    await loadAll(attach());
    await expectLoaded(pid);
  });

  test.skipIf(!isRoot)("takes one of another user", async () => {
    const { pid } = await start(["-run-with", "user=nobody"]);
    await loadAll(attach());
    await expectLoaded(pid);
  });

  test.skipIf(!isRoot)("takes one in another mount namespace", async () => {
    const { pid } = await start([], ["unshare", "--mount"]);
    await loadAll(attach());
    await expectLoaded(pid);
  });

  test("takes one that went into the background", async () => {
    const pidPath = join(scratch.path, "pid");
    const started = await start(["-daemonize", "-pidfile", pidPath]);
    expect(await started.exited).toBe(0);
    const pid = Number(readFileSync(pidPath, "utf8"));
    try {
      const taken = attach();
      expect(taken.pid).toBe(pid);
      await loadAll(taken);
      await expectLoaded(pid);
    } finally {
      process.kill(pid, "SIGKILL");
    }
  });

  test("leaves it as it was when it is given up", async () => {
    const { pid } = await start();
    await qemu?.ask("query-status"); // It has started by now.
    const links = descriptorLinks(pid).length;
    const taken = attach();
    await taken.connect();
    native.close(await taken.takeUserfaultfd());
    await taken.keepDescriptor("fsl-test", 0);
    await taken.abandon();
    await until(() => descriptorLinks(pid).length <= links, "descriptors closed");
    expect(await capabilitiesOn()).toEqual([]);
    expect(await qemu?.ask("query-fdsets")).toEqual([]);
    expect(await qemu?.ask("query-status")).toMatchObject({ status: "inmigrate" });
    // Whoever started it can still give it its state.
    await loadAll(attach());
    await expectLoaded(pid);
  });

  test("leaves nothing that it was given too late, when it is given up", async () => {
    const { pid } = await start();
    await qemu?.ask("query-status"); // It has started by now.
    const links = descriptorLinks(pid).length;
    const taken = attach();
    await taken.connect();
    await stopProcess(pid);
    // One descriptor at a time: the second one is not sent before the first is answered for.
    const kept = ["fsl-test", "fsl-test-2"].map((name) => taken.keepDescriptor(name, 0));
    const all = Promise.allSettled(kept);
    const abandoned = taken.abandon();
    process.kill(pid, "SIGCONT");
    await Promise.all([abandoned, all]);
    await until(() => descriptorLinks(pid).length <= links, "descriptors closed");
    expect(await capabilitiesOn()).toEqual([]);
  });

  test("works by the pid that it is told, through a relay", async () => {
    const { pid, qmpPath } = await start();
    const relayPath = join(scratch.path, "relay");
    const relay = createServer((near) => {
      const far = createConnection(qmpPath);
      near.pipe(far).pipe(near);
      near.on("error", () => far.destroy());
      far.on("error", () => near.destroy());
    });
    await new Promise<void>((resolve) => relay.listen(relayPath, resolve));
    try {
      const wrong = attach({ qmpPath: relayPath });
      const error = await refusalOf(async () => {
        await wrong.connect();
        await wrong.takeUserfaultfd();
      });
      // The relay is this process, which reserves gigabytes: something may be at QEMU's address.
      const isAccident = error.code === "TARGET_LOST";
      expectRefusal(
        error,
        isAccident ? "TARGET_LOST" : "TARGET_MISMATCH",
        isAccident ? /getfd/ : /RAMBlock .*: QEMU says it is at .*nothing is mapped/,
      );
      wrong.close();
      const right = attach({ qmpPath: relayPath, pid });
      expect((await right.connect()).machineType).toMatch(/^pc-i440fx/);
      // No descriptor comes through such a relay.
      expectRefusal(await refusalOf(right.takeUserfaultfd()), "TARGET_LOST", /getfd/);
      right.close();
    } finally {
      relay.close();
    }
  });

  test("tells how it ended", async () => {
    const { pid } = await start();
    const taken = attach();
    await taken.connect();
    process.kill(pid, "SIGKILL");
    const error = await refusalOf(taken.keepDescriptor("fsl-test", 0));
    expectRefusal(error, "TARGET_LOST", /ended (by SIGKILL|with exit code unknown) before/);
    expect((await taken.exited).exitCode).toBeNull();
  });
});

describe("attachQemu refuses", () => {
  test("a socket that is not there", async () => {
    const error = await refusalOf(() => attachQemu({ qmpPath: join(scratch.path, "none") }));
    expectRefusal(error, "TARGET_LOST", /cannot connect \(ENOENT\)/);
  });

  test("a QEMU that does not wait for a state", async () => {
    qemu = await OwnQemu.start(scratch, argv);
    const taken = attach();
    const error = await refusalOf(taken.connect());
    await taken.abandon();
    expectRefusal(error, "TARGET_MISMATCH", /found running; start it with -incoming defer/);
    expect(await qemu.ask("query-status")).toMatchObject({ status: "running" });
  });

  test("a monitor that somebody else is connected to", async () => {
    const { qmpPath } = await start();
    const other = createConnection(qmpPath);
    await new Promise((resolve) => other.once("data", resolve));
    const error = await refusalOf(attach({ greetingTimeoutMs: 200 }).connect());
    expectRefusal(error, "TARGET_LOST", /no QMP greeting .* another client may be connected/);
    other.destroy();
  });

  test("a QEMU that is stopped by a signal", async () => {
    const { pid } = await start();
    await stopProcess(pid);
    const stopped = attach({ greetingTimeoutMs: 200 });
    const refused = refusalOf(stopped.connect());
    // Whoever has something else to do meanwhile is not kept from it.
    expect(await Promise.race([stopped.asked().then(() => "asked"), refused])).toBe("asked");
    expectRefusal(await refused, "TARGET_LOST", /no QMP greeting/);
    process.kill(pid, "SIGCONT");
  });

  test("a QEMU that another fsl is at work on", async () => {
    const { pid, qmpPath } = await start();
    attach();
    const error = await refusalOf(() => attachQemu({ qmpPath }));
    expectRefusal(error, "TARGET_LOST", new RegExp(`process ${pid}: another fsl is at work on it`));
  });

  test("a process that does not get what is sent to the monitor", async () => {
    const { qmpPath } = await start();
    await using other = await OwnQemu.start(scratch, [...argv, "-incoming", "defer"]);
    const error = await refusalOf(async () => {
      const taken = attach({ qmpPath, pid: other.pid });
      await taken.connect();
      await taken.takeUserfaultfd();
    });
    // Where memory happens to lie at the same addresses, the descriptor tells.
    expectRefusal(error, "TARGET_MISMATCH", /QEMU says it is at|is not the QEMU that answers/);
  });

  test("a process that is not there", async () => {
    const { qmpPath } = await start();
    const error = await refusalOf(() => attachQemu({ qmpPath, pid: 0x7ffffffe }));
    expectRefusal(error, "TARGET_LOST", /process 2147483646: E/);
  });
});
