/** A PPO iteration over four llama-25m models in bfloat16: 32 sequences of 64 + 128 tokens, and its time outside native calls. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { parseConfig } from '../src/train/config.js';
import { train } from '../src/train/train.js';
import { randomTokens, round, spread, writeModel } from './support.js';

const sequences = 32;
const promptLength = 64;
const newTokens = 128;

export async function* measure({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  const folder = await mkdtemp(join(tmpdir(), 'lockstep-bench-'));
  try {
    note('writing a policy and a reward model');
    await writeModel('llama-25m', join(folder, 'policy'), 'language', 1);
    await writeModel('llama-25m', join(folder, 'reward'), 'score', 2);
    const rows = Array.from({ length: sequences * (runs + 1) }, (_, i) =>
      JSON.stringify({ tokens: [...randomTokens(promptLength, 4096, i + 1)] }),
    );
    await writeFile(join(folder, 'prompts.jsonl'), rows.join('\n'));
    const config = parseConfig({
      algorithm: 'ppo',
      model: join(folder, 'policy'),
      reward: { model: join(folder, 'reward') },
      data: { train: join(folder, 'prompts.jsonl') },
      batch: { sequences, microTokens: 2048 },
      rollout: { maxNewTokens: newTokens },
      ppo: { miniBatches: 1 },
      steps: runs + 1,
      threads,
      checkpoint: { every: 0 },
      output: join(folder, 'run'),
    });
    const seconds: number[] = [];
    const outside: number[] = [];
    for await (const event of train(config, { signal })) {
      if (event.type !== 'step') continue;
      const { metrics } = event;
      if (metrics['mismatch.max'] !== 0 || metrics['response.length'] !== newTokens) {
        throw new Error('iteration: the trainer and the rollout disagree, or responses are short');
      }
      note(`iteration ${event.step}: ${(metrics['seconds.step'] as number).toFixed(2)} s`);
      if (event.step === 1) continue;
      seconds.push(metrics['seconds.step'] as number);
      outside.push(1 - (metrics['seconds.native'] as number) / (metrics['seconds.step'] as number));
    }
    const of = spread(seconds);
    yield { name: 'PPO iteration', value: round(of.median), unit: 's', min: round(of.min), max: round(of.max) };
    const share = spread(outside);
    const unit = 'share of an iteration';
    yield {
      name: 'outside native calls',
      value: round(share.median),
      unit,
      min: round(share.min),
      max: round(share.max),
    };
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}
