/**
 * The plan of a load: each RAMBlock of the snapshot paired with its guest region, and how it gets
 * its pages. Pure: nothing of the target is touched. Everything that does not fit is said here,
 * before anything has happened.
 */
import { FslError } from "../errors.ts";
import { hex, MiB } from "../pages.ts";
import type { RAMBlock } from "../snapshot/mapped-ram.ts";
import { PageBitmap } from "../snapshot/page-bitmap.ts";
import type { Snapshot } from "../snapshot/snapshot.ts";
import type { GuestRegion, TargetInfo } from "../vmm/target.ts";

/**
 * A block with no more data than this travels with the device state: QEMU loads it itself, in well
 * under 1 ms.
 */
export const SEED_DATA_MAX = MiB;

/** Each vCPU has one. @source QEMU hw/core/cpu-system.c vmstate_cpu_common */
const VCPU_SECTION = "cpu_common";

/**
 * lazy: on demand and by the eager loader. seed: by QEMU's own loader, with the device state. fill:
 * written by fsl in full before the guest resumes. ignored: not in the snapshot (x-ignore-shared),
 * left as it is.
 */
export type LoadWay = "lazy" | "seed" | "fill" | "ignored";

export interface BlockPlan {
  readonly block: RAMBlock;
  readonly region: GuestRegion;
  readonly bitmap: PageBitmap;
  readonly way: LoadWay;
  /** Why it is not lazy, in words; empty for lazy blocks. */
  readonly reason: string;
}

export interface LoadPlan {
  readonly blocks: readonly BlockPlan[];
  /** What is odd but no reason to refuse, one sentence each. */
  readonly warnings: readonly string[];
}

export interface PlanOptions {
  /** The bitmaps of the snapshot's saved blocks, by name. */
  readonly bitmaps: ReadonlyMap<string, PageBitmap>;
  /**
   * Load shared memory and huge pages lazily although a device could give memory back unnoticed.
   */
  readonly lazyDespiteDiscards: boolean;
}

/** @throws FslError TARGET_MISMATCH with every difference in its message */
export function planLoad(snapshot: Snapshot, info: TargetInfo, options: PlanOptions): LoadPlan {
  const differences: string[] = [];
  compareMachine(snapshot, info, differences);
  compareVcpus(snapshot, info, differences);
  const regions = new Map(info.regions.map((region) => [region.idstr, region]));
  const blocks: BlockPlan[] = [];
  for (const block of snapshot.blocks) {
    const region = regions.get(block.idstr);
    if (region === undefined) {
      differences.push(
        `RAMBlock ${block.idstr}: in the snapshot, not in QEMU; ${missingHint(block)}`,
      );
      continue;
    }
    regions.delete(block.idstr);
    compareBlock(block, region, differences);
    // QEMU would say nothing, and the guest would find zeros.
    if (block.notSaved && !region.shared) {
      differences.push(
        `RAMBlock ${block.idstr}: not in the snapshot (saved with x-ignore-shared), but private in QEMU; ` +
          "start QEMU with the file that the saved guest had as its memory, share=on",
      );
    }
    const bitmap = options.bitmaps.get(block.idstr) ?? new PageBitmap(new Uint8Array(0), 0);
    const [way, reason] = chooseWay(block, bitmap, region, info, options);
    blocks.push({ block, region, bitmap, way, reason });
  }
  if (differences.length > 0) {
    throw new FslError(
      "TARGET_MISMATCH",
      `QEMU does not fit the snapshot: ${differences.join("; ")}`,
      {
        path: snapshot.path,
        differences: differences.length,
      },
    );
  }
  const warnings = [...regions.values()]
    .filter((region) => !region.readOnly && region.length >= MiB)
    .map((region) => `RAMBlock ${region.idstr} of QEMU is not in the snapshot: it stays as it is`);
  return { blocks, warnings };
}

function compareMachine(snapshot: Snapshot, info: TargetInfo, differences: string[]): void {
  const { machineType } = snapshot;
  // QEMU compares them itself when it reads the state; the file of a machine without one has none.
  if (info.machineType === null || machineType === null || machineType === info.machineType) return;
  differences.push(
    `machine type: snapshot has ${machineType}, QEMU runs ${info.machineType}; ` +
      `start QEMU with -machine ${machineType}`,
  );
}

/** A QEMU with more of them takes the state without a word; with fewer, it names a section. */
function compareVcpus(snapshot: Snapshot, info: TargetInfo, differences: string[]): void {
  const saved = snapshot.sections.filter(({ name }) => name === VCPU_SECTION).length;
  if (saved === 0 || info.vcpus === null || info.vcpus === saved) return;
  differences.push(
    `vCPUs: snapshot has ${saved}, QEMU has ${info.vcpus}; start QEMU with -smp ${saved}`,
  );
}

function compareBlock(block: RAMBlock, region: GuestRegion, differences: string[]): void {
  const resizable = region.maxLength > region.length;
  const fits = resizable
    ? block.usedLength <= region.maxLength
    : block.usedLength === region.length;
  if (!fits) {
    differences.push(
      `RAMBlock ${block.idstr}: snapshot has ${sizeText(block.usedLength)}, ` +
        `QEMU has ${sizeText(region.length)}${lengthHint(block)}`,
    );
  }
  if (region.pageSize % block.pageSize !== 0) {
    differences.push(
      `RAMBlock ${block.idstr}: snapshot has pages of ${block.pageSize} bytes, ` +
        `QEMU has pages of ${region.pageSize} bytes`,
    );
  }
}

function chooseWay(
  block: RAMBlock,
  bitmap: PageBitmap,
  region: GuestRegion,
  info: TargetInfo,
  options: PlanOptions,
): readonly [LoadWay, string] {
  if (block.notSaved) return ["ignored", "not in the snapshot: saved with x-ignore-shared"];
  if (region.readOnly) return ["seed", "read-only"];
  const dataLength = bitmap.dataPages * block.pageSize;
  const oddLength = block.usedLength % region.pageSize !== 0;
  if (dataLength <= SEED_DATA_MAX && region.backing === "anonymous" && !region.shared) {
    return ["seed", `only ${sizeText(dataLength)} of data`];
  }
  if (oddLength) return ["fill", `length is no multiple of its ${sizeText(region.pageSize)} pages`];
  if (region.backing === "file") return ["fill", "a regular file backs it: userfaultfd cannot"];
  if (region.sharedWithOthers) return ["fill", "other processes map it: they would read holes"];
  const silentDiscards = region.backing === "hugetlb" || region.backing === "shmem";
  if (silentDiscards && info.canDiscard && !options.lazyDespiteDiscards) {
    return ["fill", "the guest can give memory back, and the kernel tells nobody for this kind"];
  }
  return ["lazy", ""];
}

function missingHint(block: RAMBlock): string {
  return block.usedLength >= 16 * MiB
    ? "start QEMU with the memory devices that the saved guest had"
    : "start QEMU with the devices that the saved guest had";
}

function lengthHint(block: RAMBlock): string {
  const isMainRam = /(^|\.)ram$/.test(block.idstr);
  return isMainRam ? `; start QEMU with -m ${block.usedLength / MiB}M` : "";
}

function sizeText(bytes: number): string {
  if (bytes >= MiB && bytes % MiB === 0) return `${bytes / MiB} MiB`;
  return `${bytes} bytes (${hex(bytes)})`;
}
