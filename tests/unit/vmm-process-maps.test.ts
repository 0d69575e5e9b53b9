import { describe, expect, test } from "bun:test";
import { closeSync, fstatSync, readFileSync } from "node:fs";
import {
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  MAP_SHARED,
  MFD_CLOEXEC,
  PROT_READ,
  PROT_WRITE,
} from "../../src/sys/abi.ts";
import { readHostPageLength } from "../../src/sys/host-pages.ts";
import * as native from "../../src/sys/native.ts";
import {
  deviceName,
  mappedByOthers,
  parseArea,
  parseMountTypes,
  ProcessMaps,
} from "../../src/vmm/process-maps.ts";
import { expectRefusal, refusalOf } from "../helpers/qemu-vmm.ts";

const TEXT = `55d0c0000000-55d0c0100000 r-xp 00000000 fe:01 131 /usr/bin/qemu-system-x86_64
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
7f0010000000-7f0010001000 ---p 00000000 00:00 0
7f0020000000-7f0020200000 rw-s 00000000 00:01 4097 /memfd:memory-backend-memfd (deleted)
7f0020200000-7f0020400000 rw-s 00200000 00:01 4097 /memfd:memory-backend-memfd (deleted)
7f0030000000-7f0030200000 rw-s 00000000 00:0e 4098 /memfd:huge (deleted)
7f0040000000-7f0040200000 rw-p 00000000 00:19 99 /dev/shm/a file: with spaces (deleted)
7f0050000000-7f0050200000 rw-s 00000000 fe:01 77 /var/lib/ram.img
7f0060000000-7f0060001000 rw-p 00000000 00:00 0 [anon:guest ram]
7f0060001000-7f0060002000 rw-p 00000000 00:00 0 [heap]
7f0070000000-7f0070200000 rw-s 00000000 00:2a 12 /dev/hugepages/x
7f0080000000-7f0080200000 rw-s 00000000 00:01 5 /dev/zero (deleted)
`;
const TYPES: Record<string, string> = {
  "0:1": "tmpfs",
  "0:25": "tmpfs",
  "0:42": "hugetlbfs",
  "254:1": "ext4",
};

const maps = new ProcessMaps(TEXT, (device) => TYPES[device]);

describe("ProcessMaps.find", () => {
  test.each([
    ["anonymous memory", 0x7f0000000000, 0x10000000, "anonymous", false],
    ["two areas with one file", 0x7f0020000000, 0x400000, "shmem", true],
    ["a memfd of huge pages", 0x7f0030000000, 0x200000, "hugetlb", true],
    ["a private file on tmpfs", 0x7f0040000000, 0x200000, "shmem", false],
    ["a file on a disk", 0x7f0050000000, 0x200000, "file", true],
    ["named anonymous memory and the heap", 0x7f0060000000, 0x2000, "anonymous", false],
    ["a file on hugetlbfs", 0x7f0070000000, 0x200000, "hugetlb", true],
    ["shared anonymous memory", 0x7f0080000000, 0x200000, "shmem", true],
    ["the middle of an area", 0x7f0000400000, 0x1000, "anonymous", false],
  ])("knows %s", (_what, startAddr, length, backing, shared) => {
    expect(maps.find(startAddr, length, "x")).toMatchObject({ backing, shared } as object);
  });

  test("names the files behind a range", () => {
    expect(maps.find(0x7f0020000000, 0x400000, "x").files).toEqual(["0:1:4097"]);
    expect(maps.find(0x7f0000000000, 0x1000, "x").files).toEqual([]);
  });

  test.each([
    ["before the first area", 0x1000, 0x1000, /nothing is mapped at 0x1000/],
    ["in a gap", 0x7f0011000000, 0x1000, /nothing is mapped at 0x7f0011000000/],
    ["across a gap", 0x7f0060001000, 0x2000, /nothing is mapped at 0x7f0060002000/],
    ["behind the last area", 0x7f0080200000, 0x1000, /nothing is mapped/],
    ["that is empty", 0x7f0000000000, 0, /it is empty/],
  ])("refuses a range %s", async (_what, startAddr, length, message) => {
    const error = await refusalOf(() => maps.find(startAddr, length, "RAMBlock x"));
    expectRefusal(error, "TARGET_MISMATCH", message);
  });

  test("refuses a range that is half anonymous and half a file", async () => {
    const mixed = new ProcessMaps(
      "1000-2000 rw-p 00000000 00:00 0\n2000-3000 rw-p 00000000 fe:01 7 /x\n",
      (device) => TYPES[device],
    );
    const error = await refusalOf(() => mixed.find(0x1000, 0x2000, "RAMBlock x"));
    expectRefusal(error, "TARGET_MISMATCH", /anonymous memory becomes file at 0x2000/);
  });

  test("refuses maps that cannot be read", async () => {
    const broken = new ProcessMaps("1000-2000 rubbish\n", () => undefined);
    const error = await refusalOf(() => broken.find(0x1000, 0x1000, "x"));
    expectRefusal(error, "TARGET_LOST", /rubbish/);
  });
});

describe("the number of areas", () => {
  const line = "1000-3000 rw-p 00000000 00:00 0\n";

  test("is at most 2^20", async () => {
    expect(new ProcessMaps(line.repeat(2 ** 20), () => undefined)).toBeDefined();
    const error = await refusalOf(
      () => new ProcessMaps(line.repeat(2 ** 20) + "4000-5000 one too many", () => undefined),
    );
    expectRefusal(error, "TARGET_LOST", /one too many/);
  });
});

describe("ProcessMaps.privateAreas", () => {
  test("are those of exactly that length, anonymous, private and writable", () => {
    const text = [
      "1000-3000 rw-p 00000000 00:00 0",
      "4000-6000 r--p 00000000 00:00 0",
      "7000-9000 rw-s 00000000 00:00 0",
      "a000-c000 rw-p 00000000 08:01 77  /some/file",
      "d000-f000 rw-p 00000000 00:00 0  [heap]",
      "10000-13000 rw-p 00000000 00:00 0 ",
      "14000-16000 rw-p 00000000 00:00 0 ",
    ].join("\n");
    const maps = new ProcessMaps(text, () => undefined);
    expect(maps.privateAreas(0x2000)).toEqual([0x1000, 0x14000]);
    expect(maps.privateAreas(0x3000)).toEqual([0x10000]);
    expect(maps.privateAreas(0x1000)).toEqual([]);
  });
});

describe("ProcessMaps.find among many areas", () => {
  // Lines of different lengths, areas of one to three pages, a hole behind every fourth.
  const areas: { start: number; end: number }[] = [];
  for (let at = 0x1000, index = 0; index < 300; index += 1) {
    const end = at + (1 + (index % 3)) * 0x1000;
    areas.push({ start: at, end });
    at = end + (index % 4 === 3 ? 0x1000 : 0);
  }
  const lines = areas.map(({ start, end }, index) => {
    const name = index % 5 === 0 ? `  [anon:${"x".repeat(index)}]` : "";
    return `${start.toString(16)}-${end.toString(16)} rw-p 00000000 00:00 0${name}`;
  });

  test.each([1, 2, 3, 299, 300])("finds each of %i areas, and no hole", async (count) => {
    const some = new ProcessMaps(lines.slice(0, count).join("\n"), () => undefined);
    for (const [index, { start, end }] of areas.entries()) {
      const find = () => some.find(start, end - start, "x");
      if (index < count) expect(find().backing).toBe("anonymous");
      else expect(find).toThrow();
      if (index % 4 === 3)
        expect(() => some.find(end, 0x1000, "hole")).toThrow(/nothing is mapped/);
    }
    expect(() => some.find(0, 0x1000, "below")).toThrow(/nothing is mapped/);
  });
});

describe("ProcessMaps.read", () => {
  test("knows this process's own mappings of each kind", () => {
    const length = 1024 * 1024;
    const protection = PROT_READ | PROT_WRITE;
    const memfd = native.memfdCreate("fsl-test-maps", MFD_CLOEXEC);
    native.ftruncate(memfd, length);
    const anonymous = native.mmap(0, length, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const shared = native.mmap(0, length, protection, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    const file = native.mmap(0, length, protection, MAP_SHARED, memfd, 0);
    try {
      const own = ProcessMaps.read(process.pid);
      expect(own.find(anonymous, length, "a")).toMatchObject({
        backing: "anonymous",
        shared: false,
      });
      expect(own.find(shared, length, "b")).toMatchObject({ backing: "shmem", shared: true });
      const { ino, dev } = fstatSync(memfd);
      expect(own.find(file, length, "c")).toMatchObject({
        backing: "shmem",
        shared: true,
        files: [`${deviceName(dev)}:${ino}`],
      });
    } finally {
      for (const address of [anonymous, shared, file]) native.munmap(address, length);
      closeSync(memfd);
    }
  });

  test("refuses a process that is not there", async () => {
    const error = await refusalOf(() => ProcessMaps.read(0x7ffffffe));
    expectRefusal(error, "TARGET_LOST", /ENOENT/);
  });
});

describe("mappedByOthers", () => {
  test("finds a mapping that another process has, and not this one's own", async () => {
    const length = 4096;
    const memfd = native.memfdCreate("fsl-test-others", MFD_CLOEXEC);
    native.ftruncate(memfd, length);
    const { ino, dev } = fstatSync(memfd);
    const files = new Set([`${deviceName(dev)}:${ino}`]);
    const own = native.mmap(0, length, PROT_READ, MAP_SHARED, memfd, 0);
    expect(mappedByOthers(files, process.pid)).toEqual(new Set());
    const program =
      "globalThis.kept = Bun.mmap('/proc/self/fd/3', { shared: true });" +
      "console.log('mapped'); setInterval(() => {}, 1e6)";
    const child = Bun.spawn([process.execPath, "-e", program], {
      stdio: ["ignore", "pipe", "inherit", memfd],
    });
    try {
      await child.stdout.getReader().read();
      expect(mappedByOthers(files, process.pid)).toEqual(files);
    } finally {
      child.kill("SIGKILL");
      await child.exited;
      native.munmap(own, length);
      closeSync(memfd);
    }
  });
});

describe("process-maps helpers", () => {
  test("parseArea keeps a path with spaces", () => {
    const line = TEXT.split("\n")[6] ?? "";
    expect(parseArea(line).path).toBe("/dev/shm/a file: with spaces (deleted)");
  });

  test("parseMountTypes reads this process's own mounts", () => {
    const types = parseMountTypes(readFileSync("/proc/self/mountinfo", "latin1"));
    expect([...types.values()]).toContain("proc");
  });

  test("parseMountTypes reads a line with and without tags", () => {
    const text =
      "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n" +
      "37 35 0:25 / /dev/shm rw - tmpfs tmpfs rw\nrubbish\n";
    expect([...parseMountTypes(text)]).toEqual([
      ["98:0", "ext3"],
      ["0:25", "tmpfs"],
    ]);
  });

  test.each([
    [0x0801, "8:1"],
    [0x19, "0:25"],
    [0xfe01, "254:1"],
    [0x100300, "3:256"],
  ])("deviceName(%p) is %s", (dev, name) => {
    expect(deviceName(dev)).toBe(name);
  });

  test("readHostPageLength gives a power of two", () => {
    expect([4096, 16384, 65536]).toContain(readHostPageLength());
  });
});
