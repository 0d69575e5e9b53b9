/*
 * helper.h: the protocol between fsl and a helper task (shim/helper.c, src/sys/helper-task.ts), and
 * what the preloaded library says of the helpers that it made (shim/preload.c).
 *
 * Host byte order. The socket is a SOCK_SEQPACKET pair: one packet is one request or one reply, as
 * long as its calls or results make it. A request may carry descriptors by SCM_RIGHTS. All 64-bit
 * numbers go as doubles, exact below 2^53: JavaScript writes one in one store.
 */
#ifndef FSL_HELPER_H
#define FSL_HELPER_H

#include <stddef.h>
#include <stdint.h>

#include "kernel.h"

#define HELPERS_MAX 9
#define HELPER_CALLS_MAX 256
/* Staging memory of a helper: one slot holds one chunk. */
#define HELPER_SLOT_BYTES (2ul << 20)
#define HELPER_SLOTS_MAX 256

/* Bits of `flags`. */
#define HELPER_STOP_IF_NEGATIVE 1u
#define HELPER_STOP_UNLESS_EXPECTED 2u

/*
 * In place of a system call's number: UFFDIO_MOVE on the userfaultfd args[0], with args[1] to args[4] as
 * dst, src, len and mode. The result is the kernel's `move`, or the ioctl's where that is 0.
 */
#define HELPER_MOVE 0xfffffffeu
/*
 * In place of a system call's number: writes a 0 to the byte at args[0], which must be the helper's to
 * write to. A huge page that is missing there comes without the lock on the whole address space
 * (mmap_lock), under which a system call would have it cleared: everybody who maps something waits then.
 */
#define HELPER_TOUCH 0xffffffffu
/*
 * In place of a system call's number: makes args[1] bytes at args[0] zero, whole pages of 4 KiB. Looks first, and
 * writes only to pages that are something else. The result is args[1].
 */
#define HELPER_CLEAR 0xfffffffdu

struct helper_call {
  uint32_t number;
  uint32_t flags;
  double expected; /* with HELPER_STOP_UNLESS_EXPECTED */
  double args[6];
};

/* Of a request: it ends before its next call when another request waits. */
#define HELPER_YIELDS 1u

struct helper_request {
  uint32_t call_count;
  uint32_t flags;
  struct helper_call calls[HELPER_CALLS_MAX];
};

struct helper_reply {
  int32_t calls_made; /* up to the one that stopped the rest, that one included */
  int32_t fd_count;   /* descriptors that came with the request, and their numbers in the helper */
  int32_t fds[FD_COUNT_MAX];
  double results[HELPER_CALLS_MAX]; /* of calls_made calls; -errno is what the kernel gives */
};

/* One helper, as the preload message has it. Its socket is among the message's descriptors. */
struct helper_record {
  int32_t pid;
  int32_t uffd; /* number of the userfaultfd in the helper */
  uint64_t staging_addr, staging_bytes;
};

_Static_assert(sizeof(struct helper_call) == 64, "helper_call");
_Static_assert(sizeof(struct helper_request) == 16392, "helper_request");
_Static_assert(sizeof(struct helper_reply) == 2120, "helper_reply");
_Static_assert(sizeof(struct helper_record) == 24, "helper_record");

struct helpers_wanted {
  int32_t count;
  int32_t slots; /* of staging memory, each; one where the host has no address space for so many */
  int32_t uffd;
  int32_t target_pid; /* the process whose memory it is: they end when it does */
  /*
   * Of the caller's parent, whose children they become; or 0: the caller ends soon, they become init's,
   * and end when their socket does.
   */
  int32_t parent_pid;
};

/*
 * Makes helpers in the caller's address space. records[i] and sockets[i] describe the i-th: the socket
 * is fsl's end, close-on-exec, the caller's to send and to close. Returns how many there are; each is
 * ready for requests. Not being able to make one is not an error.
 */
int32_t make_helpers(const struct helpers_wanted *wanted, struct helper_record *records,
                     int32_t *sockets);

#endif
