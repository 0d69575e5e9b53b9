/** What the benchmark runs: guests, ways to load them, and what the guest does meanwhile. */
import type { SnapshotSpec } from "../../tests/helpers/guests.ts";

/** Ways to get a guest running from its snapshot. */
export const MODES = {
  ordinary: "QEMU's ordinary load",
  multifd: "ordinary, multifd (4 channels)",
  fsl: "fsl load, first time",
  "fsl-ws": "fsl load, working set",
  "fsl-copy": "fsl load --mode copy",
  "fsl-attach": "fsl load --qmp, first time",
  mapped: "RAM mapped from the snapshot",
  beside: "RAM mapped, and all read in C",
  upstream: "upstream's lazy load",
  floor: "RAM already there",
} as const;
export type Mode = keyof typeof MODES;

/** What the guest does. `idle` prints a tick every 50 ms; its first one is the first output. */
export const WORKLOADS = {
  idle: "idle guest",
  sum: "checksum of all data",
  random: "20,000 random pages",
  busy: "busy loop",
} as const;
export type Workload = keyof typeof WORKLOADS;

/** Length of the busy loop in the guest's time, ms. */
export const BUSY_MS = 2000;

/** Serial console commands of the workloads; see scripts/guest/linux-guest.c. */
export const COMMANDS: Readonly<Record<Workload, string | null>> = {
  idle: null,
  sum: "sum",
  random: "random 20000",
  busy: `busy ${BUSY_MS}`,
};

/** Whether the snapshot is in the page cache when a run begins. */
export type Cache = "warm" | "cold";

export interface Scenario {
  /** RAM and data, as the tables show it. */
  readonly name: string;
  readonly spec: SnapshotSpec;
  /** An idle run is looked at this long after QEMU could take the state: CPU time, huge pages. */
  readonly windowMs: number;
}

const GIB = 1024;

export const SCENARIOS = {
  small: {
    name: "512 MiB/256 MiB",
    spec: { memoryMiB: 512, dataMiB: 256 },
    windowMs: 3000,
  },
  medium: {
    name: "1 GiB/400 MiB",
    spec: { memoryMiB: GIB, dataMiB: 400 },
    windowMs: 3000,
  },
  large: {
    name: "4 GiB/3 GiB",
    spec: { memoryMiB: 4 * GIB, dataMiB: 3 * GIB },
    windowMs: 8000,
  },
  zero: {
    name: "8 GiB/1 GiB",
    spec: { memoryMiB: 8 * GIB, dataMiB: GIB },
    windowMs: 5000,
  },
  // The guest uses 1 GiB of it; the rest is never touched and not even reserved on the host.
  sparse: {
    name: "64 GiB/128 MiB",
    spec: {
      memoryMiB: 64 * GIB,
      dataMiB: 128,
      memoryBackend: "memory-backend-ram,reserve=off",
      guestOptions: "mem=1G",
    },
    windowMs: 3000,
  },
} as const satisfies Record<string, Scenario>;

/** One scenario with one workload and one state of the page cache: rounds of several modes. */
export interface Block {
  readonly scenario: Scenario;
  readonly workload: Workload;
  readonly cache: Cache;
  readonly modes: readonly Mode[];
  readonly rounds: number;
}

export interface PlanOptions {
  readonly quick: boolean;
  readonly rounds: number;
  /** Only runs in whose `scenario workload cache mode` each of these begins a word. */
  readonly only: readonly string[];
  /** Modes that cannot be run here. */
  readonly without: readonly Mode[];
}

const EVERY = Object.keys(MODES) as Mode[];
/** fsl-copy shows what it costs that fsl is there at all, fsl-attach what another way in costs: once is enough. */
const ALL = without(EVERY, "fsl-copy", "fsl-attach");
const WITH_ATTACH: readonly Mode[] = [...ALL, "fsl-attach"];
const NO_MULTIFD = without(ALL, "multifd");
const SHORT: readonly Mode[] = ["ordinary", "fsl", "fsl-ws", "floor"];
const COLD: readonly Mode[] = ["ordinary", "fsl", "fsl-ws", "mapped", "upstream"];

function without(modes: readonly Mode[], ...some: readonly Mode[]): readonly Mode[] {
  return modes.filter((mode) => !some.includes(mode));
}

export function planBlocks(options: PlanOptions): Block[] {
  const { small, medium, large, zero, sparse } = SCENARIOS;
  const { quick, rounds } = options;
  const few = Math.min(rounds, 3);
  const block = (
    scenario: Scenario,
    workload: Workload,
    modes: readonly Mode[],
    cache: Cache = "warm",
    count = rounds,
  ): Block => ({ scenario, workload, cache, modes, rounds: count });
  const blocks = quick
    ? [
        block({ ...small, windowMs: 2000 }, "idle", EVERY),
        block(small, "sum", SHORT),
        block(small, "random", SHORT),
        block(small, "busy", SHORT, "warm", 1),
      ]
    : [
        block(small, "idle", EVERY),
        ...(["idle", "sum", "random"] as const).map((load) => block(medium, load, WITH_ATTACH)),
        block(medium, "busy", without(ALL, "beside")),
        block(large, "idle", ALL),
        ...(["sum", "random"] as const).map((load) => block(large, load, NO_MULTIFD)),
        block(zero, "idle", ALL),
        ...(["sum", "random"] as const).map((load) => block(zero, load, NO_MULTIFD)),
        block(sparse, "idle", ["ordinary", "fsl"], "warm", few),
        ...(["idle", "sum", "random"] as const).map((load) =>
          block(medium, load, COLD, "cold", few),
        ),
        ...(["idle", "sum"] as const).map((load) => block(large, load, COLD, "cold", few)),
      ];
  return blocks.flatMap((one) => {
    const modes = one.modes.filter((mode) => !options.without.includes(mode) && fits(one, mode));
    return modes.length > 0 ? [{ ...one, modes }] : [];
  });

  function fits({ scenario, workload, cache }: Block, mode: Mode): boolean {
    const words = ` ${scenario.name} ${workload} ${cache} ${mode} `.toLowerCase();
    return options.only.every((word) => words.includes(` ${word.toLowerCase()}`));
  }
}
