/**
 * A userfaultfd of a real QEMU, by each of the ways there are, under what makes it hard: a sandbox,
 * another user, a storm of signals. Each is proved by use: it is registered on the guest's RAM.
 */
import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { FslError } from "../../src/errors.ts";
import { REGISTER_MISSING } from "../../src/sys/abi.ts";
import { endHelper } from "../../src/sys/helper-task.ts";
import * as native from "../../src/sys/native.ts";
import type { QemuTarget } from "../../src/vmm/qemu.ts";
import { spawnQemu } from "../../src/vmm/spawn.ts";
import type { TargetInfo } from "../../src/vmm/target.ts";
import type { UserfaultfdWay } from "../../src/vmm/userfaultfd.ts";
import {
  descriptorLinks,
  expectRefusal,
  guestArgv,
  ownDescriptors,
  processState,
  refusalOf,
  until,
} from "../helpers/qemu-vmm.ts";

setDefaultTimeout(60_000);

let target: QemuTarget | undefined;
let storm: Bun.Subprocess | undefined;

afterEach(async () => {
  storm?.kill("SIGKILL");
  await storm?.exited;
  await target?.abandon();
  target = undefined;
  storm = undefined;
});

function spawn(way: UserfaultfdWay | undefined, ...extra: string[]): QemuTarget {
  target = spawnQemu({
    argv: guestArgv("microvm", ...extra),
    stdio: ["ignore", "ignore", "inherit"],
    ...(way === undefined ? {} : { userfaultfdWay: way }),
  });
  return target;
}

/**
 * True when `fd` is of the address space that `info` tells of: registering and unregistering work.
 */
function isOf(fd: number, info: TargetInfo): boolean {
  const out = new BigUint64Array(2);
  const region = info.regions.find(({ idstr }) => idstr === "microvm.ram");
  if (region === undefined || native.uffdApi(fd, 0, out) < 0) return false;
  const { hostAddr, length } = region;
  if (native.uffdRegister(fd, hostAddr, length, REGISTER_MISSING, out) < 0) return false;
  return native.uffdUnregister(fd, hostAddr, length) >= 0;
}

function userfaultfdsOf(pid: number): number {
  return descriptorLinks(pid).filter((link) => link === "anon_inode:[userfaultfd]").length;
}

function tasksOf(pid: number): string[] {
  return readdirSync(`/proc/${pid}/task`, "utf8");
}

/** Processes that it has not waited for, too. */
function childrenOf(pid: number): string[] {
  const main = readFileSync(`/proc/${pid}/task/${pid}/children`, "latin1");
  return main.split(" ").filter((child) => child !== "");
}

const WAYS = ["preload", "ptrace", "device"] as const;
const isRoot = process.getuid?.() === 0;

describe("takeUserfaultfd", () => {
  test.each(WAYS)("by %s", async (way) => {
    const qemu = spawn(way);
    const info = await qemu.connect();
    const fd = await qemu.takeUserfaultfd();
    try {
      expect(readlinkSync(`/proc/self/fd/${fd}`)).toBe("anon_inode:[userfaultfd]");
      expect(qemu.userfaultfdWay).toBe(way);
      expect(isOf(fd, info)).toBe(true);
    } finally {
      native.close(fd);
    }
  });

  test.each(WAYS)("leaves one copy in QEMU, until it is dropped, by %s", async (way) => {
    const qemu = spawn(way);
    await qemu.connect();
    const fd = await qemu.takeUserfaultfd();
    await qemu.keepDescriptor("fsl-test", fd); // Answered after the first one.
    await qemu.dropDescriptor("fsl-test");
    expect(userfaultfdsOf(qemu.pid)).toBe(1);
    native.close(fd);
    await qemu.dropDescriptor("fsl-uffd");
    expect(userfaultfdsOf(qemu.pid)).toBe(0);
    expect(descriptorLinks(qemu.pid).filter((link) => link.includes("userfaultfd"))).toEqual([]);
  });

  test("takes the preloaded one when it is left to choose", async () => {
    const qemu = spawn(undefined);
    await qemu.connect();
    native.close(await qemu.takeUserfaultfd());
    expect(qemu.userfaultfdWay).toBe("preload");
  });

  test("does not take that of a program that has become QEMU", async () => {
    const argv = ["env", "X=1", ...guestArgv("microvm")];
    target = spawnQemu({ argv, stdio: ["ignore", "ignore", "inherit"] });
    const info = await target.connect();
    const fd = await target.takeUserfaultfd();
    expect(target.userfaultfdWay).toBe("ptrace");
    expect(isOf(fd, info)).toBe(true);
    native.close(fd);
  });

  test.each(WAYS)("works in a QEMU with -sandbox on, by %s", async (way) => {
    const sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    const qemu = spawn(way, "-sandbox", sandbox);
    const info = await qemu.connect();
    const fd = await qemu.takeUserfaultfd();
    expect(isOf(fd, info)).toBe(true);
    native.close(fd);
  });

  test.skipIf(!isRoot).each([
    ["preload", "preload"],
    ["ptrace", "device"],
    ["device", "device"],
  ] as const)("works in a QEMU that runs as nobody, by %s", async (way, found) => {
    const qemu = spawn(way, "-run-with", "user=nobody");
    const info = await qemu.connect();
    const fd = await qemu.takeUserfaultfd();
    expect(isOf(fd, info)).toBe(true);
    // A kernel that lets everybody make one (vm.unprivileged_userfaultfd=1) needs no device.
    expect([found, way]).toContain(qemu.userfaultfdWay ?? "preload");
    native.close(fd);
  });

  test.each(["ptrace", "device"] as const)(
    "of a QEMU that was just killed: says so, by %s",
    async (way) => {
      const qemu = spawn(way);
      await qemu.connect();
      process.kill(qemu.pid, "SIGKILL");
      // Nobody has been told yet: the first sign is what the kernel answers.
      const error = await refusalOf(qemu.takeUserfaultfd());
      const said = /\(pid \d+\) ended by SIGKILL before it was given its state/;
      expectRefusal(error, "TARGET_LOST", said);
    },
  );

  test("an error of a QEMU that has not ended stays what it is", async () => {
    const qemu = spawn("ptrace");
    await qemu.connect();
    const error = new FslError("TARGET_LOST", "something else");
    expect(await qemu.explain(error)).toBe(error);
    process.kill(qemu.pid, "SIGKILL");
    const told = (await qemu.explain(error)) as FslError;
    expectRefusal(told, "TARGET_LOST", /ended by SIGKILL before it was given its state/);
    expect(await qemu.explain(told)).toBe(told);
  });

  test.each([["SIGWINCH"], ["SIGCONT"], ["SIGUSR1"], ["SIGALRM"], ["SIGIO"]])(
    "is right and harmless under a storm of %s",
    async (signal) => {
      const rounds = 25;
      const qemu = spawn("ptrace");
      const info = await qemu.connect();
      const program = `for (;;) process.kill(${qemu.pid}, "${signal}")`;
      storm = Bun.spawn([process.execPath, "-e", program], {
        stdio: ["ignore", "ignore", "ignore"],
      });
      const before = ownDescriptors().length;
      const threads = tasksOf(qemu.pid).length;
      let helpersMade = 0;
      for (let round = 0; round < rounds; round++) {
        const fd = await qemu.takeUserfaultfd();
        expect(isOf(fd, info)).toBe(true);
        native.close(fd);
        await qemu.dropDescriptor("fsl-uffd");
        const helpers = qemu.takeHelpers();
        // SIGCONT, blocked or not, interrupts nearly every clone(2): then there are none.
        helpersMade += helpers.length;
        for (const helper of helpers) expect(await endHelper(helper)).toBe(true);
      }
      if (signal !== "SIGCONT") expect(helpersMade).toBeGreaterThan(0);
      // What has made the helpers is gone, and waited for.
      await until(() => tasksOf(qemu.pid).length <= threads, "the thread that made helpers");
      expect(childrenOf(qemu.pid)).toEqual([]);
      expect(ownDescriptors().length).toBe(before);
      expect(userfaultfdsOf(qemu.pid)).toBe(0);
      storm.kill("SIGKILL");
      await storm.exited;
      await qemu.keepDescriptor("fsl-test", 0); // It answers.
      expect(["S", "R"]).toContain(processState(qemu.pid) ?? "gone");
    },
  );
});
