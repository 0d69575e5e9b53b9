/**
 * The command line of a QEMU that fsl starts: what of the user's is refused, and what fsl adds.
 * Pure.
 */
import { FslError } from "../errors.ts";

/** Every id that fsl gives to an object inside QEMU begins with this. */
const FSL_ID_PREFIX = "fsl-";

/** Options that cannot go together with fsl's own, and why. QEMU takes one dash or two. */
const REFUSED_OPTIONS: Readonly<Record<string, string>> = {
  incoming: "fsl load adds its own; leave it out",
  loadvm: "the guest's state comes from the snapshot; leave it out",
  preconfig: "a QEMU that waits for more configuration cannot take a state; leave it out",
  daemonize:
    "fsl load stays with the guest it starts; leave it out and put fsl itself into the background",
};

/** RAM that is not private, is there from the start, is locked, or has a place of its own. */
const OTHER_MEMORY = /mem-path|prealloc|mem-lock|mlock|memory-backend-(?!ram)|share=|host-nodes/;

/** Arguments of one command line; Linux allows more, no QEMU needs it. */
const ARGUMENTS_MAX = 65_536;

/**
 * Checks the user's QEMU command line.
 * @param argv the binary first, as after `--`
 * @throws FslError USAGE when it is empty or holds an option that fsl cannot work with
 */
export function checkQemuCommand(argv: readonly string[]): void {
  const binary = argv[0];
  if (binary === undefined || binary === "") {
    throw new FslError("USAGE", "QEMU command: expected a command after `--`, found none");
  }
  if (argv.length > ARGUMENTS_MAX) {
    throw new FslError(
      "USAGE",
      `QEMU command: expected at most ${ARGUMENTS_MAX} arguments, found ${argv.length}`,
    );
  }
  for (const argument of argv) {
    if (argument.includes("\0"))
      throw new FslError("USAGE", "QEMU command: an argument holds a NUL character");
  }
  // An option's value may begin with a dash (`-append -incoming`); such a value is refused as well.
  // That errs on the safe side: telling the two apart needs a table of all options of all versions.
  for (const argument of argv.slice(1)) {
    const name = optionName(argument);
    const reason = name === null ? undefined : REFUSED_OPTIONS[name];
    if (reason !== undefined) {
      throw new FslError("USAGE", `QEMU command: option ${argument} is refused: ${reason}`, {
        option: argument,
      });
    }
  }
}

/** True when the user asked for a guest that stays stopped (`-S`). */
export function startsStopped(argv: readonly string[]): boolean {
  return argv.slice(1).some((argument) => optionName(argument) === "S");
}

/** What a command line tells of the QEMU that it starts. */
export interface QemuCommand {
  readonly hasNoDiscards: boolean;
  readonly hasDefaultSettings: boolean;
  readonly hasPlainMemory: boolean;
  readonly vcpus: number | null;
  /** QEMU reads a kernel into its own heap before its monitor answers. */
  readonly readsKernel: boolean;
}

/** Errs on the safe side: what is not certain is asked. */
export function readQemuCommand(argv: readonly string[]): QemuCommand {
  const options = argv.slice(1);
  // These bring more options, or change those that are there.
  const isAll = !hasOptionFile(options) && !options.some((option) => optionName(option) === "set");
  return {
    hasNoDiscards: isAll && !options.some((option) => /balloon|virtio-mem/.test(option)),
    hasDefaultSettings: isAll && !options.some((option) => option.includes("migration")),
    hasPlainMemory: isAll && !options.some((option) => OTHER_MEMORY.test(option)),
    vcpus: isAll ? vcpusOf(argv) : null,
    readsKernel: options.some((option) => optionName(option) === "kernel"),
  };
}

/**
 * Null where it depends on more than a number behind `-smp`: other architectures have machines with more vCPUs
 * by default, or beside those.
 */
function vcpusOf(argv: readonly string[]): number | null {
  if (!/(x86_64|i386|kvm)$/.test(argv[0] ?? "")) return null;
  if (argv.some((argument) => /smp\.|"smp"|\w-cpu\b/.test(argument))) return null;
  const places = argv.keys().filter((index) => optionName(argv[index] ?? "") === "smp");
  const [place, second] = [...places];
  if (place === undefined) return 1;
  const number = /^(?:cpus=)?([1-9]\d{0,4})(?:,|$)/.exec(argv[place + 1] ?? "");
  return second === undefined && number !== null ? Number(number[1]) : null;
}

/** What QEMU finds open at its start, by its number there. */
export interface InheritedDescriptors {
  /** The listening socket of a QMP monitor. */
  readonly qmpFd: number;
  /** Holds `MONITOR_CONFIG`. */
  readonly configFd: number;
  /** The seed, open for reading only, and the descriptor set that both are to be in. */
  readonly seedFd: number;
  readonly seedSet: number;
}

const QMP_CHARDEV = `${FSL_ID_PREFIX}qmp`;

/**
 * fsl's monitor, in the form of `-readconfig`. With `-qmp` or `-mon` QEMU would give the guest no monitor
 * of its own, and the console of `-nographic` would lose its keys (Ctrl-A x, and Ctrl-C for the guest).
 * @source QEMU system/vl.c default_monitor
 */
export const MONITOR_CONFIG = `[mon "${QMP_CHARDEV}"]\n  chardev = "${QMP_CHARDEV}"\n  mode = "control"\n`;

/**
 * The command line that is run: the user's, then `-S` (whether the guest runs when its state is
 * loaded is fsl's decision), a QMP monitor on an inherited listening socket, the seed, and
 * `-incoming defer`.
 */
export function qemuCommandLine(
  argv: readonly string[],
  { qmpFd, configFd, seedFd, seedSet }: InheritedDescriptors,
): string[] {
  checkQemuCommand(argv);
  return [
    ...argv,
    "-S",
    "-chardev",
    `socket,id=${QMP_CHARDEV},fd=${qmpFd},server=on,wait=off`,
    "-readconfig",
    `/proc/self/fd/${configFd}`,
    "-add-fd",
    `fd=${seedFd},set=${seedSet}`,
    // Has been read by then, and goes with the set. A reader of the set finds the seed: this one is not
    // open for reading only.
    "-add-fd",
    `fd=${configFd},set=${seedSet}`,
    "-incoming",
    "defer",
  ];
}

/** Whether a file brings more options than a command line shows; fsl's own does not. */
export function hasOptionFile(argv: readonly string[]): boolean {
  const own = `socket,id=${QMP_CHARDEV},`;
  return argv.some(
    (argument, index) =>
      optionName(argument) === "readconfig" && argv[index - 1]?.startsWith(own) !== true,
  );
}

/** `-incoming` and `--incoming` → `incoming`; null for what is no option. */
function optionName(argument: string): string | null {
  const match = /^--?([A-Za-z][A-Za-z0-9-]*)$/.exec(argument);
  return match?.[1] ?? null;
}
