/**
 * QEMUs that fsl has started and that wait for a state for ever: their fsl was killed before it left
 * a load state in them. They are found by the private sockets that it made.
 */
import { readFileSync } from "node:fs";
import * as native from "../sys/native.ts";
import { listenerOf } from "./control.ts";
import { isRecord, QmpClient } from "./qmp.ts";
import { controlPaths, runtimeBases } from "./runtime-directory.ts";

/** A QEMU that waits for a state has nothing else to do. */
const ANSWER_MS = 1_000;

/** Pids of such QEMUs of this user. */
export async function findUnbegun(): Promise<number[]> {
  const { listening, connected } = unixSockets();
  const paths = [...runtimeBases()].flatMap(controlPaths);
  // A living fsl is connected from before its QEMU starts.
  const left = paths.filter((path) => listening.has(path) && !connected.has(path));
  const pids = await Promise.all(left.map(waitingAt));
  return pids.filter((pid) => pid !== null);
}

/** The QEMU that listens there, if it waits for a state. */
async function waitingAt(path: string): Promise<number | null> {
  const fd = native.unixConnect(path);
  if (fd < 0) return null;
  const pid = listenerOf(fd);
  const qmp = QmpClient.open(fd, { peer: `QEMU at ${path}`, greetingTimeoutMs: ANSWER_MS });
  try {
    const status = await qmp.request("query-status", undefined, { timeoutMs: ANSWER_MS });
    return isRecord(status) && status["status"] === "inmigrate" && pid > 0 ? pid : null;
  } catch {
    return null;
  } finally {
    qmp.close();
  }
}

/**
 * Paths of this network namespace's unix sockets that listen, and of those that somebody is connected
 * to. @source Linux net/unix/af_unix.c unix_seq_show
 */
function unixSockets(): { listening: Set<string>; connected: Set<string> } {
  const listening = new Set<string>();
  const connected = new Set<string>();
  // Num RefCount Protocol Flags Type St Inode Path
  const row = /^\S+ \S+ \S+ (\S+) \S+ (\S+) +\d+ (\/.*)$/gm;
  for (const [, flags, state, path = ""] of readFileSync("/proc/net/unix", "utf8").matchAll(row)) {
    if (state === CONNECTED) connected.add(path);
    else if (flags === LISTENS) listening.add(path);
  }
  return { listening, connected };
}

/** __SO_ACCEPTCON, SS_CONNECTED; as they are printed. */
const LISTENS = "00010000";
const CONNECTED = "03";
