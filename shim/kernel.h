/*
 * kernel.h: what the shim needs of the Linux user ABI, without a libc.
 *
 * Everything is defined here: without a libc there is no header path, installed headers are often
 * older than the kernel (Debian 12's stop at Linux 6.1), and msghdr and the kernel's sigaction have
 * no user header at all. Sizes and offsets are asserted at the end; fsl_abi() reports them to
 * TypeScript.
 *
 * @source Linux include/uapi/linux/{userfaultfd,ptrace,elf,fcntl,un,socket}.h
 */
#ifndef FSL_KERNEL_H
#define FSL_KERNEL_H

#include <stddef.h>
#include <stdint.h>

/* ---- system calls ---- */

/*
 * System call numbers: NUMBER(name, x86_64, aarch64).
 * @source Linux arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h
 */
#if defined(__x86_64__)
#define BY_ARCH(x86_64, aarch64) (x86_64)
#elif defined(__aarch64__)
#define BY_ARCH(x86_64, aarch64) (aarch64)
#else
#error "fsl supports x86_64 and aarch64"
#endif

#define NR_accept4 BY_ARCH(288, 242)
#define NR_bind BY_ARCH(49, 200)
#define NR_capset BY_ARCH(126, 91)
#define NR_clock_gettime BY_ARCH(228, 113)
#define NR_close BY_ARCH(3, 57)
#define NR_close_range BY_ARCH(436, 436) /* Linux 5.9 */
#define NR_connect BY_ARCH(42, 203)
#define NR_eventfd2 BY_ARCH(290, 19)
#define NR_exit BY_ARCH(60, 93)
#define NR_exit_group BY_ARCH(231, 94)
#define NR_fadvise64 BY_ARCH(221, 223)
#define NR_fallocate BY_ARCH(285, 47)
#define NR_fcntl BY_ARCH(72, 25)
#define NR_flock BY_ARCH(73, 32)
#define NR_ftruncate BY_ARCH(77, 46)
#define NR_getpid BY_ARCH(39, 172)
#define NR_getppid BY_ARCH(110, 173)
#define NR_getsockopt BY_ARCH(55, 209)
#define NR_gettid BY_ARCH(186, 178)
#define NR_ioctl BY_ARCH(16, 29)
#define NR_kcmp BY_ARCH(312, 272)
#define NR_listen BY_ARCH(50, 201)
#define NR_lseek BY_ARCH(8, 62)
#define NR_madvise BY_ARCH(28, 233)
#define NR_memfd_create BY_ARCH(319, 279)
#define NR_mincore BY_ARCH(27, 232)
#define NR_mmap BY_ARCH(9, 222)
#define NR_mprotect BY_ARCH(10, 226)
#define NR_munmap BY_ARCH(11, 215)
#define NR_nanosleep BY_ARCH(35, 101)
#define NR_openat BY_ARCH(257, 56)
#define NR_pidfd_getfd BY_ARCH(438, 438)
#define NR_pidfd_open BY_ARCH(434, 434)
#define NR_pidfd_send_signal BY_ARCH(424, 424)
#define NR_ppoll BY_ARCH(271, 73)
#define NR_prctl BY_ARCH(157, 167)
#define NR_pread64 BY_ARCH(17, 67)
#define NR_prlimit64 BY_ARCH(302, 261)
#define NR_process_madvise BY_ARCH(440, 440)
#define NR_preadv2 BY_ARCH(327, 286)
#define NR_process_vm_readv BY_ARCH(310, 270)
#define NR_process_vm_writev BY_ARCH(311, 271)
#define NR_ptrace BY_ARCH(101, 117)
#define NR_pwrite64 BY_ARCH(18, 68)
#define NR_read BY_ARCH(0, 63)
#define NR_recvmsg BY_ARCH(47, 212)
#define NR_restart_syscall BY_ARCH(219, 128)
#define NR_rt_sigaction BY_ARCH(13, 134)
#define NR_rt_sigprocmask BY_ARCH(14, 135)
#define NR_rt_sigreturn BY_ARCH(15, 139)
#define NR_sched_getaffinity BY_ARCH(204, 123)
#define NR_sched_setaffinity BY_ARCH(203, 122)
#define NR_sched_setscheduler BY_ARCH(144, 119)
#define NR_sendmsg BY_ARCH(46, 211)
#define NR_set_mempolicy BY_ARCH(238, 237)
#define NR_setpriority BY_ARCH(141, 140)
#define NR_socket BY_ARCH(41, 198)
#define NR_socketpair BY_ARCH(53, 199)
#define NR_tgkill BY_ARCH(234, 131)
#define NR_userfaultfd BY_ARCH(323, 282)
#define NR_wait4 BY_ARCH(61, 260)
#define NR_waitid BY_ARCH(247, 95)
#define NR_write BY_ARCH(1, 64)

#if defined(__x86_64__)

static inline long sys6(long number, long a, long b, long c, long d, long e, long f) {
  long result;
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return result;
}

#else

static inline long sys6(long number, long a, long b, long c, long d, long e, long f) {
  register long x8 __asm__("x8") = number;
  register long x0 __asm__("x0") = a;
  register long x1 __asm__("x1") = b;
  register long x2 __asm__("x2") = c;
  register long x3 __asm__("x3") = d;
  register long x4 __asm__("x4") = e;
  register long x5 __asm__("x5") = f;
  __asm__ volatile("svc #0"
                   : "+r"(x0)
                   : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                   : "memory", "cc");
  return x0;
}

#endif

#define SYS_ARGS(_1, _2, _3, _4, _5, _6, _7, NAME, ...) NAME
#define SYS0(n) sys6(n, 0, 0, 0, 0, 0, 0)
#define SYS1(n, a) sys6(n, (long)(a), 0, 0, 0, 0, 0)
#define SYS2(n, a, b) sys6(n, (long)(a), (long)(b), 0, 0, 0, 0)
#define SYS3(n, a, b, c) sys6(n, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define SYS4(n, a, b, c, d) sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define SYS5(n, a, b, c, d, e) \
  sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)
#define SYS6(n, a, b, c, d, e, f) \
  sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
/* sys(number, up to six arguments) -> result or -errno */
#define sys(...) SYS_ARGS(__VA_ARGS__, SYS6, SYS5, SYS4, SYS3, SYS2, SYS1, SYS0)(__VA_ARGS__)

/* ---- errno (asm-generic; the same on both architectures) ---- */

#define EPERM 1
#define ENOENT 2
#define ESRCH 3
#define EINTR 4
#define EIO 5
#define ENOEXEC 8
#define EBADF 9
#define EAGAIN 11
#define ENOMEM 12
#define EACCES 13
#define EFAULT 14
#define EBUSY 16
#define EINVAL 22
#define ENAMETOOLONG 36
#define ENOSYS 38
#define EPROTOTYPE 91
#define ETIMEDOUT 110
/* Internal to the kernel, visible to a tracer: a system call that will be restarted. */
#define ERESTARTSYS 512
#define ERESTART_RESTARTBLOCK 516

/* ---- userfaultfd ---- */

struct uffdio_range {
  uint64_t start, len;
};
struct uffdio_api {
  uint64_t api, features, ioctls;
};
struct uffdio_register {
  struct uffdio_range range;
  uint64_t mode, ioctls;
};
struct uffdio_copy {
  uint64_t dst, src, len, mode;
  int64_t copy;
};
/* ZEROPAGE and POISON share one shape: range, mode, signed bytes done. */
struct uffdio_fill {
  struct uffdio_range range;
  uint64_t mode;
  int64_t done;
};
struct uffdio_move {
  uint64_t dst, src, len, mode;
  int64_t move;
};
struct uffd_msg {
  uint8_t event, reserved1;
  uint16_t reserved2;
  uint32_t reserved3;
  union {
    struct {
      uint64_t flags, address;
      uint32_t ptid;
    } pagefault;
    struct {
      uint64_t start, end;
    } remove;
  } arg;
};

#define UFFD_API 0xAAull
#define UFFDIO_API 0xc018aa3ful
#define UFFDIO_REGISTER 0xc020aa00ul
#define UFFDIO_UNREGISTER 0x8010aa01ul
#define UFFDIO_WAKE 0x8010aa02ul
#define UFFDIO_COPY 0xc028aa03ul
#define UFFDIO_ZEROPAGE 0xc020aa04ul
#define UFFDIO_MOVE 0xc028aa05ul /* Linux 6.8 */
#define UFFDIO_POISON 0xc020aa08ul /* Linux 6.6 */
#define USERFAULTFD_IOC_NEW 0xaa00ul /* on /dev/userfaultfd, Linux 6.1 */

/* ---- descriptors, sockets, memory ---- */

#define AT_FDCWD (-100)
#define O_RDONLY 0
#define O_RDWR 2
#define O_NONBLOCK 04000
#define O_CLOEXEC 02000000
#define F_SETFL 4
#define F_DUPFD_CLOEXEC 1030
#define AF_UNIX 1
#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define SOCK_SEQPACKET 5
#define SOCK_CLOEXEC 02000000
#define SOCK_NONBLOCK O_NONBLOCK
#define SOL_SOCKET 1
#define SO_PEERCRED 17
#define SO_PEERPIDFD 77 /* Linux 6.5 */
#define SCM_RIGHTS 1
#define MSG_CMSG_CLOEXEC 0x40000000
#define MSG_DONTWAIT 0x40
#define MSG_NOSIGNAL 0x4000
#define POLLIN 1
#define PROT_NONE 0
#define PROT_READ 1
#define PROT_WRITE 2
#define MAP_PRIVATE 2
#define MAP_ANONYMOUS 0x20
#define MAP_NORESERVE 0x4000
#define MAP_STACK 0x20000
#define RWF_NOWAIT 8 /* of preadv2(2) */
#define MADV_DONTNEED 4
#define MADV_DONTFORK 10
#define MADV_HUGEPAGE 14
#define MADV_DONTDUMP 16
#define KCMP_FILE 0
#define KCMP_VM 1
#define PRIO_PROCESS 0
#define CLOCK_MONOTONIC 1
#define SIGKILL 9
#define SIGTRAP 5
#define SIG_IGN 1
#define SIG_SETMASK 2

struct timespec64 {
  int64_t sec, nsec;
};
struct iovec64 {
  uint64_t base, len;
};
struct pollfd32 {
  int32_t fd;
  int16_t events, revents;
};
struct sockaddr_unix {
  uint16_t family;
  char path[108];
};
struct ucred32 {
  int32_t pid;
  uint32_t uid, gid;
};
struct msghdr64 {
  void *name;
  int32_t name_length;
  int32_t pad1;
  struct iovec64 *iov;
  uint64_t iov_count;
  void *control;
  uint64_t control_length;
  int32_t flags;
  int32_t pad2;
};
struct cmsghdr64 {
  uint64_t length; /* of header and data */
  int32_t level, type;
};
/* struct sigaction of the kernel, not of a libc; sa_restorer is there on both architectures. */
struct kernel_sigaction {
  uint64_t handler, flags, restorer, mask;
};
struct rlimit64 {
  uint64_t soft, hard;
};

#define FD_COUNT_MAX 16

_Static_assert(sizeof(struct uffd_msg) == 32, "uffd_msg");
_Static_assert(offsetof(struct uffd_msg, arg.pagefault.address) == 16, "uffd_msg.address");
_Static_assert(offsetof(struct uffd_msg, arg.pagefault.ptid) == 24, "uffd_msg.ptid");
_Static_assert(sizeof(struct uffdio_copy) == 40, "uffdio_copy");
_Static_assert(sizeof(struct uffdio_fill) == 32, "uffdio_zeropage");
_Static_assert(sizeof(struct uffdio_register) == 32, "uffdio_register");
_Static_assert(sizeof(struct uffdio_move) == 40, "uffdio_move");
_Static_assert(sizeof(struct uffdio_api) == 24, "uffdio_api");
_Static_assert(sizeof(struct msghdr64) == 56, "msghdr");
_Static_assert(sizeof(struct cmsghdr64) == 16, "cmsghdr");
_Static_assert(sizeof(struct pollfd32) == 8, "pollfd");
_Static_assert(sizeof(struct sockaddr_unix) == 110, "sockaddr_un");
_Static_assert(sizeof(struct kernel_sigaction) == 32, "sigaction");

#endif
