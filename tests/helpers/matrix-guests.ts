/**
 * The guests of the matrix tests (docs/guests.md): any QEMU command line, saved in any way, loaded by
 * `fsl load --paused`, and all of its memory compared with QEMU's own load of the same file.
 */
import { expect } from "bun:test";
import {
  copyFileSync,
  existsSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { BUILD, modifiedMs, ROOT } from "../../scripts/build-shim.ts";
import type { LoadReport } from "../../src/index.ts";
import { type GuestSnapshot, QEMU, type Qemu, qemuVersion, startQemu } from "./guests.ts";
import { differencesFromOracle, type OracleNeeds } from "./load-oracle.ts";
import { FslRun } from "./load-runs.ts";

export const MATRIX_TIMEOUT_MS = 120_000;
export const MIB = 2 ** 20;
export const PAGE = 4096;

export type Way = LoadReport["blocks"][number]["way"];

export interface MatrixSave {
  /** What the guest says on its serial line when it is to be saved; null: at once. */
  readonly ready: RegExp | null;
  /** Between ready and the save, while the guest runs. */
  readonly prepare?: (qemu: Qemu) => Promise<void>;
  readonly capabilities?: readonly string[];
  readonly parameters?: Readonly<Record<string, unknown>>;
  /** Saved while it runs. */
  readonly live?: boolean;
  /** File offset of the stream. */
  readonly offset?: number;
}

/** A snapshot in a directory of its own; `Symbol.dispose` removes it. */
export interface MatrixSnapshot extends Pick<GuestSnapshot, "path" | "argv">, Disposable {
  /** As QEMU's `file:` wants it: with the offset. */
  readonly uri: string;
  readonly directory: string;
}

/** A directory that goes with the test. */
export function matrixDirectory(): { path: string } & Disposable {
  const path = mkdtempSync(join(tmpdir(), "fsl-matrix-"));
  return { path, [Symbol.dispose]: () => rmSync(path, { recursive: true, force: true }) };
}

/** Starts a guest, waits until it is ready, and saves it. */
export async function saveGuest(
  argv: readonly string[],
  save: MatrixSave,
): Promise<MatrixSnapshot> {
  const { path: directory } = matrixDirectory();
  const path = join(directory, "guest.snap");
  const dispose = (): void => rmSync(directory, { recursive: true, force: true });
  try {
    const qemu = await startQemu(save.ready === null ? [...argv, "-S"] : argv);
    await using _ = qemu;
    const { qmp } = qemu;
    if (save.ready !== null) await qemu.serial.waitFor(save.ready, MATRIX_TIMEOUT_MS);
    await save.prepare?.(qemu);
    await qmp.setCapabilities(["mapped-ram", ...(save.capabilities ?? [])]);
    await qmp.execute("migrate-set-parameters", { "max-bandwidth": 0, ...save.parameters });
    if (save.live !== true) await qmp.execute("stop");
    const from = qmp.events.length;
    const uri = save.offset === undefined ? path : `${path},offset=${save.offset}`;
    await qmp.execute("migrate", { uri: `file:${uri}` });
    await qmp.waitMigrated(from);
    return { path, uri, argv, directory, [Symbol.dispose]: dispose };
  } catch (error) {
    dispose();
    throw error;
  }
}

/** A load that has ended well. Dispose of it to end QEMU. */
export interface MatrixLoad extends AsyncDisposable {
  readonly run: FslRun;
  readonly report: LoadReport;
  /** How each block was loaded, by the last part of its name. */
  readonly ways: Readonly<Record<string, Way>>;
  /** What fsl printed. */
  readonly said: string;
}

export interface LoadSpec {
  readonly flags?: readonly string[];
  readonly argv?: readonly string[];
  /** When all RAM is in, before it is read out. */
  readonly look?: (run: FslRun) => Promise<void>;
}

/** Loads it stopped, waits until all RAM is in, and compares every RAMBlock with the oracle's. */
export async function loadAndCompare(
  snapshot: Pick<MatrixSnapshot, "path" | "argv"> & OracleNeeds,
  spec: LoadSpec = {},
): Promise<MatrixLoad> {
  const run = await FslRun.start(snapshot, {
    flags: ["--paused", ...(spec.flags ?? [])],
    argv: spec.argv ?? snapshot.argv,
  });
  try {
    await run.qmp.ready;
    const report = await run.complete();
    expect(report.complete).toBe(true);
    expect(await run.qmp.execute<object>("query-status")).toMatchObject({ running: false });
    await spec.look?.(run);
    const qemu = { pid: await run.qemuPid(), qmp: run.qmp };
    expect(await differencesFromOracle(snapshot as GuestSnapshot, qemu)).toEqual([]);
    return {
      run,
      report,
      ways: waysOf(report),
      said: run.stderr.text,
      [Symbol.asyncDispose]: () => run[Symbol.asyncDispose](),
    };
  } catch (error) {
    await run[Symbol.asyncDispose]();
    throw error;
  }
}

export function waysOf(report: LoadReport): Record<string, Way> {
  return Object.fromEntries(
    report.blocks.map(({ idstr, way }) => [idstr.replace(/^.*\//, ""), way]),
  );
}

/** The command line with one argument replaced. */
export function withArgument(argv: readonly string[], from: string, to: string): string[] {
  expect(argv.some((argument) => argument.includes(from))).toBe(true);
  return argv.map((argument) => argument.replace(from, to));
}

const HUGE = "/proc/sys/vm/nr_hugepages";

/** Of 2 MiB, that nobody has and nobody has reserved. */
export function freeHugePages(): number {
  const text = readFileSync("/proc/meminfo", "utf8");
  const field = (name: string): number =>
    Number(new RegExp(`^HugePages_${name}:\\s+(\\d+)`, "m").exec(text)?.[1] ?? 0);
  return field("Free") - field("Rsvd");
}

/**
 * `count` huge pages of 2 MiB, all of them free when this returns; `Symbol.dispose` gives them back.
 * A process that was killed gives its own back a little later, and they would count as new ones.
 */
export async function hugePages(count: number): Promise<Disposable> {
  const total = (): number => Number(readFileSync(HUGE, "utf8"));
  const before = total();
  writeFileSync(HUGE, String(before + count));
  // Others may have reserved some meanwhile.
  const put = (): void => writeFileSync(HUGE, String(total() - count));
  if (total() < before + count) {
    writeFileSync(HUGE, String(before));
    throw new Error(`the kernel has no ${count} huge pages`);
  }
  const deadline = performance.now() + 10_000;
  while (freeHugePages() < count) {
    if (performance.now() > deadline) {
      put();
      throw new Error(`of ${count} huge pages ${freeHugePages()} are free`);
    }
    await Bun.sleep(5);
  }
  return { [Symbol.dispose]: put };
}

// -- firmware and other architectures -------------------------------------------------------------

const PACKAGES = join(ROOT, ".cache/packages");

function firstThere(paths: readonly string[]): string | null {
  return paths.find((path) => existsSync(path)) ?? null;
}

/** OVMF's code and variable store; null when the package is not here. */
export function ovmf(): { code: string; variables: string } | null {
  const directory = firstThere([join(PACKAGES, "ovmf/usr/share/OVMF"), "/usr/share/OVMF"]);
  if (directory === null) return null;
  const code = join(directory, "OVMF_CODE_4M.fd");
  const variables = join(directory, "OVMF_VARS_4M.fd");
  return existsSync(code) && existsSync(variables) ? { code, variables } : null;
}

/** Two flash chips with OVMF; the variable store is a copy in `directory`. */
export function ovmfArgs(directory: string): string[] {
  const files = ovmf();
  if (files === null) throw new Error("OVMF is not here; run: npm run setup");
  const own = join(directory, "vars.fd");
  copyFileSync(files.variables, own);
  return [
    "-drive",
    `if=pflash,format=raw,readonly=on,file=${files.code}`,
    "-drive",
    `if=pflash,format=raw,file=${own}`,
  ];
}

/** QEMU for aarch64 of the version that the tests use; null when it is not here. */
export function qemuAarch64(): string | null {
  const unpacked = join(PACKAGES, "qemu-arm/usr/bin/qemu-system-aarch64");
  return existsSync(unpacked) ? unpacked : Bun.which("qemu-system-aarch64");
}

/** A QEMU of 11.1 or later: FSL_QEMU_NEWER, or where setup puts it. */
export const NEWER_QEMU =
  process.env["FSL_QEMU_NEWER"] ?? join(PACKAGES, "qemu-newer/usr/bin/qemu-system-x86_64");

/** Why no newer QEMU can be used, or null when one can; one that is named must be there. */
export async function whyNoNewerQemu(): Promise<string | null> {
  const version = await qemuVersion();
  if (Number.parseInt(version) >= 11) return `${QEMU} is no older one: ${version}`;
  if (process.env["FSL_QEMU_NEWER"] !== undefined || existsSync(NEWER_QEMU)) return null;
  const tried = join(PACKAGES, "newer-tried");
  const [, reason] = existsSync(tried) ? readFileSync(tried, "utf8").split("\n") : [];
  return `no newer QEMU: ${reason || "run: npm run setup"}`;
}

/** The bare guest for aarch64 (matrix-aarch64.c), compiled when it is older than its source. */
export async function aarch64Guest(): Promise<string> {
  const source = join(import.meta.dir, "matrix-aarch64.c");
  const path = join(BUILD, "matrix-aarch64.elf");
  if (modifiedMs(path) >= modifiedMs(source)) return path;
  const options = "-target aarch64-freestanding-none -O2 -ffreestanding -nostdlib -static";
  const checks = "-fno-stack-protector -fno-sanitize=all -mgeneral-regs-only";
  const place = "-Wl,--image-base=0x40200000 -Wl,-e,_start";
  const words = ["cc", ...`${options} ${checks} ${place}`.split(" "), "-o", path, source];
  const zig = Bun.spawn(["zig", ...words], { stderr: "pipe", stdout: "ignore" });
  const [code, text] = [await zig.exited, await new Response(zig.stderr).text()];
  if (code !== 0) throw new Error(`zig cc of matrix-aarch64.c: ${text}`);
  return path;
}
