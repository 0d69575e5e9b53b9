/** The crew of a load, with Workers that do what the test says. */
import { afterEach, beforeEach, expect, test } from "bun:test";
import type { FaultWorkerStart, WorkerReport } from "../../src/load/protocol.ts";
import { Crew, type CrewEvents } from "../../src/load/workers.ts";

/** In place of the runtime's own; the last one is the last that was hired. */
class FakeWorker extends EventTarget {
  static hired: FakeWorker[] = [];
  onmessage: ((event: { data: WorkerReport }) => void) | null = null;
  onerror: ((event: { message: string }) => void) | null = null;
  readonly told: unknown[] = [];
  constructor() {
    super();
    FakeWorker.hired.push(this);
  }
  postMessage(message: unknown): void {
    this.told.push(message);
    this.onmessage?.({ data: { type: "serving" } });
  }
  terminate(): void {}
  load(): void {
    this.onmessage?.({ data: { type: "loaded" } });
  }
  fail(): void {
    this.onerror?.({ message: "by the test" });
  }
}

const ownWorker = globalThis.Worker;
beforeEach(() => {
  FakeWorker.hired = [];
  globalThis.Worker = FakeWorker as unknown as typeof Worker;
});
afterEach(() => {
  globalThis.Worker = ownWorker;
});

const START = { role: "fault", workerIndex: 0, helpers: [], moves: null } as unknown;

/** The last Worker that was hired. */
function last(): FakeWorker {
  const worker = FakeWorker.hired.at(-1);
  if (worker === undefined) throw new Error("no Worker was hired");
  return worker;
}

/** A crew, and what it tells. */
function crewOf(): [Crew, string[]] {
  const told: string[] = [];
  const events: CrewEvents = {
    onFailure: () => told.push("failure"),
    onRecovered: () => told.push("recovered"),
    onWorkerLost: (_role, error, replaced) => told.push(`${error.message}: ${replaced}`),
    beforeReplacement: () => told.push("before"),
    afterReplacement: () => told.push("after"),
  };
  const crew = new Crew();
  crew.listen(events);
  return [crew, told];
}

test("a Worker that fails before it has work is no error: another one gets the work", async () => {
  const [crew, told] = crewOf();
  last().fail();
  // Were it told of by a rejection, nobody would have taken it by now.
  await Bun.sleep(1);
  expect(FakeWorker.hired).toHaveLength(1);
  const serving = crew.serveFaults(START as FaultWorkerStart);
  expect(FakeWorker.hired).toHaveLength(2);
  last().load();
  await serving;
  expect(last().told).toEqual([START]);
  expect(told).toEqual([]);
});

test("a Worker that fails with its work before it has loaded is replaced", async () => {
  const [crew, told] = crewOf();
  const serving = crew.serveFaults(START as FaultWorkerStart);
  last().fail();
  last().load();
  await serving;
  expect(FakeWorker.hired.map((worker) => worker.told.length)).toEqual([0, 1]);
  expect(told).toEqual(["fault Worker: by the test: true", "before", "after"]);
});

test("one that cannot be started at all is given up, and whoever waits for it is told", async () => {
  const [crew, told] = crewOf();
  last().fail();
  const serving = crew.serveFaults(START as FaultWorkerStart);
  for (let times = 1; times <= 9; times += 1) last().fail();
  await expect(serving).rejects.toMatchObject({
    code: "INTERNAL",
    message: "fault Worker failed: fault Worker: by the test",
  });
  expect(told.at(-1)).toBe("fault Worker: by the test: false");
  expect(FakeWorker.hired).toHaveLength(10);
  await expect(crew.faultLoopEnded).rejects.toMatchObject({ code: "INTERNAL" });
});
