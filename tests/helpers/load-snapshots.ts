/**
 * Snapshots that guests.ts does not make: saved with other parameters, or made for one test only.
 * Not cached.
 */
import { rmSync } from "node:fs";
import { join } from "node:path";
import { tmpdir } from "node:os";
import {
  bootGuest,
  guestArgv,
  type GuestSnapshot,
  qemuVersion,
  type SnapshotSpec,
} from "./guests.ts";
import { withArgument } from "./matrix-guests.ts";

/** A bare guest whose RAM is two blocks of 32 MiB, `n0` and `n1`. */
export const TWO_NODES: SnapshotSpec = {
  guest: "bare",
  extraArgs: ["n0", "n1"].flatMap((id) => [
    ...["-object", `memory-backend-ram,id=${id},size=32M`],
    ...["-numa", `node,memdev=${id}`],
  ]),
};

/** Its command line with another back end for one of them. */
export function withNode(argv: readonly string[], id: string, backend: string): string[] {
  return withArgument(argv, `memory-backend-ram,id=${id}`, `${backend},id=${id}`);
}

export interface SpecialSave {
  /** Migration parameters for this save. */
  readonly parameters?: Readonly<Record<string, unknown>>;
  /** File offset of the stream. */
  readonly offset?: number;
  /** false: an ordinary stream, which fsl cannot load. */
  readonly mappedRam?: boolean;
}

/** A snapshot in a temporary file; `Symbol.dispose` removes it. */
export interface TemporarySnapshot extends GuestSnapshot, Disposable {
  /** As QEMU's `file:` wants it: with the offset. */
  readonly uri: string;
}

/** Boots a guest (0.3 s for the bare one on TCG), stops and saves it. */
export async function specialSnapshot(
  spec: SnapshotSpec,
  save: SpecialSave,
): Promise<TemporarySnapshot> {
  const path = join(tmpdir(), `fsl-load-test-${process.pid}-${counter++}.snap`);
  const { qemu } = await bootGuest(spec);
  await using _ = qemu;
  const { qmp, serial } = qemu;
  await serial.waitForNext(/^(tick|beat) /);
  await qmp.setCapabilities(save.mappedRam === false ? [] : ["mapped-ram"]);
  await qmp.execute("migrate-set-parameters", { "max-bandwidth": 0, ...save.parameters });
  await qmp.execute("stop");
  const from = qmp.events.length;
  const offset = save.offset === undefined ? "" : `,offset=${save.offset}`;
  await qmp.execute("migrate", { uri: `file:${path}${offset}` });
  await qmp.waitMigrated(from);
  return {
    path,
    uri: `${path}${offset}`,
    argv: guestArgv(spec),
    spec,
    qemuVersion: await qemuVersion(),
    machineType: "",
    checksum: "",
    memoryMiB: spec.memoryMiB ?? 0,
    dataMiB: 0,
    lastLine: serial.lines.findLast(({ text }) => /^(tick|beat) /.test(text))?.text ?? "",
    fileBytes: Bun.file(path).size,
    diskBytes: 0,
    bootMs: 0,
    saveMs: 0,
    [Symbol.dispose]: () => rmSync(path, { force: true }),
  };
}

let counter = 0;
