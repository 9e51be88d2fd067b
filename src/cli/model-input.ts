/** What `generate` and `score` share: the model that flags describe, and the rows to feed it. */
import { stat } from 'node:fs/promises';
import { LockstepError } from '../errors.js';
import type { InputRow } from '../inference/generate.js';
import type { OpenModelOptions } from '../inference/open-model.js';
import type { Input } from './command.js';
import { choice, given, number, text } from './values.js';

/** @throws LockstepError USAGE_VALUE. */
export function modelOptions(input: Input): OpenModelOptions {
  return {
    model: input.words[0]!,
    ...given({
      dtype: choice(input, 'dtype', ['float32', 'bfloat16']),
      device: choice(input, 'device', ['auto', 'cpu', 'cuda']),
      threads: number(input, 'threads', { minimum: 1, maximum: 256, whole: true }),
      parts: number(input, 'parts', { minimum: 1, whole: true }),
      tensor: number(input, 'tensor', { minimum: 1, whole: true }),
      pipeline: number(input, 'pipeline', { minimum: 1, whole: true }),
    }),
  };
}

/** Throws what went wrong; degrees and parts that the model does not allow are refused in the words of their flags. */
export function failWithFlags(error: unknown): never {
  const ofFlags = LockstepError.isInstance(error) && ['PARALLEL_INVALID', 'PARTS_INVALID'].includes(error.code);
  if (!ofFlags) throw error;
  const message = error.message.replace(/\b(?:parallel|numerics)\.(tensor|pipeline|parts)\b/g, '--$1');
  throw new LockstepError('USAGE_VALUE', message, error.details, { cause: error });
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
  const path = file === '-' ? '/dev/stdin' : file;
  const { readRows } = await import('../data/dataset.js');
  const seekable = await stat(path).then(
    (entry) => entry.isFile() || entry.isDirectory(),
    () => true,
  );
  return seekable ? readRows(path) : pipedRows(path);
}

/** Rows of a pipe or terminal, which can only be read on. */
async function* pipedRows(path: string): AsyncGenerator<InputRow> {
  const { parseLine, scanLines } = await import('../data/jsonl.js');
  const { badRow } = await import('../data/rows.js');
  let rows = 0;
  for await (const { bytes, line } of scanLines(path)) {
    const place = { file: path, line };
    let columns: InputRow['columns'];
    try {
      columns = parseLine(bytes);
    } catch (error) {
      throw badRow(place, (error as Error).message);
    }
    rows += 1;
    yield { columns, place };
  }
  if (rows === 0) throw new LockstepError('DATA_EMPTY', `${path} has no rows; write at least one`, { path });
}
