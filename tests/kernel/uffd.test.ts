/**
 * class Uffd against a real userfaultfd of another process: contents and fault counts, and every
 * answer provoked.
 */
import { afterAll, afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { isFslError } from "../../src/errors.ts";
import {
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  O_CLOEXEC,
  O_NONBLOCK,
  POLLIN,
  PROT_READ,
  PROT_WRITE,
  REGISTER_MISSING,
  UFFD_FEATURES,
  UFFD_MSG,
  UFFD_PAGEFAULT_FLAG_WRITE,
  UFFDIO_COPY_BIT,
  UFFDIO_ZEROPAGE_BIT,
} from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import {
  COPY_CHANGED,
  COPY_EXISTS,
  COPY_GONE,
  COPY_RETRY,
  COPY_SOURCE,
  DONTWAKE,
  EVENT_PAGEFAULT,
  EVENT_REMOVE,
  EVENT_UNMAP,
  openUffd,
  Uffd,
  UffdEvents,
} from "../../src/uffd/uffd.ts";
import { testUnless, whyNoPoison } from "../helpers/declare.ts";
import {
  mappedBytes,
  patternPages,
  TargetProcess,
  until,
  within,
} from "../helpers/kernel-target.ts";

setDefaultTimeout(20_000);

const PAGE = 4096;
const PAGES = 64;
const EVENTS_MAX = 64;

type MemoryKind = "anon" | "shmem" | "hugetlb";

/** A target with a registered region, a source of PAGES pages, and a buffer for events. */
class Bench {
  readonly target: TargetProcess;
  readonly bytes = patternPages(PAGES, 0x5eed);
  readonly source = mappedBytes(this.bytes);
  readonly bufferAddr: number;
  readonly events: UffdEvents;
  uffd!: Uffd;
  addr = 0;

  constructor(kind: MemoryKind, features: number, pages = PAGES) {
    this.target = new TargetProcess(["memory", kind, String(pages), String(features)]);
    const bytes = EVENTS_MAX * UFFD_MSG.BYTES;
    const prot = PROT_READ | PROT_WRITE;
    this.bufferAddr = sys.mmap(0, bytes, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    this.events = new UffdEvents(new DataView(sys.view(this.bufferAddr, bytes)));
  }

  async connect(): Promise<this> {
    const { fd, addr, length } = await this.target.region();
    this.uffd = new Uffd(fd);
    this.addr = addr;
    this.uffd.register(addr, length, REGISTER_MISSING);
    return this;
  }

  page(index: number): number {
    return this.addr + index * PAGE;
  }

  /** The page that begins at an address. */
  indexOf(addr: number): number {
    return (addr - this.addr) / PAGE;
  }

  crc(page: number, count: number): number {
    return Bun.hash.crc32(this.bytes.subarray(page * PAGE, (page + count) * PAGE));
  }

  poll(timeoutMs: number): number {
    return sys.poll(Int32Array.of(this.uffd.fd), new Int32Array(1), 1, POLLIN, timeoutMs);
  }

  /** Waits until events are there and reads them; returns how many. */
  read(): number {
    expect(this.poll(5000)).toBe(1);
    return this.uffd.readEvents(this.bufferAddr, EVENTS_MAX);
  }

  copy(page: number, count: number, mode = 0): number {
    const from = this.source.addr + page * PAGE;
    return this.uffd.copy(this.page(page), from, count * PAGE, mode);
  }

  /** Serves faults one page each until `done` has settled. Returns the faulting pages in order. */
  async serve(done: Promise<unknown>): Promise<number[]> {
    const served: number[] = [];
    let isDone = false;
    void done.finally(() => {
      isDone = true;
    });
    while (!isDone) {
      if (this.poll(1) === 1) {
        const count = this.uffd.readEvents(this.bufferAddr, EVENTS_MAX);
        for (let index = 0; index < count; index += 1) {
          expect(this.events.type(index)).toBe(EVENT_PAGEFAULT);
          const page = this.indexOf(this.events.faultAddress(index));
          const copied = this.copy(page, 1);
          if (copied === COPY_EXISTS) this.uffd.wake(this.page(page), PAGE);
          else expect(copied).toBe(PAGE);
          served.push(page);
        }
      }
      await Bun.sleep(0);
    }
    return served;
  }

  async end(): Promise<void> {
    await this.target.kill();
    this.uffd?.close();
    this.source.close();
    sys.munmap(this.bufferAddr, EVENTS_MAX * UFFD_MSG.BYTES);
  }
}

let bench: Bench | undefined;

async function start(kind: MemoryKind = "anon", features = 0, pages = PAGES): Promise<Bench> {
  bench = new Bench(kind, features, pages);
  return bench.connect();
}

afterEach(async () => {
  await bench?.end();
  bench = undefined;
});

/** Page numbers from `first` on. */
function pagesFrom(first: number, count: number): number[] {
  return Array.from({ length: count }, (_, index) => first + index);
}

function ascending(a: number, b: number): number {
  return a - b;
}

describe("faults", () => {
  const kinds = ["anon", "shmem"] as const;
  test.each(kinds)("%s: each page faults once and gets its own bytes", async (kind) => {
    const it = await start(kind);
    const reading = it.target.job("r", 0, PAGES);
    const served = await it.serve(reading);
    expect(await reading).toBe(it.crc(0, PAGES));
    expect(served).toEqual(pagesFrom(0, PAGES));
    expect(it.poll(0)).toBe(0);
  });

  test("threads that read different pages at once are all served", async () => {
    const it = await start();
    const reading = Promise.all(pagesFrom(0, 8).map((part) => it.target.job("r", part * 8, 8)));
    const served = await it.serve(reading);
    expect(await reading).toEqual(pagesFrom(0, 8).map((part) => it.crc(part * 8, 8)));
    expect(served.toSorted(ascending)).toEqual(pagesFrom(0, PAGES));
  });

  test("pages that were copied before do not fault", async () => {
    const it = await start();
    expect(it.copy(0, 32)).toBe(32 * PAGE);
    const reading = it.target.job("r", 0, PAGES);
    const served = await it.serve(reading);
    expect(await reading).toBe(it.crc(0, PAGES));
    expect(served).toEqual(pagesFrom(32, 32));
  });

  // The kernel wakes the range first and lets it go then: in between, a thread that faults is left waiting.
  test("a range is let go: whoever faults at that moment goes on", async () => {
    const it = await start();
    for (let round = 0; round < 1500; round += 1) {
      const touching = it.target.job("t", 0, PAGES);
      expect(it.read()).toBe(1);
      expect(it.uffd.zeropage(it.page(0), PAGE, 0)).toBe(PAGE);
      // Until the thread may have come to its next page: up to 50 µs.
      const untilNs = sys.clockNs() + 200 * (round % 251);
      while (sys.clockNs() < untilNs);
      expect(it.uffd.unregister(it.addr, PAGES * PAGE)).toBe(true);
      expect(await within(touching, 5000, `the thread of round ${round}`)).toBe(0);
      expect(await it.target.job("d", 0, PAGES)).toBe(0);
      it.uffd.register(it.addr, PAGES * PAGE, REGISTER_MISSING);
    }
  });

  test("a write fault says that it is one", async () => {
    const it = await start();
    const writing = it.target.job("w", 5, 77);
    expect(it.read()).toBe(1);
    expect(it.events.faultFlags(0) & UFFD_PAGEFAULT_FLAG_WRITE).toBe(UFFD_PAGEFAULT_FLAG_WRITE);
    expect(it.events.faultAddress(0)).toBe(it.page(5));
    expect(it.copy(5, 1)).toBe(PAGE);
    expect(await writing).toBe(0);
    const expected = it.bytes.slice(5 * PAGE, 6 * PAGE);
    expected[0] = 77;
    expect(await it.target.job("r", 5, 1)).toBe(Bun.hash.crc32(expected));
  });

  test("THREAD_ID names a thread of the target", async () => {
    const it = await start("anon", UFFD_FEATURES.THREAD_ID);
    const reading = it.target.job("r", 1, 1);
    expect(it.read()).toBe(1);
    const status = await Bun.file(`/proc/${it.events.faultTid(0)}/status`).text();
    expect(status).toContain(`Tgid:\t${it.target.pid}\n`);
    it.copy(1, 1);
    expect(await reading).toBe(it.crc(1, 1));
  });

  test("readEvents with nothing queued answers 0", async () => {
    const it = await start();
    expect(it.uffd.readEvents(it.bufferAddr, EVENTS_MAX)).toBe(0);
  });

  test("zeropage fills a range with zeros", async () => {
    const it = await start();
    expect(it.uffd.zeropage(it.page(8), 8 * PAGE, 0)).toBe(8 * PAGE);
    expect(it.uffd.zeropage(it.page(8), PAGE, 0)).toBe(COPY_EXISTS);
    expect(await it.target.job("r", 8, 8)).toBe(Bun.hash.crc32(new Uint8Array(8 * PAGE)));
  });

  testUnless(whyNoPoison(), "kernel")("poison gives SIGBUS to who waits", async () => {
    const it = await start();
    const reading = it.target.job("r", 3, 1);
    expect(it.read()).toBe(1);
    expect(it.uffd.poison(it.page(3), PAGE, 0)).toBe(PAGE);
    expect(await reading).toBe("bus");
  });

  test("register answers which ioctls the range takes", async () => {
    const it = await start("shmem");
    const ioctls = it.uffd.register(it.addr, PAGES * PAGE, REGISTER_MISSING);
    expect(ioctls & (1n << UFFDIO_COPY_BIT)).toBe(1n << UFFDIO_COPY_BIT);
    expect(ioctls & (1n << UFFDIO_ZEROPAGE_BIT)).toBe(1n << UFFDIO_ZEROPAGE_BIT);
  });
});

describe("answers of copy", () => {
  test("EEXIST: the page is there already", async () => {
    const it = await start();
    expect(it.copy(7, 1)).toBe(PAGE);
    expect(it.copy(7, 1)).toBe(COPY_EXISTS);
  });

  test("partial: stops before a page that is there, and says how far it came", async () => {
    const it = await start();
    expect(it.copy(11, 1)).toBe(PAGE);
    expect(it.copy(10, 4)).toBe(PAGE);
    expect(it.copy(11, 3)).toBe(COPY_EXISTS);
    expect(it.copy(12, 2)).toBe(2 * PAGE);
    expect(await it.target.job("r", 10, 4)).toBe(it.crc(10, 4));
  });

  test("EAGAIN: a discard waits to be read; REMOVE names the range, then copies work", async () => {
    const it = await start("anon", UFFD_FEATURES.EVENT_REMOVE);
    it.copy(0, PAGES);
    const discarding = it.target.job("d", 16, 8);
    await until(() => (it.poll(0) === 1 ? true : null), 5000, "the REMOVE event");
    expect(it.copy(16, 1)).toBe(COPY_RETRY);
    expect(it.read()).toBe(1);
    expect(it.events.type(0)).toBe(EVENT_REMOVE);
    expect(it.indexOf(it.events.removeStart(0))).toBe(16);
    expect(it.indexOf(it.events.removeEnd(0))).toBe(24);
    expect(await discarding).toBe(0);
    expect(it.copy(16, 1)).toBe(PAGE);
    expect(await it.target.job("r", 16, 1)).toBe(it.crc(16, 1));
  });

  test("a discarded page faults again", async () => {
    const it = await start();
    it.copy(0, PAGES);
    expect(await it.target.job("d", 4, 2)).toBe(0);
    const reading = it.target.job("r", 0, 8);
    const served = await it.serve(reading);
    expect(served).toEqual([4, 5]);
  });

  test("ESRCH: the target was killed", async () => {
    const it = await start();
    it.target.child.kill("SIGKILL");
    await it.target.child.exited;
    expect(it.copy(0, 1)).toBe(COPY_GONE);
    expect(it.uffd.zeropage(it.page(1), PAGE, 0)).toBe(COPY_GONE);
    expect(it.uffd.unregister(it.addr, PAGES * PAGE)).toBe(false);
  });

  test("ESRCH: register says that the target is lost", async () => {
    const it = await start();
    it.target.child.kill("SIGKILL");
    await it.target.child.exited;
    let code = "";
    try {
      it.uffd.register(it.addr, PAGE, REGISTER_MISSING);
    } catch (error) {
      code = isFslError(error) ? error.code : String(error);
    }
    expect(code).toBe("TARGET_LOST");
  });

  test("EFAULT: the source file was truncated, and the page stays missing", async () => {
    const it = await start();
    sys.check(sys.ftruncate(it.source.fd, 10 * PAGE), "ftruncate");
    expect(it.copy(10, 1)).toBe(COPY_SOURCE);
    expect(it.copy(8, 4)).toBe(2 * PAGE);
    const reading = it.target.job("r", 10, 1);
    expect(it.read()).toBe(1);
    expect(it.indexOf(it.events.faultAddress(0))).toBe(10);
    expect(it.copy(10, 1)).toBe(COPY_SOURCE);
    // Once the bytes are back the same fault is served: nothing was lost.
    sys.ftruncate(it.source.fd, it.bytes.length);
    const { bytes, source } = it;
    sys.pwrite(source.fd, sys.ptrOf(bytes) + 10 * PAGE, 2 * PAGE, 10 * PAGE);
    expect(it.copy(10, 1)).toBe(PAGE);
    expect(await reading).toBe(it.crc(10, 1));
  });

  test("ENOENT: the range was unregistered", async () => {
    const it = await start();
    expect(it.uffd.unregister(it.page(32), 32 * PAGE)).toBe(true);
    expect(it.copy(32, 1)).toBe(COPY_CHANGED);
    expect(it.copy(31, 1)).toBe(PAGE);
  });

  test("ENOENT: the range was unmapped, which UNMAP tells", async () => {
    const it = await start("anon", UFFD_FEATURES.EVENT_UNMAP);
    const unmapping = it.target.job("u", 40, 8);
    expect(it.read()).toBe(1);
    expect(it.events.type(0)).toBe(EVENT_UNMAP);
    expect(it.indexOf(it.events.removeStart(0))).toBe(40);
    expect(it.indexOf(it.events.removeEnd(0))).toBe(48);
    expect(await unmapping).toBe(0);
    expect(it.copy(40, 1)).toBe(COPY_CHANGED);
  });

  test("EINVAL keeps its number", async () => {
    const it = await start();
    expect(it.uffd.copy(it.page(0), it.source.addr, 100, 0)).toBe(-22);
  });
});

const HUGE_PAGE = 2 * 1024 * 1024;
const HUGE_PAGES = 2;
const hugePages = reserveHugePages(HUGE_PAGES);

/** Asks for free huge pages and says how to give them back, or why there are none. */
function reserveHugePages(count: number): { readonly missing: string | null; release(): void } {
  const setting = `/sys/kernel/mm/hugepages/hugepages-${HUGE_PAGE / 1024}kB`;
  const read = (name: string): number => Number(readFileSync(`${setting}/${name}`, "latin1"));
  try {
    const before = read("nr_hugepages");
    if (read("free_hugepages") >= count) return { missing: null, release: () => {} };
    writeFileSync(`${setting}/nr_hugepages`, String(before + count));
    const release = (): void => writeFileSync(`${setting}/nr_hugepages`, String(before));
    if (read("free_hugepages") >= count) return { missing: null, release };
    release();
    return { missing: `${count} huge pages cannot be had`, release: () => {} };
  } catch (error) {
    return { missing: String(error), release: () => {} };
  }
}

if (hugePages.missing !== null) console.warn(`hugetlb tests are skipped: ${hugePages.missing}`);

describe.skipIf(hugePages.missing !== null)("hugetlb", () => {
  afterAll(() => hugePages.release());

  test("a fault is served by a whole huge page, and by nothing smaller", async () => {
    const it = await start("hugetlb", 0, HUGE_PAGES);
    const reading = it.target.job("r", 1, 1);
    expect(it.read()).toBe(1);
    expect(it.events.faultAddress(0)).toBe(it.addr + HUGE_PAGE);
    const bytes = patternPages(HUGE_PAGE / PAGE, 0xb16);
    const source = mappedBytes(bytes);
    expect(it.uffd.copy(it.addr + HUGE_PAGE, source.addr, PAGE, 0)).toBe(-22);
    expect(it.uffd.zeropage(it.addr + HUGE_PAGE, HUGE_PAGE, 0)).toBe(-22);
    expect(it.uffd.copy(it.addr + HUGE_PAGE, source.addr, HUGE_PAGE, 0)).toBe(HUGE_PAGE);
    expect(await reading).toBe(Bun.hash.crc32(bytes));
    source.close();
  });
});

describe("a reader that is lost", () => {
  test("wake brings back a fault that was read and never served", async () => {
    const it = await start();
    const reading = it.target.job("r", 20, 1);
    expect(it.read()).toBe(1);
    // The reader dies here. The fault is not delivered again by itself.
    expect(it.poll(30)).toBe(0);
    expect(it.uffd.wake(it.addr, PAGES * PAGE)).toBe(true);
    expect(it.read()).toBe(1);
    expect(it.indexOf(it.events.faultAddress(0))).toBe(20);
    expect(it.copy(20, 1)).toBe(PAGE);
    expect(await reading).toBe(it.crc(20, 1));
  });

  test("a copy that does not wake is followed by wake", async () => {
    const it = await start();
    const reading = it.target.job("r", 21, 1);
    expect(it.read()).toBe(1);
    expect(it.copy(21, 1, DONTWAKE)).toBe(PAGE);
    const early = await Promise.race([reading, Bun.sleep(50).then(() => "asleep")]);
    expect(early).toBe("asleep");
    it.uffd.wake(it.page(21), PAGE);
    expect(await within(reading, 5000, "the woken reader")).toBe(it.crc(21, 1));
  });

  test("a duplicate held elsewhere keeps the target waiting instead of reading zeros", async () => {
    const it = await start();
    const kept = new Uffd(sys.dup(it.uffd.fd, 3));
    const reading = it.target.job("r", 22, 1);
    expect(it.read()).toBe(1);
    it.uffd.close();
    const early = await Promise.race([reading, Bun.sleep(50).then(() => "waits")]);
    expect(early).toBe("waits");
    it.uffd = kept;
    it.uffd.wake(it.addr, PAGES * PAGE);
    expect(it.read()).toBe(1);
    expect(it.copy(22, 1)).toBe(PAGE);
    expect(await reading).toBe(it.crc(22, 1));
  });
});

describe("openUffd and api", () => {
  test("the handshake grants what was asked for, and works once", () => {
    const { uffd, way } = openUffd(O_CLOEXEC | O_NONBLOCK);
    using own = uffd;
    expect(way).toBe("syscall");
    const { features } = own.api(UFFD_FEATURES.EVENT_REMOVE);
    expect(features & UFFD_FEATURES.EVENT_REMOVE).toBe(UFFD_FEATURES.EVENT_REMOVE);
    expect(() => own.api(0)).toThrow("UFFDIO_API: EINVAL");
  });

  test("a closed Uffd says so", () => {
    const { uffd } = openUffd(O_CLOEXEC | O_NONBLOCK);
    uffd.close();
    uffd.close();
    expect(() => uffd.register(0, PAGE, REGISTER_MISSING)).toThrow("closed");
  });
});
