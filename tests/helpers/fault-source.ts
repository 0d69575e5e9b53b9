/**
 * A page source that goes wrong on purpose: the snapshot's own, which throws, ends its Worker or has
 * no page yet at certain calls as long as a file exists.
 */
import { appendFileSync, existsSync, openSync, statSync } from "node:fs";
import type { PageBytes, PageSource, SourceBlock } from "../../src/source/page-source.ts";
import { SnapshotPageSource } from "../../src/source/snapshot-source.ts";
import { EFD_CLOEXEC } from "../../src/sys/abi.ts";
import { check, close, eventfd } from "../../src/sys/native.ts";

export interface FaultySourceOptions {
  /** The snapshot. */
  readonly path: string;
  /** It goes wrong only while this file exists, and writes a byte into it each time. */
  readonly switchPath: string;
  /** At every n-th call of a Worker. */
  readonly every: number;
  /** How often at most; the file counts. */
  readonly timesMax: number;
  /**
   * What it does: throw, end the Worker, throw where only the eager load calls, or say that the page
   * is still to come.
   */
  readonly how: "throw" | "end" | "throw in eager" | "pend";
  /** The guest stays stopped. */
  readonly paused?: boolean;
}

export function createPageSource(options: unknown, blocks: readonly SourceBlock[]): PageSource {
  const wanted = options as FaultySourceOptions;
  return new FaultySource(
    wanted,
    new SnapshotPageSource({ fd: openSync(wanted.path, "r") }, blocks),
  );
}

class FaultySource implements PageSource {
  /** Nobody ever says that a page has come. */
  readonly readyFd = check(eventfd(0, EFD_CLOEXEC), "eventfd");
  readonly #options: FaultySourceOptions;
  readonly #source: SnapshotPageSource;
  #calls = 0;

  constructor(options: FaultySourceOptions, source: SnapshotPageSource) {
    this.#options = options;
    this.#source = source;
  }

  resolve(blockIndex: number, pageIndex: number, pagesMax: number, answer: PageBytes): void {
    if (this.#options.how !== "throw in eager" && this.#goesWrong()) {
      answer.state = "pending";
      return;
    }
    this.#source.resolve(blockIndex, pageIndex, pagesMax, answer);
  }

  /** The eager load releases chunk by chunk (512 pages), the fault loop everything at once. */
  release(_blockIndex: number, _pageIndex: number, pages: number): void {
    if (pages <= 512 && this.#options.how === "throw in eager") this.#goesWrong();
  }

  close(): void {
    this.#source.close();
    close(this.readyFd);
  }

  /** @returns whether the page is still to come */
  #goesWrong(): boolean {
    // What is read before the guest runs is nobody's Worker's.
    if (Bun.isMainThread) return false;
    const { switchPath, every, timesMax, how } = this.#options;
    this.#calls += 1;
    if (
      this.#calls % every !== 0 ||
      !existsSync(switchPath) ||
      statSync(switchPath).size >= timesMax
    )
      return false;
    appendFileSync(switchPath, "x");
    if (how === "pend") return true;
    // In a Worker this ends the Worker.
    if (how === "end") process.exit(0);
    throw new Error("thrown by the test");
  }
}
