/**
 * Preallocated memory, lazily, where the caller wishes so: the target gives it back to the kernel before it is
 * registered, so that it is missing as any other memory is, and takes what nobody has touched again when all RAM is in.
 * In between somebody else may get it: huge pages from a pool that is shared, or the last memory of the host. A guest
 * waits then, see serving.ts.
 * @source madvise(2)
 */
import { GiB, MiB } from "../pages.ts";
import { EPERM, MADV_DONTNEED, MADV_POPULATE_WRITE, MADV_REMOVE } from "../sys/abi.ts";
import { type HelperRecord, HelperTask } from "../sys/helper-task.ts";
import * as sys from "../sys/native.ts";
import { linksOf } from "../vmm/process-links.ts";
import type { Target } from "../vmm/target.ts";
import type { BlockPlan } from "./plan.ts";
import { type AddressRange, residentRanges } from "./resident.ts";

/** Less than that is corrected in place, bytes. */
const GIVEN_MIN = 4 * MiB;
/** What is given back, and taken, in one system call: the second is waited for by whoever maps something. */
const GIVEN_AT_ONCE = GiB;
const TAKEN_AT_ONCE = 64 * MiB;
const LOOK_MS = 5;
/** Open in a target whose memory a device of the host's uses (DMA): it would go on with the pages that it has. */
const PINS = /^\/dev\/(?:vfio\/|iommu|vhost-vdpa|infiniband\/)|\[vfio-device\]/;

const PINNED = "a device of the host's reads and writes it by itself";
/** 512 MiB of a memfd: 100 ms to free it, 70 to fill it. */
const SMALL = "to free shared memory in small pages takes longer than to fill it";
const HOST_PAGE = 4096;

export interface GivenBack {
  /** What was in memory. */
  readonly given: readonly AddressRange[];
  /** Blocks that stay as they are, and why. */
  readonly kept: readonly { readonly idstr: string; readonly reason: string }[];
}

/**
 * Gives back the blocks that are in memory, each as a whole. Before they are registered: nobody is told of it.
 * @param helper makes the calls; absent: a thread of the target's
 */
export function giveBack(
  target: Target,
  plans: readonly BlockPlan[],
  helper: HelperRecord | undefined,
): GivenBack {
  const given: AddressRange[] = [];
  const kept: { idstr: string; reason: string }[] = [];
  const isPinned = linksOf(target.pid).some((link) => PINS.test(link));
  const task = helper === undefined ? undefined : new HelperTask(helper);
  for (const { block, region } of plans) {
    const { hostAddr, shared, pageSize } = region;
    const { idstr, usedLength } = block;
    const ranges = residentRanges(target.pid, hostAddr, usedLength);
    const length = ranges.reduce((sum, { startAddr, endAddr }) => sum + endAddr - startAddr, 0);
    if (length < GIVEN_MIN) continue;
    const reason = isPinned ? PINNED : shared && pageSize === HOST_PAGE ? SMALL : "";
    if (reason !== "") {
      kept.push({ idstr, reason });
      continue;
    }
    // A file keeps what is only unmapped.
    const advice = shared ? MADV_REMOVE : MADV_DONTNEED;
    let result = 0;
    for (let at = 0; at < usedLength && result === 0; at += GIVEN_AT_ONCE) {
      const part = Math.min(GIVEN_AT_ONCE, usedLength - at);
      result =
        task === undefined
          ? (target.advise?.(hostAddr + at, part, advice) ?? -EPERM)
          : adviseBy(task, hostAddr + at, part, advice);
    }
    if (result === 0) given.push(...ranges);
    else kept.push({ idstr, reason: sys.errnoText(-result) });
  }
  return { given, kept };
}

function adviseBy(task: HelperTask, addr: number, length: number, advice: number): number {
  task.begin();
  const call = task.madvise(addr, length, advice);
  task.run();
  return task.result(call);
}

/**
 * Has the missing pages of ranges made, which are zero: when nothing of them is registered any more. A host that has no
 * memory for them any more is no error: they come when the guest touches them, as far as they can.
 * @returns false when not all of it could be
 */
export async function takeAgain(
  ranges: readonly AddressRange[],
  helper: HelperRecord,
  isOver: () => boolean,
): Promise<boolean> {
  const task = new HelperTask(helper);
  for (const { startAddr, endAddr } of ranges) {
    for (let at = startAddr; at < endAddr; at += TAKEN_AT_ONCE) {
      if (isOver()) return false;
      task.begin();
      const call = task.madvise(at, Math.min(TAKEN_AT_ONCE, endAddr - at), MADV_POPULATE_WRITE);
      if (task.start() < 0) return false;
      while (!task.isAnswered()) await Bun.sleep(LOOK_MS);
      task.finish();
      if (task.result(call) < 0) return false;
    }
  }
  return true;
}
