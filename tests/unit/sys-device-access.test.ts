import { describe, expect, test } from "bun:test";
import { grantDevice, nameIn, userName } from "../../src/sys/device-access.ts";

const PASSWD = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n";

describe("device-access.nameIn", () => {
  test("finds a user by number, not by group", () => {
    expect(nameIn(PASSWD, "1000")).toBe("ann");
    expect(nameIn("bob:x:7:1000::/:/bin/sh", "1000")).toBeNull();
  });

  test("is null for a number that nobody has", () => {
    expect(nameIn(PASSWD, "4242")).toBeNull();
    expect(nameIn("", "0")).toBeNull();
  });
});

describe("device-access.userName", () => {
  test("does not depend on $USER", () => {
    expect(userName()).not.toMatch(/[$]|^$/);
  });
});

describe("device-access.grantDevice", () => {
  test("is a command line that a shell takes as it is", () => {
    expect(grantDevice("/dev/x", "ann")).toBe(
      "setfacl -m u:ann:rw /dev/x # as root; setfacl is in the package acl",
    );
  });
});
