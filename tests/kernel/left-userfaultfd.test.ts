/** Which of a process's userfaultfds `fsl resume` takes: this process's own, by the kernel's word. */
import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { FslError } from "../../src/errors.ts";
import { isUserfaultfd, takeUserfaultfd } from "../../src/load/left-userfaultfd.ts";
import { PHASE_FINISHED, PHASE_RUNNING } from "../../src/load/state.ts";
import {
  EFD_CLOEXEC,
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  O_CLOEXEC,
  O_NONBLOCK,
  PROT_READ,
  PROT_WRITE,
  REGISTER_MISSING,
} from "../../src/sys/abi.ts";
import * as sys from "../../src/sys/native.ts";
import { Uffd } from "../../src/uffd/uffd.ts";
import { makeState, PAGE } from "../helpers/load-states.ts";

const PAGES = 64;
const LENGTH = PAGES * PAGE;

let address: number;
let target: { description: string; pid: number; pidfd: number };
let made: ReturnType<typeof makeState>;
const opened: Uffd[] = [];

beforeEach(() => {
  const flags = MAP_PRIVATE | MAP_ANONYMOUS;
  address = sys.check(sys.mmap(0, LENGTH, PROT_READ | PROT_WRITE, flags, -1, 0), "mmap");
  const pidfd = sys.check(sys.pidfdOpen(process.pid, 0), "pidfd_open");
  target = { description: "this process", pid: process.pid, pidfd };
  made = makeState([{ pages: PAGES, hostAddr: address }]);
  made.state.phase = PHASE_RUNNING;
});

afterEach(() => {
  made[Symbol.dispose]();
  for (const uffd of opened.splice(0)) uffd.close();
  sys.close(target.pidfd);
  sys.munmap(address, LENGTH);
});

/** The first one has the lowest number: it is looked at first. */
function open(): Uffd {
  const uffd = new Uffd(sys.check(sys.userfaultfd(O_CLOEXEC | O_NONBLOCK), "userfaultfd"));
  opened.push(uffd);
  uffd.api(0);
  return uffd;
}

function refusal(): FslError {
  try {
    sys.close(takeUserfaultfd(target, made.state));
  } catch (error) {
    if (error instanceof FslError) return error;
    throw error;
  }
  throw new Error("was not refused");
}

describe("takeUserfaultfd", () => {
  test("takes the one that watches the guest's memory, wherever it stands", () => {
    open();
    const right = open();
    right.register(address, LENGTH, REGISTER_MISSING);
    open();
    const taken = takeUserfaultfd(target, made.state);
    expect(sys.kcmpFile(process.pid, process.pid, taken, right.fd)).toBe(0);
    sys.close(taken);
  });

  test("refuses memory that none of them watches, or that is not there", () => {
    open();
    const error = refusal();
    expect(error.message).toContain(`memory at 0x${address.toString(16)} that no userfaultfd`);
    expect(error.code).toBe("TARGET_MISMATCH");
    sys.munmap(address, LENGTH);
    expect(refusal().message).toContain("that no userfaultfd watches");
  });

  test("refuses memory of which a part is not watched", () => {
    open().register(address, LENGTH / 2, REGISTER_MISSING);
    const middle = (address + LENGTH / 2).toString(16);
    expect(refusal().message).toContain(`memory at 0x${middle} that no userfaultfd watches`);
  });

  test("refuses two that watch a part each", () => {
    open().register(address, LENGTH / 2, REGISTER_MISSING);
    open().register(address + LENGTH / 2, LENGTH / 2, REGISTER_MISSING);
    expect(refusal().message).toContain("expected a userfaultfd of its guest's memory");
  });

  test("takes any of a load that is over, and says when there is none", () => {
    made.state.phase = PHASE_FINISHED;
    const { code, message } = refusal();
    expect([code, message]).toEqual(["TARGET_LOST", "this process: all its RAM is in already"]);
    const uffd = open();
    const taken = takeUserfaultfd(target, made.state);
    expect(sys.kcmpFile(process.pid, process.pid, taken, uffd.fd)).toBe(0);
    sys.close(taken);
  });
});

describe("isUserfaultfd", () => {
  test("tells one from what has its number by now", () => {
    expect(isUserfaultfd(open().fd)).toBe(true);
    const other = sys.check(sys.eventfd(0, EFD_CLOEXEC), "eventfd");
    expect(isUserfaultfd(other)).toBe(false);
    sys.close(other);
    expect(isUserfaultfd(other)).toBe(false);
  });
});
