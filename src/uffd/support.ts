/**
 * What this host can do for fsl, and for each thing that is missing the exact command that mends
 * it. Looks and changes nothing. `probeHost` asks the kernel, `judgeHost` is a pure function of
 * what it found.
 */
import { readdirSync, readFileSync } from "node:fs";
import {
  CAP_SYS_PTRACE,
  ENOEXEC,
  EPERM,
  MFD_CLOEXEC,
  O_CLOEXEC,
  O_NONBLOCK,
  O_RDWR,
  SYS_GETPID,
  UFFD_FEATURES,
  type UffdFeature,
} from "../sys/abi.ts";
import { grantDevice, userName } from "../sys/device-access.ts";
import * as sys from "../sys/native.ts";
import { openByDevice } from "./uffd.ts";

/** A thing tried: null when it works, else the name of the errno. */
export type Refusal = string | null;

/** Free and reserved huge pages of one size. */
export interface HugePages {
  readonly pageSize: number;
  readonly total: number;
  readonly free: number;
}

/** What was found, without a judgement. */
export interface HostProbe {
  readonly kernelRelease: string;
  readonly arch: string;
  /**
   * Why the shim cannot be loaded; null when it can. Without it everything below is unknown
   * ("unknown").
   */
  readonly shim: string | null;
  readonly userfaultfdSyscall: Refusal;
  readonly userfaultfdDevice: Refusal;
  /** Features of userfaultfd that the kernel knows; empty when none could be made. */
  readonly features: readonly UffdFeature[];
  /** vm.unprivileged_userfaultfd; null when there is no such setting. */
  readonly unprivilegedUserfaultfd: number | null;
  readonly effectiveUid: number;
  /** Its number when it has no name. */
  readonly userName: string;
  readonly capSysPtrace: boolean;
  /** kernel.yama.ptrace_scope; null without Yama. */
  readonly ptraceScope: number | null;
  readonly kvm: Refusal;
  /** Whether the processor says that it can virtualize (vmx or svm; on arm64 always). */
  readonly cpuVirtualizes: boolean;
  readonly hugePages: readonly HugePages[];
  readonly memfd: Refusal;
  readonly pidfdGetfd: Refusal;
  /** Of a child, which Yama always allows. */
  readonly ptrace: Refusal;
}

export interface HostProblem {
  readonly problem: string;
  /** A command, or what to do where no command helps. */
  readonly fix: string;
  /** True when `fsl load` cannot work at all because of it. */
  readonly blocking: boolean;
}

/** One line of the table that a person sees. */
export interface HostFact {
  readonly name: string;
  readonly value: string;
}

export interface HostSupport extends HostProbe {
  /** `fsl load` can start a QEMU and load into it. */
  readonly works: boolean;
  /** `fsl load --qmp` can reach a QEMU of the same user that somebody else started. */
  readonly canAttach: boolean;
  readonly facts: readonly HostFact[];
  readonly problems: readonly HostProblem[];
}

/** Looks at this host. Never throws. */
export function checkHost(): HostSupport {
  return judgeHost(probeHost());
}

const UNKNOWN = "unknown";
const CANNOT_ATTACH = "fsl cannot reach a QEMU that it did not start";

function probeHost(): HostProbe {
  const shim = shimProblem();
  const ask = (question: () => number): Refusal => (shim === null ? refusal(question()) : UNKNOWN);
  const flags = O_CLOEXEC | O_NONBLOCK;
  return {
    kernelRelease: readText("/proc/sys/kernel/osrelease") ?? UNKNOWN,
    arch: process.arch,
    shim,
    userfaultfdSyscall: ask(() => closed(sys.userfaultfd(flags))),
    userfaultfdDevice: ask(() => closed(openByDevice(flags))),
    features: shim === null ? knownFeatures(flags) : [],
    unprivilegedUserfaultfd: readNumber("/proc/sys/vm/unprivileged_userfaultfd"),
    effectiveUid: process.geteuid?.() ?? -1,
    userName: userName(),
    capSysPtrace: hasCapability(readText("/proc/self/status") ?? "", CAP_SYS_PTRACE),
    ptraceScope: readNumber("/proc/sys/kernel/yama/ptrace_scope"),
    kvm: ask(() => closed(sys.open("/dev/kvm", O_RDWR | O_CLOEXEC, 0))),
    cpuVirtualizes:
      process.arch === "arm64" || /\b(vmx|svm)\b/.test(readText("/proc/cpuinfo") ?? ""),
    hugePages: readHugePages(),
    memfd: ask(() => closed(sys.memfdCreate("fsl-check", MFD_CLOEXEC))),
    pidfdGetfd: ask(tryPidfdGetfd),
    ptrace: shim === null ? tryPtrace() : UNKNOWN,
  };
}

/** What the findings mean. Pure. */
export function judgeHost(probe: HostProbe): HostSupport {
  const problems = findProblems(probe);
  const works = !problems.some(({ blocking }) => blocking);
  const mayTrace = probe.capSysPtrace || (probe.ptraceScope ?? 0) === 0;
  const isTraceable = probe.ptrace === null || probe.ptrace === UNKNOWN;
  const canAttach = works && mayTrace && isTraceable && probe.pidfdGetfd === null;
  return { ...probe, works, canAttach, facts: describe(probe), problems };
}

/** True when bit `capability` of CapEff is set in the text of /proc/PID/status. */
export function hasCapability(status: string, capability: number): boolean {
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec(status)?.[1];
  return effective !== undefined && (BigInt(`0x${effective}`) & (1n << BigInt(capability))) !== 0n;
}

// ---- asking ----

function shimProblem(): string | null {
  try {
    sys.load();
    return null;
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}

function refusal(result: number): Refusal {
  return result < 0 ? sys.errnoName(result) : null;
}

/** Closes what was opened only to see whether it can be. */
function closed(fd: number): number {
  if (fd >= 0) sys.close(fd);
  return fd;
}

/** UFFDIO_API with no feature asked for answers with all that there are. */
function knownFeatures(flags: number): UffdFeature[] {
  const bySyscall = sys.userfaultfd(flags);
  const fd = bySyscall >= 0 ? bySyscall : openByDevice(flags);
  if (fd < 0) return [];
  const out = new BigUint64Array(2);
  const result = sys.uffdApi(fd, 0, out);
  sys.close(fd);
  if (result < 0) return [];
  const bits = Number(out[0]);
  const names = Object.keys(UFFD_FEATURES) as UffdFeature[];
  return names.filter((name) => (bits & UFFD_FEATURES[name]) !== 0);
}

/** Duplicates a descriptor of this very process, for which no privilege is needed. */
function tryPidfdGetfd(): number {
  const pidfd = sys.pidfdOpen(process.pid, 0);
  if (pidfd < 0) return pidfd;
  const result = closed(sys.pidfdGetfd(pidfd, pidfd));
  sys.close(pidfd);
  return result;
}

const PTRACE_TIMEOUT_MS = 1000;
/** How often and how long apart a child that has just been started is tried. */
const EXEC_TRIES = 100;
const EXEC_PAUSE_MS = 1;

/** A child makes a system call for us. Containers often forbid ptrace altogether. */
function tryPtrace(): Refusal {
  let child: Bun.Subprocess;
  try {
    child = Bun.spawn(["/bin/sleep", "60"], { stdio: ["ignore", "ignore", "ignore"] });
  } catch {
    return UNKNOWN;
  }
  try {
    const [args, result] = [new BigUint64Array(6), new BigInt64Array(1)];
    const call = (): number =>
      sys.remoteSyscall(child.pid, SYS_GETPID, args, result, PTRACE_TIMEOUT_MS);
    let refused = call();
    // It may be in the middle of execve(2): no vDSO can be found in it then.
    for (let tries = 0; refused === -ENOEXEC && tries < EXEC_TRIES; tries += 1) {
      Bun.sleepSync(EXEC_PAUSE_MS);
      refused = call();
    }
    return refusal(refused === 0 && Number(result[0]) !== child.pid ? -EPERM : refused);
  } finally {
    child.kill("SIGKILL");
  }
}

function readText(path: string): string | null {
  try {
    return readFileSync(path, "latin1").trim();
  } catch {
    return null;
  }
}

function readNumber(path: string): number | null {
  const text = readText(path);
  return text === null || !/^-?\d+$/.test(text) ? null : Number(text);
}

function readHugePages(): HugePages[] {
  const folder = "/sys/kernel/mm/hugepages";
  let names: string[];
  try {
    names = readdirSync(folder);
  } catch {
    return [];
  }
  return names
    .map((name) => ({
      pageSize: Number(/(\d+)kB$/.exec(name)?.[1] ?? 0) * 1024,
      total: readNumber(`${folder}/${name}/nr_hugepages`) ?? 0,
      free: readNumber(`${folder}/${name}/free_hugepages`) ?? 0,
    }))
    .toSorted((a, b) => a.pageSize - b.pageSize);
}

// ---- judging ----

function findProblems(probe: HostProbe): HostProblem[] {
  if (probe.shim !== null) {
    return [{ problem: probe.shim, fix: "npm run build", blocking: true }];
  }
  return [
    ...userfaultfdProblems(probe),
    ...memfdProblems(probe),
    ...tracingProblems(probe),
    ...kvmProblems(probe),
  ];
}

function userfaultfdProblems(probe: HostProbe): HostProblem[] {
  const { userfaultfdSyscall: bySyscall, userfaultfdDevice: byDevice } = probe;
  if (bySyscall === null || byDevice === null) return [];
  const problem = `userfaultfd(2) gives ${bySyscall}, /dev/userfaultfd gives ${byDevice}`;
  return [{ problem, fix: userfaultfdFix(probe), blocking: true }];
}

function userfaultfdFix(probe: HostProbe): string {
  const { userfaultfdSyscall: bySyscall, userfaultfdDevice: byDevice, userName } = probe;
  if (byDevice === "EACCES") return grantDevice("/dev/userfaultfd", userName);
  if (bySyscall === "ENOSYS") return "boot a kernel that has CONFIG_USERFAULTFD=y";
  // The capability would be enough: somebody filters the call, as container engines do.
  if (probe.capSysPtrace || probe.effectiveUid === 0 || probe.unprivilegedUserfaultfd === 1) {
    return "docker run --device /dev/userfaultfd --security-opt seccomp=unconfined …";
  }
  return "sysctl -w vm.unprivileged_userfaultfd=1 # as root";
}

function memfdProblems({ memfd }: HostProbe): HostProblem[] {
  if (memfd === null) return [];
  return [{ problem: `memfd_create gives ${memfd}`, fix: "Linux 3.17 or later", blocking: true }];
}

/** Not needed for a QEMU that fsl starts and that loads the preload library. */
function tracingProblems(probe: HostProbe): HostProblem[] {
  const { pidfdGetfd, ptrace, ptraceScope, capSysPtrace } = probe;
  const problems: HostProblem[] = [];
  if (ptrace !== null && ptrace !== UNKNOWN) {
    const problem = `ptrace gives ${ptrace}: ${CANNOT_ATTACH}`;
    const fix =
      "in a container: start it with ptrace allowed, e.g. docker run --cap-add SYS_PTRACE";
    problems.push({ problem, fix, blocking: false });
  }
  if (pidfdGetfd !== null) {
    const problem = `pidfd_getfd gives ${pidfdGetfd}: ${CANNOT_ATTACH}`;
    problems.push({ problem, fix: "Linux 5.6 or later", blocking: false });
  }
  if (ptraceScope !== null && ptraceScope > 0 && !capSysPtrace) {
    const problem = `kernel.yama.ptrace_scope is ${ptraceScope}: ${CANNOT_ATTACH}`;
    const fix =
      ptraceScope === 3
        ? "set kernel.yama.ptrace_scope=0 in /etc/sysctl.d and restart: 3 cannot be changed"
        : "sysctl -w kernel.yama.ptrace_scope=0 # as root";
    problems.push({ problem, fix, blocking: false });
  }
  return problems;
}

/** Guests run without KVM too, slowly. */
function kvmProblems({ kvm, cpuVirtualizes, arch, userName }: HostProbe): HostProblem[] {
  if (kvm === null || !cpuVirtualizes) return [];
  const problem = `/dev/kvm gives ${kvm}: guests run without KVM, slowly`;
  const load =
    arch === "arm64" ? "enable KVM in the kernel" : "modprobe -a kvm_intel kvm_amd # as root";
  const fix = kvm === "EACCES" ? grantDevice("/dev/kvm", userName) : load;
  return [{ problem, fix, blocking: false }];
}

function describe(probe: HostProbe): HostFact[] {
  const yes = (refused: Refusal): string => (refused === null ? "yes" : `no (${refused})`);
  const pages = probe.hugePages.map(
    ({ pageSize, total, free }) => `${pageSize / 1024} KiB: ${free} of ${total} free`,
  );
  const capability = probe.capSysPtrace ? "with CAP_SYS_PTRACE" : "without CAP_SYS_PTRACE";
  return [
    { name: "kernel", value: `${probe.kernelRelease} ${probe.arch}` },
    { name: "user", value: `uid ${probe.effectiveUid}, ${capability}` },
    { name: "shim", value: probe.shim === null ? "loads" : "cannot be loaded" },
    { name: "userfaultfd(2)", value: yes(probe.userfaultfdSyscall) },
    { name: "/dev/userfaultfd", value: yes(probe.userfaultfdDevice) },
    { name: "features", value: probe.features.join(" ") || "none" },
    { name: "vm.unprivileged_userfaultfd", value: String(probe.unprivilegedUserfaultfd ?? "-") },
    { name: "kernel.yama.ptrace_scope", value: String(probe.ptraceScope ?? "-") },
    { name: "ptrace", value: yes(probe.ptrace) },
    { name: "pidfd_getfd", value: yes(probe.pidfdGetfd) },
    { name: "memfd", value: yes(probe.memfd) },
    { name: "/dev/kvm", value: yes(probe.kvm) },
    { name: "huge pages", value: pages.join(", ") || "none" },
  ];
}
