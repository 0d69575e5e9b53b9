/*
 * The bare test guest for QEMU's aarch64 machine `virt`: no operating system, no MMU. It fills 6 MiB with a pattern,
 * every third page zero, says READY on the PL011 and then verifies all of it, for ever: `tick <round> ok` or
 * `tick <round> BAD <page>`.
 */
typedef unsigned int u32;
typedef unsigned long u64;

#define UART ((volatile u32 *)0x09000000)
#define DATA ((volatile u64 *)0x42000000)
#define PAGES 1536u
#define WORDS 512u

__asm__(".globl _start\n_start:\n  ldr x1, =0x41800000\n  mov sp, x1\n  bl run\n1: wfi\n  b 1b\n");

static void put(const char *text) {
  while (*text) *UART = (unsigned char)*text++;
}

static void put_number(u32 value) {
  char text[11];
  int at = 10;
  text[at] = 0;
  do text[--at] = (char)('0' + value % 10);
  while (value /= 10);
  put(text + at);
}

static u64 word(u32 page, u32 index) {
  return page % 3 == 2 ? 0 : (((u64)page << 32) | index) * 0x9e3779b97f4a7c15ul + 1;
}

static u32 first_bad(void) {
  for (u32 page = 0; page < PAGES; page++)
    for (u32 index = 0; index < WORDS; index++)
      if (DATA[(u64)page * WORDS + index] != word(page, index)) return page;
  return PAGES;
}

void run(void) {
  for (u32 page = 0; page < PAGES; page++)
    for (u32 index = 0; index < WORDS; index++) {
      u64 value = word(page, index);
      if (value) DATA[(u64)page * WORDS + index] = value;
    }
  put("READY\n");
  for (u32 round = 1;; round++) {
    u32 bad = first_bad();
    put("tick ");
    put_number(round);
    put(bad == PAGES ? " ok" : " BAD ");
    if (bad != PAGES) put_number(bad);
    put("\n");
  }
}
