import { describe, expect, test } from "bun:test";
import { parseNodePolicies, readNodePolicies } from "../../src/vmm/node-policies.ts";

const MIB = 2 ** 20;
const TEXT = [
  "55d000000000 default file=/usr/bin/qemu-system-x86_64 mapped=900 N0=900 kernelpagesize_kB=4",
  "7f0000000000 bind:0-1",
  "7f0004000000 default anon=3 dirty=3 N0=3 kernelpagesize_kB=4",
  "7f0008000000 interleave:0,2 anon=1 N2=1",
  "7f000c000000 default",
].join("\n");

describe("parseNodePolicies", () => {
  test.each([
    ["a whole area", 0x7f0000000000, 64 * MIB, { nodePolicy: "bind:0-1" }],
    ["the last byte of an area", 0x7f0003ffffff, 1, { nodePolicy: "bind:0-1" }],
    ["memory with the default", 0x7f0004000000, 64 * MIB, {}],
    [
      "memory that ends in another area",
      0x7f0004000000,
      65 * MIB,
      { nodePolicy: "interleave:0,2" },
    ],
    ["the last area", 0x7f000c000000, MIB, {}],
  ])("finds the policy of %s", (_, startAddr, length, expected) => {
    expect(parseNodePolicies(TEXT).of(startAddr, length)).toEqual(expected);
  });
});

describe("readNodePolicies", () => {
  test("does not look where there is one node, or none", () => {
    expect(readNodePolicies(-1, "0").of(0, MIB)).toEqual({});
    expect(readNodePolicies(-1, "").of(0, MIB)).toEqual({});
  });

  test("takes memory for bound when the kernel does not say", () => {
    expect(readNodePolicies(-1, "0-1").of(0, MIB)).toEqual({ nodePolicy: "unknown" });
  });
});
