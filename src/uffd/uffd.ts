/**
 * A userfaultfd and what the kernel answers on it. The errno of each ioctl becomes meaning here,
 * once. Knows nothing of snapshots. `copy`, `zeropage` and the reading of events allocate nothing.
 *
 * Several threads may use one descriptor, each through an object of its own; only one may read
 * events. The addresses are those of the address space in which the userfaultfd was made, which is
 * usually not this process's.
 *
 * Closing is dangerous: when the last descriptor is closed, threads that wait for a page go on with
 * a *zero page*, and nobody is told (measured on Linux 6.18).
 * @source Linux fs/userfaultfd.c, mm/userfaultfd.c; ioctl_userfaultfd(2)
 */
import { assert, FslError } from "../errors.ts";
import { hex } from "../pages.ts";
import {
  EAGAIN,
  EEXIST,
  EFAULT,
  EINTR,
  EINVAL,
  ENOENT,
  ENOMEM,
  ESRCH,
  MODE_DONTWAKE,
  O_CLOEXEC,
  O_RDWR,
  UFFD_EVENT_PAGEFAULT,
  UFFD_EVENT_REMOVE,
  UFFD_EVENT_UNMAP,
  UFFD_MSG,
} from "../sys/abi.ts";
import { grantDevice } from "../sys/device-access.ts";
import * as sys from "../sys/native.ts";

export const EVENT_PAGEFAULT = UFFD_EVENT_PAGEFAULT;
export const EVENT_REMOVE = UFFD_EVENT_REMOVE;
export const EVENT_UNMAP = UFFD_EVENT_UNMAP;

/**
 * What `copy`, `zeropage` and `poison` answer when nothing was done; else the bytes done (> 0).
 * They are the negative errno, so that an unexpected one keeps its number.
 */
/** The first page is there already. Wake the range: a waiter of a lost race may still sleep. */
export const COPY_EXISTS = -EEXIST;
/**
 * The address space is changing (a REMOVE, UNMAP, REMAP or FORK event waits to be read): read
 * events, try again.
 */
export const COPY_RETRY = -EAGAIN;
/** The target has ended. */
export const COPY_GONE = -ESRCH;
/** The range is not registered any more: unmapped, remapped or unregistered. */
export const COPY_CHANGED = -ENOENT;
/** The source bytes cannot be read, e.g. the mapped file was truncated. */
export const COPY_SOURCE = -EFAULT;
/** No memory in the target's cgroup or on the host. */
export const COPY_NO_MEMORY = -ENOMEM;
/** Do not wake who waits for the range. */
export const DONTWAKE = MODE_DONTWAKE;

/** What UFFDIO_API granted. */
export interface UffdApi {
  /** Bits of UFFD_FEATURES. */
  readonly features: number;
  readonly ioctls: bigint;
}

/**
 * Events as they were read, decoded in place: accessors over the buffer that `Uffd.readEvents`
 * fills. Addresses below 2^53, which every user address is.
 */
export class UffdEvents {
  readonly #data: DataView;

  /**
   * @param data the buffer that events are read into; its length is the most events of one read,
   * times 32
   */
  constructor(data: DataView) {
    this.#data = data;
  }

  /** One of EVENT_*. */
  type(index: number): number {
    return this.#data.getUint8(index * UFFD_MSG.BYTES);
  }

  /** Makes the first `count` types 0, which no event has: what a read puts there then shows. */
  clearTypes(count: number): void {
    for (let index = 0; index < count; index += 1) this.#data.setUint8(index * UFFD_MSG.BYTES, 0);
  }

  /** Bits of UFFD_PAGEFAULT_FLAG_*. */
  faultFlags(index: number): number {
    return this.#data.getUint32(index * UFFD_MSG.BYTES + UFFD_MSG.FAULT_FLAGS, true);
  }

  /** Page address, or the exact address with feature EXACT_ADDRESS. */
  faultAddress(index: number): number {
    return this.#u64(index * UFFD_MSG.BYTES + UFFD_MSG.FAULT_ADDRESS);
  }

  /** Thread id of who waits, with feature THREAD_ID; in the pid namespace of the reader. */
  faultTid(index: number): number {
    return this.#data.getUint32(index * UFFD_MSG.BYTES + UFFD_MSG.FAULT_TID, true);
  }

  /** REMOVE and UNMAP: first address. */
  removeStart(index: number): number {
    return this.#u64(index * UFFD_MSG.BYTES + UFFD_MSG.REMOVE_START);
  }

  /** REMOVE and UNMAP: end, exclusive. */
  removeEnd(index: number): number {
    return this.#u64(index * UFFD_MSG.BYTES + UFFD_MSG.REMOVE_END);
  }

  #u64(offset: number): number {
    return this.#data.getUint32(offset, true) + this.#data.getUint32(offset + 4, true) * 2 ** 32;
  }
}

export class Uffd {
  #fd: number;

  /** @param fd an open userfaultfd; belongs to this object if, and only if, `close` is called */
  constructor(fd: number) {
    assert(fd >= 0, `userfaultfd descriptor ${fd}`);
    this.#fd = fd;
  }

  get fd(): number {
    assert(this.#fd >= 0, "Uffd is closed");
    return this.#fd;
  }

  /**
   * The handshake; works once per userfaultfd.
   * @param features bits of UFFD_FEATURES to switch on
   * @throws FslError HOST_UNSUPPORTED when the kernel does not know one of them, or the handshake
   * was done before
   */
  api(features: number): UffdApi {
    const out = new BigUint64Array(2);
    const result = sys.uffdApi(this.fd, features, out);
    if (result < 0) {
      const why = result === -EINVAL ? "a feature is unknown, or it was done before" : "";
      const asked = `features ${hex(features)}`;
      throw failure("HOST_UNSUPPORTED", "UFFDIO_API", result, [asked, why]);
    }
    return { features: Number(out[0]), ioctls: out[1] ?? 0n };
  }

  /**
   * Makes page faults in a range events of this descriptor.
   * @param addr bytes, a multiple of the range's page size; `length` likewise
   * @param mode REGISTER_MISSING
   * @returns mask of the ioctls that the range accepts, `1n << UFFDIO_COPY_BIT` …
   * @throws FslError TARGET_LOST when the target has ended, HOST_UNSUPPORTED for memory that cannot
   * be registered
   */
  register(addr: number, length: number, mode: number): bigint {
    const out = new BigUint64Array(1);
    const result = sys.uffdRegister(this.fd, addr, length, mode, out);
    if (result < 0) {
      const code = result === -ESRCH || result === -ENOMEM ? "TARGET_LOST" : "HOST_UNSUPPORTED";
      throw failure(code, "UFFDIO_REGISTER", result, [rangeText(addr, length), `mode ${mode}`]);
    }
    return out[0] ?? 0n;
  }

  /**
   * Lets a range go. Pages that are missing then are zero pages, without any error: only for ranges
   * that are complete or meant to be zero. Whoever waits in it faults again, and finds a zero page.
   * @returns false when the target has ended (ESRCH; ENOMEM when its address space is gone)
   * @throws FslError INTERNAL, errno EINVAL: nothing is mapped there any more, or what is could
   * never be registered
   */
  unregister(addr: number, length: number): boolean {
    const result = sys.uffdUnregister(this.fd, addr, length);
    if (result === -ESRCH || result === -ENOMEM) return false;
    if (result < 0)
      throw failure("INTERNAL", "UFFDIO_UNREGISTER", result, [rangeText(addr, length)]);
    // The kernel wakes the range *before* it lets it go (userfaultfd_unregister): a thread that
    // faults between the two would wait until the last copy of this descriptor is closed.
    this.wake(addr, length);
    return true;
  }

  /**
   * Reads what is queued, up to `eventsMax` events, into memory that stays where it is.
   * @param bufferAddr address in this process, `eventsMax` times 32 bytes
   * @returns number of events, 0 when none is queued, COPY_GONE when the descriptor is of no use
   * any more
   */
  readEvents(bufferAddr: number, eventsMax: number): number {
    const result = sys.read(this.fd, bufferAddr, eventsMax * UFFD_MSG.BYTES);
    if (result >= 0) return result / UFFD_MSG.BYTES;
    if (result === -EAGAIN || result === -EINTR) return 0;
    if (result === -ESRCH) return COPY_GONE;
    throw failure("INTERNAL", "read of the userfaultfd", result, []);
  }

  /**
   * UFFDIO_COPY.
   * @param dstAddr address in the target; `length` bytes, both multiples of the range's page size
   * @param srcAddr address in *this* process
   * @param mode 0 or DONTWAKE
   * @returns bytes done (> 0, maybe fewer than `length`), or COPY_* when none was
   */
  copy(dstAddr: number, srcAddr: number, length: number, mode: number): number {
    return sys.uffdCopy(this.#fd, dstAddr, srcAddr, length, mode);
  }

  /** UFFDIO_ZEROPAGE (not for huge pages). Answers like `copy`. */
  zeropage(addr: number, length: number, mode: number): number {
    return sys.uffdZeropage(this.#fd, addr, length, mode);
  }

  /** UFFDIO_POISON (Linux 6.6): touching the range gives SIGBUS. Answers like `copy`. */
  poison(addr: number, length: number, mode: number): number {
    return sys.uffdPoison(this.#fd, addr, length, mode);
  }

  /**
   * Makes every thread that waits in the range fault again. Also brings back faults that a dead
   * reader had read.
   * @returns false when the kernel refused, which happens only for a malformed range
   */
  wake(addr: number, length: number): boolean {
    return sys.uffdWake(this.#fd, addr, length) >= 0;
  }

  /** Closes this descriptor. See the module comment for what that means while pages are missing. */
  close(): void {
    if (this.#fd < 0) return;
    sys.close(this.#fd);
    this.#fd = -1;
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/** Which way a userfaultfd was made. */
export type UffdWay = "syscall" | "device";

/**
 * A userfaultfd of *this* process's address space, by userfaultfd(2) or by /dev/userfaultfd where
 * that is refused.
 * @param flags O_CLOEXEC and O_NONBLOCK; never UFFD_USER_MODE_ONLY, see abi.ts
 * @throws FslError HOST_UNSUPPORTED with the reason of both
 */
export function openUffd(flags: number): { uffd: Uffd; way: UffdWay } {
  const bySyscall = sys.userfaultfd(flags);
  if (bySyscall >= 0) return { uffd: new Uffd(bySyscall), way: "syscall" };
  const byDevice = openByDevice(flags);
  if (byDevice >= 0) return { uffd: new Uffd(byDevice), way: "device" };
  throw new FslError(
    "HOST_UNSUPPORTED",
    `userfaultfd: ${sys.errnoText(bySyscall)}; /dev/userfaultfd: ${sys.errnoText(byDevice)}; ` +
      `run: ${grantDevice("/dev/userfaultfd")}`,
    { syscallErrno: -bySyscall, deviceErrno: -byDevice },
  );
}

/** A descriptor or -errno. */
export function openByDevice(flags: number): number {
  const device = sys.open("/dev/userfaultfd", O_RDWR | O_CLOEXEC, 0);
  if (device < 0) return device;
  const result = sys.userfaultfdDev(device, flags);
  sys.close(device);
  return result;
}

function rangeText(addr: number, length: number): string {
  return `${hex(addr)}..${hex(addr + length)}`;
}

function failure(
  code: "INTERNAL" | "HOST_UNSUPPORTED" | "TARGET_LOST",
  what: string,
  result: number,
  where: readonly string[],
): FslError {
  const place = where.filter((text) => text !== "").join(", ");
  const text = place === "" ? "" : ` (${place})`;
  return new FslError(code, `${what}: ${sys.errnoText(result)}${text}`, { errno: -result });
}
