/** What fsl says, on whatever stderr is, and however that ends. */
import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { closeSync, existsSync, mkdtempSync, openSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { until } from "../helpers/kernel-target.ts";

const PROGRAM = join(import.meta.dir, "../helpers/remarks.ts");
const TIMEOUT_MS = 20_000;
const WAIT_MS = 10_000;

let directory: string;
let path: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "fsl-log-"));
  path = join(directory, "result");
});
afterEach(() => rmSync(directory, { recursive: true }));

const begun = (): Promise<true> =>
  until(() => existsSync(`${path}.begun`) || null, WAIT_MS, "the first words");
const command = (): string[] => [process.execPath, PROGRAM, path];

/** @param stderr a descriptor of this process, closed when the program has one of its own */
async function runOn(stderr: number): Promise<string> {
  const child = Bun.spawn(command(), { stdio: ["ignore", "ignore", stderr] });
  closeSync(stderr);
  expect(await child.exited).toBe(0);
  return readFileSync(path, "utf8");
}

describe("cli/log", () => {
  test(
    "is plain lines in a pipe",
    async () => {
      const child = Bun.spawn(command(), { stdio: ["ignore", "ignore", "pipe"] });
      const text = await new Response(child.stderr).text();
      expect(await child.exited).toBe(0);
      const lines = Array.from({ length: 50 }, (_, n) => `a line\n[info] message \`${n}\`\n`);
      expect(text).toBe(lines.join(""));
      expect(readFileSync(path, "utf8")).toBe("a log");
    },
    TIMEOUT_MS,
  );

  test.each(["/dev/null", "/dev/full"])(
    "%s is no terminal, and what cannot be written is lost",
    async (device) => {
      expect(await runOn(openSync(device, "w"))).toBe("a log");
    },
    TIMEOUT_MS,
  );

  test(
    "a reader that goes away ends nothing",
    async () => {
      const child = Bun.spawn(command(), { stdio: ["ignore", "ignore", "pipe"] });
      await begun();
      await child.stderr.cancel();
      expect(await child.exited).toBe(0);
    },
    TIMEOUT_MS,
  );

  test(
    "on a terminal it is consola's, and one that is closed ends nothing",
    async () => {
      // Without a controlling terminal: a SIGHUP is another matter.
      const inner = ["setsid", "--wait", ...command()].join(" ");
      const child = Bun.spawn(["script", "-qfc", inner, join(directory, "typescript")], {
        stdio: ["ignore", "ignore", "ignore"],
      });
      await begun();
      child.kill("SIGKILL");
      await child.exited;
      await until(() => existsSync(path) || null, WAIT_MS, "the end of the program");
      expect(readFileSync(path, "utf8")).toBe("a terminal");
      const text = readFileSync(join(directory, "typescript"), "utf8");
      expect(Bun.stripANSI(text)).toMatch(/a line\r\n.*message `?0/);
    },
    TIMEOUT_MS,
  );
});
