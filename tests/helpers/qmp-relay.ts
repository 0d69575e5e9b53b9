/**
 * A relay between fsl and a QEMU's QMP socket that hands descriptors on, and that goes wrong at one
 * command: `bun qmp-relay.ts LISTEN QEMU WHAT COMMAND`. WHAT, once, when COMMAND has come:
 *
 *   cut   hands it on, and closes both connections when its answer has come; listens on
 *   gone  the same, and ends
 *   late  hands it on, and keeps its answer back for 2 s
 *   fail  answers with an error in QEMU's place
 */
import { MSG_DONTWAIT, POLLIN } from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";

const LATE_MS = 2_000;
const FDS_MAX = 16;

const [listenPath = "", qemuPath = "", what = "", command = ""] = process.argv.slice(2);
const listener = sys.check(sys.unixListen(listenPath, 4), `listen on ${listenPath}`);
process.stdout.write("ready\n");
let isDue = true;
for (;;) {
  wait([listener]);
  const near = sys.unixAccept(listener);
  if (near < 0) continue;
  const far = sys.check(sys.unixConnect(qemuPath), `connect to ${qemuPath}`);
  relay(near, far);
  sys.close(near);
  sys.close(far);
}

/** Until one end closes, or what is due has been done. */
function relay(near: number, far: number): void {
  for (;;) {
    wait([near, far]);
    const asked = receive(near);
    if (asked !== null) {
      if (asked.bytes.length === 0) return;
      const isIt = isDue && asked.bytes.toString().includes(`"execute":"${command}"`);
      if (isIt && what === "fail") refuse(near, far, asked);
      else send(far, asked.bytes, asked.fds);
      for (const fd of asked.fds) sys.close(fd);
      if (isIt) {
        isDue = false;
        if (what === "gone" || what === "cut") {
          seeAnswered(far, idOf(asked.bytes.toString()));
          if (what === "gone") process.exit(0);
          return;
        }
        if (what === "late") Bun.sleepSync(LATE_MS);
      }
    }
    const answered = receive(far);
    if (answered === null) continue;
    if (answered.bytes.length === 0) return;
    send(near, answered.bytes, []);
  }
}

/** fsl may send several commands at once: those before and behind it are handed on. */
function refuse(near: number, far: number, { bytes, fds }: Received): void {
  const text = bytes.toString();
  const id = idOf(text);
  const start = text.indexOf(`{"execute":"${command}"`);
  const end = `"id":${id}}`;
  const others = text.slice(0, start) + text.slice(text.indexOf(end, start) + end.length);
  send(far, Buffer.from(others), fds);
  const error = { class: "GenericError", desc: "refused by the relay" };
  send(near, Buffer.from(`${JSON.stringify({ id, error })}\n`), []);
}

/** Messages begin with `{"execute":` and end with their id. */
function idOf(text: string): number {
  const [, rest = ""] = text.split(`"execute":"${command}"`);
  return Number(/"id":(\d+)\}/.exec(rest)?.[1]);
}

/** Until QEMU has answered, which nobody gets to see. */
function seeAnswered(far: number, id: number): void {
  let text = "";
  while (!text.includes(`"id": ${id}}`)) {
    wait([far]);
    const answered = receive(far);
    if (answered?.bytes.length === 0) return;
    text += answered?.bytes.toString() ?? "";
  }
}

function wait(fds: number[]): void {
  sys.poll(Int32Array.from(fds), new Int32Array(fds.length), fds.length, POLLIN, -1);
}

interface Received {
  readonly bytes: Buffer;
  readonly fds: number[];
}

/** Null: nothing has come. No bytes: the end. */
function receive(socket: number): Received | null {
  const buffer = Buffer.alloc(65_536);
  const fds = new Int32Array(FDS_MAX);
  const out = new Int32Array(2);
  const length = sys.recv(socket, buffer, buffer.length, fds, FDS_MAX, out, MSG_DONTWAIT);
  if (length === -11) return null;
  return { bytes: buffer.subarray(0, Math.max(0, length)), fds: [...fds.subarray(0, out[0])] };
}

function send(socket: number, bytes: Buffer, fds: number[]): void {
  for (let sent = 0; sent < bytes.length;) {
    const carried = sent === 0 ? Int32Array.from(fds) : new Int32Array(0);
    const rest = bytes.subarray(sent);
    const length = sys.send(socket, rest, rest.length, carried, carried.length, 0);
    if (length < 0) return; // The other end is gone, which shows as its end.
    sent += length;
  }
}
