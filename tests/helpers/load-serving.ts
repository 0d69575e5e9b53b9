/**
 * fsl's real Workers on the real userfaultfd of a process of ours (load-toucher.c): no QEMU, no
 * snapshot, but a file of pages whose every word says where it belongs.
 */
import { join } from "node:path";
import { BUILD, compileProgram, modifiedMs, ROOT } from "../../scripts/build-shim.ts";
import { setRange } from "../../src/bits.ts";
import { latencyOf, reportOf, type LoadReport } from "../../src/load/report.ts";
import { Serving, type ServingOptions } from "../../src/load/serving.ts";
import { LoadState, type StateMetadata } from "../../src/load/state.ts";
import { Crew } from "../../src/load/workers.ts";
import { REGISTER_MISSING, UFFD_FEATURES } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { Uffd } from "../../src/uffd/uffd.ts";
import type { ServedTarget } from "../../src/vmm/target.ts";
import { mappedBytes, TargetProcess, until, within } from "./kernel-target.ts";

export const PAGE = 4096;
/** How long one command of the toucher may take. */
const COMMAND_MS = 30_000;

export type MemoryKind = "anon" | "shmem" | "hugetlb";

/** load-toucher, compiled when it is older than its source. */
export function toucherProgram(): string {
  const source = join(ROOT, "tests/helpers/load-toucher.c");
  const path = join(BUILD, "load-toucher");
  if (modifiedMs(path) < modifiedMs(source)) compileProgram([source], path, ["-pthread"]);
  return path;
}

/** As load-toucher.c has it. */
export function hasData(page: number): boolean {
  return page % 8 < 5 && Math.floor(page / 64) % 4 !== 3;
}

export function countDataPages(pages: number): number {
  return Array.from({ length: pages }, (_, page) => page).filter(hasData).length;
}

/** All pages as a snapshot file has them: where there is no data, there are stale bytes. */
export function pageFile(pages: number): ReturnType<typeof mappedBytes> {
  const words = new Uint32Array(pages * (PAGE / 4));
  for (let page = 0; page < pages; page += 1) {
    const at = page * 1024;
    if (!hasData(page)) words.fill(0xdeadbeef, at, at + 1024);
    else for (let w = 0; w < 1024; w += 1) words[at + w] = Math.imul(at + w + 1, 2_654_435_761);
  }
  return mappedBytes(new Uint8Array(words.buffer));
}

export interface RigOptions extends ServingOptions {
  readonly kind?: MemoryKind;
  readonly pages: number;
  readonly canDiscard?: boolean;
  /** The toucher's end is told so much later than it was, ms. */
  readonly exitLagMs?: number;
  /** Called when the toucher runs and no Worker has heard of it yet. */
  readonly beforeServing?: (pid: number) => void;
  /** Instead of the file of pages; its path is the option `path`. */
  readonly source?: {
    readonly module: string;
    readonly options: Readonly<Record<string, unknown>>;
  };
}

/** Verdict of a command: how many pages were wrong, and the first of them. */
export interface Verdict {
  readonly wrong: number;
  readonly first: number;
  readonly discards: number;
}

export class Rig implements AsyncDisposable {
  readonly toucher: TargetProcess;
  readonly state: LoadState;
  readonly serving: Serving;
  readonly uffd: Uffd;
  readonly messages: string[] = [];
  isExitTold = false;
  readonly #file: ReturnType<typeof mappedBytes>;
  readonly #stateFd: number;
  readonly #pidfd: number;
  #nextId = 1;

  private constructor(
    toucher: TargetProcess,
    region: { fd: number; addr: number; length: number },
    options: RigOptions,
  ) {
    this.toucher = toucher;
    this.#file = pageFile(options.pages);
    this.uffd = new Uffd(region.fd);
    this.uffd.register(region.addr, region.length, REGISTER_MISSING);
    const path = `/proc/${process.pid}/fd/${this.#file.fd}`;
    const { source } = options;
    const metadata: StateMetadata = {
      target: { pid: toucher.pid, controlPath: null, undo: null } as StateMetadata["target"],
      paused: false,
      snapshotPath: path,
      snapshotIdentity: {},
      blocks: [
        {
          idstr: "ram",
          hostAddr: region.addr,
          usedLength: options.pages * PAGE,
          pageSize: PAGE,
          hostPageSize: options.kind === "hugetlb" ? 2 ** 21 : PAGE,
          pagesOffset: 0,
          movable: false,
        },
      ],
      registered: [region.addr, region.addr + region.length],
      canDiscard: options.canDiscard ?? false,
      watched: { balloons: false, helpers: false },
      serving: {},
      source:
        source === undefined
          ? { options: { fd: this.#file.fd } }
          : { module: source.module, options: { path, ...source.options } },
    };
    const { state, fd } = LoadState.create(metadata);
    this.state = state;
    this.#stateFd = fd;
    const data = state.blocks[0]?.data;
    for (let page = 0; page < options.pages; page += 1) {
      if (data && hasData(page)) setRange(data, page, page + 1);
    }
    this.#pidfd = sys.check(sys.pidfdOpen(toucher.pid, 0), "pidfd_open");
    const exited = toucher.child.exited.then(async () => {
      if (options.exitLagMs !== undefined) await Bun.sleep(options.exitLagMs);
      this.isExitTold = true;
      const { exitCode, signalCode } = toucher.child;
      return signalCode === null
        ? { exitCode, signal: null }
        : { exitCode: null, signal: signalCode };
    });
    const unused = (): Promise<void> => Promise.resolve();
    const target = {
      description: "toucher",
      pid: toucher.pid,
      pidfd: this.#pidfd,
      exited,
      resume: unused,
      pause: unused,
      dropDescriptor: unused,
      release: unused,
      signal: () => {},
      kill: () => toucher.child.kill("SIGKILL"),
    } as unknown as ServedTarget;
    const say = (message: string): void => void this.messages.push(message);
    const crew = new Crew();
    this.serving = new Serving(target, state, this.uffd, crew, {
      logger: { info: say, warn: say },
      ...options,
    });
  }

  /** Starts the toucher, arms its memory, and serves faults. */
  static async start(options: RigOptions): Promise<Rig> {
    const { kind = "anon", pages, canDiscard = false } = options;
    const features = canDiscard ? UFFD_FEATURES.EVENT_REMOVE : 0;
    const args = [kind, String(pages * PAGE), String(features)];
    const toucher = new TargetProcess(args, toucherProgram());
    const rig = new Rig(toucher, await toucher.region(), options);
    options.beforeServing?.(toucher.pid);
    await rig.serving.serveFaults();
    return rig;
  }

  /** Sends a command of load-toucher.c, without its id. */
  async order(command: string): Promise<Verdict> {
    const id = this.#nextId;
    this.#nextId += 1;
    const [name, ...rest] = command.split(" ");
    this.toucher.say([name, id, ...rest].join(" "));
    const line = await this.toucher.line((text) => text.startsWith(`${name} ${id} `), COMMAND_MS);
    // The last thread was woken before its page was counted.
    await until(() => (this.state.busy ? null : true), COMMAND_MS, "the fault loop's last batch");
    const [, , wrong, first, discards] = line.split(" ").map(Number);
    return { wrong: wrong ?? -1, first: first ?? -1, discards: discards ?? 0 };
  }

  /**
   * Begins the eager load. @returns when all is in: true; false when the toucher has ended before
   */
  bringRest(): Promise<boolean> {
    this.serving.startEager();
    return within(this.serving.bringRest(), COMMAND_MS, "the eager load");
  }

  report(): LoadReport {
    return reportOf(this.state, {
      times: { qemuReadyMs: null, armedMs: null, resumedMs: null, residentMs: null },
      mode: "lazy",
      complete: this.serving.missingPages() === 0,
      blocks: [],
    });
  }

  latency(): ReturnType<typeof latencyOf> {
    return latencyOf(this.state);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.toucher.kill();
    await this.serving.stop();
    this.uffd.close();
    sys.close(this.#pidfd);
    sys.close(this.#stateFd);
    this.#file.close();
    this.state.unmap();
  }
}
