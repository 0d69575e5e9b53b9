import { describe, expect, test } from "bun:test";
import {
  checkHost,
  hasCapability,
  type HostProbe,
  type HostProblem,
  judgeHost,
} from "../../src/uffd/support.ts";

/** A host on which everything works. */
const GOOD: HostProbe = {
  kernelRelease: "6.12.1",
  arch: "x64",
  shim: null,
  userfaultfdSyscall: null,
  userfaultfdDevice: null,
  features: ["EVENT_REMOVE"],
  unprivilegedUserfaultfd: 0,
  effectiveUid: 1000,
  userName: "ann",
  capSysPtrace: false,
  ptraceScope: 0,
  kvm: null,
  cpuVirtualizes: true,
  hugePages: [{ pageSize: 2097152, total: 8, free: 3 }],
  memfd: null,
  pidfdGetfd: null,
  ptrace: null,
};

function problemsWith(change: Partial<HostProbe>): readonly HostProblem[] {
  return judgeHost({ ...GOOD, ...change }).problems;
}

describe("support.judgeHost", () => {
  test("finds nothing wrong with a good host", () => {
    const host = judgeHost(GOOD);
    expect(host.problems).toEqual([]);
    expect([host.works, host.canAttach]).toEqual([true, true]);
  });

  test("one way to a userfaultfd is enough", () => {
    expect(problemsWith({ userfaultfdSyscall: "EPERM" })).toEqual([]);
    expect(problemsWith({ userfaultfdDevice: "ENOENT" })).toEqual([]);
  });

  test("a device that may not be opened: setfacl, with the user's name", () => {
    const host = judgeHost({ ...GOOD, userfaultfdSyscall: "EPERM", userfaultfdDevice: "EACCES" });
    expect(host.works).toBe(false);
    expect(host.problems).toEqual([
      {
        problem: "userfaultfd(2) gives EPERM, /dev/userfaultfd gives EACCES",
        fix: "setfacl -m u:ann:rw /dev/userfaultfd # as root; setfacl is in the package acl",
        blocking: true,
      },
    ]);
  });

  test.each([
    ["no device (before Linux 6.1)", "EPERM", {}, "sysctl -w vm.unprivileged_userfaultfd=1"],
    ["not in the kernel", "ENOSYS", {}, "boot a kernel that has CONFIG_USERFAULTFD=y"],
    ["root in a container", "EPERM", { effectiveUid: 0 }, "docker run --device"],
    ["allowed, yet refused", "EPERM", { unprivilegedUserfaultfd: 1 }, "docker run --device"],
  ])("%s", (_, userfaultfdSyscall, change, fix) => {
    const refused = { userfaultfdSyscall, userfaultfdDevice: "ENOENT" };
    expect(problemsWith({ ...refused, ...change })[0]?.fix).toStartWith(fix);
  });

  test("a shim that cannot be loaded hides everything else", () => {
    const host = judgeHost({ ...GOOD, shim: "shim: no", userfaultfdSyscall: "unknown" });
    expect(host.works).toBe(false);
    expect(host.problems).toEqual([{ problem: "shim: no", fix: "npm run build", blocking: true }]);
  });

  test.each([
    [1, "sysctl -w kernel.yama.ptrace_scope=0"],
    [3, "set kernel.yama.ptrace_scope=0 in /etc/sysctl.d and restart"],
  ])("ptrace_scope %p: loading works, attaching does not", (ptraceScope, fix) => {
    const host = judgeHost({ ...GOOD, ptraceScope });
    expect([host.works, host.canAttach]).toEqual([true, false]);
    expect(host.problems[0]?.fix).toStartWith(fix);
    expect(host.problems[0]?.blocking).toBe(false);
  });

  test("CAP_SYS_PTRACE overrides ptrace_scope", () => {
    const host = judgeHost({ ...GOOD, ptraceScope: 2, capSysPtrace: true });
    expect(host.canAttach).toBe(true);
    expect(host.problems).toEqual([]);
  });

  test("no pidfd_getfd: no attaching", () => {
    const host = judgeHost({ ...GOOD, pidfdGetfd: "ENOSYS" });
    expect([host.works, host.canAttach]).toEqual([true, false]);
  });

  test("no ptrace, as in many containers: no attaching", () => {
    const host = judgeHost({ ...GOOD, ptrace: "EPERM" });
    expect([host.works, host.canAttach]).toEqual([true, false]);
    expect(host.problems[0]?.problem).toStartWith("ptrace gives EPERM");
  });

  test("KVM that may not be used is a problem, a processor without it is a fact", () => {
    expect(problemsWith({ kvm: "EACCES" })[0]?.fix).toStartWith("setfacl -m u:ann:rw /dev/kvm #");
    expect(problemsWith({ kvm: "ENOENT", cpuVirtualizes: false })).toEqual([]);
  });

  test("facts say what was found", () => {
    const { facts } = judgeHost({ ...GOOD, userfaultfdSyscall: "EPERM" });
    expect(facts.find(({ name }) => name === "userfaultfd(2)")?.value).toBe("no (EPERM)");
    expect(facts.find(({ name }) => name === "huge pages")?.value).toBe("2048 KiB: 3 of 8 free");
  });
});

describe("support.hasCapability", () => {
  const STATUS = "Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t0000000000080000\n";

  test("reads bit 19 of CapEff, not of CapPrm", () => {
    expect(hasCapability(STATUS, 19)).toBe(true);
    expect(hasCapability(STATUS, 18)).toBe(false);
    expect(hasCapability(STATUS, 20)).toBe(false);
  });

  test("reads bits above 32", () => {
    expect(hasCapability("CapEff:\t000001fffeffffff\n", 40)).toBe(true);
  });

  test("is false without the line", () => {
    expect(hasCapability("", 19)).toBe(false);
  });
});

describe("support.checkHost", () => {
  test("does not throw, whatever this host is like", () => {
    const host = checkHost();
    expect(host.shim).toBeNull();
    expect(host.facts.length).toBeGreaterThan(5);
  });
});
