/** `fsl save` and `fsl inspect` of the executable, with a real QEMU. */
import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { AttachRun } from "../helpers/attach-runs.ts";
import { guestArgv, whyNoGuests } from "../helpers/guests.ts";
import { whyNoExecutable } from "../helpers/load-runs.ts";

const TIMEOUT_MS = 60_000;
const argv = whyNoGuests() === null ? guestArgv({ guest: "bare" }) : [];

describe.skipIf((whyNoExecutable() ?? whyNoGuests()) !== null)("fsl save", () => {
  test.each([
    ["is complete by its own description", [], true, "complete by its own description"],
    [
      "without a description: that cannot be told",
      ["-machine", "suppress-vmdesc=on"],
      null,
      "no description: completeness cannot be told",
    ],
  ] as const)(
    "a snapshot %s, says it and fsl inspect",
    async (_, qemuArgs, complete, words) => {
      await using run = await AttachRun.start({ argv }, { qemuArgs, incoming: [] });
      await run.serial.waitFor(/^READY /);
      const path = join(run.directory, "guest.snap");
      const save = ["save", path, "--qmp", run.qmpPath, "--then", "cont"];
      const asJson = await run.run(...save, "--json");
      expect(asJson).toMatchObject({ code: 0, stderr: "" });
      expect(JSON.parse(asJson.stdout)).toMatchObject({ path, complete });
      const asText = await run.run(...save);
      expect(asText.code).toBe(0);
      expect(asText.stderr).toContain(`saved ${path}`);
      expect(asText.stderr.includes("the device state was not looked at")).toBe(complete === null);
      const inspected = await run.run("inspect", path);
      expect(inspected.stdout).toContain(words);
      const inspectedJson = await run.run("inspect", path, "--json");
      expect(JSON.parse(inspectedJson.stdout)).toMatchObject({ complete });
    },
    TIMEOUT_MS,
  );
});
