/**
 * Machines and devices (docs/guests.md, "Machines and devices"): all memory as QEMU's own load
 * brings it, and which blocks came in lazily.
 */
import { describe, expect, test } from "bun:test";
import { guestArgv, type GuestSpec, QEMU, startQemu, whyNoGuests } from "../helpers/guests.ts";
import { FslRun, whyNoExecutable } from "../helpers/load-runs.ts";
import {
  aarch64Guest,
  loadAndCompare,
  matrixDirectory,
  MATRIX_TIMEOUT_MS,
  ovmf,
  ovmfArgs,
  qemuAarch64,
  saveGuest,
  type Way,
} from "../helpers/matrix-guests.ts";

const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;
const BLANK = "driver=null-co,size=8388608,read-zeroes=on,node-name=";

/** Devices whose drivers the Linux guest has, all with rings in RAM; `bus` is `pci` or `device`. */
function virtioDevices(bus: "pci" | "device"): string[] {
  return [
    ...["-blockdev", `${BLANK}blk0`, "-device", `virtio-blk-${bus},drive=blk0`],
    ...["-blockdev", `${BLANK}scsi0`, "-device", `virtio-scsi-${bus},id=scsi`],
    ...["-device", "scsi-hd,bus=scsi.0,drive=scsi0"],
    ...["-netdev", "hubport,id=net0,hubid=0", "-device", `virtio-net-${bus},netdev=net0`],
    ...["-device", `virtio-rng-${bus}`, "-device", `virtio-balloon-${bus}`],
    ...["-chardev", "null,id=con0", "-device", `virtio-serial-${bus}`],
    ...["-device", "virtconsole,chardev=con0"],
  ];
}

const USB = ["-device", "qemu-xhci", "-device", "usb-tablet", "-device", "usb-kbd"];

const LINUX: readonly [string, GuestSpec, Readonly<Record<string, Way>>][] = [
  [
    "pc with virtio devices, VGA and USB",
    { machine: "pc", extraArgs: [...virtioDevices("pci"), "-device", "VGA", ...USB] },
    { "pc.ram": "lazy" },
  ],
  [
    "q35 with virtio devices, virtio-vga and USB",
    { machine: "q35", extraArgs: [...virtioDevices("pci"), "-device", "virtio-vga", ...USB] },
    { "pc.ram": "lazy" },
  ],
  [
    "microvm with virtio devices",
    { machine: "microvm", extraArgs: virtioDevices("device") },
    { "microvm.ram": "lazy" },
  ],
];

describe.skipIf(skip)("machines and devices", () => {
  test.each(LINUX)(
    "%s",
    async (_, spec, ways) => {
      using snapshot = await saveGuest(guestArgv({ dataMiB: 16, ...spec }), { ready: /^tick / });
      await using loaded = await loadAndCompare(snapshot);
      expect(loaded.ways).toMatchObject(ways);
    },
    MATRIX_TIMEOUT_MS,
  );

  test.skipIf(ovmf() === null)(
    "q35 with OVMF",
    async () => {
      using directory = matrixDirectory();
      // Its drivers use the disk and the screen; then it finds nothing to start.
      const argv = guestArgv({
        guest: "bare",
        cpu: "qemu64",
        memoryMiB: 256,
        extraArgs: [...ovmfArgs(directory.path), "-device", "VGA", ...virtioDevices("pci"), ...USB],
      }).filter((argument, index, all) => {
        return (
          !/^-(kernel|append)$/.test(argument) && !/^-(kernel|append)$/.test(all[index - 1] ?? "")
        );
      });
      using snapshot = await saveGuest(argv, { ready: /BdsDxe: (failed|loading|No bootable)/ });
      await using loaded = await loadAndCompare(snapshot);
      expect(loaded.ways).toMatchObject({ "pc.ram": "lazy", "system.flash0": "lazy" });
    },
    MATRIX_TIMEOUT_MS,
  );

  test.skipIf(qemuAarch64() === null)(
    "aarch64 virt",
    async () => {
      const machine = "-nodefaults -display none -machine virt -cpu cortex-a57 -m 128 -accel tcg";
      const program = qemuAarch64() ?? "";
      const argv = [program, ...machine.split(" "), "-kernel", await aarch64Guest()];
      using snapshot = await saveGuest(argv, { ready: /^tick \d+ ok/ });
      {
        await using loaded = await loadAndCompare(snapshot);
        expect(loaded.ways).toMatchObject({ "mach-virt.ram": "lazy" });
      }
      await using run = await FslRun.start(snapshot, { flags: ["--eager-rate", "4M"] });
      await run.serial.waitFor(/^tick \d+ ok/);
      await run.serial.waitForNext(/^tick \d+ ok/);
      expect(run.serial.lines.some(({ text }) => text.includes("BAD"))).toBe(false);
    },
    MATRIX_TIMEOUT_MS,
  );

  test(
    "NVMe: QEMU itself does not save such a guest",
    async () => {
      const drive = ["-blockdev", `${BLANK}n0`, "-device", "nvme,serial=1,drive=n0"];
      const argv = guestArgv({ guest: "bare", extraArgs: drive });
      expect(argv[0]).toBe(QEMU);
      await using qemu = await startQemu([...argv, "-S"]);
      await qemu.qmp.setCapabilities(["mapped-ram"]);
      const save = qemu.qmp.execute("migrate", { uri: "file:/dev/null" });
      expect(String(await save.catch((error: unknown) => error))).toMatch(/non-migratable.*nvme/);
    },
    MATRIX_TIMEOUT_MS,
  );
});
