/**
 * The two native libraries as bytes. `npm run build` writes them as base64 into one module,
 * build/libraries.json, and every way of running has them from there: plain `bun`, the executable,
 * a Worker started from a bundle, and somebody else's program compiled with `bun build --compile`.
 * Files beside the code would be another path in each of these, and Bun extracts embedded libraries
 * to a temporary directory, which leaves files behind and fails where that is noexec.
 */
import libraries from "../../build/libraries.json";

const arch = process.arch === "arm64" ? "aarch64" : "x86_64";

/** For messages. */
export const ARCHITECTURE: string = arch;

/** The shim: raw system calls, shim/fsl_shim.h. */
export function shimBytes(): Uint8Array {
  return Buffer.from(libraries[`shim-${arch}`], "base64");
}

/** The library that makes a userfaultfd inside a program that is being started, shim/preload.c. */
export function preloadBytes(): Uint8Array {
  return Buffer.from(libraries[`preload-${arch}`], "base64");
}
