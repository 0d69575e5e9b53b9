import { afterAll, describe, expect, test } from "bun:test";
import { preloadBytes } from "../../src/sys/preload.ts";
import {
  findInterpreter,
  isGlibcInterpreter,
  readElfInterpreter,
  readImage,
} from "../../src/vmm/elf.ts";
import { Scratch } from "../helpers/qemu-vmm.ts";

const scratch = new Scratch();
afterAll(() => scratch[Symbol.dispose]());

interface Crafted {
  magic?: number;
  bits?: number;
  order?: number;
  entryLength?: number;
  entryCount?: number;
  type?: number;
  pathOffset?: bigint;
  pathLength?: bigint;
}

/** An ELF header, one PT_LOAD and one more program header, and the interpreter's path. */
function elf(crafted: Crafted = {}): Buffer {
  const bytes = Buffer.alloc(256);
  bytes.writeUInt32BE(crafted.magic ?? 0x7f454c46, 0);
  bytes[4] = crafted.bits ?? 2;
  bytes[5] = crafted.order ?? 1;
  bytes.writeBigUInt64LE(64n, 32);
  bytes.writeUInt16LE(crafted.entryLength ?? 56, 54);
  bytes.writeUInt16LE(crafted.entryCount ?? 2, 56);
  bytes.writeUInt32LE(1, 64);
  bytes.writeUInt32LE(crafted.type ?? 3, 120);
  bytes.writeBigUInt64LE(crafted.pathOffset ?? 200n, 120 + 8);
  bytes.writeBigUInt64LE(crafted.pathLength ?? 14n, 120 + 32);
  bytes.write("/lib/ld-x.so.2\0", 200, "latin1");
  return bytes;
}

function find(bytes: Buffer): string | null {
  return findInterpreter((offset, length) =>
    offset + length <= bytes.length ? bytes.subarray(offset, offset + length) : null,
  );
}

describe("findInterpreter", () => {
  test("reads the path of PT_INTERP", () => {
    expect(find(elf())).toBe("/lib/ld-x.so.2");
  });

  test.each([
    ["a script", Buffer.from('#!/bin/sh\nexec qemu-system-x86_64 "$@"\n'.padEnd(64))],
    ["an empty file", Buffer.alloc(0)],
    ["another magic", elf({ magic: 0x7f454c47 })],
    ["a 32-bit program", elf({ bits: 1 })],
    ["a big-endian program", elf({ order: 2 })],
    ["a static program", elf({ type: 6 })],
    ["no program headers", elf({ entryCount: 0 })],
    ["a table that ends past the file", elf({ entryCount: 0xffff, type: 6 })],
    ["entries that are too short", elf({ entryLength: 8 })],
    ["a path that ends past the file", elf({ pathOffset: 250n })],
    ["a path at the end of the address space", elf({ pathOffset: 2n ** 64n - 1n })],
    ["a path without end", elf({ pathLength: 2n ** 63n })],
    ["an empty path", elf({ pathLength: 1n })],
  ])("finds none in %s", (_what, bytes) => {
    expect(find(bytes)).toBeNull();
  });
});

describe("readElfInterpreter", () => {
  test("knows that this program is dynamically linked", () => {
    expect(readElfInterpreter("/proc/self/exe")).toMatch(/^\/.*ld-/);
  });

  test.each([
    ["a script", () => scratch.file("script", "#!/bin/sh\n")],
    ["a directory", () => scratch.path],
    ["no file", () => `${scratch.path}/none`],
  ])("finds none in %s", (_what, path) => {
    expect(readElfInterpreter(path())).toBeNull();
  });
});

describe("isGlibcInterpreter", () => {
  test.each([
    ["/lib64/ld-linux-x86-64.so.2", true],
    ["/lib/ld-linux-aarch64.so.1", true],
    ["/nix/store/abc-glibc-2.40/lib/ld-linux-x86-64.so.2", true],
    ["/lib/ld-musl-x86_64.so.1", false],
    ["/system/bin/linker64", false],
    [null, false],
  ])("%p → %p", (interpreter, expected) => {
    expect(isGlibcInterpreter(interpreter)).toBe(expected);
  });
});

describe("readImage", () => {
  test("has the preload library's code, whose entry point is a system call instruction", () => {
    const { bytes, entry } = readImage(preloadBytes());
    const isArm = process.arch === "arm64";
    const instruction = isArm ? [0x01, 0x00, 0x00, 0xd4] : [0x0f, 0x05];
    expect([...bytes.subarray(entry, entry + instruction.length)]).toEqual(instruction);
    expect([...bytes.subarray(0, 4)]).toEqual([0x7f, 0x45, 0x4c, 0x46]);
  });
});
