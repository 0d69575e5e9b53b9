/**
 * Memory that the guest gave back just before fsl was killed stays zero. A REMOVE event is told
 * once: when it was read, its pages must be marked, by whichever fsl comes next.
 */
import { describe, expect, test } from "bun:test";
import { nextBit } from "../../src/bits.ts";
import { FaultLoop } from "../../src/load/fault-loop.ts";
import { EVENTS_MAX, type LoadState } from "../../src/load/state.ts";
import { BASE, FakeSource, FakeUffd, makeState, PAGE } from "../helpers/load-states.ts";

function runLoop(state: LoadState, uffd: FakeUffd): void {
  const loop = new FaultLoop({
    state,
    uffd: uffd.uffd,
    source: new FakeSource(),
    counters: state.counters(0),
    stopFd: uffd.stopFd,
    pidfd: -1,
    clusterPages: 1,
    movers: [],
    helperPids: [],
    replay: new Int32Array(0),
    onFailure: () => {},
    onRecovered: () => {},
  });
  loop.run();
  loop.close();
}

describe("FaultLoop after another one was killed", () => {
  test("marks what the dead one had read and not counted yet, and opens the gate", () => {
    using made = makeState([{ pages: 64 }], { canDiscard: true });
    const { state } = made;
    const events = state.eventsView();
    // struct uffd_msg: event u8 @0, remove.start u64 @8, remove.end u64 @16.
    events.setUint8(32, 0x15);
    events.setBigUint64(32 + 8, BigInt(BASE + 8 * PAGE), true);
    events.setBigUint64(32 + 16, BigInt(BASE + 16 * PAGE), true);
    state.eventCount = EVENTS_MAX;
    state.closeGate();
    using uffd = new FakeUffd();
    runLoop(state, uffd);
    const [block] = state.blocks;
    expect(nextBit(block?.done ?? new Int32Array(2), 0, 64, true)).toBe(8);
    expect(nextBit(block?.done ?? new Int32Array(2), 8, 64, false)).toBe(16);
    expect(state.enterCopy(1)).toBe(true);
    expect(state.eventCount).toBe(0);
  });

  test("finds a clean buffer behind every read: an old event is not taken for a new one", () => {
    using made = makeState([{ pages: 64 }], { canDiscard: true });
    const { state } = made;
    using uffd = new FakeUffd([[{ remove: [BASE, BASE + 4 * PAGE] }, { fault: BASE }], []]);
    const during: number[][] = [];
    const read = uffd.readEvents.bind(uffd);
    uffd.readEvents = (address: number) => {
      const view = state.eventsView();
      during.push([state.eventCount, view.getUint8(0), view.getUint8(32)]);
      return read(address);
    };
    runLoop(state, uffd);
    for (const seen of during) expect(seen).toEqual([EVENTS_MAX, 0, 0]);
    expect(during.length).toBeGreaterThan(1);
  });
});
