/** `--detach`: the load runs in the background from its first moment on; this waits for the guest. */
import { type BackgroundRole, startBackground } from "../index.ts";
import { formatMs } from "./format.ts";
import { log, setQuiet } from "./log.ts";
import { CAUGHT_SIGNALS } from "./serve.ts";

/** What the process in the background says when the guest runs. */
interface Announcement {
  readonly qemuPid: number;
  readonly resumedMs: number;
}

/** @returns exit code: 0 when the guest runs, else that of the load that failed */
export async function loadInBackground(): Promise<number> {
  const background = startBackground();
  const pass = (signal: NodeJS.Signals): void => background.signal(signal);
  for (const signal of CAUGHT_SIGNALS) process.on(signal, pass);
  try {
    const announced = (await background.announced) as Announcement | null;
    // What was printed before is read before it is let go.
    if (announced === null) return await background.exited;
    await turnOfEvents();
    const { qemuPid, resumedMs } = announced;
    log.info(
      `QEMU ${qemuPid} has its state after ${formatMs(resumedMs)}; fsl ${background.pid} brings in ` +
        "its RAM in the background, see: fsl status",
    );
    return 0;
  } finally {
    for (const signal of CAUGHT_SIGNALS) process.off(signal, pass);
  }
}

/** In the background: the guest runs, and nobody reads what is printed from now on, but for a log. */
export function letForegroundGo(role: BackgroundRole, qemuPid: number): void {
  role.announce({ qemuPid, resumedMs: performance.now() } satisfies Announcement);
  if (!role.isLogged) setQuiet(true);
}

/** Lets everything through that has arrived by now. */
async function turnOfEvents(): Promise<void> {
  for (let turn = 0; turn < 3; turn += 1) await new Promise((resolve) => setImmediate(resolve));
}
