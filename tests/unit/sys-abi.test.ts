/** The comparison of the two ABI tables. That the real ones agree is tested in tests/kernel. */
import { describe, expect, test } from "bun:test";
import { ABI_TABLE, findAbiMismatch } from "../../src/sys/abi.ts";

function tableValues(): BigUint64Array {
  return BigUint64Array.from(ABI_TABLE.map(([, value]) => BigInt(value)));
}

describe("abi.findAbiMismatch", () => {
  test("finds nothing in equal tables", () => {
    expect(findAbiMismatch(tableValues(), ABI_TABLE.length)).toBeNull();
  });

  test("names the first entry that differs", () => {
    const values = tableValues();
    values[2] = 40n;
    values[5] = 0n;
    const expected = { name: "sizeof(uffd_msg)", expected: 32, found: 40 };
    expect(findAbiMismatch(values, ABI_TABLE.length)).toEqual(expected);
  });

  test("finds a difference in the last entry", () => {
    const values = tableValues();
    values[values.length - 1] = 1_000_000n;
    expect(findAbiMismatch(values, ABI_TABLE.length)?.name).toBe("sizeof(helper_record)");
  });

  test.each([0, ABI_TABLE.length - 1, ABI_TABLE.length + 1])("refuses %p entries", (count) => {
    const mismatch = findAbiMismatch(tableValues(), count);
    expect(mismatch).toEqual({
      name: "number of entries",
      expected: ABI_TABLE.length,
      found: count,
    });
  });

  test("names are unique", () => {
    const names = ABI_TABLE.map(([name]) => name);
    expect(new Set(names).size).toBe(names.length);
  });
});
