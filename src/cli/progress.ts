/**
 * One line on stderr while RAM comes in, or is saved: redrawn on a terminal, a plain line a second
 * elsewhere.
 */
import { formatBytes, formatMs } from "./format.ts";
import { isWatched, remark } from "./log.ts";

const PERIOD_MS = 100;
/** Where it cannot be redrawn, only each so-many-th is shown. */
const PLAIN_EVERY = 10;
const ERASE = "\r\u001b[K";

/** What is shown; `LoadProgress` is one. */
export interface Progress {
  readonly dataBytes: number;
  readonly loadedBytes: number;
  /** Left out where there are none: while a guest is saved. */
  readonly faults?: number;
  readonly failedPages?: number;
}

export interface ProgressLine {
  /** Draws no more; leaves the terminal's line clean. */
  end(): void;
}

/** @param read null: nothing is known yet, QEMU has not answered */
export function startProgress(read: () => Progress | null): ProgressLine {
  const startedAtMs = performance.now();
  let base: { readonly atMs: number; readonly bytes: number } | undefined;
  let ticks = 0;
  const draw = (): void => {
    ticks += 1;
    if (base !== undefined && !isWatched() && ticks % PLAIN_EVERY !== 0) return;
    const progress = read();
    const nowMs = performance.now();
    if (base === undefined) {
      // Not at the start: that is when the guest takes its first steps, and this takes CPU time.
      base = { atMs: nowMs, bytes: progress?.loadedBytes ?? 0 };
      return;
    }
    const rate = ((progress?.loadedBytes ?? 0) - base.bytes) / ((nowMs - base.atMs) / 1000);
    const text = describe(progress, rate, nowMs - startedAtMs);
    remark(isWatched() ? `${ERASE}${text}` : `${text}\n`);
  };
  const timer = setInterval(draw, PERIOD_MS);
  return {
    end() {
      clearInterval(timer);
      if (ticks > 1 && isWatched()) remark(ERASE);
    },
  };
}

/** @param rate bytes per second @param ms since it began */
function describe(progress: Progress | null, rate: number, ms: number): string {
  if (progress === null) return `fsl: waiting for QEMU, ${formatMs(ms)}`;
  const { dataBytes, loadedBytes, faults, failedPages = 0 } = progress;
  const percent = dataBytes === 0 ? 100 : Math.floor((loadedBytes / dataBytes) * 100);
  const parts = [
    `fsl: ${percent}% of ${formatBytes(dataBytes)}`,
    `${formatBytes(rate)}/s`,
    ...(faults === undefined ? [] : [`${faults} faults`]),
    formatMs(ms),
    ...(failedPages === 0 ? [] : [`${failedPages} pages cannot be read`]),
  ];
  return parts.join(", ");
}
