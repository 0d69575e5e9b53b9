import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import {
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  MAP_SHARED,
  PROT_READ,
  PROT_WRITE,
} from "../../src/sys/abi.ts";
import * as native from "../../src/sys/native.ts";
import { locateRegions, takeInventory, warmUp } from "../../src/vmm/inventory.ts";
import type { QmpClient } from "../../src/vmm/qmp.ts";
import { expectRefusal, FakeMonitor, GREETING, refusalOf } from "../helpers/qemu-vmm.ts";

const TABLE =
  "Block Name PSize Offset Used Total HVA RO\n" +
  "pc.ram 4 KiB 0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007ff2a7e00000 rw\n";

let monitor: FakeMonitor;
let client: QmpClient;

beforeEach(() => {
  ({ monitor, client } = FakeMonitor.open());
  Object.assign(monitor.replies, {
    "query-status": { return: { status: "inmigrate", running: false } },
    "query-migrate": { return: {} },
    "x-query-ramblock": { return: { "human-readable-text": TABLE } },
    "query-migrate-capabilities": { return: [{ capability: "mapped-ram", state: false }] },
    "query-migrate-parameters": { return: {} },
    "qom-get": { return: "pc-q35-10.0-machine" },
    "qom-list": { return: [{ name: "type", type: "string" }] },
    "query-fdsets": { return: [] },
    "human-monitor-command": { return: "" },
    "query-cpus-fast": { return: [{ "cpu-index": 0 }, { "cpu-index": 1 }] },
  });
  monitor.send(GREETING);
});

afterEach(() => {
  client.close();
  monitor.close();
});

describe("takeInventory", () => {
  test("learns what there is to know", async () => {
    const { ramblocks, settings, hasHelpers, ...found } = await takeInventory(client);
    expect([settings.constructor.name, hasHelpers]).toEqual(["MigrationSettings", false]);
    expect(found).toEqual({
      version: { major: 10, minor: 0, micro: 2 },
      machineType: "pc-q35-10.0",
      canDiscard: false,
      vcpus: 2,
      freeFdset: 64,
    });
    expect(ramblocks.map(({ idstr }) => idstr)).toEqual(["pc.ram"]);
  });

  test.each([
    "child<virtio-balloon-pci>",
    "child<virtio-balloon-pci-non-transitional>",
    "child<virtio-balloon-device>",
    "child<virtio-mem-pci>",
  ])("sees that %s can discard", async (type) => {
    monitor.replies["qom-list"] = (command) => ({
      return: command.arguments?.["path"] === "/machine/peripheral" ? [] : [{ name: "d", type }],
    });
    expect((await takeInventory(client)).canDiscard).toBe(true);
  });

  test.each([
    ["qom-list", { return: [{ name: "d", type: "child<vhost-user-blk-pci>" }] }, true],
    ["human-monitor-command", { return: "n: index=0,type=vhost-user\n" }, true],
    ["human-monitor-command", { return: "n: index=0,type=user\n" }, false],
  ])("sees by %s that another process works in guest memory", async (command, reply, expected) => {
    monitor.replies[command] = reply;
    expect((await takeInventory(client)).hasHelpers).toBe(expected);
  });

  test("takes a device list that it cannot get for one with a balloon", async () => {
    monitor.replies["qom-list"] = { error: { class: "DeviceNotFound", desc: "no" } };
    expect((await takeInventory(client)).canDiscard).toBe(true);
  });

  test("asks the human monitor where the unstable command is switched off", async () => {
    monitor.replies["x-query-ramblock"] = { error: { class: "CommandNotFound", desc: "no" } };
    monitor.replies["human-monitor-command"] = { return: TABLE.replaceAll("\n", "\r\n") };
    expect((await takeInventory(client)).ramblocks).toHaveLength(1);
  });

  test("does without a machine type", async () => {
    monitor.replies["qom-get"] = { error: { class: "GenericError", desc: "no" } };
    expect((await takeInventory(client)).machineType).toBeNull();
  });

  test.each([
    ["running", /expected run state inmigrate, found running; start it with -incoming defer/],
    ["prelaunch", /found prelaunch/],
  ])("refuses a QEMU in run state %s", async (status, message) => {
    monitor.replies["query-status"] = { return: { status, running: false } };
    expectRefusal(await refusalOf(takeInventory(client)), "TARGET_MISMATCH", message);
  });

  test("refuses a QEMU that has tried to load before", async () => {
    monitor.replies["query-migrate"] = { return: { status: "failed" } };
    const error = await refusalOf(takeInventory(client));
    expectRefusal(error, "TARGET_MISMATCH", /its incoming migration is failed already/);
  });

  test.each([
    ["text that is no table", { "human-readable-text": "hello" }, /expected a header line/],
    ["no text", {}, /expected text, found none/],
  ])("refuses %s", async (_what, value, message) => {
    monitor.replies["x-query-ramblock"] = { return: value };
    monitor.replies["human-monitor-command"] = { return: 7 };
    expectRefusal(await refusalOf(takeInventory(client)), "TARGET_MISMATCH", message);
  });
});

describe("takeInventory of an older QEMU", () => {
  test("says what version it needs", async () => {
    const older = FakeMonitor.open();
    older.monitor.replies = { ...monitor.replies };
    older.monitor.send(
      GREETING.replace('"major": 10', '"major": 8').replace('"minor": 0', '"minor": 2'),
    );
    const error = await refusalOf(takeInventory(older.client));
    expectRefusal(error, "TARGET_MISMATCH", /QEMU 8\.2\.2 has no mapped-ram .* 9\.0 or later/);
    older.client.close();
    older.monitor.close();
  });
});

describe("locateRegions", () => {
  const length = 1024 * 1024;
  const block = { idstr: "x", pageSize: 4096, length, maxLength: length, readOnly: false };

  test.each([
    ["private anonymous memory", MAP_PRIVATE, "anonymous", false],
    ["shared memory that nobody else has", MAP_SHARED, "shmem", true],
  ])("knows %s", (_what, sharing, backing, shared) => {
    const hostAddr = native.mmap(0, length, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS, -1, 0);
    try {
      expect(locateRegions([{ ...block, hostAddr }], process.pid)).toEqual([
        { ...block, hostAddr, backing, shared, sharedWithOthers: false } as never,
      ]);
    } finally {
      native.munmap(hostAddr, length);
    }
  });

  test("leaves empty blocks out", () => {
    expect(locateRegions([{ ...block, length: 0, hostAddr: 4096 }], process.pid)).toEqual([]);
  });

  test("refuses ordinary memory that is said to have huge pages", async () => {
    const protection = PROT_READ | PROT_WRITE;
    const mapped = native.mmap(0, 2 * length, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const hostAddr = mapped;
    try {
      const huge = { ...block, hostAddr, pageSize: 2 * length, length: 4096 };
      const error = await refusalOf(() => locateRegions([huge], process.pid));
      expectRefusal(error, "TARGET_MISMATCH", /pages have 2097152 bytes, but it is anonymous/);
    } finally {
      native.munmap(mapped, 2 * length);
    }
  });

  test("refuses an address where nothing is", async () => {
    const error = await refusalOf(() => locateRegions([{ ...block, hostAddr: 4096 }], process.pid));
    expectRefusal(error, "TARGET_MISMATCH", /RAMBlock x: QEMU says .* nothing is mapped/);
  });
});

describe("warmUp", () => {
  test("does no harm", () => {
    expect(warmUp).not.toThrow();
  });
});
