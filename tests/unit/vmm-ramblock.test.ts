import { describe, expect, test } from "bun:test";
import { BLOCK_COUNT_MAX, parseRamblocks, TABLE_LENGTH_MAX } from "../../src/vmm/ramblock.ts";
import { expectRefusal, refusalOf } from "../helpers/qemu-vmm.ts";

/** Lines as QEMU 10.0.2 prints them, spaces and all; the last name overflows its column. */
const REAL = [
  "              Block Name    PSize              Offset               Used              Total" +
    "                HVA  RO",
  "                  pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 " +
    "0x00007ff2a7e00000  rw",
  "                      d1    2 MiB  0x0000000010000000 0x0000000008000000 0x0000000008000000 " +
    "0x00007ff29fc00000  rw",
  "    /rom@etc/acpi/tables    4 KiB  0x0000000018080000 0x0000000000020000 0x0000000000200000 " +
    "0x00007ff2b8400000  ro",
  "   0000:00:02.0/vga.vram    4 KiB  0x0000000018100000 0x0000000001000000 0x0000000001000000 " +
    "0x00007ff2b6e00000  rw",
  "a name with spaces that is longer than its column   64 KiB  0x0000000019100000 " +
    "0x0000000000010000 0x0000000000010000 0x00007ff2b6d00000  rw",
  "",
].join("\n");

const HEADER = "Block Name PSize Offset Used Total HVA RO\n";

interface Line {
  name: string;
  pageSize: string;
  used: string;
  total: string;
  address: string;
  access: string;
}

function table(...lines: Partial<Line>[]): string {
  const zero = `0x${"0".repeat(16)}`;
  const rows = lines.map((line, index) => {
    const used = line.used ?? "0x0000000000001000";
    const address = line.address ?? `0x000000000000${index + 1}000`;
    const middle = `${line.pageSize ?? "4 KiB"} ${zero} ${used} ${line.total ?? used} ${address}`;
    return `${line.name ?? `block${index}`} ${middle} ${line.access ?? "rw"}\n`;
  });
  return HEADER + rows.join("");
}

describe("parseRamblocks", () => {
  test("reads what QEMU prints", () => {
    expect(parseRamblocks(REAL)).toEqual([
      {
        idstr: "pc.ram",
        pageSize: 4096,
        length: 0x10000000,
        maxLength: 0x10000000,
        hostAddr: 0x7ff2a7e00000,
        readOnly: false,
      },
      {
        idstr: "d1",
        pageSize: 2 * 1024 * 1024,
        length: 0x8000000,
        maxLength: 0x8000000,
        hostAddr: 0x7ff29fc00000,
        readOnly: false,
      },
      {
        idstr: "/rom@etc/acpi/tables",
        pageSize: 4096,
        length: 0x20000,
        maxLength: 0x200000,
        hostAddr: 0x7ff2b8400000,
        readOnly: true,
      },
      {
        idstr: "0000:00:02.0/vga.vram",
        pageSize: 4096,
        length: 0x1000000,
        maxLength: 0x1000000,
        hostAddr: 0x7ff2b6e00000,
        readOnly: false,
      },
      {
        idstr: "a name with spaces that is longer than its column",
        pageSize: 65536,
        length: 0x10000,
        maxLength: 0x10000,
        hostAddr: 0x7ff2b6d00000,
        readOnly: false,
      },
    ]);
  });

  test("reads a name that looks like columns", () => {
    const name = "4 KiB 0x0000000000000000 rw";
    expect(parseRamblocks(table({ name }))[0]?.idstr).toBe(name);
  });

  test("takes lines that end as the human monitor ends them", () => {
    expect(parseRamblocks(table({}).replaceAll("\n", "\r\n"))).toHaveLength(1);
  });

  test("takes a table without blocks", () => {
    expect(parseRamblocks(HEADER)).toEqual([]);
  });

  test.each([
    ["no text", "", /header line with HVA and RO/],
    ["the table of QEMU 7", "Block Name PSize Offset Used Total\n", /header line with HVA and RO/],
    ["a line cut short", `${HEADER}pc.ram 4 KiB 0x0000\n`, /cannot be read/],
    ["a short number", table({ used: "0x1000" }), /cannot be read/],
    ["an unknown unit", table({ pageSize: "4 TiB" }), /cannot be read/],
    ["an unknown access", table({ access: "wx" }), /cannot be read/],
    ["a page size of 3 KiB", table({ pageSize: "3 KiB" }), /page size 3072/],
    ["a page size of 2 KiB", table({ pageSize: "2 KiB" }), /page size 2048/],
    ["no name", `${HEADER}  4 KiB ${"0x0000000000001000 ".repeat(4)}rw\n`, /cannot be read/],
    ["a name twice", table({ name: "a" }, { name: "a" }), /"a" appears twice/],
    ["a name of 256 bytes", table({ name: "x".repeat(256) }), /too long/],
    ["more used than there is", table({ total: "0x0000000000000fff" }), /uses 4096 of 4095/],
    ["an unaligned address", table({ address: "0x00007ff2a7e00001" }), /unaligned/],
    ["address 0", table({ address: "0x0000000000000000" }), /at 0x0/],
    ["a kernel address", table({ address: "0xffffffff81000000" }), /past every user address/],
    ["an endless length", table({ used: "0xffffffffffffffff" }), /past every user address/],
    ["a line without end", `${HEADER}${" x".repeat(100_000)}`, /cannot be read/],
    ["too many blocks", table(...Array(BLOCK_COUNT_MAX + 1).fill({})), /at most 4096 blocks/],
    ["too much text", HEADER + " ".repeat(TABLE_LENGTH_MAX), /at most 2097152 characters/],
  ])("refuses %s", async (_what, text, message) => {
    expectRefusal(await refusalOf(() => parseRamblocks(text)), "TARGET_MISMATCH", message);
  });
});
