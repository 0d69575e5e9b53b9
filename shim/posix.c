/*
 * posix.c: descriptors, sockets, processes and memory; one function per system call.
 * No function keeps state or retries. Both architectures have only the newer calls (openat, ppoll,
 * pidfd_*).
 */
#include "fsl_shim.h"
#include "kernel.h"

/* ---- descriptors ---- */

int32_t fsl_open(const char *path, int32_t flags, int32_t mode) {
  return (int32_t)sys(NR_openat, AT_FDCWD, path, flags, mode);
}

int32_t fsl_close(fd_t fd) {
  return (int32_t)sys(NR_close, fd);
}

int32_t fsl_dup(fd_t fd, int32_t minimum) {
  return (int32_t)sys(NR_fcntl, fd, F_DUPFD_CLOEXEC, minimum);
}

int32_t fsl_fcntl(fd_t fd, int32_t command, num_t argument) {
  return (int32_t)sys(NR_fcntl, fd, command, (int64_t)argument);
}

num_t fsl_ioctl(fd_t fd, num_t request, num_t argument) {
  return (num_t)sys(NR_ioctl, fd, (uint64_t)request, (uint64_t)argument);
}

int32_t fsl_flock(fd_t fd, int32_t operation) {
  return (int32_t)sys(NR_flock, fd, operation);
}

int32_t fsl_eventfd(int32_t initial, int32_t flags) {
  return (int32_t)sys(NR_eventfd2, initial, flags);
}

int32_t fsl_memfd_create(const char *name, int32_t flags) {
  return (int32_t)sys(NR_memfd_create, name, flags);
}

int32_t fsl_ftruncate(fd_t fd, num_t length) {
  return (int32_t)sys(NR_ftruncate, fd, (int64_t)length);
}

int32_t fsl_fallocate(fd_t fd, int32_t mode, num_t offset, num_t length) {
  return (int32_t)sys(NR_fallocate, fd, mode, (int64_t)offset, (int64_t)length);
}

int32_t fsl_fadvise(fd_t fd, num_t offset, num_t length, int32_t advice) {
  return (int32_t)sys(NR_fadvise64, fd, (int64_t)offset, (int64_t)length, advice);
}

num_t fsl_lseek(fd_t fd, num_t offset, int32_t whence) {
  return (num_t)sys(NR_lseek, fd, (int64_t)offset, whence);
}

num_t fsl_read(fd_t fd, void *buffer, num_t length) {
  return (num_t)sys(NR_read, fd, buffer, (uint64_t)length);
}

num_t fsl_write(fd_t fd, const void *buffer, num_t length) {
  return (num_t)sys(NR_write, fd, buffer, (uint64_t)length);
}

num_t fsl_pread(fd_t fd, num_t buffer_addr, num_t length, num_t offset) {
  return (num_t)sys(NR_pread64, fd, (uint64_t)buffer_addr, (uint64_t)length, (int64_t)offset);
}

num_t fsl_pread_at_hand(fd_t fd, num_t buffer_addr, num_t length, num_t offset) {
  struct iovec64 part = {(uint64_t)buffer_addr, (uint64_t)length};
  return (num_t)sys(NR_preadv2, fd, &part, 1, (int64_t)offset, 0, RWF_NOWAIT);
}

num_t fsl_pwrite(fd_t fd, num_t buffer_addr, num_t length, num_t offset) {
  return (num_t)sys(NR_pwrite64, fd, (uint64_t)buffer_addr, (uint64_t)length, (int64_t)offset);
}

int32_t fsl_poll(const int32_t *fds, int32_t *revents, int32_t count, int32_t events,
                 int32_t timeout_ms) {
  struct pollfd32 polled[FD_COUNT_MAX];
  struct timespec64 timeout = {timeout_ms / 1000, (int64_t)(timeout_ms % 1000) * 1000000};
  if (count < 0 || count > FD_COUNT_MAX) return -EINVAL;
  for (int32_t i = 0; i < count; i++) {
    polled[i].fd = fds[i];
    polled[i].events = (int16_t)events;
    polled[i].revents = 0;
  }
  long result =
      sys(NR_ppoll, polled, count, timeout_ms < 0 ? (struct timespec64 *)0 : &timeout, 0, 0);
  for (int32_t i = 0; i < count; i++) revents[i] = result < 0 ? 0 : (uint16_t)polled[i].revents;
  return (int32_t)result;
}

/* ---- unix sockets ---- */

/* Returns the length of the address, or -ENAMETOOLONG. A path is at most 107 bytes and its NUL. */
static int32_t unix_address(struct sockaddr_unix *address, const char *path) {
  uint32_t length = 0;
  address->family = AF_UNIX;
  while (path[length] != 0) {
    if (length + 1 >= sizeof(address->path)) return -ENAMETOOLONG;
    address->path[length] = path[length];
    length++;
  }
  address->path[length] = 0;
  return (int32_t)(offsetof(struct sockaddr_unix, path) + length + 1);
}

int32_t fsl_socketpair(int32_t type, int32_t *out) {
  return (int32_t)sys(NR_socketpair, AF_UNIX, type | SOCK_CLOEXEC, 0, out);
}

int32_t fsl_unix_listen(const char *path, int32_t backlog) {
  struct sockaddr_unix address;
  int32_t length = unix_address(&address, path);
  if (length < 0) return length;
  long fd = sys(NR_socket, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return (int32_t)fd;
  long result = sys(NR_bind, fd, &address, length);
  if (result == 0) result = sys(NR_listen, fd, backlog);
  if (result == 0) return (int32_t)fd;
  sys(NR_close, fd);
  return (int32_t)result;
}

int32_t fsl_unix_connect(const char *path) {
  struct sockaddr_unix address;
  int32_t length = unix_address(&address, path);
  if (length < 0) return length;
  /* Non-blocking for as long as connect(2) takes: a listener whose backlog is full makes it wait. */
  long fd = sys(NR_socket, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return (int32_t)fd;
  long result = sys(NR_connect, fd, &address, length);
  if (result == 0) result = sys(NR_fcntl, fd, F_SETFL, 0);
  if (result == 0) return (int32_t)fd;
  sys(NR_close, fd);
  return (int32_t)result;
}

int32_t fsl_unix_is_bound(const char *path) {
  struct sockaddr_unix address;
  int32_t length = unix_address(&address, path);
  if (length < 0) return length;
  /* Of another type: the kernel looks for the owner first, and then refuses. */
  long fd = sys(NR_socket, AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return (int32_t)fd;
  long result = sys(NR_connect, fd, &address, length);
  sys(NR_close, fd);
  return result == -EPROTOTYPE ? 0 : (int32_t)result;
}

int32_t fsl_unix_accept(fd_t listener) {
  return (int32_t)sys(NR_accept4, listener, 0, 0, SOCK_CLOEXEC);
}

/* Room for the control message that carries the most descriptors. */
struct control {
  struct cmsghdr64 header;
  int32_t fds[FD_COUNT_MAX];
};

num_t fsl_send(fd_t socket, const void *buffer, num_t length, const int32_t *fds, int32_t fd_count,
               int32_t flags) {
  struct control control;
  struct iovec64 part = {(uint64_t)(uintptr_t)buffer, (uint64_t)length};
  struct msghdr64 message = {.iov = &part, .iov_count = 1};
  if (fd_count < 0 || fd_count > FD_COUNT_MAX) return -EINVAL;
  if (fd_count > 0) {
    control.header.length = sizeof(control.header) + (uint64_t)fd_count * sizeof(int32_t);
    control.header.level = SOL_SOCKET;
    control.header.type = SCM_RIGHTS;
    for (int32_t i = 0; i < fd_count; i++) control.fds[i] = fds[i];
    message.control = &control;
    message.control_length = control.header.length;
  }
  return (num_t)sys(NR_sendmsg, socket, &message, flags | MSG_NOSIGNAL);
}

num_t fsl_recv(fd_t socket, void *buffer, num_t length, int32_t *fds, int32_t fd_capacity,
               int32_t *out, int32_t flags) {
  struct control control;
  struct iovec64 part = {(uint64_t)(uintptr_t)buffer, (uint64_t)length};
  struct msghdr64 message = {.iov = &part, .iov_count = 1};
  out[0] = 0;
  out[1] = 0;
  if (fd_capacity < 0 || fd_capacity > FD_COUNT_MAX) return -EINVAL;
  if (fd_capacity > 0) {
    /*
     * Exactly as much as the caller can hold: what does not fit is dropped by the kernel, which
     * says MSG_CTRUNC.
     */
    message.control = &control;
    message.control_length = sizeof(control.header) + (uint64_t)fd_capacity * sizeof(int32_t);
  }
  long result = sys(NR_recvmsg, socket, &message, flags | MSG_CMSG_CLOEXEC);
  if (result < 0) return (num_t)result;
  out[1] = message.flags;
  if (message.control_length >= sizeof(control.header) && control.header.level == SOL_SOCKET &&
      control.header.type == SCM_RIGHTS) {
    uint64_t count = (control.header.length - sizeof(control.header)) / sizeof(int32_t);
    for (uint64_t i = 0; i < count && i < (uint64_t)fd_capacity; i++) fds[i] = control.fds[i];
    out[0] = (int32_t)count;
  }
  return (num_t)result;
}

int32_t fsl_peer_credentials(fd_t socket, int32_t *out) {
  struct ucred32 credentials = {0, 0, 0};
  uint32_t length = sizeof(credentials);
  long result = sys(NR_getsockopt, socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length);
  out[0] = credentials.pid;
  out[1] = (int32_t)credentials.uid;
  out[2] = (int32_t)credentials.gid;
  return (int32_t)result;
}

int32_t fsl_peer_pidfd(fd_t socket) {
  int32_t pidfd = -1;
  uint32_t length = sizeof(pidfd);
  long result = sys(NR_getsockopt, socket, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &length);
  return result < 0 ? (int32_t)result : pidfd;
}

/* ---- processes ---- */

int32_t fsl_pidfd_open(int32_t pid, int32_t flags) {
  return (int32_t)sys(NR_pidfd_open, pid, flags);
}

int32_t fsl_pidfd_getfd(fd_t pidfd, int32_t target_fd) {
  return (int32_t)sys(NR_pidfd_getfd, pidfd, target_fd, 0);
}

int32_t fsl_pidfd_send_signal(fd_t pidfd, int32_t signal) {
  return (int32_t)sys(NR_pidfd_send_signal, pidfd, signal, 0, 0);
}

int32_t fsl_kcmp_file(int32_t pid1, int32_t pid2, int32_t fd1, int32_t fd2) {
  return (int32_t)sys(NR_kcmp, pid1, pid2, KCMP_FILE, fd1, fd2);
}

int32_t fsl_kcmp_vm(int32_t pid1, int32_t pid2) {
  return (int32_t)sys(NR_kcmp, pid1, pid2, KCMP_VM, 0, 0);
}

num_t fsl_process_vm_readv(int32_t pid, num_t remote_addr, num_t local_addr, num_t length) {
  struct iovec64 local = {(uint64_t)local_addr, (uint64_t)length};
  struct iovec64 remote = {(uint64_t)remote_addr, (uint64_t)length};
  return (num_t)sys(NR_process_vm_readv, pid, &local, 1, &remote, 1, 0);
}

num_t fsl_process_vm_writev(int32_t pid, num_t remote_addr, num_t local_addr, num_t length) {
  struct iovec64 local = {(uint64_t)local_addr, (uint64_t)length};
  struct iovec64 remote = {(uint64_t)remote_addr, (uint64_t)length};
  return (num_t)sys(NR_process_vm_writev, pid, &local, 1, &remote, 1, 0);
}

num_t fsl_process_madvise(fd_t pidfd, num_t addr, num_t length, int32_t advice) {
  struct iovec64 range = {(uint64_t)addr, (uint64_t)length};
  return (num_t)sys(NR_process_madvise, pidfd, &range, 1, advice, 0);
}

int32_t fsl_gettid(void) {
  return (int32_t)sys(NR_gettid);
}

int32_t fsl_setpriority(int32_t tid, int32_t nice) {
  return (int32_t)sys(NR_setpriority, PRIO_PROCESS, tid, nice);
}

int32_t fsl_sched_setscheduler(int32_t tid, int32_t policy) {
  const int32_t priority = 0;
  return (int32_t)sys(NR_sched_setscheduler, tid, policy, &priority);
}

int32_t fsl_sched_setaffinity(int32_t tid, const void *mask, num_t mask_bytes) {
  return (int32_t)sys(NR_sched_setaffinity, tid, (uint64_t)mask_bytes, mask);
}

int32_t fsl_sched_getaffinity(int32_t tid, void *mask, num_t mask_bytes) {
  return (int32_t)sys(NR_sched_getaffinity, tid, (uint64_t)mask_bytes, mask);
}

int32_t fsl_set_mempolicy(int32_t mode, const void *nodes, num_t nodes_bits) {
  return (int32_t)sys(NR_set_mempolicy, mode, nodes, (uint64_t)nodes_bits);
}

int32_t fsl_prlimit(int32_t pid, int32_t resource, const uint64_t *limit, uint64_t *old_limit) {
  return (int32_t)sys(NR_prlimit64, pid, resource, limit, old_limit);
}

int32_t fsl_ignore_signal(int32_t signal) {
  struct kernel_sigaction action = {.handler = SIG_IGN};
  return (int32_t)sys(NR_rt_sigaction, signal, &action, 0, sizeof(action.mask));
}

int32_t fsl_waitpid(int32_t pid, int32_t options, int32_t *status) {
  return (int32_t)sys(NR_wait4, pid, status, options, 0);
}

/*
 * The host's libc asks the vDSO, which costs a tenth of the system call; faults are timed with this.
 * Weak: the library still loads where there is none.
 */
extern int clock_gettime(int clock, struct timespec64 *now)
    __attribute__((weak, visibility("default")));

num_t fsl_clock_ns(void) {
  struct timespec64 now = {0, 0};
  if (&clock_gettime == (void *)0 || clock_gettime(CLOCK_MONOTONIC, &now) != 0) {
    sys(NR_clock_gettime, CLOCK_MONOTONIC, &now);
  }
  return (num_t)(now.sec * 1000000000 + now.nsec);
}

/* ---- memory of this process ---- */

num_t fsl_mmap(num_t addr, num_t length, int32_t prot, int32_t flags, fd_t fd, num_t offset) {
  return (num_t)sys(NR_mmap, (uint64_t)addr, (uint64_t)length, prot, flags, fd,
                    (int64_t)offset);
}

int32_t fsl_munmap(num_t addr, num_t length) {
  return (int32_t)sys(NR_munmap, (uint64_t)addr, (uint64_t)length);
}

int32_t fsl_madvise(num_t addr, num_t length, int32_t advice) {
  return (int32_t)sys(NR_madvise, (uint64_t)addr, (uint64_t)length, advice);
}

int32_t fsl_mincore(num_t addr, num_t length, void *vector) {
  return (int32_t)sys(NR_mincore, (uint64_t)addr, (uint64_t)length, vector);
}
