/**
 * The in-process benchmark: the fault loop and the eager loop of src/load against the same in C
 * (fault-path.c), without QEMU. Another process owns the memory and touches it; it measures each
 * touch itself, so both handlers are timed by the same clock.
 *
 *   bun scripts/bench/fault-path.ts [--quick] [--rounds N]
 */
import { closeSync, existsSync, mkdirSync, openSync, statSync, writeSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { Serving } from "../../src/load/serving.ts";
import { LoadState } from "../../src/load/state.ts";
import { Crew } from "../../src/load/workers.ts";
import { REGISTER_MISSING, SOCK_STREAM } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { Uffd } from "../../src/uffd/uffd.ts";
import type { ServedTarget } from "../../src/vmm/target.ts";
import { ROOT } from "../build-shim.ts";
import { benchProgram, touchMemory, warmFile } from "./host.ts";
import { ratios, type Summary, summarize } from "./statistics.ts";

const PAGE = 4096;
const KIB = 1024;
const MIB = 1024 * 1024;
const SOCKET_FD = 3;
/** What the machine gives at best is held against other figures: one bad round of three would spoil it. */
const READING_ROUNDS_MIN = 7;
/** Long enough for Workers to start, ms. */
const HIRED_MS = 100;

export interface FaultPathOptions {
  readonly rounds: number;
  /** Pages that are touched in one measurement of faults. */
  readonly faultPages: number;
  /** Bytes that are copied in one measurement of throughput. */
  readonly eagerLength: number;
  readonly log: (line: string) => void;
}

/**
 * Latency of a touch in µs as the touching thread saw it, and faults per second of all threads. C is
 * the same loop, which reads each page into a buffer and keeps account.
 */
export interface FaultRow {
  readonly threads: number;
  readonly ts: LatencySummary;
  readonly c: LatencySummary;
  /** TypeScript ÷ C, pair by pair. */
  readonly p50Ratio: Summary | null;
  readonly p99Ratio: Summary | null;
  /** C that keeps the whole file in its page table and no account of anything; TypeScript ÷ that. */
  readonly bare: LatencySummary;
  readonly bareP50Ratio: Summary | null;
  readonly bareP99Ratio: Summary | null;
}

export interface LatencySummary {
  readonly p50Us: Summary | null;
  readonly p99Us: Summary | null;
  readonly maxUs: Summary | null;
  readonly faultsPerSecond: Summary | null;
}

/** Throughput in GB/s. */
export interface EagerRow {
  readonly pieceLength: number;
  readonly threads: number;
  readonly ts: Summary | null;
  readonly c: Summary | null;
  /** TypeScript ÷ C, pair by pair. */
  readonly ratio: Summary | null;
  /** C that takes the file out of its page table again, as a loader must; that ÷ C. */
  readonly tidy: Summary | null;
  readonly tidyRatio: Summary | null;
}

/** Reading the file into fresh huge pages, in C: throughput in GB/s. */
export interface ReadingRow {
  readonly threads: number;
  readonly c: Summary | null;
}

export interface FaultPathResult {
  readonly faults: readonly FaultRow[];
  readonly eager: readonly EagerRow[];
  readonly reading: readonly ReadingRow[];
}

const TOUCHING_THREADS = [1, 2, 4];
const PIECES = [4 * KIB, 64 * KIB, 256 * KIB, 2 * MIB];
const EAGER_THREADS = [1, 2];

export async function measureFaultPath(options: FaultPathOptions): Promise<FaultPathResult> {
  const length = Math.max(options.faultPages * PAGE, options.eagerLength);
  const path = sourceFile(length);
  await warmFile(path);
  const faults: FaultRow[] = [];
  for (const threads of TOUCHING_THREADS) {
    faults.push(await faultRow(options, path, threads));
    options.log(faultLine(faults.at(-1) as FaultRow));
  }
  const eager: EagerRow[] = [];
  for (const pieceLength of PIECES) {
    for (const threads of EAGER_THREADS) {
      eager.push(await eagerRow(options, path, pieceLength, threads));
      options.log(eagerLine(eager.at(-1) as EagerRow));
    }
  }
  const reading = await readingRows(options, path);
  for (const { threads, c } of reading) {
    options.log(`reading into huge pages, ${threads} threads: C ${fixed(c, 2)} GB/s`);
  }
  return { faults, eager, reading };
}

export function faultLine(row: FaultRow): string {
  const { threads, ts, c, p50Ratio, p99Ratio, bare, bareP50Ratio, bareP99Ratio } = row;
  const side = ({ p50Us, p99Us, faultsPerSecond }: LatencySummary): string =>
    `p50 ${fixed(p50Us)} p99 ${fixed(p99Us)} µs, ${fixed(faultsPerSecond, 0)}/s`;
  return (
    `faults, ${threads} threads: TypeScript ${side(ts)}; C ${side(c)}; ` +
    `ratio p50 ${fixed(p50Ratio, 2)} p99 ${fixed(p99Ratio, 2)}; bare C ${side(bare)}; ` +
    `ratio p50 ${fixed(bareP50Ratio, 2)} p99 ${fixed(bareP99Ratio, 2)}`
  );
}

export function eagerLine(row: EagerRow): string {
  const { pieceLength, threads, ts, c, ratio, tidy, tidyRatio } = row;
  return (
    `eager, ${pieceLength / KIB} KiB, ${threads} threads: ` +
    `TypeScript ${fixed(ts, 2)} GB/s; C ${fixed(c, 2)} GB/s; ratio ${fixed(ratio, 2)}; ` +
    `C that unmaps ${fixed(tidy, 2)} GB/s; ratio ${fixed(tidyRatio, 2)}`
  );
}

function fixed(summary: Summary | null, digits = 1): string {
  return summary === null ? "-" : summary.median.toFixed(digits);
}

/** A file of pages that all differ, kept in .cache. */
function sourceFile(length: number): string {
  const directory = join(ROOT, ".cache", "bench");
  const path = join(directory, `pages-${length / MIB}M`);
  if (existsSync(path) && statSync(path).size === length) return path;
  mkdirSync(directory, { recursive: true });
  const piece = new Uint32Array(MIB / 4);
  const fd = openSync(path, "w");
  for (let at = 0; at < length; at += MIB) {
    for (let index = 0; index < piece.length; index += 1) piece[index] = (at + index) ^ 0x5eed;
    writeSync(fd, piece);
  }
  closeSync(fd);
  return path;
}

// -- the process that owns the memory -------------------------------------------------------------

interface Latency {
  readonly p50Us: number;
  readonly p99Us: number;
  readonly maxUs: number;
  readonly faultsPerSecond: number;
}

/** `fault-path touch`, with our end of its socket. */
class Toucher {
  readonly socket: number;
  readonly #child: Bun.Subprocess<"ignore", "pipe", "inherit">;

  /** @param threads 0: it touches nothing and waits */
  constructor(pages: number, threads: number, seed: number) {
    const [own, theirs] = socketPair();
    this.socket = own;
    this.#child = spawn(["touch", String(pages), String(threads), String(seed)], theirs);
  }

  get pid(): number {
    return this.#child.pid;
  }

  get exited(): Promise<number> {
    return this.#child.exited;
  }

  /** Lets it begin. */
  go(): void {
    sys.check(sys.send(this.socket, GO, 1, NO_FDS, 0, 0), "send to the touching process");
  }

  /** What it has measured. */
  async latency(): Promise<Latency> {
    const [count = 0, p50 = 0, p99 = 0, max = 0, , wallNs = 0] = await numbers(
      this.#child.stdout,
      "touched",
    );
    return {
      p50Us: p50 / 1000,
      p99Us: p99 / 1000,
      maxUs: max / 1000,
      faultsPerSecond: (count / wallNs) * 1e9,
    };
  }

  async close(): Promise<void> {
    this.#child.kill("SIGKILL");
    await this.#child.exited;
    sys.close(this.socket);
  }
}

const GO = new Uint8Array([0x67]);
const NO_FDS = new Int32Array(0);

function socketPair(): [number, number] {
  const pair = new Int32Array(2);
  sys.check(sys.socketpair(SOCK_STREAM, pair), "socketpair");
  return [pair[0] ?? -1, pair[1] ?? -1];
}

/** Starts the program with a socket as its descriptor 3, which is closed here. */
function spawn(
  args: readonly string[],
  socket: number,
): Bun.Subprocess<"ignore", "pipe", "inherit"> {
  const child = Bun.spawn([benchProgram("fault-path"), ...args], {
    stdio: ["ignore", "pipe", "inherit", socket],
  });
  sys.close(socket);
  if (SOCKET_FD !== 3) throw new Error("stdio above begins at descriptor 3");
  return child as Bun.Subprocess<"ignore", "pipe", "inherit">;
}

/** The numbers behind the first word of the line that the program prints. */
async function numbers(stream: ReadableStream<Uint8Array>, word: string): Promise<number[]> {
  const decoder = new TextDecoder();
  let text = "";
  for await (const part of stream) {
    text += decoder.decode(part, { stream: true });
    if (text.includes("\n")) break;
  }
  const [first, ...rest] = text.trim().split(" ");
  if (first !== word) throw new Error(`fault-path: expected ${word}, found '${text.trim()}'`);
  return rest.map(Number);
}

// -- both handlers --------------------------------------------------------------------------------

interface FaultPathWork {
  readonly path: string;
  readonly pages: number;
  readonly threads: number;
  readonly seed: number;
}

async function faultsInC(work: FaultPathWork, isBare: boolean): Promise<Latency> {
  const { path, pages, threads, seed } = work;
  const [left, right] = socketPair();
  const toucher = spawn(["touch", String(pages), String(threads), String(seed)], left);
  const server = spawn(["serve", path, isBare ? "1" : "0"], right);
  try {
    // Who touches waits for ever where nobody serves.
    const unserved = server.exited.then((code) => {
      throw new Error(`fault-path serve ended with ${code}`);
    });
    unserved.catch(() => {});
    const touched = numbers(toucher.stdout, "touched");
    const [count = 0, p50 = 0, p99 = 0, max = 0, , wallNs = 0] = await Promise.race([
      touched,
      unserved,
    ]);
    const faultsPerSecond = (count / wallNs) * 1e9;
    return { p50Us: p50 / 1000, p99Us: p99 / 1000, maxUs: max / 1000, faultsPerSecond };
  } finally {
    toucher.kill("SIGKILL");
    server.kill("SIGKILL");
    await Promise.all([toucher.exited, server.exited]);
  }
}

/** @returns GB/s */
async function fillInC(
  path: string,
  length: number,
  pieceLength: number,
  threads: number,
  keepsMapped: boolean,
): Promise<number> {
  const [left, right] = socketPair();
  const toucher = spawn(["touch", String(length / PAGE), "0", "1"], left);
  const keep = keepsMapped ? "1" : "0";
  const filler = spawn(["fill", path, String(pieceLength), String(threads), keep], right);
  try {
    const [ns = 0] = await numbers(filler.stdout, "filled");
    return length / ns;
  } finally {
    toucher.kill("SIGKILL");
    filler.kill("SIGKILL");
    await Promise.all([toucher.exited, filler.exited]);
  }
}

/** @returns GB/s */
async function readInC(path: string, length: number, threads: number): Promise<number> {
  const command = [benchProgram("fault-path"), "read", path, String(length), String(threads)];
  const reader = Bun.spawn(command, { stdout: "pipe", stderr: "inherit" });
  const [ns = 0] = await numbers(reader.stdout, "read");
  await reader.exited;
  return length / ns;
}

async function faultsInTypeScript(work: FaultPathWork): Promise<Latency> {
  const toucher = new Toucher(work.pages, work.threads, work.seed);
  const load = await armedLoad(toucher, work.path, work.pages * PAGE, { clusterPages: 1 });
  try {
    toucher.go();
    return await toucher.latency();
  } finally {
    await toucher.close();
    await load.close();
  }
}

/** @returns GB/s */
async function fillInTypeScript(
  path: string,
  length: number,
  pieceLength: number,
  threads: number,
): Promise<number> {
  const toucher = new Toucher(length / PAGE, 0, 1);
  const eager = { workers: threads, pieceLength, nice: 0 };
  const load = await armedLoad(toucher, path, length, { eager });
  try {
    // Workers that have loaded their code and wait for work: what a load has when its guest resumes.
    load.crew.hireEager(threads);
    await Bun.sleep(HIRED_MS);
    const start = performance.now();
    if (!(await load.serving.bringRest())) throw new Error("the touching process has ended");
    return length / ((performance.now() - start) * 1e6);
  } finally {
    await toucher.close();
    await load.close();
  }
}

interface ArmedLoad {
  readonly crew: Crew;
  readonly serving: Serving;
  close(): Promise<void>;
}

/** The loader's own serving part, on memory of the touching process: all of it data. */
async function armedLoad(
  toucher: Toucher,
  path: string,
  length: number,
  options: ConstructorParameters<typeof Serving>[4],
): Promise<ArmedLoad> {
  const crew = new Crew();
  const { fd, addr } = receiveRegion(toucher.socket);
  const uffd = new Uffd(fd);
  uffd.api(0);
  uffd.register(addr, length, REGISTER_MISSING);
  const fileFd = openSync(path, "r");
  const target = servedTarget(toucher);
  const { state, fd: stateFd } = LoadState.create({
    target: {
      pid: target.pid,
      controlPath: null,
      isControlOwn: false,
      isControlPrivate: false,
      endsWithFsl: true,
      undo: null,
    },
    paused: false,
    snapshotPath: path,
    snapshotIdentity: {},
    blocks: [
      {
        idstr: "bench",
        hostAddr: addr,
        usedLength: length,
        pageSize: PAGE,
        hostPageSize: PAGE,
        pagesOffset: 0,
        movable: false,
      },
    ],
    registered: [addr, addr + length],
    canDiscard: false,
    watched: { balloons: false, helpers: false },
    serving: {},
    source: { options: { fd: fileFd } },
  });
  for (const block of state.blocks) block.data.fill(-1);
  const serving = new Serving(target, state, uffd, crew, options);
  await serving.serveFaults();
  const close = async (): Promise<void> => {
    await serving.stop();
    uffd.close();
    sys.close(stateFd);
    sys.close(target.pidfd);
    closeSync(fileFd);
  };
  return { crew, serving, close };
}

function receiveRegion(socket: number): { fd: number; addr: number } {
  const message = new BigUint64Array(2);
  const fds = new Int32Array(1);
  const got = sys.recv(socket, message, message.byteLength, fds, 1, new Int32Array(2), 0);
  if (got !== message.byteLength) throw new Error("the touching process sent no region");
  return { fd: fds[0] ?? -1, addr: Number(message[0]) };
}

function servedTarget(toucher: Toucher): ServedTarget {
  const nothing = async (): Promise<void> => {};
  const exited = toucher.exited.then((exitCode) => ({ exitCode, signal: null }));
  return {
    description: `touching process (pid ${toucher.pid})`,
    pid: toucher.pid,
    pidfd: sys.check(sys.pidfdOpen(toucher.pid, 0), "pidfd_open"),
    exited,
    resume: nothing,
    pause: nothing,
    dropDescriptor: nothing,
    release: nothing,
    signal: () => {},
    kill: () => {},
  };
}

// -- rows -----------------------------------------------------------------------------------------

async function faultRow(
  options: FaultPathOptions,
  path: string,
  threads: number,
): Promise<FaultRow> {
  const [ts, c, bare]: [Latency[], Latency[], Latency[]] = [[], [], []];
  for (let round = 0; round < options.rounds; round += 1) {
    await touchMemory(options.faultPages * PAGE);
    const work = { path, pages: options.faultPages, threads, seed: round + 1 };
    const inC = async (): Promise<unknown> => c.push(await faultsInC(work, false));
    const barely = async (): Promise<unknown> => bare.push(await faultsInC(work, true));
    const inTs = async (): Promise<unknown> => ts.push(await faultsInTypeScript(work));
    for (const run of alternate([inC, inTs, barely], round)) await run();
  }
  return {
    threads,
    ts: summarizeLatency(ts),
    c: summarizeLatency(c),
    bare: summarizeLatency(bare),
    p50Ratio: ratios(p50s(ts), p50s(c)),
    p99Ratio: ratios(p99s(ts), p99s(c)),
    bareP50Ratio: ratios(p50s(ts), p50s(bare)),
    bareP99Ratio: ratios(p99s(ts), p99s(bare)),
  };
}

const p50s = (latencies: readonly Latency[]): number[] => latencies.map(({ p50Us }) => p50Us);
const p99s = (latencies: readonly Latency[]): number[] => latencies.map(({ p99Us }) => p99Us);

function summarizeLatency(latencies: readonly Latency[]): LatencySummary {
  return {
    p50Us: summarize(latencies.map(({ p50Us }) => p50Us)),
    p99Us: summarize(latencies.map(({ p99Us }) => p99Us)),
    maxUs: summarize(latencies.map(({ maxUs }) => maxUs)),
    faultsPerSecond: summarize(latencies.map(({ faultsPerSecond }) => faultsPerSecond)),
  };
}

async function eagerRow(
  options: FaultPathOptions,
  path: string,
  pieceLength: number,
  threads: number,
): Promise<EagerRow> {
  const [ts, c, tidy]: [number[], number[], number[]] = [[], [], []];
  const { eagerLength } = options;
  for (let round = 0; round < options.rounds; round += 1) {
    await touchMemory(eagerLength);
    const inC = async (): Promise<unknown> =>
      c.push(await fillInC(path, eagerLength, pieceLength, threads, true));
    const inTs = async (): Promise<unknown> =>
      ts.push(await fillInTypeScript(path, eagerLength, pieceLength, threads));
    const tidily = async (): Promise<unknown> =>
      tidy.push(await fillInC(path, eagerLength, pieceLength, threads, false));
    for (const run of alternate([inC, inTs, tidily], round)) await run();
  }
  return {
    pieceLength,
    threads,
    ts: summarize(ts),
    c: summarize(c),
    ratio: ratios(ts, c),
    tidy: summarize(tidy),
    tidyRatio: ratios(tidy, c),
  };
}

async function readingRows(options: FaultPathOptions, path: string): Promise<ReadingRow[]> {
  const found = EAGER_THREADS.map((threads) => ({ threads, rates: [] as number[] }));
  const { eagerLength } = options;
  for (let round = 0; round < Math.max(options.rounds, READING_ROUNDS_MIN); round += 1) {
    for (const { threads, rates } of alternate(found, round)) {
      await touchMemory(eagerLength);
      rates.push(await readInC(path, eagerLength, threads));
    }
  }
  return found.map(({ threads, rates }) => ({ threads, c: summarize(rates) }));
}

/** Every other round the other way round. */
function alternate<T>(items: readonly T[], round: number): T[] {
  return round % 2 === 0 ? [...items] : items.toReversed();
}

export function faultPathOptions(
  quick: boolean,
  rounds: number,
  log: (line: string) => void,
): FaultPathOptions {
  return quick
    ? { rounds, faultPages: 8192, eagerLength: 128 * MIB, log }
    : { rounds, faultPages: 65_536, eagerLength: 1024 * MIB, log };
}

if (import.meta.main) {
  const { values } = parseArgs({
    options: { quick: { type: "boolean" }, rounds: { type: "string" } },
  });
  const quick = values.quick === true;
  const rounds = Number(values.rounds ?? (quick ? 3 : 7));
  await measureFaultPath(faultPathOptions(quick, rounds, console.log));
}
