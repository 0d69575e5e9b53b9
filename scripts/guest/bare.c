/*
 * The bare test guest: a multiboot program in 32-bit protected mode, without paging, interrupts or
 * an operating system. It runs where a 64-bit kernel does not, under KVM and TCG alike. It fills
 * its memory from FIRST_PAGE up with a pattern, says READY on COM1, and then verifies all pages
 * again and again, for ever.
 *
 * Options on the -append line (separated by blanks):
 *   size=MIB         end of the tested memory, from address 0; default: all memory below 4 GiB that
 *                    multiboot reports
 *   seed=N           default 1
 *   zero=N           every N-th page stays zero (page % N == N - 1); default 3, 0 = none
 *   zero=upper       the upper half stays zero
 *   order=random     verify in a pseudo-random order (every page once a round)
 *   churn=N          keep changing the first N pages of the range, between data and zero; default 0
 *   beat=N           pages between heartbeats, default 4096
 *   words=N          words of a page that are used, 1..1024, a power of two, evenly spread, the last
 *                    one of the page included; default 1024. Few where KVM has to emulate every
 *                    instruction of 32-bit code
 *   once             stop with `done` after the first round
 *
 * Output:
 *   READY <pages> <dataPages>
 *   beat <n>                    after every `beat` pages, counted over all rounds: proof of life
 *   tick <round> ok             a round is over, all pages were right
 *   tick <round> BAD <page> <expected word> <found word>
 *                               once for each bad page; page = page number, address / 4096
 * Input on COM1, looked at between pages: `v` prints "verify <pages verified so far>".
 */
typedef unsigned int u32;
typedef unsigned char u8;

#define PAGE 4096u
#define WORDS (PAGE / 4)
#define FIRST_PAGE 512u /* 2 MiB: this program and what the firmware left lie below */
#define COM1 0x3f8u
#define CHURN_MAX 65536u

/*
 * The n-th used word of a page is first_word() advanced n times: different for every page, word and
 * generation.
 */
static u32 seed = 1, zero_every = 3, zero_upper, random_order, churn, beat_pages = 4096, once;
static u32 stride = 1; /* in words: WORDS / words= */
static u32 end_page, page_count, upper_from;
static u8 generation[CHURN_MAX]; /* of the churning pages; 0 = the page is zero */

struct multiboot_info {
  u32 flags, mem_lower, mem_upper, boot_device, command_line;
};

static inline void out8(u32 port, u8 value) {
  __asm__ volatile("outb %0, %w1" : : "a"(value), "Nd"(port));
}
static inline u8 in8(u32 port) {
  u8 value;
  __asm__ volatile("inb %w1, %0" : "=a"(value) : "Nd"(port));
  return value;
}

static void put(char c) {
  while (!(in8(COM1 + 5) & 0x20)) {}
  out8(COM1, (u8)c);
}
static void text(const char *s) {
  while (*s) put(*s++);
}
static void number(u32 value) {
  char digits[10];
  int n = 0;
  do digits[n++] = (char)('0' + value % 10);
  while ((value /= 10) != 0);
  while (n) put(digits[--n]);
}
static void hexadecimal(u32 value) {
  for (int shift = 28; shift >= 0; shift -= 4) put("0123456789abcdef"[value >> shift & 15]);
}

static void serial_init(void) {
  out8(COM1 + 1, 0);    /* no interrupts */
  out8(COM1 + 3, 0x80); /* divisor latch */
  out8(COM1 + 0, 1);    /* 115200 baud */
  out8(COM1 + 1, 0);
  out8(COM1 + 3, 3);    /* 8n1 */
  out8(COM1 + 2, 7);    /* FIFOs on and empty */
}

static int starts_with(const char *s, const char *prefix) {
  while (*prefix)
    if (*s++ != *prefix++) return 0;
  return 1;
}
static u32 parse(const char *s) {
  u32 value = 0;
  while (*s >= '0' && *s <= '9') value = value * 10 + (u32)(*s++ - '0');
  return value;
}

static u32 mix(u32 z) {
  z = (z ^ z >> 16) * 0x7feb352du;
  z = (z ^ z >> 15) * 0x846ca68bu;
  return z ^ z >> 16;
}

/* Generation of a page: 0 = zero page. Only churning pages change it. */
static u32 generation_of(u32 page) {
  u32 index = page - FIRST_PAGE;
  if (index < churn) return generation[index];
  if (zero_upper) return page < upper_from;
  return !(zero_every && page % zero_every == zero_every - 1);
}

static inline u32 first_word(u32 page, u32 gen) {
  return mix(seed * 0x9e3779b9u ^ page ^ gen << 24) | 1u;
}
#define NEXT(word) ((word) = ((word) ^ (word) >> 15) * 0x2c1b3c6du + 0x9e3779b9u)

static void write_page(u32 page, u32 gen) {
  volatile u32 *words = (volatile u32 *)(page * PAGE);
  u32 word = first_word(page, gen);
  for (u32 i = stride - 1; i < WORDS; i += stride) {
    words[i] = gen ? word : 0;
    NEXT(word);
  }
}

/* A zero page that is zero already is only read: nobody has to allocate it. */
static void prepare_zero_page(u32 page) {
  volatile u32 *words = (volatile u32 *)(page * PAGE);
  for (u32 i = stride - 1; i < WORDS; i += stride)
    if (words[i]) words[i] = 0;
}

static int page_is_right(u32 page, u32 *expected, u32 *found) {
  volatile const u32 *words = (volatile const u32 *)(page * PAGE);
  u32 gen = generation_of(page), word = first_word(page, gen);
  for (u32 i = stride - 1; i < WORDS; i += stride) {
    u32 value = words[i], want = gen ? word : 0;
    if (value != want) {
      *expected = want;
      *found = value;
      return 0;
    }
    NEXT(word);
  }
  return 1;
}

static void options(const char *s) {
  u32 size_mib = 0;
  for (; *s; s++) {
    if (starts_with(s, "size=")) size_mib = parse(s + 5);
    else if (starts_with(s, "seed=")) seed = parse(s + 5);
    else if (starts_with(s, "zero=upper")) zero_upper = 1;
    else if (starts_with(s, "zero=")) zero_every = parse(s + 5);
    else if (starts_with(s, "order=random")) random_order = 1;
    else if (starts_with(s, "churn=")) churn = parse(s + 6);
    else if (starts_with(s, "beat=")) beat_pages = parse(s + 5);
    else if (starts_with(s, "words=")) stride = WORDS / (parse(s + 6) ? parse(s + 6) : WORDS);
    else if (starts_with(s, "once")) once = 1;
    while (*s && *s != ' ') s++;
    if (!*s) break;
  }
  if (size_mib && size_mib * 256u < end_page) end_page = size_mib * 256u;
  if (beat_pages == 0) beat_pages = 1;
  if (stride == 0) stride = 1;
}

static u32 greatest_common_divisor(u32 a, u32 b) {
  while (b) {
    u32 rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

void guest_main(u32 magic, const struct multiboot_info *info) {
  serial_init();
  if (magic != 0x2badb002u || !(info->flags & 1)) {
    text("FAILED not started by multiboot\n");
    return;
  }
  end_page = 256u + info->mem_upper / 4u; /* mem_upper counts KiB from 1 MiB up */
  if (info->flags & 4) options((const char *)info->command_line);
  if (end_page <= FIRST_PAGE) {
    text("FAILED no memory above 2 MiB\n");
    return;
  }
  page_count = end_page - FIRST_PAGE;
  if (churn > CHURN_MAX) churn = CHURN_MAX;
  if (churn > page_count) churn = page_count;
  upper_from = FIRST_PAGE + page_count / 2;

  u32 data_pages = 0;
  for (u32 page = FIRST_PAGE; page < end_page; page++) {
    if (page - FIRST_PAGE < churn) generation[page - FIRST_PAGE] = (u8)(page % 3);
    u32 gen = generation_of(page);
    if (gen) {
      write_page(page, gen);
      data_pages++;
    } else prepare_zero_page(page);
  }
  text("READY ");
  number(page_count);
  put(' ');
  number(data_pages);
  put('\n');

  /* A step that has no common divisor with the number of pages visits each of them once a round. */
  u32 step = 1;
  if (random_order) {
    step = 0x9e3779b1u % page_count | 1u;
    while (greatest_common_divisor(step, page_count) != 1) step += 2;
  }
  u32 until_beat = beat_pages, beats = 0, verified = 0, next_churn = 0;
  for (u32 round = 1;; round++) {
    u32 bad = 0, index = 0;
    for (u32 n = 0; n < page_count; n++) {
      u32 page = FIRST_PAGE + index, expected, found;
      if (!page_is_right(page, &expected, &found)) {
        bad++;
        text("tick ");
        number(round);
        text(" BAD ");
        number(page);
        put(' ');
        hexadecimal(expected);
        put(' ');
        hexadecimal(found);
        put('\n');
      }
      verified++;
      index = index + step < page_count ? index + step : (index + step) % page_count;
      if (churn && n % 16 == 0) {
        u8 gen = (u8)((generation[next_churn] + 1u) % 3u);
        generation[next_churn] = gen;
        write_page(FIRST_PAGE + next_churn, gen);
        next_churn = next_churn + 1 < churn ? next_churn + 1 : 0;
      }
      if (--until_beat == 0) {
        until_beat = beat_pages;
        text("beat ");
        number(++beats);
        put('\n');
        if (in8(COM1 + 5) & 1 && in8(COM1) == 'v') {
          text("verify ");
          number(verified);
          put('\n');
        }
      }
    }
    if (!bad) {
      text("tick ");
      number(round);
      text(" ok\n");
    }
    if (once) {
      text("done\n");
      return;
    }
  }
}

/* clang turns loops into calls of these. */
void *memset(void *to, int value, unsigned long n) {
  for (u8 *p = to; n--; p++) *(volatile u8 *)p = (u8)value;
  return to;
}

__asm__(
    ".section .multiboot, \"a\"\n"
    ".balign 4\n"
    /* magic, flags (memory information), checksum */
    ".long 0x1badb002, 0x00000002, -(0x1badb002 + 0x00000002)\n"
    ".text\n"
    ".globl _start\n"
    "_start:\n"
    "  cli\n"
    "  cld\n"
    "  mov $stack_end, %esp\n"
    "  push %ebx\n"
    "  push %eax\n"
    "  call guest_main\n"
    "1:hlt\n"
    "  jmp 1b\n"
    ".bss\n"
    ".balign 16\n"
    "  .skip 16384\n"
    "stack_end:\n");
