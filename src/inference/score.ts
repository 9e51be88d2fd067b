/** What a model makes of given sequences: log-probs and entropies, values, or scores. */
import { microBatches, packBatch } from '../data/batch.js';
import { checkTokens, toPrompt, toTrainingExample } from '../data/examples.js';
import { parseRow, placeText, type Row } from '../data/rows.js';
import { scorePosition } from '../data/score-position.js';
import type { Tokenizer } from '../data/tokenizer.js';
import type { ForwardOutput, ForwardResult } from '../engine/engine.js';
import { LockstepError } from '../errors.js';
import { explainPositionLimit } from '../layout/config.js';
import type { Head } from '../layout/model-shape.js';
import { type InputRow, type PlacedRow, placed } from './generate.js';
import { type OpenModel, type OpenModelOptions, openModel } from './open-model.js';

export interface ScoreSettings {
  /** Logits are divided by it before log-softmax; default 1. */
  temperature?: number;
  signal?: AbortSignal;
}

/** For a sequence of n tokens; which fields are there depends on the model's head. */
export interface Scored {
  index: number;
  tokens: Int32Array;
  /** n - 1: log p(token i+1 | tokens 0..i). */
  logprobs?: Float32Array;
  /** n: entropy of the distribution after each token. */
  entropies?: Float32Array;
  /** n: the value of the state after each token. */
  values?: Float32Array;
  /** At the rightmost token that is not padding. */
  score?: number;
}

const outputsOf: Record<Head, ForwardOutput[]> = {
  language: ['logprobs', 'entropies'],
  value: ['values'],
  score: ['values'],
};

/**
 * Scores rows in order. `tokens`, `text` and `prompt` are scored as they stand, `messages` through the chat template
 * without generation words, prompt and response as fine-tuning sees them.
 *
 * @throws LockstepError TOKEN_OUT_OF_RANGE or ROW_TOO_LONG naming the row; DATA_BAD_ROW.
 */
export async function* score(
  model: OpenModel | OpenModelOptions,
  rows: Iterable<InputRow> | AsyncIterable<InputRow>,
  { temperature = 1, signal }: ScoreSettings = {},
): AsyncGenerator<Scored> {
  const opened = 'engine' in model ? model : await openModel(model);
  try {
    let pending: Int32Array[] = [];
    let first = 0;
    let tokensWaiting = 0;
    const flush = async () => {
      const results = await scoreSequences(opened, pending, first, temperature);
      first += pending.length;
      pending = [];
      tokensWaiting = 0;
      return results;
    };
    for await (const row of rows) {
      signal?.throwIfAborted();
      const tokens = tokensOf(placed(row, first + pending.length), opened);
      if (tokensWaiting + tokens.length > 4 * opened.microTokens && pending.length > 0) yield* await flush();
      pending.push(tokens);
      tokensWaiting += tokens.length;
    }
    if (pending.length > 0) yield* await flush();
  } finally {
    if (opened !== model) await opened.close();
  }
}

/** The tokens of a row as `score` reads them; checked against the model. */
export function tokensOf({ columns, place }: PlacedRow, { engine, tokenizer, checkpoint }: OpenModel): Int32Array {
  const { shape } = engine;
  const tokens = sequenceOf(parseRow(columns, place), tokenizer, checkpoint.directory);
  checkTokens(tokens, shape.vocabulary, place);
  if (tokens.length <= shape.maxPositions) return tokens;
  throw new LockstepError(
    'ROW_TOO_LONG',
    `${placeText(place)}: the row has ${tokens.length} tokens, but ${explainPositionLimit(shape)}; shorten it`,
    { ...place, tokens: tokens.length, maxPositions: shape.maxPositions },
  );
}

function sequenceOf(row: Row, tokenizer: Tokenizer | undefined, directory: string): Int32Array {
  if (row.kind === 'messages' && tokenizer) return tokenizer.encodeChat(row.messages, { addGenerationPrompt: false });
  if (row.kind === 'prompt' && row.response !== undefined)
    return toTrainingExample(row, tokenizer, { directory }).tokens;
  return toPrompt(row, tokenizer, { directory }).tokens;
}

async function scoreSequences(
  { engine, microTokens }: OpenModel,
  sequences: readonly Int32Array[],
  first: number,
  temperature: number,
): Promise<Scored[]> {
  const { head, padToken } = engine.shape;
  const lengths = sequences.map((sequence) => sequence.length);
  const batches = microBatches(lengths, microTokens).map(({ begin, end }) => sequences.slice(begin, end));
  const forwards = await engine.forwardEach(batches.map(packBatch), { outputs: outputsOf[head], temperature });
  let index = first;
  return batches.flatMap((batch, i) => {
    let at = 0;
    return batch.map((tokens) => {
      const scored = { index, tokens, ...read(forwards[i]!, at, tokens, head, padToken) };
      index++;
      at += tokens.length;
      return scored;
    });
  });
}

function read(
  { logprobs, entropies, values }: ForwardResult,
  at: number,
  tokens: Int32Array,
  head: Head,
  padToken: number | null,
): Partial<Scored> {
  const n = tokens.length;
  if (head === 'language')
    return { logprobs: logprobs!.slice(at, at + n - 1), entropies: entropies!.slice(at, at + n) };
  if (head === 'value') return { values: values!.slice(at, at + n) };
  return { score: values![at + scorePosition(tokens, padToken)]! };
}
