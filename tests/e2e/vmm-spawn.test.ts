/** A real QEMU, started, looked at, given a state, and let go or given up. */
import {
  afterAll,
  afterEach,
  beforeAll,
  describe,
  expect,
  setDefaultTimeout,
  test,
} from "bun:test";
import { chmodSync, closeSync, openSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { F_SETFD } from "../../src/sys/abi.ts";
import * as native from "../../src/sys/native.ts";
import type { QemuTarget } from "../../src/vmm/qemu.ts";
import { saveSnapshot } from "../../src/vmm/save.ts";
import { spawnQemu } from "../../src/vmm/spawn.ts";
import { guestFile } from "../helpers/guests.ts";
import {
  askQmp,
  bootDrive,
  bootSector,
  descriptorLinks,
  expectRefusal,
  guestArgv,
  ownDescriptors,
  OwnQemu,
  ownRuntimeDirectory,
  processState,
  QEMU,
  refusalOf,
  Scratch,
} from "../helpers/qemu-vmm.ts";

setDefaultTimeout(60_000);

const scratch = new Scratch();
const runtimeDirectories = ownRuntimeDirectory(scratch);
const disk = scratch.file("disk.img", bootSector());
const snapshotPath = join(scratch.path, "stopped.snap");
const liveSnapshotPath = join(scratch.path, "live.snap");
const HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled";
const NO_HUGE_HEAP = { GLIBC_TUNABLES: "glibc.malloc.hugetlb=0" };
let target: QemuTarget | undefined;

function spawn(argv: readonly string[], options = {}): QemuTarget {
  target = spawnQemu({ argv, stdio: ["ignore", "ignore", "ignore"], ...options });
  return target;
}

beforeAll(async () => {
  await using qemu = await OwnQemu.start(scratch, guestArgv("pc", ...bootDrive(disk)));
  const options = { qmpPath: qemu.qmpPath, afterwards: "cont", verify: () => {} } as const;
  await saveSnapshot({ ...options, path: liveSnapshotPath, live: true });
  await saveSnapshot({ ...options, path: snapshotPath, live: false });
});

afterEach(async () => {
  await target?.abandon();
  target?.close();
  target = undefined;
});

afterAll(() => scratch[Symbol.dispose]());

describe("connect", () => {
  test.each([
    ["pc", /^pc-i440fx-\d+\.\d+$/, "pc.ram"],
    ["q35", /^pc-q35-\d+\.\d+$/, "pc.ram"],
    ["microvm", /^microvm$/, "microvm.ram"],
  ])("learns what a %s is", async (machine, machineType, ram) => {
    const info = await spawn(guestArgv(machine)).connect();
    expect(info.machineType).toMatch(machineType);
    expect(info.version).toMatch(/^\d+\.\d+\.\d+$/);
    expect(info.canDiscard).toBe(false);
    expect(info.regions.find(({ idstr }) => idstr === ram)).toMatchObject({
      length: 64 * 1024 * 1024,
      pageSize: 4096,
      readOnly: false,
      backing: "anonymous",
      shared: false,
      sharedWithOthers: false,
    });
  });

  test.each([
    ["memory-backend-memfd,id=m,size=64M,share=on", "shmem", true],
    ["memory-backend-memfd,id=m,size=64M,share=off", "shmem", false],
    ["memory-backend-ram,id=m,size=64M,share=on", "shmem", true],
    ["memory-backend-file,id=m,size=64M,share=on,mem-path=/dev/shm", "shmem", true],
  ])("knows the back end of %s", async (backend, backing, shared) => {
    const info = await spawn(guestArgv("pc,memory-backend=m", "-object", backend)).connect();
    expect(info.regions.find(({ idstr }) => idstr === "m")).toMatchObject({
      backing,
      shared,
      sharedWithOthers: false,
    } as object);
  });

  test("knows a file on a disk", async () => {
    const path = join(scratch.path, "ram.img");
    const backend = `memory-backend-file,id=m,size=64M,share=on,mem-path=${path}`;
    const info = await spawn(guestArgv("pc,memory-backend=m", "-object", backend)).connect();
    const region = info.regions.find(({ idstr }) => idstr === "m");
    // The test's directory may itself be on tmpfs.
    expect(["file", "shmem"]).toContain(region?.backing ?? "none");
  });

  test.each([
    ["virtio-balloon-pci", true],
    ["virtio-balloon-pci,id=b0", true],
    ["virtio-rng-pci", false],
  ])("sees whether %s gives memory back", async (device, canDiscard) => {
    const info = await spawn(guestArgv("pc", "-device", device)).connect();
    expect(info.canDiscard).toBe(canDiscard);
  });

  test.each([
    ["replaces itself by QEMU", `exec ${QEMU} "$@"`],
    ["starts QEMU as a child", `${QEMU} "$@"; exit $?`],
  ])("finds QEMU behind a script that %s", async (_what, line) => {
    const script = scratch.file("wrapper", `#!/bin/sh\n${line}\n`);
    chmodSync(script, 0o755);
    const [, ...args] = guestArgv("microvm");
    const wrapped = spawn([script, ...args]);
    const info = await wrapped.connect();
    expect(info.machineType).toBe("microvm");
    const fd = await wrapped.takeUserfaultfd();
    native.close(fd);
    expect(wrapped.userfaultfdWay).toBe("ptrace");
    wrapped.kill();
    await wrapped.exited;
  });

  test.each([
    ["with a kernel has its heap", ["-kernel", guestFile("bare.elf")], {}, true],
    ["without one has nothing", [], {}, false],
    ["whose heap is tuned has nothing", ["-kernel", guestFile("bare.elf")], NO_HUGE_HEAP, false],
  ])("a QEMU %s in huge pages", async (_what, args, env, expected) => {
    const qemu = spawn(guestArgv("q35", ...args), { env: { ...process.env, ...env } });
    await qemu.connect();
    // Elsewhere glibc asks for none: it would have them anyway, or never.
    const isAsked = readFileSync(HUGE_PAGES, "utf8").includes("[madvise]");
    const [, heap = ""] = readFileSync(`/proc/${qemu.pid}/smaps`, "latin1").split("[heap]");
    expect(/^VmFlags:(.*)$/m.exec(heap)?.[1]?.includes(" hg")).toBe(expected && isAsked);
  });

  test("hands on the caller's descriptors under their own numbers", async () => {
    const fd = openSync(disk, "r");
    native.fcntl(fd, F_SETFD, 0);
    try {
      const qemu = spawn(guestArgv("microvm", "-add-fd", `fd=${fd},set=7`));
      await qemu.connect();
      expect(descriptorLinks(qemu.pid)).toContain(disk);
    } finally {
      closeSync(fd);
    }
  });

  test.each([
    ["an unknown machine", ["-M", "no-such-machine"], /ended with exit code 1 before/],
    ["-version", ["-version"], /ended with exit code 0 before/],
  ])("says how QEMU ended with %s", async (_what, args, message) => {
    const error = await refusalOf(spawn([QEMU, ...args]).connect());
    expectRefusal(error, "TARGET_LOST", message);
  });

  test("gives up on a program that never greets", async () => {
    const script = scratch.file("silent", "#!/bin/sh\nexec sleep 1000\n");
    chmodSync(script, 0o755);
    const error = await refusalOf(spawn([script], { greetingTimeoutMs: 200 }).connect());
    expectRefusal(error, "TARGET_LOST", /no QMP greeting within 200 ms/);
  });

  test("says that it was killed while it waited", async () => {
    const qemu = spawn(guestArgv("pc"));
    qemu.kill();
    expectRefusal(await refusalOf(qemu.connect()), "TARGET_LOST", /ended by SIGKILL before/);
    expect(await qemu.exited).toEqual({ exitCode: null, signal: "SIGKILL" });
  });
});

describe("abandon", () => {
  test.each([
    ["at once", async () => {}],
    ["when connected", async (qemu: QemuTarget) => void (await qemu.connect())],
    [
      "with a userfaultfd and a kept descriptor",
      async (qemu: QemuTarget) => {
        await qemu.connect();
        native.close(await qemu.takeUserfaultfd());
        await qemu.keepDescriptor("fsl-test", 0);
      },
    ],
  ])("leaves nothing behind %s", async (_when, prepare) => {
    const before = { directories: runtimeDirectories(), descriptors: ownDescriptors().length };
    const qemu = spawn(guestArgv("pc"));
    await prepare(qemu);
    const { pid } = qemu;
    await qemu.abandon();
    expect(processState(pid)).toBeNull();
    expect(runtimeDirectories()).toEqual(before.directories);
    expect(ownDescriptors().length).toBe(before.descriptors);
  });
});

describe("loadState", () => {
  const argv = guestArgv("pc", ...bootDrive(disk));

  async function load(path: string, qemu: QemuTarget): Promise<void> {
    await qemu.connect();
    const seed = openSync(path, "r+"); // Any descriptor will do, whatever its mode and position.
    try {
      qemu.giveSeed(seed);
      await (
        await qemu.loadState(0)
      ).loaded;
    } finally {
      closeSync(seed);
    }
  }

  test.each([
    ["stopped", snapshotPath],
    ["live", liveSnapshotPath],
  ])("leaves a guest that was saved %s stopped, until it is resumed", async (_how, path) => {
    const own = join(scratch.path, "own-qmp");
    const qemu = spawn([...argv, "-qmp", `unix:${own},server=on,wait=off`]);
    await load(path, qemu);
    expect(await askQmp(own, "query-status")).toMatchObject({ status: "paused" });
    await qemu.resume();
    expect(await askQmp(own, "query-status")).toMatchObject({ status: "running" });
    await qemu.pause();
    expect(await askQmp(own, "query-status")).toMatchObject({ status: "paused" });
  });

  test("leaves QEMU's settings and descriptors as they were", async () => {
    const own = join(scratch.path, "own-qmp2");
    const globals = ["x-multifd=on", "multifd-compression=zlib", "multifd-channels=7"].flatMap(
      (setting) => ["-global", `migration.${setting}`],
    );
    const qemu = spawn([...argv, ...globals, "-qmp", `unix:${own},server=on,wait=off`]);
    await qemu.connect();
    native.close(await qemu.takeUserfaultfd());
    await qemu.keepDescriptor("fsl-test", 0);
    const seed = openSync(snapshotPath, "r");
    qemu.giveSeed(seed);
    await (
      await qemu.loadState(0)
    ).loaded;
    closeSync(seed);
    await qemu.resume();
    await qemu.release();
    const capabilities = (await askQmp(own, "query-migrate-capabilities")) as {
      capability: string;
      state: boolean;
    }[];
    const on = capabilities.filter(({ state }) => state).map(({ capability }) => capability);
    expect(on).toEqual(["multifd"]);
    expect(await askQmp(own, "query-migrate-parameters")).toMatchObject({
      "multifd-compression": "zlib",
      "multifd-channels": 7,
    });
    expect(await askQmp(own, "query-fdsets")).toEqual([]);
    const links = descriptorLinks(qemu.pid);
    expect(links.filter((link) => link.includes("userfaultfd"))).toEqual([]);
    expect(links).not.toContain(snapshotPath);
  });

  test("can be saved again afterwards", async () => {
    const own = join(scratch.path, "own-qmp3");
    const qemu = spawn([...argv, "-qmp", `unix:${own},server=on,wait=off`]);
    await load(snapshotPath, qemu);
    await qemu.resume();
    await qemu.release();
    const again = join(scratch.path, "again.snap");
    const verify = (): void => {};
    await saveSnapshot({ qmpPath: own, path: again, live: false, afterwards: "stay", verify });
    expect(Bun.file(again).size).toBeGreaterThan(64 * 1024 * 1024);
  });

  test("says why QEMU refuses a state", async () => {
    const error = await refusalOf(load(snapshotPath, spawn(guestArgv("q35"))));
    expectRefusal(error, "TARGET_MISMATCH", /could not load the device state: /);
  });

  test("says so when it is given no snapshot", async () => {
    const error = await refusalOf(load(disk, spawn(argv)));
    expectRefusal(error, "TARGET_MISMATCH", /could not load the device state: /);
  });

  test("passes signals on, and tells how QEMU ended", async () => {
    const qemu = spawn(argv);
    await load(snapshotPath, qemu);
    await qemu.resume();
    qemu.signal("SIGTERM");
    expect(await qemu.exited).toEqual({ exitCode: 0, signal: null });
    expect((await refusalOf(qemu.pause())).code).toBe("TARGET_LOST");
  });
});
