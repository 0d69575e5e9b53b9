/*
 * remote.c: one system call made by another process, by borrowing its main thread with ptrace for
 * under a millisecond.
 *
 * Who runs it. A tracer is a *thread*: only the thread that attached may act, and when it ends the
 * kernel detaches whatever it still traces, even a target that never stopped. So each call gets a
 * thread of its own (raw clone, own stack, no TLS: it calls nothing but this file) and waits for
 * its end. A tracer that lived on after a time-out would stop the target at the next event, for
 * good.
 *
 * Steps, each only when the one before is sure:
 *   1. find a system call instruction in the target's vDSO (nothing is written into its memory)
 *   2. PTRACE_SEIZE, PTRACE_INTERRUPT; signals that stop it first are delivered; a target in
 *      group-stop is refused
 *   3. save registers and signal mask, block every signal
 *   4. put number and arguments into the registers, run to the entry of the call and to its exit;
 *      the result counts only if the instruction pointer is right behind that instruction; EINTR
 *      and ERESTART* are tried again
 *   5. stop it once more *on the signal path* (PTRACE_INTERRUPT), restore, detach
 * Step 5: a main thread that sat in ppoll or nanosleep has -ERESTART* in its result register, and
 * the kernel turns that into a restart only on the signal path; anywhere else it would reach the
 * program. (Detaching happens to send the thread through that path in the kernels looked at.
 * Nothing promises it.)
 *
 * Stops are told apart by PTRACE_GETSIGINFO and not by wait(2): the target may be a child of this
 * very process, whose runtime waits for it on another thread, and neither may take the other's news
 * away.
 *
 * From step 4 on there is no way back but through step 5, so the deadline ends only the waiting
 * before it; a call that is in progress when it passes is interrupted, not abandoned.
 *
 * @source ptrace(2); Linux kernel/signal.c get_signal, arch/x86/kernel/signal.c and
 *         arch/arm64/kernel/signal.c do_signal
 */
#include "fsl_shim.h"
#include "kernel.h"
#include "task.h"

#define PTRACE_CONT 7
#define PTRACE_DETACH 17
#define PTRACE_SYSCALL 24
#define PTRACE_GETSIGINFO 0x4202
#define PTRACE_GETREGSET 0x4204
#define PTRACE_SETREGSET 0x4205
#define PTRACE_SEIZE 0x4206
#define PTRACE_INTERRUPT 0x4207
#define PTRACE_GETSIGMASK 0x420a
#define PTRACE_SETSIGMASK 0x420b
#define PTRACE_O_TRACESYSGOOD 1
#define PTRACE_EVENT_STOP 128
#define NT_PRSTATUS 1
#define NT_ARM_SYSTEM_CALL 0x404

#define PR_SET_TIMERSLACK 29

#define P_PID 1
#define WNOHANG 1
#define WEXITED 4
#define WNOWAIT 0x01000000
#define WNOTHREAD 0x20000000
#define CLD_EXITED 1
#define CLD_KILLED 2
#define CLD_DUMPED 3

#define CLONE_THREAD_FLAGS                                                              \
  (0x00000100 /* VM */ | 0x00000200 /* FS */ | 0x00000400 /* FILES */ |                 \
   0x00000800 /* SIGHAND */ | 0x00010000 /* THREAD */ | 0x00040000 /* SYSVSEM */ |      \
   0x00100000 /* PARENT_SETTID */)

#define AT_SYSINFO_EHDR 33
#define PT_LOAD 1
#define PF_X 1

/*
 * Limits: a vDSO is 1 to 4 pages; the retries are for interrupted calls, which cannot repeat while
 * signals are blocked.
 */
#define VDSO_BYTES_MAX (64 * 1024)
#define AUXV_BYTES_MAX 4096
#define ATTEMPTS_MAX 16
#define STACK_BYTES (64 * 1024)
#define POLL_PAUSE_NS 20000

struct siginfo_head {
  int32_t signo, error, code;
  uint8_t rest[116];
};

_Static_assert(sizeof(struct siginfo_head) == 128, "siginfo_t");

/* Only the head is read; the size is fixed by the ABI. */
struct elf64_header {
  uint8_t ident[16];
  uint16_t type, machine;
  uint32_t version;
  uint64_t entry, program_headers, section_headers;
  uint32_t flags;
  uint16_t header_bytes, program_header_bytes, program_header_count;
  uint16_t section_header_bytes, section_header_count, section_names;
};
struct elf64_program_header {
  uint32_t type, flags;
  uint64_t offset, virtual_addr, physical_addr, file_bytes, memory_bytes, align;
};

_Static_assert(sizeof(struct elf64_header) == 64, "Elf64_Ehdr");
_Static_assert(sizeof(struct elf64_program_header) == 56, "Elf64_Phdr");

struct request {
  int32_t pid;
  int32_t number;
  const uint64_t *args;
  int64_t *result;
  int64_t deadline_ns;
  /* A system call instruction in the target; 0: one is to be found. */
  uint64_t at;
  int32_t answer;
};

/* ---- registers ---- */

#if defined(__x86_64__)

#define ELF_MACHINE 62
#define INSTRUCTION_BYTES 2
#define INSTRUCTION_STEP 1

struct registers {
  uint64_t r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax;
  uint64_t rip, cs, eflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs;
};

_Static_assert(sizeof(struct registers) == 216, "user_regs_struct");

static int is_instruction(const uint8_t *at) {
  return at[0] == 0x0f && at[1] == 0x05;
}

static void set_call(struct registers *regs, uint64_t at, const struct request *request) {
  regs->rip = at;
  regs->rax = (uint64_t)(int64_t)request->number;
  regs->orig_rax = (uint64_t)-1; /* not in a system call: nothing to restart */
  regs->rdi = request->args[0];
  regs->rsi = request->args[1];
  regs->rdx = request->args[2];
  regs->r10 = request->args[3];
  regs->r8 = request->args[4];
  regs->r9 = request->args[5];
}

static uint64_t instruction_pointer(const struct registers *regs) {
  return regs->rip;
}

static int64_t result_of(const struct registers *regs) {
  return (int64_t)regs->rax;
}

#else

#define ELF_MACHINE 183
#define INSTRUCTION_BYTES 4
#define INSTRUCTION_STEP 4

struct registers {
  uint64_t x[31], sp, pc, pstate;
};

_Static_assert(sizeof(struct registers) == 272, "user_pt_regs");

static int is_instruction(const uint8_t *at) {
  return at[0] == 0x01 && at[1] == 0x00 && at[2] == 0x00 && at[3] == 0xd4; /* svc #0 */
}

static void set_call(struct registers *regs, uint64_t at, const struct request *request) {
  regs->pc = at;
  /*
   * BTYPE: a thread stopped right after an indirect branch would fault on an instruction that is
   * no landing pad.
   */
  regs->pstate &= ~((uint64_t)3 << 10);
  regs->x[8] = (uint64_t)(int64_t)request->number;
  for (int i = 0; i < 6; i++) regs->x[i] = request->args[i];
}

static uint64_t instruction_pointer(const struct registers *regs) {
  return regs->pc;
}

static int64_t result_of(const struct registers *regs) {
  return (int64_t)regs->x[0];
}

#endif

static long ptrace(long operation, int32_t pid, uint64_t addr, const void *data) {
  return sys(NR_ptrace, operation, pid, addr, data);
}

static long get_registers(int32_t pid, struct registers *regs) {
  struct iovec64 part = {(uint64_t)(uintptr_t)regs, sizeof(*regs)};
  return ptrace(PTRACE_GETREGSET, pid, NT_PRSTATUS, &part);
}

static long set_registers(int32_t pid, const struct registers *regs) {
  struct iovec64 part = {(uint64_t)(uintptr_t)regs, sizeof(*regs)};
  return ptrace(PTRACE_SETREGSET, pid, NT_PRSTATUS, &part);
}

/* ---- the instruction ---- */

/* Appends text and a decimal number; enough for "/proc/PID/name". */
static void proc_path(char *out, int32_t pid, const char *name) {
  const char *prefix = "/proc/";
  char digits[12];
  int count = 0;
  while (*prefix != 0) *out++ = *prefix++;
  do {
    digits[count++] = (char)('0' + pid % 10);
    pid /= 10;
  } while (pid > 0);
  while (count > 0) *out++ = digits[--count];
  while (*name != 0) *out++ = *name++;
  *out = 0;
}

static long open_proc(int32_t pid, const char *name) {
  char path[40];
  proc_path(path, pid, name);
  return sys(NR_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
}

/* Address of the target's vDSO by its auxiliary vector, 0 when it has none, or -errno. */
static int64_t vdso_addr(int32_t pid, uint8_t *scratch) {
  long fd = open_proc(pid, "/auxv");
  if (fd < 0) return fd == -ENOENT ? -ESRCH : fd;
  long length = sys(NR_read, fd, scratch, AUXV_BYTES_MAX);
  sys(NR_close, fd);
  if (length < 0) return length;
  if (length == 0) return -ESRCH; /* it has ended: its memory is gone */
  for (long at = 0; at + 16 <= length; at += 16) {
    const uint64_t *entry = (const uint64_t *)(const void *)(scratch + at);
    if (entry[0] == AT_SYSINFO_EHDR) return (int64_t)entry[1];
  }
  return 0;
}

/*
 * Address of a system call instruction in the target, or -errno. -ENOEXEC: no vDSO, or a 32-bit
 * process.
 */
static int64_t find_instruction(int32_t pid, uint8_t *scratch) {
  int64_t base = vdso_addr(pid, scratch);
  if (base <= 0) return base == 0 ? -ENOEXEC : base;
  long fd = open_proc(pid, "/mem");
  if (fd < 0) return fd == -ENOENT ? -ESRCH : fd;
  /* A short read is right: the vDSO is smaller than the buffer and ends where its mapping ends. */
  long length = sys(NR_pread64, fd, scratch, VDSO_BYTES_MAX, base);
  sys(NR_close, fd);
  /* An address that the kernel gave and that cannot be read: the memory is gone meanwhile. */
  if (length <= 0) return -ESRCH;

  const struct elf64_header *header = (const struct elf64_header *)(const void *)scratch;
  const uint64_t bytes = (uint64_t)length;
  if (bytes < sizeof(*header)) return -ENOEXEC;
  if (header->ident[0] != 0x7f || header->ident[1] != 'E' || header->ident[2] != 'L' ||
      header->ident[3] != 'F' || header->ident[4] != 2 || header->machine != ELF_MACHINE ||
      header->program_header_bytes != sizeof(struct elf64_program_header) ||
      header->program_headers > bytes ||
      header->program_header_count >
          (bytes - header->program_headers) / sizeof(struct elf64_program_header)) {
    return -ENOEXEC;
  }
  const struct elf64_program_header *segments =
      (const struct elf64_program_header *)(const void *)(scratch + header->program_headers);
  for (int i = 0; i < header->program_header_count; i++) {
    const struct elf64_program_header *segment = &segments[i];
    if (segment->type != PT_LOAD || (segment->flags & PF_X) == 0) continue;
    /* The vDSO is one image: offset in the file is offset from its base. */
    uint64_t end = segment->offset + segment->file_bytes;
    if (end > bytes) end = bytes;
    for (uint64_t at = segment->offset; at + INSTRUCTION_BYTES <= end; at += INSTRUCTION_STEP) {
      if (is_instruction(scratch + at)) return base + (int64_t)at;
    }
  }
  return -ENOEXEC;
}

/* ---- stops ---- */

static int64_t now_ns(void) {
  struct timespec64 now = {0, 0};
  sys(NR_clock_gettime, CLOCK_MONOTONIC, &now);
  return now.sec * 1000000000 + now.nsec;
}

static void pause_shortly(void) {
  struct timespec64 pause = {0, POLL_PAUSE_NS};
  sys(NR_nanosleep, &pause, 0);
}

/*
 * True when the target has ended. WNOWAIT: its exit status belongs to whoever started it. A tracer
 * is told of stops too, asked for or not; those are CLD_TRAPPED.
 */
static int has_ended(int32_t pid) {
  struct siginfo_head info = {.signo = 0, .code = 0};
  const long options = WEXITED | WNOHANG | WNOWAIT | WNOTHREAD | WALL;
  if (sys(NR_waitid, P_PID, pid, &info, options, 0) < 0) return 1;
  return info.code == CLD_EXITED || info.code == CLD_KILLED || info.code == CLD_DUMPED;
}

/*
 * Waits until the target stands in a ptrace stop and tells which; 0, -ESRCH or -ETIMEDOUT.
 * deadline 0 = none.
 */
static int32_t wait_stop(int32_t pid, struct siginfo_head *info, int64_t deadline_ns) {
  for (;;) {
    if (ptrace(PTRACE_GETSIGINFO, pid, 0, info) == 0) return 0;
    if (has_ended(pid)) return -ESRCH;
    if (deadline_ns != 0 && now_ns() > deadline_ns) return -ETIMEDOUT;
    pause_shortly();
  }
}

/* The kernel itself tells a system call stop by this code (PTRACE_GET_SYSCALL_INFO). */
static int is_syscall_stop(const struct siginfo_head *info) {
  return info->signo == SIGTRAP && info->code == (SIGTRAP | 0x80);
}

static int is_event_stop(const struct siginfo_head *info) {
  return (info->code >> 8) == PTRACE_EVENT_STOP && (info->code & 0x7f) == info->signo;
}

/*
 * Runs on until the target stands in PTRACE_EVENT_STOP, which is on the signal path. A
 * PTRACE_INTERRUPT is pending. Signals that stop it before that are handed on to it, as if nobody
 * had looked.
 */
static int32_t wait_event_stop(int32_t pid, struct siginfo_head *info, int64_t deadline_ns) {
  for (;;) {
    int32_t result = wait_stop(pid, info, deadline_ns);
    if (result < 0) return result;
    if (is_event_stop(info)) return 0;
    long signal = is_syscall_stop(info) ? 0 : info->signo;
    if (ptrace(PTRACE_CONT, pid, 0, (const void *)signal) < 0) return -ESRCH;
  }
}

/*
 * Runs on until the next entry to or exit from a system call. Past the deadline it interrupts,
 * once, and goes on.
 */
static int32_t run_to_syscall_stop(int32_t pid, struct siginfo_head *info, int64_t *deadline_ns) {
  for (;;) {
    if (ptrace(PTRACE_SYSCALL, pid, 0, 0) < 0) return -ESRCH;
    int32_t result = wait_stop(pid, info, *deadline_ns);
    if (result == -ETIMEDOUT) {
      *deadline_ns = 0;
      if (ptrace(PTRACE_INTERRUPT, pid, 0, 0) < 0) return -ESRCH;
      result = wait_stop(pid, info, 0);
    }
    if (result < 0) return result;
    if (is_syscall_stop(info)) return 0;
    /* A SIGSTOP or SIGCONT came, or our own interrupt: they wait until the thread is given back. */
    if (!is_event_stop(info)) return -EIO;
  }
}

/* ---- the call ---- */

#if defined(__aarch64__)
/*
 * On arm64 the kernel rewinds an interrupted call *before* the tracer sees it, and only puts the
 * number of restart_syscall into x8 when it returns from that same stop to that same place. If the
 * thread was moved elsewhere in between, a nanosleep would begin anew with its full time. So a
 * thread that stands on a system call instruction may run to the entry of its call; there the call
 * is skipped (number -1) and the registers that would make it, with the right number, are the ones
 * to give back.
 */
static int32_t settle(int32_t pid, uint8_t *scratch, struct registers *saved,
                      int64_t *deadline_ns) {
  struct siginfo_head info;
  struct registers at_entry;
  long fd = open_proc(pid, "/mem");
  if (fd < 0) return (int32_t)fd;
  long length = sys(NR_pread64, fd, scratch, INSTRUCTION_BYTES, saved->pc);
  sys(NR_close, fd);
  if (length != INSTRUCTION_BYTES || !is_instruction(scratch)) return 0;

  int32_t result = run_to_syscall_stop(pid, &info, deadline_ns);
  if (result == 0 && get_registers(pid, &at_entry) < 0) result = -ESRCH;
  if (result < 0) return result;
  int32_t skipped = -1;
  struct iovec64 part = {(uint64_t)(uintptr_t)&skipped, sizeof(skipped)};
  if (ptrace(PTRACE_SETREGSET, pid, NT_ARM_SYSTEM_CALL, &part) < 0) return -EIO;
  saved->x[8] = at_entry.x[8];
  result = run_to_syscall_stop(pid, &info, deadline_ns);
  if (result < 0) return result;
  if (ptrace(PTRACE_INTERRUPT, pid, 0, 0) < 0) return -ESRCH;
  if (ptrace(PTRACE_CONT, pid, 0, 0) < 0) return -ESRCH;
  return wait_event_stop(pid, &info, 0);
}
#else
static int32_t settle(int32_t pid, uint8_t *scratch, struct registers *saved,
                      int64_t *deadline_ns) {
  (void)pid, (void)scratch, (void)saved, (void)deadline_ns;
  return 0;
}
#endif

/*
 * Steps 3 and 4: the target stands in an event stop with all signals blocked. Leaves it at a
 * system call exit.
 */
static int32_t call(const struct request *request, uint64_t at, const struct registers *saved,
                    int64_t *deadline_ns) {
  struct siginfo_head info;
  struct registers regs;
  const int32_t pid = request->pid;
  for (int attempt = 0; attempt < ATTEMPTS_MAX; attempt++) {
    regs = *saved;
    set_call(&regs, at, request);
    if (set_registers(pid, &regs) < 0) return -ESRCH;
    for (int stop = 0; stop < 2; stop++) {
      int32_t result = run_to_syscall_stop(pid, &info, deadline_ns);
      if (result < 0) return result;
      if (get_registers(pid, &regs) < 0) return -ESRCH;
      /* Anything but our own instruction: a result of it would be somebody else's. */
      if (instruction_pointer(&regs) != at + INSTRUCTION_BYTES) return -EIO;
    }
    const int64_t value = result_of(&regs);
    const int restarted = value <= -ERESTARTSYS && value >= -ERESTART_RESTARTBLOCK;
    if (value != -EINTR && !restarted) {
      *request->result = value;
      return 0;
    }
    if (*deadline_ns == 0) break;
  }
  return -ETIMEDOUT;
}

/* Steps 2 to 5. */
static int32_t borrow(const struct request *request, uint64_t at, uint8_t *scratch) {
  struct siginfo_head info;
  struct registers saved;
  uint64_t saved_mask = 0;
  const uint64_t all = ~(uint64_t)0;
  const int32_t pid = request->pid;
  int64_t deadline_ns = request->deadline_ns;

  long attached = ptrace(PTRACE_SEIZE, pid, 0, (const void *)PTRACE_O_TRACESYSGOOD);
  if (attached < 0) return (int32_t)attached;
  if (ptrace(PTRACE_INTERRUPT, pid, 0, 0) < 0) return -ESRCH;
  int32_t result = wait_event_stop(pid, &info, deadline_ns);
  if (result < 0) return result;
  if (info.signo != SIGTRAP) {
    /* Group-stop (SIGSTOP, SIGTSTP ...). Detached from here it goes back to being stopped. */
    ptrace(PTRACE_DETACH, pid, 0, 0);
    return -EBUSY;
  }
  if (get_registers(pid, &saved) < 0 ||
      ptrace(PTRACE_GETSIGMASK, pid, sizeof(saved_mask), &saved_mask) < 0 ||
      ptrace(PTRACE_SETSIGMASK, pid, sizeof(all), &all) < 0) {
    return -ESRCH;
  }
  result = settle(pid, scratch, &saved, &deadline_ns);
  if (result == 0) result = call(request, at, &saved, &deadline_ns);

  /* Step 5. No deadline: letting go now would leave the target at an address of ours. */
  if (result != -ESRCH) {
    long stopped = ptrace(PTRACE_INTERRUPT, pid, 0, 0);
    if (stopped == 0 && (ptrace(PTRACE_GETSIGINFO, pid, 0, &info) < 0 || !is_event_stop(&info))) {
      ptrace(PTRACE_CONT, pid, 0, 0);
    }
    if (stopped < 0 || wait_event_stop(pid, &info, 0) < 0) return -ESRCH;
    set_registers(pid, &saved);
    ptrace(PTRACE_SETSIGMASK, pid, sizeof(saved_mask), &saved_mask);
    ptrace(PTRACE_DETACH, pid, 0, 0);
  }
  return result;
}

/* ---- the thread ---- */

struct thread {
  struct request request;
  int32_t tid;
  uint8_t *scratch;
};

__attribute__((used)) static void thread_main(struct thread *thread) {
  struct request *request = &thread->request;
  int64_t at = (int64_t)request->at;
  /* Of this thread only: a pause would take 50 us longer, and there is one at each of its stops. */
  sys(NR_prctl, PR_SET_TIMERSLACK, 1, 0, 0, 0);
  if (at == 0) at = find_instruction(request->pid, thread->scratch);
  request->answer = at < 0 ? (int32_t)at : borrow(request, (uint64_t)at, thread->scratch);
}

int32_t fsl_remote_syscall(int32_t pid, int32_t number, const uint64_t *args, int64_t *result,
                           int32_t timeout_ms, num_t at) {
  if (pid <= 0 || timeout_ms <= 0) return -EINVAL;
  const uint64_t bytes = STACK_BYTES + VDSO_BYTES_MAX;
  long memory = sys(NR_mmap, 0, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
  if (memory < 0 && memory > -4096) return (int32_t)memory;

  struct thread thread = {
      .request = {.pid = pid,
                  .number = number,
                  .args = args,
                  .result = result,
                  .deadline_ns = now_ns() + (int64_t)timeout_ms * 1000000,
                  .at = (uint64_t)at,
                  .answer = -EIO},
      .tid = 0,
      .scratch = (uint8_t *)memory + STACK_BYTES,
  };
  /* After the two are popped the stack is 16-byte aligned, as both ABIs want it at a call. */
  uint64_t *stack_top = (uint64_t *)(memory + STACK_BYTES) - 2;
  stack_top[0] = (uint64_t)(uintptr_t)thread_main;
  stack_top[1] = (uint64_t)(uintptr_t)&thread;

  /*
   * The new thread inherits a full mask: a handler of this process would want the TLS that it does
   * not have.
   */
  const uint64_t all = ~(uint64_t)0;
  uint64_t mask = 0;
  sys(NR_rt_sigprocmask, 2 /* SIG_SETMASK */, &all, &mask, sizeof(mask));
  long tid = start_task(CLONE_THREAD_FLAGS, stack_top, &thread.tid);
  /*
   * Wait for the *end* of the thread and not for its last store: only then is the target detached
   * and the stack free. The thread's own deadline bounds this.
   */
  if (tid > 0) {
    const long process = sys(NR_getpid);
    while (sys(NR_tgkill, process, tid, 0) != -ESRCH) pause_shortly();
  }
  sys(NR_rt_sigprocmask, 2, &mask, 0, sizeof(mask));
  sys(NR_munmap, memory, bytes);
  return tid < 0 ? (int32_t)tid : thread.request.answer;
}
