/** `fsl save`: a snapshot of a running QEMU, as `fsl load` loads it. */
import { defineCommand } from "citty";
import { allocatedBytes, openSnapshot, refuseUnserved, saveSnapshot } from "../index.ts";
import { socketPath, wholeNumber } from "./arguments.ts";
import { formatBytes, formatMs } from "./format.ts";
import { log, setQuiet } from "./log.ts";
import { print } from "./output.ts";
import { type Progress, startProgress } from "./progress.ts";
import { CAUGHT_SIGNALS } from "./serve.ts";

/** What the guest does after a save, by `--then`. */
const AFTERWARDS = {
  quit: "QEMU has ended",
  cont: "the guest runs on",
  stay: "the guest is stopped, `cont` in QEMU's monitor lets it run on",
} as const;

export const saveCommand = defineCommand({
  meta: { name: "save", description: "Saves a running QEMU as a mapped-ram snapshot" },
  args: {
    snapshot: {
      type: "positional",
      required: true,
      description: "file to write; replaced when complete",
    },
    qmp: {
      type: "string",
      required: true,
      valueHint: "path",
      description: "QMP socket of the QEMU",
    },
    live: {
      type: "boolean",
      description: "save while the guest runs; default: it is stopped first",
    },
    multifd: {
      type: "string",
      valueHint: "channels",
      description: "save by several channels at once, 1..255; default: one stream",
    },
    // oxlint-disable-next-line unicorn/no-thenable -- the flag's name; this is never awaited.
    then: {
      type: "enum",
      options: ["quit", "cont", "stay"],
      default: "stay",
      description: "what QEMU does afterwards: end, run on, or stay stopped",
    },
    quiet: { type: "boolean", alias: "q", description: "no progress, no remarks; errors only" },
    json: { type: "boolean", description: "one JSON object on stdout" },
  },
  async run({ args: flags }) {
    const quiet = flags.quiet === true || flags.json === true;
    setQuiet(quiet);
    const abort = new AbortController();
    const stop = (): void => abort.abort();
    for (const signal of CAUGHT_SIGNALS) process.on(signal, stop);
    let state: Progress | null = null;
    const progress = quiet ? undefined : startProgress(() => state);
    const startedAtMs = performance.now();
    try {
      await saveSnapshot({
        qmpPath: socketPath(flags.qmp),
        path: flags.snapshot,
        live: flags.live === true,
        afterwards: flags.then,
        signal: abort.signal,
        onProgress: ({ totalBytes, transferredBytes }) => {
          state = { dataBytes: totalBytes, loadedBytes: transferredBytes };
        },
        checkProcess: refuseUnserved,
        verify: (path) => openSnapshot(path).close(),
        ...(flags.multifd === undefined
          ? {}
          : { multifdChannels: wholeNumber(flags.multifd, "multifd", 1, 255) }),
      });
    } finally {
      progress?.end();
    }
    const savedMs = performance.now() - startedAtMs;
    using snapshot = openSnapshot(flags.snapshot);
    const bytesOnDisk = allocatedBytes(snapshot.fd, 0, snapshot.fileLength);
    // Null: it cannot be told, as `fsl inspect` has it.
    const complete = snapshot.layout.isVerifiedComplete ? true : null;
    if (flags.json) {
      const { path, fileLength } = snapshot;
      print(JSON.stringify({ path, fileLength, bytesOnDisk, savedMs, complete }));
      return;
    }
    const figures = `${formatBytes(bytesOnDisk)} on disk, ${formatMs(savedMs)}`;
    log.info(`saved ${flags.snapshot}: ${figures}; ${AFTERWARDS[flags.then]}`);
    if (complete === null) {
      log.warn(
        "QEMU wrote no description (suppress-vmdesc=on): the device state was not looked at",
      );
    }
  },
});
