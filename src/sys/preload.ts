/**
 * The preload library, ready to be written to a memfd whose path (`/proc/self/fd/N`) goes into
 * LD_PRELOAD. Its protocol (environment variables, message) is described in shim/preload.c.
 */
export { preloadBytes } from "./embedded.ts";
