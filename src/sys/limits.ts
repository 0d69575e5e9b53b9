/** The limits that a load needs, of this process and of the one that it loads. */
import { readdirSync, readFileSync } from "node:fs";
import { FslError } from "../errors.ts";
import { RLIMIT_NOFILE } from "./abi.ts";
import * as native from "./native.ts";

/**
 * Descriptors that a load may have open at once: those of the runtime, of QMP and userfaultfd, of
 * the Workers. One more that cannot be had may end the whole process, wherever that is.
 */
const DESCRIPTORS_MIN = 64;

/**
 * Looked at before anything is started.
 * @throws FslError HOST_UNSUPPORTED when there are too few descriptors
 */
export function checkDescriptorLimit(): void {
  const limit = new BigUint64Array(2);
  if (native.prlimit(0, RLIMIT_NOFILE, null, limit) < 0) return;
  const [soft = 0n] = limit;
  if (soft >= BigInt(DESCRIPTORS_MIN)) return;
  throw new FslError(
    "HOST_UNSUPPORTED",
    `descriptor limit: expected at least ${DESCRIPTORS_MIN}, found ${soft}; run: ulimit -n 1024`,
    { expected: DESCRIPTORS_MIN, found: Number(soft) },
  );
}

/**
 * Descriptors that a QEMU must be able to open when it is told to take its state: one for its own
 * duplicate of the seed, the rest for what comes at the same moment (a monitor's client, a device's
 * eventfd).
 */
const ROOM_MIN = 8;
/** What is proposed when there is less. */
const NOFILE_PROPOSED = 1024;

/**
 * Looked at before a state is handed over to somebody else's process: one that cannot open what it
 * is handed can never be handed another.
 * @param who for messages
 * @throws FslError HOST_UNSUPPORTED when it has too few descriptors left
 */
export function checkDescriptorRoom(pid: number, who: string): void {
  // prlimit(2) would want another permission than a load does.
  const limits = readFileSync(`/proc/${pid}/limits`, "latin1");
  const [, soft = Number.NaN, hard = Number.NaN] =
    /^Max open files +(\S+) +(\S+)/m.exec(limits)?.map(Number) ?? [];
  // The limit is one of numbers: what is open above a lowered one takes no room below it.
  const open = readdirSync(`/proc/${pid}/fd`).filter((number) => Number(number) < soft).length;
  // NaN where there is no limit, or none is told.
  if (!(soft - open < ROOM_MIN)) return;
  const wanted = Math.max(NOFILE_PROPOSED, soft + ROOM_MIN);
  // The hard limit is left alone where it may be: to raise it takes a privilege.
  const proposed = hard >= wanted ? `${wanted}:` : wanted;
  throw new FslError(
    "HOST_UNSUPPORTED",
    `descriptor limit of ${who}: expected room for at least ${ROOM_MIN} more, found ${soft - open} ` +
      `(${open} of ${soft} are open); run: prlimit --pid ${pid} --nofile=${proposed}`,
    { pid, expected: ROOM_MIN, found: soft - open, open, limit: soft },
  );
}

/** How many bring in what nobody has asked for, unless somebody says: more are in one another's way. */
export function defaultWidth(): number {
  return Math.min(2, navigator.hardwareConcurrency);
}
