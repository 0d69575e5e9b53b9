/**
 * Random names and numbers. Not from node:crypto, which takes 4 ms to load while QEMU waits to be
 * started.
 */

/** @returns `bytes` random bytes in hexadecimal */
export function randomHex(bytes: number): string {
  return crypto.getRandomValues(new Uint8Array(bytes)).toHex();
}

/** A whole number, min <= it < end <= min + 2^32. */
export function randomInteger(min: number, end: number): number {
  const [word = 0] = crypto.getRandomValues(new Uint32Array(1));
  return min + Math.floor((word / 2 ** 32) * (end - min));
}
