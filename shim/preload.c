/*
 * preload.c: the userfaultfd of a program that fsl starts, made by the program itself before its
 * main(), and on request helper tasks in its address space.
 *
 * Loaded with LD_PRELOAD into a dynamically linked QEMU. Its only code is one constructor: it makes
 * a userfaultfd and helpers (helper.c), sends a duplicate and the helpers' sockets over an
 * inherited socket, and cleans the environment, so that the program and its children see what the
 * user gave them. Free-standing: it must load into glibc
 * and musl programs alike, and adds nothing to them. It never fails the program: whatever goes
 * wrong is told over the socket, or shows as silence.
 *
 * Environment (all removed, in place):
 *   FSL_PRELOAD=<socket>:<memfd>[:[c][t][hN][sM]]
 *                                     descriptors: where to send, and where this library was loaded
 *                                     from (or -1). `c` closes all of fsl's descriptors when done; `t`
 *                                     says that GLIBC_TUNABLES is fsl's; `hN` makes N helpers, 0 to 9,
 *                                     `sM` with M slots of staging memory each, 1 to 256; without it 1
 *   FSL_PRELOAD_NEXT=<text>           the user's own LD_PRELOAD, put back; without it LD_PRELOAD is
 *                                     removed
 *   FSL_TUNABLES_NEXT=<text>          with `t`: the same for GLIBC_TUNABLES
 *
 * Message (host byte order; by SCM_RIGHTS the userfaultfd when there is one, then a socket for each
 * helper). Fewer helpers than asked for is no error; without a userfaultfd there are none.
 *    0  u32  magic "fslu"
 *    4  u32  version, 2
 *    8  i32  pid
 *   12  i32  number of the userfaultfd here, or -errno
 *   16  i32  way: 1 userfaultfd(2), 2 /dev/userfaultfd
 *   20  i32  errno of way 1 when way 2 had to be tried, or 0
 *   24       for each helper 24 bytes:
 *     0  i32  pid
 *     4  i32  number of the userfaultfd in the helper
 *     8  u64  address of its staging memory here
 *    16  u64  length of that, bytes
 *
 * Never UFFD_USER_MODE_ONLY: system calls and KVM that touch a missing page would get EFAULT
 * instead of waiting.
 */
#include "helper.h"
#include "kernel.h"
#include "task.h"

#define MAGIC 0x756c7366u
#define VERSION 2u
#define WAY_SYSCALL 1
#define WAY_DEVICE 2

struct message {
  uint32_t magic, version;
  int32_t pid, result, way, first_errno;
  struct helper_record helpers[HELPERS_MAX];
};

#define MESSAGE_BYTES(helper_count) (24 + (uint64_t)(helper_count) * sizeof(struct helper_record))

_Static_assert(sizeof(struct message) == MESSAGE_BYTES(HELPERS_MAX), "message");

struct control {
  struct cmsghdr64 header;
  int32_t fds[1 + HELPERS_MAX];
};

_Static_assert(1 + HELPERS_MAX <= FD_COUNT_MAX, "fsl_recv takes them all");

/* The text behind "name=" when the entry is that variable, else null. */
static char *value_of(char *entry, const char *name) {
  while (*name != 0) {
    if (*entry++ != *name++) return (char *)0;
  }
  return *entry == '=' ? entry + 1 : (char *)0;
}

/* Reads a decimal number with an optional minus sign and moves past it; -1 when there is none. */
static int32_t number_at(const char **text) {
  const char *at = *text;
  int32_t value = 0, negative = 0, digits = 0;
  if (*at == '-') {
    negative = 1;
    at++;
  }
  while (*at >= '0' && *at <= '9' && digits < 9) {
    value = value * 10 + (*at++ - '0');
    digits++;
  }
  *text = at;
  if (digits == 0) return -1;
  return negative ? -value : value;
}

/*
 * Removes entry `index` from the environment in place; what follows moves up, the final null too.
 */
static void remove_at(char **envp, int32_t index) {
  do {
    envp[index] = envp[index + 1];
  } while (envp[index++] != (char *)0);
}

/*
 * "FSL_PRELOAD_NEXT=x" becomes "LD_PRELOAD=x" in its own memory: the text moves to the left, so the new
 * name, with its '=', must be no longer than the old one.
 */
static void rename_variable(char *entry, const char *from_name, const char *to_name) {
  const char *from = value_of(entry, from_name);
  while (*to_name != 0) *entry++ = *to_name++;
  do {
    *entry++ = *from;
  } while (*from++ != 0);
}

/* Sends the userfaultfd and the helpers' sockets. */
static void send_result(int32_t socket, const struct message *message, int32_t helper_count,
                        const int32_t *helper_sockets) {
  struct control control = {.header = {.level = SOL_SOCKET, .type = SCM_RIGHTS}};
  int32_t fd_count = 0;
  if (message->result >= 0) control.fds[fd_count++] = message->result;
  for (int32_t i = 0; i < helper_count; i++) control.fds[fd_count++] = helper_sockets[i];
  struct iovec64 part = {(uint64_t)(uintptr_t)message, MESSAGE_BYTES(helper_count)};
  struct msghdr64 header = {.iov = &part, .iov_count = 1};
  if (fd_count > 0) {
    control.header.length = sizeof(control.header) + (uint64_t)fd_count * sizeof(int32_t);
    header.control = &control;
    header.control_length = control.header.length;
  }
  long result;
  do {
    result = sys(NR_sendmsg, socket, &header, MSG_NOSIGNAL);
  } while (result == -EINTR);
}

/* Returns the userfaultfd, or -errno. */
static int32_t make_userfaultfd(struct message *message) {
  const int32_t flags = O_CLOEXEC | O_NONBLOCK;
  message->way = WAY_SYSCALL;
  int32_t result = (int32_t)sys(NR_userfaultfd, flags);
  if (result == -EPERM || result == -ENOSYS || result == -EACCES) {
    message->first_errno = -result;
    message->way = WAY_DEVICE;
    const long device = sys(NR_openat, AT_FDCWD, "/dev/userfaultfd", O_RDWR | O_CLOEXEC, 0);
    if (device < 0) return (int32_t)device;
    result = (int32_t)sys(NR_ioctl, device, USERFAULTFD_IOC_NEW, flags);
    sys(NR_close, device);
  }
  return result;
}

/* Returns the userfaultfd, or -errno. `wanted` lacks it. */
static int32_t make_and_send(int32_t socket, struct helpers_wanted wanted) {
  struct message message = {
      .magic = MAGIC, .version = VERSION, .pid = wanted.target_pid, .first_errno = 0};
  int32_t helper_sockets[HELPERS_MAX], helper_count = 0;
  message.result = wanted.uffd = make_userfaultfd(&message);
  if (message.result >= 0 && wanted.count > 0) {
    helper_count = make_helpers(&wanted, message.helpers, helper_sockets);
  }
  send_result(socket, &message, helper_count, helper_sockets);
  /* The helpers' lives hang on the other end: nobody but fsl may hold this one. */
  for (int32_t i = 0; i < helper_count; i++) sys(NR_close, helper_sockets[i]);
  return message.result;
}

/* glibc's loader keeps a list of what it has loaded. @source <link.h> */
struct link_map {
  uint64_t address;
  const char *name;
  const void *dynamic;
  struct link_map *next, *previous;
};

struct loader_list {
  int32_t version;
  struct link_map *first;
};

/* Weak: musl has no such name, and its list is left alone. */
extern struct loader_list _r_debug __attribute__((weak, visibility("default")));
/* This library's own dynamic section, made by the linker. */
extern const char _DYNAMIC[] __attribute__((visibility("hidden")));

/*
 * A debugger opens each library by its name in that list. Ours was loaded as /proc/self/fd/N, which
 * is a descriptor of the debugger's own there: gdb reads a pipe of its own for ever. It gets the
 * name that the kernel shows in /proc/PID/maps, which nobody can open.
 */
static void name_for_debuggers(void) {
  if (&_r_debug == (struct loader_list *)0) return;
  for (struct link_map *map = _r_debug.first; map != (struct link_map *)0; map = map->next) {
    if (map->dynamic == (const void *)_DYNAMIC) map->name = "/memfd:fsl-preload (deleted)";
  }
}

/* The program's libc has it; weak, so that the library loads without one. */
extern char **environ __attribute__((weak, visibility("default")));

/*
 * glibc hands argc, argv, envp to constructors, and may call this one before it has set `environ`
 * (the library needs nothing, so nothing orders it). musl hands nothing, so that the arguments are
 * garbage, but has set `environ`.
 */
static void preload(int argc, char **argv, char **envp) {
  if (&environ != (char ***)0 && environ != (char **)0) {
    envp = environ;
  } else if (argc < 0 || envp != argv + argc + 1) {
    return;
  }
  int32_t preload_at = -1, next_at = -1, loader_at = -1, count = 0;
  int32_t tunables_at = -1, tunables_next_at = -1;
  for (; envp[count] != (char *)0; count++) {
    if (value_of(envp[count], "FSL_PRELOAD") != (char *)0) preload_at = count;
    if (value_of(envp[count], "FSL_PRELOAD_NEXT") != (char *)0) next_at = count;
    if (value_of(envp[count], "LD_PRELOAD") != (char *)0) loader_at = count;
    if (value_of(envp[count], "GLIBC_TUNABLES") != (char *)0) tunables_at = count;
    if (value_of(envp[count], "FSL_TUNABLES_NEXT") != (char *)0) tunables_next_at = count;
  }
  if (preload_at < 0) return;
  name_for_debuggers();

  const char *text = value_of(envp[preload_at], "FSL_PRELOAD");
  const int32_t socket = number_at(&text);
  if (*text == ':') text++;
  const int32_t memfd = number_at(&text);
  int32_t closing = 0, has_tunables = 0, helpers_wanted = 0, slots = 1;
  while (*text != 0) {
    const char option = *text++;
    if (option == 'c') closing = 1;
    if (option == 't') has_tunables = 1;
    if (option == 'h') helpers_wanted = number_at(&text);
    if (option == 's') slots = number_at(&text);
  }
  const struct helpers_wanted wanted = {helpers_wanted, slots, -1, (int32_t)sys(NR_getpid),
                                        (int32_t)sys(NR_getppid)};
  const int32_t uffd = socket >= 0 ? make_and_send(socket, wanted) : -1;
  if (closing) {
    /* fsl leaves a copy here under a name, over QMP, before it registers anything. */
    if (uffd >= 0) sys(NR_close, uffd);
    if (socket >= 0) sys(NR_close, socket);
    if (memfd >= 0) sys(NR_close, memfd);
  }

  if (next_at >= 0) rename_variable(envp[next_at], "FSL_PRELOAD_NEXT", "LD_PRELOAD=");
  if (!has_tunables) {
    tunables_at = -1;
  } else if (tunables_next_at >= 0) {
    rename_variable(envp[tunables_next_at], "FSL_TUNABLES_NEXT", "GLIBC_TUNABLES=");
  }
  /* The highest index first, so that the others stay valid. */
  for (int32_t index = count - 1; index >= 0; index--) {
    if (index == preload_at || index == loader_at || index == tunables_at) remove_at(envp, index);
  }
}

typedef void constructor_t(int, char **, char **);

__attribute__((used, section(".init_array"))) static constructor_t *const constructor = preload;

/* ---- in a program that runs already ---- */

/*
 * fsl writes the library's read-only segments into the program's memory, and has its main thread
 * clone(2) another one by the system call at the library's entry point (src/vmm/injection.ts). All signals are
 * blocked there, as they are in a borrowed thread. It has a task make what the constructor makes, and send it: a
 * child of the program that it is not told of (exit signal 0), with descriptors of its own. The helpers are
 * init's when that task has ended.
 */
struct injected {
  int32_t socket, helpers, slots;
  int32_t task_stack; /* that of the task ends so many bytes below this */
};

static void make_injected(const struct injected *injected) {
  const int32_t program = (int32_t)sys(NR_getppid);
  const struct helpers_wanted wanted = {injected->helpers, injected->slots, -1, program, 0};
  make_and_send(injected->socket, wanted);
}

__attribute__((used)) static void injected_main(const struct injected *injected) {
  uint64_t *top = (uint64_t *)(((uint64_t)injected - (uint64_t)injected->task_stack) & ~15ul) - 2;
  top[0] = (uint64_t)(uintptr_t)make_injected;
  top[1] = (uint64_t)(uintptr_t)injected;
  const long task = start_task(CLONE_VM, top, (int32_t *)0);
  if (task < 0) return;
  while (sys(NR_wait4, task, 0, WALL, 0) == -EINTR) {
  }
}

/* The program's thread is taken elsewhere behind the call; the new one finds its argument on its stack. */
#if defined(__x86_64__)
__asm__(
    ".text\n.globl injection_entry\n.hidden injection_entry\ninjection_entry:\n"
    "  syscall\n"
    "  xor %ebp, %ebp\n"
    "  pop %rdi\n"
    "  pop %rax\n"
    "  call injected_main\n"
    "  mov $60, %eax\n" /* exit */
    "  xor %edi, %edi\n"
    "  syscall\n"
    "  ud2\n");
#else
__asm__(
    ".text\n.globl injection_entry\n.hidden injection_entry\n.balign 4\ninjection_entry:\n"
    "  svc #0\n"
    "  mov x29, #0\n"
    "  ldp x0, x1, [sp], #16\n"
    "  bl injected_main\n"
    "  mov x8, #93\n" /* exit */
    "  mov x0, #0\n"
    "  svc #0\n"
    "  brk #0\n");
#endif
