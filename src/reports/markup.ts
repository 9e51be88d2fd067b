/** HTML and SVG as strings: everything that comes from a run is escaped here. */

const entities: Record<string, string> = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&#39;' };

/** Text as markup. Control characters, which a document may not hold, are shown as their pictures (U+2400..U+241F). */
export function escapeText(text: string): string {
  let result = '';
  for (const character of text) {
    const code = character.charCodeAt(0);
    const control = code < 0x20 && code !== 0x09 && code !== 0x0a;
    result += entities[character] ?? (control ? String.fromCharCode(0x2400 + code) : character);
  }
  return result;
}

export type Attributes = Record<string, string | number | undefined>;

/** An element; `children` are markup already. */
export function element(name: string, attributes: Attributes = {}, ...children: string[]): string {
  const list = Object.entries(attributes)
    .filter(([, value]) => value !== undefined)
    .map(([key, value]) => ` ${key}="${escapeText(typeof value === 'number' ? pixel(value) : String(value))}"`)
    .join('');
  return `<${name}${list}>${children.join('')}</${name}>`;
}

/** A JSON document inside a script element, where `</script>` must not appear. */
export function embeddedJson(value: unknown): string {
  return JSON.stringify(value).replace(/</g, '\\u003c');
}

export function pixel(value: number): string {
  return String(Math.round(value * 100) / 100);
}
