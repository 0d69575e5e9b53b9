/**
 * Devices that change what is right for memory that comes in lazily: a balloon or virtio-mem gives memory back, and
 * another process that does a device's work maps shared memory and reads holes. Looked for before the load
 * (inventory.ts), and during it among what is plugged in (hotplug-watch.ts).
 */
import { isRecord, type QmpReply } from "./qmp.ts";

/** Where QEMU keeps devices: with an id, and without. For `qom-list`. */
export const DEVICE_LISTS = ["/machine/peripheral", "/machine/peripheral-anon"] as const;

/** Hands back any memory of the guest. */
const BALLOON = /-balloon\b/;
/** Hands back memory of its own, which one that is plugged in later has not brought from the snapshot. */
const MEMORY_DEVICE = /^virtio-mem\b/;
/** Their work is done by another process, in guest memory; also back ends of `-netdev` and `-chardev`. */
const HELPED = /(?:vhost|vfio)-user/;
/** A line of `info network`. @source QEMU net/net.c hmp_info_network */
const HELPED_NETWORK = /\btype=vhost-user\b/;

/** Types of the devices in a reply to `qom-list`, e.g. `virtio-balloon-pci`; null when there is no list. */
export function deviceTypes(reply: QmpReply | null): string[] | null {
  if (reply?.ok !== true || !Array.isArray(reply.value)) return null;
  return reply.value.filter(isRecord).map((entry) => {
    const type = String(entry["type"]);
    return /^child<(.*)>$/.exec(type)?.[1] ?? type;
  });
}

export function isBalloon(type: string): boolean {
  return BALLOON.test(type);
}

export function canDiscard(type: string): boolean {
  return isBalloon(type) || MEMORY_DEVICE.test(type);
}

/** @param text a device's type, a command line, what `info network` says */
export function isHelped(text: string): boolean {
  return HELPED.test(text);
}

/** Exactly so, for who has to stop something then. @param reply to `info network` */
export function hasHelpedNetwork(reply: QmpReply | null): boolean {
  return reply?.ok === true && HELPED_NETWORK.test(String(reply.value));
}
