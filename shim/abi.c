/*
 * abi.c: sizes, offsets and constants as the compiler saw them. src/sys/abi.ts holds the same list
 * in the same order (ABI_TABLE) and compares the two when the shim is loaded, so that neither side
 * can change alone.
 */
#include "fsl_shim.h"
#include "helper.h"
#include "kernel.h"

#define ABI_VERSION 1

int32_t fsl_abi(uint64_t *out, int32_t capacity) {
  static const uint64_t values[] = {
      ABI_VERSION,
      sizeof(void *),
      sizeof(struct uffd_msg),
      offsetof(struct uffd_msg, event),
      offsetof(struct uffd_msg, arg.pagefault.flags),
      offsetof(struct uffd_msg, arg.pagefault.address),
      offsetof(struct uffd_msg, arg.pagefault.ptid),
      offsetof(struct uffd_msg, arg.remove.start),
      offsetof(struct uffd_msg, arg.remove.end),
      USERFAULTFD_IOC_NEW,
      O_NONBLOCK,
      O_CLOEXEC,
      FD_COUNT_MAX,
      NR_userfaultfd,
      NR_ioctl,
      NR_close,
      NR_getpid,
      NR_madvise,
      NR_pread64,
      HELPERS_MAX,
      HELPER_CALLS_MAX,
      HELPER_YIELDS,
      HELPER_MOVE,
      HELPER_TOUCH,
      HELPER_CLEAR,
      HELPER_STOP_IF_NEGATIVE,
      HELPER_STOP_UNLESS_EXPECTED,
      sizeof(struct helper_call),
      offsetof(struct helper_call, flags),
      offsetof(struct helper_call, expected),
      offsetof(struct helper_call, args),
      sizeof(struct helper_request),
      offsetof(struct helper_request, flags),
      offsetof(struct helper_request, calls),
      sizeof(struct helper_reply),
      offsetof(struct helper_reply, fd_count),
      offsetof(struct helper_reply, fds),
      offsetof(struct helper_reply, results),
      sizeof(struct helper_record),
  };
  const int32_t count = (int32_t)(sizeof(values) / sizeof(values[0]));
  for (int32_t i = 0; i < count && i < capacity; i++) out[i] = values[i];
  return count;
}
