/**
 * Devices that are plugged in while RAM comes in, and that change what is right for it: a balloon
 * gives memory back that nobody watches, a vhost-user or vfio-user back end maps shared memory and
 * reads holes. QEMU has no event for device_add, so it is asked now and then. A guest needs 0.1 to
 * 0.3 s until its driver works with a new device.
 */
import { type FslError, isFslError } from "../errors.ts";
import type { Control } from "./control.ts";
import {
  DEVICE_LISTS,
  deviceTypes,
  hasHelpedNetwork,
  isBalloon,
  isHelped,
} from "./lazy-breakers.ts";
import type { QmpClient } from "./qmp.ts";
import type { HotplugWants } from "./target.ts";

/** How often QEMU is asked, ms: well within what a driver needs. Two or three questions of 0.2 ms each. */
const PERIOD_MS = 40;

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
    ...DEVICE_LISTS.map((path) => qmp.execute("qom-list", { path }, patience)),
  ]);
  const type = lists
    .flatMap((list) => deviceTypes(list) ?? [])
    .find((one) => (wants.balloons && isBalloon(one)) || (wants.helpers && isHelped(one)));
  return type ?? (hasHelpedNetwork(network ?? null) ? "vhost-user" : null);
}
