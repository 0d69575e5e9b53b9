/*
 * kernel-target.c: the second process of the kernel tests. It owns the memory, the threads and the
 * signals, does what it is told by lines on stdin, and answers by lines on stdout. It decides
 * nothing and checks only what only it can see.
 *
 *   memory anon|shmem|hugetlb PAGES FEATURES   region and userfaultfd, sent over descriptor 3
 *       r ID PAGE COUNT    a thread of its own reads     -> r ID CRC32, or "b ID" after a SIGBUS
 *       t ID PAGE COUNT    ... touches page by page      -> t ID 0
 *       w ID PAGE BYTE     ... writes one byte           -> w ID 0
 *       d ID PAGE COUNT    ... MADV_DONTNEED             -> d ID 0
 *       u ID PAGE COUNT    ... munmap                    -> u ID 0
 *   region thp|shmem|locked PAGES                2 MiB aligned, without a userfaultfd of its own:
 *                                                        -> region ADDR LENGTH; then as `memory`
 *   storm ppoll|nanosleep|busy THREADS           counts signals, whose values must come in order
 *       s COUNT            a thread queues that many     -> s SENT RECEIVED DISORDERED WRONG
 *   sleep nanosleep|clock|ppoll|futex|read MS    one blocking call in the main thread
 *                                                        -> sleep RESULT ERRNO MS
 *   trace PID                                    traces that process until it is ended
 *   environment [NAME ...]                       -> variables, then descriptors, then libraries by
 *                                                   the loader's list, then "end"
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
#include <stdarg.h>
static void say(const char *format, ...) {
  char line[256];
  va_list args;
  va_start(args, format);
  int length = vsnprintf(line, sizeof(line) - 1, format, args);
  va_end(args);
  line[length++] = '\n';
  if (write(1, line, (size_t)length) != length) _exit(3);
}

static void fail(const char *what) {
  say("error %s: %s", what, strerror(errno));
  exit(2);
}

static uint32_t crc32(const volatile uint8_t *bytes, size_t length) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < length; i++) {
    crc ^= bytes[i];
    for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (0xedb88320u & -(crc & 1));
  }
  return ~crc;
}

static double now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

/* ---- memory ---- */

static uint8_t *region;
static size_t page_bytes = 4096;

struct job {
  char kind;
  int id;
  size_t page, count;
};

static __thread sigjmp_buf bus_jump;

static void on_bus(int signal) {
  (void)signal;
  siglongjmp(bus_jump, 1);
}

static void touch(const volatile uint8_t *at, size_t count) {
  for (size_t i = 0; i < count; i++) (void)at[i * page_bytes];
}

static void *run_job(void *argument) {
  struct job job = *(struct job *)argument;
  free(argument);
  uint8_t *at = region + job.page * page_bytes;
  size_t length = job.count * page_bytes;
  if (sigsetjmp(bus_jump, 1) != 0) {
    say("b %d", job.id);
    return NULL;
  }
  switch (job.kind) {
    case 'r': say("r %d %u", job.id, crc32(at, length)); break;
    case 't': touch(at, job.count); say("t %d 0", job.id); break;
    case 'w': *(volatile uint8_t *)at = (uint8_t)job.count; say("w %d 0", job.id); break;
    case 'd': say("d %d %d", job.id, madvise(at, length, MADV_DONTNEED)); break;
    case 'u': say("u %d %d", job.id, munmap(at, length)); break;
    default: say("error unknown command %c", job.kind);
  }
  return NULL;
}

static void send_region(int fd, size_t length) {
  uint64_t message[2] = {(uint64_t)(uintptr_t)region, length};
  struct iovec part = {message, sizeof(message)};
  union {
    struct cmsghdr header;
    char bytes[CMSG_SPACE(sizeof(int))];
  } control;
  memset(&control, 0, sizeof(control));
  struct msghdr header = {.msg_iov = &part,
                          .msg_iovlen = 1,
                          .msg_control = &control,
                          .msg_controllen = sizeof(control)};
  control.header.cmsg_len = CMSG_LEN(sizeof(int));
  control.header.cmsg_level = SOL_SOCKET;
  control.header.cmsg_type = SCM_RIGHTS;
  memcpy(CMSG_DATA(&control.header), &fd, sizeof(int));
  if (sendmsg(3, &header, 0) < 0) fail("sendmsg");
}

/* One thread for each line on stdin, until its end. */
static int take_jobs(void) {
  char line[128];
  while (fgets(line, sizeof(line), stdin) != NULL) {
    struct job *job = calloc(1, sizeof(*job));
    pthread_t thread;
    if (sscanf(line, "%c %d %zu %zu", &job->kind, &job->id, &job->page, &job->count) != 4) {
      fail("command");
    }
    if (pthread_create(&thread, NULL, run_job, job) != 0) fail("pthread_create");
    pthread_detach(thread);
  }
  return 0;
}

static int memory(const char *kind, size_t pages, uint64_t features) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
  if (strcmp(kind, "shmem") == 0) flags = MAP_SHARED | MAP_ANONYMOUS;
  if (strcmp(kind, "hugetlb") == 0) {
    flags |= MAP_HUGETLB;
    page_bytes = 2 << 20;
  }
  region = mmap(NULL, pages * page_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (region == MAP_FAILED) fail("mmap");
  madvise(region, pages * page_bytes, MADV_NOHUGEPAGE);
  int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail("userfaultfd");
  uint64_t api[3] = {0xaa, features, 0};
  if (ioctl(fd, 0xc018aa3f, api) < 0) fail("UFFDIO_API");
  signal(SIGBUS, on_bus);
  send_region(fd, pages * page_bytes);
  return take_jobs();
}

/* For what only another task of this process does: the userfaultfd is the preload library's. */
static int aligned_region(const char *kind, size_t pages) {
  const size_t huge = 2 << 20, length = pages * page_bytes;
  int flags = strcmp(kind, "shmem") == 0 ? MAP_SHARED | MAP_ANONYMOUS : MAP_PRIVATE | MAP_ANONYMOUS;
  uint8_t *mapped = mmap(NULL, length + huge, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapped == MAP_FAILED) fail("mmap");
  region = (uint8_t *)(((uintptr_t)mapped + huge - 1) & ~(huge - 1));
  madvise(region, length, MADV_HUGEPAGE);
  if (strcmp(kind, "locked") == 0 && mlock2(region, length, MLOCK_ONFAULT) < 0) fail("mlock2");
  say("region %zu %zu", (size_t)region, length);
  return take_jobs();
}

/* ---- signals ---- */

#define STORM_SIGNAL 40

static volatile sig_atomic_t received, disordered;
static volatile int sent, to_send, stopping;

static void on_storm(int signal, siginfo_t *info, void *context) {
  (void)signal, (void)context;
  if (info->si_value.sival_int != received) disordered++;
  received++;
}

static void *send_storm(void *unused) {
  (void)unused;
  while (!stopping) {
    if (sent >= to_send) {
      usleep(200);
      continue;
    }
    union sigval value = {.sival_int = sent};
    if (sigqueue(getpid(), STORM_SIGNAL, value) == 0) sent++;
    else if (errno != EAGAIN) fail("sigqueue");
    if (sent % 8 == 0) usleep(20);
  }
  return NULL;
}

static void *bystander(void *unused) {
  (void)unused;
  while (!stopping) {
    struct pollfd none = {.fd = -1};
    poll(&none, 1, 5);
  }
  return NULL;
}

/*
 * The main thread: calls whose results are known, so that a stolen or doubled result shows.
 * Returns how many were wrong.
 */
static int known_calls(const char *how, int event) {
  int wrong = 0;
  uint64_t value = 3;
  if (getpid() != (pid_t)syscall(SYS_getpid)) wrong++;
  if (write(event, &value, sizeof(value)) != sizeof(value)) wrong++;
  value = 0;
  if (read(event, &value, sizeof(value)) != sizeof(value) || value != 3) wrong++;
  errno = 0;
  if (read(event, &value, sizeof(value)) != -1 || errno != EAGAIN) wrong++;
  struct timespec pause = {0, 300000};
  int result = 0;
  errno = 0;
  if (strcmp(how, "ppoll") == 0) {
    sigset_t none;
    sigemptyset(&none);
    struct pollfd polled = {.fd = event, .events = POLLIN};
    result = ppoll(&polled, 1, &pause, &none);
  } else if (strcmp(how, "nanosleep") == 0) {
    result = nanosleep(&pause, NULL);
  } else {
    for (volatile int i = 0; i < 100000; i++) {}
  }
  if (result != 0 && !(result == -1 && errno == EINTR)) wrong++;
  return wrong;
}

static int storm(const char *how, int threads) {
  struct sigaction action;
  memset(&action, 0, sizeof(action));
  action.sa_sigaction = on_storm;
  action.sa_flags = SA_SIGINFO;
  sigaction(STORM_SIGNAL, &action, NULL);
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, STORM_SIGNAL);
  /*
   * Only the main thread takes the signal. In ppoll mode only inside ppoll, as event loops do it.
   */
  pthread_sigmask(SIG_BLOCK, &set, NULL);
  pthread_t thread;
  pthread_create(&thread, NULL, send_storm, NULL);
  for (int i = 0; i < threads; i++) pthread_create(&thread, NULL, bystander, NULL);
  if (strcmp(how, "ppoll") != 0) pthread_sigmask(SIG_UNBLOCK, &set, NULL);
  int event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), wrong = 0;
  fcntl(0, F_SETFL, O_NONBLOCK);
  say("ready");
  char line[64];
  for (;;) {
    wrong += known_calls(how, event);
    ssize_t length = read(0, line, sizeof(line) - 1);
    if (length == 0) return 0;
    if (length < 0) {
      if (errno != EAGAIN && errno != EINTR) wrong++;
      if (to_send > 0 && sent >= to_send && received >= sent) {
        say("s %d %d %d %d", sent, (int)received, (int)disordered, wrong);
        to_send = 0;
        sent = received = disordered = wrong = 0;
      }
      continue;
    }
    line[length] = 0;
    to_send = atoi(line + 2);
  }
}

/* ---- one sleep ---- */

static int sleep_once(const char *how, long ms) {
  struct timespec time = {ms / 1000, ms % 1000 * 1000000};
  int word = 0, pipes[2];
  struct pollfd none = {.fd = -1};
  long result = -2;
  if (pipe(pipes) < 0) fail("pipe");
  say("ready");
  double start = now_ms();
  errno = 0;
  if (strcmp(how, "nanosleep") == 0) result = nanosleep(&time, NULL);
  if (strcmp(how, "clock") == 0) result = clock_nanosleep(CLOCK_MONOTONIC, 0, &time, NULL);
  if (strcmp(how, "ppoll") == 0) result = ppoll(&none, 1, &time, NULL);
  if (strcmp(how, "futex") == 0) result = syscall(SYS_futex, &word, 0, 0, &time, NULL, 0);
  if (strcmp(how, "read") == 0) result = read(0, &word, 1);
  int error = errno;
  say("sleep %ld %d %d", result, error, (int)(now_ms() - start));
  return 0;
}

static int library(struct dl_phdr_info *info, size_t size, void *unused) {
  (void)size, (void)unused;
  if (info->dlpi_name[0] != 0) say("library %s", info->dlpi_name);
  return 0;
}

static int environment(int count, char **names) {
  if (count == 0) {
    for (char **entry = environ; *entry != NULL; entry++) say("%s", *entry);
  }
  for (int i = 0; i < count; i++) {
    const char *value = getenv(names[i]);
    say("%s=%s", names[i], value == NULL ? "(unset)" : value);
  }
  char link[64], target[128];
  for (int fd = 3; fd < 64; fd++) {
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof(target) - 1);
    if (length < 0) continue;
    target[length] = 0;
    say("fd %d %s", fd, target);
  }
  dl_iterate_phdr(library, NULL);
  say("end");
  return 0;
}

int main(int argc, char **argv) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (argc == 5 && strcmp(argv[1], "memory") == 0) {
    return memory(argv[2], strtoul(argv[3], NULL, 10), strtoull(argv[4], NULL, 10));
  }
  if (argc == 4 && strcmp(argv[1], "region") == 0) {
    return aligned_region(argv[2], strtoul(argv[3], NULL, 10));
  }
  if (argc == 4 && strcmp(argv[1], "storm") == 0) return storm(argv[2], atoi(argv[3]));
  if (argc == 4 && strcmp(argv[1], "sleep") == 0) return sleep_once(argv[2], atol(argv[3]));
  if (argc == 3 && strcmp(argv[1], "trace") == 0) {
    if (ptrace(PTRACE_SEIZE, atoi(argv[2]), NULL, NULL) < 0) fail("PTRACE_SEIZE");
    return pause();
  }
  if (argc >= 2 && strcmp(argv[1], "environment") == 0) return environment(argc - 2, argv + 2);
  return 64;
}
