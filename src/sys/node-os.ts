/** node:os when it is needed: to import it takes 0.5 ms of each start, which QEMU waits for. */
export function nodeOs(): typeof import("node:os") {
  return process.getBuiltinModule("node:os");
}
