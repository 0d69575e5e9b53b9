/** Worker entry point: one eager loader. */
import * as sys from "../sys/native.ts";
import { ChunkMover } from "./chunk-mover.ts";
import { EagerLoop } from "./eager-loop.ts";
import type { EagerWorkerStart } from "./protocol.ts";
import { serveWorker } from "./worker.ts";

serveWorker<EagerWorkerStart>((start, { state, uffd, source, counters, report }) => {
  // Only this thread: the vCPUs and the fault loop go first.
  sys.setpriority(sys.gettid(), start.nice);
  if (start.helper !== null) sys.setpriority(start.helper.pid, start.nice);
  const loop = new EagerLoop({
    state,
    uffd,
    source,
    counters,
    workerIndex: start.workerIndex,
    pieceLength: start.pieceLength,
    order: start.order,
    replay: start.replay,
    mover: start.helper === null ? null : new ChunkMover(start.helper, start.fileFd),
    bytesPerSecond: start.bytesPerSecond,
    onFailure: (failure) => report({ type: "failure", failure }),
    onRecovered: (failure) => report({ type: "recovered", failure }),
  });
  report({ type: "serving" });
  try {
    return loop.run();
  } finally {
    loop.close();
  }
});
