/*
 * host.c: what the benchmark needs of the host and TypeScript cannot do well.
 *
 *   launch CGROUP|- TIME PROGRAM [ARG ...]
 *                                       joins the cgroup, dies with its parent, writes what time it is
 *                                       (ns, CLOCK_REALTIME) to the file TIME, becomes PROGRAM: to join
 *                                       takes as long as the kernel's readers take, 10 to 20 ms
 *   touch BYTES                         takes memory, writes to it and gives it back, so that a
 *                                       virtual machine has it from its host before a run, and
 *                                       just after the kernel has told the host what is free
 *   warm FILE                           reads the file's data (not its holes) into the page cache
 *   drop FILE                           takes the file out of the page cache
 *   read FILE THREADS                   reads the file's data into fresh huge pages of its own, with
 *                                       CPU time that nobody else wants; begins at the first byte of
 *                                       stdin, prints a line when all is in, keeps it until stdin ends
 *
 * warm and drop print the bytes of the file that are in the page cache afterwards.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define WINDOW (1u << 30)
#define PIECE (4u << 20)
#define HUGE (2u << 20)

static void fail(const char *what) {
  fprintf(stderr, "bench-host: %s: %s\n", what, strerror(errno));
  exit(2);
}

static int launch(char **arguments) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (strcmp(arguments[0], "-") != 0) {
    int fd = open(arguments[0], O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, "0", 1) != 1) fail(arguments[0]);
  }
  int time_fd = open(arguments[1], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (time_fd < 0) fail(arguments[1]);
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (dprintf(time_fd, "%lld", now.tv_sec * 1000000000ll + now.tv_nsec) < 0) fail(arguments[1]);
  execvp(arguments[2], arguments + 2);
  fail(arguments[2]);
  return 2;
}

/* Passes of free page reporting so far, where the kernel counts them; -1 where it does not. */
static long reporting_passes(void) {
  char text[32] = "";
  int fd = open("/sys/module/page_reporting/parameters/passes", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  ssize_t got = read(fd, text, sizeof text - 1);
  close(fd);
  return got > 0 ? atol(text) : -1;
}

/*
 * A kernel with free page reporting (virtio-balloon) tells its host which pages are free, 2 s
 * (PAGE_REPORTING_DELAY) after some became so, and again 2 s after that while there are more. The
 * host takes them back, and the next touch of a page costs 50 times as much. Returns when such a
 * pass has just ended, or none is to come: what is freed now stays for 2 s.
 */
static void await_reporting(void) {
  const struct timespec moment = {0, 5000000};
  long before = reporting_passes();
  if (before < 0) return;
  for (int waited = 0; waited < 500 && reporting_passes() == before; waited++)
    nanosleep(&moment, NULL);
}

static int touch(uint64_t length) {
  int access = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  uint8_t *memory = mmap(NULL, length, access, flags, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  madvise(memory, length, MADV_HUGEPAGE);
  for (uint64_t at = 0; at < length; at += PAGE) memory[at] = 1;
  await_reporting();
  return 0;
}

/* Calls `visit` for every extent of the file that holds data. */
static void for_data(int fd, void (*visit)(int fd, off_t start, off_t end)) {
  for (off_t at = 0;;) {
    off_t start = lseek(fd, at, SEEK_DATA);
    if (start < 0 && errno == ENXIO) return;
    if (start < 0) fail("SEEK_DATA");
    at = lseek(fd, start, SEEK_HOLE);
    if (at < 0) fail("SEEK_HOLE");
    visit(fd, start, at);
  }
}

static void read_extent(int fd, off_t start, off_t end) {
  static uint8_t buffer[PIECE];
  for (off_t at = start; at < end;) {
    size_t wanted = end - at < PIECE ? (size_t)(end - at) : PIECE;
    ssize_t got = pread(fd, buffer, wanted, at);
    if (got <= 0) fail("pread");
    at += got;
  }
}

static uint64_t cached_bytes(int fd) {
  static unsigned char present[WINDOW / PAGE];
  struct stat about;
  uint64_t pages = 0;
  if (fstat(fd, &about) != 0) fail("fstat");
  for (off_t at = 0; at < about.st_size; at += WINDOW) {
    size_t length = about.st_size - at < WINDOW ? (size_t)(about.st_size - at) : WINDOW;
    void *map = mmap(NULL, length, PROT_READ, MAP_SHARED, fd, at);
    if (map == MAP_FAILED || mincore(map, length, present) != 0) fail("mincore");
    for (size_t page = 0; page < (length + PAGE - 1) / PAGE; page++) pages += present[page] & 1;
    munmap(map, length);
  }
  return pages * PAGE;
}

static int page_cache(const char *path, int warm) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(path);
  if (warm) {
    for_data(fd, read_extent);
  } else {
    if (fdatasync(fd) != 0) fail("fdatasync");
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  }
  printf("%llu\n", (unsigned long long)cached_bytes(fd));
  return 0;
}

/* The file's data in pieces of a huge page each, and where they go. */
static struct {
  int fd;
  size_t count, capacity, next;
  struct { off_t start, end; } *pieces;
  uint8_t *memory;
} reading;

static void add_pieces(int fd, off_t start, off_t end) {
  (void)fd;
  for (off_t at = start; at < end; at += HUGE) {
    if (reading.count == reading.capacity) {
      reading.capacity = reading.capacity * 2 + 1024;
      reading.pieces = realloc(reading.pieces, reading.capacity * sizeof *reading.pieces);
      if (reading.pieces == NULL) fail("realloc");
    }
    reading.pieces[reading.count].start = at;
    reading.pieces[reading.count++].end = end - at < HUGE ? end : at + HUGE;
  }
}

static void *read_pieces(void *unused) {
  struct sched_param none = {0};
  if (sched_setscheduler(0, SCHED_IDLE, &none) != 0) fail("SCHED_IDLE");
  for (;;) {
    size_t index = __atomic_fetch_add(&reading.next, 1, __ATOMIC_RELAXED);
    if (index >= reading.count) return unused;
    off_t start = reading.pieces[index].start;
    size_t length = (size_t)(reading.pieces[index].end - start);
    volatile uint8_t *target = reading.memory + index * HUGE;
    *target = 0; /* A whole huge page at once, outside the system call. */
    if (pread(reading.fd, (void *)target, length, start) != (ssize_t)length) fail("pread");
  }
}

static int read_beside(const char *path, long threads) {
  char byte;
  if (threads < 1) errno = EINVAL, fail("threads");
  pthread_t *running = calloc((size_t)threads, sizeof *running);
  if (running == NULL) fail("calloc");
  reading.fd = open(path, O_RDONLY | O_CLOEXEC);
  if (reading.fd < 0) fail(path);
  for_data(reading.fd, add_pieces);
  size_t length = (reading.count + 1) * HUGE;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  uint8_t *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  madvise(memory, length, MADV_HUGEPAGE);
  reading.memory = memory + (HUGE - (uintptr_t)memory % HUGE) % HUGE;
  if (read(0, &byte, 1) != 1) return 0;
  for (long at = 0; at < threads; at++)
    if (pthread_create(&running[at], NULL, read_pieces, NULL) != 0) fail("pthread_create");
  for (long at = 0; at < threads; at++) pthread_join(running[at], NULL);
  puts("in");
  fflush(stdout);
  while (read(0, &byte, 1) > 0) continue;
  return 0;
}

int main(int count, char **arguments) {
  if (count >= 5 && strcmp(arguments[1], "launch") == 0) return launch(arguments + 2);
  if (count == 3 && strcmp(arguments[1], "touch") == 0)
    return touch(strtoull(arguments[2], NULL, 0));
  if (count == 3 && strcmp(arguments[1], "warm") == 0) return page_cache(arguments[2], 1);
  if (count == 3 && strcmp(arguments[1], "drop") == 0) return page_cache(arguments[2], 0);
  if (count == 4 && strcmp(arguments[1], "read") == 0)
    return read_beside(arguments[2], strtol(arguments[3], NULL, 0));
  fprintf(stderr, "usage: bench-host launch|touch|warm|drop|read ...\n");
  return 2;
}
