/**
 * Where the threads of a load run and where their pages lie: set for real, read back from the kernel.
 * Each test changes this thread and puts it back.
 */
import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import {
  placeAs,
  setMemoryPolicy,
  takeAffinity,
  takeMemoryPolicy,
} from "../../src/load/placement.ts";
import { EINVAL, MPOL_BIND, MPOL_DEFAULT } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { until } from "../helpers/kernel-target.ts";
import { Rig } from "../helpers/load-serving.ts";

/** Any process at all. */
function startSleeper(): Bun.Subprocess {
  return Bun.spawn(["sleep", "60"]);
}

function bindTo(pid: number, cpu: number): void {
  const mask = new Uint8Array(128);
  mask[cpu >> 3] = 1 << (cpu & 7);
  expect(sys.schedSetaffinity(pid, mask, mask.length)).toBe(0);
}

function cpusOf(who: number | string): string {
  const status = readFileSync(`/proc/${who}/status`, "latin1");
  return /^Cpus_allowed_list:\t(.*)$/m.exec(status)?.[1] ?? "";
}

/** Of the first area, which is the program's own. */
function policyOf(who: number | string): string {
  const [line = ""] = readFileSync(`/proc/${who}/numa_maps`, "latin1").split("\n");
  return line.split(" ")[1] ?? "";
}

const ownMask = new Uint8Array(1024);
const OWN_CPUS = cpusOf("thread-self");
/** The last one: the kernel's own work is done by the first as a rule. */
const CPU = Number(OWN_CPUS.split(/[,-]/).at(-1));

let sleeper: Bun.Subprocess;
let maskLength = 0;
beforeEach(() => {
  maskLength = sys.schedGetaffinity(0, ownMask, ownMask.length);
  sleeper = startSleeper();
});
afterEach(async () => {
  sys.schedSetaffinity(0, ownMask, maskLength);
  setMemoryPolicy({ mode: MPOL_DEFAULT, nodes: [] });
  sleeper.kill("SIGKILL");
  await sleeper.exited;
});

describe("CPU affinity", () => {
  test("is the target's", () => {
    bindTo(sleeper.pid, CPU);
    takeAffinity(sleeper.pid);
    expect(cpusOf("thread-self")).toBe(String(CPU));
    const mask = new Uint8Array(128);
    expect(sys.schedGetaffinity(sys.gettid(), mask, mask.length)).toBeGreaterThan(0);
    expect(mask.findIndex((byte) => byte !== 0)).toBe(CPU >> 3);
  });

  test("is widened with the target's, too", () => {
    bindTo(0, CPU);
    takeAffinity(sleeper.pid);
    expect(cpusOf("thread-self")).toBe(OWN_CPUS);
  });

  test("stays as it is when the target has ended", async () => {
    bindTo(sleeper.pid, CPU);
    sleeper.kill("SIGKILL");
    await sleeper.exited;
    placeAs(sleeper.pid);
    takeMemoryPolicy(sleeper.pid);
    expect([cpusOf("thread-self"), policyOf("thread-self")]).toEqual([OWN_CPUS, "default"]);
  });
});

/** A process that was started with this policy, which is this thread's for the moment. */
async function restartSleeper(nodes: readonly number[]): Promise<void> {
  sleeper.kill("SIGKILL");
  await sleeper.exited;
  expect(setMemoryPolicy({ mode: MPOL_BIND, nodes })).toBe(0);
  sleeper = startSleeper();
  expect(setMemoryPolicy({ mode: MPOL_DEFAULT, nodes: [] })).toBe(0);
}

describe("memory policy", () => {
  test("is the target's", async () => {
    await restartSleeper([0]);
    expect([policyOf(sleeper.pid), policyOf("thread-self")]).toEqual(["bind:0", "default"]);
    takeMemoryPolicy(sleeper.pid);
    expect(policyOf(`self/task/${sys.gettid()}`)).toBe("bind:0");
  });

  test("is the default again when the target's is", () => {
    expect(setMemoryPolicy({ mode: MPOL_BIND, nodes: [0] })).toBe(0);
    takeMemoryPolicy(sleeper.pid);
    expect(policyOf("thread-self")).toBe("default");
  });

  test("is bound to the nodes of the target's cpuset when that is all there is", () => {
    takeMemoryPolicy(sleeper.pid, [0], [0, 1]);
    expect(policyOf("thread-self")).toBe("bind:0");
  });

  test("stays as it is when the same cpuset is all there is", () => {
    takeMemoryPolicy(sleeper.pid);
    expect(policyOf("thread-self")).toBe("default");
  });

  test("of nodes that we may not use is refused, and nothing comes of it", () => {
    expect(setMemoryPolicy({ mode: MPOL_BIND, nodes: [1023] })).toBe(-EINVAL);
    takeMemoryPolicy(sleeper.pid, [1023], [0]);
    expect(policyOf("thread-self")).toBe("default");
  });
});

test("placing costs well under a millisecond", () => {
  const times = Array.from({ length: 50 }, () => {
    const startNs = sys.clockNs();
    placeAs(sleeper.pid);
    takeMemoryPolicy(sleeper.pid);
    return sys.clockNs() - startNs;
  });
  expect(Math.min(...times)).toBeLessThan(500_000);
});

test("every Worker runs where the target does, and nobody else", async () => {
  const before = new Set(readdirSync("/proc/self/task"));
  const boundThreads = (): number => {
    return readdirSync("/proc/self/task").filter((tid) => {
      return !before.has(tid) && cpusOf(`self/task/${tid}`) === String(CPU);
    }).length;
  };
  await using rig = await Rig.start({
    pages: 4096,
    // So that they are still there to be looked at.
    eager: { workers: 2, bytesPerSecond: 2 ** 20 },
    beforeServing: (pid) => bindTo(pid, CPU),
  });
  // JavaScriptCore may start further threads from a Worker's.
  expect(boundThreads()).toBeGreaterThanOrEqual(1);
  const rest = rig.bringRest();
  await until(() => (boundThreads() >= 3 ? true : null), 10_000, "two eager Workers");
  expect(await rig.order("touch 2 random 1")).toEqual({ wrong: 0, first: 0, discards: 0 });
  expect(await rest).toBe(true);
  expect(cpusOf("thread-self")).toBe(OWN_CPUS);
});
