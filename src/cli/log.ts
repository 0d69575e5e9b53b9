/**
 * Messages for people, on stderr. The only import of consola, with arguments.ts and main.ts the
 * only readers of flags. It is loaded with the first message that is shown: it touches the standard
 * streams, which takes 12 ms, and by then QEMU is starting.
 */
import type { ConsolaInstance } from "consola";
import { type Logger, printable } from "../index.ts";

let isTolerant = false;

/**
 * stderr for remarks: one that cannot be written (a full disk, a reader that has gone) is lost, and the load
 * goes on, for a guest waits for its pages.
 */
export function remarks(): NodeJS.WriteStream {
  if (!isTolerant) process.stderr.on("error", () => {});
  isTolerant = true;
  return process.stderr;
}

let isQuiet = false;
let instance: ConsolaInstance | undefined;

function consola(): ConsolaInstance {
  if (instance === undefined) {
    const { createConsola } = require("consola") as typeof import("consola");
    // stdout carries results only; consola would write `info` there.
    instance = createConsola({ stdout: remarks(), stderr: remarks() });
  }
  return instance;
}

/** Also what the library says while it loads. */
export const log: Logger = {
  info(message) {
    if (!isQuiet) consola().info(printable(message));
  },
  warn(message) {
    if (!isQuiet) consola().warn(printable(message));
  },
};

/** @param quiet nobody wants, or reads, remarks; errors are not printed here */
export function setQuiet(quiet: boolean): void {
  isQuiet = quiet;
}
