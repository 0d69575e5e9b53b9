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

/**
 * The environment for a program that is to load the library; the library puts it back to `env`.
 * @param socket number of the socket in the program
 * @param library number of the memfd with the library in the program
 * @param helperTasks how many helpers the library is to make, 0 to 9
 * @param stagingSlots chunks that the staging memory of each has room for, 1 to 256
 */
export function preloadEnvironment(
  env: Readonly<Record<string, string | undefined>>,
  socket: number,
  library: number,
  helperTasks: number,
  stagingSlots: number,
): Record<string, string | undefined> {
  const path = `/proc/self/fd/${library}`;
  const own = env["LD_PRELOAD"];
  const helpers = `h${Math.min(helperTasks, HELPERS_MAX)}s${stagingSlots}`;
  const options = helperTasks > 0 ? `c${helpers}` : "c";
  const base = { ...env, FSL_PRELOAD: `${socket}:${library}:${options}` };
  if (own === undefined || own === "") return { ...base, LD_PRELOAD: path };
  return { ...base, LD_PRELOAD: `${path}:${own}`, FSL_PRELOAD_NEXT: own };
}
