/**
 * Builds the test guests into .cache/guest: `bun scripts/guest/build.ts KERNEL BUSYBOX`, run by
 * setup.sh. KERNEL and BUSYBOX are the unpacked packages.
 *
 *   bzImage        the distribution's cloud kernel, as it is
 *   initrd.cpio    busybox, linux-init.sh, linux-guest.c, and the drivers that a test may use
 *   bare.elf       bare.c, a multiboot program
 *   guest.json     what it was made of; tests use it as a part of the key of their cached snapshots
 */
import { createHash } from "node:crypto";
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { basename, join, resolve } from "node:path";

const ROOT = join(import.meta.dir, "../..");
const SOURCES = import.meta.dir;
const OUTPUT = join(ROOT, ".cache/guest");

/**
 * Drivers that machines and tests need; whatever they depend on comes along, whatever is built in
 * is left out.
 */
const MODULES = [
  "virtio_pci",
  "virtio_mmio",
  "virtio_balloon",
  "virtio_blk",
  "virtio_net",
  "virtio_console",
  "virtio-rng",
  "virtio_mem",
  "virtio_scsi",
  "sd_mod",
  "nvme",
];

async function run(command: string[]): Promise<Uint8Array> {
  const child = Bun.spawn(command, { cwd: SOURCES, stdout: "pipe", stderr: "inherit" });
  const output = await new Response(child.stdout).bytes();
  if ((await child.exited) !== 0) throw new Error(`${command[0]} failed (${command.join(" ")})`);
  return output;
}

// -- kernel modules -------------------------------------------------------------------------------

/** All modules of the package: name as the kernel spells it (`-` is `_`) → path of the file. */
function findModules(tree: string): Map<string, string> {
  const found = new Map<string, string>();
  for (const path of readdirSync(tree, { recursive: true, encoding: "utf8" })) {
    const name = /^(.*)\.ko(\.xz|\.zst)?$/.exec(basename(path))?.[1];
    if (name !== undefined) found.set(name.replaceAll("-", "_"), join(tree, path));
  }
  return found;
}

async function readModule(path: string): Promise<Uint8Array> {
  if (path.endsWith(".ko")) return readFileSync(path);
  if (path.endsWith(".xz")) return run([busybox, "xzcat", path]);
  return Bun.zstdDecompressSync(readFileSync(path));
}

/** Names in the `depends=` entry of the module's .modinfo section. */
function dependencies(module: Uint8Array): string[] {
  const text = Buffer.from(module.buffer, module.byteOffset, module.byteLength).toString("latin1");
  const list = /\0depends=([^\0]*)\0/.exec(text)?.[1] ?? "";
  return list.split(",").filter((name) => name !== "");
}

/** The wanted modules and what they depend on, each behind its dependencies. */
async function collectModules(tree: string): Promise<Map<string, Uint8Array>> {
  const files = findModules(tree);
  const ordered = new Map<string, Uint8Array>();
  async function add(name: string): Promise<void> {
    const path = files.get(name.replaceAll("-", "_"));
    if (path === undefined || ordered.has(name)) return;
    const bytes = await readModule(path);
    for (const dependency of dependencies(bytes)) await add(dependency.replaceAll("-", "_"));
    ordered.set(name, bytes);
  }
  for (const name of MODULES) await add(name.replaceAll("-", "_"));
  return ordered;
}

// -- initramfs ------------------------------------------------------------------------------------

const FILE = 0o100755;
const DIRECTORY = 0o040755;
const CHARACTER_DEVICE = 0o020600;
const SYMLINK = 0o120777;

interface CpioEntry {
  readonly name: string;
  readonly mode: number;
  readonly bytes?: Uint8Array;
  readonly device?: readonly [major: number, minor: number];
}

/**
 * A "newc" archive, the format of an initramfs: per entry the magic 070701 and 13 fields of 8 hex
 * digits, the name with its NUL, the contents; name and contents are padded to 4 bytes. Written
 * here because device nodes then need no root.
 * @source Linux Documentation/driver-api/early-userspace/buffer-format.rst
 */
function cpio(entries: readonly CpioEntry[]): Uint8Array {
  const parts: Uint8Array[] = [];
  const pad = (length: number): Uint8Array => new Uint8Array((4 - (length % 4)) % 4);
  const add = (entry: CpioEntry, inode: number): void => {
    const name = Buffer.from(`${entry.name}\0`);
    const bytes = entry.bytes ?? new Uint8Array();
    const [major, minor] = entry.device ?? [0, 0];
    const fields = [
      inode,
      entry.mode,
      0,
      0,
      1,
      0,
      bytes.length,
      0,
      0,
      major,
      minor,
      name.length,
      0,
    ];
    const header = Buffer.from(
      `070701${fields.map((field) => field.toString(16).padStart(8, "0")).join("")}`,
    );
    parts.push(header, name, pad(header.length + name.length), bytes, pad(bytes.length));
  };
  entries.forEach((entry, index) => add(entry, index + 1));
  add({ name: "TRAILER!!!", mode: 0 }, 0);
  return Buffer.concat(parts);
}

function initramfs(guest: Uint8Array, modules: ReadonlyMap<string, Uint8Array>): Uint8Array {
  const directories = ["bin", "dev", "proc", "sys", "modules"];
  const order = [...modules.keys()].map((name) => `${name}\n`).join("");
  return cpio([
    ...directories.map((name) => ({ name, mode: DIRECTORY })),
    { name: "dev/console", mode: CHARACTER_DEVICE, device: [5, 1] },
    { name: "dev/null", mode: CHARACTER_DEVICE, device: [1, 3] },
    { name: "init", mode: FILE, bytes: readFileSync(join(SOURCES, "linux-init.sh")) },
    { name: "bin/busybox", mode: FILE, bytes: readFileSync(busybox) },
    { name: "bin/sh", mode: SYMLINK, bytes: Buffer.from("busybox") },
    { name: "bin/linux-guest", mode: FILE, bytes: guest },
    { name: "modules/order", mode: FILE, bytes: Buffer.from(order) },
    ...[...modules].map(([name, bytes]) => ({ name: `modules/${name}.ko`, mode: FILE, bytes })),
  ]);
}

// -- compiling ------------------------------------------------------------------------------------

const WARNINGS = "-Wall -Wextra -Werror";

/** No vector instructions: they are slow under emulation. */
const LINUX_FLAGS =
  "-target x86_64-linux-musl -static -std=gnu11 -O2 -fno-vectorize -fno-slp-vectorize -s";

/** Nothing may set up SSE, a stack guard or a thread pointer there, so none may be used. */
const BARE_FLAGS =
  "-target x86-freestanding -march=i686 -std=c11 -O2 -ffreestanding -nostdlib -static -mno-sse " +
  "-mno-mmx -fno-stack-protector -fno-pic -fno-pie -Wl,-T,bare.ld -s";

async function compile(flags: string, source: string, output: string): Promise<void> {
  const options = `${flags} ${WARNINGS}`.split(" ");
  await run(["zig", "cc", ...options, "-o", output, source]);
}

const [kernelTree, busyboxTree] = process.argv.slice(2).map((path) => resolve(path));
if (kernelTree === undefined || busyboxTree === undefined) {
  throw new Error("usage: build.ts KERNEL BUSYBOX");
}
const busybox =
  ["bin/busybox", "usr/bin/busybox"].map((path) => join(busyboxTree, path)).find(existsSync) ?? "";
const kernel = readdirSync(join(kernelTree, "boot")).find((name) => name.startsWith("vmlinuz-"));
if (kernel === undefined) throw new Error(`no kernel in ${kernelTree}/boot`);

mkdirSync(join(ROOT, ".cache"), { recursive: true });
const staging = mkdtempSync(join(ROOT, ".cache/guest-"));
try {
  const guest = join(staging, "linux-guest");
  await Promise.all([
    compile(LINUX_FLAGS, "linux-guest.c", guest),
    compile(BARE_FLAGS, "bare.c", join(staging, "bare.elf")),
  ]);
  const modules = await collectModules(kernelTree);
  copyFileSync(join(kernelTree, "boot", kernel), join(staging, "bzImage"));
  writeFileSync(join(staging, "initrd.cpio"), initramfs(readFileSync(guest), modules));
  rmSync(guest);
  const hash = createHash("sha256");
  for (const name of ["bzImage", "initrd.cpio", "bare.elf"]) {
    hash.update(readFileSync(join(staging, name)));
  }
  const description = {
    kernel: kernel.slice("vmlinuz-".length),
    modules: [...modules.keys()],
    sha256: hash.digest("hex"),
  };
  writeFileSync(join(staging, "guest.json"), `${JSON.stringify(description, null, 2)}\n`);
  rmSync(OUTPUT, { recursive: true, force: true });
  renameSync(staging, OUTPUT);
} catch (error) {
  rmSync(staging, { recursive: true, force: true });
  throw error;
}
