/**
 * The header that libvirt puts before the stream in a save image (`virsh save`). With `save_image_format = "sparse"`
 * (libvirt 11.2) the stream is a mapped-ram one. Integers are in the saver's byte order.
 *
 *   offset  size  field                                 libvirt src/qemu/qemu_saveimage.h
 *    0      16    "LibvirtQemudSave"; "LibvirtQemudPart" while it is being written
 *   16      u32   version, 2
 *   20      u32   data_len: bytes of XML and cookie, with NULs and padding; the stream follows
 *   24      u32   was_running
 *   28      u32   format: 0 raw, 1-5 compressed, 6 sparse
 *   32      u32   cookieOffset in the file's data, 0 = none
 *   36      56    unused
 *   92      ...   domain XML, NUL-terminated
 */
import { damaged, unsupported, type ByteSource } from "./byte-reader.ts";

export interface LibvirtHeader {
  /** File offset in bytes of the migration stream. */
  readonly streamOffset: number;
  /** Whether libvirt would let the guest run after a restore. */
  readonly wasRunning: boolean;
  readonly domainXml: string;
}

const MAGIC_SAVED = "LibvirtQemudSave";
const MAGIC_PARTIAL = "LibvirtQemudPart";
const HEADER_LENGTH = 92;
const VERSION = 2;
const FORMATS = ["raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse"];
const FORMAT_SPARSE = 6;
const FORMAT_RAW = 0;
/** Domain XML of a guest is 2 to 50 KB. */
const DATA_LENGTH_MAX = 16 * 1024 * 1024;

/**
 * @returns null when the file does not begin with libvirt's magic
 * @throws FslError SNAPSHOT_FORMAT, SNAPSHOT_UNSUPPORTED
 */
export function readLibvirtHeader(source: ByteSource): LibvirtHeader | null {
  if (source.byteLength < HEADER_LENGTH) return null;
  const header = source.read(0, HEADER_LENGTH);
  const magic = Buffer.from(header.buffer, header.byteOffset, MAGIC_SAVED.length).toString(
    "latin1",
  );
  if (magic === MAGIC_PARTIAL)
    throw damaged(source, 0, "libvirt save image", MAGIC_SAVED, `${magic}, an unfinished one`);
  if (magic !== MAGIC_SAVED) return null;

  const view = new DataView(header.buffer, header.byteOffset, header.byteLength);
  const isLittleEndian = view.getUint32(16, true) === VERSION;
  const word = (offset: number): number => view.getUint32(offset, isLittleEndian);
  if (word(16) !== VERSION)
    throw unsupported(source, 16, "libvirt save image", "version 2", word(16));
  const dataLength = word(20);
  if (
    dataLength === 0 ||
    dataLength > DATA_LENGTH_MAX ||
    HEADER_LENGTH + dataLength > source.byteLength
  ) {
    throw damaged(
      source,
      20,
      "libvirt save image",
      "a domain XML within the file",
      `${dataLength} bytes`,
    );
  }
  const format = word(28);
  if (format !== FORMAT_SPARSE && format !== FORMAT_RAW) {
    throw unsupported(source, 28, "libvirt save image", "format sparse", FORMATS[format] ?? format);
  }
  const data = source.read(HEADER_LENGTH, dataLength);
  const xmlEnd = data.indexOf(0);
  const domainXml = new TextDecoder().decode(xmlEnd < 0 ? data : data.subarray(0, xmlEnd));
  return { streamOffset: HEADER_LENGTH + dataLength, wasRunning: word(24) !== 0, domainXml };
}
