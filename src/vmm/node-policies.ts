/**
 * On which NUMA nodes a target's memory is to be: /proc/PID/numa_maps. Reading it walks the page
 * tables, so it is read only where there is more than one node.
 *
 * A line: `start policy [name=value …]`, start hexadecimal without 0x; one line for each area of
 * /proc/PID/maps. The policy is `default`, or e.g. `bind:0-1`, `prefer:0`, `interleave:0,2`.
 * @source Linux fs/proc/task_mmu.c show_numa_map, mm/mempolicy.c mpol_to_str
 */
import { readFileSync } from "node:fs";

/** Asked for the policy of each region. */
export interface NodePolicies {
  /** `{ nodePolicy }` when any part of the range has one of its own, else nothing. */
  of(startAddr: number, length: number): { nodePolicy?: string };
}

const NONE: NodePolicies = { of: () => ({}) };
const LINE = /^([0-9a-f]{1,16}) (\S{1,256})/;

/** @param online the nodes of this host, as the kernel lists them */
export function readNodePolicies(pid: number, online = onlineNodes()): NodePolicies {
  if (/^\d*$/.test(online)) return NONE;
  try {
    return parseNodePolicies(readFileSync(`/proc/${pid}/numa_maps`, "latin1"));
  } catch {
    // Not readable: no page is to come to the wrong node for that.
    return { of: () => ({ nodePolicy: "unknown" }) };
  }
}

/** @param text all of /proc/PID/numa_maps */
export function parseNodePolicies(text: string): NodePolicies {
  const areas: { startAddr: number; policy: string }[] = [];
  for (const line of text.split("\n")) {
    const [, start, policy] = LINE.exec(line) ?? [];
    if (start === undefined || policy === undefined) continue;
    areas.push({ startAddr: Number.parseInt(start, 16), policy });
  }
  return {
    of: (startAddr, length) => {
      for (const [index, area] of areas.entries()) {
        const nextAddr = areas[index + 1]?.startAddr ?? Number.POSITIVE_INFINITY;
        if (nextAddr <= startAddr || area.startAddr >= startAddr + length) continue;
        if (area.policy !== "default") return { nodePolicy: area.policy };
      }
      return {};
    },
  };
}

/** e.g. `0` or `0-1`; empty on a kernel without NUMA. */
function onlineNodes(): string {
  try {
    return readFileSync("/sys/devices/system/node/online", "latin1").trim();
  } catch {
    return "";
  }
}
