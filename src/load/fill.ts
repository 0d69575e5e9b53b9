/**
 * Writes blocks into the target before it runs: those that cannot be lazy. Only for memory that is not registered with
 * the userfaultfd: process_vm_writev waits where a page is missing. Runs on the main thread and lets its events through
 * between pieces: a block may have many GiB.
 * @source process_vm_writev(2)
 */
import { FslError } from "../errors.ts";
import { hex, MiB } from "../pages.ts";
import type { RAMBlock } from "../snapshot/mapped-ram.ts";
import { EFAULT, ESRCH, MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import { nextBit } from "../bits.ts";
import { type PageReader, PIECE_LENGTH } from "./page-reader.ts";

const ZEROS_LENGTH = MiB;

/** A block, and where it is in the target. */
export interface BlockPlace extends RAMBlock {
  readonly hostAddr: number;
}

export class BlockFiller {
  readonly #pid: number;
  readonly #reader: PageReader;
  bytesWritten = 0;

  constructor(pid: number, reader: PageReader) {
    this.#pid = pid;
    this.#reader = reader;
  }

  /**
   * Every data page of a block.
   * @param data the block's page bitmap
   * @throws FslError SNAPSHOT_OPEN when a page cannot be read, TARGET_LOST when the target cannot be written
   */
  async writeData(place: BlockPlace, data: Int32Array): Promise<void> {
    const { idstr, pageCount, pageSize, hostAddr } = place;
    await this.#reader.each(idstr, data, 0, pageCount, (address, page, pages) =>
      this.#write(hostAddr + page * pageSize, address, pages * pageSize, (written) =>
        this.#reader.diagnose(idstr, page + Math.floor(written / pageSize)),
      ),
    );
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
