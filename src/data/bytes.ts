/**
 * Bytes behind token text: the GPT-2 byte alphabet of byte-level tokenizers, and where UTF-8 may be cut.
 */

/** Keeps U+FEFF (a BOM is a character like any other inside text) and replaces each maximal bad piece by U+FFFD. */
const lenient = new TextDecoder('utf-8', { ignoreBOM: true });
const strict = new TextDecoder('utf-8', { ignoreBOM: true, fatal: true });

const byteOfCharacter: ReadonlyMap<string, number> = buildAlphabet();

/**
 * GPT-2's printable alphabet: bytes that print stand for themselves, the others for U+0100 and up in ascending order
 * (Radford et al. 2019, `bytes_to_unicode`).
 */
function buildAlphabet(): Map<string, number> {
  const prints = (byte: number) =>
    (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
  const alphabet = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) alphabet.set(String.fromCharCode(prints(byte) ? byte : next++), byte);
  return alphabet;
}

/** The bytes that a byte-level token stands for; a token with a character outside the alphabet is its own UTF-8. */
export function bytesOfByteLevelToken(token: string): Uint8Array {
  const bytes = new Uint8Array(token.length);
  for (let i = 0; i < token.length; i++) {
    const byte = byteOfCharacter.get(token[i]!);
    if (byte === undefined) return Buffer.from(token, 'utf8');
    bytes[i] = byte;
  }
  return bytes;
}

/** UTF-8 to text; one U+FFFD for each maximal bad piece (WHATWG Encoding). */
export function decodeUtf8(bytes: Uint8Array): string {
  return lenient.decode(bytes);
}

/** UTF-8 to text, or undefined when any byte is wrong. */
export function decodeUtf8Strict(bytes: Uint8Array): string | undefined {
  try {
    return strict.decode(bytes);
  } catch {
    return undefined;
  }
}

/**
 * Number of leading bytes whose text can no longer change, whatever follows: everything except a trailing piece that is
 * the correct beginning of a longer character.
 */
export function settledLength(bytes: Uint8Array): number {
  const count = bytes.length;
  for (let back = 1; back <= Math.min(3, count); back++) {
    const lead = bytes[count - back]!;
    if ((lead & 0xc0) === 0x80) continue;
    const need = lead >= 0xc2 && lead <= 0xdf ? 2 : (lead & 0xf0) === 0xe0 ? 3 : lead >= 0xf0 && lead <= 0xf4 ? 4 : 0;
    const mayGrow = need > back && (back === 1 || secondByteFits(lead, bytes[count - back + 1]!));
    return mayGrow ? count - back : count;
  }
  return count;
}

/** Unicode 15, table 3-7: no overlong forms, no surrogates, nothing above U+10FFFF. */
function secondByteFits(lead: number, second: number): boolean {
  const low = lead === 0xe0 ? 0xa0 : lead === 0xf0 ? 0x90 : 0x80;
  const high = lead === 0xed ? 0x9f : lead === 0xf4 ? 0x8f : 0xbf;
  return second >= low && second <= high;
}
