/** Text from a model: prompts in, samples out in the prompts' order. */

import { checkTokens, toPrompt } from '../data/examples.js';
import { generatedStream, generatedText } from '../data/generated-text.js';
import type { Columns } from '../data/jsonl.js';
import { parseRow, placeText, type RowPlace } from '../data/rows.js';
import { type StopStrings, watchStops } from '../data/stop-strings.js';
import type { Generated, GenerateOptions, GenerateRequest, Guesses } from '../engine/engine.js';
import { checkSampling } from '../engine/sampling.js';
import { LockstepError } from '../errors.js';
import { explainPositionLimit } from '../layout/config.js';
import type { ModelShape } from '../layout/model-shape.js';
import { type OpenModel, type OpenModelOptions, openModel } from './open-model.js';

const defaultNewTokens = 256;

export interface GenerateSettings {
  /** Default 256, or as many as there are positions left. */ maxNewTokens?: number;
  /** Default 1; 0 is greedy. */ temperature?: number;
  /** Default 1: off. */ topP?: number;
  /** Default 0: off. */ topK?: number;
  /** Default 0. */ seed?: number;
  /** Samples of each prompt; default 1. */ samples?: number;
  /** Tokens that are guessed for a sample and step where few run, at most; it changes no text. Default 0: off. */
  speculation?: number;
  /** Go on past the model's end tokens. */ ignoreEndTokens?: boolean;
  /** Strings that end a sample; the text is cut before them. */ stop?: readonly string[];
  /** With `speculation`: how many tokens were guessed, and how many of them were right; called some times, to be added up. */
  onGuesses?: (guesses: Guesses) => void;
  signal?: AbortSignal;
  /** Text as it appears, for one sample of one prompt; with stop strings, text that may begin one is held back. */
  onText?: (text: string) => void;
}

export interface Completion {
  /** Of the input row, from 0; `sample` counts within it. */
  index: number;
  sample: number;
  prompt: Int32Array;
  /** New tokens, the end token included. */
  tokens: Int32Array;
  /** Without special tokens; absent for `tokens` rows and for models without tokenizer files. */
  text?: string;
  /** log p of each new token at the sampling temperature (1 when it is 0), before top-p and top-k. */
  logprobs: Float32Array;
  finish: 'stop' | 'length';
}

/** A row of input: its columns as in a line of JSONL, alone or with the place that errors name. */
export type InputRow = Columns | PlacedRow;

export interface PlacedRow {
  columns: Columns;
  place: RowPlace;
}

/** Row `index` of an input, with a place when it has none. */
export function placed(row: InputRow, index: number): PlacedRow {
  if ('columns' in row && 'place' in row) return row as PlacedRow;
  return { columns: row as Columns, place: { file: 'input', line: index + 1 } };
}

/** Prompts whose samples are generated together; a sample does not depend on it. */
const promptsPerCall = 256;

/**
 * Samples for every row, in order. A sample is a function of (weights, prompt, settings, seed, row index, sample index):
 * nothing else in the batch changes it.
 *
 * @throws LockstepError PROMPT_TOO_LONG naming the row when prompt and new tokens exceed the model's positions;
 * TOKEN_OUT_OF_RANGE; DATA_BAD_ROW; SAMPLING_INVALID naming a setting; MODEL_HEAD for a model without a language-model head.
 */
export async function* generate(
  model: OpenModel | OpenModelOptions,
  rows: Iterable<InputRow> | AsyncIterable<InputRow>,
  settings: GenerateSettings = {},
): AsyncGenerator<Completion> {
  checkSampling(settings);
  const opened = 'engine' in model ? model : await openModel(model);
  try {
    let first = 0;
    for await (const chunk of chunks(rows, promptsPerCall)) {
      const prompts = chunk.map((row, i) => promptOf(placed(row, first + i), opened, settings));
      yield* await sample(opened, prompts, first, settings);
      first += chunk.length;
    }
  } finally {
    if (opened !== model) await opened.close();
  }
}

interface Prompt {
  tokens: Int32Array;
  /** Results carry text. */
  textual: boolean;
}

function promptOf(
  { columns, place }: PlacedRow,
  { engine, tokenizer, checkpoint }: OpenModel,
  { maxNewTokens = 1 }: GenerateSettings,
): Prompt {
  const row = parseRow(columns, place);
  const { tokens } = toPrompt(row, tokenizer, { directory: checkpoint.directory });
  checkTokens(tokens, engine.shape.vocabulary, place);
  checkLength(tokens.length, maxNewTokens, engine.shape, place);
  return { tokens, textual: row.kind !== 'tokens' && tokenizer !== undefined };
}

/** @throws LockstepError PROMPT_TOO_LONG for a prompt that leaves no room for the new tokens. */
export function checkLength(prompt: number, maxNewTokens: number, shape: ModelShape, place: RowPlace): void {
  if (prompt + maxNewTokens <= shape.maxPositions) return;
  throw new LockstepError(
    'PROMPT_TOO_LONG',
    `${placeText(place)}: a prompt of ${prompt} tokens and ${maxNewTokens} new ones do not fit: ${explainPositionLimit(shape)}; ` +
      'shorten the prompt or lower the number of new tokens',
    { ...place, prompt, maxNewTokens, maxPositions: shape.maxPositions },
  );
}

async function sample(
  model: OpenModel,
  prompts: readonly Prompt[],
  first: number,
  settings: GenerateSettings,
): Promise<Completion[]> {
  const { samples = 1, signal } = settings;
  const requests: GenerateRequest[] = prompts.flatMap(({ tokens }, p) =>
    Array.from({ length: samples }, (_, s) => ({
      prompt: tokens,
      id: (first + p) * samples + s,
      maxNewTokens: Math.min(
        settings.maxNewTokens ?? defaultNewTokens,
        model.engine.shape.maxPositions - tokens.length,
      ),
    })),
  );
  const stops = watchStops(settings.stop, model.tokenizer, requests.length, 'stop');
  const live = settings.onText && liveText(model, settings, stops);
  const generated = await model.engine.generate(requests, {
    ...samplingOptions(model, settings),
    ...(signal ? { signal } : {}),
    ...(settings.onGuesses ? { onGuesses: settings.onGuesses } : {}),
    ...(stops || live
      ? {
          onProgress: ({ requests: owners, tokens }) => {
            const ended = stops?.push(owners, tokens);
            live?.push(tokens);
            return ended;
          },
        }
      : {}),
  });
  signal?.throwIfAborted();
  live?.finish();
  return generated.map((result, i) => {
    const prompt = prompts[Math.floor(i / samples)]!;
    return {
      index: first + Math.floor(i / samples),
      sample: i % samples,
      prompt: prompt.tokens,
      ...ended(model, result, stops, i, prompt.textual),
    };
  });
}

function samplingOptions(model: OpenModel, settings: GenerateSettings): GenerateOptions {
  const {
    maxNewTokens = defaultNewTokens,
    temperature = 1,
    topP = 1,
    topK = 0,
    seed = 0,
    speculation = 0,
    ignoreEndTokens = false,
  } = settings;
  return {
    maxNewTokens,
    temperature,
    topP,
    topK,
    seed,
    speculation,
    stopTokens: ignoreEndTokens ? [] : model.endTokens,
  };
}

/** Tokens, log-probs and text of a sample, cut at its stop string. */
function ended(
  { tokenizer }: OpenModel,
  { tokens, logprobs, finish }: Generated,
  stops: StopStrings | undefined,
  request: number,
  textual: boolean,
): Pick<Completion, 'tokens' | 'text' | 'logprobs' | 'finish'> {
  const cut = stops?.finish(request, tokens);
  const kept = cut ? tokens.subarray(0, cut.tokens) : tokens;
  const text = textual ? (cut?.text ?? generatedText(tokenizer!, kept, { skipSpecialTokens: true })) : undefined;
  return {
    tokens: kept,
    ...(text === undefined ? {} : { text }),
    logprobs: logprobs.subarray(0, kept.length),
    finish: cut || finish !== 'length' ? 'stop' : 'length',
  };
}

/** Streams the text of the only sample; what may be the beginning of a stop string waits. */
function liveText({ tokenizer }: OpenModel, { onText, stop = [] }: GenerateSettings, stops: StopStrings | undefined) {
  const stream = tokenizer && generatedStream(tokenizer, { skipSpecialTokens: true });
  const held = Math.max(0, ...stop.map((text) => text.length - 1));
  let text = '';
  let shown = 0;
  const show = (end: number): void => {
    if (end > shown) onText!(text.slice(shown, end));
    shown = Math.max(shown, end);
  };
  return {
    push: (tokens: Int32Array) => {
      for (const token of tokens) text += stream?.push(token) ?? '';
      if (!stops) show(text.length);
      else if (!stop.some((string) => text.includes(string))) show(text.length - held);
    },
    finish: () => {
      text += stream?.finish() ?? '';
      const ends = stop.map((string) => text.indexOf(string)).filter((at) => at >= 0);
      show(Math.min(text.length, ...ends));
    },
  };
}

async function* chunks<T>(rows: Iterable<T> | AsyncIterable<T>, size: number): AsyncGenerator<T[]> {
  let chunk: T[] = [];
  for await (const row of rows) {
    chunk.push(row);
    if (chunk.length === size) {
      yield chunk;
      chunk = [];
    }
  }
  if (chunk.length > 0) yield chunk;
}
