/**
 * A rehearsal of the fault loop, on a load state of our own, while the target is still starting: code
 * that runs for the first time takes a millisecond, and the first faults come from the target's
 * loading of its devices and from the guest's first steps.
 */
import {
  EFD_CLOEXEC,
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  MFD_CLOEXEC,
  O_CLOEXEC,
  O_NONBLOCK,
  PROT_READ,
  PROT_WRITE,
  REGISTER_MISSING,
  UFFD_EVENT_PAGEFAULT,
  UFFD_MSG,
  UFFD_USER_MODE_ONLY,
} from "../sys/abi.ts";
import * as sys from "../sys/native.ts";
import { createPageSource } from "../source/snapshot-source.ts";
import { Uffd } from "../uffd/uffd.ts";
import { setRange } from "./bits.ts";
import { EagerMoves } from "./eager-moves.ts";
import { FaultLoop } from "./fault-loop.ts";
import { C_FAULTS, LoadState, type StateBlock } from "./state.ts";

const PAGE = 4096;
const PAGES = 64;
const LENGTH = PAGES * PAGE;
/** As many pages have bytes in the file; the others are zero. */
const DATA_PAGES = 48;
/** Every so-many-th page has a fault. */
const FAULT_EVERY = 8;
const CLUSTER_PAGES = 2;
const NO_RUNS = new Int32Array(0);

/**
 * Serves a few made-up faults. Runs in the fault Worker.
 * @returns how many; 0 where a process may not have a userfaultfd
 */
export function rehearseFaults(): number {
  const uffdFd = sys.userfaultfd(O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
  if (uffdFd < 0) return 0;
  const fileFd = sys.memfdCreate("fsl-rehearsal", MFD_CLOEXEC);
  // Readable from the start: the loop ends when it has served what it finds.
  const stopFd = sys.eventfd(1, EFD_CLOEXEC);
  const memory = sys.mmap(0, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  try {
    const isReady = fileFd >= 0 && stopFd >= 0 && memory > 0;
    if (!isReady || sys.ftruncate(fileFd, LENGTH) < 0) return 0;
    return play(new Uffd(uffdFd), fileFd, stopFd, memory);
  } finally {
    for (const fd of [uffdFd, fileFd, stopFd]) if (fd >= 0) sys.close(fd);
    if (memory > 0) sys.munmap(memory, LENGTH);
  }
}

function play(uffd: Uffd, fileFd: number, stopFd: number, memory: number): number {
  uffd.api(0);
  uffd.register(memory, LENGTH, REGISTER_MISSING);
  const block = { ...BLOCK, hostAddr: memory, usedLength: LENGTH, movable: false };
  const { state, fd } = rehearsalState(block);
  const source = createPageSource({ fd: fileFd }, [block]);
  try {
    for (const { data } of state.blocks) setRange(data, 0, DATA_PAGES);
    const events = state.eventsView();
    for (let page = 0; page < PAGES; page += FAULT_EVERY) {
      const at = (page / FAULT_EVERY) * UFFD_MSG.BYTES;
      events.setUint8(at, UFFD_EVENT_PAGEFAULT);
      const addressAt = at + UFFD_MSG.FAULT_ADDRESS;
      events.setBigUint64(addressAt, BigInt(memory + page * PAGE), true);
    }
    // As a loop finds them that takes over from one that died.
    state.eventCount = PAGES / FAULT_EVERY;
    const order = new Uint32Array(0);
    const start = { helpers: [], goFd: -1, pieceLength: PAGE, order, replay: NO_RUNS, nice: 0 };
    const moves = new EagerMoves({ uffd, source, state, fileFd, start });
    const loop = new FaultLoop({
      uffd,
      source,
      state,
      counters: state.counters(0),
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
    moves.close();
    return state.counters(0)[C_FAULTS] ?? 0;
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
