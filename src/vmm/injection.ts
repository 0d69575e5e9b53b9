/**
 * A userfaultfd and helper tasks in a QEMU that runs already. What the preloaded library makes in a QEMU that fsl
 * starts (shim/preload.c) is made here by a thread that QEMU's main thread is borrowed for to clone:
 *
 *   1. QEMU is handed a socket by QMP's `getfd`. That it arrives in that process proves that it is the one which
 *      answers. It maps memory (a borrowed system call, shim/remote.c)
 *   2. the library's read-only segments are written there, and made executable
 *   3. clone(2) by the system call instruction at the library's entry point makes a thread, which goes on behind
 *      it: has a task of its own make all that is wanted and send it over the socket, waits for that, and ends
 *   4. the helpers are init's when that task has ended; when they end they unmap their staging memory. The code
 *      and some stacks stay in QEMU, 0.3 MiB of address space
 *
 * All of it before the guest runs: a fsl that is killed while it borrows the thread takes QEMU along.
 *
 * Not where QEMU has a seccomp filter (`-sandbox on`, as libvirt's has): a clone(2) that it does not expect
 * kills it.
 */
import { readFileSync, readlinkSync } from "node:fs";
import { alignDown, alignUp } from "../pages.ts";
import {
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  POLLIN,
  PROT_EXEC,
  PROT_READ,
  PROT_WRITE,
  SOCK_SEQPACKET,
  SYS_CLONE,
  SYS_MMAP,
  SYS_MPROTECT,
  SYS_MUNMAP,
} from "../sys/abi.ts";
import { isEndedTask } from "../sys/helper-task.ts";
import { HOST_PAGE_LENGTH } from "../sys/host-pages.ts";
import * as native from "../sys/native.ts";
import { preloadBytes } from "../sys/preload.ts";
import { readImage } from "./elf.ts";
import { descriptorsOf, linkOf } from "./process-links.ts";
import {
  receivePreloaded,
  remoteCall,
  type TakenUserfaultfd,
  type UserfaultfdRequest,
} from "./userfaultfd.ts";

/** Name of the socket, among the `getfd` descriptors, while it is needed. */
export const SOCKET_NAME = "fsl-helpers";
/**
 * CLONE_VM, FS, SIGHAND, THREAD: one more of QEMU's threads, but for its descriptors: should it run late, the socket
 * still has its number.
 */
const THREAD = 0x1_0b00;
/** Of the thread and its task, half each. */
const STACK_LENGTH = 64 * 1024;
/** How long they may take to send, which takes a millisecond, ms. */
const PATIENCE_MS = 1_000;
const WAIT_MS = 5;

/**
 * @param helpers how many, 1 to 9 @param slots chunks of staging memory that each has
 * @returns null where it cannot be done, or the process is not the one that answers, and QEMU is as it was
 */
export async function injectHelpers(
  request: UserfaultfdRequest,
  helpers: number,
  slots: number,
): Promise<TakenUserfaultfd | null> {
  if (!mayInject(request.pid)) return null;
  const pair = new Int32Array(2);
  if (native.socketpair(SOCK_SEQPACKET, pair) < 0) return null;
  const [own = -1, theirs = -1] = pair;
  try {
    await request.qmp.request("getfd", { fdname: SOCKET_NAME }, { fd: theirs });
    try {
      // A socket's link text has its inode.
      const [remote] = descriptorsOf(request.pid, linkOf(`/proc/self/fd/${theirs}`));
      return remote === undefined ? null : await inject(request, own, remote, helpers, slots);
    } finally {
      request.qmp.execute("closefd", { fdname: SOCKET_NAME }).catch(() => {});
    }
  } finally {
    native.close(own);
    native.close(theirs);
  }
}

/** No filter that kills, and pids mean the same here and there. */
export function mayInject(pid: number): boolean {
  try {
    const status = readFileSync(`/proc/${pid}/status`, "latin1");
    const namespaces = [pid, "self"].map((one) => readlinkSync(`/proc/${one}/ns/pid`));
    return /^Seccomp:\t0$/m.test(status) && namespaces[0] === namespaces[1];
  } catch {
    return false;
  }
}

async function inject(
  request: UserfaultfdRequest,
  socket: number,
  remoteSocket: number,
  helpers: number,
  slots: number,
): Promise<TakenUserfaultfd | null> {
  const { pid } = request;
  const { bytes, entry } = readImage(preloadBytes());
  const codeLength = alignUp(bytes.length, HOST_PAGE_LENGTH);
  const length = codeLength + STACK_LENGTH;
  const access = PROT_READ | PROT_WRITE;
  const startAddr = remoteCall(request, SYS_MMAP, [
    0,
    length,
    access,
    MAP_PRIVATE | MAP_ANONYMOUS,
    -1,
    0,
  ]);
  if (startAddr < 0) return null;
  const stackAddr = alignDown(startAddr + length - FRAME_LENGTH, FRAME_LENGTH);
  const isReady =
    write(pid, startAddr, bytes) &&
    write(pid, stackAddr, frameOf(stackAddr, remoteSocket, helpers, slots)) &&
    remoteCall(request, SYS_MPROTECT, [startAddr, codeLength, PROT_READ | PROT_EXEC]) === 0;
  const thread = isReady
    ? remoteCall(request, SYS_CLONE, [THREAD, stackAddr, 0, 0, 0, 0], startAddr + entry)
    : -1;
  if (thread < 0) {
    remoteCall(request, SYS_MUNMAP, [startAddr, length]);
    return null;
  }
  const taken = (await isHeard(socket, thread)) ? receivePreloaded(socket, pid) : null;
  return taken === null ? null : { ...taken, way: "ptrace" };
}

/** Two words that the thread pops, then struct injected (shim/preload.c). */
const FRAME_LENGTH = 32;

function frameOf(addr: number, socket: number, helpers: number, slots: number): Uint8Array {
  const frame = new Uint8Array(FRAME_LENGTH);
  const view = new DataView(frame.buffer);
  view.setBigUint64(0, BigInt(addr + 16), true);
  view.setInt32(16, socket, true);
  view.setInt32(20, helpers, true);
  view.setInt32(24, slots, true);
  view.setInt32(28, STACK_LENGTH / 2, true);
  return frame;
}

function write(pid: number, addr: number, bytes: Uint8Array): boolean {
  return native.processVmWritev(pid, addr, native.ptrOf(bytes), bytes.length) === bytes.length;
}

/** A thread that has ended without a word was not allowed one. */
async function isHeard(socket: number, thread: number): Promise<boolean> {
  const revents = new Int32Array(1);
  const endMs = performance.now() + PATIENCE_MS;
  while (performance.now() < endMs) {
    const isOver = isEndedTask(thread);
    if (native.poll(Int32Array.of(socket), revents, 1, POLLIN, isOver ? 0 : WAIT_MS) > 0)
      return true;
    if (isOver) return false;
    await new Promise<void>((resolve) => setImmediate(resolve));
  }
  return false;
}
