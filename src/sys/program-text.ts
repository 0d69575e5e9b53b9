/**
 * The code of this program in memory. Bun's is 80 MB, of which a start touches 34, most of it never
 * again; it stays in the page cache, but counts as this process's memory for as long as it is
 * mapped. To be let go after each start of something: of the program and its first Worker, and of another
 * Worker in the middle of a load.
 */
import { readFileSync, readlinkSync } from "node:fs";
import { MADV_DONTNEED } from "./abi.ts";
import * as native from "./native.ts";

/** Executable only: read-only areas may hold what the dynamic loader has written. */
const CODE = /^([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ \d+ +(\/.*)$/;

/**
 * Unmaps the code; what runs next is mapped again from the page cache, 64 KiB at a time, 1 µs each.
 * @returns bytes of the areas
 */
export function releaseProgramText(): number {
  let released = 0;
  const program = readlinkSync("/proc/self/exe");
  for (const line of readFileSync("/proc/self/maps", "latin1").split("\n")) {
    const [, start = "", end = "", path] = CODE.exec(line) ?? [];
    if (path !== program) continue;
    const startAddr = Number.parseInt(start, 16);
    const length = Number.parseInt(end, 16) - startAddr;
    if (native.madvise(startAddr, length, MADV_DONTNEED) === 0) released += length;
  }
  return released;
}
