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
  const first = read()?.loadedBytes ?? 0;
  let draws = 0;
  const draw = (): void => {
    draws += 1;
    if (!isWatched() && draws % PLAIN_EVERY !== 0) return;
    const text = describe(read(), first, performance.now() - startedAtMs);
    remark(isWatched() ? `${ERASE}${text}` : `${text}\n`);
  };
  const timer = setInterval(draw, PERIOD_MS);
  return {
    end() {
      clearInterval(timer);
      if (draws > 0 && isWatched()) remark(ERASE);
    },
  };
}

function describe(progress: Progress | null, first: number, ms: number): string {
  if (progress === null) return `fsl: waiting for QEMU, ${formatMs(ms)}`;
  const { dataBytes, loadedBytes, faults, failedPages = 0 } = progress;
  const rate = ms > 0 ? ((loadedBytes - first) / ms) * 1000 : 0;
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
