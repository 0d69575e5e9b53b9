/**
 * How a guest is reached. The first target is a QEMU that fsl spawns; attaching to one,
 * Firecracker's handover, a postcopy destination and the caller's own memory fit behind the same
 * interface.
 *
 * Life: `connect` → `takeUserfaultfd` → (arm: register, look, correct) → `loadState` → `resume` → …
 * → `release`. Until `loadState` everything can be undone by `abandon`; after it nothing can.
 */

import type { FslError } from "../errors.ts";
import type { HelperRecord } from "../sys/helper-task.ts";

/** A RAMBlock's place in the target's address space. */
export interface GuestRegion {
  /** RAMBlock name as QEMU spells it, e.g. `pc.ram`. */
  readonly idstr: string;
  /** Address in the *target's* address space, bytes. */
  readonly hostAddr: number;
  /** Used length in bytes. */
  readonly length: number;
  /** Maximum length in bytes (resizable blocks have more than `length`). */
  readonly maxLength: number;
  /** Host page size of the block in bytes: 4096, or 2 MiB and more for hugetlb. */
  readonly pageSize: number;
  readonly readOnly: boolean;
  /**
   * What backs the block, by the kernel's account (/proc/PID/smaps), and whether other processes
   * can see it.
   */
  readonly backing: "anonymous" | "shmem" | "hugetlb" | "file";
  /** MAP_SHARED. */
  readonly shared: boolean;
  /** Another process has the same memory mapped (vhost-user, virtiofsd, a second QEMU). */
  readonly sharedWithOthers: boolean;
  /**
   * The kernel's NUMA policy for this memory, e.g. `bind:0`. Absent when it is the default, or the
   * host has one node only.
   */
  readonly nodePolicy?: string;
}

export interface TargetInfo {
  /** `performance.now()` when the target could take the state: QEMU's main loop ran and greeted. */
  readonly readyAtMs: number;
  /** e.g. `10.0.2` */
  readonly version: string;
  /** Versioned machine type, e.g. `pc-q35-10.0`; null when the target cannot say. */
  readonly machineType: string | null;
  readonly regions: readonly GuestRegion[];
  /**
   * True when the guest has a device that can give memory back (balloon, free page reporting,
   * virtio-mem).
   */
  readonly canDiscard: boolean;
  /** vCPUs; null when the target cannot say. */
  readonly vcpus: number | null;
  /** Whoever started the target wants its guest to stay stopped (`-S`). */
  readonly startsStopped: boolean;
}

/** How the target ended. Exactly one of the two is not null. */
export interface ExitStatus {
  readonly exitCode: number | null;
  readonly signal: string | null;
}

/**
 * What a later fsl needs in order to reach this target again, after this one has died. JSON, a few
 * KiB.
 */
export interface TargetRecord {
  readonly pid: number;
  /** Path of a control socket that somebody can connect to again; null when there is none. */
  readonly controlPath: string | null;
  /** The target itself listens there, by the kernel's account; else it may be a relay. */
  readonly isControlOwn: boolean;
  /** fsl made that socket, and removes it when nobody will come back for it. */
  readonly isControlPrivate: boolean;
  /** fsl started the target to stay with it: a signal that is to end fsl is to end the target. */
  readonly endsWithFsl: boolean;
  /** Capabilities and parameters as they were, for `release`; the target's own business. */
  readonly undo: unknown;
}

/** Devices that matter to somebody who loads RAM. */
export interface HotplugWants {
  /** Balloons. A virtio-mem device that is plugged in brings memory of its own. */
  readonly balloons: boolean;
  /** Devices and network back ends whose work another process does, in guest memory. */
  readonly helpers: boolean;
}

/** A target that has its state or is getting it: what serving its pages needs. */
export interface ServedTarget {
  /** For messages: `qemu-system-x86_64 (pid 123)`. */
  readonly description: string;
  readonly pid: number;
  /** pidfd of the target; polls readable when it has ended. Owned by the target object. */
  readonly pidfd: number;
  /** Resolves when the target process has ended, by the kernel's account. Never rejects. */
  readonly exited: Promise<ExitStatus>;
  resume(): Promise<void>;
  /** Stops the guest's vCPUs. Must not be awaited while a vCPU may wait for a page. */
  pause(): Promise<void>;
  /** Drops a kept descriptor. */
  dropDescriptor(name: string): Promise<void>;
  /** After the load: puts capabilities and parameters back and lets go. */
  release(): Promise<void>;
  /**
   * After its state is loaded: tells of a device that is plugged in while RAM comes in and that
   * changes what is right for it, within some 50 ms, once. Absent: none can be.
   * @param found called with the device's type
   * @param lost called when nobody can be asked any more, although the target lives
   * @returns stops the watch
   */
  watchHotplug?(
    wants: HotplugWants,
    found: (type: string) => void,
    lost: (error: FslError) => void,
  ): () => void;
  /**
   * Like `pause`, and not to be awaited either while a vCPU may wait for a page.
   * @returns whether the guest was running: only then `resume` is right afterwards
   */
  hold?(): Promise<boolean>;
  /** Sends a signal by pidfd; nothing when the target has ended. */
  signal(signal: NodeJS.Signals): void;
  /** SIGKILL by pidfd. */
  kill(): void;
}

/** What a target seems to be that is still starting. */
export interface TargetGuess {
  /** Where the blocks that were asked for seem to be, in that order. */
  readonly regions: readonly Pick<GuestRegion, "hostAddr" | "pageSize">[];
  /** What `takeUserfaultfd` will give. */
  readonly uffdFd: number;
  readonly startsStopped: boolean;
}

export interface Target extends ServedTarget {
  /** Somebody else started it: it is left as it was when the load is given up. */
  readonly isAttached: boolean;
  /** The target has begun to take its state: `abandon` cannot undo anything any more. */
  readonly isCommitted: boolean;
  /**
   * Before `connect`: a load that came no further than this one will have, and whose fsl has died,
   * is undone first. Absent: there can be none.
   */
  forgetEarlier?(record: TargetRecord): void;
  /** Lets another fsl have the control connection (there can be one only). Signals still work. */
  disconnect(): void;
  /** Waits until the target can take the state, checks who it is, and learns its RAM. */
  connect(): Promise<TargetInfo>;
  /**
   * After `connect` was called: resolves when the target has been asked what there is to ask, if that takes no more
   * than some milliseconds: whoever has much else to do does it while the target answers. Never rejects. Absent:
   * there is nothing to be waited for.
   */
  asked?(): Promise<void>;
  /** After `connect`. */
  record(): TargetRecord;
  /**
   * A userfaultfd of the target's address space; the target keeps a copy of its own. Caller closes
   * the returned one.
   */
  takeUserfaultfd(): Promise<number>;
  /**
   * While the target starts: tasks in its address space, for reading ahead into their own memory; as
   * soon as they are there, empty when there will be none. They are the target's, and may turn out to be
   * of no use: `hasHelpers` says so after `connect`, and such ones end in `takeUserfaultfd`.
   */
  earlyHelpers?(): Promise<readonly HelperRecord[]>;
  readonly hasHelpers?: boolean;
  /** Before `connect`: helpers can be expected. Absent or false: there will be none. */
  readonly mayHaveHelpers?: boolean;
  /**
   * While the target builds its machine: what it seems to be, if blocks of these lengths (bytes) are all
   * that matters of it: private memory that is not given back. Null when nothing can be said. Whoever acts
   * on it compares it with what `connect` says. Absent: nothing ever can.
   */
  guess?(lengths: readonly number[]): Promise<TargetGuess | null>;
  /**
   * After `takeUserfaultfd` or a guess: tasks in the target's address space that make system calls there for
   * this process, for UFFDIO_MOVE. Empty when there are none. The caller ends what it takes
   * (`endHelper`); the target ends the rest when it is released, abandoned or closed.
   */
  takeHelpers?(): HelperRecord[];
  /** Leaves a copy of a descriptor in the target under a name, so that it outlives fsl. */
  keepDescriptor(name: string, fd: number): Promise<void>;
  /**
   * An empty file that the target has already, to write the seed to before `loadState`. The caller owns
   * the descriptor. Absent, or undefined: there is none, and `giveSeed` it is.
   */
  takeSeedFile?(): number | undefined;
  /**
   * After `connect`: the seed (see snapshot/seed.ts) that the device state is to come from; the
   * last one counts. The caller may close it at once.
   */
  giveSeed(seedFd: number): void;
  /**
   * Lets the target load device state from the seed. Works once. Resolves when the target has been
   * told; `loaded`, when its devices are there.
   * @param streamOffset file offset in bytes at which the stream begins
   * @param capabilities migration capabilities that the stream was saved with; absent: mapped-ram
   * @param resumes the guest may run as soon as its devices are there; `resume` makes sure of it
   */
  loadState(
    streamOffset: number,
    capabilities?: readonly string[],
    resumes?: boolean,
  ): Promise<StateLoad>;
  /**
   * After `loadState`: what was changed for it, so that the guest can be saved and migrated while
   * its RAM comes in. `resume` does it too, `release` at the latest.
   */
  putSettingsBack?(): Promise<void>;
  /**
   * Before `abandon`: an error that came because the target has ended becomes one that says so, and
   * how; any other stays what it is. Waits up to a second for the kernel to tell. Absent: the
   * target's own methods do that for all errors.
   */
  explain?(error: unknown): Promise<unknown>;
  /** Before `loadState`: puts everything back (a spawned target is ended). */
  abandon(): Promise<void>;
}

/** A target that is loading its device state. */
export interface StateLoad {
  /** May be looked at late: a rejection is nobody's fault until then. */
  readonly loaded: Promise<void>;
}

/** How far a target that was found again has come with its state. */
export type StateProgress = "none" | "loading" | "loaded" | "failed";

/** A target whose fsl has died, found again. */
export interface FoundTarget extends ServedTarget {
  /** See `TargetRecord`. */
  readonly endsWithFsl: boolean;
  /**
   * After its state is loaded: what was changed for that, so that the guest can be saved and migrated
   * while its RAM comes in. `resume` does it too, `release` at the latest.
   */
  putSettingsBack(): Promise<void>;
  /**
   * Asks the target; it can answer only when no thread of its main loop waits for a page, and until
   * then this waits, for as long as the target lives.
   */
  stateProgress(): Promise<StateProgress>;
  /** Closes what fsl holds of it; the target goes on. Idempotent. */
  close(): void;
}

/** Name under which the target keeps a copy of the load state; its memfd has it too. */
export const KEPT_STATE = "fsl-state";
/** Link text of that copy in /proc/PID/fd. */
export const KEPT_STATE_LINK = `/memfd:${KEPT_STATE} (deleted)`;

/** How long an exit may lag behind the end of a connection, ms. */
export const EXIT_NOTICE_MS = 1_000;

/** Whether a target that does not answer as it should has ended. Waits a moment for that. */
export async function hasEnded({ exited }: ServedTarget): Promise<boolean> {
  return Promise.race([exited.then(() => true), Bun.sleep(EXIT_NOTICE_MS).then(() => false)]);
}
