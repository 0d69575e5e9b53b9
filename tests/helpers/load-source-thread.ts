/**
 * The thread of load-sources.ts' kind `thread`: reads what is asked for, and says when it is there.
 */
import { openSync, readSync } from "node:fs";
import * as sys from "../../src/sys/native.ts";

declare const self: Worker;

interface Start {
  readonly path: string;
  readonly pagesOffsets: readonly number[];
  readonly slots: Int32Array;
  readonly bytes: Uint8Array;
  readonly readyFd: number;
}

const ONE = new BigUint64Array([1n]);

self.onmessage = (event: MessageEvent<Start>) => {
  const { path, pagesOffsets, slots, bytes, readyFd } = event.data;
  const fd = openSync(path, "r");
  const requests = slots.length - 1;
  for (;;) {
    const seen = Atomics.load(slots, requests);
    for (let slot = 0; slot < requests / 3; slot += 1) {
      if (Atomics.load(slots, slot * 3 + 2) !== 1) continue;
      const [page = 0, block = 0] = slots.subarray(slot * 3);
      const offset = (pagesOffsets[block] ?? 0) + page * 4096;
      readSync(fd, bytes.subarray(slot * 4096), 0, 4096, offset);
      Atomics.store(slots, slot * 3 + 2, 2);
      sys.write(readyFd, ONE);
    }
    Atomics.wait(slots, requests, seen);
  }
};
