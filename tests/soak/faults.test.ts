/**
 * The random tests of tests/fault, many times: a hundred kills of fsl, not one wrong byte. Of a
 * paused guest all memory is compared; a Linux guest sums its data and verifies it; a KVM guest
 * checks its memory itself; a balloon takes memory meanwhile; fsl and QEMU get signals.
 */
import { MANY } from "../helpers/fault-runs.ts";

process.env[MANY] = "1";
await import("../fault/kill.test.ts");
await import("../fault/discards.test.ts");
await import("../fault/endings.test.ts");
