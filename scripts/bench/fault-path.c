/*
 * fault-path.c: both ends of the in-process benchmark (fault-path.ts), in C.
 *
 *   touch PAGES THREADS SEED     makes a region and a userfaultfd and sends both over descriptor 3.
 *                                When a byte comes back, THREADS threads touch every page once, in
 *                                random order, and the latencies are printed:
 *                                touched COUNT P50 P99 MAX MEAN WALL, in ns. With 0 threads nothing
 *                                is touched: prints "touched 0 ..." and waits for a second byte.
 *   serve FILE KEEP              takes the region from descriptor 3, registers it, answers with a
 *                                byte, and serves its faults: poll, read a batch, one UFFDIO_COPY for
 *                                each. KEEP 1: from a mapping of FILE, which stays in the page table,
 *                                and nothing else is done. KEEP 0: the same loop as
 *                                src/load/fault-loop.ts, whose memory does not grow with the guest and
 *                                which says what it did: each page is read into a buffer, marked as
 *                                done and its latency counted.
 *   fill FILE PIECE THREADS KEEP the same, but copies the whole region in pieces: the most that
 *                                UFFDIO_COPY gives on this machine. KEEP 1: the file stays mapped;
 *                                0: each chunk of it leaves the page table when it was copied, so that
 *                                memory does not grow with the guest. Prints: filled NS
 *   read FILE LENGTH THREADS     no userfaultfd: reads so much of FILE into fresh huge pages of its own,
 *                                2 MiB at a time, which is what an ordinary load (one thread) and helpers
 *                                do. Prints: read NS
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define SOCKET 3
#define MAX_THREADS 16
#define BATCH 256
#define CHUNK (2u << 20)

static void fail(const char *what) {
  fprintf(stderr, "bench-fault-path: %s: %s\n", what, strerror(errno));
  exit(2);
}

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

union control {
  struct cmsghdr header;
  char bytes[CMSG_SPACE(sizeof(int))];
};

static void send_region(int uffd, void *region, uint64_t length) {
  uint64_t message[2] = {(uint64_t)(uintptr_t)region, length};
  struct iovec part = {message, sizeof message};
  union control control = {0};
  struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
  header.msg_control = &control;
  header.msg_controllen = sizeof control;
  control.header.cmsg_len = CMSG_LEN(sizeof(int));
  control.header.cmsg_level = SOL_SOCKET;
  control.header.cmsg_type = SCM_RIGHTS;
  memcpy(CMSG_DATA(&control.header), &uffd, sizeof uffd);
  if (sendmsg(SOCKET, &header, 0) < 0) fail("sendmsg");
}

static int receive_region(uint64_t *region, uint64_t *length) {
  uint64_t message[2];
  struct iovec part = {message, sizeof message};
  union control control = {0};
  struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
  header.msg_control = &control;
  header.msg_controllen = sizeof control;
  if (recvmsg(SOCKET, &header, 0) != sizeof message) fail("recvmsg");
  int uffd = -1;
  memcpy(&uffd, CMSG_DATA(&control.header), sizeof uffd);
  *region = message[0];
  *length = message[1];
  return uffd;
}

static void wait_byte(void) {
  char byte;
  ssize_t got = read(SOCKET, &byte, 1);
  if (got == 0) exit(0); /* The other end is gone. */
  if (got != 1) fail("read of the socket");
}

static void send_byte(void) {
  if (write(SOCKET, "g", 1) != 1) fail("write to the socket");
}

/* -- touch ------------------------------------------------------------------------------------ */

static uint8_t *touched;
static uint32_t *order;
static uint32_t *latencies;
static uint64_t page_count;
static unsigned thread_count;

static void *touch_share(void *argument) {
  uintptr_t share = (uintptr_t)argument;
  uint64_t end = page_count * (share + 1) / thread_count;
  for (uint64_t i = page_count * share / thread_count; i < end; i++) {
    volatile uint8_t *page = touched + (uint64_t)order[i] * PAGE;
    uint64_t start = now_ns();
    uint8_t byte = *page;
    uint64_t taken = now_ns() - start;
    (void)byte;
    latencies[i] = taken > UINT32_MAX ? UINT32_MAX : (uint32_t)taken;
  }
  return NULL;
}

static int compare(const void *left, const void *right) {
  uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
  return a < b ? -1 : a > b;
}

static void shuffle(uint64_t seed) {
  uint64_t state = seed * 0x9e3779b97f4a7c15ull + 1;
  for (uint64_t i = 0; i < page_count; i++) order[i] = (uint32_t)i;
  for (uint64_t i = page_count; i > 1; i--) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    uint64_t other = (state >> 33) % i;
    uint32_t kept = order[i - 1];
    order[i - 1] = order[other];
    order[other] = kept;
  }
}

static void print_latencies(uint64_t wall) {
  uint64_t sum = 0, count = thread_count ? page_count : 0;
  for (uint64_t i = 0; i < count; i++) sum += latencies[i];
  qsort(latencies, count, sizeof *latencies, compare);
  printf("touched %llu %u %u %u %llu %llu\n", (unsigned long long)count,
         count ? latencies[count / 2] : 0, count ? latencies[count * 99 / 100] : 0,
         count ? latencies[count - 1] : 0, (unsigned long long)(count ? sum / count : 0),
         (unsigned long long)wall);
  fflush(stdout);
}

static int touch(uint64_t pages, unsigned threads, uint64_t seed) {
  page_count = pages;
  thread_count = threads > MAX_THREADS ? MAX_THREADS : threads;
  int access = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
  touched = mmap(NULL, pages * PAGE, access, flags, -1, 0);
  order = malloc(pages * sizeof *order);
  latencies = calloc(pages, sizeof *latencies);
  if (touched == MAP_FAILED || !order || !latencies) fail("memory");
  shuffle(seed);
  memset(latencies, 1, pages * sizeof *latencies);
  int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  if (uffd < 0) fail("userfaultfd");
  send_region(uffd, touched, pages * PAGE);
  wait_byte();
  pthread_t ids[MAX_THREADS];
  uint64_t start = now_ns();
  for (uintptr_t t = 0; t < thread_count; t++) {
    if (pthread_create(&ids[t], NULL, touch_share, (void *)t) != 0) fail("pthread_create");
  }
  for (unsigned t = 0; t < thread_count; t++) pthread_join(ids[t], NULL);
  print_latencies(now_ns() - start);
  wait_byte();
  return 0;
}

/* -- serve and fill --------------------------------------------------------------------------- */

static int uffd;
static uint64_t region, region_length, source;
static uint64_t piece_length;
static int keeps_mapped;
static atomic_uint_fast64_t next_chunk;

static uint64_t share_out(void *(*work)(void *), unsigned threads) {
  pthread_t ids[MAX_THREADS];
  uint64_t start = now_ns();
  for (unsigned t = 1; t < threads && t < MAX_THREADS; t++) {
    if (pthread_create(&ids[t], NULL, work, NULL) != 0) fail("pthread_create");
  }
  work(NULL);
  for (unsigned t = 1; t < threads && t < MAX_THREADS; t++) pthread_join(ids[t], NULL);
  return now_ns() - start;
}

static void take_region(const char *path) {
  uffd = receive_region(&region, &region_length);
  struct uffdio_api api = {.api = UFFD_API};
  if (ioctl(uffd, UFFDIO_API, &api) != 0) fail("UFFDIO_API");
  struct uffdio_register registration = {.range = {region, region_length}};
  registration.mode = UFFDIO_REGISTER_MODE_MISSING;
  if (ioctl(uffd, UFFDIO_REGISTER, &registration) != 0) fail("UFFDIO_REGISTER");
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(path);
  void *map = mmap(NULL, region_length, PROT_READ, MAP_SHARED, fd, 0);
  if (map == MAP_FAILED) fail("mmap of the file");
  source = (uint64_t)(uintptr_t)map;
}

static void copy(uint64_t offset, uint64_t length) {
  struct uffdio_copy request = {.dst = region + offset, .src = source + offset, .len = length};
  if (ioctl(uffd, UFFDIO_COPY, &request) == 0 || errno == EEXIST) return;
  fail("UFFDIO_COPY");
}

static int file_fd;
static uint8_t *done_pages;
static uint32_t latency_counts[64];

/* From a buffer that one page at a time is read into, without waiting for a disk where that can be. */
static void serve_accounted(uint64_t offset, uint64_t read_at) {
  static uint8_t buffer[PAGE] __attribute__((aligned(PAGE)));
  uint64_t page = offset / PAGE;
  if (done_pages[page / 8] & 1u << page % 8) return;
  struct iovec part = {buffer, PAGE};
  if (preadv2(file_fd, &part, 1, (off_t)offset, RWF_NOWAIT) != PAGE &&
      pread(file_fd, buffer, PAGE, (off_t)offset) != PAGE)
    fail("read of the file");
  struct uffdio_copy request = {.dst = region + offset, .src = (uintptr_t)buffer, .len = PAGE};
  if (ioctl(uffd, UFFDIO_COPY, &request) != 0 && errno != EEXIST) fail("UFFDIO_COPY");
  done_pages[page / 8] |= (uint8_t)(1u << page % 8);
  latency_counts[63 - __builtin_clzll((now_ns() - read_at) | 1)]++;
}

static int serve(const char *path, int keep) {
  static struct uffd_msg events[BATCH];
  take_region(path);
  done_pages = calloc(region_length / PAGE / 8 + 1, 1);
  file_fd = open(path, O_RDONLY | O_CLOEXEC);
  if (!done_pages || file_fd < 0) fail("serve");
  send_byte();
  struct pollfd waits[2] = {{.fd = uffd, .events = POLLIN}, {.fd = SOCKET, .events = POLLIN}};
  for (;;) {
    if (poll(waits, 2, -1) < 0 && errno != EINTR) fail("poll");
    if (waits[1].revents) return 0;
    if (!waits[0].revents) continue;
    ssize_t got = read(uffd, events, sizeof events);
    if (got < 0 && errno != EAGAIN) fail("read of the userfaultfd");
    uint64_t read_at = now_ns();
    for (ssize_t i = 0; i < got / (ssize_t)sizeof *events; i++) {
      uint64_t offset = (events[i].arg.pagefault.address - region) & ~(uint64_t)(PAGE - 1);
      if (keep) copy(offset, PAGE);
      else serve_accounted(offset, read_at);
    }
  }
}

static void *fill_share(void *nothing) {
  (void)nothing;
  for (;;) {
    uint64_t start = atomic_fetch_add(&next_chunk, 1) * CHUNK;
    if (start >= region_length) return NULL;
    uint64_t end = start + CHUNK < region_length ? start + CHUNK : region_length;
    for (uint64_t at = start; at < end; at += piece_length) {
      copy(at, end - at < piece_length ? end - at : piece_length);
    }
    if (!keeps_mapped) madvise((void *)(uintptr_t)(source + start), end - start, MADV_DONTNEED);
  }
}

static int fill(const char *path, uint64_t piece, unsigned threads, int keep) {
  piece_length = piece;
  keeps_mapped = keep;
  take_region(path);
  printf("filled %llu\n", (unsigned long long)share_out(fill_share, threads));
  return 0;
}

/* -- read ------------------------------------------------------------------------------------- */

static int read_fd;

static void *read_share(void *nothing) {
  (void)nothing;
  for (;;) {
    uint64_t start = atomic_fetch_add(&next_chunk, 1) * CHUNK;
    if (start + CHUNK > region_length) return NULL;
    void *target = (void *)(uintptr_t)(region + start);
    if (pread(read_fd, target, CHUNK, (off_t)start) != CHUNK) fail("pread");
  }
}

static int read_huge(const char *path, uint64_t length, unsigned threads) {
  read_fd = open(path, O_RDONLY | O_CLOEXEC);
  if (read_fd < 0) fail(path);
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *map = mmap(NULL, length + CHUNK, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (map == MAP_FAILED) fail("mmap");
  region = ((uint64_t)(uintptr_t)map + CHUNK - 1) & ~(uint64_t)(CHUNK - 1);
  region_length = length;
  madvise((void *)(uintptr_t)region, length, MADV_HUGEPAGE);
  printf("read %llu\n", (unsigned long long)share_out(read_share, threads));
  return 0;
}

int main(int count, char **arguments) {
  const char *role = count > 2 ? arguments[1] : "";
  if (count == 5 && strcmp(role, "touch") == 0)
    return touch(strtoull(arguments[2], NULL, 0), (unsigned)atoi(arguments[3]),
                 strtoull(arguments[4], NULL, 0));
  if (count == 4 && strcmp(role, "serve") == 0) return serve(arguments[2], atoi(arguments[3]));
  if (count == 6 && strcmp(role, "fill") == 0)
    return fill(arguments[2], strtoull(arguments[3], NULL, 0), (unsigned)atoi(arguments[4]),
                atoi(arguments[5]));
  if (count == 5 && strcmp(role, "read") == 0)
    return read_huge(arguments[2], strtoull(arguments[3], NULL, 0), (unsigned)atoi(arguments[4]));
  fprintf(stderr, "usage: bench-fault-path touch|serve|fill|read ...\n");
  return 2;
}
