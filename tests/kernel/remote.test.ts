/**
 * fsl_remote_syscall on targets that make it hard: a storm of signals, calls that sleep, many
 * threads, a stopped, a dead, a traced one. What must hold: no signal is lost or disordered, no
 * sleep is cut short or begun anew, no result of a call is taken for another's, and the target is
 * left as it was.
 */
import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, readlinkSync } from "node:fs";
import {
  EBUSY,
  EINVAL,
  EPERM,
  ESRCH,
  O_CLOEXEC,
  O_NONBLOCK,
  SYS_CLOSE,
  SYS_GETPID,
  SYS_USERFAULTFD,
} from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { staticProgram, targetProgram, TargetProcess, until } from "../helpers/kernel-target.ts";

setDefaultTimeout(60_000);

const CALL_MS = 5000;
const CALLS = 400;
const SIGNALS = 20_000;

let target: TargetProcess | undefined;

afterEach(async () => {
  await target?.kill();
  target = undefined;
});

async function startReady(
  args: readonly string[],
  program = targetProgram(),
): Promise<TargetProcess> {
  target = new TargetProcess(args, program);
  await target.line((line) => line === "ready");
  return target;
}

function remote(pid: number, number: number, ...args: bigint[]): { made: number; result: number } {
  const six = new BigUint64Array(6);
  args.forEach((value, index) => {
    six[index] = value;
  });
  const result = new BigInt64Array(1);
  const made = sys.remoteSyscall(pid, number, six, result, CALL_MS);
  return { made, result: Number(result[0]) };
}

function makeUffd(pid: number): { made: number; result: number } {
  return remote(pid, SYS_USERFAULTFD, BigInt(O_CLOEXEC | O_NONBLOCK));
}

function linkOf(pid: number, fd: number): string {
  try {
    return readlinkSync(`/proc/${pid}/fd/${fd}`);
  } catch {
    return "(none)";
  }
}

/** One letter: S sleeping, T stopped, t traced, Z ended. */
function stateOf(pid: number): string {
  return /^State:\s+(\w)/m.exec(readFileSync(`/proc/${pid}/status`, "latin1"))?.[1] ?? "?";
}

function tracerOf(pid: number): number {
  return Number(/^TracerPid:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, "latin1"))?.[1]);
}

function blockedOf(pid: number): string {
  return /^SigBlk:\s+(\w+)/m.exec(readFileSync(`/proc/${pid}/status`, "latin1"))?.[1] ?? "?";
}

describe("remoteSyscall under a storm of signals", () => {
  test.each(["ppoll", "nanosleep", "busy"])("%s: loses nothing, mistakes nothing", async (how) => {
    const it = await startReady(["storm", how, "3"]);
    it.say(`s ${SIGNALS}`);
    const wrong: string[] = [];
    let calls = 0;
    for (; calls < CALLS; calls += 1) {
      const { made, result } = makeUffd(it.pid);
      const link = linkOf(it.pid, result);
      if (made !== 0 || link !== "anon_inode:[userfaultfd]") {
        wrong.push(`${made} ${result} ${link}`);
      }
      const closed = remote(it.pid, SYS_CLOSE, BigInt(result));
      if (closed.made !== 0 || closed.result !== 0) wrong.push(`close ${closed.result}`);
      if (calls % 16 === 0) await Bun.sleep(0);
    }
    expect(wrong).toEqual([]);
    // Sent, received, out of order, calls of the target's own with a wrong result.
    const report = await it.line((line) => line.startsWith("s "), 30_000);
    expect(report).toBe(`s ${SIGNALS} ${SIGNALS} 0 0`);
    expect(tracerOf(it.pid)).toBe(0);
  });

  test("leaves the signal mask as it was", async () => {
    const it = await startReady(["storm", "ppoll", "0"]);
    const before = blockedOf(it.pid);
    for (let call = 0; call < 50; call += 1) expect(makeUffd(it.pid).made).toBe(0);
    // Inside ppoll the mask is the call's own; both are what the target asked for.
    expect(["0000000000000000", "0000008000000000"]).toContain(before);
    expect(["0000000000000000", "0000008000000000"]).toContain(blockedOf(it.pid));
  });
});

describe("remoteSyscall on a target that sleeps", () => {
  test.each([
    ["nanosleep", "sleep 0 0"],
    ["clock", "sleep 0 0"],
    ["ppoll", "sleep 0 0"],
    ["futex", "sleep -1 110"],
  ])("%s: the sleep goes on and ends when it should", async (how, expected) => {
    const it = await startReady(["sleep", how, "700"]);
    await until(() => (stateOf(it.pid) === "S" ? true : null), 2000, "the sleep");
    const endMs = performance.now() + 400;
    let calls = 0;
    let borrowedMs = 0;
    for (; performance.now() < endMs && calls < 40; calls += 1) {
      const startMs = performance.now();
      expect(remote(it.pid, SYS_GETPID)).toEqual({ made: 0, result: it.pid });
      borrowedMs += performance.now() - startMs;
      await Bun.sleep(5);
    }
    expect(calls).toBeGreaterThan(5);
    const line = await it.line((text) => text.startsWith("sleep "));
    expect(line.slice(0, expected.length)).toBe(expected);
    const elapsedMs = Number(line.split(" ")[3]);
    expect(elapsedMs).toBeGreaterThanOrEqual(699);
    // ppoll alone counts what was left when it was interrupted: the pauses are added to it.
    expect(elapsedMs).toBeLessThan(1000 + (how === "ppoll" ? borrowedMs : 0));
  });

  test("a blocked read goes on and gets what comes later", async () => {
    const it = await startReady(["sleep", "read", "0"]);
    await until(() => (stateOf(it.pid) === "S" ? true : null), 2000, "the read");
    for (let call = 0; call < 20; call += 1) {
      expect(remote(it.pid, SYS_GETPID)).toEqual({ made: 0, result: it.pid });
    }
    it.say("x");
    expect(await it.line((text) => text.startsWith("sleep "))).toStartWith("sleep 1 0 ");
  });

  test("a static program has a vDSO too", async () => {
    const it = await startReady([], staticProgram());
    expect(remote(it.pid, SYS_GETPID)).toEqual({ made: 0, result: it.pid });
    expect(await it.line((text) => text.startsWith("sleep "))).toBe("sleep whole");
  });
});

describe("remoteSyscall's answers", () => {
  test("passes arguments on, and the call's own error back", async () => {
    const it = await startReady(["sleep", "read", "0"]);
    expect(remote(it.pid, SYS_USERFAULTFD, 0x80000000n)).toEqual({ made: 0, result: -EINVAL });
    expect(remote(it.pid, SYS_CLOSE, 999n)).toEqual({ made: 0, result: -9 });
  });

  test("the descriptor can be taken and is a userfaultfd of the target", async () => {
    const it = await startReady(["sleep", "read", "0"]);
    const { result } = makeUffd(it.pid);
    const pidfd = sys.pidfdOpen(it.pid, 0);
    const own = sys.pidfdGetfd(pidfd, result);
    expect(linkOf(process.pid, own)).toBe("anon_inode:[userfaultfd]");
    expect(sys.kcmpFile(process.pid, it.pid, own, result)).toBe(0);
    sys.close(own);
    sys.close(pidfd);
  });

  test("EBUSY: a stopped target stays stopped, and works after SIGCONT", async () => {
    const it = await startReady(["sleep", "read", "0"]);
    it.child.kill("SIGSTOP");
    await until(() => (stateOf(it.pid) === "T" ? true : null), 2000, "the stop");
    expect(remote(it.pid, SYS_GETPID).made).toBe(-EBUSY);
    expect(remote(it.pid, SYS_GETPID).made).toBe(-EBUSY);
    // Let go of, it runs for a moment inside the kernel on its way back into the stop (ptrace(2)).
    await until(() => (stateOf(it.pid) === "T" ? true : null), 2000, "the stop again");
    await Bun.sleep(20);
    expect(stateOf(it.pid)).toBe("T");
    it.child.kill("SIGCONT");
    await until(() => (stateOf(it.pid) === "S" ? true : null), 2000, "the continuation");
    expect(remote(it.pid, SYS_GETPID)).toEqual({ made: 0, result: it.pid });
    it.say("x");
    expect(await it.line((text) => text.startsWith("sleep "))).toStartWith("sleep 1 0 ");
  });

  test("ESRCH: no such process", async () => {
    const it = await startReady(["sleep", "read", "0"]);
    it.child.kill("SIGKILL");
    await it.child.exited;
    expect(remote(it.pid, SYS_GETPID).made).toBe(-ESRCH);
  });

  test("a target killed meanwhile: each call is made or refused, and none hangs", async () => {
    const answers = new Set<number>();
    for (let round = 0; round < 10; round += 1) {
      const it = await startReady(["storm", "busy", "2"]);
      const pidfd = sys.pidfdOpen(it.pid, 0);
      const killer = Bun.spawn(["sh", "-c", `sleep 0.0${round}; kill -9 ${it.pid}`]);
      let made = 0;
      const endMs = performance.now() + 5000;
      while (made === 0 && performance.now() < endMs) ({ made } = remote(it.pid, SYS_GETPID));
      answers.add(made);
      await killer.exited;
      sys.close(pidfd);
      await it.kill();
      target = undefined;
    }
    // EPERM: a process that has ended but was not waited for cannot be seized.
    expect([...answers].filter((made) => made !== -ESRCH && made !== -EPERM)).toEqual([]);
  });

  test("EPERM: traced by somebody else", async () => {
    const it = await startReady(["sleep", "read", "0"]);
    const tracer = Bun.spawn([targetProgram(), "trace", String(it.pid)]);
    try {
      await until(() => (tracerOf(it.pid) !== 0 ? true : null), 5000, "the other tracer");
      expect(remote(it.pid, SYS_GETPID).made).toBe(-EPERM);
    } finally {
      tracer.kill("SIGKILL");
      await tracer.exited;
    }
    await until(() => (tracerOf(it.pid) === 0 ? true : null), 5000, "its end");
    expect(remote(it.pid, SYS_GETPID)).toEqual({ made: 0, result: it.pid });
  });

  test("EINVAL: no pid, no time", () => {
    expect(remote(0, SYS_GETPID).made).toBe(-EINVAL);
    const six = new BigUint64Array(6);
    expect(sys.remoteSyscall(1, SYS_GETPID, six, new BigInt64Array(1), 0)).toBe(-EINVAL);
  });

  test("leaves no thread behind", async () => {
    const it = await startReady(["sleep", "read", "0"]);
    const countThreads = (): number =>
      Number(/^Threads:\s+(\d+)/m.exec(readFileSync("/proc/self/status", "latin1"))?.[1]);
    remote(it.pid, SYS_GETPID);
    const before = countThreads();
    for (let call = 0; call < 50; call += 1) remote(it.pid, SYS_GETPID);
    expect(countThreads()).toBeLessThanOrEqual(before);
  });
});
