/** Float32 numbers as text. */

/**
 * The shortest decimal that reads back to the same float32; `value` must be a float32. NaN and infinities become null, as
 * JSON has no word for them.
 */
export function float32ToString(value: number): string {
  if (!Number.isFinite(value)) return 'null';
  if (Object.is(value, -0)) return '-0';
  // A normal float32 keeps any six digits, so the shortest form has six with trailing zeros, or more. Nine always do.
  const normal = Math.abs(value) >= 2 ** -126;
  for (let digits = normal ? 6 : 1; digits < 9; digits++) {
    const short = Number(value.toPrecision(digits));
    if (Math.fround(short) === value) return String(short);
  }
  return String(Number(value.toPrecision(9)));
}

export function float32Array(values: Float32Array): string {
  return `[${Array.from(values, float32ToString).join(',')}]`;
}
