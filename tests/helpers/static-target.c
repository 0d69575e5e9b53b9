/*
 * static-target.c: a static program without a libc, for what concerns any program: the vDSO, and
 * LD_PRELOAD, which nobody reads here. Says "ready", sleeps 300 ms, says whether the sleep was
 * whole.
 */
#include "../../shim/kernel.h"

#define NR_write BY_ARCH(1, 64)
#define NR_exit BY_ARCH(60, 93)

static void say(const char *text) {
  uint64_t length = 0;
  while (text[length] != 0) length++;
  sys(NR_write, 1, text, length);
}

static int64_t now_ns(void) {
  struct timespec64 now = {0, 0};
  sys(NR_clock_gettime, CLOCK_MONOTONIC, &now);
  return now.sec * 1000000000 + now.nsec;
}

/* The kernel enters here with an aligned stack; a function expects it as a call leaves it. */
#if defined(__x86_64__)
__asm__(".globl _start\n_start:\n  xor %ebp, %ebp\n  call program\n");
#else
__asm__(".globl _start\n_start:\n  bl program\n");
#endif

__attribute__((noreturn, used)) void program(void) {
  struct timespec64 pause = {0, 300000000};
  say("ready\n");
  const int64_t start = now_ns();
  const long result = sys(NR_nanosleep, &pause, 0);
  say(result == 0 && now_ns() - start >= 300000000 ? "sleep whole\n" : "sleep broken\n");
  for (;;) sys(NR_exit, 0);
}
