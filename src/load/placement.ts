/**
 * Where the threads that bring pages run, and on which NUMA nodes the pages lie that they make: as QEMU
 * itself. UFFDIO_COPY takes a page from where the area's own policy says, and without one from where
 * the policy of the calling thread says, which is ours: `numactl --membind=1 qemu…` would get its RAM
 * by fsl's. Helpers were made by QEMU and have all this already.
 *
 * Called by each Worker, on its own thread, which ends with the load: nothing is put back. What
 * cannot be read or set is left as it is: a page on another node is slower, not wrong.
 *
 * numa_maps shows for an area without a policy of its own that of the main thread:
 * `default`, `local`, `bind:0-1`, `prefer:1`, `prefer (many):0-1`, `interleave:0,2`,
 * `weighted interleave:0-1`; before the colon may stand `=static`, `=relative`, `=balancing`, two of
 * them with `|` between. The nodes are those in force, so that the flags need not be known.
 * @source Linux mm/userfaultfd.c mfill_atomic_pte_copy, mm/mempolicy.c get_vma_policy, mpol_to_str,
 *   fs/proc/task_mmu.c show_numa_map
 */
import { closeSync, openSync, readFileSync, readSync } from "node:fs";
import {
  MPOL_BIND,
  MPOL_DEFAULT,
  MPOL_INTERLEAVE,
  MPOL_LOCAL,
  MPOL_PREFERRED,
  MPOL_PREFERRED_MANY,
  MPOL_WEIGHTED_INTERLEAVE,
} from "../sys/abi.ts";
import * as sys from "../sys/native.ts";

/** Of a thread, as set_mempolicy(2) takes it. */
export interface MemoryPolicy {
  readonly mode: number;
  /** Ascending; empty for `default` and `local`. */
  readonly nodes: readonly number[];
}

/** Linux's largest NR_CPUS is 8192; a mask that is too short is refused. */
const CPU_MASK_BYTES = 1024;
/** Linux's largest MAX_NUMNODES. */
const NODES_MAX = 1024;
/**
 * Of numa_maps. The kernel makes no more lines than are asked for, and walks the page tables for each:
 * the first areas are the program's own, small and without a policy.
 */
const BEGINNING_BYTES = 256;

const MODES: Readonly<Record<string, number>> = {
  default: MPOL_DEFAULT,
  prefer: MPOL_PREFERRED,
  bind: MPOL_BIND,
  interleave: MPOL_INTERLEAVE,
  local: MPOL_LOCAL,
  "prefer (many)": MPOL_PREFERRED_MANY,
  "weighted interleave": MPOL_WEIGHTED_INTERLEAVE,
};
const HAS_NO_NODES: readonly number[] = [MPOL_DEFAULT, MPOL_LOCAL];
/** Start of an area, policy, flags, nodes; what follows shows that they are whole. */
const LINE =
  /^[0-9a-f]{1,16} ([a-z]{1,16}(?: \(many\)| interleave)?)(?:=[a-z|]{1,64})?(?::([\d,-]{1,4096}))?[ \n]/;

/** The calling thread runs where the target's main thread may, and makes pages where that makes them. */
export function placeAs(targetPid: number): void {
  takeAffinity(targetPid);
  if (hasNodes()) takeMemoryPolicy(targetPid);
}

/** CPU affinity. The kernel takes out what our cpuset does not allow. */
export function takeAffinity(targetPid: number): void {
  const wanted = new Uint8Array(CPU_MASK_BYTES);
  const own = new Uint8Array(CPU_MASK_BYTES);
  const length = sys.schedGetaffinity(targetPid, wanted, wanted.length);
  // It has ended.
  if (length <= 0 || sys.schedGetaffinity(0, own, own.length) < 0) return;
  if (Buffer.compare(wanted, own) !== 0) sys.schedSetaffinity(0, wanted, length);
}

/**
 * Memory policy; when that says nothing, the target's cpuset, if it is another one than ours.
 * @param targetNodes from which the target may take memory, and `ownNodes` from which we may; undefined:
 * not known
 */
export function takeMemoryPolicy(
  targetPid: number,
  targetNodes = allowedNodes(targetPid),
  ownNodes = allowedNodes("thread-self"),
): void {
  let wanted = taskPolicy(targetPid);
  if (wanted === undefined || targetNodes === undefined || ownNodes === undefined) return;
  if (wanted.mode === MPOL_DEFAULT && !isSame(targetNodes, ownNodes)) {
    wanted = { mode: MPOL_BIND, nodes: targetNodes };
  }
  // To set what is set costs less than to ask for it.
  setMemoryPolicy(wanted);
}

/** Of the calling thread. Nodes that its cpuset does not allow are passed over; with none left: -EINVAL. */
export function setMemoryPolicy({ mode, nodes }: MemoryPolicy): number {
  const mask = new Uint8Array(NODES_MAX / 8);
  for (const node of nodes) mask[node >> 3] = (mask[node >> 3] ?? 0) | (1 << (node & 7));
  // The kernel looks at one bit less than it is told.
  return sys.setMempolicy(mode, mask, NODES_MAX + 1);
}

/** @param text the beginning of numa_maps: one whole line or more */
export function parseTaskPolicy(text: string): MemoryPolicy | undefined {
  const [, name = "", list] = LINE.exec(text) ?? [];
  const mode = Object.hasOwn(MODES, name) ? MODES[name] : undefined;
  const nodes = list === undefined ? [] : parseNodes(list);
  if (mode === undefined || nodes === undefined) return undefined;
  return (nodes.length === 0) === HAS_NO_NODES.includes(mode) ? { mode, nodes } : undefined;
}

/** A list as the kernel writes it: `0-1,3`, in ascending order. */
export function parseNodes(list: string): number[] | undefined {
  const nodes: number[] = [];
  for (const range of list.split(",")) {
    const [, start, end = start] = /^(\d{1,4})(?:-(\d{1,4}))?$/.exec(range) ?? [];
    const first = Number(start);
    const last = Number(end);
    // Also when one is no number.
    if (!(first > (nodes.at(-1) ?? -1) && first <= last && last < NODES_MAX)) return undefined;
    for (let node = first; node <= last; node += 1) nodes.push(node);
  }
  return nodes;
}

function isSame(some: readonly number[], others: readonly number[]): boolean {
  return some.length === others.length && some.every((node, index) => node === others[index]);
}

/** Whether this host has more than one node. With one all pages come from there. */
function hasNodes(): boolean {
  try {
    // No number alone: `0-1`, `0,2`.
    return /[,-]/.test(readFileSync("/sys/devices/system/node/online", "latin1"));
  } catch {
    // A kernel without NUMA.
    return false;
  }
}

/** From which nodes the cpuset allows memory. Undefined: it has ended. */
function allowedNodes(who: number | "thread-self"): number[] | undefined {
  try {
    const status = readFileSync(`/proc/${who}/status`, "latin1");
    const [, list] = /^Mems_allowed_list:\t(\S+)$/m.exec(status) ?? [];
    return list === undefined ? undefined : parseNodes(list);
  } catch {
    return undefined;
  }
}

/** Undefined: it has ended, may not be looked at, or has a policy that is not known. */
function taskPolicy(pid: number): MemoryPolicy | undefined {
  try {
    const fd = openSync(`/proc/${pid}/numa_maps`, "r");
    try {
      const bytes = Buffer.alloc(BEGINNING_BYTES);
      const length = readSync(fd, bytes);
      return parseTaskPolicy(bytes.toString("latin1", 0, length));
    } finally {
      closeSync(fd);
    }
  } catch {
    return undefined;
  }
}
