/** `fsl status`: the loads that are going on, or wait for somebody to go on with them. */
import { defineCommand } from "citty";
import { findLoads, findUnbegun, type FoundLoad, unbegunLoad } from "../index.ts";
import { formatBytes, formatTable } from "./format.ts";
import { log } from "./log.ts";
import { print } from "./output.ts";

export const statusCommand = defineCommand({
  meta: {
    name: "status",
    description: "Shows the loads of this host, and those whose fsl has died",
  },
  args: { json: { type: "boolean", description: "one JSON array on stdout" } },
  async run({ args: flags }) {
    const begun = findLoads(({ message }) => log.warn(message));
    const unbegun = (await findUnbegun()).filter((pid) => begun.every((load) => load.pid !== pid));
    const loads = [...begun, ...unbegun.map(unbegunLoad)];
    if (flags.json) {
      print(JSON.stringify(loads));
      return;
    }
    if (loads.length === 0) {
      print("no load is going on");
      return;
    }
    const header = ["QEMU", "state", "served", "RAM in", "faults", "unreadable", "snapshot"];
    print(formatTable([header, ...loads.map(row)], [0, 4, 5]));
    for (const { pid, served, phase } of loads) {
      if (!served) print(`\nQEMU ${pid} ${WHAT_NOW[phase]}`.replaceAll("PID", String(pid)));
    }
  },
});

/** What to do about a load that nobody serves. */
const WHAT_NOW: Readonly<Record<FoundLoad["phase"], string>> = {
  "not begun":
    "waits for a state, of which its fsl did not live to begin the load: end it (kill PID), and load again",
  armed:
    "waits for its state, which its fsl did not live to give: end it, or load again with --qmp",
  "handing over": "waits for its pages: fsl resume --pid PID",
  loaded: "waits for its pages: fsl resume --pid PID",
  running: "waits for its pages: fsl resume --pid PID",
  finished: "has all its RAM; to tidy up: fsl resume --pid PID",
};

function row(load: FoundLoad): string[] {
  const { dataBytes, loadedBytes, faults, failedPages } = load.progress;
  const { lastFailure } = load;
  const where =
    lastFailure === null
      ? ""
      : ` (${lastFailure.idstr} at file offset 0x${lastFailure.fileOffset.toString(16)})`;
  return [
    String(load.pid),
    load.phase,
    load.served ? "yes" : "NO",
    `${formatBytes(loadedBytes)} of ${formatBytes(dataBytes)}`,
    String(faults),
    `${failedPages}${where}`,
    load.snapshotPath,
  ];
}
