/** Worker entry point: the fault loop. */
import { EagerMoves } from "./eager-moves.ts";
import { rehearseFaults } from "./rehearsal.ts";
import { FaultLoop } from "./fault-loop.ts";
import type { FaultWorkerStart } from "./protocol.ts";
import { runLoop, serveWorker, type WorkerParts } from "./worker.ts";

serveWorker<FaultWorkerStart>((start) => runLoop(start, serveFaults), rehearseFaults);

function serveFaults(
  start: FaultWorkerStart,
  { state, uffd, source, counters, movers, report }: WorkerParts,
): "stopped" | "gone" | "finished" {
  const { fileFd } = start;
  const moves =
    start.moves === null
      ? undefined
      : new EagerMoves({ uffd, source, state, fileFd, start: start.moves });
  const loop = new FaultLoop({
    state,
    uffd,
    source,
    counters,
    stopFd: start.stopFd,
    pidfd: start.pidfd,
    clusterPages: start.clusterPages,
    movers,
    helperPids: start.helperPids,
    replay: start.replay,
    moves,
    ...(start.moves === null ? {} : { goFd: start.moves.goFd }),
    onFailure: (failure) => report({ type: "failure", failure }),
    onRecovered: (failure) => report({ type: "recovered", failure }),
    onMoved: () => report({ type: "moved" }),
  });
  report({ type: "serving" });
  try {
    return loop.run();
  } finally {
    loop.close();
    moves?.close();
  }
}
