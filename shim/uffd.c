/*
 * uffd.c: userfaultfd(2) and ioctl_userfaultfd(2), one function per call.
 *
 * COPY, ZEROPAGE and POISON answer with the signed field of their argument and not with
 * errno: after partial progress the ioctl fails with EAGAIN although `copy` is positive (measured
 * on Linux 6.18), and when nothing was done the field holds -errno. The field is preset so that a
 * kernel that fails before it writes the field (EINVAL, EBADF, ENOTTY, an ESRCH of an address space
 * that is gone) still gives that errno.
 */
#include "fsl_shim.h"
#include "kernel.h"

#define UNTOUCHED INT64_MIN

int32_t fsl_userfaultfd(int32_t flags) {
  return (int32_t)sys(NR_userfaultfd, flags);
}

int32_t fsl_userfaultfd_dev(fd_t dev, int32_t flags) {
  return (int32_t)sys(NR_ioctl, dev, USERFAULTFD_IOC_NEW, flags);
}

int32_t fsl_uffd_api(fd_t uffd, num_t features, uint64_t *out) {
  struct uffdio_api api = {.api = UFFD_API, .features = (uint64_t)features, .ioctls = 0};
  int32_t result = (int32_t)sys(NR_ioctl, uffd, UFFDIO_API, &api);
  out[0] = api.features;
  out[1] = api.ioctls;
  return result;
}

int32_t fsl_uffd_register(fd_t uffd, num_t addr, num_t length, int32_t mode, uint64_t *out) {
  struct uffdio_register request = {
      .range = {(uint64_t)addr, (uint64_t)length}, .mode = (uint64_t)mode, .ioctls = 0};
  int32_t result = (int32_t)sys(NR_ioctl, uffd, UFFDIO_REGISTER, &request);
  out[0] = request.ioctls;
  return result;
}

static int32_t range_ioctl(fd_t uffd, unsigned long request, num_t addr, num_t length) {
  struct uffdio_range range = {(uint64_t)addr, (uint64_t)length};
  return (int32_t)sys(NR_ioctl, uffd, request, &range);
}

int32_t fsl_uffd_unregister(fd_t uffd, num_t addr, num_t length) {
  return range_ioctl(uffd, UFFDIO_UNREGISTER, addr, length);
}

int32_t fsl_uffd_wake(fd_t uffd, num_t addr, num_t length) {
  return range_ioctl(uffd, UFFDIO_WAKE, addr, length);
}

/* The field wins over the return value, unless the kernel did not get as far as writing it. */
static num_t outcome(long result, int64_t field) {
  if (field != UNTOUCHED && field != 0) return (num_t)field;
  return (num_t)result;
}

num_t fsl_uffd_copy(fd_t uffd, num_t dst, num_t src, num_t length, int32_t mode) {
  struct uffdio_copy copy = {.dst = (uint64_t)dst,
                             .src = (uint64_t)src,
                             .len = (uint64_t)length,
                             .mode = (uint64_t)mode,
                             .copy = UNTOUCHED};
  long result = sys(NR_ioctl, uffd, UFFDIO_COPY, &copy);
  return outcome(result, copy.copy);
}

static num_t fill(fd_t uffd, unsigned long request, num_t addr, num_t length, int32_t mode) {
  struct uffdio_fill argument = {.range = {(uint64_t)addr, (uint64_t)length},
                                 .mode = (uint64_t)mode,
                                 .done = UNTOUCHED};
  long result = sys(NR_ioctl, uffd, request, &argument);
  return outcome(result, argument.done);
}

num_t fsl_uffd_zeropage(fd_t uffd, num_t addr, num_t length, int32_t mode) {
  return fill(uffd, UFFDIO_ZEROPAGE, addr, length, mode);
}

num_t fsl_uffd_poison(fd_t uffd, num_t addr, num_t length, int32_t mode) {
  return fill(uffd, UFFDIO_POISON, addr, length, mode);
}
