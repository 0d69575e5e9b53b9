/*
 * memory.c: the four functions that a compiler may call on its own, even in free-standing code.
 * Volatile pointers keep it from turning these loops into calls of themselves.
 */
#include <stddef.h>

#define HIDDEN __attribute__((visibility("hidden"), used))

HIDDEN void *memcpy(void *restrict to, const void *restrict from, size_t length) {
  volatile unsigned char *out = to;
  const unsigned char *in = from;
  for (size_t i = 0; i < length; i++) out[i] = in[i];
  return to;
}

HIDDEN void *memmove(void *to, const void *from, size_t length) {
  volatile unsigned char *out = to;
  const unsigned char *in = from;
  if (out < (volatile unsigned char *)in) {
    for (size_t i = 0; i < length; i++) out[i] = in[i];
  } else {
    for (size_t i = length; i > 0; i--) out[i - 1] = in[i - 1];
  }
  return to;
}

HIDDEN void *memset(void *to, int value, size_t length) {
  volatile unsigned char *out = to;
  for (size_t i = 0; i < length; i++) out[i] = (unsigned char)value;
  return to;
}

HIDDEN int memcmp(const void *a, const void *b, size_t length) {
  const volatile unsigned char *left = a, *right = b;
  for (size_t i = 0; i < length; i++) {
    if (left[i] != right[i]) return left[i] < right[i] ? -1 : 1;
  }
  return 0;
}
