/**
 * The same program once more, in the background: a session of its own, so that nothing that is typed
 * at a terminal and no terminal that closes reaches it or a QEMU that it starts. It does the work
 * from its first moment on; whoever started it waits until it says that the guest runs.
 *
 * It is started with this process's arguments, directory, environment and the descriptors from 3 on
 * that this process was given to hand on. Its stdin is empty. stdout and stderr stay where they are
 * when they are files (a log); of a terminal or a pipe it is let go when the guest runs: what it and
 * its QEMU print until then is passed on by the process in the foreground.
 */
import { fstatSync } from "node:fs";
import { FslError } from "../errors.ts";
import { F_SETFD, FD_CLOEXEC, SOCK_STREAM } from "../sys/abi.ts";
import * as native from "../sys/native.ts";
import { connectDescriptor } from "./qmp.ts";
import { inheritedDescriptors, layOutDescriptors } from "./spawn.ts";

/** Descriptor number of the socket on which the process in the background says how it goes. */
const VARIABLE = "FSL_BACKGROUND";
const STDOUT = 1;
const STDERR = 2;
/** A message is one line of JSON of some 100 bytes. */
const MESSAGE_LENGTH_MAX = 65_536;

export interface Background {
  readonly pid: number;
  /** What it announced; null when it ended without having announced anything. */
  readonly announced: Promise<unknown>;
  /** Its exit code, 128 + signal when it died by one. */
  readonly exited: Promise<number>;
  signal(signal: NodeJS.Signals): void;
}

/** @throws FslError HOST_UNSUPPORTED when no process can be started */
export function startBackground(): Background {
  const pair = new Int32Array(2);
  const made = native.socketpair(SOCK_STREAM, pair);
  if (made < 0) throw cannotStart(native.errnoText(-made));
  const [ownSocket = -1, childSocket = -1] = pair;
  const layout = layOutDescriptors(inheritedDescriptors(), [childSocket]);
  let child: Bun.Subprocess<"ignore", "inherit" | "pipe", "inherit" | "pipe">;
  try {
    child = Bun.spawn(ownCommand(), {
      stdio: ["ignore", keepOrPipe(STDOUT), keepOrPipe(STDERR), ...layout.slots],
      env: { ...process.env, [VARIABLE]: String(layout.ownNumbers[0]) },
      detached: true,
    } as Bun.SpawnOptions.OptionsObject<"ignore", "inherit" | "pipe", "inherit" | "pipe">);
  } catch (error) {
    native.close(ownSocket);
    throw cannotStart(error instanceof Error ? error.message : String(error), error);
  } finally {
    native.close(childSocket);
  }
  relay(child.stdout, process.stdout);
  relay(child.stderr, process.stderr);
  return {
    pid: child.pid,
    announced: readMessage(ownSocket),
    exited: child.exited,
    signal: (signal) => child.kill(signal),
  };
}

/** In the process in the background. */
export interface BackgroundRole {
  /** What is printed is kept in a file; else nobody reads it once `announce` was called. */
  readonly isLogged: boolean;
  /** Lets the process in the foreground go. */
  announce(message: unknown): void;
}

/**
 * Once at the start: nobody else may find the mark in the environment.
 * @returns null in a process that `startBackground` has not started
 */
export function takeBackgroundRole(): BackgroundRole | null {
  const text = process.env[VARIABLE];
  delete process.env[VARIABLE];
  if (text === undefined || !/^\d{1,4}$/.test(text)) return null;
  const socket = Number(text);
  if (native.fcntl(socket, F_SETFD, FD_CLOEXEC) < 0) return null;
  return {
    isLogged: fstatSync(STDERR).isFile(),
    announce(message) {
      // The process in the foreground may have been killed: the guest runs all the same.
      const bytes = Buffer.from(`${JSON.stringify(message)}\n`);
      native.send(socket, bytes, bytes.length, new Int32Array(0), 0, 0);
      native.close(socket);
    },
  };
}

/** Inside the executable the program is a path of its own; from source it is named on the line. */
function ownCommand(): string[] {
  const isExecutable = Bun.main.startsWith("/$bunfs/");
  const own = isExecutable ? [process.execPath] : [process.execPath, Bun.main];
  return [...own, ...process.argv.slice(2)];
}

function keepOrPipe(fd: number): "inherit" | "pipe" {
  return fstatSync(fd).isFile() ? "inherit" : "pipe";
}

function relay(from: ReadableStream<Uint8Array> | undefined, to: NodeJS.WriteStream): void {
  if (from === undefined) return;
  (async () => {
    for await (const chunk of from) to.write(chunk);
  })().catch(() => {}); // Its end shows as its exit.
}

async function readMessage(socket: number): Promise<unknown> {
  const { promise, resolve } = Promise.withResolvers<string>();
  let text = "";
  const end = (): void => resolve(text);
  await connectDescriptor({
    fd: socket,
    socket: {
      binaryType: "buffer",
      data: (_socket, bytes) => {
        text += bytes.toString("utf8");
        if (text.includes("\n") || text.length > MESSAGE_LENGTH_MAX) end();
      },
      end,
      close: end,
      error: end,
    },
  });
  const [line = ""] = (await promise).split("\n", 1);
  return line === "" ? null : (JSON.parse(line) as unknown);
}

function cannotStart(why: string, cause?: unknown): FslError {
  return new FslError("HOST_UNSUPPORTED", `--detach: no process can be started: ${why}`, {}, cause);
}
