/** What a generation needs of every rank, before it is decided how many pages of keys and values it has. */
import { LockstepError } from '../errors.js';
import { pagePositions } from '../layout/memory-plan.js';
import type { ModelShape } from '../layout/model-shape.js';
import type { GenerateOptions, GenerateRequest, SamplingOptions } from './engine.js';
import type { NativeGenerate } from './native.js';
import { checkSampling } from './sampling.js';

/** Rows of one step of generation: prompt chunks and decoding rows together. */
export const generationRows = 512;
/** Sequences that generate together, at most. */
export const generationSequences = 256;
/** Rows of a step that has guessed tokens, at most: what a row more costs little beside (docs/performance.md). */
export const speculationRows = 8;

/** Rows of a step that are sampled, at most. */
export function sampledRows(sequences: number, speculation = 0): number {
  return Math.max(sequences, Math.min(sequences * (1 + speculation), speculation > 0 ? speculationRows : 0));
}

export interface GenerationNeeds {
  requests: NativeGenerate['requests'];
  options: SamplingOptions;
  sequences: number;
  /** Rows of a step that are sampled, at most. */
  samples: number;
  rows: number;
  pages: number;
}

/** @throws LockstepError PROMPT_TOO_LONG, SAMPLING_INVALID */
export function generationNeeds(
  shape: ModelShape,
  requests: readonly GenerateRequest[],
  options: GenerateOptions,
): GenerationNeeds {
  const { temperature, topP, topK, seed, speculation } = options;
  checkSampling({ temperature, topP, topK, seed, speculation });
  const native = requests.map((request, i) => {
    const room = shape.maxPositions - request.prompt.length;
    if (request.prompt.length < 1 || room < 0) {
      throw new LockstepError(
        'PROMPT_TOO_LONG',
        `Prompt ${i} has ${request.prompt.length} tokens; the model takes 1..${shape.maxPositions} positions.`,
        { prompt: i, tokens: request.prompt.length, maxPositions: shape.maxPositions },
      );
    }
    const maxNewTokens = Math.min(request.maxNewTokens ?? options.maxNewTokens, room);
    return { prompt: request.prompt, maxNewTokens, id: BigInt.asUintN(64, BigInt(request.id)) };
  });
  const sequences = Math.min(requests.length, generationSequences);
  const prompts = native.reduce((sum, request) => sum + request.prompt.length, 0);
  const samples = sampledRows(sequences, speculation);
  const rows = Math.max(samples, Math.min(prompts, generationRows));
  const needed = native
    .map((request) => Math.ceil((request.prompt.length + request.maxNewTokens) / pagePositions))
    .sort((a, b) => b - a)
    .slice(0, sequences)
    .reduce((sum, pages) => sum + pages + 1, 0);
  return { requests: native, options, sequences, samples, rows, pages: needed };
}
