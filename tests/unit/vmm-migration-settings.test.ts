import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { MigrationSettings } from "../../src/vmm/migration-settings.ts";
import type { QmpClient } from "../../src/vmm/qmp.ts";
import { expectRefusal, FakeMonitor, GREETING, refusalOf } from "../helpers/qemu-vmm.ts";

let monitor: FakeMonitor;
let client: QmpClient;

beforeEach(async () => {
  ({ monitor, client } = FakeMonitor.open());
  monitor.replies["query-migrate-capabilities"] = {
    return: [
      { capability: "mapped-ram", state: false },
      { capability: "events", state: true },
      { capability: "multifd", state: true },
    ],
  };
  monitor.replies["query-migrate-parameters"] = {
    return: { "max-bandwidth": 134217728, "tls-creds": "", "multifd-channels": 2 },
  };
  monitor.replies["migrate-set-capabilities"] = { return: {} };
  monitor.replies["migrate-set-parameters"] = { return: {} };
  monitor.send(GREETING);
  await client.ready;
});

afterEach(() => {
  client.close();
  monitor.close();
});

const CHANGES = {
  capabilities: { "mapped-ram": true, events: true, multifd: false, "postcopy-ram": false },
  parameters: { "max-bandwidth": 0, "tls-creds": "", "direct-io": false },
};

function changes(): unknown[] {
  return monitor.commands
    .filter(({ execute }) => execute.startsWith("migrate-set-"))
    .map((command) => command.arguments);
}

describe("MigrationSettings", () => {
  test("changes only what is different and known", async () => {
    const settings = await MigrationSettings.read(client);
    await settings.apply(CHANGES);
    expect(changes()).toEqual([
      { "max-bandwidth": 0 },
      {
        capabilities: [
          { capability: "mapped-ram", state: true },
          { capability: "multifd", state: false },
        ],
      },
    ]);
  });

  test("puts back what it changed, once", async () => {
    const settings = await MigrationSettings.read(client);
    await settings.apply(CHANGES);
    await settings.restore();
    await settings.restore();
    expect(changes().slice(2)).toEqual([
      {
        capabilities: [
          { capability: "mapped-ram", state: false },
          { capability: "multifd", state: true },
        ],
      },
      { "max-bandwidth": 134217728 },
    ]);
  });

  test("switches on again what it has switched off", async () => {
    const settings = await MigrationSettings.read(client);
    await settings.apply({ capabilities: { multifd: false }, parameters: {} });
    await settings.apply({ capabilities: { multifd: true }, parameters: {} });
    expect(changes()).toEqual([
      { capabilities: [{ capability: "multifd", state: false }] },
      { capabilities: [{ capability: "multifd", state: true }] },
    ]);
  });

  test("says nothing when there is nothing to change", async () => {
    const settings = await MigrationSettings.read(client);
    await settings.apply({ capabilities: { events: true }, parameters: {} });
    await settings.restore();
    expect(changes()).toEqual([]);
  });

  test("puts back after another fsl by its record", async () => {
    const settings = await MigrationSettings.read(client);
    await settings.apply(CHANGES);
    const record = JSON.parse(JSON.stringify(settings.undoRecord()));
    await MigrationSettings.changedBefore(client, record).restore();
    expect(changes()[3]).toEqual({ "max-bandwidth": 134217728 });
  });

  test("refuses a QEMU without mapped-ram", async () => {
    monitor.replies["query-migrate-capabilities"] = { return: [] };
    const settings = await MigrationSettings.read(client);
    const error = await refusalOf(settings.apply(CHANGES));
    expectRefusal(error, "TARGET_MISMATCH", /does not know .* mapped-ram; it came with QEMU 9\.0/);
  });

  test("says what QEMU refused", async () => {
    const desc = "Migration capability multifd must be set before incoming starts";
    monitor.replies["migrate-set-capabilities"] = { error: { class: "GenericError", desc } };
    const settings = await MigrationSettings.read(client);
    const error = await refusalOf(settings.apply(CHANGES));
    expectRefusal(error, "TARGET_MISMATCH", /must be set before incoming starts/);
  });

  test("does without lists that are none", async () => {
    monitor.replies["query-migrate-capabilities"] = { return: "x" };
    monitor.replies["query-migrate-parameters"] = { return: null };
    const settings = await MigrationSettings.read(client);
    const error = await refusalOf(
      settings.apply({ capabilities: { "mapped-ram": true }, parameters: {} }),
    );
    expectRefusal(error, "TARGET_MISMATCH", /mapped-ram/);
  });
});
