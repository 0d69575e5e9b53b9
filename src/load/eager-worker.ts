/** Worker entry point: one eager loader. */
import { EagerLoop } from "./eager-loop.ts";
import { Priority } from "./priority.ts";
import type { EagerWorkerStart } from "./protocol.ts";
import { serveWorker } from "./worker.ts";

serveWorker<EagerWorkerStart>((start, { state, uffd, source, counters, movers, report }) => {
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
});
