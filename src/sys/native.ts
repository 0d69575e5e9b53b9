/**
 * The one file that talks to C: loads the shim (shim/fsl_shim.h) at first use, compares its ABI
 * table with abi.ts, and gives each of its functions a typed TypeScript function of the same name.
 * Every function returns >= 0, or -errno; none throws, except when the shim itself cannot be loaded
 * (FslError HOST_UNSUPPORTED, at the first call).
 *
 * Addresses, lengths and file offsets are numbers (bytes, < 2^53); the shim takes them as doubles,
 * which costs 3 ns instead of 12 to 25 for pointers and bigints. Memory given as a typed array must
 * stay referenced for as long as C or the kernel may look at it: for these functions, until they
 * return.
 *
 * `FSL_TRACE_FFI=1` logs each call with its arguments, result and time to stderr.
 */
import { dlopen, FFIType, type Pointer, ptr, toArrayBuffer } from "bun:ffi";
import { existsSync, readFileSync, writeSync } from "node:fs";
import { FslError } from "../errors.ts";
import { ABI_TABLE, findAbiMismatch, MFD_CLOEXEC } from "./abi.ts";
import { ARCHITECTURE, shimBytes } from "./embedded.ts";
import { errnoText } from "./errno.ts";

export { errnoName, errnoText } from "./errno.ts";

const { i32, f64, ptr: pointer } = FFIType;

const SYMBOLS = {
  fsl_abi: { args: [pointer, i32], returns: i32 },
  fsl_userfaultfd: { args: [i32], returns: i32 },
  fsl_userfaultfd_dev: { args: [i32, i32], returns: i32 },
  fsl_uffd_api: { args: [i32, f64, pointer], returns: i32 },
  fsl_uffd_register: { args: [i32, f64, f64, i32, pointer], returns: i32 },
  fsl_uffd_unregister: { args: [i32, f64, f64], returns: i32 },
  fsl_uffd_copy: { args: [i32, f64, f64, f64, i32], returns: f64 },
  fsl_uffd_zeropage: { args: [i32, f64, f64, i32], returns: f64 },
  fsl_uffd_poison: { args: [i32, f64, f64, i32], returns: f64 },
  fsl_uffd_wake: { args: [i32, f64, f64], returns: i32 },
  fsl_open: { args: [pointer, i32, i32], returns: i32 },
  fsl_close: { args: [i32], returns: i32 },
  fsl_dup: { args: [i32, i32], returns: i32 },
  fsl_fcntl: { args: [i32, i32, f64], returns: i32 },
  fsl_ioctl: { args: [i32, f64, f64], returns: f64 },
  fsl_flock: { args: [i32, i32], returns: i32 },
  fsl_eventfd: { args: [i32, i32], returns: i32 },
  fsl_memfd_create: { args: [pointer, i32], returns: i32 },
  fsl_ftruncate: { args: [i32, f64], returns: i32 },
  fsl_fallocate: { args: [i32, i32, f64, f64], returns: i32 },
  fsl_fadvise: { args: [i32, f64, f64, i32], returns: i32 },
  fsl_lseek: { args: [i32, f64, i32], returns: f64 },
  fsl_read: { args: [i32, pointer, f64], returns: f64 },
  fsl_write: { args: [i32, pointer, f64], returns: f64 },
  fsl_pread: { args: [i32, f64, f64, f64], returns: f64 },
  fsl_pread_at_hand: { args: [i32, f64, f64, f64], returns: f64 },
  fsl_pwrite: { args: [i32, f64, f64, f64], returns: f64 },
  fsl_poll: { args: [pointer, pointer, i32, i32, i32], returns: i32 },
  fsl_socketpair: { args: [i32, pointer], returns: i32 },
  fsl_unix_listen: { args: [pointer, i32], returns: i32 },
  fsl_unix_connect: { args: [pointer], returns: i32 },
  fsl_unix_is_bound: { args: [pointer], returns: i32 },
  fsl_unix_accept: { args: [i32], returns: i32 },
  fsl_send: { args: [i32, pointer, f64, pointer, i32, i32], returns: f64 },
  fsl_recv: { args: [i32, pointer, f64, pointer, i32, pointer, i32], returns: f64 },
  fsl_peer_credentials: { args: [i32, pointer], returns: i32 },
  fsl_peer_pidfd: { args: [i32], returns: i32 },
  fsl_pidfd_open: { args: [i32, i32], returns: i32 },
  fsl_pidfd_getfd: { args: [i32, i32], returns: i32 },
  fsl_pidfd_send_signal: { args: [i32, i32], returns: i32 },
  fsl_kcmp_file: { args: [i32, i32, i32, i32], returns: i32 },
  fsl_kcmp_vm: { args: [i32, i32], returns: i32 },
  fsl_process_vm_readv: { args: [i32, f64, f64, f64], returns: f64 },
  fsl_process_vm_writev: { args: [i32, f64, f64, f64], returns: f64 },
  fsl_process_madvise: { args: [i32, f64, f64, i32], returns: f64 },
  fsl_gettid: { args: [], returns: i32 },
  fsl_setpriority: { args: [i32, i32], returns: i32 },
  fsl_sched_setscheduler: { args: [i32, i32], returns: i32 },
  fsl_sched_setaffinity: { args: [i32, pointer, f64], returns: i32 },
  fsl_sched_getaffinity: { args: [i32, pointer, f64], returns: i32 },
  fsl_set_mempolicy: { args: [i32, pointer, f64], returns: i32 },
  fsl_prlimit: { args: [i32, i32, pointer, pointer], returns: i32 },
  fsl_ignore_signal: { args: [i32], returns: i32 },
  fsl_waitpid: { args: [i32, i32, pointer], returns: i32 },
  fsl_clock_ns: { args: [], returns: f64 },
  fsl_mmap: { args: [f64, f64, i32, i32, i32, f64], returns: f64 },
  fsl_munmap: { args: [f64, f64], returns: i32 },
  fsl_madvise: { args: [f64, f64, i32], returns: i32 },
  fsl_mincore: { args: [f64, f64, pointer], returns: i32 },
  fsl_remote_syscall: { args: [i32, i32, pointer, pointer, i32, f64], returns: i32 },
} as const;

type Library = ReturnType<typeof dlopen<typeof SYMBOLS>>["symbols"];
/** Memory handed to C: a typed array of any kind. */
export type Memory = NodeJS.TypedArray;

/** Until the first call a proxy that loads the shim; from then on the table of functions itself. */
let lib: Library = new Proxy({} as Library, {
  get(_, name) {
    load();
    return lib[name as keyof Library];
  },
});
let isLoaded = false;

/**
 * Loads the shim now instead of at the first call.
 * @throws FslError HOST_UNSUPPORTED with the loader's reason
 */
export function load(): void {
  if (isLoaded) return;
  let symbols: Library;
  try {
    symbols = dlopen(loadablePath(), SYMBOLS).symbols;
  } catch (cause) {
    if (cause instanceof FslError) throw cause;
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new FslError(
      "HOST_UNSUPPORTED",
      `shim: cannot be loaded: ${reason} (${ARCHITECTURE})`,
      { reason, arch: ARCHITECTURE },
      cause,
    );
  }
  checkAbi(symbols);
  lib = process.env["FSL_TRACE_FFI"] === "1" ? traced(symbols) : symbols;
  isLoaded = true;
}

/**
 * Both sides hold the same table; a difference means a shim of another version or a wrong
 * constant.
 */
function checkAbi(symbols: Library): void {
  const values = new BigUint64Array(ABI_TABLE.length);
  const mismatch = findAbiMismatch(values, symbols.fsl_abi(values, values.length));
  if (mismatch === null) return;
  const { name, expected, found } = mismatch;
  throw new FslError(
    "HOST_UNSUPPORTED",
    `shim: ABI ${name}: expected ${expected}, found ${found} (${ARCHITECTURE}); run: npm run build`,
    { name, expected, found },
  );
}

/**
 * A path that dlopen(3) takes, without a file: the bytes go to a memfd, by way of the libc. The
 * descriptor stays open on purpose. Its number is part of the name that the loader remembers the
 * library by, so a later library under the same number would be taken for this one.
 */
function loadablePath(): string {
  const fd = openLibc().memfd_create(cString("fsl-shim"), MFD_CLOEXEC);
  // A libc call's errno cannot be read reliably through FFI, so the message has to do without.
  if (fd < 0) throw new Error("memfd_create failed");
  const bytes = shimBytes();
  for (let written = 0; written < bytes.length;) written += writeSync(fd, bytes, written);
  return `/proc/self/fd/${fd}`;
}

/**
 * The one that this process runs on: a name that the loader does not know already, Bun would look for in the
 * working directory, and run what is there.
 */
function openLibc(): { memfd_create(name: Uint8Array, flags: number): number } {
  const symbols = { memfd_create: { args: [pointer, i32], returns: i32 } } as const;
  const musl = `/lib/ld-musl-${ARCHITECTURE}.so.1`;
  const isMusl = existsSync(musl) && readFileSync("/proc/self/maps", "latin1").includes(musl);
  return dlopen(isMusl ? musl : "libc.so.6", symbols).symbols;
}

type AnyFunction = (...args: (number | Memory | null)[]) => number;

/** Every function wrapped: one line `name(arguments) = result, ns`. */
function traced(symbols: Library): Library {
  const wrapped: Record<string, AnyFunction> = {};
  for (const [name, value] of Object.entries(symbols)) {
    const call = value as AnyFunction;
    wrapped[name] = (...args) => {
      const startNs = Bun.nanoseconds();
      const result = call(...args);
      const tookNs = Bun.nanoseconds() - startNs;
      const texts = args.map((arg) =>
        typeof arg === "object" && arg !== null ? `[${arg.byteLength} bytes]` : String(arg),
      );
      const text = result < 0 ? ` ${errnoText(result)}` : "";
      process.stderr.write(`ffi ${name}(${texts.join(", ")}) = ${result}${text}, ${tookNs} ns\n`);
      return result;
    };
  }
  return wrapped as unknown as Library;
}

// ---- helpers ----

/**
 * Address of a typed array's memory. It stays valid for as long as the array is referenced and is
 * not detached.
 */
export function ptrOf(memory: Memory | ArrayBufferLike): number {
  return memory.byteLength === 0 ? 0 : ptr(memory as Memory);
}

/**
 * A view of memory that is not JavaScript's, such as a mapping of `mmap`. It does not own that
 * memory: after munmap, or where a mapped file was truncated, a read is a SIGSEGV or SIGBUS of the
 * whole process.
 * @param length bytes, at most 2^32
 */
export function view(address: number, length: number): ArrayBuffer {
  if (length === 0) return new ArrayBuffer(0);
  return toArrayBuffer(address as Pointer, 0, length);
}

/**
 * The result itself, or an FslError HOST_UNSUPPORTED that says what failed. For calls that fail
 * only on a broken host.
 */
export function check(result: number, what: string): number {
  if (result >= 0) return result;
  throw new FslError("HOST_UNSUPPORTED", `${what}: ${errnoText(result)}`, { errno: -result });
}

/** bun:ffi refuses an empty array where C would not look at it. */
function orNull(memory: Memory | null): Memory | null {
  return memory === null || memory.byteLength === 0 ? null : memory;
}

function cString(text: string): Buffer {
  return Buffer.from(`${text}\0`);
}

// ---- userfaultfd ----

/** userfaultfd(2). A descriptor; -EPERM without privilege, -ENOSYS in a kernel without it. */
export function userfaultfd(flags: number): number {
  return lib.fsl_userfaultfd(flags);
}

/** USERFAULTFD_IOC_NEW on an open /dev/userfaultfd (Linux 6.1). A descriptor. */
export function userfaultfdDev(devFd: number, flags: number): number {
  return lib.fsl_userfaultfd_dev(devFd, flags);
}

/** UFFDIO_API, once per descriptor. `out` (2): features granted, ioctls. */
export function uffdApi(uffd: number, features: number, out: BigUint64Array): number {
  return lib.fsl_uffd_api(uffd, features, out);
}

/** UFFDIO_REGISTER. `out` (1): mask of the ioctls that the range accepts. */
export function uffdRegister(
  uffd: number,
  addr: number,
  length: number,
  mode: number,
  out: BigUint64Array,
): number {
  return lib.fsl_uffd_register(uffd, addr, length, mode, out);
}

export function uffdUnregister(uffd: number, addr: number, length: number): number {
  return lib.fsl_uffd_unregister(uffd, addr, length);
}

/**
 * UFFDIO_COPY, decided by its signed `copy` field: bytes done (> 0, maybe fewer), or -errno when
 * none was.
 */
export function uffdCopy(
  uffd: number,
  dstAddr: number,
  srcAddr: number,
  length: number,
  mode: number,
): number {
  return lib.fsl_uffd_copy(uffd, dstAddr, srcAddr, length, mode);
}

/** UFFDIO_ZEROPAGE; answers like `uffdCopy`. */
export function uffdZeropage(uffd: number, addr: number, length: number, mode: number): number {
  return lib.fsl_uffd_zeropage(uffd, addr, length, mode);
}

/** UFFDIO_POISON, Linux 6.6; answers like `uffdCopy`. */
export function uffdPoison(uffd: number, addr: number, length: number, mode: number): number {
  return lib.fsl_uffd_poison(uffd, addr, length, mode);
}

export function uffdWake(uffd: number, addr: number, length: number): number {
  return lib.fsl_uffd_wake(uffd, addr, length);
}

// ---- descriptors ----

/** openat(2) from the working directory. O_CLOEXEC is up to the caller. */
export function open(path: string, flags: number, mode: number): number {
  return lib.fsl_open(cString(path), flags, mode);
}

export function close(fd: number): number {
  return lib.fsl_close(fd);
}

/** F_DUPFD_CLOEXEC: a duplicate with a number >= `minimum`. */
export function dup(fd: number, minimum: number): number {
  return lib.fsl_dup(fd, minimum);
}

/** fcntl(2) with a number as argument: leases, seals, flags. */
export function fcntl(fd: number, command: number, argument: number): number {
  return lib.fsl_fcntl(fd, command, argument);
}

/** ioctl(2); `argument` is a value or an address. */
export function ioctl(fd: number, request: number, argument: number): number {
  return lib.fsl_ioctl(fd, request, argument);
}

export function flock(fd: number, operation: number): number {
  return lib.fsl_flock(fd, operation);
}

export function eventfd(initial: number, flags: number): number {
  return lib.fsl_eventfd(initial, flags);
}

export function memfdCreate(name: string, flags: number): number {
  return lib.fsl_memfd_create(cString(name), flags);
}

export function ftruncate(fd: number, length: number): number {
  return lib.fsl_ftruncate(fd, length);
}

export function fallocate(fd: number, mode: number, offset: number, length: number): number {
  return lib.fsl_fallocate(fd, mode, offset, length);
}

export function fadvise(fd: number, offset: number, length: number, advice: number): number {
  return lib.fsl_fadvise(fd, offset, length, advice);
}

/** lseek(2), also SEEK_DATA and SEEK_HOLE. Absolute file offset. */
export function lseek(fd: number, offset: number, whence: number): number {
  return lib.fsl_lseek(fd, offset, whence);
}

/** read(2) into a typed array or, given a number, to that address. */
export function read(fd: number, buffer: Memory | number, length: number): number {
  return lib.fsl_read(fd, buffer as Memory, length);
}

/** write(2). */
export function write(fd: number, buffer: Memory, length: number = buffer.byteLength): number {
  return lib.fsl_write(fd, buffer, length);
}

/** pread(2) to an address of this process. */
export function pread(fd: number, bufferAddr: number, length: number, offset: number): number {
  return lib.fsl_pread(fd, bufferAddr, length, offset);
}

/**
 * As `pread`, but without waiting for a disk: preadv2(2) with RWF_NOWAIT. -EAGAIN when nothing of it is
 * in the page cache, fewer bytes when not all of it is; -EOPNOTSUPP where the file system cannot tell.
 */
export function preadAtHand(
  fd: number,
  bufferAddr: number,
  length: number,
  offset: number,
): number {
  return lib.fsl_pread_at_hand(fd, bufferAddr, length, offset);
}

/** pwrite(2) from an address of this process. */
export function pwrite(fd: number, bufferAddr: number, length: number, offset: number): number {
  return lib.fsl_pwrite(fd, bufferAddr, length, offset);
}

/**
 * poll(2) on up to 16 descriptors, all for the same `events`; negative ones are skipped. -EINTR is
 * returned.
 */
export function poll(
  fds: Int32Array,
  revents: Int32Array,
  count: number,
  events: number,
  timeoutMs: number,
): number {
  return lib.fsl_poll(orNull(fds), orNull(revents), count, events, timeoutMs);
}

// ---- unix sockets ----

/** A pair of unix sockets, close-on-exec. `out` (2): the descriptors. */
export function socketpair(type: number, out: Int32Array): number {
  return lib.fsl_socketpair(type, out);
}

/** socket(2), bind(2), listen(2). The listener. */
export function unixListen(path: string, backlog: number): number {
  return lib.fsl_unix_listen(cString(path), backlog);
}

/** socket(2), connect(2). Does not wait: EAGAIN when the listener's backlog is full. */
export function unixConnect(path: string): number {
  return lib.fsl_unix_connect(cString(path));
}

/** 0 when a socket is bound to the path, -ECONNREFUSED when its owner is gone; nobody notices. */
export function unixIsBound(path: string): number {
  return lib.fsl_unix_is_bound(cString(path));
}

export function unixAccept(listener: number): number {
  return lib.fsl_unix_accept(listener);
}

/** sendmsg(2) of one buffer and up to 16 descriptors, never with SIGPIPE. Bytes sent. */
export function send(
  socket: number,
  buffer: Memory,
  length: number,
  fds: Int32Array,
  fdCount: number,
  flags: number,
): number {
  return lib.fsl_send(socket, orNull(buffer), length, orNull(fds), fdCount, flags);
}

/**
 * recvmsg(2). Received descriptors are close-on-exec. `out` (2): how many descriptors, msg_flags.
 * Bytes received.
 */
export function recv(
  socket: number,
  buffer: Memory,
  length: number,
  fds: Int32Array,
  fdCapacity: number,
  out: Int32Array,
  flags: number,
): number {
  return lib.fsl_recv(socket, orNull(buffer), length, orNull(fds), fdCapacity, out, flags);
}

/** SO_PEERCRED. `out` (3): pid, uid, gid of the peer. */
export function peerCredentials(socket: number, out: Int32Array): number {
  return lib.fsl_peer_credentials(socket, out);
}

/** SO_PEERPIDFD, Linux 6.5. A pidfd of the peer. */
export function peerPidfd(socket: number): number {
  return lib.fsl_peer_pidfd(socket);
}

// ---- processes ----

export function pidfdOpen(pid: number, flags: number): number {
  return lib.fsl_pidfd_open(pid, flags);
}

/** Duplicate of another process's descriptor; needs the right to ptrace it. */
export function pidfdGetfd(pidfd: number, targetFd: number): number {
  return lib.fsl_pidfd_getfd(pidfd, targetFd);
}

/** Sends a signal; 0 only asks whether the process is there. */
export function pidfdSendSignal(pidfd: number, signal: number): number {
  return lib.fsl_pidfd_send_signal(pidfd, signal);
}

/** 0 when the two descriptors are the same open file, 1 to 3 when they differ. */
export function kcmpFile(pid1: number, pid2: number, fd1: number, fd2: number): number {
  return lib.fsl_kcmp_file(pid1, pid2, fd1, fd2);
}

/** 0 when the two processes share one address space, 1 to 3 when they do not. */
export function kcmpVm(pid1: number, pid2: number): number {
  return lib.fsl_kcmp_vm(pid1, pid2);
}

/** From another process's memory to an address of this one. Waits where a page is missing. */
export function processVmReadv(
  pid: number,
  remoteAddr: number,
  localAddr: number,
  length: number,
): number {
  return lib.fsl_process_vm_readv(pid, remoteAddr, localAddr, length);
}

/** To another process's memory. Waits where a page is missing. */
export function processVmWritev(
  pid: number,
  remoteAddr: number,
  localAddr: number,
  length: number,
): number {
  return lib.fsl_process_vm_writev(pid, remoteAddr, localAddr, length);
}

/** madvise(2) on another process, e.g. MADV_COLLAPSE. Bytes advised. */
export function processMadvise(
  pidfd: number,
  addr: number,
  length: number,
  advice: number,
): number {
  return lib.fsl_process_madvise(pidfd, addr, length, advice);
}

export function gettid(): number {
  return lib.fsl_gettid();
}

/** nice value of one thread. */
export function setpriority(tid: number, nice: number): number {
  return lib.fsl_setpriority(tid, nice);
}

/** Policy of one thread: SCHED_OTHER or SCHED_IDLE. */
export function schedSetscheduler(tid: number, policy: number): number {
  return lib.fsl_sched_setscheduler(tid, policy);
}

/** On which CPUs one thread may run, a bit for each; 0: the calling thread. */
export function schedSetaffinity(tid: number, mask: Memory, maskBytes: number): number {
  return lib.fsl_sched_setaffinity(tid, mask, maskBytes);
}

/** Bytes of the mask that were written. */
export function schedGetaffinity(tid: number, mask: Memory, maskBytes: number): number {
  return lib.fsl_sched_getaffinity(tid, mask, maskBytes);
}

/** NUMA policy of the calling thread. The kernel looks at one bit less than `nodesBits`. */
export function setMempolicy(mode: number, nodes: Memory, nodesBits: number): number {
  return lib.fsl_set_mempolicy(mode, nodes, nodesBits);
}

/** prlimit64(2): {soft, hard}; null for the one that is not wanted. */
export function prlimit(
  pid: number,
  resource: number,
  limit: BigUint64Array | null,
  oldLimit: BigUint64Array | null,
): number {
  return lib.fsl_prlimit(pid, resource, limit, oldLimit);
}

/** SIG_IGN for one signal of this process. */
export function ignoreSignal(signal: number): number {
  return lib.fsl_ignore_signal(signal);
}

/** wait4(2). `status` (1) as the kernel gives it. */
export function waitpid(pid: number, options: number, status: Int32Array): number {
  return lib.fsl_waitpid(pid, options, status);
}

/** CLOCK_MONOTONIC, ns. */
export function clockNs(): number {
  return lib.fsl_clock_ns();
}

// ---- memory of this process ----

/** mmap(2). The address, or -errno. */
export function mmap(
  addr: number,
  length: number,
  prot: number,
  flags: number,
  fd: number,
  offset: number,
): number {
  return lib.fsl_mmap(addr, length, prot, flags, fd, offset);
}

export function munmap(addr: number, length: number): number {
  return lib.fsl_munmap(addr, length);
}

export function madvise(addr: number, length: number, advice: number): number {
  return lib.fsl_madvise(addr, length, advice);
}

/** One byte per page into `vector`. */
export function mincore(addr: number, length: number, vector: Memory): number {
  return lib.fsl_mincore(addr, length, vector);
}

// ---- one system call in another process ----

/**
 * One system call made by the main thread of another process, borrowed by ptrace (shim/remote.c).
 * `args` (6); `result` (1) is what the call returned, signed. `at`: a system call instruction in the target; 0
 * = one of its vDSO's.
 * @returns 0 when it was made; -errno when not, the target is as before: EPERM no right or traced
 * already, ESRCH ended,
 *   EBUSY stopped by a signal (SIGCONT first), ETIMEDOUT, ENOEXEC no vDSO or a 32-bit process
 */
export function remoteSyscall(
  pid: number,
  number: number,
  args: BigUint64Array,
  result: BigInt64Array,
  timeoutMs: number,
  at = 0,
): number {
  return lib.fsl_remote_syscall(pid, number, args, result, timeoutMs, at);
}
