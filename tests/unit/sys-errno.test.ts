import { describe, expect, test } from "bun:test";
import { constants } from "node:os";
import * as abi from "../../src/sys/abi.ts";
import { errnoName, errnoText } from "../../src/sys/errno.ts";

const NUMBERS: Readonly<Record<string, number>> = constants.errno;

describe("errno.errnoName", () => {
  test.each(["EPERM", "EAGAIN", "EEXIST", "ENODATA", "ETIMEDOUT", "EDQUOT"])(
    "agrees with the runtime about %s",
    (name) => {
      expect(errnoName(NUMBERS[name] ?? 0)).toBe(name);
      expect(errnoName(-(NUMBERS[name] ?? 0))).toBe(name);
    },
  );

  test("gives the number of an errno that it does not know", () => {
    expect(errnoName(-999)).toBe("errno 999");
    expect(errnoText(999)).toBe("errno 999");
  });
});

describe("errno.errnoText", () => {
  test("says name and meaning", () => {
    expect(errnoText(-11)).toBe("EAGAIN, resource temporarily unavailable");
  });
});

describe("errno numbers of abi.ts", () => {
  const own = Object.entries(abi).filter(([name]) => /^E[A-Z0-9]{3,}$/.test(name));

  test("there are some", () => {
    expect(own.length).toBeGreaterThan(15);
  });

  test.each(own)("%s is the runtime's", (name, value) => {
    expect(value).toBe(NUMBERS[name] as never);
  });
});
