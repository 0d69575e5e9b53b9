/**
 * A program with the preload library in it, for tests: what it needs to be started with, and what
 * the library says. Free of the test runner, so that a script of its own can use it.
 */
import { MFD_CLOEXEC, POLLIN } from "../../src/sys/abi.ts";
import type { HelperRecord } from "../../src/sys/helper-task.ts";
import * as sys from "../../src/sys/native.ts";
import { preloadBytes } from "../../src/sys/preload.ts";

/** Written down a second time on purpose. @source shim/preload.c */
const HEADER_BYTES = 24;
const RECORD_BYTES = 24;
const SOCKET_IN_TARGET = 3;
const LIBRARY_IN_TARGET = 4;
const MESSAGE_TIMEOUT_MS = 5000;

export interface Preloaded {
  readonly pid: number;
  readonly uffd: number;
  readonly helpers: readonly HelperRecord[];
}

/** The library in a memfd. */
export function libraryFd(): number {
  const fd = sys.check(sys.memfdCreate("fsl-preload-test", MFD_CLOEXEC), "memfd_create");
  const bytes = preloadBytes();
  if (sys.write(fd, bytes) !== bytes.length) throw new Error("memfd: short write");
  return fd;
}

/** Variables for a program that has the socket and the library as descriptors 3 and 4. */
export function preloadVariables(helpers: number, slots?: number): Record<string, string> {
  return {
    LD_PRELOAD: `/proc/self/fd/${LIBRARY_IN_TARGET}`,
    FSL_PRELOAD: `${SOCKET_IN_TARGET}:${LIBRARY_IN_TARGET}:ch${helpers}${slots === undefined ? "" : `s${slots}`}`,
  };
}

/** Waits for the library's message; it comes before the program's main(). */
export function receivePreload(socket: number): Preloaded {
  const polled = sys.poll(Int32Array.of(socket), new Int32Array(1), 1, POLLIN, MESSAGE_TIMEOUT_MS);
  if (polled !== 1) throw new Error("the preload library sent nothing");
  const bytes = new Uint8Array(512);
  const fds = new Int32Array(16);
  const out = new Int32Array(2);
  const length = sys.check(
    sys.recv(socket, bytes, bytes.length, fds, fds.length, out, 0),
    "recvmsg",
  );
  const message = new DataView(bytes.buffer, 0, length);
  const helpers = [...fds.subarray(1, out[0])].map((fd, index): HelperRecord => {
    const at = HEADER_BYTES + index * RECORD_BYTES;
    return {
      fd,
      pid: message.getInt32(at, true),
      uffdFd: message.getInt32(at + 4, true),
      stagingAddr: Number(message.getBigUint64(at + 8, true)),
      stagingLength: Number(message.getBigUint64(at + 16, true)),
    };
  });
  return { pid: message.getInt32(8, true), uffd: fds[0] ?? -1, helpers };
}
