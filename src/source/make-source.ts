/**
 * Makes the page source that a spec describes; every thread that supplies pages calls it for its
 * own.
 */
import { FslError } from "../errors.ts";
import type { CreatePageSource, PageSource, PageSourceSpec, SourceBlock } from "./page-source.ts";
import { createPageSource } from "./snapshot-source.ts";

/** @throws FslError USAGE when the module has no such export; whatever `createPageSource` throws */
export async function makeSource(
  spec: PageSourceSpec,
  blocks: readonly SourceBlock[],
): Promise<PageSource> {
  if (spec.module === undefined) return createPageSource(spec.options, blocks);
  const loaded = (await import(spec.module)) as { createPageSource?: CreatePageSource };
  if (typeof loaded.createPageSource !== "function") {
    throw new FslError(
      "USAGE",
      `page source ${spec.module}: expected an export createPageSource, found none`,
    );
  }
  return loaded.createPageSource(spec.options, blocks);
}
