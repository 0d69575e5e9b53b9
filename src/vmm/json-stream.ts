/**
 * Cuts a byte stream into JSON objects without parsing them. QMP ends each message with a line break, but a monitor
 * with `pretty=on` spreads one message over many lines, so braces are counted instead.
 *
 * Everything is bounded: a message has at most `MESSAGE_LENGTH_MAX` bytes and `DEPTH_MAX` levels.
 */

/** Bytes of one message. The longest answer that fsl asks for is some tens of KiB (`x-query-ramblock`). */
export const MESSAGE_LENGTH_MAX = 4 * 1024 * 1024;
/** Levels of nesting. QEMU's own parser stops at 1024; its answers to us have fewer than ten. */
export const DEPTH_MAX = 64;

const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const OPEN_BRACE = 0x7b;
const CLOSE_BRACE = 0x7d;
const OPEN_BRACKET = 0x5b;
const CLOSE_BRACKET = 0x5d;

/** Text that is not a sequence of JSON objects within the limits; the stream cannot be followed any further. */
export class JsonStreamError extends Error {}

export class JsonStream {
  #depth = 0;
  #inString = false;
  #escaped = false;
  /** Pieces of the message that is not complete yet. */
  #pieces: Uint8Array[] = [];
  #piecesLength = 0;

  /** True when the bytes pushed so far end in the middle of a message. */
  get isInsideMessage(): boolean {
    return this.#depth > 0;
  }

  /**
   * Takes the next bytes (they are copied where they must be kept) and hands each complete message to `onMessage`.
   * @throws JsonStreamError when the bytes are no JSON objects or a limit is passed
   */
  push(bytes: Uint8Array, onMessage: (text: string) => void): void {
    let messageStart = this.#depth > 0 ? 0 : -1;
    for (let index = 0; index < bytes.length; index++) {
      const byte = bytes[index] as number;
      if (this.#depth === 0) {
        if (byte === OPEN_BRACE) {
          this.#depth = 1;
          messageStart = index;
        } else if (!isBlank(byte)) {
          throw new JsonStreamError(`expected a JSON object, found ${preview(bytes, index)}`);
        }
        continue;
      }
      if (this.#step(byte)) {
        this.#keep(bytes, messageStart, index + 1);
        messageStart = -1;
        onMessage(this.#take());
      }
    }
    if (messageStart >= 0) this.#keep(bytes, messageStart, bytes.length);
  }

  /** @returns true when `byte` closes the message */
  #step(byte: number): boolean {
    if (this.#inString) {
      if (this.#escaped) this.#escaped = false;
      else if (byte === BACKSLASH) this.#escaped = true;
      else if (byte === QUOTE) this.#inString = false;
      return false;
    }
    if (byte === QUOTE) {
      this.#inString = true;
    } else if (byte === OPEN_BRACE || byte === OPEN_BRACKET) {
      this.#depth += 1;
      if (this.#depth > DEPTH_MAX) {
        throw new JsonStreamError(`a message is nested more than ${DEPTH_MAX} levels deep`);
      }
    } else if (byte === CLOSE_BRACE || byte === CLOSE_BRACKET) {
      this.#depth -= 1;
      return this.#depth === 0;
    }
    return false;
  }

  #keep(bytes: Uint8Array, start: number, end: number): void {
    this.#piecesLength += end - start;
    if (this.#piecesLength > MESSAGE_LENGTH_MAX) {
      throw new JsonStreamError(`a message is longer than ${MESSAGE_LENGTH_MAX} bytes`);
    }
    // A copy: the caller may use its buffer again.
    this.#pieces.push(bytes.slice(start, end));
  }

  #take(): string {
    const text = Buffer.concat(this.#pieces).toString("utf8");
    this.#pieces = [];
    this.#piecesLength = 0;
    return text;
  }
}

function isBlank(byte: number): boolean {
  return byte === 0x20 || byte === 0x0a || byte === 0x0d || byte === 0x09;
}

/** The first 40 bytes from `start`, safe to show on a terminal. */
function preview(bytes: Uint8Array, start: number): string {
  const text = Buffer.from(bytes.slice(start, start + 40)).toString("latin1");
  return JSON.stringify(text.replace(/[^\x20-\x7e]/g, "."));
}
