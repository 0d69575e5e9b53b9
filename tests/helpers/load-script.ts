/**
 * A script that loads a snapshot by the library, as a user's would: load-library.test.ts runs it in
 * several ways.
 */
import { writeFileSync } from "node:fs";
import { FslError, loadSnapshot, openSnapshot, spawnQemu } from "fsl";

const argv = process.argv.slice(2);
const [path = ""] = argv;
const valueOf = (flag: string): string | undefined => {
  const at = argv.indexOf(flag);
  return at < 0 ? undefined : argv[at + 1];
};
const source = valueOf("--source");
const target = spawnQemu({ argv: argv.slice(argv.indexOf("--") + 1) });

// What the load begins before QEMU is ready is begun for memory that is so far away.
const shift = valueOf("--shift-guess");
if (shift !== undefined) {
  const guess = target.guess.bind(target);
  target.guess = async (lengths) => {
    const right = await guess(lengths);
    console.log(`guessed ${right?.regions.length ?? "nothing"}`);
    const regions = right?.regions.map((region) => {
      return { ...region, hostAddr: region.hostAddr + Number(shift) };
    });
    return right === null || regions === undefined ? null : { ...right, regions };
  };
}

using snapshot = openSnapshot(path);
console.log(`blocks ${snapshot.blocks.map(({ idstr }) => idstr).join(" ")}`);
try {
  const load = await loadSnapshot({
    snapshot: path,
    target,
    paused: argv.includes("--paused"),
    logger: {
      info: (text) => console.log(`info ${text}`),
      warn: (text) => console.log(`warn ${text}`),
    },
    ...(source === undefined
      ? {}
      : { source: JSON.parse(source) as { module: string; options: unknown } }),
  });
  const report = await load.done;
  writeFileSync(valueOf("--report") ?? "", JSON.stringify(report));
  console.error(`all RAM in after ${report.residentMs} ms`);
  const exit = await load.exited;
  process.exitCode = exit.exitCode ?? 99;
} catch (error) {
  if (!(error instanceof FslError)) throw error;
  console.error(`${error.code}: ${error.message}`);
  process.exitCode = error.exitCode;
}
