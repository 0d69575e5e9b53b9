/**
 * What the main thread and its Workers say to one another. The Workers' loops are synchronous:
 * control goes through the load state and an eventfd, these messages only start a Worker and report
 * from it.
 */
import type { ErrorCode, ErrorDetails } from "../errors.ts";
import type { HelperRecord } from "../sys/helper-task.ts";
import type { PageSourceSpec } from "../source/page-source.ts";
import type { PageFailure } from "./fault-loop.ts";
import type { FillJob } from "./fill.ts";
import type { PageReaderOptions } from "./page-reader.ts";
import type { StateHandle } from "./state.ts";

interface WorkerStartBase {
  readonly handle: StateHandle;
  readonly source: PageSourceSpec;
  readonly uffdFd: number;
  /** Which counters area of the load state is this Worker's. */
  readonly workerIndex: number;
  /** Helpers in the target that bring whole chunks for this Worker; none: every page is copied. */
  readonly helpers: readonly HelperRecord[];
  /** Descriptor of the snapshot file, for the helpers. */
  readonly fileFd: number;
}

export interface FaultWorkerStart extends WorkerStartBase {
  readonly role: "fault";
  readonly stopFd: number;
  readonly pidfd: number;
  readonly clusterPages: number;
  /** Helpers of the eager load. */
  readonly helperPids: readonly number[];
  /** Runs that the guest will ask for, as in `EagerWorkerStart`. */
  readonly replay: Int32Array;
  /** Null: the eager load is all the eager Workers'. */
  readonly moves: EagerMovesStart | null;
}

/** The eager load by the fault loop, see eager-moves.ts. */
export interface EagerMovesStart {
  /** Helpers that bring whole chunks; nobody uses them before they are allowed to. */
  readonly helpers: readonly HelperRecord[];
  /** eventfd that begins it; its value has a bit for each helper that may be used. */
  readonly goFd: number;
  readonly pieceLength: number;
  /** Plan-wide chunk numbers. */
  readonly order: Uint32Array;
  readonly replay: Int32Array;
  /** Of the helpers. */
  readonly nice: number;
}

export interface EagerWorkerStart extends WorkerStartBase {
  readonly role: "eager";
  readonly pieceLength: number;
  readonly order: Uint32Array;
  /**
   * Runs to bring in first: block index, first page, pages (0: the whole chunk); three numbers each.
   */
  readonly replay: Int32Array;
  readonly bytesPerSecond: number;
  /** Bytes that the Worker may have asked its source for and not got yet. */
  readonly pendingMax: number;
  /** Of the Worker and its helpers, see priority.ts; 0..19, higher leaves more to others; see setpriority(2). */
  readonly nice: number;
}

export type WorkerStart = FaultWorkerStart | EagerWorkerStart;

/** What an eager Worker does before the guest runs, see fill.ts; several share it. */
export interface FillStart {
  readonly role: "fill";
  readonly pid: number;
  readonly jobs: readonly FillJob[];
  readonly reader: Omit<PageReaderOptions, "mayRead">;
  /** Shared. */
  readonly control: Int32Array;
}

/** What an FslError has. */
export interface FillFailure {
  readonly code: ErrorCode;
  readonly message: string;
  readonly details: ErrorDetails;
}

export type WorkerReport =
  | { readonly type: "loaded" }
  | { readonly type: "serving" }
  /** What can be moved has been; all else is left to eager Workers. */
  | { readonly type: "moved" }
  | { readonly type: "failure"; readonly failure: PageFailure }
  | { readonly type: "recovered"; readonly failure: PageFailure }
  | { readonly type: "filled"; readonly failure: FillFailure | null }
  | { readonly type: "ended"; readonly end: "stopped" | "gone" | "finished" }
  | { readonly type: "error"; readonly message: string; readonly stack: string };
