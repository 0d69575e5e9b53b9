/**
 * One line on stderr while RAM comes in: redrawn on a terminal, a plain line a second elsewhere.
 */
import type { LoadProgress } from "../index.ts";
import { formatBytes, formatMs } from "./format.ts";

const PERIOD_MS = 100;
/** Where it cannot be redrawn, only each so-many-th is shown. */
const PLAIN_EVERY = 10;
const ERASE = "\r\u001b[K";

export interface ProgressLine {
  /** Draws no more; leaves the terminal's line clean. */
  end(): void;
}

export function startProgress(read: () => LoadProgress): ProgressLine {
  const startedAtMs = performance.now();
  const first = read().loadedBytes;
  let draws = 0;
  let isTerminal = false;
  const draw = (): void => {
    draws += 1;
    // Looked at late: the standard streams take 12 ms to set up, just when the guest begins to run.
    isTerminal = process.stderr.isTTY === true;
    if (!isTerminal && draws % PLAIN_EVERY !== 0) return;
    const { dataBytes, loadedBytes, faults, failedPages } = read();
    const seconds = (performance.now() - startedAtMs) / 1000;
    const rate = seconds > 0 ? (loadedBytes - first) / seconds : 0;
    const percent = dataBytes === 0 ? 100 : Math.floor((loadedBytes / dataBytes) * 100);
    const failed = failedPages > 0 ? `, ${failedPages} pages cannot be read` : "";
    const text =
      `fsl: ${percent}% of ${formatBytes(dataBytes)}, ${formatBytes(rate)}/s, ` +
      `${faults} faults, ${formatMs(seconds * 1000)}${failed}`;
    process.stderr.write(isTerminal ? `${ERASE}${text}` : `${text}\n`);
  };
  const timer = setInterval(draw, PERIOD_MS);
  return {
    end() {
      clearInterval(timer);
      if (isTerminal) process.stderr.write(ERASE);
    },
  };
}
