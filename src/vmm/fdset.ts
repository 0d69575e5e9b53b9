/** QEMU's sets of descriptors (`add-fd`), opened as `/dev/fdset/N`. */
import { type QmpReply, isRecord } from "./qmp.ts";

/** Numbers below are for people, who count from 0 or 1. */
const FDSET_MIN = 64;
const FDSET_END = 2 ** 31;

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
