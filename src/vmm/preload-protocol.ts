/**
 * How fsl and the preloaded library talk: environment variables in, one message out. The library's
 * side and the layout are described in shim/preload.c.
 */

/** Bytes of the message that the library sends, with the userfaultfd as its one descriptor. */
export const PRELOAD_MESSAGE_LENGTH = 24;
const MAGIC = 0x756c7366; // "fslu"
const VERSION = 1;

export interface PreloadMessage {
  /** Process that made the userfaultfd, in its own pid namespace. */
  readonly pid: number;
  /** Its number there, or -errno when none could be made. */
  readonly result: number;
}

/** @returns null when it is not a message of this library */
export function parsePreloadMessage(bytes: Uint8Array): PreloadMessage | null {
  if (bytes.length !== PRELOAD_MESSAGE_LENGTH) return null;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  // Host byte order; every host that fsl runs on is little-endian.
  if (view.getUint32(0, true) !== MAGIC || view.getUint32(4, true) !== VERSION) return null;
  return { pid: view.getInt32(8, true), result: view.getInt32(12, true) };
}

/**
 * The environment for a program that is to load the library; the library puts it back to `env`.
 * @param socket number of the socket in the program
 * @param library number of the memfd with the library in the program
 */
export function preloadEnvironment(
  env: Readonly<Record<string, string | undefined>>,
  socket: number,
  library: number,
): Record<string, string | undefined> {
  const path = `/proc/self/fd/${library}`;
  const own = env["LD_PRELOAD"];
  const base = { ...env, FSL_PRELOAD: `${socket}:${library}:c` };
  if (own === undefined || own === "") return { ...base, LD_PRELOAD: path };
  return { ...base, LD_PRELOAD: `${path}:${own}`, FSL_PRELOAD_NEXT: own };
}
