import { describe, expect, test } from "bun:test";
import { parseNodes, parseTaskPolicy } from "../../src/load/placement.ts";
import {
  MPOL_BIND,
  MPOL_DEFAULT,
  MPOL_INTERLEAVE,
  MPOL_LOCAL,
  MPOL_PREFERRED,
  MPOL_PREFERRED_MANY,
  MPOL_WEIGHTED_INTERLEAVE,
} from "../../src/sys/abi.ts";

const AREA = "555555554000";
const REST = "file=/usr/bin/qemu-system-x86_64 mapped=31 N0=31 kernelpagesize_kB=4\n";

describe("parseTaskPolicy", () => {
  test.each([
    ["default", MPOL_DEFAULT, []],
    ["local", MPOL_LOCAL, []],
    ["bind:0", MPOL_BIND, [0]],
    ["bind:0-1", MPOL_BIND, [0, 1]],
    ["bind=static:1", MPOL_BIND, [1]],
    ["bind=relative:1,3", MPOL_BIND, [1, 3]],
    ["bind=balancing:0-1", MPOL_BIND, [0, 1]],
    ["bind=static|balancing:0-1", MPOL_BIND, [0, 1]],
    ["prefer:1", MPOL_PREFERRED, [1]],
    ["prefer=static:1", MPOL_PREFERRED, [1]],
    ["prefer (many):0-2,9", MPOL_PREFERRED_MANY, [0, 1, 2, 9]],
    ["prefer (many)=relative:0,2", MPOL_PREFERRED_MANY, [0, 2]],
    ["interleave:0,2", MPOL_INTERLEAVE, [0, 2]],
    ["weighted interleave:0-1", MPOL_WEIGHTED_INTERLEAVE, [0, 1]],
    ["weighted interleave=static:1", MPOL_WEIGHTED_INTERLEAVE, [1]],
  ])("%s", (policy, mode, nodes) => {
    expect(parseTaskPolicy(`${AREA} ${policy} ${REST}`)).toEqual({ mode, nodes });
    expect(parseTaskPolicy(`${AREA} ${policy}\n`)).toEqual({ mode, nodes });
  });

  test("looks at the first area only", () => {
    const text = `${AREA} default ${REST}7fff00000000 bind:0 anon=1\n`;
    expect(parseTaskPolicy(text)).toEqual({ mode: MPOL_DEFAULT, nodes: [] });
  });

  test.each([
    ["nothing", ""],
    ["no policy", AREA],
    ["no area", "bind:0 anon=1\n"],
    ["an unknown policy", `${AREA} scatter:0 ${REST}`],
    ["a name that every object has", `${AREA} constructor ${REST}`],
    ["no nodes where some belong", `${AREA} bind ${REST}`],
    ["nodes where none belong", `${AREA} default:0 ${REST}`],
    ["an empty list", `${AREA} bind: ${REST}`],
    ["a list that was cut", `${AREA} bind:0,1`],
    ["descending nodes", `${AREA} bind:1,0 ${REST}`],
    ["a range that runs backwards", `${AREA} bind:3-1 ${REST}`],
    ["half a range", `${AREA} bind:1- ${REST}`],
    ["too large a node", `${AREA} bind:0-1024 ${REST}`],
    ["digits without an end", `${AREA} bind:${"9".repeat(100_000)} ${REST}`],
    ["a list without an end", `${AREA} bind:${"0,".repeat(100_000)}0 ${REST}`],
    ["bytes that are no text", "\0\xff".repeat(128)],
  ])("takes nothing from %s", (_, text) => {
    expect(parseTaskPolicy(text)).toBeUndefined();
  });
});

describe("parseNodes", () => {
  test.each([
    ["0", [0]],
    ["0-3", [0, 1, 2, 3]],
    ["0,2-3,1023", [0, 2, 3, 1023]],
  ])("%s", (list, nodes) => expect(parseNodes(list)).toEqual(nodes));

  test.each(["", ",", "0,,1", "0-1-2", " 0", "0x1", "-1", "1e3", "0,0"])("refuses '%s'", (list) => {
    expect(parseNodes(list)).toBeUndefined();
  });
});
