/** Helper tasks in stock QEMU: they come, move pages into guest RAM, leave, and QEMU goes on. */
import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { closeSync, openSync, readdirSync, readFileSync, readSync } from "node:fs";
import { REGISTER_MISSING } from "../../src/sys/abi.ts";
import {
  endHelper,
  HELPER_GONE,
  type HelperRecord,
  HelperTask,
} from "../../src/sys/helper-task.ts";
import * as native from "../../src/sys/native.ts";
import { Uffd } from "../../src/uffd/uffd.ts";
import { type SpawnOptions, spawnQemu } from "../../src/vmm/spawn.ts";
import type { GuestRegion } from "../../src/vmm/target.ts";
import type { QemuTarget } from "../../src/vmm/qemu.ts";
import { whyNoMove } from "../helpers/declare.ts";
import { descriptorsOf, HUGE, HUGE_PAGES, hugeKib, isOver } from "../helpers/helper-target.ts";
import { mappedBytes, patternPages, until, within } from "../helpers/kernel-target.ts";
import { testOn } from "../helpers/kvm.ts";
import { QEMU } from "../helpers/qemu-vmm.ts";

setDefaultTimeout(60_000);

const CHUNKS = 4;
const NO_SYSCALLS = "on,obsolete=deny,spawn=deny,resourcecontrol=deny";

interface Started {
  readonly target: QemuTarget;
  readonly uffd: Uffd;
  readonly ram: GuestRegion;
  readonly helpers: HelperRecord[];
}

let target: QemuTarget | undefined;
let uffd: Uffd | undefined;
let taken: HelperRecord[] = [];

async function endTaken(): Promise<void> {
  await Promise.all(taken.splice(0).map(endHelper));
}

afterEach(async () => {
  await endTaken();
  await target?.abandon();
  uffd?.close();
  target = undefined;
  uffd = undefined;
});

function argvOf(accel: string, ...extra: string[]): string[] {
  const quiet = ["-nodefaults", "-no-user-config", "-display", "none"];
  return [QEMU, "-M", "q35", "-accel", accel, "-cpu", "qemu64", "-m", "64", ...quiet, ...extra];
}

async function start(
  argv: readonly string[],
  options: Partial<SpawnOptions> = {},
): Promise<Started> {
  const stdio = ["ignore", "ignore", "ignore"] as const;
  target = spawnQemu({ argv, stdio, helperTasks: 2, ...options });
  const { regions } = await target.connect();
  uffd = new Uffd(await target.takeUserfaultfd());
  uffd.api(0);
  const ram = regions.find(({ idstr }) => idstr === "pc.ram");
  if (ram === undefined) throw new Error("no pc.ram");
  taken = target.takeHelpers();
  return { target, uffd, ram, helpers: [...taken] };
}

/** What QEMU's memory holds, read from outside; nothing may be missing there. */
function memoryOf(pid: number, addr: number, length: number): Uint8Array {
  const bytes = new Uint8Array(length);
  const fd = openSync(`/proc/${pid}/mem`, "r");
  try {
    for (let at = 0; at < length;) at += readSync(fd, bytes, at, length - at, addr + at);
  } finally {
    closeSync(fd);
  }
  return bytes;
}

const THREE = ["anon_inode:[pidfd]", "anon_inode:[userfaultfd]", "socket:[N]"];

/** What a process's descriptors are, without their numbers. */
function kindsOfDescriptors(pid: string): string[] {
  const links = Object.values(descriptorsOf(Number(pid)));
  return links.map((link) => link.replace(/\d+/, "N")).sort();
}

function namesOf(pids: readonly string[]): string[] {
  return pids.map((pid) => readFileSync(`/proc/${pid}/comm`, "latin1").trim());
}

/** Children of this process by the kernel's account. */
function children(): string[] {
  const text = readFileSync(`/proc/self/task/${process.pid}/children`, "latin1");
  return text.split(" ").filter((pid) => pid !== "");
}

/** Moves the first chunks of RAM in, half of them by each helper, and looks at them. */
function bringChunks({ target, uffd, ram, helpers }: Started): void {
  const bytes = patternPages(CHUNKS * HUGE_PAGES, 0xe2e);
  const file = mappedBytes(bytes);
  uffd.register(ram.hostAddr, ram.length, REGISTER_MISSING);
  const tasks = helpers.map((record) => new HelperTask(record));
  for (const [index, task] of tasks.entries()) {
    const fd = task.sendDescriptor(file.fd);
    task.begin();
    for (let chunk = index; chunk < CHUNKS; chunk += tasks.length) {
      task.preadInto(fd, task.record.stagingAddr, HUGE, chunk * HUGE);
      task.move(ram.hostAddr + chunk * HUGE, task.record.stagingAddr, HUGE, 0);
    }
    expect(task.run()).toBe((2 * CHUNKS) / tasks.length);
  }
  file.close();
  expect(hugeKib(target.pid, ram.hostAddr, CHUNKS * HUGE)).toBe(CHUNKS * 2048);
  const found = memoryOf(target.pid, ram.hostAddr, bytes.length);
  expect(Bun.hash(found)).toBe(Bun.hash(bytes));
  uffd.unregister(ram.hostAddr, ram.length);
}

const KINDS: [string, string[]][] = [
  ["TCG", argvOf("tcg")],
  ["TCG with -sandbox on", argvOf("tcg", "-sandbox", `${NO_SYSCALLS},elevateprivileges=deny`)],
  ["TCG with -sandbox on and another user", argvOf("tcg", "-sandbox", NO_SYSCALLS, ...asNobody())],
  ["KVM", argvOf("kvm")],
  ["KVM with -sandbox on and another user", argvOf("kvm", "-sandbox", NO_SYSCALLS, ...asNobody())],
];

function asNobody(): string[] {
  return ["-run-with", "user=nobody"];
}

describe.each(KINDS)("helper tasks in QEMU on %s", (name, argv) => {
  testOn(name.startsWith("KVM") ? "kvm" : "tcg", whyNoMove())(
    "move huge pages into guest RAM, are not seen in QEMU, leave nothing, and QEMU goes on",
    async () => {
      const it = await start(argv);
      expect(it.target.userfaultfdWay).toBe("preload");
      expect(it.helpers.length).toBe(2);
      const pids = it.helpers.map(({ pid }) => String(pid));
      expect(namesOf(pids)).toEqual(["fsl-helper", "fsl-helper"]);
      expect(namesOf(readdirSync(`/proc/${it.target.pid}/task`))).not.toContain("fsl-helper");
      expect(pids.flatMap(kindsOfDescriptors)).toEqual([...THREE, ...THREE]);
      await it.target.pause(); // Answered after QEMU has got its copy of the userfaultfd.
      const inQemu = Object.values(descriptorsOf(it.target.pid));
      expect(inQemu.filter((link) => link.includes("pidfd"))).toEqual([]);
      expect(inQemu.filter((link) => link.includes("userfaultfd")).length).toBe(1);

      bringChunks(it);
      await within(endTaken(), 2000, "the helpers' end");
      expect(namesOf(children())).not.toContain("fsl-helper");
      await it.target.resume(); // It answers.
      const state = readFileSync(`/proc/${it.target.pid}/stat`, "latin1");
      expect(state).toMatch(/\) [SR] /);
    },
  );
});

describe("helper tasks that QEMU has", () => {
  test("are none when none are wanted", async () => {
    const { helpers } = await start(argvOf("tcg"), { helperTasks: 0 });
    expect(helpers).toEqual([]);
    expect(namesOf(children())).not.toContain("fsl-helper");
  });

  test("are taken once, and ended by the target when nobody takes them", async () => {
    const stdio = ["ignore", "ignore", "ignore"] as const;
    target = spawnQemu({ argv: argvOf("tcg"), stdio, helperTasks: 1 });
    await target.connect();
    uffd = new Uffd(await target.takeUserfaultfd());
    const pid = children().find((child) => namesOf([child])[0] === "fsl-helper") ?? "";
    expect(pid).not.toBe("");
    await target.abandon();
    await until(() => (children().includes(pid) ? null : true), 2000, "the helper's end");
    expect(target.takeHelpers()).toEqual([]);
  });

  test("end with a QEMU that is killed, and answer HELPER_GONE", async () => {
    const it = await start(argvOf("tcg"));
    const tasks = it.helpers.map((record) => new HelperTask(record));
    it.target.kill();
    await it.target.exited;
    const gone = (): true | null => (it.helpers.every(({ pid }) => isOver(pid)) ? true : null);
    await until(gone, 1000, "the helpers' end");
    const answers = tasks.map((task) => {
      task.begin();
      return task.run();
    });
    expect(answers).toEqual([HELPER_GONE, HELPER_GONE]);
  });

  test("are made anew when another program became QEMU by exec: the first are in its lost memory", async () => {
    const it = await start(["nice", "-n", "0", ...argvOf("tcg")]);
    const { pid } = it.target;
    expect(it.helpers.map((helper) => native.kcmpVm(pid, helper.pid))).toEqual([0, 0]);
    expect(it.target.userfaultfdWay).not.toBe("preload");
    it.uffd.register(it.ram.hostAddr, it.ram.length, REGISTER_MISSING);
    it.uffd.unregister(it.ram.hostAddr, it.ram.length);
    const isGone = (): true | null => (namesOf(children()).includes("fsl-helper") ? null : true);
    await until(isGone, 2000, "the helpers' end");
  });
});
