/**
 * Ways to save, and versions of QEMU (docs/guests.md, "Snapshots"): all memory as QEMU's own load
 * brings it.
 *
 * Where setup could get no QEMU of 11.1 or later, its tests are skipped.
 */
import { describe, expect, test } from "bun:test";
import {
  closeSync,
  copyFileSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  writeSync,
} from "node:fs";
import { openSnapshot } from "../../src/snapshot/snapshot.ts";
import { guestArgv, type GuestSpec, startQemu, whyNoGuests } from "../helpers/guests.ts";
import { FSL, FslRun, whyNoExecutable } from "../helpers/load-runs.ts";
import { TWO_NODES, withNode } from "../helpers/load-snapshots.ts";
import {
  loadAndCompare,
  MATRIX_TIMEOUT_MS,
  type MatrixSave,
  MIB,
  NEWER_QEMU,
  saveGuest,
  waysOf,
  whyNoNewerQemu,
} from "../helpers/matrix-guests.ts";

const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;
const noNewer = skip ? null : await whyNoNewerQemu();
if (noNewer !== null) console.log(`skipped: versions of QEMU: ${noNewer}`);
const READY = /^(tick|beat) /;
const BARE: GuestSpec = { guest: "bare" };
/** Changes pages while it is saved. */
const CHURNING: GuestSpec = { guest: "bare", guestOptions: "churn=4096" };
const FILE = `/dev/shm/fsl-matrix-snapshots-${process.pid}`;

/** Zero pages by the bitmap at whose place the file has other bytes: what they were before. */
function stalePages(path: string): number {
  using snapshot = openSnapshot(path);
  let count = 0;
  for (const block of snapshot.blocks) {
    const bitmap = snapshot.pageBitmap(block);
    const page = Buffer.alloc(block.pageSize);
    for (let index = 0; index < bitmap.pageCount; index += 1) {
      if (bitmap.has(index)) continue;
      // Nothing is read behind the end of the file.
      const at = block.pagesOffset + index * block.pageSize;
      const length = readSync(snapshot.fd, page, 0, page.length, at);
      if (page.subarray(0, length).some((byte) => byte !== 0)) count += 1;
    }
  }
  return count;
}

const multifd = { capabilities: ["multifd"], parameters: { "multifd-channels": 3 } };

describe.skipIf(skip)("ways to save", () => {
  test.each<[string, GuestSpec, Omit<MatrixSave, "ready">, readonly string[]]>([
    ["stopped", BARE, {}, []],
    ["live", CHURNING, { live: true, parameters: { "max-bandwidth": 40 * MIB } }, []],
    ["multifd", BARE, multifd, []],
    [
      "multifd, live",
      CHURNING,
      { ...multifd, live: true, parameters: { "max-bandwidth": 40 * MIB } },
      [],
    ],
    [
      "multifd, direct-io",
      BARE,
      { ...multifd, parameters: { ...multifd.parameters, "direct-io": true } },
      [],
    ],
    ["zero-page-detection=none", BARE, { parameters: { "zero-page-detection": "none" } }, []],
    ["zero-page-detection=legacy", BARE, { parameters: { "zero-page-detection": "legacy" } }, []],
    ["file:…,offset=N", BARE, { offset: 5 * MIB + 512 }, ["--offset", String(5 * MIB + 512)]],
  ])(
    "%s",
    async (_, spec, save, flags) => {
      using snapshot = await saveGuest(guestArgv(spec), { ready: READY, ...save });
      if (save.live === true) expect(stalePages(snapshot.path)).toBeGreaterThan(0);
      await using loaded = await loadAndCompare(snapshot, { flags });
      expect(loaded.ways["pc.ram"]).toBe("lazy");
    },
    MATRIX_TIMEOUT_MS,
  );

  test(
    "libvirt's sparse save image",
    async () => {
      const xml = "<domain type='qemu'><name>guest of libvirt's</name></domain>\0";
      const dataLength = 4096 - 92;
      using snapshot = await saveGuest(guestArgv(BARE), { ready: READY, offset: 4096 });
      const header = Buffer.alloc(92);
      header.write("LibvirtQemudSave", "latin1");
      for (const [index, value] of [2, dataLength, 1, 6, 0].entries()) {
        header.writeUInt32LE(value, 16 + 4 * index);
      }
      const fd = openSync(snapshot.path, "r+");
      writeSync(fd, Buffer.concat([header, Buffer.from(xml)]), 0, 92 + xml.length, 0);
      closeSync(fd);
      // Where the stream begins is found out.
      await using loaded = await loadAndCompare(snapshot);
      expect(loaded.ways["pc.ram"]).toBe("lazy");
      const inspected = Bun.spawnSync([FSL, "inspect", snapshot.path]).stdout.toString();
      expect(inspected).toContain("<name>guest of libvirt's</name>");
    },
    MATRIX_TIMEOUT_MS,
  );
});

describe.skipIf(skip || noNewer !== null)("versions of QEMU", () => {
  const newer = (argv: readonly string[], machine?: string): string[] =>
    [NEWER_QEMU, ...argv.slice(1)].map((argument, index) =>
      index > 0 && argv[index - 1] === "-machine" && machine !== undefined
        ? argument.replace(/^\w+/, machine)
        : argument,
    );

  /** With its version, e.g. `pc-q35-10.0`: what a command line says means another one in each QEMU. */
  async function machineOf(argv: readonly string[]): Promise<string> {
    await using qemu = await startQemu([...argv, "-S"]);
    const type = { path: "/machine", property: "type" };
    return (await qemu.qmp.execute<string>("qom-get", type)).replace(/-machine$/, "");
  }

  test.each(["pc", "q35", "microvm"] as const)(
    "%s saved by the older one, loaded by the newer one",
    async (machine) => {
      const argv = guestArgv({ guest: "bare", machine });
      using saved = await saveGuest(argv, { ready: READY });
      const snapshot = { ...saved, argv: newer(argv, await machineOf(argv)) };
      await using loaded = await loadAndCompare(snapshot);
      expect(Object.values(loaded.ways)).toContain("lazy");
    },
    MATRIX_TIMEOUT_MS,
  );

  test.each(["pc", "q35", "microvm"] as const)(
    "%s saved and loaded by the newer one",
    async (machine) => {
      const argv = newer(guestArgv({ guest: "bare", machine }));
      using snapshot = await saveGuest(argv, { ready: READY });
      await using loaded = await loadAndCompare(snapshot);
      expect(Object.values(loaded.ways)).toContain("lazy");
      expect(loaded.said).not.toContain("warning");
    },
    MATRIX_TIMEOUT_MS,
  );

  test(
    "NVMe saved and loaded by the newer one",
    async () => {
      const drive = "driver=null-co,read-zeroes=on,size=8388608,node-name=n0";
      const extraArgs = ["-blockdev", drive, "-device", "nvme,serial=1,drive=n0"];
      const argv = newer(guestArgv({ guest: "bare", extraArgs }));
      using snapshot = await saveGuest(argv, { ready: READY });
      await using loaded = await loadAndCompare(snapshot);
      expect(loaded.ways["pc.ram"]).toBe("lazy");
    },
    MATRIX_TIMEOUT_MS,
  );

  /** `n1` is private, and in the snapshot. */
  const shared = withNode(
    guestArgv(TWO_NODES),
    "n0",
    `memory-backend-file,share=on,mem-path=${FILE}`,
  );
  const capabilities = ["x-ignore-shared"];
  const ignoring = { ready: READY, capabilities };

  test(
    "x-ignore-shared: shared memory stays as it is, private memory is lazy",
    async () => {
      rmSync(FILE, { force: true });
      const argv = newer(shared);
      using saved = await saveGuest(argv, ignoring);
      const kept = `${FILE}-kept`;
      copyFileSync(FILE, kept);
      try {
        await using run = await FslRun.start(saved);
        await run.serial.waitFor(/^tick \d+ ok/);
        const report = await run.complete();
        expect(waysOf(report)).toMatchObject({ n0: "ignored", n1: "lazy" });
        const found = await run.qmp.execute<{ capability: string; state: boolean }[]>(
          "query-migrate-capabilities",
        );
        // Put back.
        expect(found.find(({ capability }) => capability === "x-ignore-shared")?.state).toBe(false);
        await run[Symbol.asyncDispose]();
        copyFileSync(kept, FILE);
        // QEMU's own load is of the same shared file.
        await using paused = await loadAndCompare({ ...saved, capabilities });
        expect(paused.ways).toMatchObject({ n0: "ignored", n1: "lazy" });
        expect(readFileSync(FILE).equals(readFileSync(kept))).toBe(true);
      } finally {
        for (const path of [FILE, kept]) rmSync(path, { force: true });
      }
    },
    MATRIX_TIMEOUT_MS,
  );

  test(
    "x-ignore-shared: a QEMU whose memory is private, or that is too old, is refused",
    async () => {
      rmSync(FILE, { force: true });
      const machine = await machineOf(shared);
      using saved = await saveGuest(newer(shared, machine), ignoring);
      try {
        const isPrivate = newer(shared, machine).map((argument) =>
          argument.replace("share=on", "share=off"),
        );
        await using first = await FslRun.start(saved, { argv: isPrivate });
        expect(await first.end()).toBe(7);
        expect(first.stderr.text).toMatch(/RAMBlock n0: not in the snapshot/);
        await using second = await FslRun.start(saved, { argv: shared });
        expect(await second.end()).toBe(7);
        expect(second.stderr.text).toMatch(/x-ignore-shared: expected QEMU 11\.0 or later/);
      } finally {
        rmSync(FILE, { force: true });
      }
    },
    MATRIX_TIMEOUT_MS,
  );
});
