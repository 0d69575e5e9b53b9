/**
 * A rehearsal of the fault loop and of the first steps of its eager load, on a load state of our own,
 * while the target is still starting: code that runs for the first time takes a millisecond, and the first
 * faults come from the target's loading of its devices and from the guest's first steps.
 */
import { writeSync } from "node:fs";
import {
  EFD_CLOEXEC,
  HELPER_REPLY,
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  MFD_CLOEXEC,
  O_CLOEXEC,
  O_NONBLOCK,
  PROT_READ,
  PROT_WRITE,
  REGISTER_MISSING,
  SOCK_SEQPACKET,
  UFFD_EVENT_PAGEFAULT,
  UFFD_MSG,
  UFFD_USER_MODE_ONLY,
} from "../sys/abi.ts";
import { HOST_PAGE_LENGTH } from "../sys/host-pages.ts";
import * as sys from "../sys/native.ts";
import { createPageSource } from "../source/snapshot-source.ts";
import { Uffd } from "../uffd/uffd.ts";
import { alignUp } from "../pages.ts";
import { setRange } from "../bits.ts";
import { EagerMoves } from "./eager-moves.ts";
import { FaultLoop } from "./fault-loop.ts";
import {
  C_EAGER_PAGES,
  C_FAULTS,
  CHUNK_LENGTH,
  EAGER_MOVES,
  FAULT_WORKER,
  LoadState,
  type StateBlock,
} from "./state.ts";

const PAGE = 4096;
/** One chunk for the faults, one for the eager load. */
const CHUNKS = 2;
const LENGTH = CHUNKS * CHUNK_LENGTH;
/** Pages that have faults, of the first chunk. */
const PAGES = 64;
/** As many pages of a chunk have bytes in the file; the others are zero. */
const DATA_PAGES = 48;
/** Every so-many-th page has a fault. */
const FAULT_EVERY = 8;
const CLUSTER_PAGES = 2;
const NO_RUNS = new Int32Array(0);
/** No process has it. */
const NO_PID = 2 ** 30;
/** More than the eager load has to do here. */
const STEPS_MAX = 16;

export interface Rehearsed {
  readonly faults: number;
  readonly eagerPages: number;
}

const NOTHING: Rehearsed = { faults: 0, eagerPages: 0 };

/**
 * Serves a few made-up faults, and loads a chunk. Runs in the fault Worker.
 * @returns how much; nothing where a process may not have a userfaultfd, or the host has other pages than a snapshot
 */
export function rehearseFaults(): Rehearsed {
  // With pages of another length there is nothing to move, and a fault brings several of the snapshot's.
  if (HOST_PAGE_LENGTH !== PAGE) return NOTHING;
  const uffdFd = sys.userfaultfd(O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
  if (uffdFd < 0) return NOTHING;
  const fileFd = sys.memfdCreate("fsl-rehearsal", MFD_CLOEXEC);
  // Readable from the start: the loop ends when it has served what it finds.
  const stopFd = sys.eventfd(1, EFD_CLOEXEC);
  const sockets = new Int32Array(2).fill(-1);
  const [length, flags] = [LENGTH + CHUNK_LENGTH, MAP_PRIVATE | MAP_ANONYMOUS];
  const memory = sys.mmap(0, length, PROT_READ | PROT_WRITE, flags, -1, 0);
  try {
    const isReady = fileFd >= 0 && stopFd >= 0 && memory > 0;
    if (!isReady || sys.ftruncate(fileFd, LENGTH) < 0) return NOTHING;
    if (sys.socketpair(SOCK_SEQPACKET, sockets) < 0) return NOTHING;
    const aligned = alignUp(memory, CHUNK_LENGTH);
    return play(new Uffd(uffdFd), fileFd, stopFd, aligned, sockets);
  } finally {
    for (const fd of [uffdFd, fileFd, stopFd, ...sockets]) if (fd >= 0) sys.close(fd);
    if (memory > 0) sys.munmap(memory, length);
  }
}

function play(
  uffd: Uffd,
  fileFd: number,
  stopFd: number,
  memory: number,
  [helperFd = -1, peerFd = -1]: Int32Array,
): Rehearsed {
  uffd.api(0);
  uffd.register(memory, LENGTH, REGISTER_MISSING);
  const block = { ...BLOCK, hostAddr: memory, usedLength: LENGTH, movable: true };
  const { state, fd } = rehearsalState(block);
  const source = createPageSource({ fd: fileFd }, [block]);
  try {
    const chunkPages = CHUNK_LENGTH / PAGE;
    // Only what is in the page cache is copied beside faults.
    const bytes = new Uint8Array(DATA_PAGES * PAGE);
    for (let at = 0; at < LENGTH; at += CHUNK_LENGTH) writeSync(fileFd, bytes, 0, bytes.length, at);
    for (const { data } of state.blocks) {
      setRange(data, 0, DATA_PAGES);
      setRange(data, chunkPages, chunkPages + DATA_PAGES);
    }
    const events = state.eventsView();
    for (let page = 0; page < PAGES; page += FAULT_EVERY) {
      const at = (page / FAULT_EVERY) * UFFD_MSG.BYTES;
      events.setUint8(at, UFFD_EVENT_PAGEFAULT);
      const addressAt = at + UFFD_MSG.FAULT_ADDRESS;
      events.setBigUint64(addressAt, BigInt(memory + page * PAGE), true);
    }
    // As a loop finds them that takes over from one that died.
    state.eventCount = PAGES / FAULT_EVERY;
    const helper = {
      ...{ fd: helperFd, pid: NO_PID, uffdFd: -1, fileFd: 0 },
      ...{ stagingAddr: CHUNK_LENGTH, stagingLength: CHUNK_LENGTH },
    };
    const start = {
      ...{ helpers: [helper], goFd: -1, pieceLength: CHUNK_LENGTH },
      ...{ order: Uint32Array.of(1), replay: NO_RUNS, nice: 0 },
    };
    const moves = new EagerMoves({ uffd, source, state, fileFd, start });
    const loop = new FaultLoop({
      uffd,
      source,
      state,
      counters: state.counters(FAULT_WORKER),
      stopFd,
      pidfd: stopFd,
      clusterPages: CLUSTER_PAGES,
      movers: [],
      helperPids: [],
      replay: Int32Array.of(0, 1, 2),
      moves,
      onFailure: () => {},
      onRecovered: () => {},
    });
    loop.run();
    loop.close();
    // The helper has made none of its calls: the chunk is copied.
    const answer = new Int32Array(HELPER_REPLY.RESULTS / 4);
    sys.send(peerFd, answer, HELPER_REPLY.RESULTS, new Int32Array(0), 0, 0);
    moves.begin(1);
    for (let step = 0; step < STEPS_MAX && moves.step() === false; step += 1) {
      if (step === 0) moves.advance();
      moves.look();
    }
    moves.close();
    const faults = state.counters(FAULT_WORKER)[C_FAULTS] ?? 0;
    return { faults, eagerPages: state.counters(EAGER_MOVES)[C_EAGER_PAGES] ?? 0 };
  } finally {
    source.close();
    state.unmap();
    sys.close(fd);
  }
}

const BLOCK = { idstr: "rehearsal", pageSize: PAGE, hostPageSize: PAGE, pagesOffset: 0 };

function rehearsalState(block: StateBlock): { state: LoadState; fd: number } {
  const target = {
    pid: 0,
    controlPath: null,
    isControlOwn: true,
    isControlPrivate: true,
    endsWithFsl: true,
    undo: {},
  };
  return LoadState.create({
    target,
    paused: true,
    snapshotPath: "",
    snapshotIdentity: {},
    blocks: [block],
    registered: [block.hostAddr, block.hostAddr + block.usedLength],
    canDiscard: false,
    watched: { balloons: false, helpers: false },
    serving: {},
    source: {},
  });
}
