/**
 * The seed as a file that QEMU reads (what is in it: snapshot/seed.ts). By default its bytes are
 * the snapshot's; with a page source of the caller's own the pages of RAM in it are that source's.
 *
 * A guest that was stopped before it was saved runs in the seed: QEMU would leave it stopped, however
 * clearly it was told to let it run, and `cont` only when its devices are there takes 1 ms more.
 */
import { writeSync } from "node:fs";
import { FslError } from "../errors.ts";
import { hex } from "../pages.ts";
import { encodeRunState } from "../snapshot/global-state.ts";
import type { PageBitmap } from "../snapshot/page-bitmap.ts";
import { planSeed, writeSeed } from "../snapshot/seed.ts";
import type { Snapshot } from "../snapshot/snapshot.ts";
import { EFAULT } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import { newSeedFile } from "../vmm/fdset.ts";
import type { PageReader } from "./page-reader.ts";

/**
 * @param without names of the blocks that QEMU is to leave alone
 * @param fd where to write it; closed on errors
 * @returns that descriptor
 */
export function makeSeed(
  snapshot: Snapshot,
  without: ReadonlySet<string>,
  fd = newSeedFile(),
): number {
  try {
    writeSeed(planSeed(snapshot, without), snapshot.fd, fd);
    letRun(snapshot, fd);
    return fd;
  } catch (error) {
    sys.close(fd);
    throw error;
  }
}

/** The same with its pages from a page source. */
export async function makeSeedFrom(
  reader: PageReader,
  snapshot: Snapshot,
  without: ReadonlySet<string>,
  bitmaps: ReadonlyMap<string, PageBitmap>,
): Promise<number> {
  const fd = newSeedFile();
  try {
    writeSeed(planSeed(snapshot, without, false), snapshot.fd, fd);
    letRun(snapshot, fd);
    for (const { idstr, pageCount, pageSize, pagesOffset } of snapshot.blocks) {
      const bitmap = bitmaps.get(idstr);
      if (bitmap === undefined || without.has(idstr)) continue;
      await reader.each(idstr, bitmap.words, 0, pageCount, (address, page, pages) => {
        const offset = pagesOffset + page * pageSize;
        for (let at = 0; at < pages * pageSize;) {
          const done = sys.pwrite(fd, address + at, pages * pageSize - at, offset + at);
          if (done <= 0) throw unwritable(done, reader, idstr, page, offset + at);
          at += done;
        }
      });
    }
    return fd;
  } catch (error) {
    sys.close(fd);
    throw error;
  }
}

/** Whether QEMU will let the guest run by itself, when it has its state from a seed and may. */
export function runsFromSeed({ globalState }: Snapshot): boolean {
  return globalState !== null && ["running", STOPPED].includes(globalState.runState);
}

/** The run state of a guest that somebody has stopped, and that nothing else keeps from running. */
const STOPPED = "paused";

function letRun({ globalState }: Snapshot, fd: number): void {
  if (globalState?.runState !== STOPPED) return;
  const bytes = encodeRunState(globalState, "running");
  writeSync(fd, bytes, 0, bytes.length, globalState.sizeOffset);
}

function unwritable(
  result: number,
  reader: PageReader,
  idstr: string,
  page: number,
  fileOffset: number,
): FslError {
  if (result === -EFAULT) return reader.diagnose(idstr, page) ?? reader.unreadable(idstr, page);
  const reason = sys.errnoText(-result);
  return new FslError("HOST_UNSUPPORTED", `seed: cannot write: ${reason} (at ${hex(fileOffset)})`, {
    fileOffset,
    reason,
  });
}
