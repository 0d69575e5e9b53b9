/** Who runs this, and what lets such a user open a device. */
import { readFileSync } from "node:fs";

/**
 * The effective user's name, or its number where /etc/passwd has none: setfacl takes both. Neither
 * $USER, which need not be set, nor Bun's os.userInfo(), which looks there.
 */
export function userName(): string {
  const uid = String(process.geteuid?.() ?? -1);
  try {
    return nameIn(readFileSync("/etc/passwd", "utf8"), uid) ?? uid;
  } catch {
    return uid;
  }
}

/** The first user of a passwd(5) file who has this number. */
export function nameIn(passwd: string, uid: string): string | null {
  const users = passwd.split("\n").map((line) => line.split(":"));
  return users.find(([, , number]) => number === uid)?.[0] ?? null;
}

/** A command for root's shell, where $USER would be root; sudo may be missing, and acl too. */
export function grantDevice(path: string, user = userName()): string {
  return `setfacl -m u:${user}:rw ${path} # as root; setfacl is in the package acl`;
}
