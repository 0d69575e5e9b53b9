/**
 * Cuts what a QMP monitor sends into messages, without parsing them. A message is one line that
 * begins with `{`; from a monitor with `pretty=on` it is many, of which the first is `{` and the
 * last is `}`. (A line break inside a string is always escaped in JSON.)
 */

/** Bytes of one message. The longest answer that fsl asks for is some tens of KiB. */
export const MESSAGE_LENGTH_MAX = 4 * 1024 * 1024;

/** Lines of one pretty-printed message. */
const LINES_MAX = 65_536;

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
      const message = this.#addLine(this.#endLine(bytes.subarray(start, end)));
      start = end + 1;
      if (message !== null) onMessage(message);
    }
    if (start === bytes.length) return;
    // A copy, and not by `slice`: a Buffer's gives the same memory.
    this.#pieces.push(new Uint8Array(bytes.subarray(start)));
    this.#count(bytes.length - start);
  }

  /** @returns the message that `line` completes, if it does */
  #addLine(line: string): string | null {
    const isInside = this.#lines.length > 0;
    if (!isInside && line === "") {
      this.#keptLength = 0;
      return null;
    }
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

  /** @returns the whole line that ends with `last` */
  #endLine(last: Uint8Array): string {
    this.#count(last.length + 1);
    if (this.#pieces.length === 0) return decode(last);
    const line = Buffer.concat([...this.#pieces, last]);
    this.#pieces = [];
    return decode(line);
  }

  #count(length: number): void {
    this.#keptLength += length;
    if (this.#keptLength <= MESSAGE_LENGTH_MAX && this.#lines.length <= LINES_MAX) return;
    throw new MessageError(
      `a message is longer than ${MESSAGE_LENGTH_MAX} bytes or ${LINES_MAX} lines`,
    );
  }
}

function decode(bytes: Uint8Array): string {
  const { buffer, byteOffset, length } = bytes;
  return Buffer.from(buffer, byteOffset, length).toString("utf8").trimEnd();
}

/** Safe to show on a terminal. */
function preview(line: string): string {
  return JSON.stringify(line.slice(0, 60).replace(/[^\x20-\x7e]/g, "."));
}
