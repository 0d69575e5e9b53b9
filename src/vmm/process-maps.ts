/**
 * What the kernel says about a target's memory: /proc/PID/maps and /proc/PID/mountinfo. QEMU's own word for where its
 * RAM is gets checked against this before anything is touched.
 *
 * A maps line: `start-end perms offset major:minor inode   path`; addresses and offset hexadecimal, device numbers
 * hexadecimal (in mountinfo decimal), path up to the end of the line, with ` (deleted)` when the file is unlinked.
 * maps is read rather than smaps: smaps walks the page tables, so its cost grows with the guest.
 */
import { readFileSync, readdirSync } from "node:fs";
import { FslError } from "../errors.ts";
import { hex } from "../pages.ts";

export type Backing = "anonymous" | "shmem" | "hugetlb" | "file";

/** One virtual memory area. */
export interface MemoryArea {
  readonly startAddr: number;
  /** Exclusive. */
  readonly endAddr: number;
  /** MAP_SHARED. */
  readonly shared: boolean;
  readonly writable: boolean;
  /** Device number, `major:minor` in decimal, as mountinfo writes it. */
  readonly device: string;
  readonly inode: number;
  /** Empty for anonymous memory. */
  readonly path: string;
}

/** What a range of the target's memory is. */
export interface RangeBacking {
  readonly backing: Backing;
  readonly shared: boolean;
  /** `major:minor:inode` of each file behind it; empty for anonymous memory. */
  readonly files: readonly string[];
  /** Of the first area, empty for anonymous memory. */
  readonly path: string;
}

/** The kernel's own limit is vm.max_map_count, 65530 unless it was raised. */
export const AREA_COUNT_MAX = 1 << 20;

const AREA = /^([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][ps]) [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)$/;
const ANONYMOUS_NAME = /^\[(?:anon:.*|heap|stack.*)\]$/;

/**
 * @param text all of /proc/PID/maps
 * @returns areas in order of address
 * @throws FslError TARGET_LOST when a line cannot be read
 */
export function parseMaps(text: string): MemoryArea[] {
  const areas: MemoryArea[] = [];
  for (const line of text.split("\n")) {
    if (line === "") continue;
    const fields = AREA.exec(line);
    if (fields === null || areas.length >= AREA_COUNT_MAX) {
      throw new FslError("TARGET_LOST", `process maps: line ${JSON.stringify(line.slice(0, 160))} cannot be read`);
    }
    const [, start = "", end = "", perms = "", major = "", minor = "", inode = "", path = ""] = fields;
    areas.push({
      startAddr: Number.parseInt(start, 16),
      endAddr: Number.parseInt(end, 16),
      shared: perms[3] === "s",
      writable: perms[1] === "w",
      device: `${Number.parseInt(major, 16)}:${Number.parseInt(minor, 16)}`,
      inode: Number(inode),
      path,
    });
  }
  return areas;
}

/**
 * File system type of each mounted device, e.g. `0:25` → `tmpfs`. Lines that cannot be read are left out.
 * @param text all of /proc/PID/mountinfo: `id parent major:minor root point options [tags] - type source options`
 */
export function parseMountTypes(text: string): Map<string, string> {
  const types = new Map<string, string>();
  for (const line of text.split("\n")) {
    const fields = /^\d+ \d+ (\d+:\d+) .* - (\S+) /.exec(line);
    if (fields?.[1] !== undefined && fields[2] !== undefined) types.set(fields[1], fields[2]);
  }
  return types;
}

/**
 * What backs [startAddr, startAddr + length).
 * @param areas in order of address
 * @throws FslError TARGET_MISMATCH when the range has a hole, or its parts differ in kind
 */
export function findRange(
  areas: readonly MemoryArea[],
  mountTypes: ReadonlyMap<string, string>,
  startAddr: number,
  length: number,
  what: string,
): RangeBacking {
  const endAddr = startAddr + length;
  const files = new Set<string>();
  let found: RangeBacking | null = null;
  let nextAddr = startAddr;
  for (let index = firstAreaEndingAfter(areas, startAddr); nextAddr < endAddr; index++) {
    const area = areas[index];
    if (area === undefined || area.startAddr > nextAddr) {
      throw mismatch(what, startAddr, endAddr, `nothing is mapped at ${hex(nextAddr)}`);
    }
    const part = { backing: backingOf(area, mountTypes), shared: area.shared, path: area.path, files: [] };
    if (found !== null && (found.backing !== part.backing || found.shared !== part.shared)) {
      throw mismatch(what, startAddr, endAddr, `${found.backing} memory becomes ${part.backing} at ${hex(nextAddr)}`);
    }
    found ??= part;
    if (part.backing !== "anonymous") files.add(fileIdentity(area));
    nextAddr = area.endAddr;
  }
  if (found === null) throw mismatch(what, startAddr, endAddr, "it is empty");
  return { ...found, files: [...files] };
}

/**
 * Reads and parses the maps of a process.
 * @throws FslError TARGET_LOST when the process is gone, HOST_UNSUPPORTED when it belongs to somebody else
 */
export function readProcessMemory(pid: number): { areas: MemoryArea[]; mountTypes: Map<string, string> } {
  try {
    const areas = parseMaps(readFileSync(`/proc/${pid}/maps`, "latin1"));
    return { areas, mountTypes: parseMountTypes(readFileSync(`/proc/${pid}/mountinfo`, "latin1")) };
  } catch (error) {
    if (error instanceof FslError) throw error;
    const code = (error as NodeJS.ErrnoException).code ?? String(error);
    const refused = code === "EACCES" || code === "EPERM";
    throw new FslError(
      refused ? "HOST_UNSUPPORTED" : "TARGET_LOST",
      `process maps: /proc/${pid}/maps cannot be read (${code})${refused ? "; run fsl as root, or as QEMU's user" : ""}`,
      { pid, errno: code },
      error,
    );
  }
}

/**
 * The files among `files` that a process other than `pid` has mapped shared. Processes whose maps may not be read are
 * left out. Reads /proc/PID/maps of every process: some 0.1 ms each, so only for guests with shared memory.
 */
export function mappedByOthers(files: ReadonlySet<string>, pid: number): Set<string> {
  const found = new Set<string>();
  for (const name of readdirSync("/proc")) {
    if (!/^\d+$/.test(name) || Number(name) === pid) continue;
    let areas: MemoryArea[];
    try {
      areas = parseMaps(readFileSync(`/proc/${name}/maps`, "latin1"));
    } catch {
      continue; // It has ended, or belongs to somebody else.
    }
    for (const area of areas) {
      if (area.shared && area.inode !== 0 && files.has(fileIdentity(area))) found.add(fileIdentity(area));
    }
  }
  return found;
}

/** `major:minor:inode` */
function fileIdentity(area: MemoryArea): string {
  return `${area.device}:${area.inode}`;
}

/**
 * Smallest page of this host, bytes: 4096 on x86-64; 4, 16 or 64 KiB on aarch64.
 * @source getauxval(3): AT_PAGESZ (6) in /proc/self/auxv, pairs of 64-bit words
 */
export function readHostPageLength(): number {
  const auxv = readFileSync("/proc/self/auxv");
  for (let offset = 0; offset + 16 <= auxv.length; offset += 16) {
    if (auxv.readBigUInt64LE(offset) === 6n) return Number(auxv.readBigUInt64LE(offset + 8));
  }
  return 4096;
}

function backingOf(area: MemoryArea, mountTypes: ReadonlyMap<string, string>): Backing {
  if (area.inode === 0 || ANONYMOUS_NAME.test(area.path)) return "anonymous";
  const type = mountTypes.get(area.device);
  if (type === "tmpfs" || type === "devtmpfs") return "shmem";
  if (type === "hugetlbfs") return "hugetlb";
  if (type !== undefined) return "file";
  // The kernel's own mounts are in nobody's mountinfo. The caller adds that of memfds and shared anonymous memory to
  // `mountTypes`, so what is left of such names is on the kernel's own hugetlbfs.
  return /^\/(?:anon_hugepage|memfd:|SYSV)/.test(area.path) ? "hugetlb" : "file";
}

/** Binary search: index of the first area whose end lies behind `addr`. */
function firstAreaEndingAfter(areas: readonly MemoryArea[], addr: number): number {
  let low = 0;
  let high = areas.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if ((areas[middle]?.endAddr ?? 0) > addr) high = middle;
    else low = middle + 1;
  }
  return low;
}

function mismatch(what: string, startAddr: number, endAddr: number, found: string): FslError {
  return new FslError(
    "TARGET_MISMATCH",
    `${what}: QEMU says it is at ${hex(startAddr)}-${hex(endAddr)}, but in that process ${found}`,
    { startAddr, endAddr, found },
  );
}
