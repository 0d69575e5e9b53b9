/**
 * What fsl must know of a QEMU that waits for its state: version, machine type, RAMBlocks and where
 * they are, devices that can give memory back, migration settings. All of it is asked in one go,
 * before QEMU is even ready to answer.
 *
 * QEMU takes 0.4 ms for each command, one after the other. So the most needed come first, and of a
 * QEMU that fsl has started itself nothing is asked that its command line tells.
 */
import { readFileSync } from "node:fs";
import { FslError } from "../errors.ts";
import { alignUp } from "../pages.ts";
import { HOST_PAGE_LENGTH } from "../sys/host-pages.ts";
import { freeFdset } from "./fdset.ts";
import { canDiscard, DEVICE_LISTS, deviceTypes, isHelped } from "./lazy-breakers.ts";
import { MigrationSettings } from "./migration-settings.ts";
import { readNodePolicies } from "./node-policies.ts";
import { ProcessMaps, type RangeBacking, mappedByOthers } from "./process-maps.ts";
import { hasOptionFile } from "./qemu-command.ts";
import { type QmpClient, type QmpReply, type QmpVersion, formatVersion, isRecord } from "./qmp.ts";
import { type RamblockLine, parseRamblocks } from "./ramblock.ts";
import type { GuestRegion } from "./target.ts";

/** QEMU's word, checked for form but not yet against the kernel's. */
export interface Inventory {
  readonly version: QmpVersion;
  readonly machineType: string | null;
  readonly ramblocks: readonly RamblockLine[];
  readonly canDiscard: boolean;
  /** Null when QEMU does not say. */
  readonly vcpus: number | null;
  /** Some device of it works with a process that maps guest memory, by QEMU's word. */
  readonly hasHelpers: boolean;
  readonly settings: MigrationSettings;
  /** An fdset number that nobody uses; null when that was not asked. */
  readonly freeFdset: number | null;
}

/** mapped-ram, and `file:` with an fdset: QEMU 9.0. */
const VERSION_MAJOR_MIN = 9;
/** What is known of a QEMU without asking. */
export interface KnownBefore {
  /** It was started with `-incoming defer` just now. */
  readonly isWaiting: boolean;
  /** No device that can give memory back. */
  readonly hasNoDiscards: boolean;
  /** Null when that has to be asked. */
  readonly vcpus: number | null;
  /** Given when they are QEMU's defaults. */
  readonly settings?: MigrationSettings;
}

const NOTHING_KNOWN: KnownBefore = { isWaiting: false, hasNoDiscards: false, vcpus: null };

/**
 * Sends all questions at once and judges the answers.
 * @throws FslError TARGET_LOST when the connection breaks, TARGET_MISMATCH when this QEMU cannot
 * take a state
 */
export async function takeInventory(
  qmp: QmpClient,
  known: KnownBefore = NOTHING_KNOWN,
): Promise<Inventory> {
  const { isWaiting, hasNoDiscards } = known;
  const [version, table, type, settings, fdsets, lists, state, network, cpus] = await Promise.all([
    qmp.ready,
    qmp.execute("x-query-ramblock"),
    qmp.execute("qom-get", { path: "/machine", property: "type" }),
    known.settings ?? MigrationSettings.read(qmp),
    isWaiting ? null : qmp.execute("query-fdsets"),
    Promise.all(hasNoDiscards ? [] : DEVICE_LISTS.map((path) => askForList(qmp, path))),
    Promise.all(isWaiting ? [] : [qmp.request("query-status"), qmp.request("query-migrate")]),
    // What came by `netdev_add` is on no command line.
    isWaiting ? null : qmp.execute("human-monitor-command", { "command-line": "info network" }),
    known.vcpus === null ? qmp.execute("query-cpus-fast") : null,
  ]);
  checkVersion(version);
  if (!isWaiting) checkWaiting(state[0], state[1]);
  return {
    version,
    machineType: machineTypeOf(type),
    ramblocks: parseRamblocks(await ramblockText(qmp, table)),
    // A list that QEMU does not give counts as one with such a device.
    canDiscard: lists.some((list) => deviceTypes(list)?.some(canDiscard) ?? true),
    vcpus: cpus?.ok === true && Array.isArray(cpus.value) ? cpus.value.length : known.vcpus,
    hasHelpers:
      lists.some((list) => deviceTypes(list)?.some(isHelped)) ||
      // A back end that only has such a name costs no more than a full load.
      (network?.ok === true && isHelped(String(network.value))),
    settings,
    freeFdset: fdsets === null ? null : freeFdset(fdsets),
  };
}

function askForList(qmp: QmpClient, path: string): Promise<QmpReply> {
  return qmp.execute("qom-list", { path });
}

/**
 * Pairs QEMU's RAMBlocks with the kernel's account of that process.
 * @param maps its memory, if that was read already
 * @throws FslError TARGET_MISMATCH when a block is not where QEMU says, or not of the kind it says
 */
export function locateRegions(
  ramblocks: readonly RamblockLine[],
  pid: number,
  hasHelpersByQemu = false,
  maps = ProcessMaps.read(pid),
): GuestRegion[] {
  const located = ramblocks
    .filter((block) => block.length > 0)
    .map((block) => ({ block, range: locate(block, maps) }));
  const sharedFiles = new Set(located.flatMap(({ range }) => (range.shared ? range.files : [])));
  const isShareable = sharedFiles.size > 0;
  const hasHelpers = isShareable && (hasHelpersByQemu || hasHelperProcesses(pid));
  const foreignFiles =
    isShareable && !hasHelpers ? mappedByOthers(sharedFiles, pid) : new Set<string>();
  const policies = readNodePolicies(pid);
  return located.map(({ block, range }) => ({
    ...block,
    ...policies.of(block.hostAddr, block.length),
    backing: range.backing,
    shared: range.shared,
    sharedWithOthers:
      range.shared && (hasHelpers || range.files.some((file) => foreignFiles.has(file))),
  }));
}

/**
 * Runs what `takeInventory` and `locateRegions` run, on this process, for nothing but its speed the
 * next time.
 */
export function warmUp(): void {
  const table = "Block Name PSize Offset Used Total HVA RO\n";
  const zeros = "0x0000000000000000 0x0000000000001000 0x0000000000001000";
  const [firstArea = ""] = readFileSync("/proc/self/maps", "latin1").split("-", 1);
  const line = `warm up 4 KiB ${zeros} 0x${firstArea.padStart(16, "0")} rw\n`;
  try {
    locateRegions(parseRamblocks(table + line), process.pid);
  } catch {
    // What it finds does not matter.
  }
}

function locate(block: RamblockLine, maps: ProcessMaps): RangeBacking {
  const what = `RAMBlock ${block.idstr}`;
  const mappedLength = alignUp(block.length, block.pageSize);
  const range = maps.find(block.hostAddr, mappedLength, what);
  const isHuge = block.pageSize > HOST_PAGE_LENGTH;
  if (isHuge !== (range.backing === "hugetlb")) {
    throw new FslError(
      "TARGET_MISMATCH",
      `${what}: QEMU says that its pages have ${block.pageSize} bytes, ` +
        `but it is ${range.backing} memory (${range.path || "no file"})`,
      { idstr: block.idstr, pageSize: block.pageSize, backing: range.backing },
    );
  }
  return range;
}

/**
 * True when QEMU works with processes that map guest memory: vhost-user and vfio-user back ends do
 * so only when the guest's devices start, which may be after fsl has looked at who maps what.
 */
function hasHelperProcesses(pid: number): boolean {
  try {
    const commandLine = readFileSync(`/proc/${pid}/cmdline`, "latin1");
    // A file of options may name some too.
    return isHelped(commandLine) || hasOptionFile(commandLine.split("\0"));
  } catch {
    return true;
  }
}

function checkVersion(version: QmpVersion): void {
  if (version.major >= VERSION_MAJOR_MIN) return;
  throw new FslError(
    "TARGET_MISMATCH",
    `QEMU ${formatVersion(version)} has no mapped-ram snapshots: expected ${VERSION_MAJOR_MIN}.0 or later`,
    { version: formatVersion(version) },
  );
}

/** @param status answer to query-status; @param migration answer to query-migrate */
function checkWaiting(status: unknown, migration: unknown): void {
  const runState = isRecord(status) ? String(status["status"]) : "unknown";
  if (runState !== "inmigrate") {
    throw new FslError(
      "TARGET_MISMATCH",
      `QEMU is not waiting for a state: expected run state inmigrate, found ${runState}; start it with -incoming defer`,
      { runState },
    );
  }
  const progress = isRecord(migration) ? (migration["status"] ?? "none") : "none";
  if (progress !== "none") {
    throw new FslError(
      "TARGET_MISMATCH",
      `QEMU is not waiting for a state: its incoming migration is ${String(progress)} already; start a new one`,
      { migration: String(progress) },
    );
  }
}

/**
 * The unstable QMP command may be switched off (`-compat unstable-input=reject`); the human monitor
 * has the same.
 */
async function ramblockText(qmp: QmpClient, table: QmpReply): Promise<string> {
  if (table.ok) {
    const text = isRecord(table.value) ? table.value["human-readable-text"] : undefined;
    if (typeof text === "string") return text;
  }
  const text = await qmp.request("human-monitor-command", { "command-line": "info ramblock" });
  if (typeof text === "string") return text;
  throw new FslError("TARGET_MISMATCH", "QEMU's table of RAMBlocks: expected text, found none");
}

/** `pc-q35-10.0-machine` → `pc-q35-10.0` */
function machineTypeOf(reply: QmpReply): string | null {
  if (!reply.ok || typeof reply.value !== "string") return null;
  const match = /^([\x21-\x7e]{1,255})-machine$/.exec(reply.value);
  return match?.[1] ?? null;
}
