/**
 * The working set of a snapshot: which pages a guest touched first after it was resumed, in
 * first-touch order. Recorded from the fault log of one load, brought in before the guest asks in
 * the next. Runs on the main thread.
 *
 * File `SNAP.fslws`, little-endian:
 *
 *   offset   bytes   content
 *   0        8       magic "FSLWS\0\0\1" (the last byte is the version)
 *   8        4       u32 length of the JSON
 *   12       4       u32 number of pages
 *   16       …       JSON: { snapshot: identity, blocks: [idstr, …] }
 *   …        8 each  u32 index into `blocks`, u32 page index
 */
import {
  closeSync,
  constants,
  fstatSync,
  openSync,
  readSync,
  renameSync,
  unlinkSync,
  writeFileSync,
} from "node:fs";
import { FslError, isFslError } from "../errors.ts";
import { randomHex } from "../sys/random.ts";
import type { LoadState } from "./state.ts";
import { testBit } from "../bits.ts";

const MAGIC = Buffer.from([0x46, 0x53, 0x4c, 0x57, 0x53, 0, 0, 1]);
const HEADER_LENGTH = 16;
const JSON_LENGTH_MAX = 65_536;
/**
 * Bounds the file, and what is brought in before anything else: to plan it takes less than a
 * millisecond, and to copy it three. One load records a quarter of it at most.
 */
const WORKING_SET_PAGES_MAX = 1024;
const BLOCKS_MAX = 256;
/** A set is written anew when a load has found so many pages that are not in it. */
const GROWTH_PAGES = 2;

export interface WorkingSetPage {
  readonly idstr: string;
  readonly pageIndex: number;
}

/** What ties a working set to its snapshot. */
export interface WorkingSetIdentity {
  readonly size: number;
  readonly mtimeNs: string;
  readonly streamOffset: number;
}

export interface WorkingSet {
  readonly identity: WorkingSetIdentity;
  readonly pages: readonly WorkingSetPage[];
}

/**
 * Reads a working set.
 * @returns null when there is no such file
 * @throws FslError SNAPSHOT_OPEN when it cannot be read; SNAPSHOT_FORMAT when it is damaged, or no
 * working set at all (`isForeign`: not to be written over)
 */
export function readWorkingSet(path: string): WorkingSet | null {
  let fd = -1;
  try {
    // Whoever opens a FIFO waits, otherwise.
    fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
    return parseWorkingSet(readBounded(fd, path), path);
  } catch (error) {
    if (isFslError(error)) throw error;
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return null;
    throw new FslError("SNAPSHOT_OPEN", `working set ${path}: ${String(error)}`, { path }, error);
  } finally {
    if (fd >= 0) closeSync(fd);
  }
}

function readBounded(fd: number, path: string): Buffer {
  const lengthMax = HEADER_LENGTH + JSON_LENGTH_MAX + 8 * WORKING_SET_PAGES_MAX;
  const status = fstatSync(fd);
  const { size } = status;
  if (!status.isFile()) throw foreign(path, "expected a regular file, found something else");
  if (size > lengthMax) throw foreign(path, `expected at most ${lengthMax} bytes, found ${size}`);
  const bytes = Buffer.alloc(size);
  const done = size === 0 ? 0 : readSync(fd, bytes, 0, size, 0);
  return bytes.subarray(0, done);
}

/** @throws FslError SNAPSHOT_FORMAT */
export function parseWorkingSet(bytes: Buffer, path: string): WorkingSet {
  if (bytes.length < HEADER_LENGTH || !bytes.subarray(0, 8).equals(MAGIC)) {
    throw foreign(path, "expected a working set of version 1, found something else");
  }
  const jsonLength = bytes.readUInt32LE(8);
  const pageCount = bytes.readUInt32LE(12);
  if (bytes.length !== HEADER_LENGTH + jsonLength + 8 * pageCount) {
    throw damaged(path, `its length ${bytes.length} does not fit its header`);
  }
  const { snapshot, blocks } = parseHead(
    bytes.subarray(HEADER_LENGTH, HEADER_LENGTH + jsonLength),
    path,
  );
  const pages: WorkingSetPage[] = [];
  for (let index = 0; index < pageCount; index += 1) {
    const at = HEADER_LENGTH + jsonLength + 8 * index;
    const idstr = blocks[bytes.readUInt32LE(at)];
    if (idstr === undefined) throw damaged(path, `page ${index} is of no block`);
    pages.push({ idstr, pageIndex: bytes.readUInt32LE(at + 4) });
  }
  return { identity: snapshot, pages };
}

function parseHead(text: Buffer, path: string): { snapshot: WorkingSetIdentity; blocks: string[] } {
  let head: unknown;
  try {
    head = JSON.parse(text.toString("utf8"));
  } catch (error) {
    throw damaged(path, `its description is no JSON: ${String(error)}`);
  }
  const { snapshot, blocks } = (head ?? {}) as {
    snapshot?: Partial<WorkingSetIdentity>;
    blocks?: unknown;
  };
  const blocksFit =
    Array.isArray(blocks) &&
    blocks.length <= BLOCKS_MAX &&
    blocks.every((b) => typeof b === "string");
  const { size, mtimeNs, streamOffset } = snapshot ?? {};
  if (
    !blocksFit ||
    typeof size !== "number" ||
    typeof mtimeNs !== "string" ||
    typeof streamOffset !== "number"
  ) {
    throw damaged(path, "its description lacks a field");
  }
  return { snapshot: { size, mtimeNs, streamOffset }, blocks };
}

/** Somebody else's file: neither used nor written over. */
function foreign(path: string, why: string): FslError {
  const details = { path, isForeign: true };
  return new FslError("SNAPSHOT_FORMAT", `working set ${path}: ${why}; it is left alone`, details);
}

function damaged(path: string, why: string): FslError {
  return new FslError("SNAPSHOT_FORMAT", `working set ${path}: ${why}`, { path });
}

/**
 * Writes a working set under a name of its own, then gives it its name: it is never half there.
 * Mode 0600.
 */
export function writeWorkingSet(path: string, set: WorkingSet): void {
  const blocks = [...new Set(set.pages.map(({ idstr }) => idstr))];
  const json = Buffer.from(JSON.stringify({ snapshot: set.identity, blocks }));
  const bytes = Buffer.alloc(HEADER_LENGTH + json.length + 8 * set.pages.length);
  MAGIC.copy(bytes);
  bytes.writeUInt32LE(json.length, 8);
  bytes.writeUInt32LE(set.pages.length, 12);
  json.copy(bytes, HEADER_LENGTH);
  for (const [index, { idstr, pageIndex }] of set.pages.entries()) {
    const at = HEADER_LENGTH + json.length + 8 * index;
    bytes.writeUInt32LE(blocks.indexOf(idstr), at);
    bytes.writeUInt32LE(pageIndex, at + 4);
  }
  const temporary = `${path}.${randomHex(6)}`;
  try {
    writeFileSync(temporary, bytes, { flag: "wx", mode: 0o600 });
    renameSync(temporary, path);
  } catch (error) {
    try {
      unlinkSync(temporary);
    } catch {
      // It was not made.
    }
    throw error;
  }
}

export function identityFits(a: WorkingSetIdentity, b: WorkingSetIdentity): boolean {
  return a.size === b.size && a.mtimeNs === b.mtimeNs && a.streamOffset === b.streamOffset;
}

/** A chunk with so many pages in the set is faster as a whole, after resume. */
const DENSE_PAGES = 64;

/**
 * What of a set is to be brought in, in the set's order: data pages that touch one another as one
 * run, zero pages each alone, chunks that hold many of both as a whole.
 * @returns block index, first page, number of pages (0 = the whole chunk); three numbers a run
 */
export function planReplay(
  set: Pick<WorkingSet, "pages">,
  state: LoadState,
): Int32Array<ArrayBuffer> {
  const blocks = new Map(state.blocks.map((block) => [block.block.idstr, block]));
  const wanted = state.blocks.map(() => new Set<number>());
  const chunkPages = state.blocks.map((block) => new Uint16Array(block.chunks.length));
  for (const { idstr, pageIndex } of set.pages) {
    const block = blocks.get(idstr);
    const pages = block === undefined ? undefined : wanted[block.index];
    if (block === undefined || pageIndex >= block.pageCount) continue;
    if (pages === undefined || pages.has(pageIndex)) continue;
    pages.add(pageIndex);
    const counts = chunkPages[block.index];
    const chunk = block.chunkOf(pageIndex);
    if (counts !== undefined) counts[chunk] = (counts[chunk] ?? 0) + 1;
  }
  const runs: number[] = [];
  for (const { idstr, pageIndex } of set.pages) {
    const block = blocks.get(idstr);
    const pages = block === undefined ? undefined : wanted[block.index];
    if (block === undefined || !pages?.has(pageIndex)) continue;
    const chunk = block.chunkOf(pageIndex);
    // Huge pages come whole, whoever has touched which part of them in other memory.
    const isHuge = block.block.hostPageSize !== block.block.pageSize;
    if (isHuge || (chunkPages[block.index]?.[chunk] ?? 0) >= DENSE_PAGES) {
      runs.push(block.index, pageIndex, 0);
      const end = block.chunkEnd(chunk);
      for (let page = block.chunkStart(chunk); page < end; page += 1) pages.delete(page);
      continue;
    }
    let start = pageIndex;
    let end = pageIndex + 1;
    if (testBit(block.data, pageIndex)) {
      while (pages.has(start - 1) && testBit(block.data, start - 1)) start -= 1;
      while (pages.has(end) && testBit(block.data, end)) end += 1;
    }
    for (let page = start; page < end; page += 1) pages.delete(page);
    runs.push(block.index, start, end - start);
  }
  return Int32Array.from(runs);
}

/**
 * The set that this load's faults make of the one before.
 * @param faultLogLength how much of the fault log lies in the time that is recorded
 * @returns null when too little is new to write it again
 */
export function growWorkingSet(
  before: WorkingSet | null,
  identity: WorkingSetIdentity,
  state: LoadState,
  faultLogLength: number,
): WorkingSet | null {
  const pages: WorkingSetPage[] = [...(before?.pages ?? [])];
  const known = new Set(pages.map(({ idstr, pageIndex }) => `${pageIndex} ${idstr}`));
  const log = state.faultLog();
  for (let index = 0; index < faultLogLength && pages.length < WORKING_SET_PAGES_MAX; index += 1) {
    const planPage = log[index] ?? 0;
    const block = state.blocks.findLast(({ firstPage }) => firstPage <= planPage);
    if (block === undefined) continue;
    const page = { idstr: block.block.idstr, pageIndex: planPage - block.firstPage };
    const key = `${page.pageIndex} ${page.idstr}`;
    if (known.has(key)) continue;
    known.add(key);
    pages.push(page);
  }
  const added = pages.length - (before?.pages.length ?? 0);
  const enough = before === null || added >= GROWTH_PAGES;
  return enough && pages.length > 0 ? { identity, pages } : null;
}
