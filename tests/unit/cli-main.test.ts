/** What stands before the commands: --version, --help, help; and messages that are one line. */
import { expect, test } from "bun:test";
import { join } from "node:path";

const MAIN = join(import.meta.dir, "../../src/cli/main.ts");

async function run(...args: string[]): Promise<{ code: number; out: string; err: string }> {
  const child = Bun.spawn([process.execPath, MAIN, ...args], { stdout: "pipe", stderr: "pipe" });
  const [out, err, code] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  return { code, out, err };
}

test.each([
  [["--version", "foo"], "unexpected argument 'foo'"],
  [["-V", "--"], "unexpected argument '--'"],
  [["--help", "foo"], "unexpected argument 'foo'"],
  [["help", "foo"], "unknown command 'foo', expected one of load, "],
  [["help", "load", "foo"], "unexpected argument 'foo'"],
])("%j is refused", async (args, message) => {
  const { code, out, err } = await run(...args);
  expect([code, out]).toEqual([2, ""]);
  expect(err).toStartWith(`fsl: ${message}`);
});

test("help of a command is what the command says of itself", async () => {
  const [help, own] = [await run("help", "load"), await run("load", "--help")];
  expect(help).toEqual(own);
  expect(help.code).toBe(0);
});

test("a value that looks like a flag is refused in one line", async () => {
  const { code, err } = await run("load", "x.snap", "--eager-rate", "-3", "--", "qemu");
  expect(code).toBe(2);
  expect(err).not.toContain("\\x0a");
  expect(err.split("\n")[0]).toMatch(/^fsl: Option '--eager-rate'.* is ambiguous\. Did .*XYZ'$/);
});
