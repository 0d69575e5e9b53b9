/**
 * How a load is served, kept in its state: a fsl that goes on with it (after a kill, say, of a load
 * that was to leave the disk to others) does so in the same way, unless its caller says otherwise.
 */
import type { EagerOptions, OnError, ServingOptions } from "./serving.ts";

type Recorded = Pick<ServingOptions, "eager" | "clusterPages" | "onError" | "errorLimitMs">;

/** JSON. */
export function recordServing(options: ServingOptions): Recorded {
  const { eager, clusterPages, onError, errorLimitMs } = options;
  return withoutUndefined({ eager, clusterPages, onError, errorLimitMs });
}

/**
 * What the caller says, and for the rest what was recorded.
 * @param value what `recordServing` has made; what does not look like that is left out
 */
export function withRecorded<T extends ServingOptions>(options: T, value: unknown): T {
  const { eager, clusterPages, onError, errorLimitMs } = (value ?? {}) as Record<string, unknown>;
  const { workers, pieceLength, bytesPerSecond, nice } = (eager ?? {}) as Record<string, unknown>;
  const recordedEager: EagerOptions = withoutUndefined({
    workers: count(workers),
    pieceLength: count(pieceLength),
    bytesPerSecond: count(bytesPerSecond),
    nice: count(nice),
  });
  const recorded: Recorded = withoutUndefined({
    clusterPages: count(clusterPages),
    onError: ON_ERROR.find((known) => known === onError),
    errorLimitMs: count(errorLimitMs),
  });
  return { ...recorded, ...options, eager: { ...recordedEager, ...options.eager } };
}

const ON_ERROR: readonly OnError[] = ["wait", "poison", "kill"];

function count(value: unknown): number | undefined {
  return Number.isSafeInteger(value) && (value as number) >= 0 ? (value as number) : undefined;
}

type Defined<T> = { [K in keyof T]: Exclude<T[K], undefined> };

function withoutUndefined<T extends object>(value: T): Partial<Defined<T>> {
  const entries = Object.entries(value).filter(([, each]) => each !== undefined);
  return Object.fromEntries(entries) as Partial<Defined<T>>;
}
