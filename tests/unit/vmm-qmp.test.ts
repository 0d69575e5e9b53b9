import { afterEach, describe, expect, test } from "bun:test";
import { readlinkSync } from "node:fs";
import { MFD_CLOEXEC } from "../../src/sys/abi.ts";
import * as native from "../../src/sys/native.ts";
import { type QmpEvent, type QmpOpenOptions, QmpClient } from "../../src/vmm/qmp.ts";
import {
  FakeMonitor,
  GREETING,
  expectRefusal,
  ownDescriptors,
  refusalOf,
  until,
} from "../helpers/qemu-vmm.ts";

let open: { monitor: FakeMonitor; client: QmpClient } | undefined;

function start(options: Partial<QmpOpenOptions> = {}): { monitor: FakeMonitor; client: QmpClient } {
  open = FakeMonitor.open(options);
  return open;
}

async function startReady(): Promise<{ monitor: FakeMonitor; client: QmpClient }> {
  const pair = start();
  pair.monitor.send(GREETING);
  await pair.client.ready;
  return pair;
}

afterEach(() => {
  open?.client.close();
  open?.monitor.close();
  open = undefined;
});

describe("QmpClient greeting", () => {
  test("gives the version once the negotiation is answered", async () => {
    const { monitor, client } = start();
    monitor.send(GREETING);
    expect(await client.ready).toEqual({ major: 10, minor: 0, micro: 2 });
  });

  test("asks for out-of-band commands when they are offered", async () => {
    const { monitor } = await startReady();
    expect(monitor.commands[0]?.arguments).toEqual({ enable: ["oob"] });
  });

  test("asks for nothing that is not offered", async () => {
    const { monitor, client } = start();
    monitor.send(GREETING.replace('"oob"', ""));
    await client.ready;
    expect(monitor.commands[0]?.arguments).toBeUndefined();
  });

  test("sends commands given before the greeting after it, in order", async () => {
    const { monitor, client } = start();
    monitor.replies["query-status"] = { return: { status: "inmigrate" } };
    const early = client.execute("query-status");
    await Bun.sleep(20);
    expect(monitor.commands).toEqual([]);
    monitor.send(GREETING);
    expect(await early).toEqual({ ok: true, value: { status: "inmigrate" } });
    expect(monitor.commands.map(({ execute }) => execute)).toEqual([
      "qmp_capabilities",
      "query-status",
    ]);
  });

  test("takes a greeting that comes byte by byte", async () => {
    const { monitor, client } = start();
    for (const byte of Buffer.from(GREETING)) {
      monitor.send(Uint8Array.of(byte));
      await Bun.sleep(0);
    }
    expect(await client.ready).toEqual({ major: 10, minor: 0, micro: 2 });
  });

  test("takes pretty-printed messages", async () => {
    const { monitor, client } = start();
    monitor.send(`${JSON.stringify(JSON.parse(GREETING), null, 4).replaceAll("\n", "\r\n")}\r\n`);
    expect(await client.ready).toEqual({ major: 10, minor: 0, micro: 2 });
  });

  test("may come behind answers to a client that was there before", async () => {
    const { monitor, client } = start();
    monitor.send(`{"return": {}, "id": 1}\r\n{"event": "STOP"}\r\n${GREETING}`);
    expect(await client.ready).toEqual({ major: 10, minor: 0, micro: 2 });
  });

  test("is lost when none comes in time", async () => {
    const { client } = start({ greetingTimeoutMs: 20 });
    const waiting = client.execute("query-status");
    expectRefusal(await refusalOf(waiting), "TARGET_LOST", /no QMP greeting within 20 ms/);
    expect(client.isClosed).toBe(true);
  });

  test("is waited for as long as it takes, where that is asked for", async () => {
    const { monitor, client } = start({ greetingTimeoutMs: Number.POSITIVE_INFINITY });
    await Bun.sleep(50); // A timer of so long would ring at once.
    expect(client.isClosed).toBe(false);
    monitor.send(GREETING);
    expect(await client.ready).toEqual({ major: 10, minor: 0, micro: 2 });
  });

  test("is lost when the negotiation is refused", async () => {
    const { monitor, client } = start();
    monitor.replies = { qmp_capabilities: { error: { class: "GenericError", desc: "not today" } } };
    monitor.send(GREETING);
    expectRefusal(await refusalOf(client.ready), "TARGET_LOST", /negotiation refused: not today/);
  });

  test.each([
    ["a human monitor", "QEMU 10.0.2 monitor - type 'help' for more information\r\n(qemu) "],
    ["bytes", "\u0000\u0001\u0002\r\n"],
    ["another protocol", "HTTP/1.1 400 Bad Request\r\n\r\n"],
    ["half a message", '{"QMP": \r\n'],
    ["a greeting without a version", '{"QMP": {"capabilities": []}}\r\n'],
    ["nesting without end", `{"QMP": ${"[".repeat(100_000)}\r\n`],
  ])("is lost when %s comes instead", async (_what, text) => {
    const { monitor, client } = start();
    monitor.send(text);
    expect((await refusalOf(client.ready)).code).toBe("TARGET_LOST");
  });
});

describe("QmpClient.execute", () => {
  test("gives QEMU's error as a value", async () => {
    const { monitor, client } = await startReady();
    monitor.replies["cont"] = {
      error: { class: "GenericError", desc: "Resetting the VM\nis required" },
    };
    expect(await client.execute("cont")).toEqual({
      ok: false,
      errorClass: "GenericError",
      description: "Resetting the VM is required",
    });
  });

  test("drops an answer that comes after its deadline, and goes on", async () => {
    const { monitor, client } = await startReady();
    const slow = client.execute("migrate", {}, { timeoutMs: 20 });
    expectRefusal(await refusalOf(slow), "TARGET_LOST", /no answer to migrate within 20 ms/);
    monitor.send(`{"return": {}, "id": ${monitor.named("migrate")[0]?.id}}\r\n`);
    monitor.replies["query-status"] = { return: { status: "running" } };
    expect(await client.execute("query-status")).toEqual({
      ok: true,
      value: { status: "running" },
    });
  });

  test("pairs answers with commands by id", async () => {
    const { monitor, client } = await startReady();
    const both = Promise.all([client.execute("first"), client.execute("second")]);
    await until(() => monitor.commands.length === 3, "both commands");
    const [first, second] = monitor.commands.slice(1).map(({ id }) => id);
    monitor.send(`{"return": 2, "id": ${second}}\r\n{"return": 1, "id": ${first}}\r\n`);
    expect(await both).toEqual([
      { ok: true, value: 1 },
      { ok: true, value: 2 },
    ]);
  });

  test("keeps integers beyond 2^53 in both directions", async () => {
    const { monitor, client } = await startReady();
    const asked = client.request("query-big");
    await until(() => monitor.named("query-big").length === 1, "the command");
    monitor.send(
      `{"return": {"limit": 18446744073709551615}, "id": ${monitor.named("query-big")[0]?.id}}\r\n`,
    );
    const value = (await asked) as { limit: bigint };
    expect(value.limit).toBe(18446744073709551615n);
    monitor.replies["set-big"] = { return: {} };
    await client.request("set-big", value);
    expect(monitor.texts.at(-1)).toContain('"limit":18446744073709551615');
  });

  test("hands a descriptor over", async () => {
    const { monitor, client } = await startReady();
    monitor.replies["getfd"] = { return: {} };
    const fd = native.memfdCreate("fsl-test-handed", MFD_CLOEXEC);
    await client.request("getfd", { fdname: "x" }, { fd });
    native.close(fd);
    expect(monitor.fds.map((own) => readlinkSync(`/proc/self/fd/${own}`))).toEqual([
      "/memfd:fsl-test-handed (deleted)",
    ]);
  });

  test("has one command with a descriptor under way at a time", async () => {
    const { monitor, client } = await startReady();
    const both = Promise.all([
      client.execute("getfd", { fdname: "a" }, { fd: 0 }),
      client.execute("getfd", { fdname: "b" }, { fd: 0 }),
    ]);
    await until(() => monitor.named("getfd").length === 1, "the first");
    await Bun.sleep(20);
    expect(monitor.named("getfd")).toHaveLength(1);
    monitor.replies["getfd"] = { return: {} };
    monitor.send(`{"return": {}, "id": ${monitor.named("getfd")[0]?.id}}\r\n`);
    await both;
    expect(monitor.named("getfd").map((command) => command.arguments?.["fdname"])).toEqual([
      "a",
      "b",
    ]);
  });

  test("rejects what is pending when the other end closes", async () => {
    const { monitor, client } = await startReady();
    const pending = [client.execute("one"), client.execute("two")];
    await until(() => monitor.commands.length === 3, "both commands");
    monitor.send('{"return": {');
    monitor.close();
    const errors = await Promise.all(pending.map(refusalOf));
    expect(errors.map(({ code }) => code)).toEqual(["TARGET_LOST", "TARGET_LOST"]);
    expectRefusal(await client.closed, "TARGET_LOST", /closed by the other end/);
    expect((await refusalOf(client.execute("three"))).code).toBe("TARGET_LOST");
  });

  test("is lost when a message never ends", async () => {
    const { monitor, client } = await startReady();
    const refusal = refusalOf(client.execute("query-status"));
    monitor.send('{"return": "');
    while (!client.isClosed) {
      monitor.send("x".repeat(64 * 1024));
      await Bun.sleep(0);
    }
    expectRefusal(await refusal, "TARGET_LOST", /longer than 4194304 bytes/);
  });

  test("is lost when the other end does not read", async () => {
    const { monitor, client } = await startReady();
    monitor.pause();
    const big = { text: "x".repeat(300_000) };
    const error = await refusalOf(client.execute("echo", big));
    expectRefusal(error, "TARGET_LOST", /cannot send/);
  });

  test("leaves no descriptor open", async () => {
    const before = ownDescriptors().length;
    const { monitor, client } = await startReady();
    client.close();
    client.close();
    monitor.close();
    await until(() => ownDescriptors().length <= before, "descriptors closed");
  });
});

describe("QmpClient.onEvent", () => {
  test("tells listeners until they are taken off", async () => {
    const { monitor, client } = await startReady();
    const seen: QmpEvent[] = [];
    const stop = client.onEvent((event) => seen.push(event));
    monitor.event("MIGRATION", { status: "setup" });
    await until(() => seen.length === 1, "the event");
    stop();
    monitor.event("STOP");
    monitor.replies["query-status"] = { return: {} };
    await client.request("query-status");
    expect(seen).toEqual([{ name: "MIGRATION", data: { status: "setup" } }]);
  });
});
