/** Results, on stdout: remarks and errors are on stderr (log.ts, main.ts). */
import { writeSync } from "node:fs";
import { FslError } from "../index.ts";

const STDOUT = 1;
/** A full pipe that somebody has made non-blocking is tried again after so long, ms. */
const RETRY_MS = 1;

/**
 * One or more lines. A reader that has gone (`| head -1`) wants no more.
 * @throws FslError USAGE when they cannot be written: whoever reads an empty file later would take it for the
 * result
 */
export function print(text: string): void {
  const bytes = Buffer.from(`${text}\n`);
  for (let at = 0; at < bytes.length;) {
    try {
      at += writeSync(STDOUT, bytes, at);
    } catch (error) {
      const errno = (error as NodeJS.ErrnoException).code ?? String(error);
      if (errno === "EPIPE") return;
      if (errno === "EAGAIN") {
        Bun.sleepSync(RETRY_MS);
        continue;
      }
      const message = `standard output cannot be written (${errno}): the result is lost`;
      throw new FslError("USAGE", message, { errno }, error);
    }
  }
}
