/**
 * What both kinds of Worker do: wait for a message, make the page source, run the loop,
 * report. A Worker is started while the target is still starting (its code and the shim are loaded
 * by then) and gets its work later.
 */
import { makeSource } from "../source/make-source.ts";
import type { PageSource } from "../source/page-source.ts";
import * as sys from "../sys/native.ts";
import { Uffd } from "../uffd/uffd.ts";
import { ChunkMover } from "./chunk-mover.ts";
import { placeAs } from "./placement.ts";
import { compileIdly, compileReluctantly } from "./priority.ts";
import type { WorkerReport, WorkerStart } from "./protocol.ts";
import { LoadState } from "./state.ts";

declare const self: Worker;

export interface WorkerParts {
  readonly state: LoadState;
  readonly uffd: Uffd;
  readonly source: PageSource;
  readonly counters: Float64Array;
  readonly movers: readonly ChunkMover[];
  readonly report: (report: WorkerReport) => void;
}

function report(message: WorkerReport): void {
  self.postMessage(message);
}

/**
 * Does `work` for each message, and reports what comes of it. @param prepare done before the first one, and without
 * need: it may fail
 */
export function serveWorker<Message>(
  work: (message: Message) => Promise<WorkerReport>,
  prepare?: () => unknown,
): void {
  compileReluctantly();
  self.onmessage = async (event: MessageEvent<Message>) => {
    try {
      report(await work(event.data));
    } catch (error) {
      const { message, stack } = error instanceof Error ? error : new Error(String(error));
      report({ type: "error", message, stack: stack ?? "" });
    }
  };
  sys.load();
  report({ type: "loaded" });
  try {
    prepare?.();
    compileIdly();
  } catch {
    // What is wrong shows when it is done in earnest.
  }
}

/** Runs a loop with all that it needs. */
export async function runLoop<Start extends WorkerStart>(
  start: Start,
  loop: (start: Start, parts: WorkerParts) => "stopped" | "gone" | "finished",
): Promise<WorkerReport> {
  const state = LoadState.attach(start.handle);
  placeAs(state.metadata.target.pid);
  const counters = state.counters(start.workerIndex);
  const source = await makeSource(start.source, start.handle.metadata.blocks);
  // The descriptor is the main thread's: it is not closed here.
  const uffd = new Uffd(start.uffdFd);
  const { canDiscard } = state.metadata;
  const movers = start.helpers.map((helper) => {
    return new ChunkMover(helper, start.fileFd, canDiscard);
  });
  const end = loop(start, { state, uffd, source, counters, movers, report });
  source.close();
  return { type: "ended", end };
}
