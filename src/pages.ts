/**
 * Page arithmetic. Three different numbers: page index (0-based), byte offset, address; names say
 * which.
 */
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

/** `0x1f3` */
export function hex(value: number): string {
  return `0x${value.toString(16)}`;
}
