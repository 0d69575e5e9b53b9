/*
 * The one program of the Linux test guest. It fills memory with data that is a function of (seed,
 * generation, page index), says READY, ticks on the console for ever, and takes commands there, one
 * a line:
 *
 *   info                 INFO <dataMiB> <checksum> <seed> <huge>
 *   sum [THREADS]        SUM ok|wrong <ms> <checksum>             reads every word of the data
 *   verify               VERIFY ok|wrong <ms> <pages> <badPages> <firstBadPage>
 *                                                                 compares with the generator
 *   random N [THREADS]   RANDOM ok|wrong <ms> <N>                 verifies N pages at random places
 *   poke N               POKE ok <ms> <N>                         changes a word of N random pages
 *   rewrite K            REWRITE ok <ms> <pages>                  writes every K-th page anew
 *   busy MS              BUSY <bins> <iterations per 10 ms> ...   how much CPU the guest gets
 *   tick MS              TICK <MS>                                period of the ticks, 0 = none
 *   fill MIB / free MIB  FILL|FREE ok <ms> <MiB held>             touches new memory, gives it back
 *   shell                a busybox shell on the console until it exits
 *   poweroff
 *
 * The expected checksum is computed from the generator while the data is written, never from
 * memory, so a page that the host has lost or mixed up cannot go unnoticed. Times are
 * CLOCK_MONOTONIC of the guest. Ticks pause while a command runs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define PAGES_PER_MIB 256u
#define GOLDEN 0x9e3779b97f4a7c15ull
#define POKED_WORD 7
#define MAX_THREADS 16
#define MAX_BINS 1000
#define MAX_FILLS 256

typedef unsigned long long ull; /* what %llu takes */

static int console = 1;
static uint64_t *data;         /* data_pages pages of the pattern */
static uint8_t *rewrites;      /* per page: how often it was written anew */
static uint8_t *pokes;         /* per page: how often its word POKED_WORD was changed */
static uint64_t data_pages;
static uint64_t seed;
static uint64_t expected;      /* sum over all pages of page_digest() */
static int use_huge_pages;
static struct { uint64_t *address; uint64_t mib; } fills[MAX_FILLS];
static int fill_count;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* One write per line, so that nothing can come between the parts of it. */
static void say(const char *format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  if (length > (int)sizeof line - 1) length = sizeof line - 1;
  for (int done = 0; done < length;) {
    ssize_t n = write(console, line + done, (size_t)(length - done));
    if (n < 0 && errno != EINTR && errno != EAGAIN) return;
    if (n > 0) done += (int)n;
  }
}

static uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

static uint64_t page_state(uint64_t page, uint8_t rewrite) {
  return mix(seed ^ (page + 1) * GOLDEN ^ (uint64_t)rewrite << 56);
}

/* The word generator: cheap, because it runs under emulation; every page and word is different. */
#define NEXT_WORD(state, word)                             \
  do {                                                     \
    (state) += GOLDEN;                                     \
    (word) = ((state) ^ (state) >> 29) * 0xff51afd7ed558ccdull; \
    (word) ^= (word) >> 32;                                \
  } while (0)

static uint64_t poked_value(uint64_t page, uint8_t poke) {
  return mix(~seed ^ page * GOLDEN ^ (uint64_t)poke << 48);
}

/* Order of words matters (b is a sum of prefix sums), order of pages too (page is mixed in). */
static uint64_t page_digest(uint64_t page, uint64_t a, uint64_t b) {
  return mix(a ^ page * GOLDEN) + mix(b + page);
}

/* Digest of what the page should hold. */
static uint64_t expected_digest(uint64_t page) {
  uint64_t state = page_state(page, rewrites[page]), a = 0, b = 0;
  for (unsigned i = 0; i < WORDS; i++) {
    uint64_t word;
    NEXT_WORD(state, word);
    if (i == POKED_WORD && pokes[page]) word = poked_value(page, pokes[page]);
    a += word;
    b += a;
  }
  return page_digest(page, a, b);
}

/* Writes a page whole and returns its digest, from the generated words. */
static uint64_t write_page(uint64_t *words, uint64_t page, uint8_t rewrite) {
  uint64_t state = page_state(page, rewrite), a = 0, b = 0;
  for (unsigned i = 0; i < WORDS; i++) {
    uint64_t word;
    NEXT_WORD(state, word);
    words[i] = word;
    a += word;
    b += a;
  }
  return page_digest(page, a, b);
}

static int page_is_right(uint64_t page) {
  const uint64_t *words = data + page * WORDS;
  uint64_t state = page_state(page, rewrites[page]), differences = 0;
  for (unsigned i = 0; i < WORDS; i++) {
    uint64_t word;
    NEXT_WORD(state, word);
    if (i == POKED_WORD && pokes[page]) word = poked_value(page, pokes[page]);
    differences |= word ^ words[i];
  }
  return differences == 0;
}

/* -- work on several vCPUs --------------------------------------------------------------------- */

struct share {
  uint64_t first, end;    /* half-open */
  uint64_t result, bad, first_bad;
};

static void *sum_share(void *argument) {
  struct share *share = argument;
  for (uint64_t page = share->first; page < share->end; page++) {
    const volatile uint64_t *words = data + page * WORDS;
    uint64_t a = 0, b = 0;
    for (unsigned i = 0; i < WORDS; i++) {
      a += words[i];
      b += a;
    }
    share->result += page_digest(page, a, b);
  }
  return NULL;
}

static void *verify_share(void *argument) {
  struct share *share = argument;
  share->first_bad = UINT64_MAX;
  for (uint64_t page = share->first; page < share->end; page++) {
    if (page_is_right(page)) continue;
    if (share->bad++ == 0) share->first_bad = page;
  }
  return NULL;
}

static void *random_share(void *argument) {
  struct share *share = argument;
  for (uint64_t n = share->first; n < share->end; n++) {
    if (!page_is_right(mix(n * GOLDEN + 12345) % data_pages)) share->bad++;
  }
  return NULL;
}

/* Splits [0, end) over threads and adds the results up. */
static struct share run_shares(void *(*work)(void *), uint64_t end, unsigned threads) {
  struct share shares[MAX_THREADS] = {0}, total = {.first_bad = UINT64_MAX};
  pthread_t ids[MAX_THREADS];
  if (threads < 1) threads = 1;
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  for (unsigned t = 0; t < threads; t++) {
    shares[t].first = end * t / threads;
    shares[t].end = end * (t + 1) / threads;
    if (t > 0 && pthread_create(&ids[t], NULL, work, &shares[t]) != 0) _exit(1);
  }
  work(&shares[0]);
  for (unsigned t = 0; t < threads; t++) {
    if (t > 0) pthread_join(ids[t], NULL);
    total.result += shares[t].result;
    total.bad += shares[t].bad;
    if (!shares[t].bad || shares[t].first_bad >= total.first_bad) continue;
    total.first_bad = shares[t].first_bad;
  }
  return total;
}

/* -- commands ---------------------------------------------------------------------------------- */

static double ms_since(uint64_t start) { return (double)(now_ns() - start) / 1e6; }

static void *map_memory(uint64_t mib) {
  void *address = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return NULL;
  madvise(address, mib << 20, use_huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  return address;
}

static void do_sum(unsigned threads) {
  uint64_t start = now_ns();
  uint64_t found = run_shares(sum_share, data_pages, threads).result;
  say("SUM %s %.1f %016llx\n", found == expected ? "ok" : "wrong", ms_since(start), (ull)found);
}

static void do_verify(void) {
  uint64_t start = now_ns();
  struct share total = run_shares(verify_share, data_pages, 1);
  say("VERIFY %s %.1f %llu %llu %lld\n", total.bad ? "wrong" : "ok", ms_since(start),
      (ull)data_pages, (ull)total.bad, total.bad ? (long long)total.first_bad : -1LL);
}

static void do_random(uint64_t count, unsigned threads) {
  uint64_t start = now_ns();
  uint64_t bad = data_pages ? run_shares(random_share, count, threads).bad : 0;
  say("RANDOM %s %.1f %llu\n", bad ? "wrong" : "ok", ms_since(start), (ull)count);
}

static void do_poke(uint64_t count) {
  uint64_t start = now_ns();
  for (uint64_t n = 0; n < count && data_pages; n++) {
    uint64_t page = mix(n * GOLDEN ^ 0x5bd1e995) % data_pages;
    expected -= expected_digest(page);
    if (++pokes[page] == 0) pokes[page] = 1;
    data[page * WORDS + POKED_WORD] = poked_value(page, pokes[page]);
    expected += expected_digest(page);
  }
  say("POKE ok %.1f %llu\n", ms_since(start), (ull)count);
}

static void do_rewrite(uint64_t step) {
  uint64_t start = now_ns(), pages = 0;
  for (uint64_t page = 0; page < data_pages; page += step ? step : 1, pages++) {
    expected -= expected_digest(page);
    pokes[page] = 0;
    expected += write_page(data + page * WORDS, page, ++rewrites[page]);
  }
  say("REWRITE ok %.1f %llu\n", ms_since(start), (ull)pages);
}

static void do_busy(uint64_t duration_ms) {
  static char line[MAX_BINS * 12 + 32];
  static uint32_t bins[MAX_BINS];
  uint64_t bin_count = duration_ms / 10, state = seed, word = 0, start = now_ns();
  if (bin_count > MAX_BINS) bin_count = MAX_BINS;
  memset(bins, 0, sizeof bins);
  for (;;) {
    for (unsigned i = 0; i < 2000; i++) {
      NEXT_WORD(state, word);
      __asm__ volatile("" : : "r"(word));
    }
    uint64_t bin = (now_ns() - start) / 10000000u;
    if (bin >= bin_count) break;
    bins[bin]++;
  }
  int length = snprintf(line, sizeof line, "BUSY %llu", (ull)bin_count);
  for (uint64_t i = 0; i < bin_count; i++) length += snprintf(line + length, 12, " %u", bins[i]);
  line[length++] = '\n';
  for (int done = 0; done < length;) {
    ssize_t n = write(console, line + done, (size_t)(length - done));
    if (n > 0) done += (int)n;
  }
}

static uint64_t filled_mib(void) {
  uint64_t mib = 0;
  for (int i = 0; i < fill_count; i++) mib += fills[i].mib;
  return mib;
}

static void do_fill(uint64_t mib) {
  uint64_t start = now_ns();
  uint64_t *address = mib && fill_count < MAX_FILLS ? map_memory(mib) : NULL;
  if (!address) {
    say("FILL failed %.1f %llu\n", ms_since(start), (ull)filled_mib());
    return;
  }
  for (uint64_t page = 0; page < mib * PAGES_PER_MIB; page++)
    write_page(address + page * WORDS, ~page, 0);
  fills[fill_count].address = address;
  fills[fill_count++].mib = mib;
  say("FILL ok %.1f %llu\n", ms_since(start), (ull)filled_mib());
}

/* Gives whole earlier fills back, the latest first, until `mib` MiB are gone or nothing is left. */
static void do_free(uint64_t mib) {
  uint64_t start = now_ns(), gone = 0;
  while (fill_count > 0 && gone < mib) {
    fill_count--;
    munmap(fills[fill_count].address, fills[fill_count].mib << 20);
    gone += fills[fill_count].mib;
  }
  say("FREE ok %.1f %llu\n", ms_since(start), (ull)filled_mib());
}

static void set_raw(int raw) {
  struct termios mode;
  if (tcgetattr(console, &mode) != 0) return;
  if (raw) cfmakeraw(&mode);
  else {
    mode.c_lflag |= ICANON | ECHO | ISIG;
    mode.c_iflag |= ICRNL;
    mode.c_oflag |= OPOST | ONLCR;
  }
  tcsetattr(console, TCSANOW, &mode);
}

static void do_shell(void) {
  set_raw(0);
  pid_t pid = fork();
  if (pid == 0) {
    setsid();
    for (int fd = 0; fd < 3; fd++) dup2(console, fd);
    execl("/bin/busybox", "sh", "-i", (char *)NULL);
    _exit(127);
  }
  if (pid > 0) waitpid(pid, NULL, 0);
  set_raw(1);
  say("SHELL ok\n");
}

static void power_off(void) {
  say("POWEROFF\n");
  tcdrain(console);
  /* Without ACPI a machine can only be reset; QEMU's -no-reboot ends it then. */
  reboot(access("/sys/firmware/acpi", F_OK) == 0 ? RB_POWER_OFF : RB_AUTOBOOT);
}

static uint64_t tick_ms = 50;

static void obey(char *line) {
  char word[16] = "";
  ull first = 0, second = 0;
  int fields = sscanf(line, "%15s %llu %llu", word, &first, &second);
  if (fields < 1) return;
  if (!strcmp(word, "info"))
    say("INFO %llu %016llx %llu %d\n", (ull)(data_pages / PAGES_PER_MIB), (ull)expected, (ull)seed,
        use_huge_pages);
  else if (!strcmp(word, "sum")) do_sum((unsigned)first);
  else if (!strcmp(word, "verify")) do_verify();
  else if (!strcmp(word, "random")) do_random(first, (unsigned)second);
  else if (!strcmp(word, "poke")) do_poke(first);
  else if (!strcmp(word, "rewrite")) do_rewrite(first);
  else if (!strcmp(word, "busy")) do_busy(first);
  else if (!strcmp(word, "fill")) do_fill(first);
  else if (!strcmp(word, "free")) do_free(first);
  else if (!strcmp(word, "shell")) do_shell();
  else if (!strcmp(word, "poweroff")) power_off();
  else if (!strcmp(word, "tick")) {
    tick_ms = first;
    say("TICK %llu\n", first);
  } else say("UNKNOWN %s\n", word);
}

/* -- start ------------------------------------------------------------------------------------- */

static char command_line[4096];

/* Value of `fsl.NAME=` on the kernel command line, or the default. */
static uint64_t option(const char *name, uint64_t otherwise) {
  const char *found = strstr(command_line, name);
  return found ? strtoull(found + strlen(name), NULL, 0) : otherwise;
}

static void open_console(void) {
  char path[64] = "/dev/ttyS0";
  const char *found = strstr(command_line, "fsl.console=");
  if (found) {
    size_t length = strcspn(found + 12, " \n");
    if (length > 40) length = 40;
    snprintf(path, sizeof path, "/dev/%.*s", (int)length, found + 12);
  }
  int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (fd >= 0) console = fd;
  set_raw(1);
}

static void make_data(void) {
  uint64_t mib = option("fsl.data=", 16);
  data_pages = mib * PAGES_PER_MIB;
  if (mib == 0) return;
  data = map_memory(mib);
  rewrites = calloc(data_pages, 1);
  pokes = calloc(data_pages, 1);
  if (!data || !rewrites || !pokes) {
    say("FAILED no memory for %llu MiB\n", (ull)mib);
    power_off();
  }
  for (uint64_t page = 0; page < data_pages; page++)
    expected += write_page(data + page * WORDS, page, 0);
}

int main(void) {
  int fd = open("/proc/cmdline", O_RDONLY);
  if (fd >= 0) {
    ssize_t n = read(fd, command_line, sizeof command_line - 1);
    command_line[n > 0 ? n : 0] = 0;
    close(fd);
  }
  seed = option("fsl.seed=", 1);
  tick_ms = option("fsl.tick=", 50);
  use_huge_pages = (int)option("fsl.huge=", 0);
  open_console();
  make_data();
  say("READY %llu %016llx\n", (ull)(data_pages / PAGES_PER_MIB), (ull)expected);

  char line[256];
  size_t length = 0;
  uint64_t ticks = 0, next_tick = now_ns() + tick_ms * 1000000u;
  for (;;) {
    int timeout = -1;
    if (tick_ms > 0) {
      uint64_t now = now_ns();
      if (now >= next_tick) {
        say("tick %llu\n", (ull)++ticks);
        next_tick += tick_ms * 1000000u;
        if (next_tick < now) next_tick = now + tick_ms * 1000000u;
        continue;
      }
      timeout = (int)((next_tick - now) / 1000000u) + 1;
    }
    struct pollfd input = {.fd = console, .events = POLLIN};
    if (poll(&input, 1, timeout) <= 0) continue;
    char byte;
    if (read(console, &byte, 1) != 1) continue;
    if (byte == '\r' || byte == '\n') {
      line[length] = 0;
      length = 0;
      obey(line);
      next_tick = now_ns() + tick_ms * 1000000u;
    } else if (length < sizeof line - 1) line[length++] = byte;
  }
}
