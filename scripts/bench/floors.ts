/** What the machine gives at best, in words, from a result: for goals that are not reached. Pure. */
import type { Mode, Workload } from "./plan.ts";
import { type BenchResult, Cells, GUESTS } from "./results.ts";

type Result = Pick<BenchResult, "cells" | "faultPath" | "start">;

/** One sentence each; only of what was measured. */
export function floorsOf({ cells, faultPath, start }: Result): string[] {
  const all = new Cells(cells);
  const each = (value: (scenario: string) => number | null, digits: number): string | null => {
    const known = GUESTS.flatMap((scenario) => {
      const found = value(scenario);
      return found === null ? [] : [`${found.toFixed(digits)} (${scenario})`];
    });
    return known.length === 0 ? null : known.join(", ");
  };
  const idle = (mode: Mode, figure: string, digits: number): string | null =>
    each((scenario) => all.median(scenario, "idle", mode, figure), digits);
  const lines: (string | null)[] = [
    sentence(
      idle("mapped", "resumeMs", 1),
      (found) =>
        "**Resume**: QEMU alone, with RAM mapped from the snapshot, so that it loads nothing but its devices " +
        `and nobody serves a page, takes ${found} ms.`,
    ),
    sentence(
      each((scenario) => all.ratio(scenario, "idle", "firstOutputMs", "mapped", "floor"), 2),
      (found) =>
        "**First output**: with RAM mapped from the snapshot, where the kernel itself brings each page, it takes " +
        `${found} times as long as with RAM that is there.` +
        (sentence(
          each((scenario) => resumedAlone(all, scenario), 2),
          (alone) =>
            ` To be resumed by fsl, and then to wait for no page at all, would take ${alone} times as long.`,
        ) ?? ""),
    ),
    sentence(
      idle("fsl", "faults", 0),
      (found) =>
        "**Faults with a working set ÷ without**: what is read ahead while QEMU starts leaves few for a working " +
        `set to spare: ${found} without one` +
        (sentence(idle("fsl-ws", "faults", 0), (set) => `, ${set} with one`) ?? "") +
        ".",
    ),
    readingLine(each, all, faultPath),
    besideLine(each, all),
    busiest(faultPath),
    sentence(
      (faultPath?.eager ?? [])
        .filter(({ pieceLength, tidyRatio }) => pieceLength >= 256 * 1024 && tidyRatio !== null)
        .map(
          ({ pieceLength, threads, tidyRatio }) =>
            `${tidyRatio?.median.toFixed(2)} (${pieceLength / 1024} KiB, threads: ${threads})`,
        )
        .join(", "),
      (found) =>
        "**Eager throughput**: a bare loop in C that does not keep the whole snapshot in its page table has " +
        `${found} of what it has when it does.`,
    ),
    cpuLine(all, start),
    sentence(
      each((scenario) => all.ratio(scenario, "idle", "cpuMs", "multifd", "ordinary"), 2),
      (found) =>
        "**CPU of more than one thread**: QEMU's own load by several threads takes " +
        `${found} times what it takes by one: they are in one another's way, and in the guest's.`,
    ),
    startLine(all, start),
  ];
  return lines.filter((line) => line !== null);
}

function sentence(found: string | null, words: (found: string) => string): string | null {
  return found === null || found === "" ? null : words(found);
}

/** First output as soon after resume as with RAM that is there, ÷ that, which is resumed at once. */
function resumedAlone(all: Cells, scenario: string): number | null {
  const of = (mode: Mode, figure: string): number | null =>
    all.median(scenario, "idle", mode, figure);
  const [there, atOnce, resume] = [
    of("floor", "firstOutputMs"),
    of("floor", "resumeMs"),
    of("fsl", "resumeMs"),
  ];
  if (there === null || atOnce === null || resume === null) return null;
  return (there - atOnce + resume) / there;
}

/** How soon each guest's RAM could be in, were there nothing but its reading. */
function readingLine(
  each: (value: (scenario: string) => number | null, digits: number) => string | null,
  all: Cells,
  faultPath: Result["faultPath"],
): string | null {
  const [one, two] = faultPath?.reading.map(({ c }) => c?.median) ?? [];
  if (one === undefined || two === undefined) return null;
  const least = each((scenario) => {
    const loadMs = all.median(scenario, "idle", "ordinary", "residentMs");
    const mib = all.median(scenario, "idle", "ordinary", "anonymousMiB");
    return loadMs === null || mib === null ? null : (mib * 1.048576) / two / loadMs;
  }, 2);
  if (least === null) return null;
  return (
    `**All RAM in**: a bare loop in C reads the file into fresh huge pages at ${one.toFixed(1)} GB/s with one ` +
    `thread and at ${two.toFixed(1)} GB/s with two, one for each CPU of this machine. At that rate the guests' RAM ` +
    `is in after ${least} of the ordinary load's time, had neither guest nor loader any need of a CPU.`
  );
}

/** The same beside a guest: what is left of that when both want the CPUs. */
function besideLine(
  each: (value: (scenario: string) => number | null, digits: number) => string | null,
  all: Cells,
): string | null {
  const of = (workload: Workload, figure: string): string | null =>
    each((scenario) => all.ratio(scenario, workload, figure, "beside", "ordinary"), 2);
  const [read, cpu] = [of("idle", "residentMs"), of("idle", "cpuMs")];
  if (read === null || cpu === null) return null;
  const random = sentence(
    of("random", "workMs"),
    (found) => `; beside one that reads 20,000 random pages, those are read after ${found}`,
  );
  const sum = sentence(
    of("sum", "workMs"),
    (found) => `, and beside one that checksums all its data, that is done after ${found}`,
  );
  return (
    "**All RAM in, random pages, checksum, CPU**, beside a guest: C with a thread for each CPU, that only takes what " +
    "the guest leaves it, reads the file into fresh huge pages, and the guest, whose RAM is mapped from the " +
    `snapshot, never waits for it. Beside an idle guest all is in after ${read} of the ordinary load's time, for ` +
    `${cpu} times its CPU time${random ?? ""}${sum ?? ""}.`
  );
}

/** As many threads as there are: the loop is never waked, so that its own work is all there is. */
function busiest(faultPath: Result["faultPath"]): string | null {
  const row = faultPath?.faults.at(-1);
  const [ts, c, bare] = [row?.ts, row?.c, row?.bare].map((side) => side?.faultsPerSecond?.median);
  if (row === undefined || ts === undefined || c === undefined || bare === undefined) return null;
  const microseconds = (perSecond: number): string => (1e6 / perSecond).toFixed(1);
  return (
    `**Fault latency** with ${row.threads} touching threads, when no loop ever sleeps: a page takes ` +
    `${microseconds(ts)} µs in TypeScript, ${microseconds(c)} µs in C that does the same, and ` +
    `${microseconds(bare)} µs in C that keeps no account of what has come, measures no latency and keeps the ` +
    "whole file mapped."
  );
}

/** QEMU's own load costs what it costs; on top comes at least what a program with one Worker takes to start. */
function cpuLine(all: Cells, start: Result["start"]): string | null {
  const [empty, worker] = [start?.empty.cpuMs?.median, start?.worker.cpuMs?.median];
  if (empty === undefined || worker === undefined) return null;
  const known = GUESTS.flatMap((scenario) => {
    const ordinary = all.median(scenario, "idle", "ordinary", "cpuMs");
    return ordinary === null
      ? []
      : [`${((ordinary + worker) / ordinary).toFixed(2)} (${scenario})`];
  });
  const sum =
    known.length === 0
      ? ""
      : `; with that an ordinary load takes ${known.join(", ")} times as much`;
  return (
    `**CPU**: an empty program that Bun has compiled takes ${empty.toFixed(1)} ms of CPU time to start and end, ` +
    `${worker.toFixed(1)} ms with one Worker that does nothing${sum}, and fsl's own code is compiled on top, ` +
    "which costs as much for a small guest as for a large one."
  );
}

function startLine(all: Cells, start: Result["start"]): string | null {
  const [empty, own] = [start?.empty.ms?.median, start?.fsl.ms?.median];
  const [first] = GUESTS;
  if (empty === undefined || own === undefined || first === undefined) return null;
  const ready = all.median(first, "idle", "ordinary", "readyMs");
  const ratio =
    ready === null
      ? ""
      : `; QEMU is ready after ${ready.toFixed(1)} ms, so that starting it from there is ` +
        `${((ready + empty) / ready).toFixed(2)} times that, whatever is done meanwhile, but for the time that ` +
        "QEMU itself is spared (its heap has huge pages here)";
  const idle = all.ratio(first, "idle", "readyMs", "fsl-copy", "ordinary");
  const whenIdle =
    idle === null
      ? ""
      : `. With \`--mode copy\`, when fsl does nothing while QEMU starts, it is ${idle.toFixed(2)} times`;
  return (
    `**Start**: an empty program that Bun has compiled ends after ${empty.toFixed(1)} ms, ` +
    `\`fsl --version\` after ${own.toFixed(1)} ms${ratio}${whenIdle}.`
  );
}
