/**
 * shim/preload.c in real programs: what it sends, what it leaves behind, and that it never fails
 * the program.
 */
import { afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readlinkSync } from "node:fs";
import { EACCES, EPERM, MFD_CLOEXEC, MSG_DONTWAIT, SOCK_STREAM } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { preloadBytes } from "../../src/sys/preload.ts";
import { staticProgram, targetProgram, within } from "../helpers/kernel-target.ts";

setDefaultTimeout(20_000);

/** Layout of the message, written down a second time on purpose. @source shim/preload.c */
const MESSAGE_BYTES = 24;
const MAGIC = 0x756c7366;
/** Descriptor numbers in the child. */
const SOCKET = 3;
const LIBRARY = 4;

interface Run {
  readonly exitCode: number;
  /** Environment as the program saw it. */
  readonly env: Readonly<Record<string, string>>;
  /** Descriptors from 3 on as the program saw them: number -> what it is. */
  readonly fds: Readonly<Record<string, string>>;
  readonly lines: readonly string[];
  readonly stderr: string;
}

const opened: number[] = [];

afterEach(() => {
  for (const fd of opened.splice(0)) sys.close(fd);
});

function keep(fd: number, what: string): number {
  sys.check(fd, what);
  opened.push(fd);
  return fd;
}

/** Our end and the child's end of the socket, and the library. */
function prepare(): { own: number; theirs: number; library: number } {
  const pair = new Int32Array(2);
  sys.check(sys.socketpair(SOCK_STREAM, pair), "socketpair");
  const [own = -1, theirs = -1] = pair;
  opened.push(own, theirs);
  const library = keep(sys.memfdCreate("fsl-preload-test", MFD_CLOEXEC), "memfd_create");
  const bytes = preloadBytes();
  expect(sys.write(library, bytes)).toBe(bytes.length);
  return { own, theirs, library };
}

async function run(
  command: readonly string[],
  env: Readonly<Record<string, string>>,
  fds: readonly number[],
): Promise<Run> {
  const child = Bun.spawn([...command], {
    env,
    stdio: ["ignore", "pipe", "pipe", ...fds],
  }) as Bun.Subprocess<"ignore", "pipe", "pipe">;
  try {
    const [out, stderr] = await within(
      Promise.all([child.stdout.text(), child.stderr.text()]),
      10_000,
      "the program",
    );
    const exitCode = await child.exited;
    const lines = out.split("\n").filter((line) => line !== "");
    const pairs = lines.filter((line) => /^\w+=/.test(line)).map((line) => split(line, "="));
    const links = lines
      .filter((line) => line.startsWith("fd "))
      .map((line) => split(line.slice(3), " "));
    const seen = { env: Object.fromEntries(pairs), fds: Object.fromEntries(links) };
    return { exitCode, ...seen, lines, stderr };
  } finally {
    child.kill("SIGKILL");
  }
}

function split(line: string, separator: string): [string, string] {
  const at = line.indexOf(separator);
  return [line.slice(0, at), line.slice(at + 1)];
}

interface Received {
  readonly length: number;
  readonly fd: number;
  readonly message: DataView;
}

function receive(socket: number): Received {
  const bytes = new Uint8Array(64);
  const fds = new Int32Array(1);
  const out = new Int32Array(2);
  const length = sys.recv(socket, bytes, bytes.length, fds, 1, out, MSG_DONTWAIT);
  const fd = out[0] === 1 ? (fds[0] ?? -1) : -1;
  if (fd >= 0) opened.push(fd);
  return { length, fd, message: new DataView(bytes.buffer) };
}

const LD_PRELOAD = `/proc/self/fd/${LIBRARY}`;

describe("the preload library in a dynamic program", () => {
  test("sends a userfaultfd of the program, and with the closing flag keeps nothing", async () => {
    const { own, theirs, library } = prepare();
    const env = { LD_PRELOAD, FSL_PRELOAD: `${SOCKET}:${LIBRARY}:c`, HOME: "/x" };
    const { exitCode, fds } = await run([targetProgram(), "environment"], env, [theirs, library]);
    expect(exitCode).toBe(0);
    const { length, fd, message } = receive(own);
    expect(length).toBe(MESSAGE_BYTES);
    expect(message.getUint32(0, true)).toBe(MAGIC);
    expect(message.getUint32(4, true)).toBe(2);
    expect(message.getInt32(8, true)).toBeGreaterThan(1);
    expect(message.getInt32(16, true)).toBe(1);
    expect(message.getInt32(20, true)).toBe(0);
    expect(readlinkSync(`/proc/self/fd/${fd}`)).toBe("anon_inode:[userfaultfd]");
    expect(message.getInt32(12, true)).toBeGreaterThan(2);
    expect(fds).toEqual({});
  });

  test("the handshake of the received descriptor works: nobody did it before", async () => {
    const { own, theirs, library } = prepare();
    const env = { LD_PRELOAD, FSL_PRELOAD: `${SOCKET}:${LIBRARY}` };
    const child = Bun.spawn([targetProgram(), "sleep", "read", "0"], {
      env,
      stdio: ["pipe", "pipe", "inherit", theirs, library],
    }) as Bun.Subprocess<"pipe", "pipe", "inherit">;
    try {
      await within(child.stdout.getReader().read(), 5000, "ready");
      const { fd, message } = receive(own);
      expect(message.getInt32(8, true)).toBe(child.pid);
      const out = new BigUint64Array(2);
      expect(sys.uffdApi(fd, 0, out)).toBe(0);
      expect(Number(out[0])).toBeGreaterThan(0);
    } finally {
      child.kill("SIGKILL");
      await child.exited;
    }
  });

  test("leaves no trace in the environment", async () => {
    const { theirs, library } = prepare();
    const env = { A: "1", LD_PRELOAD, B: "2", FSL_PRELOAD: `${SOCKET}:${LIBRARY}:c`, C: "3" };
    const seen = await run([targetProgram(), "environment"], env, [theirs, library]);
    expect(seen.env).toEqual({ A: "1", B: "2", C: "3" });
    const names = ["LD_PRELOAD", "FSL_PRELOAD", "A", "C"];
    const again = prepare();
    const asked = await run([targetProgram(), "environment", ...names], env, [
      again.theirs,
      again.library,
    ]);
    expect(asked.lines.slice(0, 4)).toEqual([
      "LD_PRELOAD=(unset)",
      "FSL_PRELOAD=(unset)",
      "A=1",
      "C=3",
    ]);
  });

  test("has a name in the loader's list that no debugger takes for a file of its own", async () => {
    const { theirs, library } = prepare();
    const env = { LD_PRELOAD, FSL_PRELOAD: `${SOCKET}:${LIBRARY}:c` };
    const { lines } = await run([targetProgram(), "environment"], env, [theirs, library]);
    const libraries = lines.filter((line) => line.startsWith("library "));
    expect(libraries.length).toBeGreaterThan(1);
    expect(libraries).toContain("library /memfd:fsl-preload (deleted)");
    expect(libraries.filter((line) => line.includes("/proc/"))).toEqual([]);
  });

  test("gives the user's LD_PRELOAD back", async () => {
    const { own, theirs, library } = prepare();
    const env = {
      LD_PRELOAD: `${LD_PRELOAD}:libm.so.6`,
      A: "1",
      FSL_PRELOAD_NEXT: "libm.so.6",
      FSL_PRELOAD: `${SOCKET}:${LIBRARY}:c`,
    };
    const seen = await run([targetProgram(), "environment"], env, [theirs, library]);
    expect(seen.env).toEqual({ LD_PRELOAD: "libm.so.6", A: "1" });
    expect(receive(own).fd).toBeGreaterThan(0);
  });

  test("gives an empty LD_PRELOAD back as empty", async () => {
    const { theirs, library } = prepare();
    const env = { FSL_PRELOAD_NEXT: "", LD_PRELOAD, FSL_PRELOAD: `${SOCKET}:${LIBRARY}:c` };
    const seen = await run([targetProgram(), "environment"], env, [theirs, library]);
    expect(seen.env).toEqual({ LD_PRELOAD: "" });
  });

  test.each([
    ["t", {}, {}],
    [
      "t",
      { FSL_TUNABLES_NEXT: "glibc.malloc.check=3" },
      { GLIBC_TUNABLES: "glibc.malloc.check=3" },
    ],
    ["", {}, { GLIBC_TUNABLES: "glibc.malloc.hugetlb=1" }],
  ])("with the option '%s' and %p the program finds %p", async (option, more, expected) => {
    const { theirs, library } = prepare();
    const env = {
      A: "1",
      ...more,
      GLIBC_TUNABLES: "glibc.malloc.hugetlb=1",
      LD_PRELOAD,
      FSL_PRELOAD: `${SOCKET}:${LIBRARY}:c${option}`,
    };
    const seen = await run([targetProgram(), "environment"], env, [theirs, library]);
    expect(seen.env).toEqual({ A: "1", ...expected });
  });

  test("without the closing flag the program keeps all three", async () => {
    const { own, theirs, library } = prepare();
    const env = { LD_PRELOAD, FSL_PRELOAD: `${SOCKET}:${LIBRARY}` };
    const { fds } = await run([targetProgram(), "environment"], env, [theirs, library]);
    expect(fds[SOCKET]).toStartWith("socket:");
    expect(fds[LIBRARY]).toStartWith("/memfd:fsl-preload-test");
    expect(fds[receive(own).message.getInt32(12, true)]).toBe("anon_inode:[userfaultfd]");
  });

  test("does nothing without FSL_PRELOAD", async () => {
    const { own, theirs, library } = prepare();
    const seen = await run([targetProgram(), "environment"], { LD_PRELOAD }, [theirs, library]);
    expect(seen.env).toEqual({ LD_PRELOAD });
    expect(receive(own).length).toBe(-11);
  });

  test.each(["", ":", "x", "-1:-1", "3", "99:98:c", "999999999999:4"])(
    "a program with FSL_PRELOAD=%p runs all the same",
    async (value) => {
      const { theirs, library } = prepare();
      const env = { LD_PRELOAD, FSL_PRELOAD: value };
      const program = [targetProgram(), "environment"];
      const { exitCode, stderr } = await run(program, env, [theirs, library]);
      expect(exitCode).toBe(0);
      expect(stderr).toBe("");
    },
  );

  test("a socket whose other end is closed does not end the program", async () => {
    const { own, theirs, library } = prepare();
    sys.close(own);
    opened.splice(opened.indexOf(own), 1);
    const env = { LD_PRELOAD, FSL_PRELOAD: `${SOCKET}:${LIBRARY}:c` };
    const { exitCode } = await run([targetProgram(), "environment"], env, [theirs, library]);
    expect(exitCode).toBe(0);
  });

  test("a user without the right is told of both errors", async () => {
    const { own, theirs, library } = prepare();
    // setpriv is a dynamic program itself, so the variables are set behind it.
    const program = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env"];
    const variables = [`LD_PRELOAD=${LD_PRELOAD}`, `FSL_PRELOAD=${SOCKET}:${LIBRARY}:c`];
    // Another user may not look into the build directory, or into /proc/PID/fd of this process.
    const helper = await programInMemory();
    const command = [...program, ...variables, "/proc/self/fd/5", "environment"];
    const { exitCode, stderr } = await run(command, { PATH: process.env["PATH"] ?? "" }, [
      theirs,
      library,
      helper,
    ]);
    expect(stderr).toBe("");
    expect(exitCode).toBe(0);
    const { length, fd, message } = receive(own);
    expect(length).toBe(MESSAGE_BYTES);
    expect(fd).toBe(-1);
    expect(message.getInt32(12, true)).toBe(-EACCES);
    expect(message.getInt32(16, true)).toBe(2);
    expect(message.getInt32(20, true)).toBe(EPERM);
  });
});

/** The helper in a memfd. */
async function programInMemory(): Promise<number> {
  const fd = keep(sys.memfdCreate("kernel-target", MFD_CLOEXEC), "memfd_create");
  const bytes = new Uint8Array(await Bun.file(targetProgram()).arrayBuffer());
  expect(sys.write(fd, bytes)).toBe(bytes.length);
  return fd;
}

describe("the preload library in a static program", () => {
  test("nothing arrives and nothing breaks", async () => {
    const { own, theirs, library } = prepare();
    const env = { LD_PRELOAD, FSL_PRELOAD: `${SOCKET}:${LIBRARY}:c` };
    const { exitCode, lines } = await run([staticProgram()], env, [theirs, library]);
    expect(exitCode).toBe(0);
    expect(lines).toEqual(["ready", "sleep whole"]);
    expect(receive(own).length).toBe(-11);
  });
});

describe("the preload library in QEMU", () => {
  test("a QEMU with -sandbox on sends its userfaultfd", async () => {
    const { own, theirs, library } = prepare();
    const qemu = Bun.which("qemu-system-x86_64");
    if (qemu === null) throw new Error("needs QEMU; run: apt-get install qemu-system-x86");
    const env = { LD_PRELOAD, FSL_PRELOAD: `${SOCKET}:${LIBRARY}:c` };
    const options = ["-sandbox", "on", "-nodefaults", "-display", "none", "-machine", "none", "-S"];
    const child = Bun.spawn([qemu, ...options], {
      env,
      stdio: ["ignore", "ignore", "ignore", theirs, library],
    });
    try {
      const polled = sys.poll(Int32Array.of(own), new Int32Array(1), 1, 1, 5000);
      expect(polled).toBe(1);
      const { fd, message } = receive(own);
      expect(message.getInt32(8, true)).toBe(child.pid);
      expect(readlinkSync(`/proc/self/fd/${fd}`)).toBe("anon_inode:[userfaultfd]");
    } finally {
      child.kill("SIGKILL");
      await child.exited;
    }
  });
});
