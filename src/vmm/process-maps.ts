/**
 * What the kernel says about a target's memory: /proc/PID/maps and /proc/PID/mountinfo. QEMU's own
 * word for where its RAM is gets checked against this before anything is touched.
 *
 * A maps line: `start-end perms offset major:minor inode   path`; addresses, offset and device
 * numbers hexadecimal (in mountinfo the latter are decimal), path up to the end of the line, with
 * ` (deleted)` when the file is unlinked. maps is read rather than smaps: smaps walks the page
 * tables, so its cost grows with the guest.
 */
import { fstatSync, readFileSync, readdirSync } from "node:fs";
import { FslError } from "../errors.ts";
import { hex } from "../pages.ts";
import { MFD_CLOEXEC } from "../sys/abi.ts";
import * as native from "../sys/native.ts";

export type Backing = "anonymous" | "shmem" | "hugetlb" | "file";

/** One virtual memory area. */
export interface MemoryArea {
  readonly startAddr: number;
  /** Exclusive. */
  readonly endAddr: number;
  /** MAP_SHARED. */
  readonly shared: boolean;
  /** Where in the file it begins, bytes. */
  readonly offset: number;
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
const AREA_COUNT_MAX = 1 << 20;
/** Digits of an address. */
const ADDRESS_LENGTH_MAX = 16;

const AREA = new RegExp(
  "^([0-9a-f]{1,16})-([0-9a-f]{1,16}) [r-][w-][x-]([ps]) ([0-9a-f]+) " +
    "([0-9a-f]+):([0-9a-f]+) (\\d+) *(.*)$",
);
const PRIVATE_AREA = /^([0-9a-f]+)-([0-9a-f]+) rw-p 0+ 00:00 0 *$/gm;
const ANONYMOUS_NAME = /^\[(?:anon:.*|heap|stack.*)\]$/;
/** Names that files on the kernel's own mounts have. */
const INTERNAL_NAME = /^\/(?:anon_hugepage|memfd:|SYSV)/;

/** The memory of one process, as it was when it was read. */
export class ProcessMaps {
  /** Only lines that matter are looked at. */
  readonly #text: string;
  readonly #fileSystemType: (device: string) => string | undefined;

  /**
   * @param text all of /proc/PID/maps
   * @param fileSystemType type of the file system on a device (`major:minor`); asked for when a
   * range is backed by a file
   */
  constructor(text: string, fileSystemType: (device: string) => string | undefined) {
    this.#text = text;
    this.#fileSystemType = fileSystemType;
    // A shorter text cannot have so many lines.
    if (text.length <= AREA_COUNT_MAX) return;
    const excess = text.split("\n", AREA_COUNT_MAX + 1)[AREA_COUNT_MAX] ?? "";
    if (excess !== "") throw unreadable(excess);
  }

  /**
   * Reads the maps of a process.
   * @throws FslError TARGET_LOST when it is gone, HOST_UNSUPPORTED when it is somebody else's
   */
  static read(pid: number): ProcessMaps {
    let mountTypes: ReadonlyMap<string, string> | undefined;
    return new ProcessMaps(readProcessFile(pid, "maps"), (device) => {
      mountTypes ??= readMountTypes(pid);
      return mountTypes.get(device);
    });
  }

  /**
   * What backs [startAddr, startAddr + length).
   * @param what for messages, e.g. `RAMBlock pc.ram`
   * @throws FslError TARGET_MISMATCH when the range has a hole, or its parts differ in kind
   */
  find(startAddr: number, length: number, what: string): RangeBacking {
    const endAddr = startAddr + length;
    const files = new Set<string>();
    let found: { backing: Backing; shared: boolean; path: string } | null = null;
    let nextAddr = startAddr;
    for (const area of this.areas(startAddr, length)) {
      if (area.startAddr > nextAddr) break;
      const part = { backing: this.#backingOf(area), shared: area.shared, path: area.path };
      found ??= part;
      if (found.backing !== part.backing || found.shared !== part.shared) {
        const change = `${found.backing} memory becomes ${part.backing} at ${hex(nextAddr)}`;
        throw mismatch(what, startAddr, endAddr, change);
      }
      if (part.backing !== "anonymous") files.add(fileIdentity(area));
      nextAddr = area.endAddr;
    }
    if (nextAddr < endAddr) {
      throw mismatch(what, startAddr, endAddr, `nothing is mapped at ${hex(nextAddr)}`);
    }
    if (found === null) throw mismatch(what, startAddr, endAddr, "it is empty");
    return { ...found, files: [...files] };
  }

  /** Those that have a part of [startAddr, startAddr + length), by address. */
  *areas(startAddr: number, length: number): Generator<MemoryArea> {
    for (let lineAt = this.#lineAt(startAddr); ;) {
      const line = this.#lineFrom(lineAt);
      if (line === "") return;
      lineAt += line.length + 1;
      const area = parseArea(line);
      if (area.startAddr >= startAddr + length) return;
      if (area.endAddr > startAddr) yield area;
    }
  }

  /** Where private anonymous areas of exactly this length begin, that can be written to. */
  privateAreas(length: number): number[] {
    const found: number[] = [];
    for (const [, start = "", end = ""] of this.#text.matchAll(PRIVATE_AREA)) {
      const startAddr = Number.parseInt(start, 16);
      if (Number.parseInt(end, 16) - startAddr === length) found.push(startAddr);
    }
    return found;
  }

  /** Files that are mapped MAP_SHARED, as `major:minor:inode`. */
  sharedFiles(): Set<string> {
    const lines = this.#text.split("\n");
    const shared = lines.filter((line) => / [r-][w-][x-]s /.test(line)).map(parseArea);
    return new Set(shared.filter((area) => area.inode !== 0).map(fileIdentity));
  }

  /**
   * Binary search: where the line of the last area is that begins at or before `addr`, or the first
   * line.
   */
  #lineAt(addr: number): number {
    const text = this.#text;
    // Both are where lines begin; that of `low` is the one, or lies before it.
    let low = 0;
    let high = text.length;
    while (low < high) {
      const middle = text.lastIndexOf("\n", (low + high) >>> 1) + 1;
      const at = middle > low ? middle : low + this.#lineFrom(low).length + 1;
      if (at >= high) break;
      if (Number.parseInt(text.slice(at, at + ADDRESS_LENGTH_MAX), 16) <= addr) low = at;
      else high = at;
    }
    return low;
  }

  #lineFrom(at: number): string {
    const end = this.#text.indexOf("\n", at);
    return this.#text.slice(at, end < 0 ? undefined : end);
  }

  #backingOf(area: MemoryArea): Backing {
    if (area.inode === 0 || ANONYMOUS_NAME.test(area.path)) return "anonymous";
    const type = this.#fileSystemType(area.device);
    if (type === "tmpfs" || type === "devtmpfs") return "shmem";
    if (type === "hugetlbfs") return "hugetlb";
    if (type !== undefined) return "file";
    // The kernel's own mounts are in nobody's mountinfo. Its tmpfs is known by its device number,
    // so what is left of such names is on its hugetlbfs.
    return INTERNAL_NAME.test(area.path) ? "hugetlb" : "file";
  }
}

/**
 * The files among `files` that a process other than `pid` has mapped shared. Processes whose maps
 * may not be read are left out. Reads /proc/PID/maps of every process, some 0.1 ms each: only for
 * guests with shared memory.
 */
export function mappedByOthers(files: ReadonlySet<string>, pid: number): Set<string> {
  const found = new Set<string>();
  for (const name of readdirSync("/proc")) {
    if (!/^\d+$/.test(name) || Number(name) === pid) continue;
    try {
      const maps = new ProcessMaps(readProcessFile(Number(name), "maps"), () => undefined);
      const common = [...maps.sharedFiles()].filter((file) => files.has(file));
      // A task that works in the same address space (a helper of ours) is no other process.
      if (common.length === 0 || native.kcmpVm(pid, Number(name)) === 0) continue;
      for (const file of common) found.add(file);
    } catch {
      continue; // It has ended, or belongs to somebody else.
    }
  }
  return found;
}

/** An area of memory, and whether faults in it are some userfaultfd's. */
export interface WatchedArea {
  readonly startAddr: number;
  /** Exclusive. */
  readonly endAddr: number;
  readonly isWatched: boolean;
}

/**
 * All memory of a process by address. Costs time that grows with what is in memory: the kernel
 * walks the page tables for it.
 * @source proc_pid_smaps(5): VmFlags, `um`: userfaultfd missing pages tracking
 */
export function readWatchedAreas(pid: number): WatchedArea[] {
  const areas: WatchedArea[] = [];
  const area = /^([0-9a-f]+)-([0-9a-f]+) [^]*?^VmFlags:(.*)$/gm;
  for (const [, start = "", end = "", flags = ""] of readProcessFile(pid, "smaps").matchAll(area)) {
    areas.push({
      startAddr: Number.parseInt(start, 16),
      endAddr: Number.parseInt(end, 16),
      isWatched: flags.split(" ").includes("um"),
    });
  }
  return areas;
}

/** @throws FslError TARGET_LOST when the line cannot be read */
export function parseArea(line: string): MemoryArea {
  const fields = AREA.exec(line);
  if (fields === null) throw unreadable(line);
  const [
    ,
    start = "",
    end = "",
    sharing,
    offset = "",
    major = "",
    minor = "",
    inode = "",
    path = "",
  ] = fields;
  return {
    startAddr: Number.parseInt(start, 16),
    endAddr: Number.parseInt(end, 16),
    shared: sharing === "s",
    offset: Number.parseInt(offset, 16),
    device: `${Number.parseInt(major, 16)}:${Number.parseInt(minor, 16)}`,
    inode: Number(inode),
    path,
  };
}

/**
 * File system type of each mounted device, e.g. `0:25` → `tmpfs`. Other lines are left out.
 * @param text all of /proc/PID/mountinfo:
 * `id parent major:minor root point options [tags] - type source options`
 */
export function parseMountTypes(text: string): Map<string, string> {
  const types = new Map<string, string>();
  for (const line of text.split("\n")) {
    const fields = /^\d+ \d+ (\d+:\d+) .* - (\S+) /.exec(line);
    if (fields?.[1] !== undefined && fields[2] !== undefined) types.set(fields[1], fields[2]);
  }
  return types;
}

/** Splits a st_dev as the kernel encodes it into `major:minor`. @source makedev(3) */
export function deviceName(dev: number): string {
  const device = BigInt(dev);
  const major = ((device >> 8n) & 0xfffn) | ((device >> 32n) & 0xfffff000n);
  const minor = (device & 0xffn) | ((device >> 12n) & 0xffffff00n);
  return `${major}:${minor}`;
}

function readMountTypes(pid: number): Map<string, string> {
  const types = parseMountTypes(readProcessFile(pid, "mountinfo"));
  const internal = internalShmemDevice();
  if (internal !== null && !types.has(internal)) types.set(internal, "tmpfs");
  return types;
}

/** The kernel's own tmpfs, of memfds and shared anonymous memory, is mounted nowhere. */
function internalShmemDevice(): string | null {
  const fd = native.memfdCreate("fsl-probe", MFD_CLOEXEC);
  if (fd < 0) return null;
  try {
    return deviceName(fstatSync(fd).dev);
  } finally {
    native.close(fd);
  }
}

/**
 * All of a file in /proc/PID, one byte a character.
 * @throws FslError TARGET_LOST when the process is gone, HOST_UNSUPPORTED when it is somebody else's
 */
function readProcessFile(pid: number, name: "maps" | "smaps" | "mountinfo"): string {
  let text: string;
  try {
    text = readFileSync(`/proc/${pid}/${name}`, "latin1");
  } catch (error) {
    throw processFileError(pid, name, error);
  }
  // Of a process that has ended and was not waited for, the kernel says nothing.
  if (text !== "") return text;
  throw new FslError("TARGET_LOST", `process ${pid}: its ${name} are empty: it has ended`, { pid });
}

/** What it means that a file in /proc/PID cannot be opened or read. */
export function processFileError(pid: number, name: string, cause: unknown): FslError {
  const errno = (cause as NodeJS.ErrnoException).code ?? String(cause);
  const isRefused = errno === "EACCES" || errno === "EPERM";
  const hint = isRefused ? "; run fsl as root, or as QEMU's user" : "";
  return new FslError(
    isRefused ? "HOST_UNSUPPORTED" : "TARGET_LOST",
    `process ${pid}: /proc/${pid}/${name} cannot be read (${errno})${hint}`,
    { pid, errno },
    cause,
  );
}

/** `major:minor:inode` */
function fileIdentity(area: MemoryArea): string {
  return `${area.device}:${area.inode}`;
}

function unreadable(line: string): FslError {
  const shown = JSON.stringify(line.slice(0, 160));
  return new FslError("TARGET_LOST", `process maps: line ${shown} cannot be read`);
}

function mismatch(what: string, startAddr: number, endAddr: number, found: string): FslError {
  return new FslError(
    "TARGET_MISMATCH",
    `${what}: QEMU says it is at ${hex(startAddr)}-${hex(endAddr)}, ` +
      `but in that process ${found}`,
    { startAddr, endAddr, found },
  );
}
