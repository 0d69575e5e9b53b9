/** `fsl doctor`, held against what this host itself says. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { release, tmpdir } from "node:os";
import { join } from "node:path";
import { snapshotOf, qemuVersion, whyNoGuests, whyNoKvm } from "../helpers/guests.ts";
import { FSL, plainEnvironment, whyNoExecutable } from "../helpers/load-runs.ts";
import { byUser, isUserfaultfdRefused, NOBODY, Published } from "../helpers/published.ts";

setDefaultTimeout(60_000);
const skip = (whyNoExecutable() ?? whyNoGuests()) !== null;
const isRoot = process.getuid?.() === 0;
const GRANT = "setfacl -m u:nobody:rw /dev/userfaultfd # as root; setfacl is in the package acl";

/** What is used here of the JSON. */
interface Host {
  readonly works: boolean;
  readonly kernelRelease: string;
  readonly userfaultfdSyscall: string | null;
  readonly userfaultfdDevice: string | null;
  readonly effectiveUid: number;
  readonly userName: string;
  readonly kvm: string | null;
  readonly hugePages: readonly { pageSize: number; total: number; free: number }[];
  readonly qemus: readonly { path: string; version: string | null }[];
  readonly facts: readonly { name: string; value: string }[];
  readonly problems: readonly { problem: string; fix: string }[];
}

interface Answer {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

async function doctor(argv: readonly string[], env: Record<string, string> = {}): Promise<Answer> {
  const child = Bun.spawn([...argv], {
    cwd: "/",
    env: plainEnvironment(env),
    stdout: "pipe",
    stderr: "pipe",
  });
  const [stdout, stderr, code] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  return { code, stdout, stderr };
}

async function json(argv: readonly string[], env?: Record<string, string>): Promise<Host> {
  return JSON.parse((await doctor([...argv, "--json"], env)).stdout) as Host;
}

/** The values of the text form's rows of this name. */
function rows({ stdout }: Answer, name: string): string[] {
  const lines = stdout.split("\n").map((line) => line.split(/ {2,}/));
  return lines.filter(([first]) => first === name).map(([, value = ""]) => value);
}

/** Huge pages of the default size, which is what the setting counts. */
function hugePages(): { pageSize: number; total: number } {
  const size = /^Hugepagesize:\s+(\d+) kB$/m.exec(readFileSync("/proc/meminfo", "utf8"))?.[1];
  const total = Number(readFileSync("/proc/sys/vm/nr_hugepages", "utf8"));
  return { pageSize: Number(size) * 1024, total };
}

describe.skipIf(skip || !isRoot)("fsl doctor as root", () => {
  test("says that fsl load can work, and what this host has", async () => {
    const answer = await doctor([FSL, "doctor"]);
    expect(answer).toMatchObject({ code: 0, stderr: "" });
    expect(answer.stdout).toEndWith("\nfsl load can work here\n");
    expect(rows(answer, "kernel")).toEqual([`${release()} ${process.arch}`]);
    expect(rows(answer, "user")).toEqual([expect.stringMatching(/^uid 0, /)]);
    expect(rows(answer, "userfaultfd(2)")).toEqual(["yes"]);
    expect(rows(answer, "/dev/userfaultfd")).toEqual([
      existsSync("/dev/userfaultfd") ? "yes" : "no (ENOENT)",
    ]);
    expect(rows(answer, "ptrace")).toEqual(["yes"]);
    const hasKvm = whyNoKvm() === null;
    expect(rows(answer, "/dev/kvm")).toEqual([hasKvm ? "yes" : expect.stringMatching(/^no \(/)]);
    const { pageSize, total } = hugePages();
    expect(rows(answer, "huge pages")[0]).toMatch(
      new RegExp(`\\b${pageSize / 1024} KiB: \\d+ of ${total} free`),
    );
    const qemu = `${await qemuVersion()} (${Bun.which("qemu-system-x86_64")})`;
    expect(rows(answer, "QEMU")).toContain(qemu);
  });

  test("says the same as JSON", async () => {
    const [host, answer] = await Promise.all([json([FSL, "doctor"]), doctor([FSL, "doctor"])]);
    expect(host).toMatchObject({
      works: true,
      kernelRelease: release(),
      userfaultfdSyscall: null,
      effectiveUid: 0,
      userName: "root",
    });
    expect(host.kvm === null).toBe(whyNoKvm() === null);
    expect(host.hugePages).toContainEqual({ ...hugePages(), free: expect.any(Number) });
    expect(rows(answer, "QEMU")).toEqual(
      host.qemus.map(({ path, version }) => `${version} (${path})`),
    );
    const facts = host.facts.map(({ name }) => rows(answer, name)[0]);
    expect(facts).toEqual(host.facts.map(({ value }) => value));
    const fixes = host.problems.map(({ problem, fix }) => `\n${problem}\n  ${fix}\n`);
    for (const text of fixes) expect(answer.stdout).toContain(text);
  });

  test("without QEMU on PATH: exit code 6, and the package to install", async () => {
    const empty = mkdtempSync(join(tmpdir(), "fsl-doctor-"));
    try {
      const answer = await doctor([FSL, "doctor"], { PATH: empty });
      expect(answer.code).toBe(6);
      expect(answer.stdout).toContain("\nno QEMU 9.0 or later on PATH\n  install qemu-system-x86 ");
      expect(answer.stdout).toEndWith("\nfsl load cannot work here\n");
      expect(await json([FSL, "doctor"], { PATH: empty })).toMatchObject({
        works: false,
        qemus: [],
      });
    } finally {
      rmSync(empty, { recursive: true });
    }
  });
});

describe.skipIf(skip || !isRoot || !isUserfaultfdRefused())(
  "fsl doctor as an ordinary user",
  () => {
    test("without the device: exit code 6, and the command that gives access, by name", async () => {
      using published = new Published(await snapshotOf({ guest: "bare" }));
      const argv = [...byUser(NOBODY), published.fsl, "doctor"];
      // $USER and $LOGNAME are root's, as after setpriv and some kinds of su, or not there.
      const answer = await doctor(argv, { USER: "root", LOGNAME: "root" });
      expect(answer.code).toBe(6);
      expect(answer.stdout).toContain(`/dev/userfaultfd gives EACCES\n  ${GRANT}\n`);
      expect(answer.stdout).toEndWith("\nfsl load cannot work here\n");
      expect(await json(argv)).toMatchObject({
        works: false,
        userfaultfdSyscall: "EPERM",
        userfaultfdDevice: "EACCES",
        effectiveUid: NOBODY,
        userName: "nobody",
      });
    });

    test("of whom there is no name: the command has the number", async () => {
      using published = new Published(await snapshotOf({ guest: "bare" }));
      const { stdout } = await doctor([...byUser(64_242), published.fsl, "doctor"]);
      expect(stdout).toContain("\n  setfacl -m u:64242:rw /dev/userfaultfd #");
    });

    test("with the device: fsl load can work", async () => {
      using published = new Published(await snapshotOf({ guest: "bare" }));
      const argv = [...(await published.withDevice()), ...byUser(NOBODY), published.fsl, "doctor"];
      const answer = await doctor(argv);
      expect(answer.code).toBe(0);
      expect(rows(answer, "/dev/userfaultfd")).toEqual(["yes"]);
      expect(await json(argv)).toMatchObject({ works: true, userfaultfdDevice: null });
    });
  },
);
