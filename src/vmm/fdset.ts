/** QEMU's sets of descriptors (`add-fd`), opened as `/dev/fdset/N`. */
import { readlinkSync } from "node:fs";
import { MFD_CLOEXEC, SIGXFSZ } from "../sys/abi.ts";
import * as native from "../sys/native.ts";
import { randomInteger } from "../sys/random.ts";
import { type QmpClient, type QmpReply, isRecord } from "./qmp.ts";

/** Numbers below are for people, who count from 0 or 1. */
const FDSET_MIN = 64;
const FDSET_END = 2 ** 31;
const FDSET_RANDOM_MIN = 2 ** 20;

/** @param reply to query-fdsets; @returns a number that no set has */
export function freeFdset(reply: QmpReply): number {
  let free = FDSET_MIN;
  if (!reply.ok || !Array.isArray(reply.value)) return free;
  for (const entry of reply.value) {
    const id = isRecord(entry) ? entry["fdset-id"] : undefined;
    if (typeof id === "number" && id >= free && id < FDSET_END) free = id + 1;
  }
  return free;
}

/** @returns a number that no set has: those of the command line were chosen by a person */
export function anyFdset(): number {
  return randomInteger(FDSET_RANDOM_MIN, FDSET_END);
}

const SEED_NAME = "fsl-seed";
/** Link text of a seed, in /proc/PID/fd. */
const SEED_LINK = `/memfd:${SEED_NAME} (deleted)`;

/** @returns descriptor of an empty seed, open for reading and writing */
export function newSeedFile(): number {
  // RLIMIT_FSIZE counts for memfds too; without this its signal would end us instead of giving
  // EFBIG.
  native.ignoreSignal(SIGXFSZ);
  return native.check(native.memfdCreate(SEED_NAME, MFD_CLOEXEC), "memfd_create of the seed");
}

/** Takes a seed out of QEMU that a dead fsl has left in one of its sets; nothing else. */
export async function dropLeftSeeds(qmp: QmpClient, pid: number): Promise<void> {
  const sets = await qmp.request("query-fdsets");
  for (const set of Array.isArray(sets) ? sets : []) {
    if (!isRecord(set) || !Array.isArray(set["fds"])) continue;
    for (const entry of set["fds"]) {
      const fd: unknown = isRecord(entry) ? entry["fd"] : undefined;
      if (typeof fd !== "number" || !isSeed(pid, fd)) continue;
      await qmp.execute("remove-fd", { "fdset-id": set["fdset-id"], fd });
    }
  }
}

function isSeed(pid: number, fd: number): boolean {
  try {
    return readlinkSync(`/proc/${pid}/fd/${fd}`) === SEED_LINK;
  } catch {
    return false;
  }
}
