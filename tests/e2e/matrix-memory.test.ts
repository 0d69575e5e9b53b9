/**
 * Memory back ends and several blocks (docs/guests.md, "Memory"): all memory as QEMU's own load
 * brings it, how each block came in, and what is said of those that could not be lazy.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import {
  closeSync,
  existsSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { AttachRun } from "../helpers/attach-runs.ts";
import {
  guestArgv,
  type GuestSnapshot,
  type Qemu,
  ramBlocks,
  type SerialConsole,
  snapshotOf,
  whyNoGuests,
} from "../helpers/guests.ts";
import { differencesFromOracle } from "../helpers/load-oracle.ts";
import { FslRun, until, whyNoExecutable } from "../helpers/load-runs.ts";
import {
  hugePages,
  loadAndCompare,
  MATRIX_TIMEOUT_MS,
  matrixDirectory,
  type MatrixSnapshot,
  MIB,
  PAGE,
  saveGuest,
  type Way,
  withArgument,
} from "../helpers/matrix-guests.ts";

const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;
const READY = /^(tick|beat) /;
const BARE = { guest: "bare", memoryBackend: "memory-backend-ram" } as const;
/** On tmpfs, and on a disk. */
const SHM = `/dev/shm/fsl-matrix-${process.pid}`;
const DISK = join(import.meta.dir, "../../.cache", `fsl-matrix-${process.pid}`);

let snapshot: MatrixSnapshot;
let virtioMemSnapshot: MatrixSnapshot | undefined;
let directory: ReturnType<typeof matrixDirectory>;
beforeAll(async () => {
  if (skip) return;
  directory = matrixDirectory();
  snapshot = await saveGuest(guestArgv(BARE), { ready: READY });
}, MATRIX_TIMEOUT_MS);
afterAll(async () => {
  snapshot?.[Symbol.dispose]();
  virtioMemSnapshot?.[Symbol.dispose]();
  directory?.[Symbol.dispose]();
  for (const path of [SHM, DISK])
    await Bun.file(path)
      .unlink()
      .catch(() => {});
});

/** The same guest, its RAM from another backend. */
function withBackend(backend: string): string[] {
  return snapshot.argv.map((argument) => argument.replace(/^memory-backend-ram/, backend));
}

/** 64 MiB with old contents where the snapshot has data and where it has zeros. */
function writeOldContents(path: string): void {
  const fd = openSync(path, "w");
  ftruncateSync(fd, 64 * MIB);
  const junk = new Uint8Array(MIB).fill(0xa5);
  for (const offset of [0, 5, 20, 47, 63]) writeSync(fd, junk, 0, MIB, offset * MIB);
  closeSync(fd);
}

function hasOldContents(path: string): boolean {
  const fd = openSync(path, "r");
  const bytes = new Uint8Array(MIB);
  readSync(fd, bytes, 0, MIB, 20 * MIB);
  closeSync(fd);
  return bytes.every((byte) => byte === 0xa5);
}

/** A disk's contents. @returns their md5, as the guest is to find it */
function writeDisk(path: string): string {
  const contents = Buffer.alloc(24 * MIB, "what the disk has ");
  writeFileSync(path, contents);
  return new Bun.CryptoHasher("md5").update(contents).digest("hex");
}

/** The guest reads its disk, once its driver has it, and the data that it had in memory. */
async function expectDiskAndData(
  serial: SerialConsole,
  md5: string,
  checksum: string,
): Promise<void> {
  serial.send("shell\n");
  const line = serial.waitForNext(/^[0-9a-f]{32} {2}\/dev\/vda/);
  serial.send("until [ -b /dev/vda ]; do sleep 0.1; done; md5sum /dev/vda\n");
  expect((await line).text.slice(0, 32)).toBe(md5);
  serial.send("exit\n");
  await serial.waitForNext(READY);
  const [verdict, , found] = await serial.command("sum");
  expect([verdict, found]).toEqual(["ok", checksum]);
  expect((await serial.command("verify"))[0]).toBe("ok");
}

/** A process that serves a disk by vhost-user, and maps guest memory for that. */
async function storageDaemon(disk: string, socket: string): Promise<AsyncDisposable> {
  rmSync(socket, { force: true });
  const node = `driver=file,node-name=disk,filename=${disk}`;
  const address = `addr.type=unix,addr.path=${socket}`;
  const shown = `type=vhost-user-blk,id=export,node-name=disk,writable=on,${address}`;
  const argv = ["qemu-storage-daemon", "--blockdev", node, "--export", shown];
  const daemon = Bun.spawn(["setpriv", "--pdeathsig", "KILL", ...argv], {
    stdio: ["ignore", "ignore", "inherit"],
  });
  const end = async (): Promise<void> => {
    daemon.kill("SIGKILL");
    await daemon.exited;
  };
  try {
    await until(() => (existsSync(socket) ? true : null), 10_000, "qemu-storage-daemon");
  } catch (error) {
    await end();
    throw error;
  }
  return { [Symbol.asyncDispose]: end };
}

/**
 * What a vhost-user back end is asked for, and its answers: VHOST_USER_GET_FEATURES
 * (VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES, VHOST_F_LOG_ALL, VIRTIO_NET_F_MRG_RXBUF) and
 * VHOST_USER_GET_PROTOCOL_FEATURES (LOG_SHMFD: without it QEMU could not migrate).
 * @source QEMU docs/interop/vhost-user.rst
 */
const VHOST_USER_ANSWERS = new Map([
  [1, (1n << 32n) | (1n << 30n) | (1n << 26n) | (1n << 15n)],
  [15, 1n << 1n],
]);
const ANSWER_FLAGS = 1 | (1 << 2);
const MESSAGE_HEADER = 12;

/** As much of a vhost-user network back end as QEMU wants to see before it takes it. */
function vhostUserNet(path: string): Disposable {
  const server = Bun.listen({
    unix: path,
    socket: {
      data(socket, bytes) {
        for (let at = 0; at + MESSAGE_HEADER <= bytes.length;) {
          const value = VHOST_USER_ANSWERS.get(bytes.readUInt32LE(at));
          if (value !== undefined) {
            const answer = Buffer.alloc(MESSAGE_HEADER + 8);
            answer.writeUInt32LE(bytes.readUInt32LE(at), 0);
            answer.writeUInt32LE(ANSWER_FLAGS, 4);
            answer.writeUInt32LE(8, 8);
            answer.writeBigUInt64LE(value, MESSAGE_HEADER);
            socket.write(answer);
          }
          at += MESSAGE_HEADER + bytes.readUInt32LE(at + 8);
        }
      },
    },
  });
  return { [Symbol.dispose]: () => server.stop(true) };
}

describe.skipIf(skip)("memory back ends", () => {
  test.each<[string, string, Way]>([
    ["private memory", "memory-backend-ram", "lazy"],
    ["shared anonymous memory", "memory-backend-ram,share=on", "lazy"],
    ["prealloc=on", "memory-backend-ram,prealloc=on", "lazy"],
    ["not to be merged or dumped", "memory-backend-ram,merge=off,dump=off", "lazy"],
    ["bound to a node", "memory-backend-ram,host-nodes=0,policy=bind", "lazy"],
    ["memfd, share=on", "memory-backend-memfd,share=on", "lazy"],
    ["memfd, share=off", "memory-backend-memfd,share=off", "lazy"],
    ["memfd, share=on, prealloc=on", "memory-backend-memfd,share=on,prealloc=on", "lazy"],
    ["new file on tmpfs, share=on", `memory-backend-file,share=on,mem-path=${SHM}`, "lazy"],
    ["new file on tmpfs, share=off", `memory-backend-file,share=off,mem-path=${SHM}`, "lazy"],
    ["new file on a disk, share=on", `memory-backend-file,share=on,mem-path=${DISK}`, "fill"],
    ["new file on a disk, share=off", `memory-backend-file,share=off,mem-path=${DISK}`, "fill"],
  ])(
    "%s",
    async (_, backend, way) => {
      for (const path of [SHM, DISK])
        await Bun.file(path)
          .unlink()
          .catch(() => {});
      await using loaded = await loadAndCompare(snapshot, { argv: withBackend(backend) });
      expect(loaded.ways["ram0"]).toBe(way);
      expect(loaded.said.includes("loaded in full before resume")).toBe(way === "fill");
    },
    MATRIX_TIMEOUT_MS,
  );

  test.each<[string, string, string, Way]>([
    ["file on tmpfs with old contents, share=on", SHM, "share=on", "lazy"],
    ["file on tmpfs with old contents, share=off", SHM, "share=off", "lazy"],
    ["file on a disk with old contents, share=on", DISK, "share=on", "fill"],
    ["file on a disk with old contents, share=off", DISK, "share=off", "fill"],
  ])(
    "%s",
    async (_, path, share, way) => {
      writeOldContents(path);
      const argv = withBackend(`memory-backend-file,${share},mem-path=${path}`);
      await using loaded = await loadAndCompare(snapshot, { argv });
      expect(loaded.ways["ram0"]).toBe(way);
      // What is private does not change the file.
      expect(hasOldContents(path)).toBe(share === "share=off");
    },
    MATRIX_TIMEOUT_MS,
  );

  test.each<[string, string, Way]>([
    ["file opened for reading only, on tmpfs", SHM, "lazy"],
    ["file opened for reading only, on a disk", DISK, "fill"],
  ])(
    "%s",
    async (_, path, way) => {
      writeOldContents(path);
      const backend = `memory-backend-file,share=off,readonly=on,rom=off,mem-path=${path}`;
      await using loaded = await loadAndCompare(snapshot, { argv: withBackend(backend) });
      expect(loaded.ways["ram0"]).toBe(way);
      expect(hasOldContents(path)).toBe(true);
    },
    MATRIX_TIMEOUT_MS,
  );

  test(
    "part of a file on tmpfs, with old contents before and in it",
    async () => {
      writeOldContents(SHM);
      const fd = openSync(SHM, "r+");
      ftruncateSync(fd, 68 * MIB);
      closeSync(fd);
      const backend = `memory-backend-file,share=on,offset=4M,mem-path=${SHM}`;
      await using loaded = await loadAndCompare(snapshot, { argv: withBackend(backend) });
      expect(loaded.ways["ram0"]).toBe("lazy");
    },
    MATRIX_TIMEOUT_MS,
  );

  test.each([["mem-lock=on"], ["mem-lock=on-fault"]])(
    "-overcommit %s",
    async (lock) => {
      const argv = [...snapshot.argv, "-overcommit", lock];
      await using loaded = await loadAndCompare(snapshot, { argv });
      expect(loaded.ways["ram0"]).toBe("lazy");
    },
    MATRIX_TIMEOUT_MS,
  );

  test(
    "memory that another process maps too",
    async () => {
      writeOldContents(SHM);
      const mapped = Bun.mmap(SHM, { shared: true });
      // Mapped by a process that is neither fsl nor its QEMU: this one.
      expect(mapped[20 * MIB]).toBe(0xa5);
      const argv = withBackend(`memory-backend-file,share=on,mem-path=${SHM}`);
      await using loaded = await loadAndCompare(snapshot, { argv });
      expect(loaded.ways["ram0"]).toBe("fill");
      expect(loaded.said).toMatch(/RAMBlock ram0 is loaded in full before resume: other processes/);
      expect(mapped[20 * MIB]).not.toBe(0xa5);
    },
    MATRIX_TIMEOUT_MS,
  );

  test.skipIf(Bun.which("qemu-storage-daemon") === null)(
    "vhost-user: a disk of qemu-storage-daemon",
    async () => {
      const disk = join(directory.path, "disk");
      const socket = join(directory.path, "vhost-user");
      const md5 = writeDisk(disk);
      const device = ["-device", "vhost-user-blk-pci,chardev=backend,num-queues=1"];
      const argv = guestArgv({
        memoryBackend: "memory-backend-memfd,share=on",
        extraArgs: ["-chardev", `socket,id=backend,path=${socket}`, ...device],
      });
      let checksum = "";
      let saved: MatrixSnapshot;
      {
        await using _ = await storageDaemon(disk, socket);
        const prepare = async ({ serial }: Qemu): Promise<void> => {
          checksum = (await serial.command("info"))[1] ?? "";
        };
        saved = await saveGuest(argv, { ready: READY, prepare });
      }
      using own = saved;
      await using _ = await storageDaemon(disk, socket);
      // The daemon maps guest memory when the guest's device starts, which is after the hand-over.
      await using run = await FslRun.start(own);
      await run.serial.waitFor(READY);
      const report = await run.complete();
      expect(report.blocks.find(({ idstr }) => idstr === "ram0")?.way).toBe("fill");
      expect(
        run.stderr.text.match(/RAMBlock ram0 is loaded in full before resume: other/g),
      ).toHaveLength(1);
      await expectDiskAndData(run.serial, md5, checksum);
    },
    MATRIX_TIMEOUT_MS,
  );

  test.skipIf(Bun.which("qemu-storage-daemon") === null)(
    "vhost-user: a disk that was plugged in by QMP before the load",
    async () => {
      const disk = join(directory.path, "plugged-disk");
      // Nothing on QEMU's command line is to tell.
      const socket = join(directory.path, "back-end");
      const md5 = writeDisk(disk);
      const argv = guestArgv({ machine: "pc", memoryBackend: "memory-backend-memfd,share=on" });
      const chardev = ["-chardev", `socket,id=backend,path=${socket}`];
      const device = { driver: "vhost-user-blk-pci", chardev: "backend", addr: "0x8", id: "disk8" };
      const properties = Object.entries(device).map(([name, value]) => `${name}=${value}`);
      let checksum = "";
      let saved: MatrixSnapshot;
      {
        await using _ = await storageDaemon(disk, socket);
        const prepare = async ({ serial }: Qemu): Promise<void> => {
          checksum = (await serial.command("info"))[1] ?? "";
        };
        const whole = properties.join(",").replace("driver=", "");
        saved = await saveGuest([...argv, ...chardev, "-device", whole], { ready: READY, prepare });
      }
      using own = saved;
      await using _ = await storageDaemon(disk, socket);
      await using run = await AttachRun.start({ argv }, { qemuArgs: chardev });
      await run.qmp.execute("device_add", { ...device });
      const { code, stderr } = await run.attach(own).end();
      expect(stderr).toContain("RAMBlock ram0 is loaded in full before resume: other processes");
      expect(code).toBe(0);
      await expectDiskAndData(run.serial, md5, checksum);
    },
    MATRIX_TIMEOUT_MS,
  );

  test.skipIf(Bun.which("qemu-storage-daemon") === null)(
    "vhost-user: a disk that is plugged in while RAM comes in",
    async () => {
      const disk = join(directory.path, "late-disk");
      const socket = join(directory.path, "late-back-end");
      const md5 = writeDisk(disk);
      const own = { machine: "pc", memoryBackend: "memory-backend-memfd,share=on" } as const;
      const { path, argv, checksum } = await snapshotOf(own);
      await using _ = await storageDaemon(disk, socket);
      const chardev = ["-chardev", `socket,id=backend,path=${socket}`];
      await using run = await FslRun.start(
        { path, argv },
        { qemuArgs: chardev, flags: ["--eager-rate", "1M"] },
      );
      await run.serial.waitFor(READY);
      await run.qmp.ready;
      await run.qmp.execute("device_add", {
        driver: "vhost-user-blk-pci",
        chardev: "backend",
        id: "disk8",
      });
      const report = await run.complete();
      expect(report.complete).toBe(true);
      expect(report.blocks.find(({ idstr }) => idstr === "ram0")?.way).toBe("lazy");
      expect(run.stderr.text).toContain("vhost-user-blk-pci was plugged in while RAM comes in");
      await expectDiskAndData(run.serial, md5, checksum);
    },
    MATRIX_TIMEOUT_MS,
  );

  test(
    "vhost-user: a network back end that came by netdev_add before the load",
    async () => {
      const path = join(directory.path, "net-back-end");
      using _ = vhostUserNet(path);
      const argv = withBackend("memory-backend-memfd,share=on");
      await using run = await AttachRun.start({ argv });
      const addr = { type: "unix", data: { path } };
      const backend = { type: "socket", data: { addr, server: false } };
      await run.qmp.execute("chardev-add", { id: "backend", backend });
      await run.qmp.execute("netdev_add", { type: "vhost-user", id: "net0", chardev: "backend" });
      const { code, stderr } = await run.attach(snapshot, "--paused").end();
      expect(stderr).toContain("RAMBlock ram0 is loaded in full before resume: other processes");
      expect(code).toBe(0);
      expect(await differencesFromOracle(snapshot as MatrixSnapshot & GuestSnapshot, run)).toEqual(
        [],
      );
    },
    MATRIX_TIMEOUT_MS,
  );

  test.each<[string, string, Way]>([
    ["huge pages of a memfd, share=on", "memfd,hugetlb=on,hugetlbsize=2M,share=on", "lazy"],
    ["huge pages of a memfd, share=off", "memfd,hugetlb=on,hugetlbsize=2M,share=off", "lazy"],
    ["huge pages of a memfd, prealloc=on", "memfd,hugetlb=on,hugetlbsize=2M,prealloc=on", "lazy"],
  ])(
    "%s",
    async (_, backend, way) => {
      using _pages = await hugePages(40);
      const argv = withBackend(`memory-backend-${backend}`);
      await using loaded = await loadAndCompare(snapshot, { argv });
      expect(loaded.ways["ram0"]).toBe(way);
    },
    MATRIX_TIMEOUT_MS,
  );

  test.each<[string, string, boolean]>([
    ["new file on hugetlbfs, share=on", "share=on", false],
    ["new file on hugetlbfs, share=off", "share=off", false],
    ["file on hugetlbfs with old contents, share=on", "share=on", true],
    ["file on hugetlbfs with old contents, share=off", "share=off", true],
  ])(
    "%s",
    async (_, share, hasContents) => {
      using _pages = await hugePages(72);
      const mount = join(directory.path, "huge");
      mkdirSync(mount, { recursive: true });
      const mounted = Bun.spawnSync(["mount", "-t", "hugetlbfs", "none", mount]);
      expect(mounted.exitCode).toBe(0);
      try {
        const path = join(mount, "ram");
        if (hasContents) {
          writeFileSync(path, "");
          const fd = openSync(path, "r+");
          ftruncateSync(fd, 64 * MIB);
          closeSync(fd);
          // By another process: this one would count as somebody who maps it.
          const program = "Bun.mmap(process.argv[1], { shared: true }).fill(0xa5)";
          expect(Bun.spawnSync([process.execPath, "-e", program, path]).exitCode).toBe(0);
        }
        const argv = withBackend(`memory-backend-file,${share},mem-path=${path}`);
        await using loaded = await loadAndCompare(snapshot, { argv });
        expect(loaded.ways["ram0"]).toBe("lazy");
      } finally {
        Bun.spawnSync(["umount", "-l", mount]);
      }
    },
    MATRIX_TIMEOUT_MS,
  );

  test(
    "transparent huge pages",
    async () => {
      await using loaded = await loadAndCompare(snapshot);
      const pid = await loaded.run.qemuPid();
      const hugeKib = (): number => {
        const smaps = readFileSync(`/proc/${pid}/smaps_rollup`, "utf8");
        return Number(/AnonHugePages:\s+(\d+)/.exec(smaps)?.[1]);
      };
      // What was copied gets them back after the load.
      await until(() => (hugeKib() > 16 * 1024 ? true : null), 10_000, "16 MiB in huge pages");
    },
    MATRIX_TIMEOUT_MS,
  );
});

describe.skipIf(skip)("several blocks", () => {
  const numa = [
    ...["-object", "memory-backend-ram,id=n0,size=40M"],
    ...["-object", "memory-backend-memfd,id=n1,size=24M"],
    ...["-numa", "node,nodeid=0,memdev=n0", "-numa", "node,nodeid=1,memdev=n1"],
  ];

  test(
    "NUMA nodes with memory of their own",
    async () => {
      using own = await saveGuest(guestArgv({ guest: "bare", extraArgs: numa }), { ready: READY });
      await using loaded = await loadAndCompare(own);
      expect(loaded.ways).toMatchObject({ n0: "lazy", n1: "lazy" });
    },
    MATRIX_TIMEOUT_MS,
  );

  test(
    "a machine without the dimm that was plugged in before the save is refused, with it it loads",
    async () => {
      const argv = guestArgv({ guest: "bare" }).map((argument, index, all) =>
        all[index - 1] === "-m" ? "64,slots=2,maxmem=512M" : argument,
      );
      using own = await saveGuest(argv, {
        ready: READY,
        prepare: async ({ qmp }) => {
          const backend = { "qom-type": "memory-backend-ram", id: "d1", size: 128 * MIB };
          await qmp.execute("object-add", backend);
          await qmp.execute("device_add", { driver: "pc-dimm", id: "dimm1", memdev: "d1" });
        },
      });
      await using refused = await FslRun.start(own);
      expect(await refused.end()).toBe(7);
      expect(refused.stderr.text).toMatch(/RAMBlock d1: in the snapshot, not in QEMU/);
      const dimm = ["-object", "memory-backend-ram,id=d1,size=128M"];
      const withDimm = [...argv, ...dimm, "-device", "pc-dimm,id=dimm1,memdev=d1"];
      await using loaded = await loadAndCompare({ ...own, argv: withDimm });
      expect(loaded.ways).toMatchObject({ "pc.ram": "lazy", d1: "seed" });
    },
    MATRIX_TIMEOUT_MS,
  );

  test(
    "a dimm with data, plugged in before the save",
    async () => {
      const spec = { dataMiB: 16, memoryMiB: 160 };
      const argv = guestArgv(spec).map((argument, index, all) =>
        all[index - 1] === "-m" ? "160,slots=2,maxmem=1G" : argument,
      );
      using own = await saveGuest(argv, {
        ready: /^tick /,
        prepare: async ({ qmp, serial }) => {
          const backend = { "qom-type": "memory-backend-ram", id: "d1", size: 128 * MIB };
          await qmp.execute("object-add", backend);
          await qmp.execute("device_add", { driver: "pc-dimm", id: "dimm1", memdev: "d1" });
          // The guest says that it has it, and it is online by then.
          await qmp.waitEvent("ACPI_DEVICE_OST", ({ info }) => isPluggedIn(info, "dimm1"));
          // Hardly anything else is free.
          expect((await serial.command("fill 96"))[0]).toBe("ok");
        },
      });
      const dimm = ["-object", "memory-backend-ram,id=d1,size=128M"];
      const withDimm = [...argv, ...dimm, "-device", "pc-dimm,id=dimm1,memdev=d1"];
      await using loaded = await loadAndCompare({ ...own, argv: withDimm });
      expect(loaded.ways).toMatchObject({ "pc.ram": "lazy", d1: "lazy" });
      await loaded.run.qmp.execute("cont");
      expect((await loaded.run.serial.command("verify"))[0]).toBe("ok");
    },
    MATRIX_TIMEOUT_MS,
  );

  /** By the guest's own account of a device (ACPI's _OST). */
  function isPluggedIn(info: unknown, device: string): boolean {
    const found = info as { readonly device?: string; readonly status: number };
    return found.device === device && found.status === 0;
  }

  /** Half of it plugged in by the guest's own driver. */
  function virtioMem(): string[] {
    const linux = guestArgv({ dataMiB: 16, memoryMiB: 192 });
    const slots = linux.map((argument, index) =>
      linux[index - 1] === "-m" ? "192,slots=1,maxmem=2G" : argument,
    );
    const device = "virtio-mem-pci,id=vm0,memdev=vmem,requested-size=64M,block-size=2M";
    return [...slots, "-object", "memory-backend-ram,id=vmem,size=512M", "-device", device];
  }

  async function plugged({ qmp }: Qemu): Promise<void> {
    const size = { path: "/machine/peripheral/vm0", property: "size" };
    const isPlugged = async (): Promise<boolean> =>
      (await qmp.execute<number>("qom-get", size)) === 64 * MIB;
    for (let left = 600; !(await isPlugged()); left -= 1) {
      if (left === 0) throw new Error("virtio-mem: nothing was plugged in");
      await Bun.sleep(50); // The event of it comes before it is over.
    }
  }

  /** Bytes that a RAMBlock has in memory, by the kernel's account. */
  async function residentBytes(run: FslRun, name: string): Promise<number> {
    const block = (await ramBlocks(run.qmp)).find((b) => b.name.endsWith(`/${name}`));
    const pagemap = openSync(`/proc/${await run.qemuPid()}/pagemap`, "r");
    const pages = (block?.used ?? 0) / PAGE;
    const entries = Buffer.alloc(8 * pages);
    readSync(pagemap, entries, 0, entries.length, ((block?.address ?? 0) / PAGE) * 8);
    closeSync(pagemap);
    let present = 0;
    for (let page = 0; page < pages; page += 1) present += (entries[8 * page + 7] ?? 0) >>> 7;
    return present * PAGE;
  }

  test.each<[string, string, readonly string[], Way]>([
    ["virtio-mem in private memory", "memory-backend-ram", [], "lazy"],
    ["virtio-mem in shared memory", "memory-backend-memfd,share=on", [], "fill"],
    [
      "virtio-mem in shared memory, by request",
      "memory-backend-memfd,share=on",
      ["--lazy-despite-discards"],
      "lazy",
    ],
  ])(
    "%s",
    async (_, backend, flags, way) => {
      const argv = virtioMem();
      virtioMemSnapshot ??= await saveGuest(argv, { ready: /^tick /, prepare: plugged });
      let inMemory = 0;
      const look = async (run: FslRun): Promise<void> => {
        inMemory = await residentBytes(run, "vmem");
      };
      await using loaded = await loadAndCompare(virtioMemSnapshot, {
        flags,
        look,
        argv: withArgument(argv, "memory-backend-ram", backend),
      });
      // What is not plugged in stays so.
      expect(inMemory).toBeLessThanOrEqual(64 * MIB);
      expect(loaded.ways["vmem"]).toBe(way);
      const size = { path: "/machine/peripheral/vm0", property: "size" };
      expect(await loaded.run.qmp.execute<number>("qom-get", size)).toBe(64 * MIB);
    },
    MATRIX_TIMEOUT_MS,
  );
});
