/** Decoding of struct uffd_msg, on bytes written field by field. @source linux/userfaultfd.h */
import { describe, expect, test } from "bun:test";
import { EVENT_PAGEFAULT, EVENT_REMOVE, EVENT_UNMAP, UffdEvents } from "../../src/uffd/uffd.ts";

const MESSAGE_BYTES = 32;

/** Messages of u8 event and u64 words at offsets 8, 16, 24. */
function messages(...list: readonly (readonly [event: number, ...words: bigint[]])[]): UffdEvents {
  const data = new DataView(new ArrayBuffer(list.length * MESSAGE_BYTES));
  for (const [index, [event, ...words]] of list.entries()) {
    data.setUint8(index * MESSAGE_BYTES, event);
    for (const [word, value] of words.entries()) {
      data.setBigUint64(index * MESSAGE_BYTES + 8 + 8 * word, value, true);
    }
  }
  return new UffdEvents(data);
}

describe("UffdEvents", () => {
  test("decodes a page fault above 4 GiB", () => {
    const events = messages([0x12, 3n, 0x7fff_ffff_f000n, 4711n]);
    expect(events.type(0)).toBe(EVENT_PAGEFAULT);
    expect(events.faultFlags(0)).toBe(3);
    expect(events.faultAddress(0)).toBe(0x7fff_ffff_f000);
    expect(events.faultTid(0)).toBe(4711);
  });

  test("decodes the second message of a batch, not the first again", () => {
    const events = messages([0x12, 0n, 0x1000n, 0n], [0x15, 0x7f00_0000_0000n, 0x7f00_0020_0000n]);
    expect(events.type(1)).toBe(EVENT_REMOVE);
    expect(events.removeStart(1)).toBe(0x7f00_0000_0000);
    expect(events.removeEnd(1)).toBe(0x7f00_0020_0000);
  });

  test("decodes UNMAP", () => {
    const events = messages([0x16, 1n, 2n]);
    expect(events.type(0)).toBe(EVENT_UNMAP);
    expect([events.removeStart(0), events.removeEnd(0)]).toEqual([1, 2]);
  });

  test("works on a view that does not begin at the start of its buffer", () => {
    const buffer = new ArrayBuffer(64 + MESSAGE_BYTES);
    const data = new DataView(buffer, 64);
    data.setUint8(0, 0x12);
    data.setBigUint64(16, 0x5000n, true);
    expect(new UffdEvents(data).faultAddress(0)).toBe(0x5000);
  });
});
