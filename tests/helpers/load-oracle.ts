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
} from "./guests.ts";

const dumps = new Map<string, Promise<Map<string, BlockPages>>>();

/** All memory of a snapshot as QEMU's own load brings it. */
export function oracleMemory(snapshot: GuestSnapshot): Promise<Map<string, BlockPages>> {
  const { path } = snapshot;
  const known = dumps.get(path);
  if (known !== undefined) return known;
  const made = (async () => {
    const { uri = path } = snapshot as GuestSnapshot & { readonly uri?: string };
    const { qemu } = await ordinaryLoad({ ...snapshot, path: uri }, { paused: true });
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
