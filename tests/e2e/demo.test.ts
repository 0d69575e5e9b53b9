/**
 * `npm run demo -- --json`, without its setup: what others may rely on in its last line. How the
 * times compare depends on the host and is not tested here.
 */
import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { qemuVersion, whyNoGuests } from "../helpers/guests.ts";
import { plainEnvironment, whyNoExecutable } from "../helpers/load-runs.ts";

const ROOT = join(import.meta.dir, "../..");
/** It takes half a minute on an idle host, most of it for starting guests. */
const TIMEOUT_MS = 180_000;
const TIMES = ["resumeMs", "firstOutputMs", "residentMs"];
const PAGES = ["faultPages", "eagerPages"];

type Load = Readonly<Record<string, unknown>>;

interface LastLine {
  readonly copy: Load;
  readonly fsl: Load;
  readonly guest: Load;
  readonly qemu: unknown;
}

/** Those of the names whose values are no number above 0. */
function withoutFigure(load: Load, names: readonly string[]): string[] {
  return names.filter((name) => {
    const value = load[name];
    return typeof value !== "number" || !Number.isFinite(value) || value <= 0;
  });
}

describe.skipIf((whyNoExecutable() ?? whyNoGuests()) !== null)("the demo", () => {
  test(
    "ends with one JSON line: both loads with their times, and the guest's checksum is right",
    async () => {
      const script = [process.execPath, "scripts/demo.ts", "--json", "--rounds", "1"];
      const child = Bun.spawn(script, {
        cwd: ROOT,
        env: plainEnvironment(),
        stdin: "ignore",
        stdout: "pipe",
        stderr: "pipe",
        timeout: TIMEOUT_MS - 10_000,
      });
      const [stdout, stderr, code] = await Promise.all([
        new Response(child.stdout).text(),
        new Response(child.stderr).text(),
        child.exited,
      ]);
      expect({ code, stderr }).toEqual({ code: 0, stderr: expect.any(String) });
      const { copy, fsl, guest, qemu } = JSON.parse(
        stdout.trimEnd().split("\n").at(-1) ?? "",
      ) as LastLine;
      expect([copy["checksum"], fsl["checksum"]]).toEqual(["ok", "ok"]);
      expect(withoutFigure(copy, TIMES)).toEqual([]);
      expect(withoutFigure(fsl, [...TIMES, ...PAGES])).toEqual([]);
      expect(withoutFigure(guest, ["memoryMiB", "dataMiB"])).toEqual([]);
      expect(qemu).toBe(await qemuVersion());
      // A guest's first output cannot come before it runs.
      expect(Number(fsl["firstOutputMs"])).toBeGreaterThanOrEqual(Number(fsl["resumeMs"]));
    },
    TIMEOUT_MS,
  );
});
