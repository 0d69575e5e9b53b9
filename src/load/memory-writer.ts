/**
 * Writes straight into the target's memory before its guest runs: blocks that cannot be lazy, and pages that were there
 * before they were registered. Not for a registered page that is missing: process_vm_writev would wait for it, and only
 * we bring it. Lets its thread's events through between pieces: a block may have many GiB.
 * @source process_vm_writev(2), proc(5) /proc/PID/mem
 */
import { closeSync } from "node:fs";
import { nextBit } from "../bits.ts";
import { FslError } from "../errors.ts";
import { hex, MiB } from "../pages.ts";
import { EFAULT, EIO, ESRCH } from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import { type PageReader, PIECE_LENGTH } from "./page-reader.ts";
import { openProcessFile } from "./resident.ts";

const ZEROS_LENGTH = MiB;

/** What has to be known of a block, and where it is in the target. */
export interface BlockPlace {
  readonly idstr: string;
  readonly pageSize: number;
  /** Address of page 0. */
  readonly hostAddr: number;
}

/** Why bytes could not be taken from the page source. @param written how many could */
type Diagnose = (written: number) => FslError;

export class MemoryWriter {
  readonly #pid: number;
  readonly #zeros = Buffer.alloc(ZEROS_LENGTH);
  /** /proc/PID/mem, once process_vm_writev has failed. */
  #memFd = -1;
  /** Bytes written since events were let through. */
  #unpaused = 0;
  bytesWritten = 0;

  constructor(pid: number) {
    this.#pid = pid;
  }

  /**
   * The pages of [first, end) that have bytes in the snapshot.
   * @param data the block's page bitmap
   * @throws FslError SNAPSHOT_OPEN when a page cannot be read, TARGET_LOST when the target cannot be written,
   * HOST_UNSUPPORTED without the privilege to
   */
  async writeData(
    reader: PageReader,
    { idstr, pageSize, hostAddr }: BlockPlace,
    data: Int32Array,
    first: number,
    end: number,
  ): Promise<void> {
    await reader.each(idstr, data, first, end, async (address, page, pages) => {
      this.#write(idstr, address, pages * pageSize, hostAddr + page * pageSize, (written) => {
        // The kernel does not always say how far it came.
        for (let at = page + Math.floor(written / pageSize); at < page + pages; at += 1) {
          const error = reader.diagnose(idstr, at);
          if (error !== null) return error;
        }
        return reader.unreadable(idstr, page);
      });
      await this.#pause();
    });
  }

  /** Zeros over every page of [first, end) whose bit has that value: false = zero in the snapshot. */
  async writeZeros(
    { idstr, pageSize, hostAddr }: BlockPlace,
    data: Int32Array,
    first: number,
    end: number,
    value: boolean,
  ): Promise<void> {
    for (let page = nextBit(data, first, end, value); page < end;) {
      const runEnd = nextBit(data, page, end, !value);
      await this.#zero(idstr, hostAddr + page * pageSize, (runEnd - page) * pageSize);
      page = nextBit(data, runEnd, end, value);
    }
  }

  async #zero(idstr: string, addr: number, length: number): Promise<void> {
    for (let at = 0; at < length; at += ZEROS_LENGTH) {
      const part = Math.min(ZEROS_LENGTH, length - at);
      this.#write(idstr, sys.ptrOf(this.#zeros), part, addr + at);
      await this.#pause();
    }
  }

  close(): void {
    if (this.#memFd >= 0) closeSync(this.#memFd);
    this.#memFd = -1;
  }

  #write(
    idstr: string,
    localAddr: number,
    length: number,
    addr: number,
    diagnose?: Diagnose,
  ): void {
    for (let at = 0; at < length;) {
      const done = this.#writePart(localAddr + at, length - at, addr + at);
      if (done === -EFAULT && diagnose !== undefined) throw diagnose(at);
      if (done <= 0) throw unwritable(this.#pid, idstr, addr + at, done);
      at += done;
      this.#unpaused += done;
      this.bytesWritten += done;
    }
  }

  /**
   * The file takes half as long again. But a container may forbid process_vm_writev, and the file tells what is wrong:
   * EFAULT is about our side, EIO about the target's.
   */
  #writePart(localAddr: number, length: number, addr: number): number {
    const done = sys.processVmWritev(this.#pid, addr, localAddr, length);
    if (done > 0) return done;
    if (this.#memFd < 0) this.#memFd = openProcessFile(this.#pid, "mem", "r+");
    return sys.pwrite(this.#memFd, localAddr, length, addr);
  }

  async #pause(): Promise<void> {
    if (this.#unpaused < PIECE_LENGTH) return;
    this.#unpaused = 0;
    await new Promise<void>((resolve) => setImmediate(resolve));
  }
}

function unwritable(pid: number, idstr: string, addr: number, result: number): FslError {
  const isNotThere = result === -EIO || result === 0;
  const isGone = isNotThere || result === -ESRCH;
  const hint = isNotThere
    ? "; the host has no memory for it (huge pages: vm.nr_hugepages), its file was cut short, or it is mapped no more"
    : "; run fsl as root, or as QEMU's user";
  return new FslError(
    isGone ? "TARGET_LOST" : "HOST_UNSUPPORTED",
    `RAMBlock ${idstr}: memory of process ${pid} at ${hex(addr)}: cannot be written: ${sys.errnoText(-result)}` +
      (result === -ESRCH ? "" : hint),
    { pid, idstr, addr, errno: -result },
  );
}
