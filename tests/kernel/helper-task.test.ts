/** Helper tasks in a real process: what UFFDIO_MOVE does there, and how helpers live and end. */
import { afterEach, describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import {
  EAGAIN,
  EBADF,
  EEXIST,
  EINVAL,
  ENOENT,
  HELPER_CALLS_MAX,
  MADV_DONTNEED,
  MODE_DONTWAKE,
  SYS_CLOSE,
  SYS_GETPID,
  SYS_IOCTL,
  SYS_MADVISE,
  UFFD_FEATURES,
} from "../../src/sys/abi.ts";
import {
  CALL_NOT_MADE,
  endHelper,
  HELPER_GONE,
  HelperTask,
  reapHelper,
} from "../../src/sys/helper-task.ts";
import * as sys from "../../src/sys/native.ts";
import { testMoving } from "../helpers/declare.ts";
import {
  descriptorsOf,
  ended,
  HelperBench,
  HUGE,
  HUGE_PAGES,
  hugeKib,
  isOver,
  PAGE,
  type RegionKind,
  stateOf,
  statusOf,
} from "../helpers/helper-target.ts";
import { TargetProcess, targetProgram, until, within } from "../helpers/kernel-target.ts";
import { libraryFd, preloadVariables, receivePreload } from "../helpers/preloaded.ts";

const TIMEOUT_MS = 20_000;
const isArm = process.arch === "arm64";
const SYS_READ = isArm ? 63 : 0;
const SYS_OPENAT = isArm ? 56 : 257;
const SYS_KILL = isArm ? 129 : 62;
/** wait4(2): ended by this signal, and no core (which would be 0x80 more). */
const KILLED_BY_SIGSYS = 31;
const KILLED_BY_SIGKILL = 9;
const STATUS_MASK = 0xffff;

let bench: HelperBench | undefined;

async function start(
  kind: RegionKind = "thp",
  chunks = 4,
  helpers = 1,
  features = 0,
): Promise<HelperBench> {
  bench = await HelperBench.start(kind, chunks, helpers, features);
  return bench;
}

afterEach(async () => {
  await bench?.end();
  bench = undefined;
});

describe("HelperTask.move", () => {
  testMoving(
    "brings whole huge pages, and the target keeps them",
    async () => {
      const it = await start();
      for (let index = 0; index < 4; index += 1) {
        expect(it.bring(index)).toEqual({ made: 2, read: HUGE, moved: HUGE });
      }
      expect(await it.read(0, 4 * HUGE_PAGES)).toBe(it.crc(0, 4 * HUGE_PAGES));
      expect(hugeKib(it.target.pid, it.addr, 4 * HUGE)).toBe(4 * 2048);
    },
    TIMEOUT_MS,
  );

  testMoving(
    "several chunks in one batch",
    async () => {
      const it = await start();
      const fd = it.task.sendDescriptor(it.file.fd);
      it.task.begin();
      for (let index = 0; index < 4; index += 1) {
        it.task.preadInto(fd, it.task.record.stagingAddr, HUGE, index * HUGE);
        it.task.move(it.chunk(index), it.task.record.stagingAddr, HUGE, 0);
      }
      expect(it.task.run()).toBe(8);
      expect([1, 3, 5, 7].map((index) => it.task.result(index))).toEqual(Array(4).fill(HUGE));
      expect(await it.read(0, 4 * HUGE_PAGES)).toBe(it.crc(0, 4 * HUGE_PAGES));
    },
    TIMEOUT_MS,
  );

  testMoving(
    "wakes who waits, with the right bytes",
    async () => {
      const it = await start();
      const { answer } = await it.blockedRead(HUGE_PAGES + 9);
      expect(it.bring(1).moved).toBe(HUGE);
      expect(await within(answer, 5000, "the waiter")).toBe(it.crc(HUGE_PAGES + 9, 1));
      expect(it.hasFault()).toBe(false);
    },
    TIMEOUT_MS,
  );

  testMoving(
    "wakes nobody with DONTWAKE, until WAKE",
    async () => {
      const it = await start();
      const { answer } = await it.blockedRead(9);
      expect(it.bring(0, MODE_DONTWAKE).moved).toBe(HUGE);
      expect(await Promise.race([answer, Bun.sleep(50).then(() => "waits")])).toBe("waits");
      it.uffd.wake(it.chunk(0), HUGE);
      expect(await within(answer, 5000, "the waiter")).toBe(it.crc(9, 1));
    },
    TIMEOUT_MS,
  );

  testMoving(
    "stops at a page that is present, and says how far it came",
    async () => {
      const it = await start();
      const other = it.file.addr + 3 * HUGE; // Not the bytes that belong there.
      expect(it.uffd.copy(it.chunk(0) + 5 * PAGE, other, PAGE, 0)).toBe(PAGE);
      expect(it.bring(0)).toEqual({ made: 1, read: HUGE, moved: 5 * PAGE });
      const restLength = (HUGE_PAGES - 6) * PAGE;
      const restAddr = it.chunk(0) + 6 * PAGE;
      expect(it.uffd.copy(restAddr, it.file.addr + 6 * PAGE, restLength, 0)).toBe(restLength);
      expect(await it.read(0, 5)).toBe(it.crc(0, 5));
      expect(await it.read(5, 1)).toBe(it.crc(3 * HUGE_PAGES, 1));
      expect(await it.read(6, HUGE_PAGES - 6)).toBe(it.crc(6, HUGE_PAGES - 6));
    },
    TIMEOUT_MS,
  );

  testMoving(
    "EEXIST: the first page is present",
    async () => {
      const it = await start();
      expect(it.uffd.copy(it.chunk(0), it.file.addr, PAGE, 0)).toBe(PAGE);
      expect(it.bring(0)).toEqual({ made: 1, read: HUGE, moved: -EEXIST });
    },
    TIMEOUT_MS,
  );

  testMoving(
    "ENOENT: a page of the source is not there",
    async () => {
      const it = await start();
      it.task.begin();
      it.task.move(it.chunk(0), it.task.record.stagingAddr, HUGE, 0);
      expect(it.task.run()).toBe(0);
      expect(it.task.result(0)).toBe(-ENOENT);
    },
    TIMEOUT_MS,
  );

  testMoving(
    "what a failed move leaves in the source can be discarded",
    async () => {
      const it = await start();
      expect(it.uffd.copy(it.chunk(0), it.file.addr, PAGE, 0)).toBe(PAGE);
      expect(it.bring(0).moved).toBe(-EEXIST);
      const { stagingAddr, stagingLength } = it.task.record;
      it.task.begin();
      it.task.madvise(stagingAddr, stagingLength, MADV_DONTNEED);
      it.task.move(it.chunk(1), stagingAddr, HUGE, 0);
      expect(it.task.run()).toBe(1);
      expect(it.task.result(0)).toBe(0);
      expect(it.task.result(1)).toBe(-ENOENT);
    },
    TIMEOUT_MS,
  );

  test.each(["shmem", "locked"] as const)(
    "EINVAL: %s memory",
    async (kind) => {
      const it = await start(kind);
      expect(it.bring(0)).toEqual({ made: 1, read: HUGE, moved: -EINVAL });
    },
    TIMEOUT_MS,
  );

  testMoving(
    "EINVAL: memory that is not registered",
    async () => {
      const it = await start();
      it.uffd.unregister(it.chunk(1), HUGE);
      expect(it.bring(1).moved).toBe(-EINVAL);
      expect(it.bring(2).moved).toBe(HUGE);
    },
    TIMEOUT_MS,
  );

  testMoving(
    "EAGAIN: the target gives memory back, and the event has not been read",
    async () => {
      const it = await start("thp", 4, 1, UFFD_FEATURES.EVENT_REMOVE);
      expect(it.bring(0).moved).toBe(HUGE);
      const discard = it.target.job("d", 0, HUGE_PAGES);
      await until(() => (it.hasFault() ? true : null), 5000, "an event");
      expect(it.bring(1).moved).toBe(-EAGAIN);
      const event = new Uint8Array(32);
      expect(sys.read(it.uffd.fd, event, 32)).toBe(32);
      expect(await within(discard, 5000, "the discard")).toBe(0);
      expect(it.bring(1).moved).toBe(HUGE);
    },
    TIMEOUT_MS,
  );

  testMoving(
    "a page given back is missing again, and can be moved again",
    async () => {
      const it = await start();
      expect(it.bring(0).moved).toBe(HUGE);
      expect(await it.target.job("d", 0, HUGE_PAGES)).toBe(0);
      expect(it.bring(0).moved).toBe(HUGE);
      expect(await it.read(0, HUGE_PAGES)).toBe(it.crc(0, HUGE_PAGES));
    },
    TIMEOUT_MS,
  );

  testMoving(
    "two helpers in turn",
    async () => {
      const it = await start("thp", 8, 2);
      for (let index = 0; index < 8; index += 1) {
        expect(it.bring(index, 0, it.tasks[index % 2]).moved).toBe(HUGE);
      }
      expect(await it.read(0, 8 * HUGE_PAGES)).toBe(it.crc(0, 8 * HUGE_PAGES));
    },
    TIMEOUT_MS,
  );
});

describe("HelperTask.run", () => {
  test(
    "a file that is too short ends the batch, and nothing is moved",
    async () => {
      const it = await start();
      const fd = it.task.sendDescriptor(it.file.fd);
      it.task.begin();
      it.task.preadInto(fd, it.task.record.stagingAddr, HUGE, 4 * HUGE - PAGE);
      it.task.move(it.chunk(0), it.task.record.stagingAddr, HUGE, 0);
      expect(it.task.run()).toBe(0);
      expect(it.task.result(0)).toBe(PAGE);
      expect(it.task.result(1)).toBe(CALL_NOT_MADE);
      expect(it.task.result(1)).toBe(CALL_NOT_MADE);
      expect(it.uffd.copy(it.chunk(0), it.file.addr, PAGE, 0)).toBe(PAGE);
    },
    TIMEOUT_MS,
  );

  test(
    "a short read counts as failed also when it is the last call",
    async () => {
      const it = await start();
      const fd = it.task.sendDescriptor(it.file.fd);
      it.task.begin();
      it.task.preadInto(fd, it.task.record.stagingAddr, HUGE, 0);
      it.task.preadInto(fd, it.task.record.stagingAddr, HUGE, 4 * HUGE - PAGE);
      expect(it.task.run()).toBe(1);
      expect(it.task.result(1)).toBe(PAGE);
    },
    TIMEOUT_MS,
  );

  test(
    "a negative result ends the batch only where it is to",
    async () => {
      const it = await start();
      it.task.begin();
      it.task.add(SYS_CLOSE, 999, 0, 0, 0, 0, 0, false);
      it.task.add(SYS_MADVISE, 1, PAGE, MADV_DONTNEED, 0, 0, 0, true);
      it.task.add(SYS_CLOSE, 999, 0, 0, 0, 0, 0, false);
      expect(it.task.run()).toBe(1);
      expect(it.task.result(0)).toBe(-EBADF);
      expect(it.task.result(1)).toBe(-EINVAL);
      expect(it.task.result(2)).toBe(CALL_NOT_MADE);
    },
    TIMEOUT_MS,
  );

  test(
    "nothing of a batch stays for the next one",
    async () => {
      const it = await start();
      it.task.begin();
      for (let index = 0; index < HELPER_CALLS_MAX; index += 1) {
        it.task.stopUnless(it.task.closeDescriptor(999), -EBADF);
      }
      expect(() => it.task.closeDescriptor(999)).toThrow("at most 256 calls");
      expect(it.task.run()).toBe(HELPER_CALLS_MAX);
      it.task.begin();
      expect(it.task.run()).toBe(0);
      expect(it.task.result(0)).toBe(CALL_NOT_MADE);
    },
    TIMEOUT_MS,
  );
});

describe("HelperTask.stop", () => {
  testMoving(
    "ends a batch that may be ended, behind the call that it is in; the next one is as ever",
    async () => {
      const it = await start();
      const fd = it.task.sendDescriptor(it.file.fd);
      it.task.begin(true);
      for (let index = 0; index < HELPER_CALLS_MAX; index += 1) {
        it.task.preadInto(fd, it.task.record.stagingAddr, HUGE, 0);
      }
      expect(it.task.start()).toBe(0);
      it.task.stop();
      it.task.stop();
      const made = it.task.finish();
      expect(made).toBeGreaterThanOrEqual(0);
      expect(made).toBeLessThan(HELPER_CALLS_MAX);
      expect(it.task.result(made)).toBe(CALL_NOT_MADE);
      expect(it.bring(2)).toEqual({ made: 2, read: HUGE, moved: HUGE });
    },
    TIMEOUT_MS,
  );

  testMoving(
    "lets another batch be",
    async () => {
      const it = await start();
      it.task.begin();
      for (let index = 0; index < 3; index += 1) it.task.closeDescriptor(999);
      expect(it.task.start()).toBe(0);
      it.task.stop();
      expect(it.task.finish()).toBe(3);
      expect(it.bring(0).moved).toBe(HUGE);
    },
    TIMEOUT_MS,
  );
});

describe("HelperTask.touch", () => {
  test(
    "brings a huge page",
    async () => {
      const it = await start();
      const { stagingAddr } = it.task.record;
      it.task.begin();
      it.task.touch(stagingAddr);
      expect(it.task.run()).toBe(1);
      expect(hugeKib(it.target.pid, stagingAddr, HUGE)).toBe(2048);
    },
    TIMEOUT_MS,
  );
});

describe("HelperTask.clear", () => {
  test(
    "makes pages zero, and those beside them stay as they are",
    async () => {
      const it = await start();
      const { stagingAddr } = it.task.record;
      const fd = it.task.openFile(it.file.fd);
      it.task.begin();
      it.task.preadInto(fd, stagingAddr, 4 * PAGE, 0);
      it.task.clear(stagingAddr + PAGE, 2 * PAGE);
      expect(it.task.run()).toBe(2);
      const found = new Uint8Array(4 * PAGE);
      const read = sys.processVmReadv(it.target.pid, stagingAddr, sys.ptrOf(found), found.length);
      expect(read).toBe(found.length);
      const expected = new Uint8Array(4 * PAGE);
      for (const page of [0, 3]) {
        const at = page * PAGE;
        expect(sys.pread(it.file.fd, sys.ptrOf(expected) + at, PAGE, at)).toBe(PAGE);
      }
      expect(found).toEqual(expected);
    },
    TIMEOUT_MS,
  );

  test(
    "finds the last word of a page, and writes to none that is zero",
    async () => {
      const it = await start();
      const { stagingAddr } = it.task.record;
      it.task.begin();
      it.task.clear(stagingAddr, HUGE);
      expect(it.task.run()).toBe(1);
      // Who only reads gets the kernel's page of zeros.
      expect(hugeKib(it.target.pid, stagingAddr, HUGE)).toBe(0);
      const word = Float64Array.of(1);
      const last = stagingAddr + 2 * PAGE - 8;
      expect(sys.processVmWritev(it.target.pid, last, sys.ptrOf(word), 8)).toBe(8);
      it.task.begin();
      it.task.clear(stagingAddr, HUGE);
      expect(it.task.run()).toBe(1);
      expect(sys.processVmReadv(it.target.pid, last, sys.ptrOf(word), 8)).toBe(8);
      expect(word[0]).toBe(0);
    },
    TIMEOUT_MS,
  );
});

describe("HelperTask.sendDescriptor", () => {
  test(
    "says the number in the helper, which is close-on-exec and can be closed",
    async () => {
      const it = await start();
      const fd = it.task.sendDescriptor(it.file.fd);
      expect(descriptorsOf(it.task.record.pid)[fd]).toStartWith("/memfd:fsl-test");
      it.task.begin();
      const closed = it.task.closeDescriptor(fd);
      expect(it.task.run()).toBe(1);
      expect(it.task.result(closed)).toBe(0);
      expect(descriptorsOf(it.task.record.pid)[fd]).toBeUndefined();
      expect(it.task.sendDescriptor(it.file.fd)).toBe(fd);
    },
    TIMEOUT_MS,
  );
});

describe("HelperTask.openFile", () => {
  test(
    "gives the file once; who has the record finds it there",
    async () => {
      const it = await start();
      const { record } = it.task;
      const fd = it.task.openFile(it.file.fd);
      expect(descriptorsOf(record.pid)[fd]).toStartWith("/memfd:fsl-test");
      const before = Object.keys(descriptorsOf(record.pid));
      expect(new HelperTask({ ...record }).openFile(it.file.fd)).toBe(fd);
      expect(Object.keys(descriptorsOf(record.pid))).toEqual(before);
    },
    TIMEOUT_MS,
  );

  test(
    "of a helper that is gone says so each time",
    async () => {
      const it = await start();
      await endTarget(it);
      expect(it.task.openFile(it.file.fd)).toBe(HELPER_GONE);
      expect(it.task.openFile(it.file.fd)).toBe(HELPER_GONE);
    },
    TIMEOUT_MS,
  );
});

describe("a helper, seen from outside,", () => {
  test(
    "is a child of fsl in the target's address space, and not of the target",
    async () => {
      const it = await start("thp", 1, 2);
      const { pid } = it.task.record;
      expect(sys.kcmpVm(pid, it.target.pid)).toBe(0);
      expect(sys.kcmpVm(pid, process.pid)).toBeGreaterThan(0);
      expect(statusOf(pid, "PPid")).toBe(String(process.pid));
      expect(statusOf(pid, "Name")).toBe("fsl-helper");
      expect(readdirSync(`/proc/${it.target.pid}/task`)).toEqual([String(it.target.pid)]);
    },
    TIMEOUT_MS,
  );

  test(
    "has its socket, the userfaultfd and the target's pidfd, and nothing else",
    async () => {
      const it = await start("thp", 1, 2);
      const kinds = Object.values(descriptorsOf(it.task.record.pid))
        .map((link) => link.replace(/\d+/, "N"))
        .sort();
      const expected = ["anon_inode:[pidfd]", "anon_inode:[userfaultfd]", "socket:[N]"];
      expect(kinds).toEqual(expected);
      expect(descriptorsOf(it.task.record.pid)[it.task.record.uffdFd]).toBe(expected[1] ?? "");
      const inTarget = Object.values(descriptorsOf(it.target.pid));
      expect(inTarget.filter((link) => /userfaultfd|pidfd/.test(link))).toEqual([]);
    },
    TIMEOUT_MS,
  );

  testMoving(
    "has no capabilities, gains none, dumps no core, and takes no signals",
    async () => {
      const it = await start("thp", 1);
      const { pid } = it.task.record;
      for (const set of ["CapInh", "CapPrm", "CapEff", "CapAmb"]) {
        expect(statusOf(pid, set)).toBe("0000000000000000");
      }
      expect(statusOf(pid, "NoNewPrivs")).toBe("1");
      expect(statusOf(pid, "Seccomp")).toBe("2");
      const limits = readFileSync(`/proc/${pid}/limits`, "latin1");
      expect(limits).toMatch(/^Max core file size\s+1\s+1\s/m);
      for (const signal of ["SIGTERM", "SIGINT", "SIGHUP", "SIGTSTP", "SIGCHLD"] as const) {
        process.kill(pid, signal);
      }
      expect(it.bring(0).moved).toBe(HUGE);
      // And the target's own mask is as it was.
      expect(statusOf(it.target.pid, "SigBlk")).toBe("0000000000000000");
    },
    TIMEOUT_MS,
  );

  test(
    "its memory is not in forked children, nor in core dumps",
    async () => {
      const it = await start("thp", 1);
      const staging = it.task.record.stagingAddr.toString(16);
      const smaps = readFileSync(`/proc/${it.target.pid}/smaps`, "latin1");
      const at = smaps.indexOf(`${staging}-`);
      expect(at).toBeGreaterThan(0);
      const flags = /^VmFlags: (.*)$/m.exec(smaps.slice(at))?.[1] ?? "";
      expect(flags.split(" ")).toEqual(expect.arrayContaining(["dc", "dd", "hg"]));
    },
    TIMEOUT_MS,
  );

  test.each([0, 1, 9])(
    "there are %d of them when that many are asked for",
    async (count) => {
      const it = await start("thp", 1, count);
      const pids = it.tasks.map((task) => task.record.pid);
      expect(new Set(pids).size).toBe(count);
      expect(new Set(it.tasks.map((task) => task.record.stagingAddr)).size).toBe(count);
      expect(pids.filter(isOver)).toEqual([]);
      const outcomes = it.tasks.map((task) => {
        task.begin();
        return task.run();
      });
      expect(outcomes).toEqual(pids.map(() => 0));
    },
    TIMEOUT_MS,
  );

  test(
    "a target that may not map their memory has none, and runs",
    async () => {
      const target = await startLimited();
      try {
        const { helpers, uffd } = receivePreload(target.socket);
        expect(helpers).toEqual([]);
        sys.close(uffd);
        await target.line((text) => text.startsWith("region "));
      } finally {
        await target.kill();
      }
    },
    TIMEOUT_MS,
  );
});

/** Room for the program and its 2 MiB of memory, and not for a helper's 2 MiB more, aligned. */
const ADDRESS_SPACE_KIB = 5500;

async function startLimited(): Promise<TargetProcess> {
  const library = libraryFd();
  const { LD_PRELOAD, FSL_PRELOAD } = preloadVariables(1);
  const command =
    `ulimit -v ${ADDRESS_SPACE_KIB}; ` +
    `LD_PRELOAD=${LD_PRELOAD} FSL_PRELOAD=${FSL_PRELOAD} exec "$0" region shmem 1`;
  const target = new TargetProcess(["-c", command, targetProgram()], "sh", process.env, [library]);
  sys.close(library);
  return target;
}

describe("the end of a helper", () => {
  testMoving(
    "when fsl closes its socket; the target goes on",
    async () => {
      const it = await start();
      expect(it.bring(0).moved).toBe(HUGE);
      it.task.close();
      expect((await ended(it.task.record.pid)) & STATUS_MASK).toBe(0);
      expect(it.task.run()).toBe(HELPER_GONE);
      expect(await it.read(0, HUGE_PAGES)).toBe(it.crc(0, HUGE_PAGES));
    },
    TIMEOUT_MS,
  );

  test.each([
    ["by its socket and its parent's death", "alone"],
    ["by its parent's death alone", "share"],
  ])(
    "when fsl is killed, %s; the target goes on",
    async (_what, how) => {
      const script = join(import.meta.dir, "../helpers/helper-parent.ts");
      const parent = Bun.spawn([process.execPath, script, how], {
        stdio: ["ignore", "pipe", "inherit"],
      });
      const reader = parent.stdout.getReader();
      const { value } = await within(reader.read(), 10_000, "the parent's line");
      const pids = JSON.parse(new TextDecoder().decode(value)) as Record<string, number>;
      const { helper = 0, target = 0, holder } = pids;
      try {
        expect(statusOf(helper, "Name")).toBe("fsl-helper");
        parent.kill("SIGKILL");
        await parent.exited;
        await until(() => (isOver(helper) ? true : null), 1000, "the helper's end");
        expect(stateOf(target)).toBe("S");
      } finally {
        parent.kill("SIGKILL");
        for (const pid of [target, holder]) if (pid !== undefined) process.kill(pid, "SIGKILL");
      }
    },
    TIMEOUT_MS,
  );

  testMoving(
    "when the target ends, whose memory is free then",
    async () => {
      const it = await start();
      for (let index = 0; index < 4; index += 1) expect(it.bring(index).moved).toBe(HUGE);
      const { pid } = it.task.record;
      await endTarget(it);
      expect(readFileSync(`/proc/${pid}/statm`, "latin1").trim()).toBe("0 0 0 0 0 0 0");
      it.task.begin();
      expect(it.task.run()).toBe(HELPER_GONE);
      expect((await ended(pid)) & STATUS_MASK).toBe(0);
    },
    TIMEOUT_MS,
  );

  testMoving(
    "when it is killed: HELPER_GONE from then on, and the target goes on",
    async () => {
      const it = await start();
      expect(it.bring(0).moved).toBe(HUGE);
      process.kill(it.task.record.pid, "SIGKILL");
      expect((await ended(it.task.record.pid)) & STATUS_MASK).toBe(KILLED_BY_SIGKILL);
      it.task.begin();
      expect(it.task.run()).toBe(HELPER_GONE);
      expect(it.task.sendDescriptor(it.file.fd)).toBe(HELPER_GONE);
      expect(await it.read(0, HUGE_PAGES)).toBe(it.crc(0, HUGE_PAGES));
      expect(it.uffd.copy(it.chunk(1), it.file.addr, PAGE, 0)).toBe(PAGE);
    },
    TIMEOUT_MS,
  );

  test(
    "when it is killed in the middle of a call",
    async () => {
      const it = await start();
      const { pid, stagingAddr } = it.task.record;
      const pair = new Int32Array(2);
      sys.check(sys.socketpair(1, pair), "socketpair");
      const [own = -1, theirs = -1] = pair;
      const silent = it.task.sendDescriptor(theirs);
      const killer = Bun.spawn(["sh", "-c", `sleep 0.2; kill -9 ${pid}`]);
      it.task.begin();
      it.task.add(SYS_READ, silent, stagingAddr, 1, 0, 0, 0, true);
      expect(it.task.run()).toBe(HELPER_GONE);
      await killer.exited;
      sys.close(own);
      sys.close(theirs);
    },
    TIMEOUT_MS,
  );

  test.each([
    ["openat", SYS_OPENAT, 0],
    ["getpid", SYS_GETPID, 0],
    ["kill", SYS_KILL, 0],
    ["an ioctl that is not userfaultfd's", SYS_IOCTL, 0x5421],
    ["a number that is no system call", 0x4000_0000, 0],
  ])(
    "when it is asked for %s; the target goes on",
    async (_what, number, argument) => {
      const it = await start();
      it.task.begin();
      it.task.add(number, 0, argument, 0, 0, 0, 0, true);
      expect(it.task.run()).toBe(HELPER_GONE);
      expect((await ended(it.task.record.pid)) & STATUS_MASK).toBe(KILLED_BY_SIGSYS);
      expect(it.uffd.copy(it.chunk(1), it.file.addr, PAGE, 0)).toBe(PAGE);
      expect(await it.read(HUGE_PAGES, 1)).toBe(it.crc(0, 1));
    },
    TIMEOUT_MS,
  );

  test(
    "when it is sent something that is no request",
    async () => {
      const it = await start();
      const bytes = new Uint8Array(16);
      expect(sys.send(it.task.record.fd, bytes, 16, new Int32Array(0), 0, 0)).toBe(16);
      expect((await ended(it.task.record.pid)) & STATUS_MASK).toBe(0);
      expect(call(it.task)).toBe(HELPER_GONE);
    },
    TIMEOUT_MS,
  );
});

/** And its helper with it. */
async function endTarget({ target, task }: HelperBench): Promise<void> {
  target.child.kill("SIGKILL");
  await target.child.exited;
  await until(() => (isOver(task.record.pid) ? true : null), 1000, "the helper's end");
}

function call(task: HelperTask): number {
  task.begin();
  return task.run();
}

describe("endHelper and reapHelper", () => {
  test(
    "leave nothing of a helper",
    async () => {
      const it = await start();
      const { record } = it.task;
      it.tasks = [];
      await within(endHelper(record), 1000, "endHelper");
      expect(stateOf(record.pid)).toBeNull();
    },
    TIMEOUT_MS,
  );

  test(
    "do not touch a child that is no helper",
    async () => {
      const child = Bun.spawn(["true"]);
      await until(() => (isOver(child.pid) ? true : null), 5000, "the child's end");
      await reapHelper(child.pid);
      expect(await child.exited).toBe(0);
    },
    TIMEOUT_MS,
  );
});
