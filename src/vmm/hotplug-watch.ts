/**
 * Devices that are plugged in while RAM comes in, and that change what is right for it: a balloon
 * gives memory back that nobody watches, a vhost-user or vfio-user back end maps shared memory and
 * reads holes. QEMU has no event for device_add, so it is asked now and then. A guest needs 0.1 to
 * 0.3 s until its driver works with a new device.
 */
import { type FslError, isFslError } from "../errors.ts";
import type { Control } from "./control.ts";
import { type QmpClient, isRecord } from "./qmp.ts";
import type { HotplugWants } from "./target.ts";

/** How often QEMU is asked, ms: well within what a driver needs. Two or three questions of 0.2 ms each. */
const PERIOD_MS = 40;
const BALLOON = /^child<(.*-balloon\b.*)>$/;
const HELPED = /^child<((?:vhost|vfio)-user.*)>$/;
/** A line of `info network`. @source QEMU net/net.c hmp_info_network */
const HELPED_NETWORK = /\btype=vhost-user\b/;
/** Where QEMU keeps devices: with an id, and without. */
const LISTS = ["/machine/peripheral", "/machine/peripheral-anon"] as const;

/**
 * Asks until something is found, the connection ends, or it is stopped. Does not keep this process
 * alive.
 * @param found called once at most, with the device's type, e.g. `virtio-balloon-pci`
 * @returns stops the watch
 */
export function watchHotplug(
  qmp: QmpClient,
  wants: HotplugWants,
  found: (type: string) => void,
): () => void {
  let isAsking = false;
  let isStopped = false;
  const stop = (): void => {
    isStopped = true;
    clearInterval(timer);
    stopEvents();
  };
  const look = async (): Promise<void> => {
    const type = await ask(qmp, wants);
    if (type === null || isStopped) return;
    stop();
    found(type);
  };
  const timer = setInterval(() => {
    // While a thread of QEMU's main loop waits for a page, it answers later.
    if (isAsking) return;
    isAsking = true;
    look()
      .catch(stop) // The connection has ended.
      .finally(() => {
        isAsking = false;
      });
  }, PERIOD_MS);
  timer.unref();
  // A command that comes in the moment of QEMU's end can keep it from ending (QemuTarget).
  const stopEvents = qmp.onEvent(({ name }) => {
    if (name === "SHUTDOWN") stop();
  });
  return stop;
}

/**
 * The same through whatever connection there is: when one is cut, another one is made.
 * @param lost called once at most, when none can be made
 */
export function watchHotplugOf(
  control: Control,
  wants: HotplugWants,
  found: (type: string) => void,
  lost: (error: FslError) => void,
): () => void {
  let isStopped = false;
  let stopThis = (): void => {};
  const watch = async (): Promise<void> => {
    while (!isStopped) {
      const qmp = await control.open();
      if (isStopped) return;
      stopThis = watchHotplug(qmp, wants, found);
      await qmp.closed;
      if (!control.isCut) return;
    }
  };
  watch().catch((error: unknown) => {
    if (!isFslError(error)) throw error;
    if (!isStopped) lost(error);
  });
  return () => {
    isStopped = true;
    stopThis();
  };
}

/** @returns type of the first device that is wanted; null when there is none */
async function ask(qmp: QmpClient, wants: HotplugWants): Promise<string | null> {
  const patience = { timeoutMs: Number.POSITIVE_INFINITY };
  const [network, ...lists] = await Promise.all([
    wants.helpers
      ? qmp.execute("human-monitor-command", { "command-line": "info network" }, patience)
      : null,
    ...LISTS.map((path) => qmp.execute("qom-list", { path }, patience)),
  ]);
  for (const list of lists) {
    if (list?.ok !== true || !Array.isArray(list.value)) continue;
    for (const entry of list.value) {
      const type = isRecord(entry) ? String(entry["type"]) : "";
      const device =
        (wants.balloons ? BALLOON.exec(type) : null) ?? (wants.helpers ? HELPED.exec(type) : null);
      if (device?.[1] !== undefined) return device[1];
    }
  }
  return network?.ok === true && HELPED_NETWORK.test(String(network.value)) ? "vhost-user" : null;
}
