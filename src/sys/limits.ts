/** The limits of this process that a load needs. */
import { FslError } from "../errors.ts";
import { RLIMIT_NOFILE } from "./abi.ts";
import * as native from "./native.ts";

/**
 * Descriptors that a load may have open at once: those of the runtime, of QMP and userfaultfd, of
 * the Workers. One more that cannot be had may end the whole process, wherever that is.
 */
const DESCRIPTORS_MIN = 64;

/**
 * Looked at before anything is started.
 * @throws FslError HOST_UNSUPPORTED when there are too few descriptors
 */
export function checkDescriptorLimit(): void {
  const limit = new BigUint64Array(2);
  if (native.prlimit(0, RLIMIT_NOFILE, null, limit) < 0) return;
  const [soft = 0n] = limit;
  if (soft >= BigInt(DESCRIPTORS_MIN)) return;
  throw new FslError(
    "HOST_UNSUPPORTED",
    `descriptor limit: expected at least ${DESCRIPTORS_MIN}, found ${soft}; run: ulimit -n 1024`,
    { expected: DESCRIPTORS_MIN, found: Number(soft) },
  );
}
