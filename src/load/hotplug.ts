/**
 * Devices that are plugged in while RAM comes in. One may break what lazy memory relies on: its
 * discards are told to nobody, or its process reads holes. Its driver in the guest takes a moment;
 * until then the guest is stopped, and all RAM comes before it goes on.
 */
import { type FslError, isFslError } from "../errors.ts";
import { type HotplugWants, hasEnded, type ServedTarget } from "../vmm/target.ts";
import type { Serving, ServingOptions } from "./serving.ts";

export class HotplugHold {
  readonly #target: ServedTarget;
  readonly #serving: Serving;
  readonly #logger: ServingOptions["logger"];
  readonly #stop: () => void;
  /** The guest stands still until all RAM is in; whether it ran before. */
  #held: Promise<boolean> | null = null;

  /** @param wants what breaks this load; nothing is watched where nothing would */
  constructor(
    target: ServedTarget,
    serving: Serving,
    wants: HotplugWants,
    logger: ServingOptions["logger"],
  ) {
    this.#target = target;
    this.#serving = serving;
    this.#logger = logger;
    const watch = wants.balloons || wants.helpers ? target.watchHotplug?.bind(target) : undefined;
    const found = (type: string): void => this.#hold(type);
    const lost = (error: FslError): void =>
      void this.#tell(error, "what is plugged in is not seen");
    this.#stop = watch?.(wants, found, lost) ?? ((): void => {});
  }

  /**
   * When all RAM is in, or the target has ended: a guest that was stopped goes on.
   * @returns why it does not, although the target lives
   */
  async end(isComplete: boolean): Promise<FslError | null> {
    this.#stop();
    if (!isComplete || (await this.#held) !== true) return null;
    try {
      await this.#target.resume();
      return null;
    } catch (error) {
      if (!isFslError(error)) throw error;
      return (await hasEnded(this.#target)) ? null : error;
    }
  }

  #hold(type: string): void {
    this.#logger?.warn(
      `${type} was plugged in while RAM comes in: the guest is stopped until all of it is in`,
    );
    this.#held = (this.#target.hold?.() ?? Promise.resolve(false)).catch(async (error: unknown) => {
      if (!isFslError(error)) throw error;
      await this.#tell(error, "the guest could not be stopped, and may use it");
      return false;
    });
    this.#held.catch(() => {});
    this.#serving.hurry();
  }

  /** A target that has ended needs no words. */
  async #tell(error: FslError, what: string): Promise<void> {
    if (!(await hasEnded(this.#target))) this.#logger?.warn(`${error.message}: ${what}`);
  }
}
