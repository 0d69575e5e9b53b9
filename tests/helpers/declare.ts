/**
 * Tests that cannot run everywhere. Where they cannot they are skipped, and their titles say why; with a word of
 * FSL_REQUIRE they fail.
 */
import { test } from "bun:test";
import type { UffdFeature } from "../../src/sys/abi.ts";
import { checkHost } from "../../src/uffd/support.ts";
import { isRequired } from "./guests.ts";

export type Declare = (title: string, body: () => Promise<void>, timeoutMs?: number) => void;

/** Like `test`. @param reason why it cannot run here, or null */
export function testUnless(reason: string | null, word: string): Declare {
  if (reason === null) return test;
  if (!isRequired(word)) return (title, body) => test.skip(`${title}: ${reason}`, body);
  return (title) =>
    test(title, () => {
      throw new Error(`FSL_REQUIRE has ${word}, and ${reason}`);
    });
}

function whyNo(feature: UffdFeature, since: string): string | null {
  const isThere = checkHost().features.includes(feature);
  return isThere ? null : `this kernel has no UFFDIO_${feature} (Linux ${since})`;
}

/** Why no page can be moved here, or null. */
export function whyNoMove(): string | null {
  return whyNo("MOVE", "6.8");
}

/** Why no page can be poisoned here, or null. */
export function whyNoPoison(): string | null {
  return whyNo("POISON", "6.6");
}

/** Tests that move pages. */
export const testMoving = testUnless(whyNoMove(), "kernel");
