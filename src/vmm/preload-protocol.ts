/**
 * How fsl and the preloaded library talk: environment variables in, one message out. The library's
 * side and the layout are described in shim/preload.c.
 */

import { HELPER_RECORD_BYTES, HELPERS_MAX } from "../sys/abi.ts";
import type { HelperRecord } from "../sys/helper-task.ts";

const HEADER_LENGTH = 24;
/** Most bytes of the message that the library sends, and most descriptors that come with it. */
export const PRELOAD_MESSAGE_LENGTH_MAX = HEADER_LENGTH + HELPERS_MAX * HELPER_RECORD_BYTES;
export const PRELOAD_DESCRIPTORS_MAX = 1 + HELPERS_MAX;
const MAGIC = 0x756c7366; // "fslu"
const VERSION = 2;

export interface PreloadMessage {
  /** Process that made the userfaultfd, in its own pid namespace. */
  readonly pid: number;
  /** Its number there, or -errno when none could be made. */
  readonly result: number;
  /** Tasks in its address space; none when none were asked for. */
  readonly helpers: readonly HelperRecord[];
}

/**
 * @param fds the descriptors that came with it: the userfaultfd, then a socket for each helper
 * @returns null when it is not a message of this library
 */
export function parsePreloadMessage(
  bytes: Uint8Array,
  fds: readonly number[],
): PreloadMessage | null {
  const helperCount = (bytes.length - HEADER_LENGTH) / HELPER_RECORD_BYTES;
  if (!Number.isInteger(helperCount) || helperCount < 0) return null;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  // Host byte order; every host that fsl runs on is little-endian.
  if (view.getUint32(0, true) !== MAGIC || view.getUint32(4, true) !== VERSION) return null;
  const result = view.getInt32(12, true);
  if (fds.length !== (result >= 0 ? 1 : 0) + helperCount) return null;
  const helpers = fds.slice(1).map((fd, index): HelperRecord => {
    const at = HEADER_LENGTH + index * HELPER_RECORD_BYTES;
    return {
      fd,
      pid: view.getInt32(at, true),
      uffdFd: view.getInt32(at + 4, true),
      stagingAddr: Number(view.getBigUint64(at + 8, true)),
      stagingLength: Number(view.getBigUint64(at + 16, true)),
    };
  });
  return { pid: view.getInt32(8, true), result, helpers };
}

type Environment = Readonly<Record<string, string | undefined>>;

export interface PreloadWishes {
  /** How many helpers the library is to make, 0 to 9. */
  readonly helperTasks: number;
  /** Chunks that the staging memory of each has room for, 1 to 256. */
  readonly stagingSlots: number;
  /** The program's own heap in huge pages where the host has them to be asked for (glibc 2.35). */
  readonly hugeHeap: boolean;
}

/** @source glibc manual, Memory Allocation Tunables */
const HUGE_HEAP_TUNABLE = "glibc.malloc.hugetlb";

/**
 * The environment for a program that is to load the library; the library puts it back to `env`.
 * @param socket number of the socket in the program
 * @param library number of the memfd with the library in the program
 */
export function preloadEnvironment(
  env: Environment,
  socket: number,
  library: number,
  { helperTasks, stagingSlots, hugeHeap }: PreloadWishes,
): Environment {
  const helpers = `h${Math.min(helperTasks, HELPERS_MAX)}s${stagingSlots}`;
  const tunables = env["GLIBC_TUNABLES"] ?? "";
  // Who has chosen otherwise has a reason.
  const isTuned = hugeHeap && !tunables.includes(HUGE_HEAP_TUNABLE);
  const options = `c${isTuned ? "t" : ""}${helperTasks > 0 ? helpers : ""}`;
  const ours = [put("LD_PRELOAD", `/proc/self/fd/${library}`, env, "FSL_PRELOAD_NEXT")];
  if (isTuned) ours.push(put("GLIBC_TUNABLES", `${HUGE_HEAP_TUNABLE}=1`, env, "FSL_TUNABLES_NEXT"));
  return Object.assign({ ...env, FSL_PRELOAD: `${socket}:${library}:${options}` }, ...ours);
}

/** The variable with fsl's part in front of the user's own, which goes into `next` unless it is empty. */
function put(name: string, part: string, env: Environment, next: string): Environment {
  const own = env[name] ?? "";
  // What somebody else has put into `next` is nobody's.
  return own === ""
    ? { [name]: part, [next]: undefined }
    : { [name]: `${part}:${own}`, [next]: own };
}
