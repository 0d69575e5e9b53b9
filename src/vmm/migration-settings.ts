/**
 * QEMU's migration capabilities and parameters: read once, changed where a load or a save needs it,
 * put back afterwards, so that whoever saves or migrates the guest next finds what they had.
 */
import { FslError } from "../errors.ts";
import { type QmpClient, type QmpReply, isRecord } from "./qmp.ts";

export interface MigrationChanges {
  /** Capability → wanted state. A capability that this QEMU does not know counts as off. */
  readonly capabilities: Readonly<Record<string, boolean>>;
  /** Parameter → wanted value. A parameter that this QEMU does not know is left out. */
  readonly parameters: Readonly<Record<string, unknown>>;
}

/**
 * Capabilities that a mapped-ram file cannot be loaded or saved with, or that change what a load
 * does.
 * @source QEMU migration/options.c migrate_caps_check
 */
export const CAPABILITIES_IN_THE_WAY = [
  "xbzrle",
  "compress",
  "postcopy-ram",
  "postcopy-preempt",
  "x-colo",
  "multifd",
  "background-snapshot",
  "zero-copy-send",
  "rdma-pin-all",
  "x-ignore-shared",
] as const;

/**
 * Parameters that a mapped-ram file cannot be loaded or saved with, and the value that is in
 * nobody's way.
 */
export const PARAMETERS_IN_THE_WAY: Readonly<Record<string, unknown>> = {
  "multifd-compression": "none",
  "tls-creds": "",
};

export class MigrationSettings {
  readonly #qmp: QmpClient;
  /** As they were found. */
  readonly #capabilities: ReadonlyMap<string, boolean>;
  /** As `apply` has left them. */
  readonly #capabilitiesNow: Map<string, boolean>;
  readonly #parameters: ReadonlyMap<string, unknown>;
  /** What has been changed and must be put back. */
  readonly #changedCapabilities = new Set<string>();
  readonly #changedParameters = new Set<string>();

  private constructor(
    qmp: QmpClient,
    capabilities: ReadonlyMap<string, boolean>,
    parameters: ReadonlyMap<string, unknown>,
  ) {
    this.#qmp = qmp;
    this.#capabilities = capabilities;
    this.#capabilitiesNow = new Map(capabilities);
    this.#parameters = parameters;
  }

  /** What a QEMU has that was just started, and whose command line says nothing of migration. */
  static ofNewQemu(qmp: QmpClient): MigrationSettings {
    const off = ["mapped-ram", "events", "x-ignore-shared"];
    return new MigrationSettings(qmp, new Map(off.map((name) => [name, false])), new Map());
  }

  /** Asks for both in one round trip. */
  static async read(qmp: QmpClient): Promise<MigrationSettings> {
    const [capabilities, parameters] = await Promise.all([
      qmp.request("query-migrate-capabilities"),
      qmp.request("query-migrate-parameters"),
    ]);
    return new MigrationSettings(qmp, parseCapabilities(capabilities), parseParameters(parameters));
  }

  /**
   * Settings that another fsl changed and did not put back. @param undo what its `undoRecord` said
   */
  static changedBefore(qmp: QmpClient, undo: MigrationChanges): MigrationSettings {
    const capabilities = new Map(Object.entries(undo.capabilities));
    const parameters = new Map(Object.entries(undo.parameters));
    const settings = new MigrationSettings(qmp, capabilities, parameters);
    for (const name of capabilities.keys()) settings.#changedCapabilities.add(name);
    for (const name of parameters.keys()) settings.#changedParameters.add(name);
    return settings;
  }

  /** What `restore` would set now. JSON. */
  undoRecord(): MigrationChanges {
    const pick = <T>(
      names: Iterable<string>,
      values: ReadonlyMap<string, T>,
    ): [string, T | undefined][] => [...names].map((name) => [name, values.get(name)]);
    const capabilities = pick(this.#changedCapabilities, this.#capabilities);
    return {
      capabilities: Object.fromEntries(capabilities.map(([name, state]) => [name, state ?? false])),
      parameters: Object.fromEntries(pick(this.#changedParameters, this.#parameters)),
    };
  }

  /**
   * Makes the wanted changes; what is already so is not touched.
   * @throws FslError TARGET_MISMATCH when QEMU does not know a wanted capability, or refuses a
   * change
   */
  async apply(changes: MigrationChanges): Promise<void> {
    const capabilities = Object.entries(changes.capabilities).filter(([name, state]) => {
      const known = this.#capabilitiesNow.get(name);
      if (known === undefined && state) throw this.#unknownCapability(name);
      return known !== undefined && known !== state;
    });
    const parameters = Object.entries(changes.parameters).filter(([name, value]) => {
      return this.#parameters.has(name) && this.#parameters.get(name) !== value;
    });
    // Noted first: if the connection breaks in between, `restore` rather does too much.
    for (const [name, state] of capabilities) {
      this.#changedCapabilities.add(name);
      this.#capabilitiesNow.set(name, state);
    }
    for (const [name] of parameters) this.#changedParameters.add(name);
    // In this order: mapped-ram cannot be switched on while a parameter stands in its way.
    await this.#carryOut(this.#setParameters(parameters), this.#setCapabilities(capabilities));
  }

  /**
   * Puts back what `apply` changed. Does nothing the second time.
   * @throws FslError TARGET_LOST, TARGET_MISMATCH
   */
  async restore(): Promise<void> {
    const capabilities = [...this.#changedCapabilities].map((name): [string, boolean] => {
      return [name, this.#capabilities.get(name) ?? false];
    });
    const parameters = [...this.#changedParameters].map((name): [string, unknown] => {
      return [name, this.#parameters.get(name)];
    });
    // And in this order: such a parameter cannot be set while mapped-ram is on.
    await this.#carryOut(this.#setCapabilities(capabilities), this.#setParameters(parameters));
    this.#changedCapabilities.clear();
    this.#changedParameters.clear();
  }

  #setCapabilities(states: [string, boolean][]): Promise<QmpReply> | null {
    if (states.length === 0) return null;
    const capabilities = states.map(([capability, state]) => ({ capability, state }));
    return this.#qmp.execute("migrate-set-capabilities", { capabilities });
  }

  #setParameters(values: [string, unknown][]): Promise<QmpReply> | null {
    if (values.length === 0) return null;
    return this.#qmp.execute("migrate-set-parameters", Object.fromEntries(values));
  }

  /** Commands under way, in the order in which they were sent. */
  async #carryOut(...commands: (Promise<QmpReply> | null)[]): Promise<void> {
    for (const reply of await Promise.all(commands)) {
      if (reply === null || reply.ok) continue;
      const { description } = reply;
      throw new FslError(
        "TARGET_MISMATCH",
        `migration settings: QEMU refused a change: ${description}`,
        { description },
      );
    }
  }

  #unknownCapability(name: string): FslError {
    const hint = name === "mapped-ram" ? "; it came with QEMU 9.0" : "";
    return new FslError(
      "TARGET_MISMATCH",
      `QEMU does not know the migration capability ${name}${hint}`,
      {
        capability: name,
      },
    );
  }
}

/** @param value answer to query-migrate-capabilities: [{capability, state}] */
function parseCapabilities(value: unknown): Map<string, boolean> {
  const result = new Map<string, boolean>();
  if (!Array.isArray(value)) return result;
  for (const entry of value) {
    if (isRecord(entry) && typeof entry["capability"] === "string") {
      result.set(entry["capability"], entry["state"] === true);
    }
  }
  return result;
}

/** @param value answer to query-migrate-parameters: an object */
function parseParameters(value: unknown): Map<string, unknown> {
  return new Map(isRecord(value) ? Object.entries(value) : []);
}

/** What an earlier fsl changed. @param undo out of a load state: it need not be what was written */
export function parseUndo(undo: unknown): MigrationChanges {
  const { capabilities, parameters } = isRecord(undo) ? undo : {};
  return {
    capabilities: isRecord(capabilities) ? (capabilities as Record<string, boolean>) : {},
    parameters: isRecord(parameters) ? parameters : {},
  };
}
