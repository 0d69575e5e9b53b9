/**
 * Messages for people, on stderr. The only import of consola, with arguments.ts and main.ts the
 * only readers of flags.
 */
import { createConsola, LogLevels } from "consola";
import type { Logger } from "../index.ts";

/** stdout carries results only; consola would write `info` there. */
export const log = createConsola({ stdout: process.stderr, stderr: process.stderr });

/** @param quiet only errors are shown */
export function setQuiet(quiet: boolean): void {
  log.level = quiet ? LogLevels.error : LogLevels.info;
}

/** Nobody reads it. */
export function setSilent(): void {
  log.level = LogLevels.silent;
}

/** What the library says while it loads. */
export const loadLogger: Logger = {
  info: (message) => log.info(message),
  warn: (message) => log.warn(message),
};
