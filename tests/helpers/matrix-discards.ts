/**
 * Memory that a guest gives back while it is loaded: by QEMU's own account (its trace of
 * ram_block_discard_range, in 11.1 ram_block_discard_shared_range), against what is there in the end
 * and what the snapshot has.
 */
import { closeSync, openSync, readFileSync, readSync } from "node:fs";
import { openSnapshot } from "../../src/snapshot/snapshot.ts";
import { type RamBlock, ramBlocks } from "./guests.ts";
import type { FslRun } from "./load-runs.ts";
import { PAGE } from "./matrix-guests.ts";

/** QEMU arguments that write every discard down. */
export function traceArgs(path: string): string[] {
  return ["-trace", "enable=ram_block_discard*", "-D", path];
}

interface Discard {
  readonly address: number;
  readonly length: number;
}

export function discardsIn(path: string): Discard[] {
  const line = /ram_block_discard(?:_shared)?_range .*@(0x[0-9a-f]+) \+ (0x[0-9a-f]+):/g;
  return [...readFileSync(path, "utf8").matchAll(line)].map(([, address, length]) => ({
    address: Number(address),
    length: Number(length),
  }));
}

/** Bytes of guest memory that QEMU has given back so far. */
export function bytesDiscarded(path: string): number {
  return discardsIn(path).reduce((sum, { length }) => sum + length, 0);
}

/** Waits until QEMU has given back so many bytes of guest memory, and `before` before that. */
export async function discarded(path: string, bytesMin: number, before = 0): Promise<void> {
  let bytes = 0;
  for (let left = 200; left > 0; left -= 1) {
    bytes = bytesDiscarded(path) - before;
    if (bytes >= bytesMin) return;
    await Bun.sleep(100); // A file tells nobody when it grows.
  }
  throw new Error(`${bytes} bytes were given back, expected ${bytesMin}`);
}

export interface DiscardedPages {
  /** Pages that were given back, each counted once. */
  readonly pages: number;
  /** Of these: data in the snapshot, which must never come back. */
  readonly dataPages: number;
  /** Not in memory now. */
  readonly absent: number;
  /** In memory with the snapshot's bytes, which are not zero: what must not be. */
  readonly revived: number;
}

/** Looks at every page that was given back. The guest must be stopped. */
export async function lookAtDiscarded(
  run: FslRun,
  snapshotPath: string,
  tracePath: string,
): Promise<DiscardedPages> {
  using snapshot = openSnapshot(snapshotPath);
  const pid = await run.qemuPid();
  const memory = openSync(`/proc/${pid}/mem`, "r");
  const pagemap = openSync(`/proc/${pid}/pagemap`, "r");
  const found = { pages: 0, dataPages: 0, absent: 0, revived: 0 };
  const [now, then, entry] = [Buffer.alloc(PAGE), Buffer.alloc(PAGE), Buffer.alloc(8)];
  const zero = Buffer.alloc(PAGE);
  try {
    for (const block of await ramBlocks(run.qmp)) {
      const saved = snapshot.blocks.find(({ idstr }) => idstr === block.name);
      if (saved === undefined) continue;
      const bitmap = snapshot.pageBitmap(saved);
      for (const page of pagesGivenBack(block, tracePath)) {
        found.pages += 1;
        if (bitmap.has(page)) found.dataPages += 1;
        const address = block.address + page * PAGE;
        readSync(pagemap, entry, 0, 8, (address / PAGE) * 8);
        if ((entry[7] ?? 0) >>> 6 === 0) {
          found.absent += 1;
          continue;
        }
        if (!bitmap.has(page)) continue;
        readSync(memory, now, 0, PAGE, address);
        readSync(snapshot.fd, then, 0, PAGE, saved.pagesOffset + page * PAGE);
        if (!now.equals(zero) && now.equals(then)) found.revived += 1;
      }
    }
  } finally {
    closeSync(memory);
    closeSync(pagemap);
  }
  return found;
}

function pagesGivenBack(block: RamBlock, tracePath: string): Set<number> {
  const pages = new Set<number>();
  for (const { address, length } of discardsIn(tracePath)) {
    if (address < block.address || address >= block.address + block.used) continue;
    for (let at = address; at < address + length; at += PAGE) {
      pages.add((at - block.address) / PAGE);
    }
  }
  return pages;
}
