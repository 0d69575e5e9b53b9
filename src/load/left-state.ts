/**
 * The load state that a target keeps, found in /proc/PID/fd. Any process may hold a memfd of that
 * name, so nothing in it is believed before the kernel has said whose it is: only its owner and root
 * can have written to a file of mode 0600. What the owner is believed for is what this fsl may do
 * anyhow; beside that the state decides where pages are read, and which process gets them.
 */
import { closeSync, constants, fstatSync, openSync } from "node:fs";
import { FslError, isFslError } from "../errors.ts";
import { F_GET_SEALS, O_CLOEXEC, O_PATH } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import { descriptorsOf } from "../vmm/process-links.ts";
import { KEPT_STATE_LINK } from "../vmm/target.ts";
import { LoadState, STATE_SEALS } from "./state.ts";

/**
 * Opens the load state that a process holds.
 * @returns a descriptor, the caller's; null when there is none, or the process has ended or is not
 * to be looked at by this user
 * @throws FslError TARGET_MISMATCH for one that nobody can vouch for: another user's, or one that
 * others can write to or cut short
 */
export function openLeftState(pid: number): number | null {
  const [number] = descriptorsOf(pid, KEPT_STATE_LINK);
  if (number === undefined) return null;
  let fd: number;
  try {
    fd = openMemoryFile(pid, number);
  } catch (error) {
    if (isFslError(error)) throw error;
    const errno = (error as NodeJS.ErrnoException).code ?? String(error);
    if (errno === "ENOENT" || errno === "ESRCH") return null;
    throw refused(pid, `it cannot be opened (${errno})`, "run fsl as the user who began the load");
  }
  try {
    checkOrigin(fd, pid);
    return fd;
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/**
 * The name tells nothing of what is behind it, and to open a device is to use it: it is looked at first.
 * @throws FslError TARGET_MISMATCH for what is no regular file
 */
function openMemoryFile(pid: number, number: number): number {
  const place = openSync(`/proc/${pid}/fd/${number}`, O_PATH | O_CLOEXEC);
  try {
    if (!fstatSync(place).isFile()) {
      throw refused(pid, "it is no memory file", "that process is not to be trusted either");
    }
    return openSync(`/proc/self/fd/${place}`, constants.O_RDWR | O_CLOEXEC);
  } finally {
    closeSync(place);
  }
}

function checkOrigin(fd: number, pid: number): void {
  const status = fstatSync(fd);
  const own = process.geteuid?.() ?? 0;
  if (status.uid !== own && status.uid !== 0) {
    throw refused(
      pid,
      `expected one of user ${own}, found one of user ${status.uid}`,
      "if that user began a load, run fsl as that user",
    );
  }
  const mode = status.mode & 0o777;
  if ((mode & 0o077) !== 0) {
    throw refused(pid, `expected mode 600, found ${mode.toString(8)}`, "end that process");
  }
  const seals = sys.fcntl(fd, F_GET_SEALS, 0);
  if (seals < 0 || (seals & STATE_SEALS) !== STATE_SEALS) {
    throw refused(pid, "it is not sealed against being cut short", "end that process");
  }
}

function refused(pid: number, why: string, whatToDo: string): FslError {
  return new FslError(
    "TARGET_MISMATCH",
    `process ${pid}: its load state is not to be trusted: ${why}; ${whatToDo}`,
    { pid },
  );
}

/**
 * The state behind a descriptor of `openLeftState`.
 * @param takeOver see `LoadState.adopt`
 * @throws FslError TARGET_LOST when it is damaged, of another version, or of another process
 */
export function adoptLeftState(fd: number, pid: number, takeOver: boolean): LoadState {
  const state = LoadState.adopt(fd, fstatSync(fd).size, takeOver);
  const owner = state.metadata.target.pid;
  if (owner === pid) return state;
  state.unmap();
  throw new FslError("TARGET_LOST", `process ${pid}: its load state is that of process ${owner}`, {
    pid,
  });
}

/**
 * Null for a state that is not complete yet, that another version of fsl has made, or that is
 * another process's: the fsl that serves a target has its state too.
 */
export function adoptOrNull(fd: number, pid: number): LoadState | null {
  try {
    return adoptLeftState(fd, pid, false);
  } catch (error) {
    if (isFslError(error)) return null;
    throw error;
  }
}
