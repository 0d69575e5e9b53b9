/**
 * Cuts what a QMP monitor sends into messages, without parsing them. A message is one line that
 * begins with `{`; from a monitor with `pretty=on` it is many, of which the first is `{` and the
 * last is `}`. (A line break inside a string is always escaped in JSON.)
 */

/** Bytes of one message. The longest answer that fsl asks for is some tens of KiB. */
export const MESSAGE_LENGTH_MAX = 4 * 1024 * 1024;

const LINE_FEED = 0x0a;

/** What came is no QMP, or passes the limit; the stream cannot be followed any further. */
export class MessageError extends Error {}

export class MessageLines {
  /** Pieces of the line that is not complete yet. */
  #pieces: Uint8Array[] = [];
  /** Lines of a message that is not complete yet. */
  #lines: string[] = [];
  /** Bytes in both. */
  #keptLength = 0;

  /**
   * Takes the next bytes (what must be kept is copied) and hands on each message that they
   * complete.
   * @throws MessageError
   */
  push(bytes: Uint8Array, onMessage: (text: string) => void): void {
    let start = 0;
    for (let end = bytes.indexOf(LINE_FEED); end >= 0; end = bytes.indexOf(LINE_FEED, start)) {
      this.#keep(bytes, start, end);
      start = end + 1;
      const line = Buffer.concat(this.#pieces).toString("utf8").trimEnd();
      this.#pieces = [];
      const message = this.#addLine(line);
      if (message !== null) onMessage(message);
    }
    if (start < bytes.length) this.#keep(bytes, start, bytes.length);
  }

  /** @returns the message that `line` completes, if it does */
  #addLine(line: string): string | null {
    const isInside = this.#lines.length > 0;
    if (!isInside && line === "") return null;
    if (!isInside && !line.startsWith("{")) {
      throw new MessageError(`expected a QMP message, found ${preview(line)}`);
    }
    this.#lines.push(line);
    const isOpen = isInside ? line !== "}" : line === "{";
    if (isOpen) return null;
    const message = this.#lines.join("\n");
    this.#lines = [];
    this.#keptLength = 0;
    return message;
  }

  #keep(bytes: Uint8Array, start: number, end: number): void {
    this.#keptLength += end - start + 1;
    if (this.#keptLength > MESSAGE_LENGTH_MAX) {
      throw new MessageError(`a message is longer than ${MESSAGE_LENGTH_MAX} bytes`);
    }
    // Not `slice`: a Buffer's gives the same memory.
    this.#pieces.push(new Uint8Array(bytes.subarray(start, end)));
  }
}

/** Safe to show on a terminal. */
function preview(line: string): string {
  return JSON.stringify(line.slice(0, 60).replace(/[^\x20-\x7e]/g, "."));
}
