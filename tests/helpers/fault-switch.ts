/** Loads whose page source goes wrong as long as the test wants it to (fault-source.ts). */
import { mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { FaultOptions } from "./fault-runs.ts";
import type { FaultySourceOptions } from "./fault-source.ts";

/** The page source. A fsl that goes on with such a load is to be told, or runs no such code. */
export const FAULTY_SOURCE = join(import.meta.dir, "fault-source.ts");

/** The file that makes the page source go wrong as long as it exists. */
export class Switch implements Disposable {
  readonly directory = mkdtempSync(join(tmpdir(), "fsl-fault-switch-"));
  readonly path = join(this.directory, "on");
  constructor() {
    writeFileSync(this.path, "");
  }
  get times(): number {
    return statSync(this.path).size;
  }
  off(): void {
    rmSync(this.path, { force: true });
  }
  [Symbol.dispose](): void {
    rmSync(this.directory, { recursive: true, force: true });
  }
}

export type How = Omit<FaultySourceOptions, "path" | "switchPath">;

/** Options of a `FaultRun` whose page source goes wrong as long as the switch is on. */
export function faultyProgram(on: Switch, how: How): Pick<FaultOptions, "program"> {
  const options = JSON.stringify({ ...how, switchPath: on.path });
  return { program: [process.execPath, join(import.meta.dir, "fault-load.ts"), options] };
}
