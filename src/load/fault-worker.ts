/** Worker entry point: the fault loop. */
import { rehearseFaults } from "./rehearsal.ts";
import { FaultLoop } from "./fault-loop.ts";
import type { FaultWorkerStart } from "./protocol.ts";
import { serveWorker } from "./worker.ts";

serveWorker<FaultWorkerStart>((start, { state, uffd, source, counters, movers, report }) => {
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
    onFailure: (failure) => report({ type: "failure", failure }),
    onRecovered: (failure) => report({ type: "recovered", failure }),
  });
  report({ type: "serving" });
  try {
    return loop.run();
  } finally {
    loop.close();
  }
}, rehearseFaults);
