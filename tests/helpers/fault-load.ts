/**
 * A program that loads a snapshot with the library, with a page source of its own:
 * `bun fault-load.ts JSON SNAP --report PATH -- QEMU …`; JSON: what fault-source.ts wants.
 */
import { join } from "node:path";
import { loadSnapshot, spawnQemu } from "../../src/index.ts";
import type { FaultySourceOptions } from "./fault-source.ts";

const [json = "", snapshot = "", ...rest] = process.argv.slice(2);
const source = JSON.parse(json) as FaultySourceOptions;
const qemu = rest.slice(rest.indexOf("--") + 1);
const target = spawnQemu({ argv: qemu });
process.on("SIGTERM", () => target.kill());
const handle = await loadSnapshot({
  snapshot,
  target,
  source: {
    module: join(import.meta.dir, "fault-source.ts"),
    options: { ...source, path: snapshot },
  },
  paused: source.paused === true,
  eager: { bytesPerSecond: 4_000_000 },
  logger: { info: (text) => console.error(text), warn: (text) => console.error(text) },
});
const { complete } = await handle.done.catch((error: Error) => {
  console.error(`gave up: ${error.message}`);
  return { complete: false };
});
console.error(complete ? "all RAM in" : "not all RAM in");
await handle.exited;
process.exit(complete ? 0 : 1);
