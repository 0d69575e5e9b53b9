import { describe, expect, test } from "bun:test";
import { loadSnapshot } from "../../src/index.ts";
import type { Target } from "../../src/vmm/target.ts";

describe("loader.loadSnapshot", () => {
  test("refuses mode copy with a page source, which QEMU would not ask, and gives the target up", async () => {
    let abandoned = 0;
    const target = { abandon: async () => void (abandoned += 1) } as unknown as Target;
    const source = { module: "/source.ts", options: null };
    const load = loadSnapshot({ snapshot: "/vm.snap", target, mode: "copy", source });
    expect(await load.catch((error: unknown) => error)).toMatchObject({ code: "USAGE" });
    expect(abandoned).toBe(1);
  });
});
