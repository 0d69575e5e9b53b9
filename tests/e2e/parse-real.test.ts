/**
 * Fresh snapshots of the installed QEMU, parsed by us and held against QEMU's own account of
 * itself.
 */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  closeSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { planSeed, writeSeed } from "../../src/snapshot/seed.ts";
import { openSnapshot, type Snapshot } from "../../src/snapshot/snapshot.ts";
import {
  bootSector,
  QemuOracle,
  qemuVersion,
  saveWithStalePages,
  type OracleBlock,
  type SaveOptions,
} from "../helpers/qemu-oracle.ts";
import { refusalOf } from "../helpers/snapshot-builder.ts";

const version = qemuVersion();
if (version === null) console.log("skipped: no QEMU; install qemu-system-x86 or set FSL_QEMU");
else console.log(`held against ${version}`);

setDefaultTimeout(60_000);
let directory = "";
beforeAll(() => {
  directory = mkdtempSync(join(tmpdir(), "fsl-parse-real-"));
});
afterAll(() => rmSync(directory, { recursive: true }));

/** What QEMU said when it saved. */
interface Account {
  readonly path: string;
  readonly machineType: string;
  readonly blocks: readonly OracleBlock[];
}

const TCG = ["-accel", "tcg"];
const MICROVM = ["-M", "microvm,acpi=off", "-m", "8"];

async function save(
  name: string,
  args: readonly string[],
  options: SaveOptions & { readonly before?: (qemu: QemuOracle) => Promise<unknown> } = {},
): Promise<Account> {
  const path = join(directory, `${name}.snap`);
  await using qemu = await QemuOracle.start([...TCG, ...args]);
  await options.before?.(qemu);
  await qemu.save(path, options);
  return { path, machineType: await qemu.machineType(), blocks: await qemu.blocks() };
}

/**
 * Names of the device sections by the description at the end of the file, found by a plain search.
 */
function describedDevices(path: string): string[] {
  const tail = readFileSync(path).subarray(-2_000_000);
  const { devices } = JSON.parse(
    tail.subarray(tail.lastIndexOf('{"configuration"')).toString(),
  ) as {
    devices: { name: string }[];
  };
  return devices.map((device) => device.name);
}

/** Machine, blocks and devices of the snapshot are what QEMU says. */
function expectAccount(snapshot: Snapshot, account: Account): void {
  expect(snapshot.machineType).toBe(account.machineType);
  expect(snapshot.blocks.map(({ idstr, usedLength }) => ({ idstr, usedLength }))).toEqual(
    account.blocks.map(({ idstr, usedLength }) => ({ idstr, usedLength })),
  );
  const devices = snapshot.sections.filter(({ kind }) => kind === "full").map(({ name }) => name);
  expect(devices).toEqual(describedDevices(account.path));
  expect(snapshot.layout.isVerifiedComplete).toBe(true);
}

const NULL_DISK = "driver=null-co,read-zeroes=on";
const MACHINES: [string, string[]][] = [
  [
    "pc with many devices",
    `-M pc -m 16 -smp 2 -device VGA -device virtio-net-pci -device e1000 -device rtl8139
     -device virtio-rng-pci -device virtio-balloon-pci -device virtio-serial-pci
     -drive if=none,id=d0,${NULL_DISK} -device virtio-blk-pci,drive=d0
     -device virtio-scsi-pci -device lsi -usb -device usb-tablet -device isa-serial
     -device pci-bridge,id=bridge,chassis_nr=2 -device virtio-rng-pci,bus=bridge,addr=1
     -netdev user,id=net -device virtio-net-pci,netdev=net`,
  ],
  [
    "q35 with many devices",
    `-M q35 -m 16 -smp 4 -device virtio-vga -device e1000e -device qemu-xhci -device usb-kbd
     -device ich9-intel-hda -device virtio-keyboard-pci -device vmgenid -device intel-iommu
     -device pcie-root-port,id=rp1,chassis=1 -device virtio-net-pci,bus=rp1
     -device sdhci-pci -device megasas -device i6300esb -device virtio-balloon-pci`,
  ],
  [
    "q35 with NUMA nodes, a dimm and virtio-mem",
    `-M q35 -m 16,slots=4,maxmem=1G -smp 2
     -object memory-backend-ram,id=node0,size=8M -object memory-backend-memfd,id=node1,size=8M,share=on
     -numa node,nodeid=0,memdev=node0,cpus=0 -numa node,nodeid=1,memdev=node1,cpus=1
     -object memory-backend-ram,id=dimm,size=128M -device pc-dimm,memdev=dimm,node=0
     -object memory-backend-ram,id=vmem,size=32M
     -device virtio-mem-pci,memdev=vmem,requested-size=16M,node=0`,
  ],
  ["microvm", "-M microvm -m 16"],
  [
    "microvm with devices on mmio and PCIe",
    `-M microvm,pcie=on -m 16 -device virtio-net-device -device virtio-rng-device
     -device virtio-balloon-device -device virtio-serial-device
     -drive if=none,id=d0,${NULL_DISK} -device virtio-blk-device,drive=d0`,
  ],
].map(([name = "", args = ""]) => [name, args.trim().split(/\s+/)]);

describe.skipIf(version === null)("a fresh snapshot", () => {
  test.each(MACHINES)("of %s has QEMU's blocks and devices", async (_name, args) => {
    const account = await save("machine", args);
    using snapshot = openSnapshot(account.path);
    expectAccount(snapshot, account);
    expect(snapshot.globalState?.runState).toBe("paused");
  });

  test("of a guest with a hotplugged dimm has its block", async () => {
    const account = await save("hotplug", ["-M", "q35", "-m", "8,slots=2,maxmem=1G"], {
      before: async (qemu) => {
        const size = 128 * 1024 * 1024;
        await qemu.command("object-add", { "qom-type": "memory-backend-ram", id: "d1", size });
        await qemu.command("device_add", { driver: "pc-dimm", id: "dimm1", memdev: "d1" });
      },
    });
    using snapshot = openSnapshot(account.path);
    expectAccount(snapshot, account);
    expect(snapshot.blocks[0]?.idstr).toBe("d1");
  });

  test("by multifd has the layout of one without", async () => {
    const account = await save("multifd", MICROVM, {
      capabilities: ["multifd"],
      parameters: { "multifd-channels": 4 },
    });
    using snapshot = openSnapshot(account.path);
    expectAccount(snapshot, account);
  });

  test("without zero page detection has every bit set", async () => {
    const parameters = { "zero-page-detection": "none" };
    using snapshot = openSnapshot((await save("none", MICROVM, { parameters })).path);
    for (const block of snapshot.blocks) {
      expect(snapshot.pageBitmap(block).dataPages).toBe(block.pageCount);
    }
  });

  test("at offset 4097 is found there, and refused at 0", async () => {
    const account = await save("offset", MICROVM, { offset: 4097 });
    using snapshot = openSnapshot(account.path, { offset: 4097 });
    expectAccount(snapshot, account);
    expect(refusalOf(() => openSnapshot(account.path)).code).toBe("SNAPSHOT_FORMAT");
  });

  test("in a descriptor of an fdset is read like any other", async () => {
    const path = join(directory, "fdset.snap");
    const fd = openSync(path, "w");
    try {
      const args = [...TCG, ...MICROVM, "-add-fd", "fd=3,set=1"];
      await using qemu = await QemuOracle.start(args, [fd]);
      await qemu.save("/dev/fdset/1");
      const account = { path, machineType: await qemu.machineType(), blocks: await qemu.blocks() };
      using snapshot = openSnapshot(path);
      expectAccount(snapshot, account);
    } finally {
      closeSync(fd);
    }
  });

  test("with suppress-vmdesc=on has blocks and run state, and is not verified", async () => {
    const account = await save("suppress", [
      "-M",
      "microvm,acpi=off,suppress-vmdesc=on",
      "-m",
      "8",
    ]);
    using snapshot = openSnapshot(account.path);
    expect(snapshot.blocks.map(({ idstr }) => idstr)).toEqual(
      account.blocks.map(({ idstr }) => idstr),
    );
    expect(snapshot.layout.isVerifiedComplete).toBe(false);
    expect(snapshot.globalState?.runState).toBe("paused");
  });

  test("with a recorded uuid gives it", async () => {
    const uuid = "0f0e0d0c-0b0a-4908-8706-050403020100";
    const options = { capabilities: ["validate-uuid"] };
    using snapshot = openSnapshot((await save("uuid", [...MICROVM, "-uuid", uuid], options)).path);
    expect(snapshot.uuid).toBe(uuid);
  });

  test("with x-ignore-shared has addresses in its records", async () => {
    const account = await save("ignore", MICROVM, { capabilities: ["x-ignore-shared"] });
    using snapshot = openSnapshot(account.path);
    expectAccount(snapshot, account);
    expect(snapshot.blocks.every((block) => block.guestPhysicalAddr !== null)).toBe(true);
  });

  test("of a running guest holds stale pages, whose bits are clear", async () => {
    const disk = join(directory, "boot.img");
    writeFileSync(disk, bootSector());
    const path = join(directory, "stale.snap");
    const drive = `file=${disk},format=raw,if=floppy,readonly=on`;
    await using qemu = await QemuOracle.start([...TCG, "-M", "pc", "-m", "8", "-drive", drive]);
    await saveWithStalePages(qemu, path);
    using snapshot = openSnapshot(path);
    expect(snapshot.globalState?.runState).toBe("running");
    const [ram] = snapshot.blocks;
    if (ram === undefined) throw new Error("no block");
    const bitmap = snapshot.pageBitmap(ram);
    // The guest has zeroed 0x10000-0x8ffff; the file still has what was there before.
    const page = new Uint8Array(4096);
    let stalePages = 0;
    for (let index = 0x10; index < 0x90; index++) {
      readSync(snapshot.fd, page, 0, 4096, ram.pagesOffset + index * 4096);
      expect(bitmap.has(index)).toBe(false);
      if (page.some((byte) => byte !== 0)) stalePages += 1;
    }
    expect(stalePages).toBeGreaterThan(20);
  });
});

describe.skipIf(version === null)("a snapshot is refused", () => {
  test("when it was saved with background-snapshot: it has no bitmaps", async () => {
    const options = { capabilities: ["background-snapshot"], live: true };
    const { path } = await save("background", MICROVM, options);
    const error = refusalOf(() => openSnapshot(path));
    expect(error.code).toBe("SNAPSHOT_UNSUPPORTED");
    expect(error.message).toContain("background-snapshot");
  });

  test("when it was saved without mapped-ram", async () => {
    const path = join(directory, "plain.snap");
    await using qemu = await QemuOracle.start([...TCG, ...MICROVM]);
    await qemu.command("stop");
    await qemu.command("migrate", { uri: `file:${path}` });
    await qemu.migrated();
    const error = refusalOf(() => openSnapshot(path));
    expect(error.code).toBe("SNAPSHOT_UNSUPPORTED");
    expect(error.message).toContain("without mapped-ram");
  });

  test("when it was saved with send-configuration=off", async () => {
    const machine = "microvm,acpi=off,suppress-vmdesc=on";
    const args = ["-M", machine, "-m", "8", "-global", "migration.send-configuration=off"];
    const { path } = await save("unconfigured", args);
    const error = refusalOf(() => openSnapshot(path));
    expect(error.code).toBe("SNAPSHOT_UNSUPPORTED");
    expect(error.message).toContain("send-configuration=off");
  });

  test("when it was saved with send-section-footer=off", async () => {
    const args = [...MICROVM, "-global", "migration.send-section-footer=off"];
    const { path } = await save("footless", args);
    const error = refusalOf(() => openSnapshot(path));
    expect(error.code).toBe("SNAPSHOT_UNSUPPORTED");
    expect(error.message).toContain("send-section-footer=off");
  });

  test("when its QEMU ended in the middle of saving it", async () => {
    const path = join(directory, "killed.snap");
    await using qemu = await QemuOracle.start([...TCG, "-M", "pc", "-m", "16"]);
    const killed = qemu.save(path, {
      live: true,
      parameters: { "max-bandwidth": 64 * 1024 },
      during: async () => {
        while (statSync(path, { throwIfNoEntry: false })?.size === undefined) await Bun.sleep(10);
        await Bun.sleep(300);
        await qemu.close();
      },
    });
    await killed.catch(() => {});
    expect(refusalOf(() => openSnapshot(path)).code).toBe("SNAPSHOT_FORMAT");
  });

  test("when it was cut anywhere behind its RAM", async () => {
    const { path } = await save("cut", MICROVM);
    const bytes = readFileSync(path);
    using whole = openSnapshot(path);
    const { tailOffset } = whole.layout;
    const cutPath = join(directory, "cut-here.snap");
    for (let cut = tailOffset; cut < bytes.length; cut += 211) {
      writeFileSync(cutPath, bytes.subarray(0, cut));
      expect(refusalOf(() => openSnapshot(cutPath)).code).toBe("SNAPSHOT_FORMAT");
    }
  });
});

describe.skipIf(version === null)("a seed", () => {
  /**
   * Loads a file into a new QEMU, by QEMU's own loader. @returns the first MiB of its memory, and
   * its run state
   */
  async function loadBy(path: string): Promise<{ memory: Uint8Array; status: unknown }> {
    await using qemu = await QemuOracle.start([...TCG, ...MICROVM, "-incoming", "defer"]);
    await qemu.load(path);
    const { status } = (await qemu.command("query-status")) as { status: unknown };
    return { memory: await qemu.physicalMemory(0, 1024 * 1024), status };
  }

  function writeSeedOf(path: string, lazyIdstrs: readonly string[]): string {
    using snapshot = openSnapshot(path);
    const seedPath = join(directory, "a.seed");
    const fd = openSync(seedPath, "w");
    try {
      writeSeed(planSeed(snapshot, new Set(lazyIdstrs)), snapshot.fd, fd);
    } finally {
      closeSync(fd);
    }
    return seedPath;
  }

  test("is loaded by QEMU, without the memory of its lazy blocks and with that of the others", async () => {
    // The firmware of a microvm works in the first MiB.
    const before = async (qemu: QemuOracle): Promise<void> => {
      for (let attempt = 0; attempt < 200; attempt++) {
        if ((await qemu.physicalMemory(0, 0x10000)).some((byte) => byte !== 0)) return;
        await Bun.sleep(20);
      }
    };
    const { path } = await save("seeded", MICROVM, { before });
    const whole = await loadBy(path);
    const copied = await loadBy(writeSeedOf(path, []));
    const lazy = await loadBy(writeSeedOf(path, ["microvm.ram"]));
    expect(whole.memory.some((byte) => byte !== 0)).toBe(true);
    expect(copied.memory).toEqual(whole.memory);
    expect(copied.status).toBe("paused");
    // The end of the first MiB is a copy of the firmware, which is another block.
    const ram = (memory: Uint8Array): Uint8Array => memory.subarray(0, 0xc0000);
    expect(ram(lazy.memory).every((byte) => byte === 0)).toBe(true);
    expect(lazy.status).toBe("paused");
  });
});
