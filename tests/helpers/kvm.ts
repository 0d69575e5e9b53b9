/** Tests of guests on KVM: see declare.ts. */
import { type Declare, testUnless } from "./declare.ts";
import { whyNoKvm } from "./guests.ts";

/** Like `test`, for a guest on this accelerator. @param reason why it cannot run on any here, or null */
export function testOn(accel: "tcg" | "kvm", reason: string | null = null): Declare {
  if (reason !== null || accel === "tcg") return testUnless(reason, "kernel");
  return testUnless(whyNoKvm(), "kvm");
}

/** Like `test`, once for each of two guests. */
export function testOnBoth<Guest>(tcg: Guest, kvm: Guest, reason: string | null = null) {
  return (title: string, body: (guest: Guest) => Promise<void>, timeoutMs?: number): void => {
    testOn("tcg", reason)(`${title} (TCG)`, () => body(tcg), timeoutMs);
    testOn("kvm", reason)(`${title} (KVM)`, () => body(kvm), timeoutMs);
  };
}
