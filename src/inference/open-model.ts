/** A model opened for generating and scoring: engine, checkpoint and tokenizer. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { type Checkpoint, openCheckpoint } from '../checkpoints/hugging-face.js';
import { loadTokenizerIfPresent, type Tokenizer } from '../data/tokenizer.js';
import type { Dtype, Engine } from '../engine/engine.js';
import { type Backend, nativeBackend } from './backend.js';

export interface OpenModelOptions {
  /** A Hugging Face directory, or a hub name in the local cache. */
  model: string;
  dtype?: Dtype;
  threads?: number;
  /** Default `auto`: GPUs where there are some that can be used, one for each rank, else the CPU. */
  device?: 'auto' | 'cpu' | 'cuda';
  /** `numerics.parts`; default: what suits the model. */
  parts?: number | 'auto';
  /** Tokens of a forward pass when scoring; a longer row has one to itself. Default 8192. */
  microTokens?: number;
  /** Of each rank's device. Default: that of `Device`. */
  memoryBytes?: number;
  /** Stages of the pipeline, and ranks that share each stage. Default 1. */
  pipeline?: number;
  tensor?: number;
  backend?: Backend;
}

export interface OpenModel extends AsyncDisposable {
  engine: Engine;
  checkpoint: Checkpoint;
  /** Absent for a directory without tokenizer.json. */
  tokenizer: Tokenizer | undefined;
  /** Tokens that end a generation. */
  endTokens: readonly number[];
  microTokens: number;
  close(): Promise<void>;
}

/** Opens a model for `generate` and `score`; `close` ends its threads. Errors: those of `openCheckpoint`, devices and engines. */
export async function openModel({
  model,
  dtype = 'float32',
  threads = 2,
  device: processor = 'auto',
  parts = 'auto',
  microTokens = 8192,
  memoryBytes,
  pipeline = 1,
  tensor = 1,
  backend = nativeBackend,
}: OpenModelOptions): Promise<OpenModel> {
  const checkpoint = await openCheckpoint(model);
  const tokenizer = await loadTokenizerIfPresent(checkpoint.directory);
  const device = await backend.openDevice({
    ...{ threads, processor, layout: { pipeline, tensor } },
    ...(memoryBytes === undefined ? {} : { memoryBytes }),
  });
  try {
    const engine = await device.createEngine(checkpoint, { dtype, train: false, parts });
    const close = async () => {
      await engine.close();
      await device.close();
    };
    const endTokens = await endTokensOf(checkpoint, tokenizer);
    return { engine, checkpoint, tokenizer, endTokens, microTokens, close, [Symbol.asyncDispose]: close };
  } catch (error) {
    await device.close();
    throw error;
  }
}

/** End tokens of generation_config.json, else of config.json, else the tokenizer's. */
export async function endTokensOf(checkpoint: Checkpoint, tokenizer: Tokenizer | undefined): Promise<number[]> {
  const generation = await readFile(join(checkpoint.directory, 'generation_config.json'), 'utf8')
    .then((text) => JSON.parse(text) as { eos_token_id?: unknown })
    .catch(() => ({}) as { eos_token_id?: unknown });
  for (const { eos_token_id: ids } of [generation, checkpoint.config as { eos_token_id?: unknown }]) {
    const list = (Array.isArray(ids) ? ids : [ids]).filter((id): id is number => Number.isInteger(id));
    if (list.length > 0) return list;
  }
  return tokenizer?.endToken === undefined ? [] : [tokenizer.endToken];
}
