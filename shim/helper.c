/*
 * helper.c: tasks that share the memory of the program that fsl starts, and make system calls for
 * fsl there. UFFDIO_MOVE needs one: the kernel moves pages only within the caller's address space.
 *
 * What a helper is: a process of its own (own pid, descriptors, signals) in the program's address
 * space, by clone(CLONE_VM), made before the program's main(). It is a child of fsl (CLONE_PARENT), or
 * of init where the program ran already (preload.c), and no thread of the program: it is not in the
 * program's /proc/PID/task, takes none of its signals, does not count in its `exit`, and whatever
 * the program does to its own threads (seccomp with TSYNC, setuid, daemonising) does not reach it.
 *
 * What it does: it waits for a request, makes the system calls that the request lists, answers.
 * Mechanism only; what is called with which arguments is fsl's business.
 *
 * What keeps it harmless. It holds the program's memory, so it must not outlive the program, and it
 * is of no use without fsl:
 *   - fsl dies: the socket's end, and PR_SET_PDEATHSIG where it is a child of fsl;
 *   - the program dies: its pidfd becomes readable, and the helper ends before it looks at another
 *     request. Only then is the memory free, so a call that blocks for long keeps all of it;
 *   - it holds three descriptors and what fsl sends later, so it keeps no pipe or lock open;
 *   - all signals are blocked (Ctrl-C goes to the whole process group), and it dumps no core;
 *   - no capabilities, no new privileges, and a seccomp filter: a program that breaks into its own
 *     helper gains nothing that it does not have.
 *
 * Memory of it all, one mapping, not in forked children and not in core dumps:
 *   guard | staging slots, 2 MiB aligned, huge pages | guard | stack | guard | stack | guard ...
 *
 * @source Linux mm/userfaultfd.c move_pages; clone(2), prctl(2) PR_SET_PDEATHSIG (what clears it),
 *         seccomp(2)
 */
#include "helper.h"

#include "task.h"

#define CLONE_PARENT 0x00008000ul
#define PR_SET_PDEATHSIG 1
#define PR_SET_NAME 15
#define PR_SET_SECCOMP 22
#define PR_SET_NO_NEW_PRIVS 38
#define SECCOMP_MODE_FILTER 2
#define RLIMIT_CORE 4
#define CAPABILITY_VERSION_3 0x20080522u

#define HUGE_PAGE_BYTES (2ul << 20)
#define PAGE_BYTES 4096ul
/* Multiples of the largest page of either architecture, 64 KiB. */
#define GUARD_BYTES (64ul << 10)
#define STACK_BYTES (64ul << 10)
/* A helper is ready in 0.1 ms. Nothing waits for one that is not. */
#define READY_TIMEOUT_NS 500000000

/* At the bottom of the helper's stack: what it is started with. */
struct start {
  int32_t socket, uffd, target_pid, parent_pid;
  uint64_t staging_addr, staging_bytes;
};

struct control {
  struct cmsghdr64 header;
  int32_t fds[FD_COUNT_MAX];
};

/* ---- seccomp ---- */

struct bpf_instruction {
  uint16_t code;
  uint8_t if_true, if_false;
  uint32_t value;
};
struct bpf_program {
  uint16_t count;
  struct bpf_instruction *instructions;
};

#define BPF_LOAD 0x20  /* BPF_LD | BPF_W | BPF_ABS */
#define BPF_EQUAL 0x15 /* BPF_JMP | BPF_JEQ | BPF_K */
#define BPF_AND 0x54   /* BPF_ALU | BPF_AND | BPF_K */
#define BPF_RETURN 0x06
#define SECCOMP_ALLOW 0x7fff0000u
#define SECCOMP_KILL 0x80000000u
/* struct seccomp_data; the low half of args[1] on little-endian hosts. */
#define DATA_NUMBER 0
#define DATA_ARCH 4
#define DATA_ARG1_LOW 24
#define AUDIT_ARCH BY_ARCH(0xc000003eu, 0xc00000b7u)

static const uint16_t allowed[] = {
    NR_recvmsg, NR_sendmsg, NR_write,      NR_read, NR_pread64,         NR_madvise,
    NR_ppoll,   NR_close,   NR_exit_group, NR_exit, NR_restart_syscall, NR_rt_sigreturn, NR_munmap,
};
#define ALLOWED_COUNT (sizeof(allowed) / sizeof(allowed[0]))

/* Only the calls above and userfaultfd's ioctls; anything else ends the helper. Returns -errno. */
static long install_filter(void) {
  struct bpf_instruction code[ALLOWED_COUNT + 16];
  uint32_t at = 0;
  const uint8_t to_allow = ALLOWED_COUNT + 5;
  code[at++] = (struct bpf_instruction){BPF_LOAD, 0, 0, DATA_ARCH};
  code[at++] = (struct bpf_instruction){BPF_EQUAL, 1, 0, AUDIT_ARCH};
  code[at++] = (struct bpf_instruction){BPF_RETURN, 0, 0, SECCOMP_KILL};
  code[at++] = (struct bpf_instruction){BPF_LOAD, 0, 0, DATA_NUMBER};
  for (uint32_t i = 0; i < ALLOWED_COUNT; i++) {
    code[at++] = (struct bpf_instruction){BPF_EQUAL, (uint8_t)(to_allow - i - 1), 0, allowed[i]};
  }
  code[at++] = (struct bpf_instruction){BPF_EQUAL, 0, 3, NR_ioctl};
  code[at++] = (struct bpf_instruction){BPF_LOAD, 0, 0, DATA_ARG1_LOW};
  code[at++] = (struct bpf_instruction){BPF_AND, 0, 0, 0xff00};
  code[at++] = (struct bpf_instruction){BPF_EQUAL, 1, 0, UFFDIO_MOVE & 0xff00};
  code[at++] = (struct bpf_instruction){BPF_RETURN, 0, 0, SECCOMP_KILL};
  code[at++] = (struct bpf_instruction){BPF_RETURN, 0, 0, SECCOMP_ALLOW};
  struct bpf_program program = {(uint16_t)at, code};
  return sys(NR_prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0);
}

/* ---- becoming a helper ---- */

/* Closes every descriptor but these three. Returns -errno. */
static long close_all_but(int32_t a, int32_t b, int32_t c) {
  int32_t kept[3] = {a, b, c};
  for (int32_t round = 0; round < 2; round++) {
    for (int32_t i = 0; i < 2; i++) {
      if (kept[i] < kept[i + 1]) continue;
      const int32_t higher = kept[i];
      kept[i] = kept[i + 1];
      kept[i + 1] = higher;
    }
  }
  uint32_t first = 0;
  for (int32_t i = 0; i <= 3; i++) {
    const uint32_t end = i < 3 ? (uint32_t)kept[i] : 0xffffffffu;
    const long result = end > first ? sys(NR_close_range, first, end - 1, 0) : 0;
    if (result < 0) return result;
    first = end + 1;
  }
  return 0;
}

/* Gives up all that a helper does not need. Returns its pidfd of the program, or -errno. */
static long settle(const struct start *start) {
  sys(NR_prctl, PR_SET_NAME, "fsl-helper", 0, 0, 0);
  const long pidfd = sys(NR_pidfd_open, start->target_pid, 0);
  if (pidfd < 0) return pidfd;
  long result = close_all_but(start->socket, start->uffd, (int32_t)pidfd);
  if (result < 0) return result;
  /*
   * A core would be the whole guest. 1 and not 0: where cores go to a program, 0 does not hold them
   * back, and 1 does (core(5)). May be refused, which is no reason to stop.
   */
  const struct rlimit64 no_core = {1, 1};
  sys(NR_prlimit64, 0, RLIMIT_CORE, &no_core, 0);
  result = sys(NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  if (result < 0) return result;
  const uint32_t capability_header[2] = {CAPABILITY_VERSION_3, 0};
  const uint32_t no_capabilities[6] = {0, 0, 0, 0, 0, 0};
  result = sys(NR_capset, capability_header, no_capabilities);
  if (result < 0) return result;
  if (start->parent_pid != 0) {
    /* From here on nothing changes the credentials, which would clear this. */
    result = sys(NR_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    if (result < 0) return result;
    if (sys(NR_getppid) != start->parent_pid) return -ESRCH;
  }
  result = install_filter();
  return result < 0 ? result : pidfd;
}

/* ---- serving ---- */

/* Whether another request waits, or fsl has gone away. */
static int32_t is_wanted(int32_t socket) {
  struct pollfd32 polled = {socket, POLLIN, 0};
  const struct timespec64 at_once = {0, 0};
  return sys(NR_ppoll, &polled, 1, &at_once, 0, 0) > 0;
}

static long move(const uint64_t *args) {
  struct uffdio_move request = {args[1], args[2], args[3], args[4], 0};
  const long result = sys(NR_ioctl, args[0], UFFDIO_MOVE, &request);
  return request.move != 0 ? request.move : result;
}

static long clear(uint64_t addr, uint64_t bytes) {
  for (uint64_t page = addr; page < addr + bytes; page += PAGE_BYTES) {
    const uint64_t *words = (const uint64_t *)(uintptr_t)page;
    uint64_t any = 0;
    for (uint32_t i = 0; i < PAGE_BYTES / sizeof(uint64_t); i++) any |= words[i];
    if (any == 0) continue;
    /* Volatile: memset would go byte by byte here (memory.c). */
    volatile uint64_t *out = (volatile uint64_t *)(uintptr_t)page;
    for (uint32_t i = 0; i < PAGE_BYTES / sizeof(uint64_t); i++) out[i] = 0;
  }
  return (long)bytes;
}

static long make_call(const struct helper_call *call) {
  uint64_t args[6];
  for (uint32_t i = 0; i < 6; i++) args[i] = (uint64_t)(int64_t)call->args[i];
  if (call->number == HELPER_CLEAR) return clear(args[0], args[1]);
  if (call->number == HELPER_MOVE) return move(args);
  if (call->number == HELPER_TOUCH) {
    *(volatile uint8_t *)(uintptr_t)args[0] = 0;
    return 0;
  }
  return sys(call->number, args[0], args[1], args[2], args[3], args[4], args[5]);
}

static void make_calls(int32_t socket, const struct helper_request *request,
                       struct helper_reply *reply) {
  for (uint32_t i = 0; i < request->call_count; i++) {
    if (i > 0 && (request->flags & HELPER_YIELDS) != 0 && is_wanted(socket)) return;
    const struct helper_call *call = &request->calls[i];
    const long result = make_call(call);
    reply->results[i] = (double)result;
    reply->calls_made = (int32_t)i + 1;
    if ((call->flags & HELPER_STOP_IF_NEGATIVE) != 0 && result < 0) return;
    if ((call->flags & HELPER_STOP_UNLESS_EXPECTED) != 0 && (double)result != call->expected) return;
  }
}

/* Receives one request and answers it. Returns 0 to go on; anything else ends the helper. */
static long serve(int32_t socket) {
  struct helper_request request;
  struct helper_reply reply;
  struct control control;
  struct iovec64 part = {(uint64_t)(uintptr_t)&request, sizeof(request)};
  struct msghdr64 message = {.iov = &part,
                             .iov_count = 1,
                             .control = &control,
                             .control_length = sizeof(control)};
  long result = sys(NR_recvmsg, socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (result == -EAGAIN || result == -EINTR) return 0;
  /* 0 is the end: fsl has closed its socket, or has died. */
  if (result < (long)offsetof(struct helper_request, calls)) return -EIO;
  if (request.call_count > HELPER_CALLS_MAX) return -EIO;
  if (result != (long)offsetof(struct helper_request, calls[request.call_count])) return -EIO;

  reply.calls_made = 0;
  reply.fd_count = 0;
  for (uint32_t i = 0; i < FD_COUNT_MAX; i++) reply.fds[i] = -1;
  if (message.control_length >= sizeof(control.header) && control.header.level == SOL_SOCKET &&
      control.header.type == SCM_RIGHTS) {
    const uint64_t count = (control.header.length - sizeof(control.header)) / sizeof(int32_t);
    reply.fd_count = (int32_t)count;
    for (uint64_t i = 0; i < count && i < FD_COUNT_MAX; i++) reply.fds[i] = control.fds[i];
  }

  make_calls(socket, &request, &reply);

  const uint64_t length = offsetof(struct helper_reply, results[reply.calls_made]);
  struct iovec64 whole = {(uint64_t)(uintptr_t)&reply, length};
  struct msghdr64 answer = {.iov = &whole, .iov_count = 1};
  do {
    result = sys(NR_sendmsg, socket, &answer, MSG_NOSIGNAL);
  } while (result == -EINTR);
  return result < 0 ? result : 0;
}

static void helper_main(struct start *start) {
  const int32_t socket = start->socket;
  const long pidfd = settle(start);
  const int32_t ready = pidfd < 0 ? (int32_t)pidfd : 0;
  sys(NR_write, socket, &ready, sizeof(ready));
  while (pidfd >= 0) {
    struct pollfd32 polled[2] = {{socket, POLLIN, 0}, {(int32_t)pidfd, POLLIN, 0}};
    const long result = sys(NR_ppoll, polled, 2, 0, 0, 0);
    if (result < 0 && result != -EINTR) break;
    /* The program first: its memory is free when this task is gone. */
    if (result > 0 && polled[1].revents != 0) break;
    if (result > 0 && polled[0].revents != 0 && serve(socket) != 0) break;
  }
  /* Of what the program did not have before, this leaves some pages of stack, and guards. */
  sys(NR_munmap, start->staging_addr, start->staging_bytes);
  sys(NR_exit_group, 0);
}

/* ---- making helpers ---- */

/*
 * Maps staging memory of so many bytes, and stacks for `count` helpers. Returns the address of the
 * staging, or -errno.
 */
static long map_area(int32_t count, uint64_t staging_bytes) {
  const uint64_t bytes =
      GUARD_BYTES + staging_bytes + GUARD_BYTES + (uint64_t)count * (STACK_BYTES + GUARD_BYTES);
  const long mapped = sys(NR_mmap, 0, bytes + HUGE_PAGE_BYTES, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped < 0 && mapped > -4096) return mapped;
  const uint64_t from = (uint64_t)mapped;
  const uint64_t staging = (from + GUARD_BYTES + HUGE_PAGE_BYTES - 1) & ~(HUGE_PAGE_BYTES - 1);
  const uint64_t start = staging - GUARD_BYTES;
  const uint64_t end = start + bytes;
  if (start > from) sys(NR_munmap, from, start - from);
  if (from + bytes + HUGE_PAGE_BYTES > end) {
    sys(NR_munmap, end, from + bytes + HUGE_PAGE_BYTES - end);
  }
  sys(NR_madvise, start, bytes, MADV_DONTFORK);
  sys(NR_madvise, start, bytes, MADV_DONTDUMP);
  sys(NR_madvise, staging, staging_bytes, MADV_HUGEPAGE);
  long result = sys(NR_mprotect, staging, staging_bytes, PROT_READ | PROT_WRITE);
  for (int32_t i = 0; i < count && result == 0; i++) {
    const uint64_t stack =
        staging + staging_bytes + GUARD_BYTES + (uint64_t)i * (STACK_BYTES + GUARD_BYTES);
    result = sys(NR_mprotect, stack, STACK_BYTES, PROT_READ | PROT_WRITE);
  }
  if (result == 0) return (long)staging;
  sys(NR_munmap, start, bytes);
  return result;
}

/* Returns the helper's pid, or -errno. `stack` is its lowest address. Without a parent to name it is the caller's. */
static long start_helper(uint64_t stack, const struct start *start) {
  struct start *own = (struct start *)stack;
  *own = *start;
  uint64_t *top = (uint64_t *)(stack + STACK_BYTES) - 2;
  top[0] = (uint64_t)(uintptr_t)helper_main;
  top[1] = (uint64_t)(uintptr_t)own;
  return start_task(CLONE_VM | (start->parent_pid != 0 ? CLONE_PARENT : 0), top, (int32_t *)0);
}

/* Waits until the helper at the other end of the socket has said that it is ready. */
static int32_t is_ready(int32_t socket) {
  struct pollfd32 polled = {socket, POLLIN, 0};
  const struct timespec64 timeout = {0, READY_TIMEOUT_NS};
  int32_t ready = -EIO;
  if (sys(NR_ppoll, &polled, 1, &timeout, 0, 0) != 1) return 0;
  return sys(NR_read, socket, &ready, sizeof(ready)) == (long)sizeof(ready) && ready == 0;
}

int32_t make_helpers(const struct helpers_wanted *wanted, struct helper_record *records,
                     int32_t *sockets) {
  int32_t count = wanted->count, slots = wanted->slots;
  const int32_t uffd = wanted->uffd;
  if (count > HELPERS_MAX) count = HELPERS_MAX;
  if (slots < 1) slots = 1;
  if (slots > HELPER_SLOTS_MAX) slots = HELPER_SLOTS_MAX;
  uint64_t own_bytes = (uint64_t)slots * HELPER_SLOT_BYTES;
  long staging = map_area(count, (uint64_t)count * own_bytes);
  if (staging < 0 && staging > -4096) {
    own_bytes = HELPER_SLOT_BYTES;
    staging = map_area(count, (uint64_t)count * own_bytes);
  }
  if (staging < 0 && staging > -4096) return 0;
  const uint64_t stacks = (uint64_t)staging + (uint64_t)count * own_bytes + GUARD_BYTES;
  /* Helpers inherit the full mask. */
  const uint64_t all = ~(uint64_t)0;
  uint64_t mask = 0;
  sys(NR_rt_sigprocmask, SIG_SETMASK, &all, &mask, sizeof(mask));
  int32_t started = 0;
  for (; started < count; started++) {
    int32_t pair[2];
    if (sys(NR_socketpair, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) break;
    const uint64_t own_staging = (uint64_t)staging + (uint64_t)started * own_bytes;
    const struct start start = {pair[0],     uffd,     wanted->target_pid, wanted->parent_pid,
                                own_staging, own_bytes};
    const uint64_t stack = stacks + (uint64_t)started * (STACK_BYTES + GUARD_BYTES);
    const long task = start_helper(stack, &start);
    sys(NR_close, pair[0]);
    if (task < 0) {
      sys(NR_close, pair[1]);
      break;
    }
    records[started] = (struct helper_record){(int32_t)task, uffd, own_staging, own_bytes};
    sockets[started] = pair[1];
  }
  sys(NR_rt_sigprocmask, SIG_SETMASK, &mask, 0, sizeof(mask));
  /* One that is not ready ends when its socket is closed. */
  int32_t made = 0;
  for (int32_t i = 0; i < started; i++) {
    if (!is_ready(sockets[i])) {
      sys(NR_close, sockets[i]);
      continue;
    }
    records[made] = records[i];
    sockets[made++] = sockets[i];
  }
  return made;
}
