/**
 * The binding itself: loading, the ABI table, memory, sockets with descriptors, polling, leases.
 */
import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import {
  EAGAIN,
  EBADF,
  EFD_CLOEXEC,
  EINVAL,
  ENAMETOOLONG,
  ENOPROTOOPT,
  ENOENT,
  F_GETFL,
  F_GETLEASE,
  F_RDLCK,
  F_SETLEASE,
  F_UNLCK,
  FD_COUNT_MAX,
  MADV_DONTNEED,
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  MAP_SHARED,
  MFD_CLOEXEC,
  MSG_CTRUNC,
  MSG_DONTWAIT,
  O_CLOEXEC,
  O_CREAT,
  O_NONBLOCK,
  O_RDONLY,
  O_RDWR,
  POLLHUP,
  POLLIN,
  PROT_READ,
  PROT_WRITE,
  SCHED_IDLE,
  SCHED_OTHER,
  SEEK_DATA,
  SEEK_HOLE,
  SOCK_STREAM,
} from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";

setDefaultTimeout(20_000);

const PAGE = 4096;
const opened: number[] = [];
const folder = mkdtempSync(join(tmpdir(), "fsl-native-"));
const NONE = new Int32Array(0);

afterEach(() => {
  for (const fd of opened.splice(0)) sys.close(fd);
  for (const name of readdirSync(folder)) rmSync(join(folder, name));
});

process.on("exit", () => rmSync(folder, { recursive: true, force: true }));

function keep(fd: number): number {
  expect(fd).toBeGreaterThanOrEqual(0);
  opened.push(fd);
  return fd;
}

function memfd(length: number): number {
  const fd = keep(sys.memfdCreate("fsl-native-test", MFD_CLOEXEC));
  expect(sys.ftruncate(fd, length)).toBe(0);
  return fd;
}

function pair(): [number, number] {
  const fds = new Int32Array(2);
  expect(sys.socketpair(SOCK_STREAM, fds)).toBe(0);
  return [keep(fds[0] ?? -1), keep(fds[1] ?? -1)];
}

function descriptorCount(): number {
  return readdirSync("/proc/self/fd").length;
}

describe("native.load", () => {
  test("the shim's ABI table is abi.ts's", () => {
    expect(() => sys.load()).not.toThrow();
  });

  test("check passes a result on and names a failure", () => {
    expect(sys.check(7, "seven")).toBe(7);
    expect(() => sys.check(-ENOENT, "open of x")).toThrow(
      "open of x: ENOENT, no such file or directory",
    );
  });

  test("FSL_TRACE_FFI=1 logs every call", () => {
    const native = join(import.meta.dir, "../../src/sys/native.ts");
    const script = `const s = await import(${JSON.stringify(native)}); s.gettid(); s.close(-5);`;
    const run = (value: string): string =>
      Bun.spawnSync([process.execPath, "-e", script], {
        env: { ...process.env, FSL_TRACE_FFI: value },
        stderr: "pipe",
      }).stderr.toString();
    expect(run("1")).toMatch(/ffi fsl_gettid\(\) = \d+, \d+ ns\nffi fsl_close\(-5\) = -9 EBADF/);
    expect(run("0")).toBe("");
  });
});

describe("memory", () => {
  test("a view sees what the kernel wrote, and writes what the kernel reads", () => {
    const prot = PROT_READ | PROT_WRITE;
    const addr = sys.mmap(0, 2 * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const bytes = new Uint8Array(sys.view(addr, 2 * PAGE));
    const fd = memfd(PAGE);
    bytes.fill(7, 0, PAGE);
    expect(sys.pwrite(fd, addr, PAGE, 0)).toBe(PAGE);
    expect(sys.pread(fd, addr + PAGE, PAGE, 0)).toBe(PAGE);
    expect(bytes[2 * PAGE - 1]).toBe(7);
    expect(sys.madvise(addr, PAGE, MADV_DONTNEED)).toBe(0);
    expect([bytes[0], bytes[PAGE]]).toEqual([0, 7]);
    expect(sys.munmap(addr, 2 * PAGE)).toBe(0);
  });

  test("collecting a view does not unmap the memory", () => {
    const prot = PROT_READ | PROT_WRITE;
    const addr = sys.mmap(0, PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    new Uint8Array(sys.view(addr, PAGE)).fill(9);
    for (let round = 0; round < 5; round += 1) Bun.gc(true);
    const vector = new Uint8Array(1);
    expect(sys.mincore(addr, PAGE, vector)).toBe(0);
    expect(new Uint8Array(sys.view(addr, PAGE))[0]).toBe(9);
    sys.munmap(addr, PAGE);
  });

  test("an empty view and the address of nothing are harmless", () => {
    expect(sys.view(0, 0).byteLength).toBe(0);
    expect(sys.ptrOf(new Uint8Array(0))).toBe(0);
  });

  test("ptrOf points at the array's own bytes", () => {
    const array = new Uint8Array([1, 2, 3, 4]);
    const copy = new Uint8Array(4);
    const self = process.pid;
    expect(sys.processVmReadv(self, sys.ptrOf(array), sys.ptrOf(copy), 4)).toBe(4);
    expect([...copy]).toEqual([1, 2, 3, 4]);
    expect(sys.ptrOf(array.subarray(2))).toBe(sys.ptrOf(array) + 2);
  });

  test("mmap gives -errno, not an address", () => {
    expect(sys.mmap(0, PAGE, PROT_READ, MAP_SHARED, 999, 0)).toBe(-EBADF);
  });

  test("holes and data of a sparse file are found", () => {
    const fd = memfd(1024 * PAGE);
    const one = new Uint8Array([1]);
    sys.pwrite(fd, sys.ptrOf(one), 1, 512 * PAGE);
    expect(sys.lseek(fd, 0, SEEK_DATA)).toBe(512 * PAGE);
    expect(sys.lseek(fd, 512 * PAGE, SEEK_HOLE)).toBe(513 * PAGE);
  });
});

describe("sockets", () => {
  test("carry bytes and several descriptors at once", () => {
    const [a, b] = pair();
    const fd = memfd(3 * PAGE);
    const sent = Int32Array.of(fd, a, fd);
    expect(sys.send(a, Buffer.from("hello"), 5, sent, 3, 0)).toBe(5);
    const buffer = new Uint8Array(16);
    const fds = new Int32Array(8).fill(-1);
    const out = new Int32Array(2);
    expect(sys.recv(b, buffer, 16, fds, 8, out, 0)).toBe(5);
    expect(Buffer.from(buffer).toString("latin1", 0, 5)).toBe("hello");
    expect(out[0]).toBe(3);
    for (const got of fds.subarray(0, 3)) keep(got);
    expect(fds[3]).toBe(-1);
    expect(sys.kcmpFile(process.pid, process.pid, fds[0] ?? -1, fd)).toBe(0);
    expect(sys.kcmpFile(process.pid, process.pid, fds[1] ?? -1, fd)).toBeGreaterThan(0);
  });

  test("descriptors for which there is no room are closed, and that is said", () => {
    const [a, b] = pair();
    const fd = memfd(PAGE);
    const before = descriptorCount();
    sys.send(a, Buffer.from("x"), 1, Int32Array.of(fd, fd, fd), 3, 0);
    const fds = new Int32Array(1);
    const out = new Int32Array(2);
    expect(sys.recv(b, new Uint8Array(4), 4, fds, 1, out, 0)).toBe(1);
    expect((out[1] ?? 0) & MSG_CTRUNC).toBe(MSG_CTRUNC);
    keep(fds[0] ?? -1);
    expect(descriptorCount()).toBe(before + 1);
  });

  test("plain messages need no arrays of descriptors", () => {
    const [a, b] = pair();
    const out = new Int32Array(2);
    expect(sys.recv(b, new Uint8Array(4), 4, NONE, 0, out, MSG_DONTWAIT)).toBe(-EAGAIN);
    expect(sys.send(a, Buffer.from("abc"), 3, NONE, 0, 0)).toBe(3);
    expect(sys.recv(b, new Uint8Array(4), 4, NONE, 0, out, MSG_DONTWAIT)).toBe(3);
  });

  test("sending to nobody is an error, not a signal", () => {
    const [a, b] = pair();
    sys.close(b);
    opened.splice(opened.indexOf(b), 1);
    expect(sys.send(a, Buffer.from("x"), 1, NONE, 0, 0)).toBe(-32);
  });

  test("listen, connect, accept, and who the peer is", () => {
    const path = join(folder, "s");
    const listener = keep(sys.unixListen(path, 1));
    const client = keep(sys.unixConnect(path));
    const server = keep(sys.unixAccept(listener));
    const credentials = new Int32Array(3);
    expect(sys.peerCredentials(server, credentials)).toBe(0);
    expect([...credentials]).toEqual([
      process.pid,
      process.getuid?.() ?? -1,
      process.getgid?.() ?? -1,
    ]);
    const peer = sys.peerPidfd(client);
    // Before Linux 6.5.
    if (peer === -ENOPROTOOPT) return;
    const pidfd = keep(peer);
    expect(sys.pidfdSendSignal(pidfd, 0)).toBe(0);
  });

  test("a listener whose backlog is full is not waited for", () => {
    const path = join(folder, "busy");
    keep(sys.unixListen(path, 0));
    const client = keep(sys.unixConnect(path));
    expect(sys.fcntl(client, F_GETFL, 0) & O_NONBLOCK).toBe(0);
    expect(sys.unixConnect(path)).toBe(-EAGAIN);
  });

  test("a path that is too long is refused, not cut", () => {
    const path = `/tmp/${"x".repeat(103)}`;
    expect(path.length).toBe(108);
    expect(sys.unixConnect(path)).toBe(-ENAMETOOLONG);
    expect(sys.unixConnect(path.slice(0, 107))).toBe(-ENOENT);
  });

  test("nothing that the shim opens outlives exec", () => {
    const [a] = pair();
    const fds = [a, memfd(1), keep(sys.eventfd(0, EFD_CLOEXEC)), keep(sys.dup(a, 3))];
    const flags = fds.map((fd) => sys.fcntl(fd, 1, 0));
    expect(flags).toEqual([1, 1, 1, 1]);
  });
});

describe("poll", () => {
  test("answers per descriptor, skips negative ones, and times out", () => {
    const [a, b] = pair();
    const event = keep(sys.eventfd(0, EFD_CLOEXEC));
    const fds = Int32Array.of(b, -1, event);
    const revents = new Int32Array(3);
    expect(sys.poll(fds, revents, 3, POLLIN, 0)).toBe(0);
    sys.write(a, Buffer.from("x"));
    expect(sys.poll(fds, revents, 3, POLLIN, 1000)).toBe(1);
    expect([...revents]).toEqual([POLLIN, 0, 0]);
    sys.write(event, BigUint64Array.of(1n));
    sys.close(a);
    opened.splice(opened.indexOf(a), 1);
    expect(sys.poll(fds, revents, 3, POLLIN, 1000)).toBe(2);
    expect([...revents]).toEqual([POLLIN | POLLHUP, 0, POLLIN]);
  });

  test("sleeps for its time with nothing to wait for", () => {
    const startNs = sys.clockNs();
    expect(sys.poll(NONE, NONE, 0, 0, 30)).toBe(0);
    expect(sys.clockNs() - startNs).toBeGreaterThanOrEqual(30e6);
  });

  test("refuses more than it has room for", () => {
    const many = new Int32Array(FD_COUNT_MAX + 1).fill(-1);
    expect(sys.poll(many, many, FD_COUNT_MAX, POLLIN, 0)).toBe(0);
    expect(sys.poll(many, many, FD_COUNT_MAX + 1, POLLIN, 0)).toBe(-EINVAL);
  });

  test("a pidfd becomes readable when the process ends", async () => {
    const child = Bun.spawn(["sleep", "30"]);
    const pidfd = keep(sys.pidfdOpen(child.pid, 0));
    const revents = new Int32Array(1);
    expect(sys.poll(Int32Array.of(pidfd), revents, 1, POLLIN, 0)).toBe(0);
    expect(sys.pidfdSendSignal(pidfd, 9)).toBe(0);
    expect(sys.poll(Int32Array.of(pidfd), revents, 1, POLLIN, 5000)).toBe(1);
    await child.exited;
  });
});

describe("leases", () => {
  test("a read lease is refused while somebody writes, and broken by a writer", () => {
    const path = join(folder, "leased");
    writeFileSync(path, "x");
    const reader = keep(sys.open(path, O_RDONLY | O_CLOEXEC, 0));
    const writer = sys.open(path, O_RDWR | O_CLOEXEC | O_CREAT, 0o600);
    expect(sys.fcntl(reader, F_SETLEASE, F_RDLCK)).toBe(-EAGAIN);
    sys.close(writer);
    expect(sys.ignoreSignal(29)).toBe(0);
    expect(sys.fcntl(reader, F_SETLEASE, F_RDLCK)).toBe(0);
    expect(sys.fcntl(reader, F_GETLEASE, 0)).toBe(F_RDLCK);
    expect(sys.open(path, O_RDWR | O_CLOEXEC | 0o4000, 0)).toBe(-EAGAIN);
    expect(sys.fcntl(reader, F_GETLEASE, 0)).toBe(F_UNLCK);
    expect(sys.fcntl(reader, F_SETLEASE, F_UNLCK)).toBe(0);
  });
});

describe("threads and limits", () => {
  test("nice, affinity and limits of the calling thread can be read back", () => {
    const tid = sys.gettid();
    expect(tid).toBeGreaterThan(0);
    expect(sys.setpriority(tid, 0)).toBe(0);
    expect(sys.schedSetscheduler(tid, SCHED_IDLE)).toBe(0);
    const stat = readFileSync("/proc/thread-self/stat", "latin1");
    // The 41st field, counted from the third on.
    expect(Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[38])).toBe(SCHED_IDLE);
    expect(sys.schedSetscheduler(tid, SCHED_OTHER)).toBe(0);
    expect(sys.schedSetscheduler(tid, 99)).toBe(-EINVAL);
    const mask = new Uint8Array(128);
    const written = sys.schedGetaffinity(tid, mask, mask.length);
    expect(written).toBeGreaterThan(0);
    expect(mask.some((byte) => byte !== 0)).toBe(true);
    expect(sys.schedSetaffinity(tid, mask, written)).toBe(0);
    const limit = new BigUint64Array(2);
    expect(sys.prlimit(0, 7, null, limit)).toBe(0);
    expect(Number(limit[0])).toBeGreaterThan(0);
  });
});
