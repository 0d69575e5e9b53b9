/**
 * Arming: registers the lazy blocks, leaves long zero extents to the kernel, and corrects what is
 * in memory already. Runs on the main thread, before the state is handed over: an error here undoes
 * everything.
 *
 * Order matters (DESIGN.md): register first, look afterwards, because one touch of memory that is
 * not registered can fill 2 MiB with zeros. A page must have come before the zero extents are
 * unregistered, and is copied where none has: it gives the whole block one anon_vma, without which the
 * split areas could never merge again.
 */
import { FslError } from "../errors.ts";
import { alignDown, alignUp, MiB } from "../pages.ts";
import type { PageBitmap } from "../snapshot/page-bitmap.ts";
import type { Uffd } from "../uffd/uffd.ts";
import {
  REGISTER_MISSING,
  UFFDIO_COPY_BIT,
  UFFDIO_MOVE_BIT,
  UFFDIO_POISON_BIT,
} from "../sys/abi.ts";
import { nextBit, setRange, testBit } from "../bits.ts";
import { contentRanges, writtenRanges } from "./contents.ts";
import type { FillJob } from "./fill.ts";
import { MemoryWriter } from "./memory-writer.ts";
import type { BlockPlan } from "./plan.ts";
import { type AddressRange, pagesIn, type PageSpan, residentRanges, spansOf } from "./resident.ts";
import { add, type BlockState, C_EAGER_PAGES, type LoadState, MAIN_THREAD } from "./state.ts";
import { SUPPLIED, type Supply } from "./supply.ts";

/** Zero extents are cut at page table seams: below that, a split costs more than its faults. */
const SEAM = 2 * MiB;
/**
 * How many extents may be left out: each costs the target two memory areas of its vm.max_map_count.
 */
const EXTENTS_MAX = 256;

/**
 * Runs of clear bits that may hold a whole seam. Needs no target: it is done while the target
 * starts, because its cost grows with the guest.
 */
export function findZeroRuns(bitmap: PageBitmap, pageSize: number): PageSpan[] {
  const { pageCount, words } = bitmap;
  const runs: PageSpan[] = [];
  let first = nextBit(words, 0, pageCount, false);
  while (first < pageCount) {
    const end = nextBit(words, first, pageCount, true);
    if ((end - first) * pageSize >= SEAM) runs.push({ first, end });
    first = nextBit(words, end, pageCount, false);
  }
  return runs;
}

/** What of a block plan decides its registration. */
export interface RegistrationSubject {
  readonly block: Pick<BlockPlan["block"], "idstr" | "pageSize" | "pageCount">;
  readonly region: Pick<BlockPlan["region"], "hostAddr" | "pageSize">;
}

/**
 * What of a block to register: everything but its longest zero extents, cut at seams. By address.
 */
export function planRegistration(
  zeroRuns: ReadonlyMap<string, readonly PageSpan[]>,
  { block: { idstr, pageSize, pageCount }, region }: RegistrationSubject,
  extentsMax = EXTENTS_MAX,
): { registered: AddressRange[]; zero: AddressRange[] } {
  const { hostAddr, pageSize: hostPageSize } = region;
  const seam = Math.max(SEAM, hostPageSize);
  const blockEnd = hostAddr + pageCount * pageSize;
  const extents: AddressRange[] = [];
  for (const { first, end } of zeroRuns.get(idstr) ?? []) {
    const startAddr = first === 0 ? hostAddr : alignUp(hostAddr + first * pageSize, seam);
    const endAddr = end === pageCount ? blockEnd : alignDown(hostAddr + end * pageSize, seam);
    if (endAddr - startAddr >= seam) extents.push({ startAddr, endAddr });
  }
  const length = ({ startAddr, endAddr }: AddressRange): number => endAddr - startAddr;
  const zero =
    extents.length <= extentsMax
      ? extents
      : extents
          .toSorted((a, b) => length(b) - length(a))
          .slice(0, extentsMax)
          .toSorted((a, b) => a.startAddr - b.startAddr);
  const registered: AddressRange[] = [];
  let at = hostAddr;
  for (const extent of zero) {
    if (extent.startAddr > at) registered.push({ startAddr: at, endAddr: extent.startAddr });
    at = extent.endAddr;
  }
  if (at < blockEnd) registered.push({ startAddr: at, endAddr: blockEnd });
  return { registered, zero };
}

/**
 * Registers every lazy block as a whole.
 * @param isPoisoned a page that stays unreadable is to be poisoned
 * @returns names of the blocks that whole huge pages can be moved into
 * @throws FslError HOST_UNSUPPORTED, with nothing left registered by the caller
 */
export function registerBlocks(
  uffd: Uffd,
  plans: readonly BlockPlan[],
  isPoisoned: boolean,
): Set<string> {
  const movable = new Set<string>();
  for (const { block, region } of plans) {
    const ioctls = uffd.register(region.hostAddr, block.usedLength, REGISTER_MISSING);
    if ((ioctls & (1n << UFFDIO_COPY_BIT)) === 0n) {
      throw new FslError(
        "HOST_UNSUPPORTED",
        `RAMBlock ${block.idstr}: userfaultfd cannot copy into ${region.backing} memory (ioctls ${ioctls})`,
        { idstr: block.idstr, backing: region.backing },
      );
    }
    if (isPoisoned && (ioctls & (1n << UFFDIO_POISON_BIT)) === 0n) {
      throw new FslError(
        "HOST_UNSUPPORTED",
        `--on-error poison: expected UFFDIO_POISON (Linux 6.6), found a kernel without it ` +
          `(ioctls ${ioctls} for RAMBlock ${block.idstr}); use --on-error wait or kill`,
        { idstr: block.idstr },
      );
    }
    const isPlain =
      region.backing === "anonymous" && !region.shared && region.pageSize === block.pageSize;
    // A page that is moved stays on the node where it was read into; a copy goes by the memory's
    // own policy.
    const isFree = region.nodePolicy === undefined;
    const canMove = (ioctls & (1n << UFFDIO_MOVE_BIT)) !== 0n;
    if (isPlain && isFree && canMove) movable.add(block.idstr);
  }
  return movable;
}

/** Takes the zero extents out again; afterwards the kernel fills them natively, with huge pages. */
export function releaseZeroExtents(
  uffd: Uffd,
  state: LoadState,
  supply: Supply,
  extents: ReadonlyMap<BlockState, readonly AddressRange[]>,
): void {
  for (const block of state.blocks) {
    const zero = extents.get(block) ?? [];
    if (zero.length === 0) continue;
    const first = nextBit(block.data, 0, block.pageCount, true);
    const isNeeded = first < block.pageCount && !testBit(block.done, first);
    if (isNeeded && block.block.hostPageSize === block.block.pageSize) {
      const { canDiscard } = state.metadata;
      if (canDiscard && !state.enterCopy(MAIN_THREAD)) continue;
      const outcome = supply.copyRun(block, first, 1);
      add(state.counters(MAIN_THREAD), C_EAGER_PAGES, supply.pagesDone);
      if (canDiscard) state.leaveCopy(MAIN_THREAD);
      // A source that has not got the page yet, for one: then zero pages come by fault.
      if (outcome !== SUPPLIED) continue;
    }
    for (const { startAddr, endAddr } of zero) uffd.unregister(startAddr, endAddr - startAddr);
  }
}

/** Pages of a block that were in memory before it was registered. */
export interface ResidentPages {
  readonly block: BlockState;
  /** By address; none touches another. */
  readonly runs: readonly PageSpan[];
}

/** Looks for pages that were in memory before the ranges were registered. */
export function findResident(
  pid: number,
  plans: readonly BlockPlan[],
  state: LoadState,
): ResidentPages[] {
  return plans.map(({ block, region }, index) => {
    const blockState = state.blocks[index];
    if (blockState === undefined) throw new FslError("INTERNAL", `no state for block ${index}`);
    const ranges = residentRanges(pid, region.hostAddr, block.usedLength);
    if (region.backing === "shmem" || region.backing === "hugetlb") {
      ranges.push(...contentRanges(pid, region.hostAddr, block.usedLength, region.pageSize));
    }
    return { block: blockState, runs: spansOf(ranges, { ...block, hostAddr: region.hostAddr }) };
  });
}

/** In bytes. */
export function residentLength(resident: readonly ResidentPages[]): number {
  return resident.reduce((sum, { block, runs }) => sum + pagesIn(runs) * block.block.pageSize, 0);
}

/** What gives such pages their bytes: zeros for clear bits. */
export function jobsOfResident(resident: readonly ResidentPages[]): FillJob[] {
  return resident.map(({ block: { block, data }, runs }) => {
    const { idstr, pageSize, hostAddr, pagesOffset } = block;
    return { idstr, pageSize, hostAddr, pagesOffset, data, zeros: runs, contents: runs };
  });
}

/** Counts them as done: when they have their bytes. */
export function markResident(resident: readonly ResidentPages[]): void {
  for (const { block, runs } of resident) {
    for (const { first, end } of runs) setRange(block.done, first, end);
  }
}

/**
 * Makes the pages that the snapshot has and the target holds zero again: whoever gives the target a state after us may
 * leave zero pages alone, as QEMU's own load of a mapped-ram file does.
 */
export async function clearBrought(pid: number, plans: readonly BlockPlan[]): Promise<void> {
  const writer = new MemoryWriter(pid);
  try {
    for (const { block, region, bitmap } of plans) {
      const place = { ...block, hostAddr: region.hostAddr };
      const ranges = residentRanges(pid, region.hostAddr, block.usedLength);
      for (const { first, end } of spansOf(ranges, place)) {
        await writer.writeZeros(place, bitmap.words, first, end, true);
      }
    }
  } finally {
    writer.close();
  }
}

/**
 * What loads the blocks that cannot be lazy. Pages that are zero in the snapshot are written only where the target has
 * something: elsewhere its memory is zero already, and would only be allocated by it.
 */
export function jobsOfFilled(pid: number, plans: readonly BlockPlan[]): FillJob[] {
  return plans.map(({ block, region, bitmap }) => {
    const { idstr, pageSize, pagesOffset } = block;
    const { hostAddr, backing } = region;
    const { words, pageCount } = bitmap;
    const occupied = residentRanges(pid, hostAddr, block.usedLength);
    if (backing !== "anonymous") {
      occupied.push(...writtenRanges(pid, hostAddr, block.usedLength, region.pageSize));
    }
    const zeros = spansOf(occupied, { pageSize, pageCount, hostAddr });
    const contents = [{ first: 0, end: pageCount }];
    return { idstr, pageSize, hostAddr, pagesOffset, data: words, zeros, contents };
  });
}
