/** How much of a sparse file is really on disk. */
import * as sys from "../sys/native.ts";
import { SEEK_DATA, SEEK_HOLE } from "../sys/abi.ts";

/**
 * A file with more extents than this is counted as far as that; it bounds the time on hostile
 * files.
 */
const EXTENTS_MAX = 1 << 20;

/**
 * Bytes of [start, end) that are not holes, by lseek(2) SEEK_DATA and SEEK_HOLE; a file system
 * without holes says all.
 * @param fd an open descriptor; its position is moved
 */
export function allocatedBytes(fd: number, start: number, end: number): number {
  let bytes = 0;
  let at = start;
  for (let extent = 0; extent < EXTENTS_MAX && at < end; extent += 1) {
    const data = sys.lseek(fd, at, SEEK_DATA);
    if (data < 0 || data >= end) break;
    const hole = sys.lseek(fd, data, SEEK_HOLE);
    const dataEnd = hole < 0 ? end : Math.min(hole, end);
    bytes += dataEnd - data;
    at = dataEnd;
  }
  return bytes;
}
