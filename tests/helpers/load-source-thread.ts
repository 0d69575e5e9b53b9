/**
 * The thread of load-sources.ts' kind `thread`: reads what is asked for, and says when it is there.
 */
import { openSync, readSync } from "node:fs";
import * as sys from "../../src/sys/native.ts";

declare const self: Worker;

interface Start {
  readonly path: string;
  readonly pagesOffset: number;
  readonly slots: Int32Array;
  readonly bytes: Uint8Array;
  readonly readyFd: number;
}

const ONE = new BigUint64Array([1n]);

self.onmessage = (event: MessageEvent<Start>) => {
  const { path, pagesOffset, slots, bytes, readyFd } = event.data;
  const fd = openSync(path, "r");
  const requests = slots.length - 1;
  for (;;) {
    const seen = Atomics.load(slots, requests);
    for (let slot = 0; slot < requests / 2; slot += 1) {
      if (Atomics.load(slots, slot * 2 + 1) !== 1) continue;
      const page = slots[slot * 2] ?? 0;
      readSync(fd, bytes.subarray(slot * 4096), 0, 4096, pagesOffset + page * 4096);
      Atomics.store(slots, slot * 2 + 1, 2);
      sys.write(readyFd, ONE);
    }
    Atomics.wait(slots, requests, seen);
  }
};
