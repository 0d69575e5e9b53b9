/** What another user can read: copies of fsl, of a bare guest's program and of its snapshot. */
import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { guestFile, type GuestSnapshot } from "./guests.ts";
import { FSL } from "./load-runs.ts";

export const NOBODY = 65_534;

/** What executes a program as another user. */
export function byUser(uid: number): string[] {
  return ["setpriv", `--reuid=${uid}`, `--regid=${uid}`, "--clear-groups"];
}

/** For users without privilege, which is the kernel's default. */
export function isUserfaultfdRefused(): boolean {
  const setting = readFileSync("/proc/sys/vm/unprivileged_userfaultfd", "latin1").trim();
  return setting === "0" && existsSync("/dev/userfaultfd");
}

export class Published implements Disposable {
  readonly directory = mkdtempSync(join(tmpdir(), "fsl-fault-public-"));
  readonly fsl = join(this.directory, "fsl");
  readonly snapshot = join(this.directory, "guest.snap");

  /** QEMU's command line with a guest program that the other user can read. */
  readonly argv: readonly string[];

  constructor({ path: snapshotPath, argv }: GuestSnapshot) {
    chmodSync(this.directory, 0o755);
    const program = join(this.directory, "bare.elf");
    copyFileSync(guestFile("bare.elf"), program);
    this.argv = argv.map((argument) => (argument === guestFile("bare.elf") ? program : argument));
    copyFileSync(FSL, this.fsl);
    copyFileSync(snapshotPath, this.snapshot);
    chmodSync(this.fsl, 0o755);
    chmodSync(this.snapshot, 0o644);
  }

  /** What executes a program that sees a /dev/userfaultfd which everybody may open. */
  async withDevice(): Promise<string[]> {
    const device = join(this.directory, "userfaultfd");
    const { rdev } = statSync("/dev/userfaultfd");
    const [major, minor] = [(rdev >> 8) & 0xfff, (rdev & 0xff) | ((rdev >> 12) & 0xfff00)];
    await Bun.$`mknod --mode=666 ${device} c ${major} ${minor}`.quiet();
    const script = 'mount --bind "$0" /dev/userfaultfd && exec "$@"';
    return ["unshare", "--mount", "sh", "-c", script, device];
  }

  [Symbol.dispose](): void {
    rmSync(this.directory, { recursive: true, force: true });
  }
}
