/**
 * Says something on stderr every 20 ms for a second, then what it thinks that stderr is, in a file: `remarks.ts FILE`.
 * FILE.begun is there when some of it has been said.
 */
import { writeFileSync } from "node:fs";
import { isWatched, log, remark } from "../../src/cli/log.ts";

const [, , path = ""] = process.argv;
// As main.ts.
process.on("unhandledRejection", () => process.exit(1));
for (let round = 0; round < 50; round += 1) {
  remark("a line\n");
  log.info(`message \`${round}\``);
  if (round === 5) writeFileSync(`${path}.begun`, "");
  await Bun.sleep(20);
}
writeFileSync(path, isWatched() ? "a terminal" : "a log");
