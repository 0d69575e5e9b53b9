/**
 * The end of a process that is no child of fsl's. Bun can watch children and sockets, not a pidfd; so
 * the pidfd is looked at now and then, and at once when something says that the end may have come.
 */
import { readFileSync, statSync } from "node:fs";
import { POLLIN } from "../sys/abi.ts";
import * as native from "../sys/native.ts";
import { nodeOs } from "../sys/node-os.ts";
import type { ExitStatus } from "./target.ts";

/** How often it is looked at when nothing says anything, ms. */
const PERIOD_MS = 250;
/** How often, and how many times, after something did. A process closes its sockets a moment before. */
const SOON_MS = 5;
const SOON_TRIES = 40;

/** _IOWR(0xFF, 11, struct pidfd_info) of 64 bytes. @source linux/pidfd.h, Linux 6.13 */
const PIDFD_GET_INFO = 0xc040ff0b;
const INFO_LENGTH = 64;
/** Bit in `mask` (u64 at 0): `exit_code` (i32 at 60) is wanted, or valid. Linux 6.15. */
const PIDFD_INFO_EXIT = 8n;
const EXIT_CODE_OFFSET = 60;

export interface ExitWatch {
  /** Never resolves after `stop`. */
  readonly exited: Promise<ExitStatus>;
  /** Says that the process may just have ended. */
  hint(): void;
  /** Looks no more; the pidfd may be closed then. */
  stop(): void;
}

/**
 * Waits for the end of a process. Does not keep this process alive.
 * @param pidfd stays the caller's
 */
export function watchExit(pidfd: number, pid: number): ExitWatch {
  const { promise, resolve } = Promise.withResolvers<ExitStatus>();
  let timer: ReturnType<typeof setTimeout> | undefined;
  let soonTries = 0;
  const look = (): void => {
    if (hasEnded(pidfd)) {
      stop();
      resolve(readExitStatus(pidfd, pid));
      return;
    }
    timer = setTimeout(look, soonTries-- > 0 ? SOON_MS : PERIOD_MS);
    timer.unref();
  };
  const stop = (): void => {
    clearTimeout(timer);
    timer = undefined;
  };
  const hint = (): void => {
    if (timer === undefined) return;
    stop();
    soonTries = SOON_TRIES;
    look();
  };
  timer = setTimeout(look, 0);
  timer.unref();
  return { exited: promise, hint, stop };
}

function hasEnded(pidfd: number): boolean {
  const revents = new Int32Array(1);
  return native.poll(Int32Array.of(pidfd), revents, 1, POLLIN, 0) > 0;
}

/**
 * How a process has ended that is somebody else's child. The kernel tells by the pidfd once it has been
 * waited for, and in /proc before.
 * @returns both members null where it does not tell
 */
function readExitStatus(pidfd: number, pid: number): ExitStatus {
  const info = new BigUint64Array(INFO_LENGTH / 8);
  info[0] = PIDFD_INFO_EXIT;
  const result = native.ioctl(pidfd, PIDFD_GET_INFO, native.ptrOf(info));
  if (result >= 0 && ((info[0] ?? 0n) & PIDFD_INFO_EXIT) !== 0n) {
    return parseWaitStatus(new DataView(info.buffer).getInt32(EXIT_CODE_OFFSET, true));
  }
  return readZombieStatus(pid);
}

/** Field 52 of /proc/PID/stat, which is 0 for those who may not know. @source proc_pid_stat(5) */
function readZombieStatus(pid: number): ExitStatus {
  try {
    const userId = process.geteuid?.();
    if (userId !== 0 && statSync(`/proc/${pid}`).uid !== userId) return UNKNOWN;
    const text = readFileSync(`/proc/${pid}/stat`, "latin1");
    // The name, field 2, is in parentheses and may hold anything.
    const fields = text.slice(text.lastIndexOf(")") + 2).split(" ");
    const status = Number(fields[52 - 3]);
    return fields[0] === "Z" && Number.isInteger(status) ? parseWaitStatus(status) : UNKNOWN;
  } catch {
    return UNKNOWN;
  }
}

const UNKNOWN: ExitStatus = { exitCode: null, signal: null };

/** @param status as wait(2) gives it: the exit code in bits 8 to 15, or a signal in bits 0 to 6 */
function parseWaitStatus(status: number): ExitStatus {
  const signal = status & 0x7f;
  if (signal === 0) return { exitCode: (status >> 8) & 0xff, signal: null };
  return { exitCode: null, signal: signalName(signal) };
}

function signalName(number: number): string {
  const found = Object.entries(nodeOs().constants.signals).find(([, value]) => value === number);
  return found?.[0] ?? `signal ${number}`;
}
