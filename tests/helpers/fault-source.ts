/**
 * A page source that goes wrong on purpose: the snapshot's own, which throws or ends its Worker at
 * certain pages as long as a file exists.
 */
import { appendFileSync, existsSync, openSync, statSync } from "node:fs";
import type { PageBytes, PageSource, SourceBlock } from "../../src/source/page-source.ts";
import { SnapshotPageSource } from "../../src/source/snapshot-source.ts";

export interface FaultySourceOptions {
  /** The snapshot. */
  readonly path: string;
  /** It goes wrong only while this file exists, and writes a byte into it each time. */
  readonly switchPath: string;
  /** At every n-th call of a Worker. */
  readonly every: number;
  /** How often at most; the file counts. */
  readonly timesMax: number;
  /** What it does: throw, end the Worker, or throw where only the eager load calls. */
  readonly how: "throw" | "end" | "throw in eager";
}

export function createPageSource(options: unknown, blocks: readonly SourceBlock[]): PageSource {
  const wanted = options as FaultySourceOptions;
  return new FaultySource(
    wanted,
    new SnapshotPageSource({ fd: openSync(wanted.path, "r") }, blocks),
  );
}

class FaultySource implements PageSource {
  readonly readyFd = -1;
  readonly #options: FaultySourceOptions;
  readonly #source: SnapshotPageSource;
  #calls = 0;

  constructor(options: FaultySourceOptions, source: SnapshotPageSource) {
    this.#options = options;
    this.#source = source;
  }

  resolve(blockIndex: number, pageIndex: number, pagesMax: number, answer: PageBytes): void {
    if (this.#options.how !== "throw in eager") this.#goWrong();
    this.#source.resolve(blockIndex, pageIndex, pagesMax, answer);
  }

  /** The eager load releases chunk by chunk (512 pages), the fault loop everything at once. */
  release(_blockIndex: number, _pageIndex: number, pages: number): void {
    if (pages <= 512 && this.#options.how === "throw in eager") this.#goWrong();
  }

  close(): void {
    this.#source.close();
  }

  #goWrong(): void {
    // What is read before the guest runs is nobody's Worker's.
    if (Bun.isMainThread) return;
    const { switchPath, every, timesMax, how } = this.#options;
    this.#calls += 1;
    if (
      this.#calls % every !== 0 ||
      !existsSync(switchPath) ||
      statSync(switchPath).size >= timesMax
    )
      return;
    appendFileSync(switchPath, "x");
    // In a Worker this ends the Worker.
    if (how === "end") process.exit(0);
    throw new Error("thrown by the test");
  }
}
