/** The random tests of tests/fault, many times: a hundred kills of fsl, not one wrong byte. */
import { MANY } from "../helpers/fault-runs.ts";

process.env[MANY] = "1";
await import("../fault/kill.test.ts");
await import("../fault/discards.test.ts");
await import("../fault/endings.test.ts");
