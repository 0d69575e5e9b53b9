/**
 * The memory of a load: everything the Workers share and everything that must outlive fsl. It is a
 * memfd that the target keeps a copy of, so that after fsl's death another fsl can find it in
 * /proc/PID/fd and go on. Run by all threads.
 *
 *   offset        bytes        content
 *   0             4096         header: 32-bit words, see H_*
 *   0x1000        64 KiB       metadata: JSON, UTF-8, length in the header
 *   0x11000       8 KiB        event buffer: struct uffd_msg[256], read but perhaps not yet served
 *   0x13000       8 KiB × 9    counters: one area a Worker (single writer), float64, see C_*
 *   0x25000       256 KiB      fault log: u32 plan-wide page numbers in first-touch order
 *   0x65000       …            per block: data bitmap (bit set = bytes in the file), done bitmap, chunk words (i32),
 *                              time of the first fault that waits for a chunk (float64, ns)
 */
import { fchmodSync } from "node:fs";
import { assert, FslError } from "../errors.ts";
import { alignDown, alignUp, hex } from "../pages.ts";
import { type HotplugWants, KEPT_STATE, type TargetRecord } from "../vmm/target.ts";
import { countBits } from "../bits.ts";
import * as sys from "../sys/native.ts";
import {
  F_ADD_SEALS,
  F_SEAL_GROW,
  F_SEAL_SEAL,
  F_SEAL_SHRINK,
  MAP_SHARED,
  MFD_ALLOW_SEALING,
  MFD_CLOEXEC,
  PROT_READ,
  PROT_WRITE,
  UFFD_MSG,
} from "../sys/abi.ts";

const MAGIC = 0x314c5346; // "FSL1", little-endian
const VERSION = 2;
/** Nobody can cut it short: whoever has it mapped would get SIGBUS. */
export const STATE_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
/** What one view of memory can hold; the state of a guest of many TiB. */
const STATE_LENGTH_MAX = 2 ** 32;

const METADATA_OFFSET = 0x1000;
const METADATA_LENGTH_MAX = 0x10000;
const EVENTS_OFFSET = 0x11000;
/** How many events one read may return: a batch, not a limit on the number of faulting threads. */
export const EVENTS_MAX = 256;
const COUNTERS_OFFSET = 0x13000;
const COUNTERS_LENGTH = 0x2000;
/** One fault Worker and up to eight eager Workers. */
export const WORKERS_MAX = 9;
/** The Worker that reads faults, among those who have counters. */
export const FAULT_WORKER = 0;
/** Counters, and word of the gate, of the main thread: the last eager Worker is not busy yet. */
export const MAIN_THREAD = WORKERS_MAX - 1;
/**
 * What the fault loop does of the eager load has the place of the first eager Worker, which begins when
 * that is over: faults in a chunk of its are another matter than in one that is brought for a fault.
 */
export const EAGER_MOVES = 1;
const FAULT_LOG_OFFSET = 0x25000;
const FAULT_LOG_MAX = 0x10000;
const BITMAPS_OFFSET = 0x65000;

/** Words of the header. */
const H_MAGIC = 0;
const H_VERSION = 1;
const H_METADATA_LENGTH = 2;
const H_PHASE = 3;
const H_EVENT_COUNT = 4;
const H_FAULT_LOG_LENGTH = 5;
const H_EAGER_CURSOR = 6;
const H_STOP = 7;
const H_GATE = 8;
const H_FAILED_PAGES = 9;
const H_BUSY = 10;
/** The last page that could not be read: block index, page index, errno. */
const H_FAILURE = 11;
/** Where the last fault was, plus 1: plan-wide chunk number. The eager load follows it. */
const H_HOT_CHUNK = 14;
const H_REPLAY_CURSOR = 16;
/** No page may be taken from the source any more. */
const H_HALTED = 17;
/** The eager load is to be as fast as it can, whatever its limit. */
const H_HURRIED = 18;
const H_BULK = 19;
/** One word per Worker: it is inside an announced copy. */
const H_INFLIGHT = 32;
const H_LENGTH = 64;

/** How far a load has come; a later fsl reads it. */
export const PHASE_ARMED = 1;
/** The state is being handed over: from here on nothing can be undone. */
export const PHASE_HANDING_OVER = 2;
export const PHASE_STATE_LOADED = 3;
/** The guest was resumed, or is to stay stopped. */
export const PHASE_RUNNING = 4;
export const PHASE_FINISHED = 5;

/**
 * Bytes of a chunk, the unit of the eager load: what one page table page reaches, and a huge page.
 */
export const CHUNK_LENGTH = 0x200000;
/** Chunk words. Nobody has touched the chunk: it may come in one move. */
export const CHUNK_FREE = 0;
/** Some of its pages came one by one: the rest has to be copied. */
export const CHUNK_SPLIT = 1;
/** The eager load is through with it: it came page by page, or as a huge page. */
export const CHUNK_DONE = 2;
export const CHUNK_MOVED = 3;
/**
 * Plus the index of the Worker that has it in hand: it comes as a whole, faults in it wait for
 * that.
 */
export const CHUNK_MOVING = 16;
/** Plus the index of the Worker that copies what is missing; faults are served meanwhile. */
export const CHUNK_COPYING = 32;

/** Counters of a Worker: float64 index within its area. Times are in ns. */
export const C_FAULTS = 0;
export const C_FAULT_PAGES = 1;
export const C_EAGER_PAGES = 2;
export const C_ZERO_PAGES = 3;
export const C_REDUNDANT_PAGES = 4;
export const C_RETRIES = 5;
export const C_LATENCY_SUM = 6;
export const C_LATENCY_MAX = 7;
export const C_REMOVED_PAGES = 8;
export const C_BATCHES = 9;
/** Chunks that came as a whole; faults that waited for such a one. */
export const C_MOVED_CHUNKS = 11;
export const C_CHUNK_FAULTS = 12;
const C_HISTOGRAM = 64;
/** Latency histogram: 16 buckets per power of two of ns, from 256 ns to 2^38 ns. */
const HISTOGRAM_SHIFT = 8;
const HISTOGRAM_BUCKETS = 30 * 16;

/** One lazily loaded block, as the load sees it. Structured-cloneable; kept in the metadata. */
export interface StateBlock {
  readonly idstr: string;
  /** Address of page 0 in the target, bytes. */
  readonly hostAddr: number;
  readonly usedLength: number;
  /** Bytes per bit of the bitmaps: the snapshot's page. */
  readonly pageSize: number;
  /** Bytes per host page: 4096, or 2 MiB and more for hugetlb. A multiple of `pageSize`. */
  readonly hostPageSize: number;
  /** File offset of page 0 in the snapshot. */
  readonly pagesOffset: number;
  /** Whole huge pages can be moved into it: private anonymous memory, and the kernel knows how. */
  readonly movable: boolean;
}

/** What a later fsl needs in order to go on. JSON. */
export interface StateMetadata {
  readonly target: TargetRecord;
  /** The guest is to stay stopped after its state is loaded. */
  readonly paused: boolean;
  readonly snapshotPath: string;
  readonly snapshotIdentity: Readonly<Record<string, string | number>>;
  readonly blocks: readonly StateBlock[];
  /**
   * Half-open address ranges that stay registered once the zero extents are let go: [start, end, start, end, …].
   */
  readonly registered: readonly number[];
  /** EVENT_REMOVE was asked for: the guest can give memory back. */
  readonly canDiscard: boolean;
  /** Devices that are looked out for while RAM comes in. */
  readonly watched: HotplugWants;
  /** See recorded-serving.ts. */
  readonly serving: unknown;
  readonly source: unknown;
}

/** How a Worker gets at the state that the main thread made. */
export interface StateHandle {
  readonly address: number;
  readonly length: number;
  readonly metadata: StateMetadata;
}

export class BlockState {
  readonly block: StateBlock;
  readonly index: number;
  readonly pageCount: number;
  /** Plan-wide number of page 0. */
  readonly firstPage: number;
  readonly data: Int32Array;
  readonly done: Int32Array;
  /** Plan-wide number of chunk 0. */
  readonly firstChunk: number;
  /**
   * One word a chunk: CHUNK_*. Chunk 0 holds the block's first address; chunks are aligned in the
   * target.
   */
  readonly chunks: Int32Array;
  /** When the first fault came that waits for a chunk to be moved; 0 = none waits. */
  readonly chunkFaultNs: Float64Array;
  readonly #chunkPages: number;
  /** Pages of chunk 0 that lie before the block. */
  readonly #leadPages: number;

  constructor(
    block: StateBlock,
    index: number,
    firstPage: number,
    firstChunk: number,
    buffer: ArrayBuffer,
    offset: number,
  ) {
    this.block = block;
    this.index = index;
    this.pageCount = block.usedLength / block.pageSize;
    this.firstPage = firstPage;
    this.firstChunk = firstChunk;
    const bitmap = bitmapLength(block);
    const chunkCount = chunkCountOf(block);
    this.data = new Int32Array(buffer, offset, bitmap / 4);
    this.done = new Int32Array(buffer, offset + bitmap, bitmap / 4);
    this.chunks = new Int32Array(buffer, offset + 2 * bitmap, chunkCount);
    const timesOffset = offset + 2 * bitmap + alignUp(chunkCount * 4, 64);
    this.chunkFaultNs = new Float64Array(buffer, timesOffset, chunkCount);
    this.#chunkPages = CHUNK_LENGTH / block.pageSize;
    this.#leadPages = (block.hostAddr % CHUNK_LENGTH) / block.pageSize;
  }

  /** The chunk that a page lies in. */
  chunkOf(pageIndex: number): number {
    return Math.floor((pageIndex + this.#leadPages) / this.#chunkPages);
  }

  /** First page of a chunk that is in the block, and the end of its pages. */
  chunkStart(chunk: number): number {
    return Math.max(0, chunk * this.#chunkPages - this.#leadPages);
  }
  chunkEnd(chunk: number): number {
    return Math.min(this.pageCount, (chunk + 1) * this.#chunkPages - this.#leadPages);
  }

  /**
   * Before a page of the chunk is brought alone. @returns false when a Worker is bringing the chunk
   * as a whole
   */
  splitChunk(pageIndex: number): boolean {
    const word = Atomics.compareExchange(
      this.chunks,
      this.chunkOf(pageIndex),
      CHUNK_FREE,
      CHUNK_SPLIT,
    );
    return word < CHUNK_MOVING || word >= CHUNK_COPYING;
  }

  /** What a dead Worker had in hand is nobody's; null: of all Workers. @returns its chunks */
  abandonChunks(workerIndex: number | null): number[] {
    const abandoned: number[] = [];
    for (let chunk = 0; chunk < this.chunks.length; chunk += 1) {
      const word = Atomics.load(this.chunks, chunk);
      if (word < CHUNK_MOVING) continue;
      if (workerIndex !== null && word % CHUNK_MOVING !== workerIndex) continue;
      Atomics.store(this.chunks, chunk, CHUNK_SPLIT);
      abandoned.push(chunk);
    }
    return abandoned;
  }
}

function chunkCountOf(block: StateBlock): number {
  const end = block.hostAddr + block.usedLength;
  return Math.ceil((end - alignDown(block.hostAddr, CHUNK_LENGTH)) / CHUNK_LENGTH);
}

/** Bytes of all that the state holds of a block. */
function blockLength(block: StateBlock): number {
  const chunkCount = chunkCountOf(block);
  return 2 * bitmapLength(block) + alignUp(chunkCount * 4, 64) + alignUp(chunkCount * 8, 64);
}

function bitmapLength(block: StateBlock): number {
  return alignUp(Math.ceil(block.usedLength / block.pageSize / 8), 64);
}

function stateLength(blocks: readonly StateBlock[]): number {
  let length = BITMAPS_OFFSET;
  for (const block of blocks) length += blockLength(block);
  return alignUp(length, 4096);
}

export class LoadState {
  readonly blocks: readonly BlockState[];
  readonly #place: Omit<StateHandle, "metadata">;
  #metadata: StateMetadata;
  readonly #buffer: ArrayBuffer;
  readonly #header: Int32Array;

  private constructor(handle: StateHandle) {
    const { address, length, metadata } = handle;
    this.#place = { address, length };
    this.#metadata = metadata;
    this.#buffer = sys.view(address, length);
    this.#header = new Int32Array(this.#buffer, 0, H_LENGTH);
    const blocks: BlockState[] = [];
    let offset = BITMAPS_OFFSET;
    let firstPage = 0;
    let firstChunk = 0;
    for (const [index, block] of handle.metadata.blocks.entries()) {
      const state = new BlockState(block, index, firstPage, firstChunk, this.#buffer, offset);
      blocks.push(state);
      firstChunk += state.chunks.length;
      offset += blockLength(block);
      firstPage += state.pageCount;
    }
    this.blocks = blocks;
  }

  /** Makes a fresh state and the memfd that holds it. The caller owns the descriptor. */
  static create(metadata: StateMetadata): { state: LoadState; fd: number } {
    const length = stateLength(metadata.blocks);
    const text = encodeMetadata(metadata);
    const fd = sys.check(
      sys.memfdCreate(KEPT_STATE, MFD_CLOEXEC | MFD_ALLOW_SEALING),
      "memfd_create of the load state",
    );
    // Not to be opened by QEMU's user: a later fsl believes what it says (left-state.ts).
    fchmodSync(fd, 0o600);
    sys.check(sys.ftruncate(fd, length), "ftruncate of the load state");
    sys.check(sys.fcntl(fd, F_ADD_SEALS, STATE_SEALS), "F_ADD_SEALS of the load state");
    const state = new LoadState({ address: mapState(fd, length), length, metadata });
    state.#write(text);
    state.#header[H_VERSION] = VERSION;
    state.#header[H_PHASE] = PHASE_ARMED;
    state.#header[H_MAGIC] = MAGIC;
    return { state, fd };
  }

  /**
   * Opens the state that another fsl made.
   * @param takeOver that fsl is dead, and this one goes on; false: only look
   * @throws FslError TARGET_LOST when it is not a state of this version
   */
  static adopt(fd: number, fdLength: number, takeOver: boolean): LoadState {
    if (fdLength < BITMAPS_OFFSET || fdLength > STATE_LENGTH_MAX) {
      throw new FslError(
        "TARGET_LOST",
        `load state: expected at least ${BITMAPS_OFFSET} bytes, found ${fdLength}`,
      );
    }
    const address = mapState(fd, fdLength);
    try {
      return LoadState.#adoptMapped(address, fdLength, takeOver);
    } catch (error) {
      sys.munmap(address, fdLength);
      throw error;
    }
  }

  static #adoptMapped(address: number, fdLength: number, takeOver: boolean): LoadState {
    const buffer = sys.view(address, fdLength);
    const header = new Int32Array(buffer, 0, H_LENGTH);
    if (header[H_MAGIC] !== MAGIC || header[H_VERSION] !== VERSION) {
      throw new FslError(
        "TARGET_LOST",
        `load state: expected magic ${hex(MAGIC)} version ${VERSION}, ` +
          `found ${hex((header[H_MAGIC] ?? 0) >>> 0)} version ${header[H_VERSION]}`,
      );
    }
    const textLength = header[H_METADATA_LENGTH] ?? 0;
    if (textLength <= 0 || textLength > METADATA_LENGTH_MAX) {
      throw new FslError("TARGET_LOST", `load state: metadata of ${textLength} bytes`);
    }
    const text = new Uint8Array(buffer.slice(METADATA_OFFSET, METADATA_OFFSET + textLength));
    const metadata = parseMetadata(new TextDecoder().decode(text));
    if (stateLength(metadata.blocks) !== fdLength) {
      throw new FslError("TARGET_LOST", `load state: ${fdLength} bytes do not fit its blocks`);
    }
    const state = new LoadState({ address, length: fdLength, metadata });
    if (!takeOver) return state;
    // Whoever was inside an announced copy, or told to stop, is dead.
    state.#header.fill(0, H_INFLIGHT, H_INFLIGHT + WORKERS_MAX);
    state.#header[H_GATE] = 0;
    state.#header[H_STOP] = 0;
    state.#header[H_FAILED_PAGES] = 0;
    state.#header[H_HALTED] = 0;
    state.#header[H_HURRIED] = 0;
    for (const block of state.blocks) block.abandonChunks(null);
    return state;
  }

  /**
   * Another description of the same: of who the target is, where nothing that the memory's layout or a
   * Worker depends on is another.
   */
  describe(metadata: StateMetadata): void {
    const text = encodeMetadata(metadata);
    this.#metadata = metadata;
    this.#write(text);
  }

  #write(text: Uint8Array): void {
    new Uint8Array(this.#buffer, METADATA_OFFSET, text.length).set(text);
    this.#header[H_METADATA_LENGTH] = text.length;
  }

  get metadata(): StateMetadata {
    return this.#metadata;
  }

  get handle(): StateHandle {
    return { ...this.#place, metadata: this.#metadata };
  }

  /** The same memory, seen from a Worker. */
  static attach(handle: StateHandle): LoadState {
    return new LoadState(handle);
  }

  /**
   * Releases the mapping; only the thread that made or adopted the state, after every Worker has
   * ended.
   */
  unmap(): void {
    sys.munmap(this.#place.address, this.#place.length);
  }

  get phase(): number {
    return Atomics.load(this.#header, H_PHASE);
  }
  set phase(value: number) {
    Atomics.store(this.#header, H_PHASE, value);
  }

  /** Address of the event buffer, and a view of it. */
  get eventsAddress(): number {
    return this.#place.address + EVENTS_OFFSET;
  }
  eventsView(): DataView<ArrayBuffer> {
    return new DataView(this.#buffer, EVENTS_OFFSET, EVENTS_MAX * UFFD_MSG.BYTES);
  }
  /** Events in the buffer that are not served yet. */
  get eventCount(): number {
    return Atomics.load(this.#header, H_EVENT_COUNT);
  }
  set eventCount(value: number) {
    Atomics.store(this.#header, H_EVENT_COUNT, value);
  }

  /** Everybody is to end at once. */
  get stopped(): boolean {
    return Atomics.load(this.#header, H_STOP) !== 0;
  }
  stop(): void {
    Atomics.store(this.#header, H_STOP, 1);
  }

  /** The fault loop says where it serves; an eager Worker takes that, once. -1 = nothing new. */
  set hotChunk(planChunk: number) {
    Atomics.store(this.#header, H_HOT_CHUNK, planChunk + 1);
  }
  takeHotChunk(): number {
    return Atomics.exchange(this.#header, H_HOT_CHUNK, 0) - 1;
  }

  /**
   * The source's bytes are not the snapshot's any more: data pages that are missing stay missing.
   */
  get halted(): boolean {
    return Atomics.load(this.#header, H_HALTED) !== 0;
  }
  halt(): void {
    Atomics.store(this.#header, H_HALTED, 1);
  }

  goOn(): void {
    Atomics.store(this.#header, H_HALTED, 0);
  }

  /** Whoever limits the eager load is told to forget the limit. */
  get hurried(): boolean {
    return Atomics.load(this.#header, H_HURRIED) !== 0;
  }
  hurry(): void {
    Atomics.store(this.#header, H_HURRIED, 1);
  }

  /** The guest waits for memory rather than for the CPU: the fault loop has found that it reads on and on. */
  get isBulk(): boolean {
    return Atomics.load(this.#header, H_BULK) !== 0;
  }
  setBulk(): void {
    Atomics.store(this.#header, H_BULK, 1);
  }

  /** Takes the next chunk number of the eager order. */
  takeChunk(): number {
    return Atomics.add(this.#header, H_EAGER_CURSOR, 1);
  }
  /** How many were taken; more than there are, once nothing is left. */
  get chunksTaken(): number {
    return Atomics.load(this.#header, H_EAGER_CURSOR);
  }
  /** Takes the next run number of the working set. */
  takeRun(): number {
    return Atomics.add(this.#header, H_REPLAY_CURSOR, 1);
  }
  resetChunks(): void {
    Atomics.store(this.#header, H_EAGER_CURSOR, 0);
  }

  /**
   * The gate between the reader of events and the eager Workers (only where the guest can give
   * memory back). A copy that was decided before a REMOVE was read must not land after it: eager
   * copies announce themselves, and the reader closes the gate, waits until none is announced,
   * reads, marks, opens.
   */
  enterCopy(workerIndex: number): boolean {
    Atomics.store(this.#header, H_INFLIGHT + workerIndex, 1);
    if (Atomics.load(this.#header, H_GATE) === 0) return true;
    this.leaveCopy(workerIndex);
    return false;
  }
  /** Also called for a Worker that has died inside. */
  leaveCopy(workerIndex: number): void {
    Atomics.store(this.#header, H_INFLIGHT + workerIndex, 0);
  }
  closeGate(): void {
    Atomics.store(this.#header, H_GATE, 1);
  }
  get copiesInFlight(): boolean {
    for (let index = 0; index < WORKERS_MAX; index += 1) {
      if (Atomics.load(this.#header, H_INFLIGHT + index) !== 0) return true;
    }
    return false;
  }
  openGate(): void {
    Atomics.store(this.#header, H_GATE, 0);
  }

  /** The fault loop has a batch in hand. */
  get busy(): boolean {
    return Atomics.load(this.#header, H_BUSY) !== 0;
  }
  set busy(value: boolean) {
    Atomics.store(this.#header, H_BUSY, value ? 1 : 0);
  }

  /** The page that was last found unreadable, whatever became of it; null when there was none. */
  get lastFailure(): {
    idstr: string;
    pageIndex: number;
    fileOffset: number;
    errno: number;
  } | null {
    const errno = Atomics.load(this.#header, H_FAILURE + 2);
    const block = this.blocks[Atomics.load(this.#header, H_FAILURE)]?.block;
    if (errno === 0 || block === undefined) return null;
    const pageIndex = Atomics.load(this.#header, H_FAILURE + 1);
    const fileOffset = block.pagesOffset + pageIndex * block.pageSize;
    return { idstr: block.idstr, pageIndex, fileOffset, errno };
  }
  set lastFailure(failure: { idstr: string; pageIndex: number; errno: number }) {
    const index = this.blocks.findIndex(({ block }) => block.idstr === failure.idstr);
    Atomics.store(this.#header, H_FAILURE, index);
    Atomics.store(this.#header, H_FAILURE + 1, failure.pageIndex);
    Atomics.store(this.#header, H_FAILURE + 2, failure.errno);
  }

  /** Pages that could not be read and are waited for now. */
  get failedPages(): number {
    return Atomics.load(this.#header, H_FAILED_PAGES);
  }
  set failedPages(value: number) {
    Atomics.store(this.#header, H_FAILED_PAGES, value);
  }

  /** Bytes that the snapshot has of all blocks. Counted anew each time. */
  get dataBytes(): number {
    return this.blocks.reduce((sum, { data, block }) => sum + countBits(data) * block.pageSize, 0);
  }

  /** The block that a plan-wide chunk number lies in. */
  blockOfChunk(planChunk: number): BlockState | undefined {
    // Asked for each chunk: no closure is made.
    for (let index = this.blocks.length - 1; index >= 0; index -= 1) {
      const block = this.blocks[index];
      if (block === undefined || block.firstChunk > planChunk) continue;
      return planChunk - block.firstChunk < block.chunks.length ? block : undefined;
    }
    return undefined;
  }

  counters(workerIndex: number): Float64Array {
    assert(workerIndex >= 0 && workerIndex < WORKERS_MAX, `worker index ${workerIndex}`);
    const offset = COUNTERS_OFFSET + workerIndex * COUNTERS_LENGTH;
    return new Float64Array(this.#buffer, offset, COUNTERS_LENGTH / 8);
  }

  /** The fault log: plan-wide page numbers. Written by the fault loop only. */
  faultLog(): Uint32Array {
    return new Uint32Array(this.#buffer, FAULT_LOG_OFFSET, FAULT_LOG_MAX);
  }
  get faultLogLength(): number {
    return Atomics.load(this.#header, H_FAULT_LOG_LENGTH);
  }
  set faultLogLength(value: number) {
    Atomics.store(this.#header, H_FAULT_LOG_LENGTH, value);
  }
}

function encodeMetadata(metadata: StateMetadata): Uint8Array {
  const text = new TextEncoder().encode(JSON.stringify(metadata));
  assert(text.length <= METADATA_LENGTH_MAX, `load metadata has ${text.length} bytes`);
  return text;
}

/** @throws FslError TARGET_LOST for a text that no fsl of this version has written */
function parseMetadata(text: string): StateMetadata {
  try {
    const value = JSON.parse(text) as Partial<StateMetadata> | null;
    if (value !== null && isMetadata(value)) return value;
  } catch {
    // Not even JSON: the same thing to whoever asks.
  }
  throw new FslError("TARGET_LOST", "load state: its metadata is damaged");
}

function isMetadata(value: Partial<StateMetadata>): value is StateMetadata {
  const { target, paused, snapshotPath, snapshotIdentity, blocks, registered } = value;
  const { canDiscard, watched, source } = value;
  return (
    isObject(target) &&
    isWhole(target.pid) &&
    (target.controlPath === null || isPath(target.controlPath)) &&
    [target.isControlPrivate, target.isControlOwn, target.endsWithFsl].every(isBoolean) &&
    isPath(snapshotPath) &&
    isObject(snapshotIdentity) &&
    [paused, canDiscard].every(isBoolean) &&
    isObject(watched) &&
    [watched.balloons, watched.helpers].every(isBoolean) &&
    isObject(source) &&
    Array.isArray(blocks) &&
    blocks.every(isBlock) &&
    Array.isArray(registered) &&
    areRangesOf(blocks, registered)
  );
}

function isBlock(value: unknown): value is StateBlock {
  const block = value as StateBlock | null;
  if (typeof block?.idstr !== "string" || !isBoolean(block.movable)) return false;
  const { hostAddr, usedLength, pageSize, hostPageSize, pagesOffset } = block;
  return (
    [hostAddr, usedLength, pageSize, hostPageSize, pagesOffset].every(isWhole) &&
    pageSize > 0 &&
    hostAddr % pageSize === 0 &&
    usedLength % pageSize === 0 &&
    hostPageSize >= pageSize &&
    hostPageSize % pageSize === 0
  );
}

/** [start, end, start, end, …], each within a block. */
function areRangesOf(blocks: readonly StateBlock[], registered: readonly unknown[]): boolean {
  if (registered.length % 2 !== 0 || !registered.every(isWhole)) return false;
  const addrs = registered as readonly number[];
  return addrs.every((startAddr, index) => {
    const endAddr = addrs[index + 1] ?? 0;
    if (index % 2 !== 0) return true;
    return blocks.some(({ hostAddr, usedLength, pageSize }) => {
      const isInside = startAddr >= hostAddr && endAddr <= hostAddr + usedLength;
      return (
        isInside && startAddr < endAddr && [startAddr, endAddr].every((a) => a % pageSize === 0)
      );
    });
  });
}

function isWhole(value: unknown): boolean {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

function isBoolean(value: unknown): boolean {
  return typeof value === "boolean";
}

function isObject(value: unknown): value is object {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Absolute: this process may have another working directory than the one that wrote it. */
function isPath(value: unknown): boolean {
  return typeof value === "string" && value.startsWith("/") && !value.includes("\0");
}

function mapState(fd: number, length: number): number {
  return sys.check(
    sys.mmap(0, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0),
    "mmap of the load state",
  );
}

/** Bucket of a latency in ns. */
function histogramBucket(latencyNs: number): number {
  const value = Math.min(latencyNs, 2 ** 38 - 1) >= 256 ? Math.min(latencyNs, 2 ** 38 - 1) : 256;
  const exponent = Math.floor(Math.log2(value));
  const fraction = Math.floor((value / 2 ** exponent - 1) * 16);
  return (exponent - HISTOGRAM_SHIFT) * 16 + fraction;
}

/** Lower edge of a bucket in ns. */
export function histogramEdgeNs(bucket: number): number {
  return 2 ** (Math.floor(bucket / 16) + HISTOGRAM_SHIFT) * (1 + (bucket % 16) / 16);
}

/** Adds one fault to a Worker's counters. `counters` is written by one thread only. */
export function recordLatency(counters: Float64Array, latencyNs: number): void {
  counters[C_LATENCY_SUM] = (counters[C_LATENCY_SUM] ?? 0) + latencyNs;
  if (latencyNs > (counters[C_LATENCY_MAX] ?? 0)) counters[C_LATENCY_MAX] = latencyNs;
  const bucket = C_HISTOGRAM + histogramBucket(latencyNs);
  counters[bucket] = (counters[bucket] ?? 0) + 1;
}

/** The histogram of a Worker: count per bucket. */
export function histogramOf(counters: Float64Array): Float64Array {
  return counters.subarray(C_HISTOGRAM, C_HISTOGRAM + HISTOGRAM_BUCKETS);
}

export function add(counters: Float64Array, index: number, amount: number): void {
  counters[index] = (counters[index] ?? 0) + amount;
}
