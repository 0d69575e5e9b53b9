/**
 * The seed: a sparse copy of the snapshot, every byte at its own offset, in which the lazily loaded blocks have an
 * all-zero bitmap and no pages. QEMU's own loader takes the device state and the other blocks from it and leaves the
 * lazy blocks alone (migration/ram.c read_ramblock_mapped_ram does nothing for a clear bit). The stream is not
 * rewritten, so this does not depend on machine type or QEMU version.
 */
import { ftruncateSync, readSync, writeSync } from "node:fs";

import { assert, FslError } from "../errors.ts";
import { hex } from "../pages.ts";
import { systemReason } from "./byte-reader.ts";
import { MAPPED_RAM_HEADER_LENGTH, type RAMBlock } from "./mapped-ram.ts";
import type { PageBitmap, PageRun } from "./page-bitmap.ts";

/** Bytes [fileOffset, fileOffset + length) that the seed has from the snapshot. */
export interface SeedPiece {
  readonly fileOffset: number;
  readonly length: number;
}

export interface SeedPlan {
  /** Length of the seed in bytes: that of the snapshot. */
  readonly totalLength: number;
  /** In file order, disjoint. Everything else is zero. */
  readonly pieces: readonly SeedPiece[];
  /** Sum of the lengths in bytes. */
  readonly copyLength: number;
}

/** What `planSeed` needs of a Snapshot. */
export interface SeedSource {
  readonly blocks: readonly RAMBlock[];
  readonly streamOffset: number;
  readonly fileLength: number;
  pageBitmap(block: RAMBlock): PageBitmap;
}

/** Pieces closer than this become one: QEMU reads no page whose bit is clear, so what lies there does not matter. */
const PIECE_GAP_MAX = 32 * 1024;
/** Bytes that `writeSeed` holds at once. */
const BUFFER_LENGTH = 256 * 1024;

/**
 * Decides which bytes of the snapshot the seed needs.
 * @param lazyIdstrs names of the blocks that something else fills; each must be a saved block of the snapshot
 * @param hasPages false leaves the pages of the other blocks out too: somebody else writes them into the seed
 * @throws FslError SNAPSHOT_OPEN, SNAPSHOT_FORMAT when a bitmap can no longer be read
 */
export function planSeed(
  snapshot: SeedSource,
  lazyIdstrs: ReadonlySet<string>,
  hasPages = true,
): SeedPlan {
  const known = new Set(snapshot.blocks.map((block) => block.idstr));
  for (const idstr of lazyIdstrs)
    assert(known.has(idstr), `lazy block ${idstr} is in the snapshot`);

  const pieces: SeedPiece[] = [];
  let streamOffset = snapshot.streamOffset;
  for (const block of snapshot.blocks) {
    if (block.notSaved) continue;
    // Record and header of this block, and of blocks before it that have no bytes in the file.
    addPiece(pieces, streamOffset, block.headerOffset + MAPPED_RAM_HEADER_LENGTH);
    if (!lazyIdstrs.has(block.idstr)) {
      addPiece(pieces, block.bitmapOffset, block.bitmapOffset + block.bitmapLength);
      if (hasPages) addDataPages(pieces, block, snapshot.pageBitmap(block));
    }
    streamOffset = block.pagesOffset + block.usedLength;
  }
  addPiece(pieces, streamOffset, snapshot.fileLength);
  const copyLength = pieces.reduce((sum, piece) => sum + piece.length, 0);
  return { totalLength: snapshot.fileLength, pieces, copyLength };
}

function addDataPages(pieces: SeedPiece[], block: RAMBlock, bitmap: PageBitmap): void {
  const run: PageRun = { startIndex: 0, endIndex: 0 };
  while (bitmap.nextDataRun(run.endIndex, run) !== null) {
    const startOffset = block.pagesOffset + run.startIndex * block.pageSize;
    addPiece(pieces, startOffset, block.pagesOffset + run.endIndex * block.pageSize, PIECE_GAP_MAX);
  }
}

/** Appends [startOffset, endOffset), or lengthens the last piece when the gap is at most `gapMax` bytes. */
function addPiece(pieces: SeedPiece[], startOffset: number, endOffset: number, gapMax = 0): void {
  if (endOffset === startOffset) return;
  const last = pieces.at(-1);
  const lastEnd = last === undefined ? 0 : last.fileOffset + last.length;
  assert(
    startOffset >= lastEnd && endOffset > startOffset,
    `seed pieces in order at ${hex(startOffset)}`,
  );
  if (last !== undefined && startOffset - lastEnd <= gapMax) {
    pieces[pieces.length - 1] = {
      fileOffset: last.fileOffset,
      length: endOffset - last.fileOffset,
    };
  } else {
    pieces.push({ fileOffset: startOffset, length: endOffset - startOffset });
  }
}

/**
 * Writes the seed into an empty file or memfd, by offsets: the descriptor's position stays where it was, at 0.
 * @param snapshotFd the descriptor of the snapshot that the plan was made from
 * @param outFd open for writing; its old contents are dropped
 * @throws FslError SNAPSHOT_FORMAT when the snapshot ends early, SNAPSHOT_OPEN when it cannot be read, HOST_UNSUPPORTED
 * when the seed cannot be written (no space, file size limit)
 */
export function writeSeed(plan: SeedPlan, snapshotFd: number, outFd: number): void {
  attempt("HOST_UNSUPPORTED", "seed: cannot set its length", 0, () => {
    ftruncateSync(outFd, 0);
    ftruncateSync(outFd, plan.totalLength);
  });
  const buffer = new Uint8Array(Math.min(BUFFER_LENGTH, plan.copyLength));
  for (const piece of plan.pieces) copyPiece(piece, buffer, snapshotFd, outFd);
}

function copyPiece(piece: SeedPiece, buffer: Uint8Array, snapshotFd: number, outFd: number): void {
  const endOffset = piece.fileOffset + piece.length;
  let offset = piece.fileOffset;
  while (offset < endOffset) {
    const at = offset;
    const wantedLength = Math.min(buffer.length, endOffset - at);
    const readLength = attempt("SNAPSHOT_OPEN", "seed: cannot read the snapshot", at, () =>
      readSync(snapshotFd, buffer, 0, wantedLength, at),
    );
    if (readLength === 0) {
      const message = `seed: the snapshot was truncated after it was opened (at ${hex(at)})`;
      throw new FslError("SNAPSHOT_FORMAT", message, { fileOffset: at });
    }
    let writtenLength = 0;
    while (writtenLength < readLength) {
      const from = writtenLength;
      writtenLength += attempt("HOST_UNSUPPORTED", "seed: cannot write", at + from, () =>
        writeSync(outFd, buffer, from, readLength - from, at + from),
      );
    }
    offset += readLength;
  }
}

function attempt<T>(
  code: "HOST_UNSUPPORTED" | "SNAPSHOT_OPEN",
  what: string,
  fileOffset: number,
  action: () => T,
): T {
  try {
    return action();
  } catch (cause) {
    const reason = systemReason(cause);
    throw new FslError(
      code,
      `${what}: ${reason} (at ${hex(fileOffset)})`,
      { fileOffset, reason },
      cause,
    );
  }
}
