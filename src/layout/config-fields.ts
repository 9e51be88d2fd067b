/** Reading config.json: typed access to its keys, with errors that name the file, the key, what was expected and received. */
import { LockstepError } from '../errors.js';

/** A JSON value as it is shown in an error, at most 80 characters. */
export function shown(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 80 ? `${text.slice(0, 77)}...` : text;
}

/**
 * The keys of one JSON object. A key that is absent or null has no value; its fallback is used then. Several keys in one
 * call are spellings of the same field, the first present one counts.
 */
export class ConfigFields {
  constructor(
    readonly json: Readonly<Record<string, unknown>>,
    /** The file, and the path inside it, for errors. */
    readonly where: string,
  ) {}

  static of(json: unknown, where: string): ConfigFields {
    if (typeof json !== 'object' || json === null || Array.isArray(json)) {
      throw new LockstepError('MODEL_CONFIG_INVALID', `${where}: expected a JSON object, received ${shown(json)}.`, {
        file: where,
      });
    }
    return new ConfigFields(json as Record<string, unknown>, where);
  }

  has(key: string): boolean {
    return Object.hasOwn(this.json, key);
  }

  /** The value, or undefined when absent or null. */
  get(...keys: string[]): unknown {
    for (const key of keys) {
      if (this.has(key) && this.json[key] !== null) return this.json[key];
    }
    return undefined;
  }

  integer(keys: string | readonly string[], fallback?: number): number {
    const accepts = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) > 0;
    return this.typed(keys, 'a positive integer', accepts, fallback);
  }

  /** A number above zero. */
  positive(keys: string | readonly string[], fallback?: number): number {
    const accepts = (value: unknown): value is number => Number.isFinite(value) && (value as number) > 0;
    return this.typed(keys, 'a number above 0', accepts, fallback);
  }

  boolean(keys: string | readonly string[], fallback?: boolean): boolean {
    return this.typed(keys, 'true or false', (value): value is boolean => typeof value === 'boolean', fallback);
  }

  string(keys: string | readonly string[], fallback?: string): string {
    return this.typed(keys, 'a string', (value): value is string => typeof value === 'string', fallback);
  }

  strings(key: string): readonly string[] | undefined {
    if (this.get(key) === undefined) return undefined;
    const accepts = (value: unknown): value is string[] =>
      Array.isArray(value) && value.every((item) => typeof item === 'string');
    return this.typed(key, 'a list of strings', accepts);
  }

  /** An object inside this one, or undefined when absent or null. */
  object(key: string): ConfigFields | undefined {
    const value = this.get(key);
    return value === undefined ? undefined : ConfigFields.of(value, `${this.where}: ${key}`);
  }

  invalid(key: string, expected: string): LockstepError {
    const received = this.get(key) === undefined ? 'nothing' : shown(this.get(key));
    const message = `${this.where}: ${key}: expected ${expected}, received ${received}.`;
    return new LockstepError('MODEL_CONFIG_INVALID', message, { file: this.where, key, value: this.json[key] });
  }

  /** A field that is well formed but asks for mathematics that the engine does not have. */
  unsupported(key: string, supported: string): LockstepError {
    const message =
      `${this.where}: ${key} is ${shown(this.json[key])}, which changes what the model computes and is not supported ` +
      `(supported: ${supported}). Use a checkpoint without it.`;
    return new LockstepError('MODEL_UNSUPPORTED', message, { file: this.where, key, value: this.json[key] });
  }

  private typed<T>(
    keys: string | readonly string[],
    expected: string,
    accepts: (value: unknown) => value is T,
    fallback?: T,
  ): T {
    const names = typeof keys === 'string' ? [keys] : keys;
    for (const key of names) {
      const value = this.get(key);
      if (value === undefined) continue;
      if (!accepts(value)) throw this.invalid(key, expected);
      return value;
    }
    if (fallback === undefined) throw this.invalid(names[0] as string, expected);
    return fallback;
  }
}
