/** The executable: which command, strict arguments, errors to messages and exit codes. */
import { type ArgsDef, type CommandDef, defineCommand, renderUsage, runCommand } from "citty";
import packageJson from "../../package.json";
import { EXIT_CODES, FslError, isFslError } from "../index.ts";
import { checkArguments, splitAtDashes } from "./arguments.ts";
import { bugReport } from "./bug.ts";
import { doctorCommand } from "./doctor.ts";
import { inspectCommand } from "./inspect.ts";
import { LOAD_EXAMPLES, LOAD_USAGE, loadCommand } from "./load.ts";
import { print } from "./output.ts";
import { resumeCommand } from "./resume.ts";
import { saveCommand } from "./save.ts";
import { statusCommand } from "./status.ts";

interface Entry {
  readonly args: ArgsDef;
  usage(): Promise<string>;
  run(rawArgs: string[], data: unknown): Promise<unknown>;
}

/** What `main` needs of a command, whatever its arguments are. */
function entry<T extends ArgsDef>(
  command: CommandDef<T>,
  amend: (usage: string) => string = (usage) => usage,
): Entry {
  return {
    args: (command.args ?? {}) as ArgsDef,
    usage: async () => amend(await renderUsage(command, { meta: { name: "fsl" } })),
    run: (rawArgs, data) => runCommand(command, { rawArgs, data }),
  };
}

const entries: Readonly<Record<string, Entry>> = {
  load: entry(loadCommand, (usage) => {
    return `${Bun.stripANSI(usage).replace(/^USAGE .*$/m, LOAD_USAGE)}\n${LOAD_EXAMPLES}`;
  }),
  resume: entry(resumeCommand),
  status: entry(statusCommand),
  save: entry(saveCommand),
  inspect: entry(inspectCommand),
  doctor: entry(doctorCommand),
};

const program = defineCommand({
  meta: {
    name: "fsl",
    version: packageJson.version,
    description: "Fast snapshot load: a QEMU guest from a mapped-ram snapshot, at once",
  },
  subCommands: {
    load: loadCommand,
    resume: resumeCommand,
    status: statusCommand,
    save: saveCommand,
    inspect: inspectCommand,
    doctor: doctorCommand,
  },
});

/** `--json` asks for errors as JSON too. @param command whose help says more; "" = none */
function printError(error: unknown, asJson: boolean, command = ""): number {
  const known = isFslError(error) ? error : usageError(error);
  if (known === undefined) {
    console.error(bugReport(error));
    return EXIT_CODES.INTERNAL;
  }
  if (asJson) {
    const { code, message, details } = known;
    console.error(JSON.stringify({ error: { code, message, details } }));
  } else if (known.code === "INTERNAL") {
    console.error(bugReport(known));
  } else {
    console.error(`fsl: ${known.message}`);
    if (known.code === "USAGE") console.error(`fsl: try 'fsl ${command}--help'`);
  }
  return known.exitCode;
}

function usageError(error: unknown): FslError | undefined {
  if (!(error instanceof Error) || error.name !== "CLIError") return undefined;
  // citty colours parts of its messages.
  return new FslError("USAGE", Bun.stripANSI(error.message).replace(/\.$/, ""));
}

function unknownCommand(name: string): FslError {
  const known = Object.keys(entries).join(", ");
  return new FslError("USAGE", `unknown command '${name}', expected one of ${known}`);
}

function findEntry(name = ""): Entry | undefined {
  return Object.hasOwn(entries, name) ? entries[name] : undefined;
}

function entryOf(name: string): Entry {
  const found = findEntry(name);
  if (found === undefined) throw unknownCommand(name);
  return found;
}

function refuseSurplus([surplus]: readonly string[]): void {
  if (surplus !== undefined) throw new FslError("USAGE", `unexpected argument '${surplus}'`);
}

/** citty colours whatever the output is. */
function printUsage(usage: string, stream: NodeJS.WriteStream): void {
  stream.write(`${stream.isTTY === true ? usage : Bun.stripANSI(usage)}\n`);
}

async function main(argv: readonly string[]): Promise<number> {
  const { own, behind } = splitAtDashes(argv);
  const [name, ...rest] = own;
  const command = findEntry(name);
  try {
    if (name === "--version" || name === "-V") {
      refuseSurplus(argv.slice(1));
      print(packageJson.version);
      return 0;
    }
    if (name === undefined || name === "--help" || name === "-h" || name === "help") {
      const topic = name === "help" ? argv[1] : undefined;
      refuseSurplus(argv.slice(topic === undefined ? 1 : 2));
      const usage = await (topic === undefined ? renderUsage(program) : entryOf(topic).usage());
      printUsage(usage, name === undefined ? process.stderr : process.stdout);
      return name === undefined ? 2 : 0;
    }
    if (command === undefined) throw unknownCommand(name);
    if (rest.includes("--help") || rest.includes("-h")) {
      printUsage(await command.usage(), process.stdout);
      return 0;
    }
    if (behind !== null && name !== "load") {
      throw new FslError("USAGE", `'fsl ${name}' takes nothing behind --`);
    }
    const isBehindMissing = name === "load" && behind === null && !rest.includes("--qmp");
    const hint = isBehindMissing ? "; QEMU's own command line stands behind --" : "";
    checkArguments(rest, command.args, hint);
    await command.run(rest, { behind });
    return Number(process.exitCode ?? 0);
  } catch (error) {
    return printError(error, rest.includes("--json"), command === undefined ? "" : `${name} `);
  }
}

/**
 * An error that nobody has caught ends this process as it would by itself; but Bun would print the
 * code around the place, which is one line of 100 KB here.
 */
function endByBug(error: unknown): never {
  console.error(bugReport(error));
  console.error("fsl: if a guest was being loaded, it waits; see: fsl status");
  process.exit(EXIT_CODES.INTERNAL);
}

process.on("uncaughtException", endByBug);
process.on("unhandledRejection", endByBug);
process.exit(await main(process.argv.slice(2)));
