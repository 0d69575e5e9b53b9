import { describe, expect, test } from "bun:test";
import { MESSAGE_LENGTH_MAX, MessageError, MessageLines } from "../../src/vmm/message-lines.ts";

function push(...pieces: string[]): string[] {
  const lines = new MessageLines();
  const messages: string[] = [];
  for (const piece of pieces) lines.push(Buffer.from(piece), (text) => messages.push(text));
  return messages;
}

describe("MessageLines.push", () => {
  test.each([
    ["one message", ['{"a": 1}\r\n'], ['{"a": 1}']],
    ["two in one piece", ["{}\r\n{}\r\n"], ["{}", "{}"]],
    ["one in many pieces", ["{", '"a"', ": 1}", "\r", "\n"], ['{"a": 1}']],
    ["a letter cut in two", ['{"a": "\u00e4"}\n'], ['{"a": "\u00e4"}']],
    ["blank lines between", ["\r\n{}\r\n\r\n \r\n{}\n"], ["{}", "{}"]],
    ["a pretty message", ['{\n    "a": {\n    }\n}\n{}\n'], ['{\n    "a": {\n    }\n}', "{}"]],
    ["nothing complete", ['{"a": 1}'], []],
    ["nothing", [""], []],
  ])("gives %s", (_what, pieces, messages) => {
    expect(push(...pieces)).toEqual(messages);
  });

  test("takes the bytes of a letter one by one", () => {
    const lines = new MessageLines();
    const messages: string[] = [];
    for (const byte of Buffer.from('{"ä": "€"}\n')) {
      lines.push(Uint8Array.of(byte), (text) => messages.push(text));
    }
    expect(messages).toEqual(['{"ä": "€"}']);
  });

  test("does not keep the caller's buffer", () => {
    const lines = new MessageLines();
    const messages: string[] = [];
    const buffer = Buffer.from('{"a"');
    lines.push(buffer, () => {});
    buffer.fill(0);
    lines.push(Buffer.from(": 1}\n"), (text) => messages.push(text));
    expect(messages).toEqual(['{"a": 1}']);
  });

  test.each([
    ["a line that is no message", "hello\n", /found "hello"/],
    ["control characters", "\u001b[31m\n", /found "\.\[31m"/],
    ["a line that never ends", "{".padEnd(MESSAGE_LENGTH_MAX + 1), /longer than 4194304 bytes/],
    ["a message of too many lines", `{\n${"\n".repeat(70_000)}`, /or 65536 lines/],
  ])("refuses %s", (_what, text, message) => {
    expect(() => push(text)).toThrow(MessageError);
    expect(() => push(text)).toThrow(message);
  });
});
