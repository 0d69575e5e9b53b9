/** `fsl inspect`: what is in a snapshot file. */
import { defineCommand } from "citty";
import {
  allocatedBytes,
  openSnapshot,
  printableLines,
  type RAMBlock,
  type Snapshot,
} from "../index.ts";
import { byteSize } from "./arguments.ts";
import { formatBytes, formatTable } from "./format.ts";
import { print } from "./output.ts";

export const inspectCommand = defineCommand({
  meta: { name: "inspect", description: "Shows what is in a snapshot file" },
  args: {
    snapshot: { type: "positional", required: true, description: "mapped-ram snapshot" },
    offset: {
      type: "string",
      valueHint: "bytes",
      description: "where in the file the snapshot begins; default: found out",
    },
    json: { type: "boolean", description: "one JSON object on stdout" },
  },
  run({ args: flags }) {
    const offset = flags.offset === undefined ? {} : { offset: byteSize(flags.offset, "offset") };
    using snapshot = openSnapshot(flags.snapshot, offset);
    const description = describe(snapshot);
    print(flags.json ? JSON.stringify(description) : render(description));
  },
});

function describeBlock(snapshot: Snapshot, block: RAMBlock) {
  const dataPages = block.notSaved ? 0 : snapshot.pageBitmap(block).dataPages;
  return {
    idstr: block.idstr,
    length: block.usedLength,
    pageSize: block.pageSize,
    dataPages,
    zeroPages: block.notSaved ? 0 : block.pageCount - dataPages,
    bitmapOffset: block.bitmapOffset,
    pagesOffset: block.pagesOffset,
    saved: !block.notSaved,
    bytesOnDisk: block.notSaved
      ? 0
      : allocatedBytes(snapshot.fd, block.pagesOffset, block.pagesOffset + block.usedLength),
  };
}

function describe(snapshot: Snapshot) {
  const { layout } = snapshot;
  const blocks = snapshot.blocks.map((block) => describeBlock(snapshot, block));
  return {
    path: snapshot.path,
    fileLength: snapshot.fileLength,
    bytesOnDisk: allocatedBytes(snapshot.fd, 0, snapshot.fileLength),
    streamOffset: snapshot.streamOffset,
    machineType: snapshot.machineType,
    writer: writerOf(snapshot),
    capabilities: snapshot.capabilities,
    uuid: snapshot.uuid,
    runState: snapshot.globalState?.runState ?? null,
    savedLive: snapshot.globalState === null ? null : snapshot.globalState.runState === "running",
    // Null: it cannot be told.
    complete: layout.isVerifiedComplete ? true : null,
    libvirt:
      layout.libvirt === null
        ? null
        : { wasRunning: layout.libvirt.wasRunning, domainXml: layout.libvirt.domainXml },
    blocks,
    devices: snapshot.sections
      .filter((section) => section.kind === "full")
      .map(({ name, instanceId, version, fileOffset, length }) => ({
        name,
        instanceId,
        version,
        fileOffset,
        length,
      })),
  };
}

/** The file does not name its writer; what it shows narrows it down. */
function writerOf(snapshot: Snapshot): string {
  if (snapshot.libvirt !== null) return "libvirt (sparse save image), QEMU 9.0 or later";
  const switchover = snapshot.sections.some(
    (section) => section.kind === "command" && section.command === SWITCHOVER_START,
  );
  if (snapshot.capabilities.includes("x-ignore-shared")) return "QEMU 11.0 or later";
  return switchover ? "QEMU 10.0 or later" : "QEMU 9.0 or later";
}

/** MIG_CMD_SWITCHOVER_START, in files of machine types of QEMU 10.0 and later. */
const SWITCHOVER_START = 11;

type Description = ReturnType<typeof describe>;

function render(d: Description): string {
  const lines = [
    ["file", `${d.path}, ${formatBytes(d.fileLength)}, ${formatBytes(d.bytesOnDisk)} on disk`],
    ["machine type", d.machineType],
    ["written by", d.writer],
    ["capabilities", d.capabilities.join(", ")],
    ["saved", savedText(d)],
    ...(d.uuid === null ? [] : [["uuid", d.uuid]]),
    ...(d.streamOffset === 0 ? [] : [["stream begins at", String(d.streamOffset)]]),
  ];
  const blockRows = d.blocks.map((block) => [
    block.idstr,
    formatBytes(block.length),
    block.saved ? String(block.dataPages) : "not saved",
    String(block.zeroPages),
    formatBytes(block.dataPages * block.pageSize),
    formatBytes(block.bytesOnDisk),
    `0x${block.pagesOffset.toString(16)}`,
  ]);
  const deviceRows = d.devices.map((device) => [
    device.name ?? "?",
    String(device.instanceId),
    String(device.version),
    formatBytes(device.length),
  ]);
  const header = ["RAMBlock", "length", "data pages", "zero pages", "data", "on disk", "pages at"];
  const parts = [
    formatTable(lines),
    formatTable([header, ...blockRows], [1, 2, 3, 4, 5, 6]),
    deviceRows.length === 0
      ? "device sections: cannot be told (saved without a description)"
      : formatTable(
          [["device section", "instance", "version", "length"], ...deviceRows],
          [1, 2, 3],
        ),
  ];
  if (d.libvirt !== null) parts.push(`libvirt domain:\n${printableLines(d.libvirt.domainXml)}`);
  return parts.join("\n\n");
}

function savedText(d: Description): string {
  const state = d.runState === null ? "run state unknown" : `run state ${d.runState}`;
  const how = d.savedLive === null ? "" : d.savedLive ? ", live" : ", stopped";
  const complete =
    d.complete === null
      ? ", no description: completeness cannot be told"
      : ", complete by its own description";
  return `${state}${how}${complete}`;
}
