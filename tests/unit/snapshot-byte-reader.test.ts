import { describe, expect, test } from "bun:test";
import { mkdtempSync, openSync, closeSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { ByteReader, FileByteSource } from "../../src/snapshot/byte-reader.ts";
import { CountingSource, refusalOf } from "../helpers/snapshot-builder.ts";

function readerOf(...bytes: number[]): ByteReader {
  return new ByteReader(new CountingSource(Uint8Array.from(bytes)));
}

describe("ByteReader numbers", () => {
  test("reads big-endian fields one after the other", () => {
    const reader = readerOf(0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07);
    expect(reader.readU8("a")).toBe(0x01);
    expect(reader.readU16BE("b")).toBe(0x0203);
    expect(reader.readU32BE("c")).toBe(0x04050607);
    expect(reader.atEnd).toBe(true);
  });

  test("reads a 64-bit field beyond 2^32 exactly", () => {
    expect(readerOf(0x00, 0x1f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff).readU64BE("x")).toBe(
      2 ** 53 - 1,
    );
  });

  test("refuses a 64-bit field of 2^53 and names its offset", () => {
    const error = refusalOf(() => readerOf(0x00, 0x20, 0, 0, 0, 0, 0, 0).readU64BE("pages_offset"));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.message).toBe(
      "pages_offset: expected a number below 2^53, found 0x20000000000000 (test.snap at 0x0)",
    );
  });

  test("refuses a field that ends past the file", () => {
    const reader = readerOf(1, 2, 3);
    reader.skip(1, "x");
    const error = refusalOf(() => reader.readU32BE("magic"));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.details).toMatchObject({ fileOffset: 1, expected: 3, found: 5 });
  });

  test("peeks without going on, and -1 at the end", () => {
    const reader = readerOf(7);
    expect(reader.peekU8("x")).toBe(7);
    expect(reader.readU8("x")).toBe(7);
    expect(reader.peekU8("x")).toBe(-1);
  });
});

describe("ByteReader.readString8", () => {
  test("reads a counted name", () => {
    expect(readerOf(3, 0x72, 0x61, 0x6d, 0xff).readString8("name")).toBe("ram");
  });

  test("refuses a control character and names its offset", () => {
    const error = refusalOf(() => readerOf(3, 0x72, 0x0a, 0x6d).readString8("name"));
    expect(error.code).toBe("SNAPSHOT_FORMAT");
    expect(error.details).toMatchObject({ fileOffset: 2, found: "byte 0xa" });
  });

  test("refuses a name that the file does not hold", () => {
    expect(refusalOf(() => readerOf(200, 0x72).readString8("name")).code).toBe("SNAPSHOT_FORMAT");
  });
});

describe("ByteReader windows", () => {
  test("reads a small window after a jump and a large one when it goes on", () => {
    const source = new CountingSource(new Uint8Array(1_000_000));
    const reader = new ByteReader(source);
    reader.seek(500_000, "x");
    reader.readU32BE("x");
    expect(source.bytesRead).toBe(4096);
    for (let index = 0; index < 2000; index++) reader.readU64BE("x");
    expect(source.reads).toBe(2);
    expect(source.bytesRead).toBe(4096 + 65536);
  });

  test("keeps to the window when it steps back inside it", () => {
    const source = new CountingSource(Uint8Array.from([1, 2, 3, 4]));
    const reader = new ByteReader(source);
    reader.readU32BE("x");
    reader.seek(1, "x");
    expect(reader.readU8("x")).toBe(2);
    expect(source.reads).toBe(1);
  });

  test("refuses to seek past the end, backwards past 0, and to a fraction", () => {
    const reader = readerOf(1, 2, 3);
    expect(refusalOf(() => reader.seek(4, "pages")).code).toBe("SNAPSHOT_FORMAT");
    expect(refusalOf(() => reader.seek(-1, "pages")).code).toBe("SNAPSHOT_FORMAT");
    expect(refusalOf(() => reader.seek(0.5, "pages")).code).toBe("SNAPSHOT_FORMAT");
    expect(refusalOf(() => reader.skip(2 ** 53, "pages")).code).toBe("SNAPSHOT_FORMAT");
  });
});

describe("FileByteSource.read", () => {
  test("says so when the file was truncated after it was opened", () => {
    const directory = mkdtempSync(join(tmpdir(), "fsl-byte-reader-"));
    const path = join(directory, "a.snap");
    writeFileSync(path, new Uint8Array(8192));
    const fd = openSync(path, "r");
    try {
      const source = new FileByteSource(fd, path, 8192);
      expect(source.read(4096, 4096).length).toBe(4096);
      truncateSync(path, 5000);
      const error = refusalOf(() => source.read(4096, 4096));
      expect(error.code).toBe("SNAPSHOT_FORMAT");
      expect(error.details["fileOffset"]).toBe(5000);
    } finally {
      closeSync(fd);
      rmSync(directory, { recursive: true });
    }
  });

  test("turns a failed read into SNAPSHOT_OPEN with the system's reason", () => {
    const fd = openSync("/", "r");
    try {
      const error = refusalOf(() => new FileByteSource(fd, "/", 100).read(0, 100));
      expect(error.code).toBe("SNAPSHOT_OPEN");
      expect(error.details["reason"]).toBe("EISDIR");
    } finally {
      closeSync(fd);
    }
  });
});
