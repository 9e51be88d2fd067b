/** Flag values as numbers and choices. */
import { LockstepError } from '../errors.js';
import type { Input } from './command.js';

/** The flag's value; undefined when it was not given. */
export function text({ values }: Input, name: string): string | undefined {
  return values.get(name)?.at(-1);
}

interface Range {
  minimum?: number;
  maximum?: number;
  whole?: boolean;
}

/** @throws LockstepError USAGE_VALUE when it is no number of the range. */
export function number(input: Input, name: string, { minimum, maximum, whole }: Range = {}): number | undefined {
  const given = text(input, name);
  if (given === undefined) return undefined;
  const value = given.trim() === '' ? Number.NaN : Number(given);
  const outside = (minimum !== undefined && value < minimum) || (maximum !== undefined && value > maximum);
  if (!Number.isFinite(value) || outside || (whole && !Number.isSafeInteger(value))) {
    const bounds = [minimum === undefined ? '' : `>= ${minimum}`, maximum === undefined ? '' : `<= ${maximum}`].filter(
      Boolean,
    );
    const expected = `${whole ? 'a whole number' : 'a number'}${bounds.length > 0 ? ` ${bounds.join(' and ')}` : ''}`;
    throw new LockstepError('USAGE_VALUE', `--${name}: expected ${expected}, received ${given}`, { flag: name, given });
  }
  return value;
}

/** @throws LockstepError USAGE_VALUE when it is none of the choices. */
export function choice<const Choice extends string>(
  input: Input,
  name: string,
  choices: readonly Choice[],
): Choice | undefined {
  const given = text(input, name);
  const found = choices.find((each) => each === given);
  if (given !== undefined && found === undefined) {
    throw new LockstepError('USAGE_VALUE', `--${name}: expected ${choices.join(' or ')}, received ${given}`, {
      flag: name,
      given,
    });
  }
  return found;
}

/** An object without its undefined entries. */
export function given<T extends object>(fields: T): Given<T> {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined)) as never;
}

/** Optional fields that, when there, are not undefined. */
type Given<T> = { [Key in keyof T as undefined extends T[Key] ? Key : never]?: Exclude<T[Key], undefined> } & {
  [Key in keyof T as undefined extends T[Key] ? never : Key]: T[Key];
};
