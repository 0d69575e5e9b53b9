import { describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { givesHugePages, keepsPageTables } from "../../src/sys/host-pages.ts";

describe("keepsPageTables", () => {
  test.each([
    ["6.1.0-49-cloud-amd64", "x86_64", true],
    ["6.13.12", "x86_64", true],
    ["6.14.0-37-generic\n", "x86_64", false],
    ["6.18.44", "x86_64", false],
    ["7.0.0-rc1", "x86_64", false],
    ["5.15.200", "x86_64", true],
    ["6.18.44", "aarch64", true],
    ["", "x86_64", true],
  ])("Linux %j on %s: %p", (release, architecture, expected) => {
    expect(keepsPageTables(release, architecture)).toBe(expected);
  });
});

describe("givesHugePages", () => {
  test.each([
    ["always [madvise] never\n", true],
    ["[always] madvise never\n", true],
    ["always madvise [never]\n", false],
  ])("%j: %p", (text, expected) => {
    const directory = mkdtempSync(join(tmpdir(), "fsl-pages-"));
    try {
      const path = join(directory, "enabled");
      writeFileSync(path, text);
      expect(givesHugePages(path)).toBe(expected);
    } finally {
      rmSync(directory, { recursive: true });
    }
  });

  test("a kernel without them", () => {
    expect(givesHugePages("/proc/none")).toBe(false);
  });
});
