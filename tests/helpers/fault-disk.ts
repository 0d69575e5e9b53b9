/**
 * A disk that fails for a while: an ext4 file system on a loop device whose backing file is cut
 * short. The kernel answers EIO for what lies behind the cut, until the bytes are put back.
 */
import {
  closeSync,
  copyFileSync,
  existsSync,
  fdatasyncSync,
  ftruncateSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readSync,
  rmSync,
  statSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { POSIX_FADV_DONTNEED } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";

const MIB = 1024 * 1024;
const BLOCK = 4096;

/** Why there can be no such disk here, or null. */
export function whyNoFaultyDisk(): string | null {
  if (process.getuid?.() !== 0) return "mounting a loop device needs root";
  if (!existsSync("/dev/loop-control")) return "this kernel has no loop devices";
  for (const tool of ["mkfs.ext4", "filefrag", "losetup"]) {
    if (Bun.which(tool, { PATH: `${process.env["PATH"]}:/sbin:/usr/sbin` }) === null)
      return `${tool} is not installed`;
  }
  return null;
}

export class FaultyDisk implements AsyncDisposable {
  /** The copy of the file on the disk. */
  readonly path: string;
  readonly #directory: string;
  readonly #backing: string;
  readonly #mount: string;
  /** Half-open file ranges and where they are on the disk, in blocks. */
  readonly #extents: { first: number; physical: number; length: number }[] = [];
  #isMounted = false;
  #tail: { at: number; bytes: Buffer } | null = null;

  private constructor() {
    this.#directory = mkdtempSync(join(tmpdir(), "fsl-fault-disk-"));
    this.#backing = join(this.#directory, "disk");
    this.#mount = join(this.#directory, "mount");
    this.path = join(this.#mount, "guest.snap");
  }

  /** Makes a disk with a copy of a file on it. */
  static async make(file: string): Promise<FaultyDisk> {
    const disk = new FaultyDisk();
    try {
      mkdirSync(disk.#mount);
      const fd = openSync(disk.#backing, "w");
      ftruncateSync(fd, statSync(file).size + 64 * MIB);
      closeSync(fd);
      await run("mkfs.ext4", "-q", "-F", "-b", String(BLOCK), "-O", "^has_journal", disk.#backing);
      await run("mount", "-o", "loop,noatime", disk.#backing, disk.#mount);
      disk.#isMounted = true;
      copyFileSync(file, disk.path);
      await run("sync", "--file-system", disk.path);
      const table = await run("filefrag", "-v", `-b${BLOCK}`, disk.path);
      for (const [, first, , physical, , length] of table.matchAll(
        /^\s*\d+:\s+(\d+)\.\.\s*(\d+):\s+(\d+)\.\.\s*(\d+):\s+(\d+):/gm,
      )) {
        disk.#extents.push({
          first: Number(first),
          physical: Number(physical),
          length: Number(length),
        });
      }
      return disk;
    } catch (error) {
      await disk[Symbol.asyncDispose]();
      throw error;
    }
  }

  /**
   * From now on the file cannot be read at `offset`, nor what lies behind it on the disk. What the
   * kernel has in memory of the file is forgotten.
   */
  fail(offset: number): void {
    const block = Math.floor(offset / BLOCK);
    const extent = this.#extents.find(
      ({ first, length }) => block >= first && block < first + length,
    );
    if (extent === undefined) throw new Error(`offset ${offset} is a hole of ${this.path}`);
    const at = (extent.physical + block - extent.first) * BLOCK;
    const fd = openSync(this.#backing, "r+");
    const bytes = Buffer.alloc(statSync(this.#backing).size - at);
    readSync(fd, bytes, 0, bytes.length, at);
    this.#tail = { at, bytes };
    ftruncateSync(fd, at);
    closeSync(fd);
    this.forget();
  }

  /** Whether the disk fails somewhere in [offset, offset + length) of the file. */
  isFailing(offset: number, length: number): boolean {
    const cut = (this.#tail?.at ?? Number.POSITIVE_INFINITY) / BLOCK;
    const [from, to] = [Math.floor(offset / BLOCK), Math.ceil((offset + length) / BLOCK)];
    return this.#extents.some((extent) => {
      const start = Math.max(from, extent.first);
      const end = Math.min(to, extent.first + extent.length);
      return start < end && extent.physical + end - extent.first > cut;
    });
  }

  /** Drops the file's pages from the page cache. */
  forget(): void {
    const fd = openSync(this.path, "r");
    sys.fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    closeSync(fd);
  }

  /** The disk can be read again. */
  mend(): void {
    if (this.#tail === null) return;
    const { at, bytes } = this.#tail;
    const fd = openSync(this.#backing, "r+");
    for (let done = 0; done < bytes.length;) {
      done += writeSync(fd, bytes, done, bytes.length - done, at + done);
    }
    fdatasyncSync(fd);
    closeSync(fd);
    this.#tail = null;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.mend();
    if (this.#isMounted) await run("umount", "--lazy", this.#mount);
    rmSync(this.#directory, { recursive: true, force: true });
  }
}

/** Runs a tool and returns what it prints. */
async function run(...argv: string[]): Promise<string> {
  const env = { ...process.env, PATH: `${process.env["PATH"]}:/sbin:/usr/sbin` };
  const child = Bun.spawn(argv, { stdout: "pipe", stderr: "pipe", env });
  const [out, errors, code] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  if (code !== 0) throw new Error(`${argv.join(" ")}: ${errors.trim() || `exit code ${code}`}`);
  return out;
}
