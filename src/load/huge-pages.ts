/**
 * Huge pages back: chunks that came page by page have small pages, where an ordinary load would
 * have left huge ones. Once the ranges are unregistered, MADV_COLLAPSE (Linux 6.1) gives them back
 * from outside. Runs on the main thread, one chunk at a time with pauses, so that the guest keeps
 * its CPU.
 */
import { EAGAIN, MADV_COLLAPSE } from "../sys/abi.ts";
import { givesHugePages } from "../sys/host-pages.ts";
import * as sys from "../sys/native.ts";
import type { ServedTarget } from "../vmm/target.ts";
import { nextBit } from "../bits.ts";
import { residentRanges } from "./resident.ts";
import { type BlockState, CHUNK_DONE, CHUNK_LENGTH, type LoadState } from "./state.ts";

/** One chunk takes about 1 ms; so long is waited before the next. */
const PAUSE_MS = 3;
/** A chunk in which the kernel finds a page busy is tried again so often. */
const TRIES_MAX = 3;

/**
 * Collapses every chunk that was copied. Only after all ranges were unregistered.
 * @param isOver asked before each chunk: the target has ended
 * @returns how many chunks have become huge pages
 */
export async function giveHugePagesBack(
  target: ServedTarget,
  state: LoadState,
  isOver: () => boolean,
): Promise<number> {
  if (!givesHugePages()) return 0;
  let collapsed = 0;
  for (const block of state.blocks) {
    if (!block.block.movable) continue;
    for (let chunk = 0; chunk < block.chunks.length && !isOver(); chunk += 1) {
      if (block.chunks[chunk] !== CHUNK_DONE || !mayCollapse(target, state, block, chunk)) continue;
      if (collapse(target, block, chunk)) collapsed += 1;
      await Bun.sleep(PAUSE_MS);
    }
  }
  return collapsed;
}

/**
 * A whole chunk; and where the guest can give memory back, one that holds nothing but data and of
 * which it has given nothing back: the kernel would fill that in again.
 */
function mayCollapse(
  target: ServedTarget,
  state: LoadState,
  block: BlockState,
  chunk: number,
): boolean {
  const start = block.chunkStart(chunk);
  const end = block.chunkEnd(chunk);
  if ((end - start) * block.block.pageSize !== CHUNK_LENGTH) return false;
  if (!state.metadata.canDiscard) return true;
  if (nextBit(block.data, start, end, false) !== end) return false;
  const { hostAddr, pageSize } = block.block;
  return isWhole(target.pid, hostAddr + start * pageSize);
}

function isWhole(pid: number, address: number): boolean {
  try {
    const [first, ...rest] = residentRanges(pid, address, CHUNK_LENGTH);
    if (first === undefined || rest.length > 0) return false;
    return first.startAddr <= address && first.endAddr >= address + CHUNK_LENGTH;
  } catch {
    return false; // The target has ended.
  }
}

function collapse(target: ServedTarget, block: BlockState, chunk: number): boolean {
  const address = block.block.hostAddr + block.chunkStart(chunk) * block.block.pageSize;
  for (let attempt = 0; attempt < TRIES_MAX; attempt += 1) {
    const result = sys.processMadvise(target.pidfd, address, CHUNK_LENGTH, MADV_COLLAPSE);
    if (result >= 0) return true;
    // No memory for a huge page, a kernel before 6.1, a target that has ended: small pages do as
    // well.
    if (result !== -EAGAIN) return false;
  }
  return false;
}
