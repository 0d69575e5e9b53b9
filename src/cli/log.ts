/**
 * Messages for people, on stderr. The only import of consola, with arguments.ts and main.ts the only readers of flags.
 * On a terminal they look as consola's do. In a pipe or a log they are plain lines, by consola's core alone: the rest
 * of it and `process.stderr` would take 13 ms of CPU time, a twentieth of what a small guest's load takes.
 */
import type { ConsolaInstance } from "consola";
import { fstatSync } from "node:fs";
import { type Logger, printable } from "../index.ts";

const STDERR = 2;
/** consola's `info`. By itself it would say less where NODE_ENV is test, or TEST is set. */
const LEVEL = 3;
/** Major number of /dev/null and its like, the character devices that are no terminals. */
const MEMORY_DEVICES = 1;

let isTerminal: boolean | undefined;

/** Whether somebody may be watching. Not by `node:tty`, which alone takes 4 ms. */
export function isWatched(): boolean {
  isTerminal ??= isTerminalLike(STDERR);
  return isTerminal;
}

function isTerminalLike(fd: number): boolean {
  try {
    const status = fstatSync(fd);
    return status.isCharacterDevice() && status.rdev >> 8 !== MEMORY_DEVICES;
  } catch {
    return false; // It is closed.
  }
}

let sink: Bun.FileSink | undefined;

/**
 * Writes a remark on stderr. One that cannot be written (a full disk, a reader that has gone, a terminal that was
 * closed) is lost, and a pipe that nobody reads is not waited for: the load goes on, for a guest waits for its pages.
 */
export function remark(text: string): void {
  try {
    sink ??= Bun.stderr.writer();
    // Which of the two it is that fails, and when, depends on what stderr is.
    for (const done of [sink.write(text), sink.flush()] as unknown[]) {
      if (done instanceof Promise) done.catch(() => {});
    }
  } catch {
    // Lost.
  }
}

let isQuiet = false;
let instance: ConsolaInstance | undefined;

function consola(): ConsolaInstance {
  instance ??= isWatched() ? forTerminal() : forLog();
  return instance;
}

function forTerminal(): ConsolaInstance {
  const { createConsola } = require("consola") as typeof import("consola");
  process.stderr.on("error", () => {});
  // stdout carries results only; consola would write `info` there.
  return createConsola({ level: LEVEL, stdout: process.stderr, stderr: process.stderr });
}

function forLog(): ConsolaInstance {
  const { createConsola } = require("consola/core") as typeof import("consola/core");
  const reporter = {
    log: ({ type, args }: { type: string; args: unknown[] }) =>
      remark(`[${type}] ${args.join(" ")}\n`),
  };
  return createConsola({ level: LEVEL, reporters: [reporter] });
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
