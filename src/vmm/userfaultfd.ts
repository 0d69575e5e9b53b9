/**
 * A userfaultfd of QEMU's address space. Only a thread of that process can make one, so either the
 * preloaded library made it before QEMU's main() and sent it, or QEMU's main thread is borrowed by
 * ptrace for one system call, or for the few that run the same code (injection.ts).
 *
 * A user other than root may not be allowed userfaultfd(2) (vm.unprivileged_userfaultfd). Then fsl
 * opens /dev/userfaultfd itself, hands it to QEMU, and the borrowed thread makes the userfaultfd
 * from that.
 *
 * Never UFFD_USER_MODE_ONLY: device emulation reads guest memory in system calls, which would get
 * EFAULT.
 */
import { readdirSync, readFileSync } from "node:fs";
import { FslError } from "../errors.ts";
import {
  EACCES,
  ENOSYS,
  EPERM,
  MSG_DONTWAIT,
  O_CLOEXEC,
  O_NONBLOCK,
  O_RDWR,
  SYS_CLOSE,
  SYS_IOCTL,
  SYS_USERFAULTFD,
  USERFAULTFD_IOC_NEW,
} from "../sys/abi.ts";
import { grantDevice } from "../sys/device-access.ts";
import { type HelperRecord, reapHelper } from "../sys/helper-task.ts";
import * as native from "../sys/native.ts";
import {
  PRELOAD_DESCRIPTORS_MAX,
  PRELOAD_MESSAGE_LENGTH_MAX,
  parsePreloadMessage,
} from "./preload-protocol.ts";
import { linkOf } from "./process-links.ts";
import type { QmpClient } from "./qmp.ts";

export type UserfaultfdWay = "preload" | "ptrace" | "device";

export interface UserfaultfdRequest {
  readonly pid: number;
  readonly pidfd: number;
  readonly qmp: QmpClient;
  /** For messages. */
  readonly description: string;
}

/** fsl's own end of a userfaultfd that lives in QEMU. */
export interface TakenUserfaultfd {
  /** Owned by the caller. */
  readonly fd: number;
  readonly way: UserfaultfdWay;
  /** Its number in QEMU, when fsl made it there and may close it there. */
  readonly remoteFd: number | null;
  /** Helper tasks that came with it. Owned by the caller. */
  readonly helpers: readonly HelperRecord[];
}

/**
 * How long QEMU's main thread may take to come to a stop; it does so in microseconds unless the
 * host is swapping.
 */
const REMOTE_TIMEOUT_MS = 5_000;
/** Descriptors of one process that are looked through for the one that was handed over. */
const DESCRIPTORS_MAX = 65_536;
const DEVICE_PATH = "/dev/userfaultfd";
/** Name of the device, among the `getfd` descriptors, while it is needed. */
export const DEVICE_NAME = "fsl-uffd-device";
const USERFAULTFD_LINK = "anon_inode:[userfaultfd]";

/**
 * What the preloaded library sent, if it has by now. It runs before QEMU's main(), so once QEMU has
 * answered anything, its message is there or never will be: nothing waits here.
 * @param socket fsl's end of the socket that QEMU inherited
 * @param pid who must have made it: another program's userfaultfd (of a shell around QEMU, say) is
 * of no use
 * @returns null when there is no usable userfaultfd; of whom it is `isOfProcess` says
 */
export function receivePreloaded(socket: number, pid: number): TakenUserfaultfd | null {
  const bytes = Buffer.alloc(PRELOAD_MESSAGE_LENGTH_MAX);
  const buffer = new Int32Array(PRELOAD_DESCRIPTORS_MAX);
  const out = new Int32Array(2);
  const received = native.recv(
    socket,
    bytes,
    bytes.length,
    buffer,
    buffer.length,
    out,
    MSG_DONTWAIT,
  );
  const fds = received < 0 ? [] : [...buffer.subarray(0, out[0])];
  const fd = fds[0] ?? -1;
  const message = fd < 0 ? null : parsePreloadMessage(bytes.subarray(0, received), fds);
  if (message?.pid === pid && isUserfaultfd(fd)) {
    return { fd, way: "preload", remoteFd: null, helpers: message.helpers };
  }
  for (const each of fds) native.close(each);
  // Their sockets are among those; they are children of this process all the same.
  for (const helper of message?.helpers ?? []) void reapHelper(helper.pid);
  return null;
}

/**
 * A program that runs QEMU by exec(2), as taskset does, has QEMU's pid, but its memory is gone: but for
 * its helpers, if it made any.
 */
export function isOfProcess({ helpers }: TakenUserfaultfd, pid: number): boolean {
  return helpers.every((helper) => native.kcmpVm(pid, helper.pid) <= 0);
}

/**
 * Makes a userfaultfd in QEMU by borrowing its main thread.
 * @param allowed `ptrace`: userfaultfd(2) first, the device when that is refused; `device`: the
 * device at once
 * @throws FslError HOST_UNSUPPORTED when it is not permitted, TARGET_LOST when QEMU is gone
 */
export async function makeUserfaultfd(
  request: UserfaultfdRequest,
  allowed: "ptrace" | "device" = "ptrace",
): Promise<TakenUserfaultfd> {
  if (allowed === "ptrace") {
    const result = remoteCall(request, SYS_USERFAULTFD, [O_CLOEXEC | O_NONBLOCK]);
    if (result >= 0) return fetchUserfaultfd(request, result, "ptrace");
    if (![-EPERM, -EACCES, -ENOSYS].includes(result)) throw refused(request, "userfaultfd", result);
  }
  return makeFromDevice(request);
}

/**
 * Closes a descriptor inside QEMU, one that fsl made there. Errors do not matter: it is only
 * tidying up.
 */
export function closeRemote(request: UserfaultfdRequest, remoteFd: number): void {
  const args = remoteArguments([remoteFd]);
  native.remoteSyscall(request.pid, SYS_CLOSE, args, new BigInt64Array(1), REMOTE_TIMEOUT_MS);
}

async function makeFromDevice(request: UserfaultfdRequest): Promise<TakenUserfaultfd> {
  const device = native.open(DEVICE_PATH, O_RDWR | O_CLOEXEC, 0);
  if (device < 0) {
    throw new FslError(
      "HOST_UNSUPPORTED",
      `userfaultfd: ${request.description} may not make one, and ${DEVICE_PATH} cannot be opened ` +
        `(${native.errnoName(device)}); run: ${grantDevice(DEVICE_PATH)}`,
      { errno: native.errnoName(device) },
    );
  }
  try {
    await request.qmp.request("getfd", { fdname: DEVICE_NAME }, { fd: device });
    try {
      const remoteDevice = findRemoteDescriptor(request, device);
      const result = remoteCall(request, SYS_IOCTL, [
        remoteDevice,
        USERFAULTFD_IOC_NEW,
        O_CLOEXEC | O_NONBLOCK,
      ]);
      if (result < 0) throw refused(request, "ioctl USERFAULTFD_IOC_NEW", result);
      return fetchUserfaultfd(request, result, "device");
    } finally {
      await request.qmp.execute("closefd", { fdname: DEVICE_NAME });
    }
  } finally {
    native.close(device);
  }
}

/** The number that a descriptor of fsl's has in QEMU after `getfd`, which does not tell. */
function findRemoteDescriptor(request: UserfaultfdRequest, fd: number): number {
  const directory = `/proc/${request.pid}/fd`;
  const numbers = readdirSync(directory).slice(0, DESCRIPTORS_MAX).map(Number);
  const candidates = numbers.filter((number) => linkOf(`${directory}/${number}`) === DEVICE_PATH);
  const compared = candidates.map((number) =>
    native.kcmpFile(process.pid, request.pid, fd, number),
  );
  const same = candidates[compared.indexOf(0)];
  if (same !== undefined) return same;
  const failed = compared.find((result) => result < 0);
  if (failed !== undefined) throw refused(request, "kcmp", failed);
  throw new FslError(
    "TARGET_LOST",
    `userfaultfd: ${DEVICE_PATH} was handed to ${request.description}, but is not among its descriptors`,
    { candidates: candidates.length },
  );
}

function fetchUserfaultfd(
  request: UserfaultfdRequest,
  remoteFd: number,
  way: UserfaultfdWay,
): TakenUserfaultfd {
  const fd = native.pidfdGetfd(request.pidfd, remoteFd);
  if (fd < 0) {
    closeRemote(request, remoteFd);
    throw refused(request, "pidfd_getfd", fd);
  }
  // A borrowed thread that had other things to do once returned a system call's number as a
  // descriptor.
  if (isUserfaultfd(fd)) return { fd, way, remoteFd, helpers: [] };
  const found = linkOf(`/proc/self/fd/${fd}`);
  native.close(fd);
  throw new FslError(
    "TARGET_LOST",
    `userfaultfd: descriptor ${remoteFd} of ${request.description}: expected ${USERFAULTFD_LINK}, found ${found}`,
    { remoteFd, found },
  );
}

/**
 * @param at address of the system call instruction in QEMU; 0 = any
 * @returns what the call returned in QEMU: `>= 0` or `-errno`
 * @throws FslError when it could not be made
 */
export function remoteCall(
  request: UserfaultfdRequest,
  number: number,
  args: readonly number[],
  at = 0,
): number {
  const result = new BigInt64Array(1);
  const made = native.remoteSyscall(
    request.pid,
    number,
    remoteArguments(args),
    result,
    REMOTE_TIMEOUT_MS,
    at,
  );
  if (made < 0) throw refused(request, "ptrace", made);
  return Number(result[0] ?? 0n);
}

function remoteArguments(args: readonly number[]): BigUint64Array {
  const result = new BigUint64Array(6);
  args.forEach((value, index) => {
    result[index] = BigInt(value);
  });
  return result;
}

function isUserfaultfd(fd: number): boolean {
  return linkOf(`/proc/self/fd/${fd}`) === USERFAULTFD_LINK;
}

function refused(request: UserfaultfdRequest, call: string, result: number): FslError {
  const errno = native.errnoName(result);
  const isPermission = result === -EPERM || result === -EACCES;
  const tracer = call === "ptrace" ? tracerOf(request.pid) : 0;
  const permitted = "run fsl as root, or as QEMU's user with kernel.yama.ptrace_scope=0";
  const traced = `process ${tracer} traces it already (as gdb and strace do); let that end first`;
  const hint = isPermission ? `; ${tracer > 0 ? traced : permitted}` : "";
  return new FslError(
    errno === "ESRCH" ? "TARGET_LOST" : "HOST_UNSUPPORTED",
    `userfaultfd: ${call} in ${request.description} failed (${errno})${hint}`,
    { call, errno, pid: request.pid },
  );
}

/** Who traces a process; 0 when nobody does, or it cannot be told. */
function tracerOf(pid: number): number {
  try {
    const status = readFileSync(`/proc/${pid}/status`, "latin1");
    return Number(/^TracerPid:\s*(\d+)$/m.exec(status)?.[1] ?? 0);
  } catch {
    return 0;
  }
}
