/**
 * The one error class of fsl and its table of codes. Codes and exit codes are stable API; texts are
 * not. Message grammar: `<what failed>: <expected>, <found> (<where>); <what to do>`. No full stop,
 * no prefix. What it quotes is printable (src/text.ts).
 */
import { printable } from "./text.ts";

/** Exit code of each error code. README.md repeats this table; `npm run check` compares the two. */
export const EXIT_CODES = {
  INTERNAL: 1,
  USAGE: 2,
  SNAPSHOT_OPEN: 3,
  SNAPSHOT_FORMAT: 4,
  SNAPSHOT_UNSUPPORTED: 5,
  HOST_UNSUPPORTED: 6,
  TARGET_MISMATCH: 7,
  TARGET_LOST: 8,
  SUPPLY_FAILED: 9,
  SAVE_FAILED: 10,
} as const;

export type ErrorCode = keyof typeof EXIT_CODES;

/** Plain data that belongs to an error: path, idstr, offsets, expected and found values. */
export type ErrorDetails = Readonly<Record<string, string | number | boolean | null | undefined>>;

/** Every error that the world can cause. Programmer errors are `assert` failures instead. */
export class FslError extends Error {
  override readonly name = "FslError";
  readonly code: ErrorCode;
  readonly details: ErrorDetails;

  constructor(code: ErrorCode, message: string, details: ErrorDetails = {}, cause?: unknown) {
    super(printable(message), cause === undefined ? undefined : { cause });
    this.code = code;
    this.details = details;
  }

  /** Exit status of the command line for this error, 1..10. */
  get exitCode(): number {
    return EXIT_CODES[this.code];
  }
}

export function isFslError(value: unknown): value is FslError {
  return value instanceof FslError;
}

/** Throws a plain `Error` (a bug in fsl) when an invariant does not hold. */
export function assert(condition: unknown, message: string): asserts condition {
  if (!condition) throw new Error(`assertion failed: ${message}`);
}
