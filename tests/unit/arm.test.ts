import { describe, expect, test } from "bun:test";
import { findZeroRuns, planRegistration, registerBlocks } from "../../src/load/arm.ts";
import { setRange } from "../../src/bits.ts";
import { PageBitmap } from "../../src/snapshot/page-bitmap.ts";
import { MiB } from "../../src/pages.ts";
import type { BlockPlan } from "../../src/load/plan.ts";
import { UFFDIO_COPY_BIT, UFFDIO_MOVE_BIT, UFFDIO_POISON_BIT } from "../../src/sys/abi.ts";
import type { Uffd } from "../../src/uffd/uffd.ts";
import { expectRefusal, refusalOf } from "../helpers/qemu-vmm.ts";

const PAGE = 4096;
const PAGES_2M = (2 * MiB) / PAGE;
/** Zero runs of the one block, and the block. */
function subject(runs: ReturnType<typeof findZeroRuns>, pageCount: number, hostAddr = BASE) {
  const block = { idstr: "ram", pageSize: PAGE, pageCount };
  return [new Map([["ram", runs]]), { block, region: { hostAddr, pageSize: PAGE } }] as const;
}

const BASE = 0x7f0000000000;

/** The zero runs of a block that has data in `runs`. */
function bitmap(pageCount: number, ...runs: [number, number][]) {
  const words = new Int32Array(Math.ceil(pageCount / 32));
  for (const [start, end] of runs) setRange(words, start, end);
  return findZeroRuns(new PageBitmap(new Uint8Array(words.buffer), pageCount), PAGE);
}

describe("arm.registerBlocks", () => {
  const COPY = 1n << UFFDIO_COPY_BIT;
  const MOVE = 1n << UFFDIO_MOVE_BIT;
  const POISON = 1n << UFFDIO_POISON_BIT;
  /** Registers a block of ordinary memory where the kernel answers so. */
  const register = (ioctls: bigint, isPoisoned: boolean): Set<string> => {
    const uffd = { register: () => ioctls } as unknown as Uffd;
    const block = { idstr: "ram", pageSize: PAGE, usedLength: 2 * MiB };
    const region = { hostAddr: BASE, pageSize: PAGE, backing: "anonymous", shared: false };
    return registerBlocks(uffd, [{ block, region } as unknown as BlockPlan], isPoisoned);
  };

  test.each([
    ["Linux 6.8 and later", COPY | MOVE | POISON, ["ram"]],
    ["before", COPY | POISON, []],
  ])("says what can be moved: %s", (_, ioctls, expected) => {
    expect([...register(ioctls, true)]).toEqual(expected);
  });

  test("no page is to be poisoned, and none can be", () => {
    expect([...register(COPY | MOVE, false)]).toEqual(["ram"]);
  });

  test("refuses --on-error poison before Linux 6.6", async () => {
    const refusal = await refusalOf(async () => register(COPY, true));
    expectRefusal(
      refusal,
      "HOST_UNSUPPORTED",
      /UFFDIO_POISON \(Linux 6\.6\).* use --on-error wait/,
    );
  });

  test("refuses memory that cannot be copied into", async () => {
    const refusal = await refusalOf(async () => register(MOVE, false));
    expectRefusal(refusal, "HOST_UNSUPPORTED", /cannot copy into anonymous memory/);
  });
});

describe("arm.planRegistration", () => {
  test("registers everything of a block full of data", () => {
    const plan = planRegistration(...subject(bitmap(1024, [0, 1024]), 1024));
    expect(plan).toEqual({ registered: [{ startAddr: BASE, endAddr: BASE + 4 * MiB }], zero: [] });
  });

  test("leaves out a zero extent between data", () => {
    const data = bitmap(4 * PAGES_2M, [0, 10], [3 * PAGES_2M + 5, 4 * PAGES_2M]);
    const plan = planRegistration(...subject(data, 4 * PAGES_2M));
    expect(plan.zero).toEqual([{ startAddr: BASE + 2 * MiB, endAddr: BASE + 6 * MiB }]);
    expect(plan.registered).toEqual([
      { startAddr: BASE, endAddr: BASE + 2 * MiB },
      { startAddr: BASE + 6 * MiB, endAddr: BASE + 8 * MiB },
    ]);
  });

  test("keeps a zero run that holds no whole 2 MiB registered", () => {
    const data = bitmap(3 * PAGES_2M, [0, 10], [2 * PAGES_2M - 1, 3 * PAGES_2M]);
    expect(planRegistration(...subject(data, 3 * PAGES_2M)).zero).toEqual([]);
  });

  test("leaves out a zero tail to the very end of the block", () => {
    const pages = 3 * PAGES_2M + 7;
    const plan = planRegistration(...subject(bitmap(pages, [0, 1]), pages));
    expect(plan.zero).toEqual([{ startAddr: BASE + 2 * MiB, endAddr: BASE + pages * PAGE }]);
  });

  test("cuts at seams of the address space, not of the block", () => {
    const base = BASE + 0x1000;
    const pages = 3 * PAGES_2M;
    const plan = planRegistration(...subject(bitmap(pages, [0, 1]), pages, base));
    expect(plan.zero[0]?.startAddr).toBe(BASE + 2 * MiB);
  });

  test("keeps the longest extents when there are too many", () => {
    const data = bitmap(
      8 * PAGES_2M,
      [0, 1],
      [2 * PAGES_2M, 2 * PAGES_2M + 1],
      [7 * PAGES_2M, 8 * PAGES_2M],
    );
    const plan = planRegistration(...subject(data, 8 * PAGES_2M), 1);
    expect(plan.zero).toEqual([{ startAddr: BASE + 6 * MiB, endAddr: BASE + 14 * MiB }]);
    expect(plan.registered).toHaveLength(2);
  });
});
