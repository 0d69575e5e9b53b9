/** `fsl doctor`: can `fsl load` work here, and if not, what mends it. */
import { defineCommand } from "citty";
import { checkHost, EXIT_CODES, findQemus } from "../index.ts";
import { formatTable } from "./format.ts";
import { print } from "./output.ts";

/** The first release that knows mapped-ram. */
const QEMU_VERSION_MIN = 9;

export const doctorCommand = defineCommand({
  meta: {
    name: "doctor",
    description: "Says whether fsl load can work on this host, and what mends it",
  },
  args: { json: { type: "boolean", description: "one JSON object on stdout" } },
  async run({ args: flags }) {
    const host = checkHost();
    const qemus = await findQemus();
    const qemuOk = qemus.some(
      ({ version }) => Number.parseInt(version ?? "", 10) >= QEMU_VERSION_MIN,
    );
    const qemuProblem = qemuOk
      ? []
      : [
          {
            problem: `no QEMU ${QEMU_VERSION_MIN}.0 or later on PATH`,
            fix: "install qemu-system-x86 (Debian 12: from bookworm-backports)",
          },
        ];
    const problems = [...host.problems, ...qemuProblem];
    const works = host.works && qemuOk;
    if (flags.json) {
      print(JSON.stringify({ ...host, works, qemus, problems }));
    } else {
      const rows = [
        ...host.facts.map(({ name, value }) => [name, value]),
        ...qemus.map(({ path, version }) => ["QEMU", `${version ?? "version unknown"} (${path})`]),
      ];
      print(formatTable(rows));
      for (const { problem, fix } of problems) print(`\n${problem}\n  ${fix}`);
      print(works ? "\nfsl load can work here" : "\nfsl load cannot work here");
    }
    process.exitCode = works ? 0 : EXIT_CODES.HOST_UNSUPPORTED;
  },
});
