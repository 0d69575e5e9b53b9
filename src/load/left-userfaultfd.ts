/**
 * The userfaultfd that a target keeps for a load whose fsl has died. A QEMU may have others (it makes
 * one for a background snapshot), and what its descriptors are called is not enough: the kernel is
 * asked whether the guest's memory is watched, and by which of them.
 */
import { FslError } from "../errors.ts";
import { hex } from "../pages.ts";
import { REGISTER_MISSING } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import { descriptorsOf, linkOf } from "../vmm/process-links.ts";
import { readWatchedAreas, type WatchedArea } from "../vmm/process-maps.ts";
import { countMissing } from "../bits.ts";
import { type LoadState, PHASE_FINISHED } from "./state.ts";

const UFFD_LINK = "anon_inode:[userfaultfd]";

/** What is needed of a target. */
interface Holder {
  readonly description: string;
  readonly pid: number;
  readonly pidfd: number;
}

/**
 * @returns a descriptor, the caller's
 * @throws FslError TARGET_LOST when there is none, TARGET_MISMATCH when none of those that are there
 * watches the memory that the load state names
 */
export function takeUserfaultfd(target: Holder, state: LoadState): number {
  const { description, pid } = target;
  const isFinished = state.phase === PHASE_FINISHED;
  const numbers = descriptorsOf(pid, UFFD_LINK);
  if (numbers.length === 0) {
    const why = isFinished ? "all its RAM is in already" : "its userfaultfd is gone";
    throw new FslError("TARGET_LOST", `${description}: ${why}`, { pid });
  }
  // Who has come that far may have let go of ranges already, and no more is waited for.
  const isComplete = isFinished || state.blocks.every((b) => countMissing(b.data, b.done) === 0);
  const ranges = isComplete ? [] : mappedRanges(target, state);
  for (const number of numbers) {
    const fd = sys.pidfdGetfd(target.pidfd, number);
    if (fd < 0) continue;
    if (isUserfaultfd(fd) && ranges.every((range) => watches(fd, range))) return fd;
    sys.close(fd);
  }
  throw new FslError(
    "TARGET_MISMATCH",
    `${description}: expected a userfaultfd of its guest's memory among its descriptors, found ` +
      `${numbers.length} of other memory; end it and load again`,
    { pid },
  );
}

/** What was taken: the number may be another descriptor's by now. */
export function isUserfaultfd(fd: number): boolean {
  return linkOf(`/proc/self/fd/${fd}`) === UFFD_LINK;
}

interface Range {
  readonly startAddr: number;
  readonly length: number;
}

/**
 * The registered ranges that are there; a memory device that was unplugged has taken its own along.
 * @throws FslError TARGET_MISMATCH when one is not watched: the guest may have gone on with zeros
 */
function mappedRanges({ description, pid }: Holder, state: LoadState): Range[] {
  const areas = readWatchedAreas(pid);
  const { registered } = state.metadata;
  const ranges: Range[] = [];
  for (let index = 0; index + 1 < registered.length; index += 2) {
    const [startAddr = 0, endAddr = 0] = registered.slice(index, index + 2);
    const within = areas.filter((area) => area.startAddr < endAddr && area.endAddr > startAddr);
    if (within.length === 0) continue;
    const bare = within.find((area: WatchedArea) => !area.isWatched);
    if (bare !== undefined) throw unwatched(description, pid, bare.startAddr);
    ranges.push({ startAddr, length: endAddr - startAddr });
  }
  if (ranges.length === 0) throw unwatched(description, pid, registered[0] ?? 0);
  return ranges;
}

function unwatched(description: string, pid: number, address: number): FslError {
  return new FslError(
    "TARGET_MISMATCH",
    `${description}: its load state names memory at ${hex(address)} that no userfaultfd watches, ` +
      "so nobody knows what is in it; end it and load again",
    { pid },
  );
}

/** To register what is watched already changes nothing; the kernel refuses it to another one. */
function watches(fd: number, { startAddr, length }: Range): boolean {
  return sys.uffdRegister(fd, startAddr, length, REGISTER_MISSING, new BigUint64Array(1)) >= 0;
}
