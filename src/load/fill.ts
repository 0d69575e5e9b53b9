/**
 * Writes blocks into the target before it runs: those that cannot be lazy. Only for memory that is not registered with
 * the userfaultfd: process_vm_writev waits where a page is missing. Runs on the main thread and lets its events through
 * between pieces: a block may have many GiB.
 * @source process_vm_writev(2)
 */
import { FslError } from "../errors.ts";
import { hex, MiB } from "../pages.ts";
import type { RAMBlock } from "../snapshot/mapped-ram.ts";
import type { Snapshot } from "../snapshot/snapshot.ts";
import type { PageBytes } from "../source/page-source.ts";
import { SnapshotPageSource } from "../source/snapshot-source.ts";
import { EFAULT, ESRCH, MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import { nextBit } from "./bits.ts";

/** Bytes of one call: some 2 ms, so that signals and messages are not kept waiting. */
const PIECE_LENGTH = 8 * MiB;
const ZEROS_LENGTH = MiB;

/** A block, and where it is in the target. */
export interface BlockPlace extends RAMBlock {
  readonly hostAddr: number;
}

export class BlockFiller {
  readonly #pid: number;
  readonly #snapshot: Pick<Snapshot, "fd" | "path">;
  bytesWritten = 0;

  constructor(pid: number, snapshot: Pick<Snapshot, "fd" | "path">) {
    this.#pid = pid;
    this.#snapshot = snapshot;
  }

  /**
   * Every data page of a block.
   * @param data the block's page bitmap
   * @throws FslError SNAPSHOT_OPEN when the file cannot be read, TARGET_LOST when the target cannot be written
   */
  async writeData(place: BlockPlace, data: Int32Array): Promise<void> {
    const { pageCount, pageSize, hostAddr } = place;
    const source = new SnapshotPageSource({ fd: this.#snapshot.fd }, [place]);
    const answer: PageBytes = { state: "ready", address: 0, pages: 0, errno: 0 };
    try {
      let page = nextBit(data, 0, pageCount, true);
      while (page < pageCount) {
        const runEnd = nextBit(data, page, pageCount, false);
        const pages = Math.min(runEnd - page, PIECE_LENGTH / pageSize);
        source.resolve(0, page, pages, answer);
        await this.#write(
          hostAddr + page * pageSize,
          answer.address,
          pages * pageSize,
          (written) => {
            const failed = page + Math.floor(written / pageSize);
            const errno = source.diagnose(0, failed);
            return errno === 0 ? null : unreadable(this.#snapshot.path, place, failed, errno);
          },
        );
        source.release(0, page, pages);
        page = nextBit(data, page + pages, pageCount, true);
      }
    } finally {
      source.close();
    }
  }

  /** Zeros over every page of [first, end) that is zero in the snapshot. */
  async writeZeros(place: BlockPlace, data: Int32Array, first: number, end: number): Promise<void> {
    const { pageSize, hostAddr } = place;
    const flags = MAP_PRIVATE | MAP_ANONYMOUS;
    const zeros = sys.check(sys.mmap(0, ZEROS_LENGTH, PROT_READ, flags, -1, 0), "mmap of zeros");
    try {
      let page = nextBit(data, first, end, false);
      while (page < end) {
        const runEnd = nextBit(data, page, end, true);
        const pages = Math.min(runEnd - page, ZEROS_LENGTH / pageSize);
        await this.#write(hostAddr + page * pageSize, zeros, pages * pageSize, () => null);
        page = nextBit(data, page + pages, end, false);
      }
    } finally {
      sys.munmap(zeros, ZEROS_LENGTH);
    }
  }

  /** @param diagnose an error of the source's, asked for when either side may be to blame */
  async #write(
    remoteAddr: number,
    localAddr: number,
    length: number,
    diagnose: (written: number) => FslError | null,
  ): Promise<void> {
    for (let at = 0; at < length;) {
      const done = sys.processVmWritev(this.#pid, remoteAddr + at, localAddr + at, length - at);
      if (done <= 0) {
        const error = done === -EFAULT || done === 0 ? diagnose(at) : null;
        throw error ?? unwritable(this.#pid, remoteAddr + at, done);
      }
      at += done;
      this.#unpaused += done;
      this.bytesWritten += done;
    }
    if (this.#unpaused < PIECE_LENGTH) return;
    this.#unpaused = 0;
    await new Promise<void>((resolve) => setImmediate(resolve));
  }
  /** Bytes written since events were let through. */
  #unpaused = 0;
}

function unreadable(path: string, block: RAMBlock, page: number, errno: number): FslError {
  const offset = block.pagesOffset + page * block.pageSize;
  return new FslError(
    "SNAPSHOT_OPEN",
    `snapshot ${path}: page ${page} of RAMBlock ${block.idstr} at ${hex(offset)} cannot be read: ` +
      sys.errnoText(errno),
    { path, idstr: block.idstr, page, offset, errno },
  );
}

function unwritable(pid: number, addr: number, result: number): FslError {
  const isNotThere = result === -EFAULT || result === 0;
  const isGone = isNotThere || result === -ESRCH;
  const hint = isNotThere
    ? "; the host has no memory for it (huge pages: vm.nr_hugepages), or it is mapped no more"
    : "; run fsl as root, or as QEMU's user";
  return new FslError(
    isGone ? "TARGET_LOST" : "HOST_UNSUPPORTED",
    `memory of process ${pid} at ${hex(addr)}: cannot be written: ${sys.errnoText(-result)}` +
      (result === -ESRCH ? "" : hint),
    { pid, addr, errno: -result },
  );
}
