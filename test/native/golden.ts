/** Reading test/fixtures/models: golden.json and golden.safetensors of a checkpoint folder. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { readSafetensorsHeader } from '../../src/checkpoints/safetensors.js';

export interface GoldenSequence {
  tokens: number[];
  logprobs: number[];
  entropies: number[];
  /** Reward models */ position_scores: number[];
  score: number;
}

export interface Adamw {
  lr: number;
  beta1: number;
  beta2: number;
  eps: number;
  weight_decay: number;
  max_grad_norm: number;
  steps: number;
}

export interface Trajectory {
  adamw: Adamw;
  losses: number[];
  grad_norms: number[];
  final_loss: number;
  /** Names in golden.safetensors, a prefix and the tensor's name. */
  final_tensors: string[];
  ill_conditioned: string[];
  final: Record<string, { sum: number; abs_sum: number; l2: number }>;
}

export interface PreferenceLoss {
  chosen_scores: number[];
  rejected_scores: number[];
  loss: number;
  grad_norm: number;
  grad_prefix: string;
}

export interface TensorCase {
  sequence: number;
  tensor: string;
  shape: number[];
}

type Errors = Record<string, { max_abs: number }> & { loss_abs: number };

export interface Golden {
  name: string;
  kind: 'lm' | 'rm';
  sequences: GoldenSequence[];
  logits?: TensorCase;
  hidden?: TensorCase;
  loss?: {
    logprob_weights: number[][];
    entropy_weights: number[][];
    value: number;
    grad_norm: number;
    grad_prefix: string;
  };
  value_head?: {
    weight: string;
    bias: string;
    values: number[][];
    value_weights: number[][];
    loss: number;
    grad_norm: number;
    grad_prefix: string;
  };
  sft?: Trajectory & { sequences: number[][] };
  greedy?: { prompt: number[]; tokens: number[]; margins: number[]; logprobs: number[] }[];
  padding?: { name: string; tokens: number[]; read_position: number; score: number; position_scores: number[] }[];
  pairs?: { chosen: number[]; rejected: number[]; margin: number }[];
  bradley_terry?: PreferenceLoss;
  bradley_terry_margin?: PreferenceLoss;
  bradley_terry_trajectory?: Trajectory & { margin: boolean };
  errors: { float32: Errors; bfloat16: Errors };
}

const fixtures = process.env.LOCKSTEP_FIXTURES ?? join(dirname(fileURLToPath(import.meta.url)), '..', 'fixtures');

/** Folders with a golden.json, by name. */
export function goldenDirectories(): { name: string; directory: string }[] {
  const models = join(fixtures, 'models');
  return readdirSync(models)
    .sort()
    .map((name) => ({ name, directory: join(models, name) }))
    .filter(({ directory }) => existsSync(join(directory, 'golden.json')));
}

export function readGolden(directory: string): Golden {
  return JSON.parse(readFileSync(join(directory, 'golden.json'), 'utf8')) as Golden;
}

/** golden.safetensors, widened to float64. */
export async function readGoldenTensors(directory: string): Promise<Map<string, Float64Array>> {
  const file = join(directory, 'golden.safetensors');
  const bytes = readFileSync(file);
  const tensors = new Map<string, Float64Array>();
  for (const [name, { dtype, offset, bytes: size }] of await readSafetensorsHeader(file)) {
    const data = bytes.buffer.slice(bytes.byteOffset + offset, bytes.byteOffset + offset + size);
    if (dtype === 'F64') tensors.set(name, new Float64Array(data));
    else if (dtype === 'F32') tensors.set(name, Float64Array.from(new Float32Array(data)));
    else throw new Error(`${file}: ${name} is ${dtype}`);
  }
  return tensors;
}
