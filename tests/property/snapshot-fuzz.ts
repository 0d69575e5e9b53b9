/**
 * Mutation fuzzing of the snapshot parser with real files of QEMU (tests/fixtures):
 *
 *   bun tests/property/snapshot-fuzz.ts [--cases N] [--seed S]
 *
 * Each case damages one file in a few places (bits, absurd numbers, cuts, moved and doubled ranges) and parses it. What
 * may happen: an FslError with a file offset, or a layout that holds together. Anything else (another error, a read
 * outside the file, too many bytes read, too much time) is a failure that names its seed. Files are never copied: a
 * case is a list of pieces over the original bytes. Exit code 1 when a case failed.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";

import { isFslError } from "../../src/errors.ts";
import type { ByteSource } from "../../src/snapshot/byte-reader.ts";
import { planSeed } from "../../src/snapshot/seed.ts";
import { parseSnapshot, readPageBitmap, type SnapshotLayout } from "../../src/snapshot/snapshot.ts";

export interface FuzzReport {
  readonly cases: number;
  /** How many cases each outcome had: `parsed`, or the code of the refusal. */
  readonly outcomes: Readonly<Record<string, number>>;
  /** How many different places of refusal were reached, by message without its numbers. */
  readonly refusals: number;
  readonly slowestMs: number;
  /** One line each, with what is needed to repeat the case. */
  readonly failures: readonly string[];
}

/** Bytes that a parse may read: the description (at most 16 MiB, with a window that doubles) and small change. */
const READ_LENGTH_MAX = 48 * 1024 * 1024;
const READ_COUNT_MAX = 20_000;
/** A case takes 1 ms; a machine that does other things besides may take longer. */
const CASE_MS_MAX = 5000;
const FAILURES_MAX = 20;

const FIXTURES = join(import.meta.dir, "../fixtures");

/** Runs `cases` cases. @param seed any integer; equal seeds make equal cases */
export function fuzzSnapshots(cases: number, seed: number): FuzzReport {
  const originals = loadOriginals();
  const outcomes: Record<string, number> = {};
  const refusals = new Set<string>();
  const failures: string[] = [];
  let slowestMs = 0;
  for (let index = 0; index < cases && failures.length < FAILURES_MAX; index++) {
    const random = new Random(seed + index);
    const original = random.pick(originals);
    const source = new MutatedSource(original.bytes);
    const steps = mutate(source, original, random);
    const startMs = performance.now();
    try {
      const outcome = attempt(source, original.offset, refusals);
      outcomes[outcome] = (outcomes[outcome] ?? 0) + 1;
      if (source.reads > READ_COUNT_MAX) throw new Error(`${source.reads} reads`);
      if (source.bytesRead > READ_LENGTH_MAX) throw new Error(`${source.bytesRead} bytes read`);
      const takenMs = performance.now() - startMs;
      slowestMs = Math.max(slowestMs, takenMs);
      if (takenMs > CASE_MS_MAX) throw new Error(`${Math.round(takenMs)} ms`);
    } catch (error) {
      failures.push(
        `--cases 1 --seed ${seed + index}: ${original.name}: ${steps.join(", ")}: ${describe(error)}`,
      );
    }
  }
  return { cases, outcomes, refusals: refusals.size, slowestMs, failures };
}

/** Parses; @returns the outcome. @throws what no file may cause */
function attempt(source: MutatedSource, offset: number, refusals: Set<string>): string {
  try {
    const layout = parseSnapshot(source, offset === 0 ? {} : { offset });
    checkLayout(layout, source);
    return "parsed";
  } catch (error) {
    if (!isFslError(error) || !error.code.startsWith("SNAPSHOT_")) throw error;
    if (typeof error.details["fileOffset"] !== "number")
      throw new Error("no file offset", { cause: error });
    refusals.add(error.message.replaceAll(/0x[0-9a-f]+|\d+/g, "N"));
    return error.code;
  }
}

/** What must hold for every layout that is accepted, whatever the file says. */
function checkLayout(layout: SnapshotLayout, source: MutatedSource): void {
  const { byteLength } = source;
  let offset = layout.streamOffset;
  for (const block of layout.blocks) {
    must(
      block.usedLength > 0 && block.pageCount * block.pageSize === block.usedLength,
      "whole pages",
    );
    must(block.recordOffset >= offset, "records behind one another");
    offset = block.headerOffset + 28;
    if (block.notSaved) continue;
    must(block.bitmapOffset >= offset, "bitmap behind the header");
    must(block.bitmapOffset + block.bitmapLength <= block.pagesOffset, "pages behind the bitmap");
    offset = block.pagesOffset + block.usedLength;
    must(offset <= byteLength, "pages within the file");
    must(block.pagesOffset % block.pageSize === 0, "aligned pages");
  }
  must(
    new Set(layout.blocks.map((block) => block.idstr)).size === layout.blocks.length,
    "unique names",
  );
  must(offset <= layout.tailOffset && layout.tailOffset <= byteLength, "the tail behind the pages");
  let sectionEnd = layout.sections[0]?.fileOffset ?? -1;
  for (const section of layout.sections) {
    must(section.fileOffset === sectionEnd, "sections without gaps");
    sectionEnd += section.length;
  }
  must(sectionEnd <= byteLength, "sections within the file");

  const lazy = new Set(layout.blocks.slice(0, 1).map((block) => block.idstr));
  const plan = planSeed({ ...layout, pageBitmap: (block) => readPageBitmap(source, block) }, lazy);
  let pieceEnd = 0;
  for (const piece of plan.pieces) {
    must(piece.fileOffset >= pieceEnd && piece.length > 0, "pieces in order");
    pieceEnd = piece.fileOffset + piece.length;
  }
  must(pieceEnd === byteLength && plan.totalLength === byteLength, "a seed as long as the file");
}

function must(condition: boolean, what: string): void {
  if (!condition) throw new Error(`expected ${what}`);
}

function describe(error: unknown): string {
  return error instanceof Error ? (error.stack ?? error.message) : String(error);
}

// -- originals ----------------------------------------------------------------------------------

interface Original {
  readonly name: string;
  readonly bytes: Uint8Array;
  readonly offset: number;
  /** Offsets of bytes worth damaging: everything that is not a page. */
  readonly places: readonly Span[];
}

interface Span {
  readonly start: number;
  readonly end: number;
}

/** Gaps of zeros shorter than this belong to the metadata around them. */
const GAP_LENGTH_MIN = 4096;

function loadOriginals(): Original[] {
  const names = readdirSync(FIXTURES).filter((file) => file.endsWith(".snap.zst"));
  return names.map((file) => {
    const bytes = new Uint8Array(Bun.zstdDecompressSync(readFileSync(join(FIXTURES, file))));
    const name = file.replace(".snap.zst", "");
    return { name, bytes, offset: name === "offset-4097" ? 4097 : 0, places: spansOfData(bytes) };
  });
}

/** Ranges that are not long runs of zeros. */
function spansOfData(bytes: Uint8Array): Span[] {
  const spans: Span[] = [];
  for (let block = 0; block < bytes.length; block += GAP_LENGTH_MIN) {
    const end = Math.min(block + GAP_LENGTH_MIN, bytes.length);
    if (bytes.subarray(block, end).every((byte) => byte === 0)) continue;
    const last = spans.at(-1);
    if (last !== undefined && last.end === block)
      spans[spans.length - 1] = { start: last.start, end };
    else spans.push({ start: block, end });
  }
  return spans;
}

// -- mutations ----------------------------------------------------------------------------------

/** Values that break arithmetic: signs, powers of two, page and word sizes and their neighbours. */
const ABSURD = [0, 1, 2, 4, 7, 8, 16, 63, 64, 127, 128, 255, 256, 4095, 4096, 4097, 65535, 65536]
  .map(BigInt)
  .concat([2n ** 20n, 2n ** 31n - 1n, 2n ** 31n, 2n ** 32n - 1n, 2n ** 32n, 2n ** 44n])
  .concat([2n ** 53n - 1n, 2n ** 53n, 2n ** 63n - 1n, 2n ** 63n, 2n ** 64n - 1n]);

function mutate(source: MutatedSource, original: Original, random: Random): string[] {
  const steps: string[] = [];
  const count = 1 + random.below(random.below(4) === 0 ? 8 : 2);
  for (let step = 0; step < count; step++) steps.push(mutateOnce(source, original, random));
  return steps;
}

function mutateOnce(source: MutatedSource, original: Original, random: Random): string {
  const at = Math.min(placeIn(original, random), source.byteLength);
  switch (random.below(10)) {
    case 0:
    case 1: {
      source.overwrite(at, [source.byteAt(at) ^ (1 << random.below(8))]);
      return `bit at ${at}`;
    }
    case 2: {
      const byte = random.pick([0, 1, 2, 3, 4, 5, 6, 7, 8, 0x10, 0x7e, 0x7f, 0x80, 0xff]);
      source.overwrite(at, [byte]);
      return `byte ${byte} at ${at}`;
    }
    case 3:
    case 4: {
      const size = random.pick([2, 4, 8, 8]);
      const value =
        random.below(3) === 0 ? BigInt(source.byteLength - random.below(3)) : random.pick(ABSURD);
      source.overwrite(at, bigEndian(value, size));
      return `${size} bytes of ${value} at ${at}`;
    }
    case 5: {
      source.cut(at);
      return `cut at ${at}`;
    }
    case 6: {
      const length = 1 + random.below(random.pick([1, 8, 64, 5000]));
      source.remove(at, at + length);
      return `${length} bytes removed at ${at}`;
    }
    case 7: {
      const length = 1 + random.below(random.pick([1, 8, 64, 5000]));
      const from = placeIn(original, random);
      source.insert(at, original.bytes.subarray(from, from + length));
      return `${length} bytes of ${from} inserted at ${at}`;
    }
    case 8: {
      const from = placeIn(original, random);
      const length = 1 + random.below(64);
      source.overwrite(at, [...original.bytes.subarray(from, from + length)]);
      return `${length} bytes of ${from} copied to ${at}`;
    }
    default: {
      // A digit, bracket or quote of the description.
      const tail = Math.max(0, source.byteLength - 1 - random.below(20_000));
      const letter = random.pick([...'0123456789-.eE{}[],:"\\ n']);
      source.overwrite(tail, [letter.charCodeAt(0)]);
      return `${letter} at ${tail}`;
    }
  }
}

/** Starts and ends of metadata are the likeliest places: there are magics, headers and footers. */
function placeIn(original: Original, random: Random): number {
  const { start, end } = random.pick(original.places);
  const within = random.below(end - start);
  if (random.below(2) === 0) return start + Math.min(within, random.below(200));
  return start + within;
}

function bigEndian(value: bigint, size: number): number[] {
  return Array.from({ length: size }, (_, index) =>
    Number((value >> BigInt(8 * (size - 1 - index))) & 0xffn),
  );
}

/** A file as a list of pieces of other byte arrays; counts what is read. */
class MutatedSource implements ByteSource {
  readonly name = "fuzz.snap";
  reads = 0;
  bytesRead = 0;
  #pieces: Uint8Array[];

  constructor(bytes: Uint8Array) {
    this.#pieces = [bytes];
  }

  get byteLength(): number {
    return this.#pieces.reduce((sum, piece) => sum + piece.length, 0);
  }

  read(offset: number, length: number): Uint8Array {
    if (!(offset >= 0 && length >= 0 && offset + length <= this.byteLength)) {
      throw new Error(`read of [${offset}, ${offset + length}) outside ${this.byteLength} bytes`);
    }
    this.reads += 1;
    this.bytesRead += length;
    const result = new Uint8Array(length);
    let at = 0;
    for (const piece of this.#pieces) {
      const from = Math.max(offset, at);
      const to = Math.min(offset + length, at + piece.length);
      if (from < to) result.set(piece.subarray(from - at, to - at), from - offset);
      at += piece.length;
    }
    return result;
  }

  byteAt(offset: number): number {
    return offset < this.byteLength ? (this.#between(offset, offset + 1)[0]?.[0] ?? 0) : 0;
  }

  overwrite(offset: number, bytes: readonly number[]): void {
    const end = this.byteLength;
    const fitting = Uint8Array.from(bytes.slice(0, Math.max(0, end - offset)));
    this.#pieces = [
      ...this.#between(0, offset),
      fitting,
      ...this.#between(offset + fitting.length, end),
    ];
  }

  insert(offset: number, bytes: Uint8Array): void {
    this.#pieces = [...this.#between(0, offset), bytes, ...this.#between(offset, this.byteLength)];
  }

  remove(start: number, end: number): void {
    this.#pieces = [...this.#between(0, start), ...this.#between(end, this.byteLength)];
  }

  cut(offset: number): void {
    this.#pieces = this.#between(0, offset);
  }

  #between(start: number, end: number): Uint8Array[] {
    const result: Uint8Array[] = [];
    let at = 0;
    for (const piece of this.#pieces) {
      const from = Math.max(start, at);
      const to = Math.min(end, at + piece.length);
      if (from < to) result.push(piece.subarray(from - at, to - at));
      at += piece.length;
    }
    return result;
  }
}

/** xorshift32, seeded through a mixing step so that neighbouring seeds differ at once. */
class Random {
  #state: number;

  constructor(seed: number) {
    let mixed = Math.imul(seed ^ 0x9e3779b9, 0x85ebca6b);
    mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35);
    this.#state = (mixed ^ (mixed >>> 16)) >>> 0 || 1;
  }

  /** 0 <= result < limit. @param limit 1 to 2^32 */
  below(limit: number): number {
    this.#state ^= this.#state << 13;
    this.#state ^= this.#state >>> 17;
    this.#state ^= this.#state << 5;
    return (this.#state >>> 0) % limit;
  }

  pick<T>(items: readonly T[]): T {
    const item = items[this.below(items.length)];
    if (item === undefined) throw new Error("nothing to pick from");
    return item;
  }
}

if (import.meta.main) {
  const { values } = parseArgs({
    options: {
      cases: { type: "string", default: "100000" },
      seed: { type: "string", default: String(Date.now() % 1_000_000_000) },
    },
  });
  const seed = Number(values.seed);
  const startMs = performance.now();
  const report = fuzzSnapshots(Number(values.cases), seed);
  const seconds = ((performance.now() - startMs) / 1000).toFixed(1);
  console.log(
    `seed ${seed}: ${report.cases} cases in ${seconds} s, slowest ${report.slowestMs.toFixed(1)} ms`,
  );
  console.log(`${JSON.stringify(report.outcomes)}, ${report.refusals} different refusals`);
  for (const failure of report.failures) console.log(`FAIL ${failure}`);
  process.exitCode = report.failures.length > 0 ? 1 : 0;
}
