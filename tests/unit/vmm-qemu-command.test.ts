import { describe, expect, test } from "bun:test";
import {
  checkQemuCommand,
  hasOptionFile,
  qemuCommandLine,
  readQemuCommand,
  startsStopped,
} from "../../src/vmm/qemu-command.ts";
import { expectRefusal, refusalOf } from "../helpers/qemu-vmm.ts";

describe("checkQemuCommand", () => {
  test.each([
    ["no command", [], /found none/],
    ["an empty program name", [""], /found none/],
    ["-incoming", ["qemu", "-incoming", "tcp:0:4444"], /-incoming is refused/],
    ["--incoming", ["qemu", "--incoming", "defer"], /--incoming is refused/],
    ["-loadvm", ["qemu", "-m", "1G", "-loadvm", "x"], /-loadvm is refused/],
    ["-preconfig", ["qemu", "-preconfig"], /-preconfig is refused/],
    ["-daemonize", ["qemu", "-display", "none", "-daemonize"], /into the background/],
    ["a NUL character", ["qemu", "-name", "a\0b"], /NUL/],
    ["arguments without end", ["qemu", ...Array<string>(65_536).fill("-S")], /at most 65536/],
  ])("refuses %s", async (_what, argv, message) => {
    expectRefusal(await refusalOf(() => checkQemuCommand(argv)), "USAGE", message);
  });

  test.each([
    ["a plain guest", ["qemu-system-x86_64", "-m", "1G", "disk.img"]],
    ["a monitor of the user's own", ["qemu", "-qmp", "unix:/x,server=on", "-monitor", "stdio"]],
    [
      "words that only look alike",
      ["qemu", "-name", "incoming", "-append", "loadvm=1", "x-incoming"],
    ],
    ["a stopped start", ["qemu", "-S"]],
  ])("takes %s", (_what, argv) => {
    expect(() => checkQemuCommand(argv)).not.toThrow();
  });
});

describe("qemuCommandLine", () => {
  test("adds its own behind the user's, -incoming last", () => {
    expect(
      qemuCommandLine(["qemu", "-m", "1G", "disk.img"], {
        qmpFd: 7,
        configFd: 8,
        seedFd: 9,
        seedSet: 4711,
      }),
    ).toEqual([
      "qemu",
      "-m",
      "1G",
      "disk.img",
      "-S",
      "-chardev",
      "socket,id=fsl-qmp,fd=7,server=on,wait=off",
      "-readconfig",
      "/proc/self/fd/8",
      "-add-fd",
      "fd=9,set=4711",
      "-add-fd",
      "fd=8,set=4711",
      "-incoming",
      "defer",
    ]);
  });
});

describe("readQemuCommand", () => {
  const rest = { vcpus: null, readsKernel: false };
  const [nothing, all] = [
    { hasNoDiscards: false, hasDefaultSettings: false, hasPlainMemory: false, ...rest },
    { hasNoDiscards: true, hasDefaultSettings: true, hasPlainMemory: true, ...rest },
  ];
  test.each([
    [["qemu", "-m", "1G", "-device", "virtio-net-pci"], all],
    [["qemu", "-device", "virtio-balloon-pci"], { ...all, hasNoDiscards: false }],
    [["qemu", "-device", '{"driver":"virtio-mem-pci"}'], { ...all, hasNoDiscards: false }],
    [["qemu", "-global", "migration.x-multifd=on"], { ...all, hasDefaultSettings: false }],
    [["qemu", "-object", "memory-backend-ram,id=a,size=1G"], all],
    [["qemu", "-object", "memory-backend-memfd,id=a,size=1G"], { ...all, hasPlainMemory: false }],
    [["qemu", "-overcommit", "mem-lock=on"], { ...all, hasPlainMemory: false }],
    [["qemu", "-m", "1G", "-mem-path", "/dev/shm"], { ...all, hasPlainMemory: false }],
    [["qemu", "-object", "memory-backend-ram,prealloc=on"], { ...all, hasPlainMemory: false }],
    [["qemu", "-kernel", "bzImage", "-append", "quiet"], { ...all, readsKernel: true }],
    [["qemu", "-append", "kernel"], all],
    [["qemu", "-readconfig", "guest.cfg"], nothing],
    [["qemu", "--set", "device.x.y=z"], nothing],
    [["/usr/bin/qemu-system-x86_64", "-cpu", "max"], { ...all, vcpus: 1 }],
    [["qemu-kvm", "-smp", "4,maxcpus=8"], { ...all, vcpus: 4 }],
    [["qemu-system-i386", "--smp", "cpus=2"], { ...all, vcpus: 2 }],
    [["qemu-system-aarch64", "-smp", "2"], all],
    [["qemu-system-x86_64", "-smp", "cores=2,sockets=2"], all],
    [["qemu-system-x86_64", "-smp", "2", "-smp", "4"], all],
    [["qemu-system-x86_64", "-machine", "q35,smp.cpus=2"], all],
    [["qemu-system-x86_64", "-device", "qemu64-x86_64-cpu,socket-id=1"], all],
  ])("%p → %p", (argv, expected) => {
    expect(readQemuCommand(argv)).toEqual(expected);
  });
});

describe("hasOptionFile", () => {
  const own = qemuCommandLine(["qemu"], { qmpFd: 7, configFd: 8, seedFd: 9, seedSet: 4711 });
  test.each([
    [["qemu", "-readconfig", "/proc/self/fd/8"], true],
    [["qemu", "--readconfig", "guest.cfg"], true],
    [own, false],
    [[...own, "-readconfig", "guest.cfg"], true],
  ])("%p → %p", (argv, expected) => {
    expect(hasOptionFile(argv)).toBe(expected);
  });
});

describe("startsStopped", () => {
  test.each([
    [["qemu", "-S"], true],
    [["qemu", "--S"], true],
    [["qemu", "-s"], false],
    [["-S"], false],
  ])("%p → %p", (argv, expected) => {
    expect(startsStopped(argv)).toBe(expected);
  });
});
