/**
 * The crew of a load: one fault Worker and the eager Workers, started early, given their work
 * later, watched until they end. A Worker that dies is replaced: what it had read lives in the load
 * state, and waking the ranges makes every waiting thread fault again. Runs on the main thread.
 */
import { FslError } from "../errors.ts";
import { releaseProgramText } from "../sys/program-text.ts";
import { startWorker } from "../sys/worker.ts";
import type {
  EagerWorkerStart,
  FaultWorkerStart,
  FillFailure,
  FillStart,
  WorkerReport,
  WorkerStart,
} from "./protocol.ts";
import type { PageFailure } from "./fault-loop.ts";

/** A Worker that fails again and again has a reason that restarting does not mend. */
const REPLACEMENTS_MAX = 8;

export interface CrewEvents {
  /** A page cannot be read; its vCPU waits if `demanded`. */
  onFailure(failure: PageFailure, demanded: boolean): void;
  onRecovered(failure: PageFailure): void;
  /** A Worker has died; `replaced` says whether another one has taken over. */
  onWorkerLost(role: "fault" | "eager", error: Error, replaced: boolean): void;
  /** Called with the dead Worker gone and before its replacement starts; with what the dead one was told. */
  beforeReplacement(start: WorkerStart): void;
  /** Called when the replacement serves: ranges are to be woken. */
  afterReplacement(start: WorkerStart): void;
}

type Role = "fault" | "eager";
export type CrewEnd = "stopped" | "gone" | "finished";
/** What became of a Worker's part of a fill: null = it is done, lost = the Worker has died. */
export type FillEnd = FillFailure | null | "lost";

/** One place in the crew: the Worker that holds it may change. */
class Post {
  readonly role: Role;
  /** Null until somebody listens: nothing has been begun then. */
  events: CrewEvents | null = null;
  #worker: Worker;
  #loaded: Promise<void>;
  #start: WorkerStart | undefined;
  #replacements = 0;
  #over = false;
  /** The Worker was lost when it had no work. */
  #isVacant = false;
  #serving = unheeded<void>();
  #ended = unheeded<CrewEnd>();
  #moved = Promise.withResolvers<boolean>();
  #filled = Promise.withResolvers<FillEnd>();

  constructor(role: Role) {
    this.role = role;
    [this.#worker, this.#loaded] = this.#hire();
  }

  /** Hands out the work, also again after it has ended. @returns when the Worker serves */
  async begin(start: WorkerStart): Promise<void> {
    this.#serving = unheeded();
    this.#ended = unheeded();
    this.#start = start;
    this.#handOut(start);
    await this.#serving.promise;
  }

  /** Has memory written, before any `begin`. */
  fill(start: FillStart): Promise<FillEnd> {
    this.#filled = Promise.withResolvers();
    this.#handOut(start);
    return this.#filled.promise;
  }

  /** Resolves when the loop that was begun last has ended. */
  get ended(): Promise<CrewEnd> {
    return this.#ended.promise;
  }

  /**
   * Resolves when the fault loop's part of the eager load is over: true when its helpers can be used by
   * others; false when its Worker was lost, and they with it.
   */
  moved(): Promise<boolean> {
    this.#moved = Promise.withResolvers();
    // One that took over has no helpers.
    if (this.#start?.role !== "fault" || this.#start.moves === null) this.#moved.resolve(false);
    return this.#moved.promise;
  }

  /** Ends a Worker that has no work yet, or whose loop has ended. */
  dismiss(): void {
    this.#over = true;
    this.#worker.terminate();
  }

  #hire(): [Worker, Promise<void>] {
    const worker = startWorker(this.role === "fault" ? "fault-worker" : "eager-worker");
    const loaded = Promise.withResolvers<void>();
    loaded.promise.catch(() => {});
    let lost = false;
    const lose = (error: Error): void => {
      if (lost || this.#over) return;
      lost = true;
      loaded.reject(error);
      worker.terminate();
      this.#replace(error);
    };
    worker.onmessage = (event: MessageEvent<WorkerReport>) => {
      if (lost) return;
      const message = event.data;
      if (message.type === "loaded") {
        releaseProgramText();
        loaded.resolve();
      } else if (message.type === "error") lose(workerError(message));
      else this.#take(message);
    };
    worker.onerror = (event) => lose(new Error(`${this.role} Worker: ${event.message}`));
    worker.addEventListener("close", () =>
      lose(new Error(`${this.role} Worker ended unexpectedly`)),
    );
    return [worker, loaded.promise];
  }

  #take(message: WorkerReport): void {
    switch (message.type) {
      case "serving":
        this.#serving.resolve();
        if (this.#replacements > 0 && this.#start) this.events?.afterReplacement(this.#start);
        return;
      case "failure":
        this.events?.onFailure(message.failure, this.role === "fault");
        return;
      case "recovered":
        this.events?.onRecovered(message.failure);
        return;
      case "moved":
        // What is in hand from here on is not the fault loop's: its death abandons nothing of it.
        if (this.#start?.role === "fault") this.#start = { ...this.#start, moves: null };
        this.#moved.resolve(true);
        return;
      case "filled":
        this.#filled.resolve(message.failure);
        return;
      case "ended":
        this.#moved.resolve(false);
        this.#start = undefined;
        this.#ended.resolve(message.end);
        return;
      default:
        return;
    }
  }

  #handOut(start: WorkerStart | FillStart): void {
    if (this.#isVacant) [this.#worker, this.#loaded] = this.#hire();
    this.#isVacant = false;
    const worker = this.#worker;
    this.#loaded.then(
      () => worker.postMessage(start),
      () => {},
    );
  }

  #replace(error: Error): void {
    this.#moved.resolve(false);
    this.#filled.resolve("lost");
    if (this.#start === undefined) {
      this.#isVacant = true;
      return;
    }
    this.#replacements += 1;
    const replaced = this.#replacements <= REPLACEMENTS_MAX;
    this.events?.onWorkerLost(this.role, error, replaced);
    if (!replaced) {
      const failure = new FslError(
        "INTERNAL",
        `${this.role} Worker failed: ${error.message}`,
        {},
        error,
      );
      this.#serving.reject(failure);
      this.#ended.reject(failure);
      return;
    }
    this.events?.beforeReplacement(this.#start);
    // Its helpers may be in the middle of an answer to the dead Worker.
    const start = withoutHelpers(this.#start);
    this.#start = start;
    [this.#worker, this.#loaded] = this.#hire();
    this.#handOut(start);
  }
}

export class Crew {
  readonly #fault = new Post("fault");
  readonly #eager: Post[] = [];
  #events: CrewEvents | null = null;

  /** Starts eager Workers until there are so many; they get their work later. */
  hireEager(count: number): void {
    while (this.#eager.length < count) {
      const post = new Post("eager");
      post.events = this.#events;
      this.#eager.push(post);
    }
  }

  listen(events: CrewEvents): void {
    this.#events = events;
    for (const post of [this.#fault, ...this.#eager]) post.events = events;
  }

  /** @returns when faults are served */
  async serveFaults(start: FaultWorkerStart): Promise<void> {
    await this.#fault.begin(start);
  }

  /** As `Post.moved`: to be called before the fault loop is told to begin. */
  moved(): Promise<boolean> {
    return this.#fault.moved();
  }

  /** Has memory written by so many eager Workers. @returns when all of them have ended */
  fill(start: FillStart, count: number): Promise<FillEnd[]> {
    this.hireEager(count);
    return Promise.all(this.#eager.slice(0, count).map((post) => post.fill(start)));
  }

  /**
   * Sets the eager Workers to work. @returns when all of them have ended: the worst of their ends
   */
  async loadEagerly(starts: readonly EagerWorkerStart[]): Promise<CrewEnd> {
    this.hireEager(starts.length);
    const ends = starts.map(async (start, index) => {
      const post = this.#eager[index];
      if (post === undefined) throw new FslError("INTERNAL", `no eager Worker ${index}`);
      await post.begin(start);
      return post.ended;
    });
    const all = await Promise.all(ends);
    return all.find((end) => end !== "finished") ?? "finished";
  }

  /** Resolves when the fault loop has ended. */
  get faultLoopEnded(): Promise<CrewEnd> {
    return this.#fault.ended;
  }

  /** Ends every Worker. The loops must have been told to stop before. */
  dismiss(): void {
    this.#fault.dismiss();
    for (const post of this.#eager) post.dismiss();
  }
}

/** Whoever wants to know awaits; a rejection that nobody awaits was told by `onWorkerLost`. */
function unheeded<T>(): PromiseWithResolvers<T> {
  const resolvers = Promise.withResolvers<T>();
  resolvers.promise.catch(() => {});
  return resolvers;
}

function withoutHelpers(start: WorkerStart): WorkerStart {
  return start.role === "fault"
    ? { ...start, helpers: [], moves: null }
    : { ...start, helpers: [] };
}

function workerError(message: { message: string; stack: string }): Error {
  const error = new Error(message.message);
  error.stack = message.stack;
  return error;
}
