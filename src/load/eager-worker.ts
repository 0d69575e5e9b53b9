/** Worker entry point: one eager loader. */
import { EagerLoop } from "./eager-loop.ts";
import { fillInWorker } from "./fill.ts";
import { Priority } from "./priority.ts";
import type { EagerWorkerStart, FillStart } from "./protocol.ts";
import { runLoop, serveWorker, type WorkerParts } from "./worker.ts";

serveWorker<EagerWorkerStart | FillStart>(async (start) => {
  if (start.role === "eager") return runLoop(start, loadEagerly);
  return { type: "filled", failure: await fillInWorker(start) };
});

function loadEagerly(
  start: EagerWorkerStart,
  { state, uffd, source, counters, movers, report }: WorkerParts,
): "stopped" | "gone" | "finished" {
  const pids = start.helpers.map(({ pid }) => pid);
  const priority = new Priority(pids, start.nice);
  const loop = new EagerLoop({
    state,
    uffd,
    source,
    counters,
    workerIndex: start.workerIndex,
    pieceLength: start.pieceLength,
    order: start.order,
    replay: start.replay,
    priority,
    movers,
    bytesPerSecond: start.bytesPerSecond,
    pendingMax: start.pendingMax,
    onFailure: (failure) => report({ type: "failure", failure }),
    onRecovered: (failure) => report({ type: "recovered", failure }),
  });
  report({ type: "serving" });
  try {
    return loop.run();
  } finally {
    loop.close();
    priority.close();
  }
}
