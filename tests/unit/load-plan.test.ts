import { describe, expect, test } from "bun:test";
import { FslError } from "../../src/errors.ts";
import { MiB } from "../../src/pages.ts";
import { type LoadPlan, planLoad } from "../../src/load/plan.ts";
import type { RAMBlock } from "../../src/snapshot/mapped-ram.ts";
import { PageBitmap } from "../../src/snapshot/page-bitmap.ts";
import type { Snapshot } from "../../src/snapshot/snapshot.ts";
import type { GuestRegion, TargetInfo } from "../../src/vmm/target.ts";

const PAGE = 4096;

interface BlockSpec {
  readonly idstr?: string;
  readonly MiB?: number;
  readonly bytes?: number;
  readonly pageSize?: number;
  readonly dataMiB?: number;
  readonly notSaved?: boolean;
}

function block(spec: BlockSpec): RAMBlock {
  const pageSize = spec.pageSize ?? PAGE;
  const usedLength = spec.bytes ?? (spec.MiB ?? 64) * MiB;
  return {
    idstr: spec.idstr ?? "pc.ram",
    usedLength,
    pageSize,
    pageCount: usedLength / pageSize,
    bitmapOffset: 0x1000,
    bitmapLength: 0,
    pagesOffset: 0x100000,
    recordOffset: 0,
    headerOffset: 0,
    notSaved: spec.notSaved ?? false,
    guestPhysicalAddr: null,
  };
}

function region(overrides: Partial<GuestRegion> = {}): GuestRegion {
  const length = overrides.length ?? 64 * MiB;
  return {
    idstr: "pc.ram",
    hostAddr: 0x7f0000000000,
    length,
    maxLength: length,
    pageSize: PAGE,
    readOnly: false,
    backing: "anonymous",
    shared: false,
    sharedWithOthers: false,
    ...overrides,
  };
}

interface PlanSpec {
  readonly blocks?: readonly BlockSpec[];
  readonly regions?: readonly GuestRegion[];
  readonly machine?: readonly [string, string | null];
  /** Of the snapshot, and of QEMU. */
  readonly vcpus?: readonly [number, number | null];
  readonly canDiscard?: boolean;
  readonly lazyDespiteDiscards?: boolean;
}

function plan(spec: PlanSpec): LoadPlan {
  const specs = spec.blocks ?? [{}];
  const blocks = specs.map(block);
  const [machineType, running] = spec.machine ?? ["pc-q35-10.0", "pc-q35-10.0"];
  const [saved, vcpus] = spec.vcpus ?? [1, 1];
  const sections = Array.from({ length: saved }, () => ({ name: "cpu_common" }));
  const snapshot = { path: "vm.snap", machineType, blocks, sections } as unknown as Snapshot;
  const info: TargetInfo = {
    readyAtMs: 0,
    version: "10.0.2",
    machineType: running,
    regions: spec.regions ?? [region()],
    canDiscard: spec.canDiscard ?? false,
    vcpus,
    startsStopped: false,
  };
  const bitmaps = new Map(
    blocks.map((b, index) => {
      const dataPages = Math.min(b.pageCount, ((specs[index]?.dataMiB ?? 16) * MiB) / b.pageSize);
      const bytes = new Uint8Array(Math.ceil(b.pageCount / 8) + 8).fill(0xff, 0, dataPages / 8);
      return [b.idstr, new PageBitmap(bytes, b.pageCount)];
    }),
  );
  return planLoad(snapshot, info, {
    bitmaps,
    lazyDespiteDiscards: spec.lazyDespiteDiscards ?? false,
  });
}

function refusal(spec: PlanSpec): FslError {
  try {
    plan(spec);
  } catch (error) {
    if (error instanceof FslError) return error;
    throw error;
  }
  throw new Error("was not refused");
}

const FITS_NOT = "QEMU does not fit the snapshot: ";
const other: PlanSpec = { blocks: [{}, { idstr: "vga.vram", MiB: 8 }] };

describe("plan.planLoad", () => {
  test.each([
    ["the snapshot does not tell", [0, 2]],
    ["QEMU does not tell", [2, null]],
  ] as const)("lets vCPUs be where %s", (_, vcpus) => {
    expect(plan({ vcpus }).blocks.map(({ way }) => way)).toEqual(["lazy"]);
  });

  test.each<[string, PlanSpec, string]>([
    [
      "more memory than the snapshot",
      { regions: [region({ length: 128 * MiB })] },
      "RAMBlock pc.ram: snapshot has 64 MiB, QEMU has 128 MiB; start QEMU with -m 64M",
    ],
    [
      "less memory than the snapshot",
      { regions: [region({ length: 32 * MiB })] },
      "RAMBlock pc.ram: snapshot has 64 MiB, QEMU has 32 MiB; start QEMU with -m 64M",
    ],
    [
      "another machine type",
      { machine: ["pc-q35-10.0", "pc-i440fx-10.0"] },
      "machine type: snapshot has pc-q35-10.0, QEMU runs pc-i440fx-10.0; start QEMU with -machine pc-q35-10.0",
    ],
    [
      "more vCPUs than the snapshot",
      { vcpus: [1, 2] },
      "vCPUs: snapshot has 1, QEMU has 2; start QEMU with -smp 1",
    ],
    [
      "fewer vCPUs than the snapshot",
      { vcpus: [4, 1] },
      "vCPUs: snapshot has 4, QEMU has 1; start QEMU with -smp 4",
    ],
    [
      "no such device's block",
      other,
      "RAMBlock vga.vram: in the snapshot, not in QEMU; start QEMU with the devices that the saved guest had",
    ],
    [
      "no such memory device",
      { blocks: [{}, { idstr: "dimm1", MiB: 512 }] },
      "RAMBlock dimm1: in the snapshot, not in QEMU; start QEMU with the memory devices that the saved guest had",
    ],
    [
      "a device's block of another length",
      { ...other, regions: [region(), region({ idstr: "vga.vram", length: 16 * MiB })] },
      "RAMBlock vga.vram: snapshot has 8 MiB, QEMU has 16 MiB",
    ],
    [
      "host pages that the snapshot's do not fill",
      { blocks: [{ pageSize: 16384 }] },
      "RAMBlock pc.ram: snapshot has pages of 16384 bytes, QEMU has pages of 4096 bytes",
    ],
    [
      "a length that is no whole number of MiB",
      { regions: [region({ length: 64 * MiB + PAGE })] },
      "RAMBlock pc.ram: snapshot has 64 MiB, QEMU has 67112960 bytes (0x4001000); start QEMU with -m 64M",
    ],
    [
      "private memory where the snapshot left shared memory out",
      { blocks: [{ notSaved: true }] },
      "RAMBlock pc.ram: not in the snapshot (saved with x-ignore-shared), but private in QEMU; " +
        "start QEMU with the file that the saved guest had as its memory, share=on",
    ],
  ])("refuses a QEMU with %s, and says what to do", (_, spec, message) => {
    const error = refusal(spec);
    expect(error.message).toBe(FITS_NOT + message);
    expect([error.code, error.exitCode]).toEqual(["TARGET_MISMATCH", 7]);
    expect(error.details).toMatchObject({ path: "vm.snap", differences: 1 });
  });

  test("names every difference in one message", () => {
    const error = refusal({
      ...other,
      machine: ["pc-q35-10.0", "pc-i440fx-10.0"],
      regions: [region({ length: 128 * MiB })],
    });
    expect(error.details["differences"]).toBe(3);
    for (const part of ["machine type", "-m 64M", "vga.vram"])
      expect(error.message).toContain(part);
  });

  test("does not compare machine types when QEMU does not say its own", () => {
    expect(plan({ machine: ["pc-q35-10.0", null] }).blocks).toHaveLength(1);
  });

  test("takes a resizable block that is shorter in the snapshot", () => {
    const regions = [region(), region({ idstr: "rom", length: MiB, maxLength: 4 * MiB })];
    const { blocks } = plan({ blocks: [{}, { idstr: "rom", MiB: 2, dataMiB: 0 }], regions });
    expect(blocks.map(({ way }) => way)).toEqual(["lazy", "seed"]);
  });

  test("refuses a resizable block that is longer in the snapshot than it may become", () => {
    const regions = [region(), region({ idstr: "rom", length: MiB, maxLength: 4 * MiB })];
    const error = refusal({ blocks: [{}, { idstr: "rom", MiB: 8 }], regions });
    expect(error.message).toContain("RAMBlock rom");
  });

  test("warns of writable memory that is not in the snapshot, not of small or read-only blocks", () => {
    const regions = [
      region(),
      region({ idstr: "extra", length: MiB }),
      region({ idstr: "small", length: PAGE }),
      region({ idstr: "rom", length: MiB, readOnly: true }),
    ];
    expect(plan({ regions }).warnings).toEqual([
      "RAMBlock extra of QEMU is not in the snapshot: it stays as it is",
    ]);
  });

  test.each<[string, PlanSpec, string, RegExp]>([
    ["anonymous memory", {}, "lazy", /^$/],
    ["a block with little data", { blocks: [{ dataMiB: 1 }] }, "seed", /only 1 MiB of data/],
    ["a read-only block", { regions: [region({ readOnly: true })] }, "seed", /read-only/],
    [
      "a block that was not saved",
      {
        blocks: [{ notSaved: true }],
        regions: [region({ backing: "shmem", shared: true })],
      },
      "ignored",
      /x-ignore-shared/,
    ],
    [
      "memory of a regular file",
      { regions: [region({ backing: "file" })] },
      "fill",
      /regular file/,
    ],
    [
      "memory that others map too",
      { regions: [region({ backing: "shmem", shared: true, sharedWithOthers: true })] },
      "fill",
      /other processes/,
    ],
    ["shared memory", { regions: [region({ backing: "shmem", shared: true })] }, "lazy", /^$/],
    [
      "shared memory with a balloon",
      { regions: [region({ backing: "shmem", shared: true })], canDiscard: true },
      "fill",
      /give memory back/,
    ],
    [
      "shared memory with a balloon, by request",
      {
        regions: [region({ backing: "shmem", shared: true })],
        canDiscard: true,
        lazyDespiteDiscards: true,
      },
      "lazy",
      /^$/,
    ],
    ["anonymous memory with a balloon", { canDiscard: true }, "lazy", /^$/],
    ["huge pages", { regions: [region({ backing: "hugetlb", pageSize: 2 * MiB })] }, "lazy", /^$/],
    [
      "a length that is no multiple of its huge pages",
      {
        blocks: [{ bytes: 63 * MiB }],
        regions: [region({ backing: "hugetlb", pageSize: 2 * MiB, length: 63 * MiB })],
      },
      "fill",
      /no multiple of its 2 MiB pages/,
    ],
    [
      "little data in shared memory, which may have contents already",
      { blocks: [{ dataMiB: 1 }], regions: [region({ backing: "shmem", shared: true })] },
      "lazy",
      /^$/,
    ],
  ])("chooses for %s", (_, spec, way, reason) => {
    const [only] = plan(spec).blocks;
    expect(only?.way).toBe(way as never);
    expect(only?.reason).toMatch(reason);
  });
});
