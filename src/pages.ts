/**
 * Page arithmetic. Three different numbers: page index (0-based), byte offset, address; names say
 * which.
 */
import { assert } from "./errors.ts";

export const KiB = 1024;
export const MiB = 1024 * KiB;
export const GiB = 1024 * MiB;

/** `value` rounded down to a multiple of `alignment` (bytes, > 0, need not be a power of two). */
export function alignDown(value: number, alignment: number): number {
  return value - (value % alignment);
}

/** `value` rounded up to a multiple of `alignment` (bytes, > 0). */
export function alignUp(value: number, alignment: number): number {
  return alignDown(value + alignment - 1, alignment);
}

/** A 64-bit field as a number. Addresses and file offsets of a real host fit into 2^53. */
export function toSafeInteger(value: bigint, what: string): number {
  const result = Number(value);
  assert(Number.isSafeInteger(result), `${what} ${value} is beyond 2^53`);
  return result;
}

/** `0x1f3` */
export function hex(value: number): string {
  return `0x${value.toString(16)}`;
}
