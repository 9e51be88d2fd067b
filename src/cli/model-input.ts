/** What `generate` and `score` share: the model that flags describe, and the rows to feed it. */
import { LockstepError } from '../errors.js';
import type { InputRow } from '../inference/generate.js';
import type { OpenModelOptions } from '../inference/open-model.js';
import type { Input } from './command.js';
import { choice, given, number, text } from './values.js';

/** @throws LockstepError USAGE_VALUE, RANKS_UNSUPPORTED. */
export function modelOptions(input: Input): OpenModelOptions {
  for (const name of ['tensor', 'pipeline']) {
    const degree = number(input, name, { minimum: 1, whole: true }) ?? 1;
    if (degree > 1) {
      throw new LockstepError(
        'RANKS_UNSUPPORTED',
        `--${name} ${degree}: this version runs a model on one rank; leave the flag out, or give 1`,
        { [name]: degree },
      );
    }
  }
  return {
    model: input.words[0]!,
    ...given({
      dtype: choice(input, 'dtype', ['float32', 'bfloat16']),
      threads: number(input, 'threads', { minimum: 1, maximum: 256, whole: true }),
      parts: number(input, 'parts', { minimum: 1, whole: true }),
    }),
  };
}

/** Rows of `--input FILE`, of stdin for `-`, or the one row of `--prompt TEXT`; `sources` names what there could be. */
export async function inputRows(input: Input, sources: string): Promise<AsyncIterable<InputRow> | Iterable<InputRow>> {
  const [file, prompt] = [text(input, 'input'), text(input, 'prompt')];
  if (file !== undefined && prompt !== undefined) {
    throw new LockstepError('USAGE_VALUE', '--input and --prompt exclude each other; give one of them');
  }
  if (prompt !== undefined) return [{ columns: { prompt }, place: { file: '--prompt', line: 1 } }];
  if (file === undefined) {
    throw new LockstepError('USAGE_VALUE', `there is nothing to read; give ${sources}`);
  }
  const { readRows } = await import('../data/dataset.js');
  return readRows(file === '-' ? '/dev/stdin' : file);
}
