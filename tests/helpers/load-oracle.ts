/**
 * The oracle of the memory tests: each snapshot loaded by QEMU itself, stopped, and read out; kept
 * per snapshot.
 */
import {
  type BlockPages,
  dumpMemory,
  type GuestSnapshot,
  memoryDifferences,
  ordinaryLoad,
  type SerialConsole,
} from "./guests.ts";

/** The bare guest's program and what the firmware left lie below: scripts/guest/bare.c FIRST_PAGE. */
export const BARE_OWN_PAGES = 512;

/** What QEMU's own load of a snapshot may need besides its path. */
export interface OracleNeeds {
  /** As QEMU's `file:` wants it: with the offset. */
  readonly uri?: string;
  readonly capabilities?: readonly string[];
}

const dumps = new Map<string, Promise<Map<string, BlockPages>>>();

/** All memory of a snapshot as QEMU's own load brings it. */
export function oracleMemory(snapshot: GuestSnapshot): Promise<Map<string, BlockPages>> {
  const { path } = snapshot;
  const known = dumps.get(path);
  if (known !== undefined) return known;
  const made = (async () => {
    const { uri = path, capabilities = [] } = snapshot as GuestSnapshot & OracleNeeds;
    const { qemu } = await ordinaryLoad({ ...snapshot, path: uri }, { paused: true, capabilities });
    await using _ = qemu;
    return await dumpMemory(qemu);
  })();
  dumps.set(path, made);
  return made;
}

/** How the memory of a stopped QEMU differs from the oracle's; empty = not at all. */
export async function differencesFromOracle(
  snapshot: GuestSnapshot,
  qemu: Parameters<typeof dumpMemory>[0],
): Promise<string[]> {
  const expected = await oracleMemory(snapshot);
  return memoryDifferences(await dumpMemory(qemu), expected);
}

/**
 * The same for a bare guest that runs, and is stopped for it; but for the pages that its own program
 * is in and writes to.
 */
export async function differencesOfBareGuest(
  snapshot: GuestSnapshot,
  qemu: Parameters<typeof dumpMemory>[0],
): Promise<string[]> {
  await qemu.qmp.execute("stop");
  const expected = await oracleMemory(snapshot);
  const found = await dumpMemory(qemu);
  for (const name of ["pc.ram", "microvm.ram", "ram0"]) {
    const own = expected.get(name)?.hashes.subarray(0, BARE_OWN_PAGES);
    if (own !== undefined) found.get(name)?.hashes.set(own);
  }
  return memoryDifferences(found, expected);
}

/**
 * Returns when a bare guest has verified every page of its own since this call: its first round may
 * have begun before the snapshot was saved.
 */
export async function wholeRound(serial: SerialConsole): Promise<void> {
  for (let tick = 0; tick < 2; tick += 1) {
    const { text } = await serial.waitForNext(/^tick \d+ (ok|BAD)/);
    if (!text.endsWith("ok")) throw new Error(`the guest says: ${text}`);
  }
}
