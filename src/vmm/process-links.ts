/** Where the descriptors of a process lead, by /proc/PID/fd. */
import { readdirSync, readlinkSync } from "node:fs";

export function linksOf(pid: number): string[] {
  return readdirSync(`/proc/${pid}/fd`).map((number) => linkOf(`/proc/${pid}/fd/${number}`));
}

/** Numbers of the descriptors that lead to `wanted`; none when it cannot be looked at. */
export function descriptorsOf(pid: number, wanted: string): number[] {
  try {
    const numbers = readdirSync(`/proc/${pid}/fd`).map(Number);
    return numbers.filter((number) => linkOf(`/proc/${pid}/fd/${number}`) === wanted);
  } catch {
    return [];
  }
}

/** Empty when it was closed meanwhile. */
export function linkOf(path: string): string {
  try {
    return readlinkSync(path);
  } catch {
    return "";
  }
}
