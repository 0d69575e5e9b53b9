/** Connecting to the QMP socket of a QEMU that somebody else started. */
import { statSync } from "node:fs";
import { FslError } from "../errors.ts";
import * as native from "../sys/native.ts";

/**
 * @returns the connected socket, owned by the caller
 * @throws FslError TARGET_LOST when nobody listens there
 */
export function connectSocket(path: string): number {
  const fd = native.unixConnect(path);
  if (fd >= 0) return fd;
  const errno = native.errnoName(fd);
  throw new FslError(
    "TARGET_LOST",
    `QMP socket ${path}: cannot connect (${errno})${hint(errno, path)}`,
    { path, errno },
  );
}

function hint(errno: string, path: string): string {
  // The kernel says the same of a socket on which nobody listens.
  if (errno === "ECONNREFUSED" && !isSocket(path)) return "; it is not a socket";
  return HINTS[errno] ?? "";
}

function isSocket(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isSocket() !== false;
}

const HINTS: Readonly<Record<string, string>> = {
  ENOENT: "; start QEMU with -qmp unix:PATH,server=on,wait=off",
  ECONNREFUSED: "; the QEMU that listened there has ended",
  EAGAIN: "; too many clients wait for it already",
  EACCES: "; run fsl as QEMU's user, or as root",
};
