/*
 * load-toucher.c: a process whose memory is loaded by fsl's Workers in the kernel tests. Many
 * threads touch that memory and judge every word of it. Started as
 *
 *   load-toucher anon|shmem|hugetlb BYTES FEATURES
 *
 * with a socket on descriptor 3, over which region and userfaultfd go (as kernel-target.c does it).
 * Then commands by lines on stdin, answers on stdout:
 *
 *   touch ID THREADS ORDER SEED     -> touch ID WRONG FIRST
 *       Every thread reads all pages. ORDER: same (ascending), random (each its own way) or parts
 *       (each its own part, ascending).
 *   write ID THREADS SEED           -> write ID WRONG FIRST
 *       A thread writes a word into each page of its part, and that must stay.
 *   discard ID THREADS ROUNDS SEED  -> discard ID WRONG FIRST GIVEN_BACK
 *       Every thread gives pages of its part back, which must be zero from then on, and looks at
 *       others, which must be as they were.
 *   sweep ID                        -> sweep ID WRONG FIRST
 *       All pages once more: those given back zero, all others as they were.
 *
 * Page p (of 4096 bytes, also in huge pages) has data when has_data(p); its word w is WORD(p, w)
 * then, else 0.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <signal.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / 4)
#define WORD(page, word) (((uint32_t)(page) * 1024u + (word) + 1u) * 2654435761u)
#define MARK 0x600dca7eu
#define THREADS_MAX 64

static uint8_t *region;
static size_t pages;
static size_t host_page = PAGE;
static uint8_t *given_back, *marked; /* per page */

/* Runs of five data pages in eight, and every fourth 256 KiB without any. */
static int has_data(size_t page) { return page % 8 < 5 && page / 64 % 4 != 3; }

static void fail(const char *what) {
  printf("error %s: %s\n", what, strerror(errno));
  fflush(stdout);
  exit(2);
}

struct task {
  const char *order;
  int thread, threads;
  size_t rounds;
  uint64_t random;
  size_t wrong, first_wrong, discards;
};

static uint64_t next_random(struct task *task) {
  task->random = task->random * 6364136223846793005ull + 1442695040888963407ull;
  return task->random >> 33;
}

static int page_is_right(size_t page) {
  const volatile uint32_t *words = (const volatile uint32_t *)(region + page * PAGE);
  int is_zero = given_back[page] || !has_data(page);
  uint32_t first = marked[page] ? MARK : is_zero ? 0 : WORD(page, 0);
  if (words[0] != first) return 0;
  for (uint32_t w = 1; w < WORDS; w++)
    if (words[w] != (is_zero ? 0 : WORD(page, w))) return 0;
  return 1;
}

static void judge(struct task *task, size_t page) {
  if (page_is_right(page)) return;
  if (task->wrong++ == 0) task->first_wrong = page;
}

static void *touch(void *argument) {
  struct task *task = argument;
  if (strcmp(task->order, "random") == 0) {
    /* An odd step that has no divisor in common with a power of two visits every page once. */
    size_t at = next_random(task) % pages, step = next_random(task) | 1;
    for (size_t i = 0; i < pages; i++, at = (at + step) % pages) judge(task, at);
    return NULL;
  }
  int parts = strcmp(task->order, "parts") == 0;
  size_t from = parts ? pages * task->thread / task->threads : 0;
  size_t to = parts ? pages * (task->thread + 1) / task->threads : pages;
  for (size_t page = from; page < to; page++) judge(task, page);
  return NULL;
}

static void *write_pages(void *argument) {
  struct task *task = argument;
  size_t at = next_random(task) % pages, step = next_random(task) | 1;
  for (size_t i = 0; i < pages; i++, at = (at + step) % pages) {
    if ((int)(at % task->threads) != task->thread) continue;
    volatile uint32_t *words = (volatile uint32_t *)(region + at * PAGE);
    words[0] = MARK;
    marked[at] = 1;
    judge(task, at);
  }
  return NULL;
}

/* Pages are given back in units of a host page; a thread has whole units. */
static void *discard(void *argument) {
  struct task *task = argument;
  size_t unit = host_page / PAGE, units = pages / unit;
  for (size_t round = 0; round < task->rounds; round++) {
    size_t mine = next_random(task) % (units / task->threads) * task->threads + task->thread;
    if (madvise(region + mine * host_page, host_page, MADV_DONTNEED) != 0) fail("madvise");
    for (size_t p = mine * unit; p < (mine + 1) * unit; p++) {
      given_back[p] = 1;
      marked[p] = 0;
      judge(task, p);
    }
    task->discards++;
    size_t other = next_random(task) % (units / task->threads) * task->threads + task->thread;
    judge(task, other * unit);
  }
  return NULL;
}

static void run(const char *name, int id, void *(*work)(void *), int threads, const char *order,
                size_t rounds, uint64_t seed) {
  pthread_t handles[THREADS_MAX];
  struct task tasks[THREADS_MAX];
  if (threads > THREADS_MAX) threads = THREADS_MAX;
  for (int t = 0; t < threads; t++) {
    uint64_t random = seed * 7919 + (uint64_t)t * 104729 + 1;
    tasks[t] = (struct task){order, t, threads, rounds, random, 0, 0, 0};
    if (pthread_create(&handles[t], NULL, work, &tasks[t]) != 0) fail("pthread_create");
  }
  size_t wrong = 0, first = 0, discards = 0;
  for (int t = 0; t < threads; t++) {
    pthread_join(handles[t], NULL);
    if (wrong == 0) first = tasks[t].first_wrong;
    wrong += tasks[t].wrong;
    discards += tasks[t].discards;
  }
  printf("%s %d %zu %zu", name, id, wrong, first);
  if (work == discard) printf(" %zu", discards);
  printf("\n");
  fflush(stdout);
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

int main(int argc, char **argv) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (argc != 4) return 64;
  size_t length = strtoull(argv[2], NULL, 10);
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
  if (strcmp(argv[1], "shmem") == 0) flags = MAP_SHARED | MAP_ANONYMOUS;
  if (strcmp(argv[1], "hugetlb") == 0) {
    flags |= MAP_HUGETLB;
    host_page = 2u << 20;
  }
  region = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (region == MAP_FAILED) fail("mmap");
  pages = length / PAGE;
  given_back = calloc(pages, 1);
  marked = calloc(pages, 1);
  int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail("userfaultfd");
  uint64_t api[3] = {0xaa, strtoull(argv[3], NULL, 10), 0};
  if (ioctl(fd, 0xc018aa3f, api) < 0) fail("UFFDIO_API");
  send_region(fd, length);

  char line[128], order[16];
  while (fgets(line, sizeof(line), stdin) != NULL) {
    int id = 0, threads = 1;
    unsigned long rounds = 0, seed = 0;
    if (sscanf(line, "touch %d %d %15s %lu", &id, &threads, order, &seed) == 4) {
      run("touch", id, touch, threads, order, 0, seed);
    } else if (sscanf(line, "write %d %d %lu", &id, &threads, &seed) == 3) {
      run("write", id, write_pages, threads, "", 0, seed);
    } else if (sscanf(line, "discard %d %d %lu %lu", &id, &threads, &rounds, &seed) == 4) {
      run("discard", id, discard, threads, "", rounds, seed);
    } else if (sscanf(line, "sweep %d", &id) == 1) {
      run("sweep", id, touch, 1, "same", 0, 1);
    } else {
      fail("command");
    }
  }
  return 0;
}
