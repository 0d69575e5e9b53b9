/**
 * The two native libraries as files: paths on disk under plain `bun`, paths in the executable's own file system after
 * `bun build --compile`. Only the ones for this architecture are embedded: the bundler knows process.arch of its target.
 */
import preloadArm from "../../build/fsl-preload-aarch64.so" with { type: "file" };
import preloadX86 from "../../build/fsl-preload-x86_64.so" with { type: "file" };
import shimArm from "../../build/fsl-shim-aarch64.so" with { type: "file" };
import shimX86 from "../../build/fsl-shim-x86_64.so" with { type: "file" };

const isArm = process.arch === "arm64";

/** The shim: raw system calls, shim/fsl_shim.h. */
export const SHIM_PATH: string = isArm ? shimArm : shimX86;
/** The library that makes a userfaultfd inside a program that is being started, shim/preload.c. */
export const PRELOAD_PATH: string = isArm ? preloadArm : preloadX86;
