/**
 * The seed as a file that QEMU reads (what is in it: snapshot/seed.ts). By default its bytes are
 * the snapshot's; with a page source of the caller's own the pages of RAM in it are that source's.
 */
import { openSync } from "node:fs";
import { FslError } from "../errors.ts";
import { hex } from "../pages.ts";
import type { PageBitmap } from "../snapshot/page-bitmap.ts";
import { planSeed, writeSeed } from "../snapshot/seed.ts";
import type { Snapshot } from "../snapshot/snapshot.ts";
import { EFAULT, MFD_CLOEXEC } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import { wordsOf } from "./bits.ts";
import type { PageReader } from "./page-reader.ts";

const SIGXFSZ = 25;

/**
 * @param without names of the blocks that QEMU is to leave alone
 * @returns a descriptor that is open for reading only, as QEMU wants it, at position 0
 */
export function makeSeed(snapshot: Snapshot, without: ReadonlySet<string>): number {
  const fd = newSeed();
  try {
    writeSeed(planSeed(snapshot, without), snapshot.fd, fd);
    return openSync(`/proc/self/fd/${fd}`, "r");
  } finally {
    sys.close(fd);
  }
}

/** The same with its pages from a page source. */
export async function makeSeedFrom(
  reader: PageReader,
  snapshot: Snapshot,
  without: ReadonlySet<string>,
  bitmaps: ReadonlyMap<string, PageBitmap>,
): Promise<number> {
  const fd = newSeed();
  try {
    writeSeed(planSeed(snapshot, without, false), snapshot.fd, fd);
    for (const { idstr, pageCount, pageSize, pagesOffset } of snapshot.blocks) {
      const bitmap = bitmaps.get(idstr);
      if (bitmap === undefined || without.has(idstr)) continue;
      await reader.each(idstr, wordsOf(bitmap), 0, pageCount, (address, page, pages) => {
        const offset = pagesOffset + page * pageSize;
        for (let at = 0; at < pages * pageSize;) {
          const done = sys.pwrite(fd, address + at, pages * pageSize - at, offset + at);
          if (done <= 0) throw unwritable(done, reader, idstr, page, offset + at);
          at += done;
        }
      });
    }
    return openSync(`/proc/self/fd/${fd}`, "r");
  } finally {
    sys.close(fd);
  }
}

function newSeed(): number {
  // RLIMIT_FSIZE counts for memfds too; without this its signal would end us instead of giving
  // EFBIG.
  sys.ignoreSignal(SIGXFSZ);
  return sys.check(sys.memfdCreate("fsl-seed", MFD_CLOEXEC), "memfd_create of the seed");
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
