/** Pages of this host: how long they are, and what becomes of huge ones. */
import { readFileSync } from "node:fs";
import { ARCHITECTURE } from "./embedded.ts";

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

export const HOST_PAGE_LENGTH = readHostPageLength();

/**
 * False where an ordinary load would not have had huge pages either. @source
 * Documentation/admin-guide/mm/transhuge.rst
 */
export function givesHugePages(path = "/sys/kernel/mm/transparent_hugepage/enabled"): boolean {
  try {
    return !readFileSync(path, "utf8").includes("[never]");
  } catch {
    // A kernel without transparent huge pages.
    return false;
  }
}

/**
 * Whether memory whose huge page was split gets small pages for good, also when all of it was given back
 * (MADV_DONTNEED): its page table stays. Linux lets it go from 6.14 on, on x86-64.
 * @param release as uname(2) has it
 * @source Linux mm/pt_reclaim.c, CONFIG_PT_RECLAIM
 */
export function keepsPageTables(
  release = readFileSync("/proc/sys/kernel/osrelease", "latin1"),
  architecture = ARCHITECTURE,
): boolean {
  const [, major = "0", minor = "0"] = /^(\d+)\.(\d+)/.exec(release) ?? [];
  return architecture !== "x86_64" || Number(major) * 1000 + Number(minor) < 6014;
}
