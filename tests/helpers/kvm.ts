/**
 * Tests of guests on KVM. Where there is none they are skipped, and their titles say why; with
 * FSL_REQUIRE=kvm they fail.
 */
import { test } from "bun:test";
import { isRequired, whyNoKvm } from "./guests.ts";

type Declare = (title: string, body: () => Promise<void>, timeoutMs?: number) => void;

/** Like `test`, for a guest on this accelerator. */
export function testOn(accel: "tcg" | "kvm"): Declare {
  const reason = accel === "kvm" ? whyNoKvm() : null;
  if (reason === null) return test;
  if (!isRequired("kvm")) return (title, body) => test.skip(`${title}: ${reason}`, body);
  return (title) =>
    test(title, () => {
      throw new Error(`FSL_REQUIRE has kvm, and ${reason}`);
    });
}

/** Like `test`, once for each of two guests. */
export function testOnBoth<Guest>(tcg: Guest, kvm: Guest) {
  return (title: string, body: (guest: Guest) => Promise<void>, timeoutMs?: number): void => {
    testOn("tcg")(`${title} (TCG)`, () => body(tcg), timeoutMs);
    testOn("kvm")(`${title} (KVM)`, () => body(kvm), timeoutMs);
  };
}
