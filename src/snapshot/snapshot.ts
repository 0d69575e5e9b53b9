/**
 * A snapshot file, opened, parsed and checked. Only metadata is read: opening costs a few reads of a few KiB, whatever
 * the size of the guest. The descriptor stays open, so that everything later (bitmaps, pages, seed) is of this very
 * file even if its name is given to another one.
 */
import { closeSync, constants, fstatSync, openSync } from "node:fs";

import { assert, FslError } from "../errors.ts";
import { FileByteSource, systemReason, type ByteSource } from "./byte-reader.ts";
import { readLibvirtHeader, type LibvirtHeader } from "./libvirt.ts";
import type { RAMBlock } from "./mapped-ram.ts";
import { readMigrationStream, type MigrationStream } from "./migration-stream.ts";
import { PageBitmap } from "./page-bitmap.ts";

export interface OpenSnapshotOptions {
  /**
   * File offset in bytes of the stream, when it was saved with `file:path,offset=N`. Absent: 0, or behind libvirt's
   * header when there is one.
   */
  readonly offset?: number;
}

/** Tells this file from another one, or from the same one after it was written to. Structured-cloneable. */
export interface FileIdentity {
  readonly dev: string;
  readonly ino: string;
  /** Bytes. */
  readonly size: number;
  /** Nanoseconds since 1970. */
  readonly mtimeNs: string;
}

/** What the bytes say, without a file: the result of `parseSnapshot`. */
export interface SnapshotLayout extends MigrationStream {
  /** File offset in bytes of the stream's magic. */
  readonly streamOffset: number;
  /** Length of the file in bytes. */
  readonly fileLength: number;
  /** Null unless libvirt wrote the file. */
  readonly libvirt: LibvirtHeader | null;
}

/**
 * Parses a snapshot from any byte source.
 * @throws FslError SNAPSHOT_FORMAT, SNAPSHOT_UNSUPPORTED
 */
export function parseSnapshot(
  source: ByteSource,
  options: OpenSnapshotOptions = {},
): SnapshotLayout {
  const libvirt = options.offset === undefined ? readLibvirtHeader(source) : null;
  const streamOffset = options.offset ?? libvirt?.streamOffset ?? 0;
  assert(Number.isSafeInteger(streamOffset) && streamOffset >= 0, `stream offset ${streamOffset}`);
  return {
    ...readMigrationStream(source, streamOffset),
    streamOffset,
    fileLength: source.byteLength,
    libvirt,
  };
}

/**
 * Opens, parses and checks a mapped-ram snapshot.
 * @throws FslError SNAPSHOT_OPEN when the file is missing, unreadable or no regular file; SNAPSHOT_FORMAT when it is
 * damaged or unfinished; SNAPSHOT_UNSUPPORTED when it is sound but nothing that fsl loads
 */
export function openSnapshot(path: string, options: OpenSnapshotOptions = {}): Snapshot {
  const fd = openFile(path);
  try {
    const identity = identify(fd, path);
    const source = new FileByteSource(fd, path, identity.size);
    return new Snapshot(path, fd, identity, source, parseSnapshot(source, options));
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/** Close it when done: `using snapshot = openSnapshot(path)`. */
export class Snapshot {
  readonly path: string;
  readonly identity: FileIdentity;
  readonly layout: SnapshotLayout;
  readonly #source: ByteSource;
  #fd: number;

  constructor(
    path: string,
    fd: number,
    identity: FileIdentity,
    source: ByteSource,
    layout: SnapshotLayout,
  ) {
    this.path = path;
    this.identity = identity;
    this.layout = layout;
    this.#source = source;
    this.#fd = fd;
  }

  /** Descriptor of the file, O_RDONLY | O_CLOEXEC; owned by this object. Read it by offsets, not by its position. */
  get fd(): number {
    assert(this.#fd >= 0, `snapshot ${this.path} is closed`);
    return this.#fd;
  }

  get fileLength(): number {
    return this.layout.fileLength;
  }
  get streamOffset(): number {
    return this.layout.streamOffset;
  }
  get machineType(): string {
    return this.layout.machineType;
  }
  get capabilities(): readonly string[] {
    return this.layout.capabilities;
  }
  get uuid(): string | null {
    return this.layout.uuid;
  }
  get targetPageBits(): number | null {
    return this.layout.targetPageBits;
  }
  get blocks(): readonly RAMBlock[] {
    return this.layout.blocks;
  }
  get sections(): SnapshotLayout["sections"] {
    return this.layout.sections;
  }
  get vmdescription(): SnapshotLayout["vmdescription"] {
    return this.layout.vmdescription;
  }
  get globalState(): SnapshotLayout["globalState"] {
    return this.layout.globalState;
  }
  get libvirt(): LibvirtHeader | null {
    return this.layout.libvirt;
  }

  /**
   * Reads the page bitmap of one block; not kept here.
   * @param block one of `blocks`, saved
   * @throws FslError SNAPSHOT_OPEN, SNAPSHOT_FORMAT when the file can no longer be read
   */
  pageBitmap(block: RAMBlock): PageBitmap {
    assert(this.#fd >= 0, `snapshot ${this.path} is closed`);
    return readPageBitmap(this.#source, block);
  }

  close(): void {
    if (this.#fd < 0) return;
    closeSync(this.#fd);
    this.#fd = -1;
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/** The bitmap of a block from any byte source. @param block a saved block of the same source */
export function readPageBitmap(source: ByteSource, block: RAMBlock): PageBitmap {
  assert(!block.notSaved, `block ${block.idstr} has no bitmap`);
  return new PageBitmap(source.read(block.bitmapOffset, block.bitmapLength), block.pageCount);
}

function openFile(path: string): number {
  // O_NONBLOCK: a FIFO without a writer would keep the open waiting; regular files ignore it.
  const flags = constants.O_RDONLY | O_CLOEXEC | constants.O_NONBLOCK;
  try {
    return openSync(path, flags);
  } catch (cause) {
    const reason = systemReason(cause);
    throw new FslError(
      "SNAPSHOT_OPEN",
      `snapshot: cannot open: ${reason}${reason === "ENOENT" ? ", it does not exist" : ""} (${path})`,
      { path, reason },
      cause,
    );
  }
}

/** Not in node:fs; the same number on x86_64 and arm64 Linux. @source include/uapi/asm-generic/fcntl.h */
const O_CLOEXEC = 0o2000000;

function identify(fd: number, path: string): FileIdentity {
  const stat = fstatSync(fd, { bigint: true });
  if (!stat.isFile()) {
    const found = stat.isDirectory()
      ? "a directory"
      : stat.isBlockDevice()
        ? "a block device"
        : "something else";
    const message = `snapshot: expected a regular file, found ${found} (${path})`;
    throw new FslError("SNAPSHOT_OPEN", message, { path, expected: "a regular file", found });
  }
  return {
    dev: stat.dev.toString(),
    ino: stat.ino.toString(),
    size: Number(stat.size),
    mtimeNs: stat.mtimeNs.toString(),
  };
}
