/** Devices that are plugged into a real QEMU, and what `watchHotplug` tells of them. */
import { afterAll, afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { connectSocket } from "../../src/vmm/qmp-connect.ts";
import { QmpClient } from "../../src/vmm/qmp.ts";
import { watchHotplug } from "../../src/vmm/hotplug-watch.ts";
import { FakeMonitor, GREETING, guestArgv, OwnQemu, Scratch, until } from "../helpers/qemu-vmm.ts";

setDefaultTimeout(60_000);

const scratch = new Scratch();
const BOTH = { balloons: true, helpers: true };
let qemu: OwnQemu | undefined;
let qmp: QmpClient | undefined;

afterEach(async () => {
  qmp?.close();
  await qemu?.[Symbol.asyncDispose]();
});
afterAll(() => scratch[Symbol.dispose]());

async function start(...extra: string[]): Promise<QmpClient> {
  qemu = await OwnQemu.start(scratch, guestArgv("pc", ...extra));
  qmp = QmpClient.open(connectSocket(qemu.qmpPath), { peer: "QEMU", greetingTimeoutMs: 10_000 });
  await qmp.ready;
  return qmp;
}

describe("watchHotplug", () => {
  test("tells of a balloon that is plugged in, once", async () => {
    const client = await start("-device", "virtio-rng-pci");
    const found: string[] = [];
    watchHotplug(client, BOTH, (type) => found.push(type));
    await Bun.sleep(300);
    expect(found).toEqual([]);
    await client.request("device_add", { driver: "virtio-balloon-pci" });
    await until(() => found.length > 0, "a balloon");
    await Bun.sleep(300);
    expect(found).toEqual(["virtio-balloon-pci"]);
  });

  test("tells of nothing that is not asked for, and of nothing after its end", async () => {
    const client = await start();
    const found: string[] = [];
    const none = { balloons: false, helpers: true };
    const stop = watchHotplug(client, none, (type) => found.push(type));
    const stopped = watchHotplug(client, BOTH, (type) => found.push(type));
    stopped();
    await client.request("device_add", { driver: "virtio-balloon-pci", id: "balloon0" });
    await client.request("device_add", { driver: "virtio-rng-pci" });
    await Bun.sleep(400);
    stop();
    expect(found).toEqual([]);
  });

  test.each([
    ["a disk", [{ type: "child<vhost-user-blk-pci>" }], "", "vhost-user-blk-pci"],
    ["a device of another process", [{ type: "child<vfio-user-pci>" }], "", "vfio-user-pci"],
    ["a network", [], "net0: index=0,type=vhost-user,vhost-user to backend\r\n", "vhost-user"],
    ["no network of that kind", [], "net0: index=0,type=tap,ifname=vhost-user\r\n", null],
  ] as const)("of vhost-user and vfio-user: %s", async (_, devices, network, expected) => {
    const { monitor, client } = FakeMonitor.open();
    monitor.replies["qom-list"] = ({ arguments: args }) => ({
      return: args?.["path"] === "/machine/peripheral" ? devices : [],
    });
    monitor.replies["human-monitor-command"] = { return: network };
    monitor.send(GREETING);
    await client.ready;
    const found: string[] = [];
    const stop = watchHotplug(client, BOTH, (type) => found.push(type));
    await until(() => monitor.named("qom-list").length >= 4 || found.length > 0, "an answer");
    stop();
    expect(found).toEqual(expected === null ? [] : [expected]);
    client.close();
    monitor.close();
  });

  test("asks no more when QEMU ends, and one question at a time", async () => {
    const { monitor, client } = FakeMonitor.open();
    monitor.send(GREETING);
    await client.ready;
    watchHotplug(client, { balloons: true, helpers: false }, () => {});
    await until(() => monitor.named("qom-list").length > 0, "a question");
    await Bun.sleep(350);
    expect(monitor.named("qom-list").length).toBe(2); // Nobody has answered.
    monitor.event("SHUTDOWN");
    monitor.replies["qom-list"] = { return: [] };
    await Bun.sleep(300);
    expect(monitor.named("qom-list").length).toBe(2);
    client.close();
    monitor.close();
  });
});
