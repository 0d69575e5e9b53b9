/**
 * The Linux user ABI that TypeScript relies on: constants and structure offsets. `ABI_TABLE` is the
 * same list as in shim/abi.c, in the same order; native.ts compares the two when it loads the shim.
 * Values that differ between x86_64 and aarch64 go through `byArch`.
 * @source Linux include/uapi/{linux,asm-generic}/*.h, man-pages of the calls named
 */

const isArm = process.arch === "arm64";

function byArch(x86Value: number, armValue: number): number {
  return isArm ? armValue : x86Value;
}

// ---- errno (asm-generic) ----

export const EPERM = 1;
export const ENOENT = 2;
export const ESRCH = 3;
export const EINTR = 4;
export const EIO = 5;
export const ENXIO = 6;
export const ENOEXEC = 8;
export const EBADF = 9;
export const EAGAIN = 11;
export const ENOMEM = 12;
export const EACCES = 13;
export const EFAULT = 14;
export const EBUSY = 16;
export const EEXIST = 17;
export const EINVAL = 22;
export const ENOTTY = 25;
export const EPIPE = 32;
export const ENAMETOOLONG = 36;
export const ENOSYS = 38;
export const ENODATA = 61;
export const ENOPROTOOPT = 92;
export const EOPNOTSUPP = 95;
export const ECONNRESET = 104;
export const ECONNREFUSED = 111;
export const ESTALE = 116;

// ---- userfaultfd(2), ioctl_userfaultfd(2) ----

export const USERFAULTFD_IOC_NEW = 0xaa00;
/** Never used by fsl: system calls and KVM would get EFAULT instead of waiting. */
export const UFFD_USER_MODE_ONLY = 1;

/**
 * Bits of `features` in UFFDIO_API, with the Linux version that brought each. All lie below 2^53.
 */
export const UFFD_FEATURES = {
  PAGEFAULT_FLAG_WP: 1 << 0, // 5.7
  EVENT_FORK: 1 << 1, // 4.11
  EVENT_REMAP: 1 << 2, // 4.11
  EVENT_REMOVE: 1 << 3, // 4.11
  MISSING_HUGETLBFS: 1 << 4, // 4.11
  MISSING_SHMEM: 1 << 5, // 4.11
  EVENT_UNMAP: 1 << 6, // 4.11
  SIGBUS: 1 << 7, // 4.14
  THREAD_ID: 1 << 8, // 4.14
  MINOR_HUGETLBFS: 1 << 9, // 5.13
  MINOR_SHMEM: 1 << 10, // 5.14
  EXACT_ADDRESS: 1 << 11, // 5.18
  WP_HUGETLBFS_SHMEM: 1 << 12, // 5.19
  WP_UNPOPULATED: 1 << 13, // 6.4
  POISON: 1 << 14, // 6.6
  WP_ASYNC: 1 << 15, // 6.7
  MOVE: 1 << 16, // 6.8
} as const;

export type UffdFeature = keyof typeof UFFD_FEATURES;

/** `mode` of UFFDIO_REGISTER. */
export const REGISTER_MISSING = 1;
/** `mode` of UFFDIO_COPY, ZEROPAGE, POISON, MOVE: do not wake who waits. */
export const MODE_DONTWAKE = 1;

/** Bit numbers in the ioctl masks of UFFDIO_API and UFFDIO_REGISTER. */
export const UFFDIO_COPY_BIT = 3n;
export const UFFDIO_ZEROPAGE_BIT = 4n;
export const UFFDIO_MOVE_BIT = 5n;
export const UFFDIO_POISON_BIT = 8n;

/** struct uffd_msg, 32 bytes, host byte order. */
export const UFFD_MSG = {
  BYTES: 32,
  EVENT: 0, // u8
  FAULT_FLAGS: 8, // u64
  FAULT_ADDRESS: 16, // u64
  FAULT_TID: 24, // u32, with feature THREAD_ID
  REMOVE_START: 8, // u64; UNMAP too
  REMOVE_END: 16, // u64, exclusive
} as const;

export const UFFD_EVENT_PAGEFAULT = 0x12;
export const UFFD_EVENT_REMOVE = 0x15;
export const UFFD_EVENT_UNMAP = 0x16;

/** Bits of `flags` in a page fault event. */
export const UFFD_PAGEFAULT_FLAG_WRITE = 1;

// ---- open(2), fcntl(2), lseek(2), memfd_create(2) ----

export const O_RDONLY = 0;
export const O_WRONLY = 1;
export const O_RDWR = 2;
export const O_CREAT = 0o100;
export const O_NONBLOCK = 0o4000;
export const O_CLOEXEC = 0o2000000;
export const O_PATH = 0o10000000;

export const F_GETFD = 1;
export const F_SETFD = 2;
export const F_GETFL = 3;
export const F_SETFL = 4;
export const FD_CLOEXEC = 1;
/** Signal that tells of a lease break; 0 = SIGIO. */
export const F_SETSIG = 10;
export const F_SETLEASE = 1024;
export const F_GETLEASE = 1025;
export const F_ADD_SEALS = 1033;
export const F_GET_SEALS = 1034;
/** Arguments of F_SETLEASE. */
export const F_RDLCK = 0;
export const F_UNLCK = 2;
export const F_SEAL_SEAL = 1;
export const F_SEAL_SHRINK = 2;
export const F_SEAL_GROW = 4;

export const LOCK_SH = 1;
export const LOCK_EX = 2;
export const LOCK_NB = 4;

export const SEEK_DATA = 3;
export const SEEK_HOLE = 4;

export const MFD_CLOEXEC = 1;
export const MFD_ALLOW_SEALING = 2;

export const POSIX_FADV_DONTNEED = 4;

export const EFD_CLOEXEC = O_CLOEXEC;
export const EFD_NONBLOCK = O_NONBLOCK;

// ---- poll(2) ----

export const POLLIN = 1;
export const POLLERR = 8;
export const POLLHUP = 16;
/** Most descriptors of one `poll`, and of one `send` or `recv`. */
export const FD_COUNT_MAX = 16;

// ---- sockets ----

export const SOCK_STREAM = 1;
export const SOCK_SEQPACKET = 5;
export const MSG_CTRUNC = 8;
export const MSG_DONTWAIT = 0x40;
export const MSG_NOSIGNAL = 0x4000;

// ---- mmap(2), madvise(2) ----

export const PROT_READ = 1;
export const PROT_EXEC = 4;
export const PROT_WRITE = 2;
export const MAP_SHARED = 1;
export const MAP_PRIVATE = 2;
export const MAP_ANONYMOUS = 0x20;

/** sched_setscheduler(2). */
export const SCHED_OTHER = 0;
export const SCHED_IDLE = 5;

export const MADV_RANDOM = 1;
export const MADV_WILLNEED = 3;
export const MADV_DONTNEED = 4;
export const MADV_COLLAPSE = 25; // 6.1

// ---- processes ----

export const SIGKILL = 9;
export const SIGXFSZ = 25;

export const WNOHANG = 1;
/** Children of any kind, also those whose end sends no SIGCHLD. */
export const WALL = 0x40000000;

export const CAP_SYS_PTRACE = 19;

export const RLIMIT_NOFILE = 7;

export const MPOL_DEFAULT = 0;
export const MPOL_PREFERRED = 1;
export const MPOL_BIND = 2;
export const MPOL_INTERLEAVE = 3;
export const MPOL_LOCAL = 4;
export const MPOL_PREFERRED_MANY = 5; // 5.15
export const MPOL_WEIGHTED_INTERLEAVE = 6; // 6.9

/** System call numbers for `remoteSyscall`. */
export const SYS_USERFAULTFD = byArch(323, 282);
export const SYS_IOCTL = byArch(16, 29);
export const SYS_CLOSE = byArch(3, 57);
export const SYS_GETPID = byArch(39, 172);
export const SYS_MMAP = byArch(9, 222);
export const SYS_MPROTECT = byArch(10, 226);
export const SYS_MUNMAP = byArch(11, 215);
export const SYS_CLONE = byArch(56, 220);
export const SYS_MADVISE = byArch(28, 233);
export const SYS_PREAD64 = byArch(17, 67);

// ---- helper tasks: shim/helper.h, whose words are explained there ----

export const HELPERS_MAX = 9;
export const HELPER_CALLS_MAX = 256;
export const HELPER_YIELDS = 1;
export const HELPER_MOVE = 0xfffffffe;
export const HELPER_TOUCH = 0xffffffff;
export const HELPER_CLEAR = 0xfffffffd;
export const HELPER_STOP_IF_NEGATIVE = 1;
export const HELPER_STOP_UNLESS_EXPECTED = 2;

export const HELPER_CALL = { BYTES: 64, NUMBER: 0, FLAGS: 4, EXPECTED: 8, ARGS: 16 } as const;
export const HELPER_REQUEST = { BYTES: 16392, CALL_COUNT: 0, FLAGS: 4, CALLS: 8 } as const;
export const HELPER_REPLY = {
  BYTES: 2120,
  CALLS_MADE: 0,
  FD_COUNT: 4,
  FDS: 8,
  RESULTS: 72,
} as const;
/** One helper in the preload message. */
export const HELPER_RECORD_BYTES = 24;

/** What the C compiler saw must be what this file says. Order of shim/abi.c. */
export const ABI_TABLE: readonly (readonly [name: string, value: number])[] = [
  ["ABI_VERSION", 1],
  ["sizeof(void *)", 8],
  ["sizeof(uffd_msg)", UFFD_MSG.BYTES],
  ["uffd_msg.event", UFFD_MSG.EVENT],
  ["uffd_msg.pagefault.flags", UFFD_MSG.FAULT_FLAGS],
  ["uffd_msg.pagefault.address", UFFD_MSG.FAULT_ADDRESS],
  ["uffd_msg.pagefault.ptid", UFFD_MSG.FAULT_TID],
  ["uffd_msg.remove.start", UFFD_MSG.REMOVE_START],
  ["uffd_msg.remove.end", UFFD_MSG.REMOVE_END],
  ["USERFAULTFD_IOC_NEW", USERFAULTFD_IOC_NEW],
  ["O_NONBLOCK", O_NONBLOCK],
  ["O_CLOEXEC", O_CLOEXEC],
  ["FD_COUNT_MAX", FD_COUNT_MAX],
  ["SYS_userfaultfd", SYS_USERFAULTFD],
  ["SYS_ioctl", SYS_IOCTL],
  ["SYS_close", SYS_CLOSE],
  ["SYS_getpid", SYS_GETPID],
  ["SYS_madvise", SYS_MADVISE],
  ["SYS_pread64", SYS_PREAD64],
  ["HELPERS_MAX", HELPERS_MAX],
  ["HELPER_CALLS_MAX", HELPER_CALLS_MAX],
  ["HELPER_YIELDS", HELPER_YIELDS],
  ["HELPER_MOVE", HELPER_MOVE],
  ["HELPER_TOUCH", HELPER_TOUCH],
  ["HELPER_CLEAR", HELPER_CLEAR],
  ["HELPER_STOP_IF_NEGATIVE", HELPER_STOP_IF_NEGATIVE],
  ["HELPER_STOP_UNLESS_EXPECTED", HELPER_STOP_UNLESS_EXPECTED],
  ["sizeof(helper_call)", HELPER_CALL.BYTES],
  ["helper_call.flags", HELPER_CALL.FLAGS],
  ["helper_call.expected", HELPER_CALL.EXPECTED],
  ["helper_call.args", HELPER_CALL.ARGS],
  ["sizeof(helper_request)", HELPER_REQUEST.BYTES],
  ["helper_request.flags", HELPER_REQUEST.FLAGS],
  ["helper_request.calls", HELPER_REQUEST.CALLS],
  ["sizeof(helper_reply)", HELPER_REPLY.BYTES],
  ["helper_reply.fd_count", HELPER_REPLY.FD_COUNT],
  ["helper_reply.fds", HELPER_REPLY.FDS],
  ["helper_reply.results", HELPER_REPLY.RESULTS],
  ["sizeof(helper_record)", HELPER_RECORD_BYTES],
];

/** The first entry in which the shim's table differs, or null. Pure. */
export function findAbiMismatch(
  values: BigUint64Array,
  count: number,
): { name: string; expected: number; found: number } | null {
  if (count !== ABI_TABLE.length) {
    return { name: "number of entries", expected: ABI_TABLE.length, found: count };
  }
  const index = ABI_TABLE.findIndex(([, value], at) => values[at] !== BigInt(value));
  const [name, expected] = ABI_TABLE[index] ?? ["", 0];
  return index < 0 ? null : { name, expected, found: Number(values[index]) };
}
