/*
 * fsl_shim.h: raw system calls for TypeScript, and nothing else.
 *
 * The library is free-standing (no libc, no NEEDED entries): one file serves glibc and musl hosts.
 * No function keeps state, allocates, logs, retries or calls back. The one exception in all of that
 * is fsl_remote_syscall, which has a thread and a stack of its own for as long as it runs.
 *
 * Calling convention, chosen for bun:ffi:
 *   fd_t   int32_t   descriptors, pids, flags, small counts
 *   num_t  double    addresses, lengths, file offsets (exact below 2^53), 64-bit results
 *   ptr    void *    memory owned by TypeScript: a typed array that the caller keeps referenced
 * Every function returns >= 0, or -errno. EINTR is returned, never looped on.
 */
#ifndef FSL_SHIM_H
#define FSL_SHIM_H

#include <stdint.h>

typedef int32_t fd_t;
typedef double num_t;

#define FSL_EXPORT __attribute__((visibility("default")))

/*
 * Sizes, offsets and constants as the compiler saw them, for comparison with src/sys/abi.ts.
 * Writes at most `capacity` values, returns how many there are.
 */
FSL_EXPORT int32_t fsl_abi(uint64_t *out, int32_t capacity);

/* ---- userfaultfd(2), ioctl_userfaultfd(2) ---- */

/* A descriptor; EPERM without privilege, ENOSYS in a kernel without it, EMFILE. */
FSL_EXPORT int32_t fsl_userfaultfd(int32_t flags);
/* USERFAULTFD_IOC_NEW on an open /dev/userfaultfd (Linux 6.1). */
FSL_EXPORT int32_t fsl_userfaultfd_dev(fd_t dev, int32_t flags);
/* out[0] = features granted, out[1] = ioctls. EINVAL: unknown feature, or done before. */
FSL_EXPORT int32_t fsl_uffd_api(fd_t uffd, num_t features, uint64_t *out);
/* mode: 1 MISSING, 2 WP, 4 MINOR. out[0] = ioctls that the range accepts. */
FSL_EXPORT int32_t fsl_uffd_register(fd_t uffd, num_t addr, num_t length, int32_t mode,
                                     uint64_t *out);
FSL_EXPORT int32_t fsl_uffd_unregister(fd_t uffd, num_t addr, num_t length);
/*
 * COPY, ZEROPAGE, POISON: the kernel's *signed* result field decides. Bytes done (> 0,
 * maybe fewer than length), or -errno when nothing was done: EEXIST EAGAIN ENOENT ESRCH EFAULT
 * ENOMEM.
 */
FSL_EXPORT num_t fsl_uffd_copy(fd_t uffd, num_t dst, num_t src, num_t length, int32_t mode);
FSL_EXPORT num_t fsl_uffd_zeropage(fd_t uffd, num_t addr, num_t length, int32_t mode);
FSL_EXPORT num_t fsl_uffd_poison(fd_t uffd, num_t addr, num_t length, int32_t mode);
FSL_EXPORT int32_t fsl_uffd_wake(fd_t uffd, num_t addr, num_t length);

/* ---- descriptors ---- */

/* openat(2) from the working directory. O_CLOEXEC is the caller's business. */
FSL_EXPORT int32_t fsl_open(const char *path, int32_t flags, int32_t mode);
FSL_EXPORT int32_t fsl_close(fd_t fd);
/* F_DUPFD_CLOEXEC */
FSL_EXPORT int32_t fsl_dup(fd_t fd, int32_t minimum);
/* Commands with a number as argument: leases, seals, flags. */
FSL_EXPORT int32_t fsl_fcntl(fd_t fd, int32_t command, num_t argument);
/* argument: a value or an address. */
FSL_EXPORT num_t fsl_ioctl(fd_t fd, num_t request, num_t argument);
/* operation: 1 SH, 2 EX, 4 NB, 8 UN. */
FSL_EXPORT int32_t fsl_flock(fd_t fd, int32_t operation);
FSL_EXPORT int32_t fsl_eventfd(int32_t initial, int32_t flags);
FSL_EXPORT int32_t fsl_memfd_create(const char *name, int32_t flags);
FSL_EXPORT int32_t fsl_ftruncate(fd_t fd, num_t length);
FSL_EXPORT int32_t fsl_fallocate(fd_t fd, int32_t mode, num_t offset, num_t length);
/* posix_fadvise(2): 3 WILLNEED, 4 DONTNEED. */
FSL_EXPORT int32_t fsl_fadvise(fd_t fd, num_t offset, num_t length, int32_t advice);
/* whence 3 is SEEK_DATA, 4 SEEK_HOLE. */
FSL_EXPORT num_t fsl_lseek(fd_t fd, num_t offset, int32_t whence);
FSL_EXPORT num_t fsl_read(fd_t fd, void *buffer, num_t length);
FSL_EXPORT num_t fsl_write(fd_t fd, const void *buffer, num_t length);
/* These two take the memory by its address. */
FSL_EXPORT num_t fsl_pread(fd_t fd, num_t buffer_addr, num_t length, num_t offset);
/* What can be had without waiting for a disk: preadv2(2), RWF_NOWAIT. */
FSL_EXPORT num_t fsl_pread_at_hand(fd_t fd, num_t buffer_addr, num_t length, num_t offset);
FSL_EXPORT num_t fsl_pwrite(fd_t fd, num_t buffer_addr, num_t length, num_t offset);
/*
 * poll(2) on up to 16 descriptors; negative ones are skipped. fds[i] in, revents[i] out; `events` is
 * the same for all (1 = POLLIN). timeout -1 = none.
 */
FSL_EXPORT int32_t fsl_poll(const int32_t *fds, int32_t *revents, int32_t count, int32_t events,
                            int32_t timeout_ms);

/* ---- unix sockets; every descriptor made here is close-on-exec ---- */

FSL_EXPORT int32_t fsl_socketpair(int32_t type, int32_t *out);
/*
 * socket + bind + listen; socket + connect, which does not wait: EAGAIN when the backlog is full.
 * ENAMETOOLONG: more than 107 bytes.
 */
FSL_EXPORT int32_t fsl_unix_listen(const char *path, int32_t backlog);
FSL_EXPORT int32_t fsl_unix_connect(const char *path);
/*
 * 0 when somebody has a stream socket bound to the path, -ECONNREFUSED when its owner is gone. Who
 * has it notices nothing: no connection comes about.
 */
FSL_EXPORT int32_t fsl_unix_is_bound(const char *path);
FSL_EXPORT int32_t fsl_unix_accept(fd_t listener);
/*
 * sendmsg(2) of one buffer and up to 16 descriptors (fd_count may be 0), never with SIGPIPE. Returns
 * bytes sent.
 */
FSL_EXPORT num_t fsl_send(fd_t socket, const void *buffer, num_t length, const int32_t *fds,
                          int32_t fd_count, int32_t flags);
/*
 * recvmsg(2). Received descriptors go to fds[0..fd_capacity); out[0] = their number, out[1] =
 * msg_flags (8 = MSG_CTRUNC: more came than fit, and they are closed). Returns bytes received.
 */
FSL_EXPORT num_t fsl_recv(fd_t socket, void *buffer, num_t length, int32_t *fds,
                          int32_t fd_capacity, int32_t *out, int32_t flags);
/* SO_PEERCRED: out[0] pid, out[1] uid, out[2] gid. */
FSL_EXPORT int32_t fsl_peer_credentials(fd_t socket, int32_t *out);
/* SO_PEERPIDFD, Linux 6.5. */
FSL_EXPORT int32_t fsl_peer_pidfd(fd_t socket);

/* ---- processes ---- */

FSL_EXPORT int32_t fsl_pidfd_open(int32_t pid, int32_t flags);
FSL_EXPORT int32_t fsl_pidfd_getfd(fd_t pidfd, int32_t target_fd);
FSL_EXPORT int32_t fsl_pidfd_send_signal(fd_t pidfd, int32_t signal);
/* kcmp(2) KCMP_FILE: 0 same open file, 1 to 3 different. */
FSL_EXPORT int32_t fsl_kcmp_file(int32_t pid1, int32_t pid2, int32_t fd1, int32_t fd2);
/* kcmp(2) KCMP_VM: 0 one address space, 1 to 3 two. */
FSL_EXPORT int32_t fsl_kcmp_vm(int32_t pid1, int32_t pid2);
FSL_EXPORT num_t fsl_process_vm_readv(int32_t pid, num_t remote_addr, num_t local_addr,
                                      num_t length);
FSL_EXPORT num_t fsl_process_vm_writev(int32_t pid, num_t remote_addr, num_t local_addr,
                                       num_t length);
/* Returns bytes advised. */
FSL_EXPORT num_t fsl_process_madvise(fd_t pidfd, num_t addr, num_t length, int32_t advice);
FSL_EXPORT int32_t fsl_gettid(void);
/* PRIO_PROCESS of one thread. */
FSL_EXPORT int32_t fsl_setpriority(int32_t tid, int32_t nice);
/* Of one thread, to a policy without priorities: SCHED_OTHER, SCHED_IDLE. */
FSL_EXPORT int32_t fsl_sched_setscheduler(int32_t tid, int32_t policy);
FSL_EXPORT int32_t fsl_sched_setaffinity(int32_t tid, const void *mask, num_t mask_bytes);
/* Returns the bytes of the mask that were written. */
FSL_EXPORT int32_t fsl_sched_getaffinity(int32_t tid, void *mask, num_t mask_bytes);
FSL_EXPORT int32_t fsl_set_mempolicy(int32_t mode, const void *nodes, num_t nodes_bits);
/* prlimit64(2): {soft, hard} pairs; either pointer may be null. */
FSL_EXPORT int32_t fsl_prlimit(int32_t pid, int32_t resource, const uint64_t *limit,
                               uint64_t *old_limit);
/* rt_sigaction SIG_IGN. */
FSL_EXPORT int32_t fsl_ignore_signal(int32_t signal);
FSL_EXPORT int32_t fsl_waitpid(int32_t pid, int32_t options, int32_t *status);
/* CLOCK_MONOTONIC, ns. */
FSL_EXPORT num_t fsl_clock_ns(void);

/* ---- memory of this process ---- */

FSL_EXPORT num_t fsl_mmap(num_t addr, num_t length, int32_t prot, int32_t flags, fd_t fd,
                          num_t offset);
FSL_EXPORT int32_t fsl_munmap(num_t addr, num_t length);
FSL_EXPORT int32_t fsl_madvise(num_t addr, num_t length, int32_t advice);
FSL_EXPORT int32_t fsl_mincore(num_t addr, num_t length, void *vector);

/* ---- one system call inside another process, by ptrace (shim/remote.c) ---- */

/*
 * Has the main thread of `pid` make `syscall number(args[0..6))`; result[0] = what it returned.
 * Interrupted calls are made again. Returns 0 when the call was made, or -errno when it was not and
 * the target is as before:
 *   EPERM      no right to trace it, or somebody else does
 *   ESRCH      it has ended
 *   EBUSY      it is stopped by a signal (SIGSTOP, SIGTSTP ...)
 *   ETIMEDOUT  its main thread did not come to a stop within `timeout_ms`
 *   ENOEXEC    it has no vDSO, or is a 32-bit process
 *   EIO        it was elsewhere than it was sent
 * `at` is the address of a system call instruction in the target, or 0 for one of its vDSO's. It matters for
 * clone(2) alone: the new task goes on behind it.
 */
FSL_EXPORT int32_t fsl_remote_syscall(int32_t pid, int32_t number, const uint64_t *args,
                                      int64_t *result, int32_t timeout_ms, num_t at);

#endif
