import { describe, expect, test } from "bun:test";
import { exportProblems, layerProblems } from "../../scripts/check.ts";

describe("check.layerProblems", () => {
  test.each([
    ["the join may use its parts", "src/load/a.ts", 'import { x } from "../vmm/b.ts";'],
    ["a neighbour", "src/vmm/a.ts", 'import { x } from "./b.ts";'],
    ["a package", "src/cli/a.ts", 'import { x } from "citty";'],
    ["types of the snapshot", "src/source/a.ts", 'import type { X } from "../snapshot/b.ts";'],
    ["what is generated", "src/sys/a.ts", 'import x from "../../build/b.json";'],
  ])("allows: %s", (_, path, text) => {
    expect(layerProblems(path, text)).toEqual([]);
  });

  test.each([
    ["parts of each other", "src/vmm/a.ts", 'import { x } from "../uffd/b.ts";'],
    ["the snapshot the kernel", "src/snapshot/a.ts", 'import { x } from "../sys/b.ts";'],
    ["values of the snapshot", "src/source/a.ts", 'import { x } from "../snapshot/b.ts";'],
    ["the command line past the index", "src/cli/a.ts", 'import { x } from "../load/b.ts";'],
    ["a re-export", "src/uffd/a.ts", 'export { x } from "../load/b.ts";'],
    ["on several lines", "src/uffd/a.ts", 'import {\n  x,\n} from "../load/b.ts";'],
    ["a dynamic import", "src/uffd/a.ts", 'const x = await import("../load/b.ts");'],
    ["an unknown layer", "src/new/a.ts", ""],
  ])("refuses: %s", (_, path, text) => {
    expect(layerProblems(path, text)).toHaveLength(1);
  });
});

describe("check.exportProblems", () => {
  const file = (path: string, text: string) => ({ path, text, lines: text.split("\n") });
  const made = file("src/vmm/a.ts", "export const x = 1;\nexport interface Y {}\nconst z: Y = {};");

  test.each([
    ["an import", 'import { x } from "../vmm/a.ts";'],
    ["a re-export", 'export { type Z, x } from "../vmm/a.ts";'],
    ["a namespace", 'import * as a from "../vmm/a.ts";\na.x;'],
    ["a dynamic import", 'const { x } = await import("../vmm/a.ts");'],
  ])("finds a use: %s", (_, text) => {
    expect(exportProblems([made], [made, file("src/load/b.ts", text)])).toEqual([]);
  });

  test("tells what nobody imports", () => {
    const other = file("src/load/b.ts", "const x = 2; // x");
    expect(exportProblems([made], [made, other])).toEqual([
      "src/vmm/a.ts: nobody imports x: delete it",
    ]);
  });
});
