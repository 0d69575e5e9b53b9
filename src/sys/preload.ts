/** The preload library and its protocol; the C side and the layout of the message are in shim/preload.c. */
import { readFileSync } from "node:fs";
import { PRELOAD_PATH } from "./embedded.ts";

/** Bytes of the message that the library sends, with the userfaultfd as its one descriptor. */
export const PRELOAD_MESSAGE_BYTES = 24;
const MAGIC = 0x756c7366;
const VERSION = 1;

/** What the library did in the program. */
export interface PreloadMessage {
  /** pid of the program, in its own pid namespace. */
  readonly pid: number;
  /** Number of the userfaultfd in the program, or -errno when none could be made. */
  readonly result: number;
  readonly way: "syscall" | "device";
  /** errno of userfaultfd(2) when the device had to be tried, else 0. */
  readonly syscallErrno: number;
}

/** The library itself, ready to be written to a memfd. */
export function preloadBytes(): Uint8Array {
  return readFileSync(PRELOAD_PATH);
}

/**
 * The environment for a program that is to load it.
 * @param socketFd descriptor that the program inherits, one end of a stream socketpair
 * @param memfd descriptor that the program inherits, with `preloadBytes` in it
 * @param env the environment that the program is meant to see; not changed
 * @param close whether the library closes the two in the program when it is done
 */
export function preloadEnvironment(
  socketFd: number,
  memfd: number,
  env: Readonly<Record<string, string | undefined>>,
  close = true,
): Record<string, string> {
  const result: Record<string, string> = {};
  for (const [name, value] of Object.entries(env)) if (value !== undefined) result[name] = value;
  const own = result["LD_PRELOAD"];
  const library = `/proc/self/fd/${memfd}`;
  result["LD_PRELOAD"] = own === undefined || own === "" ? library : `${library}:${own}`;
  if (own !== undefined) result["FSL_PRELOAD_NEXT"] = own;
  result["FSL_PRELOAD"] = `${socketFd}:${memfd}${close ? ":c" : ""}`;
  return result;
}

/** Decodes what came over the socket; null when it is not a message of this library. */
export function parsePreloadMessage(bytes: Uint8Array): PreloadMessage | null {
  if (bytes.length < PRELOAD_MESSAGE_BYTES) return null;
  const data = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  if (data.getUint32(0, true) !== MAGIC || data.getUint32(4, true) !== VERSION) return null;
  return {
    pid: data.getInt32(8, true),
    result: data.getInt32(12, true),
    way: data.getInt32(16, true) === 2 ? "device" : "syscall",
    syscallErrno: data.getInt32(20, true),
  };
}
