/** Training with the real engine through the command line: the fixtures' trajectory, and a chain sft -> reward -> ppo. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { digests } from '../digests.js';
import { configFile, fixtures, lockstep, metricsOf, smallModel, temporary, writeRows } from './train-process.js';

let folder: string;
beforeAll(async () => {
  folder = await temporary();
});

interface Golden {
  sequences: { tokens: number[] }[];
  sft?: {
    adamw: Record<'steps' | 'lr' | 'beta1' | 'beta2' | 'eps' | 'weight_decay' | 'max_grad_norm', number>;
    sequences: (number | number[])[];
    losses: number[];
    grad_norms: number[];
  };
}

const models = join(fixtures, 'models');
const golden = (path: string): Golden => JSON.parse(readFileSync(join(models, path, 'golden.json'), 'utf8'));

function trajectories(): string[] {
  const names = readdirSync(models).filter((name) => existsSync(join(models, name, 'golden.json')));
  return names.filter((name) => golden(name).sft !== undefined).sort();
}

describe('fine-tuning follows the AdamW trajectory', () => {
  it.each(
    trajectories().flatMap(
      (name) =>
        [
          [name, {}],
          [name, { data: 2, zero: 1 }],
        ] as const,
    ),
  )('%s, parallel %j', async (name, parallel) => {
    const { sft, sequences } = golden(name);
    const { adamw, losses, grad_norms } = sft!;
    const rows = sft!.sequences.map((s) => ({ tokens: typeof s === 'number' ? sequences[s]!.tokens : s }));
    const output = join(folder, `trajectory-${name}-${Object.keys(parallel).length}`);
    const config = await configFile(
      folder,
      {
        algorithm: 'sft',
        model: join(models, name),
        data: { train: await writeRows(join(folder, `${name}.jsonl`), rows), shuffle: false },
        dtype: 'float32',
        batch: { sequences: rows.length, microTokens: 48 },
        steps: adamw.steps,
        parallel,
        optimizer: {
          learningRate: adamw.lr,
          betas: [adamw.beta1, adamw.beta2],
          epsilon: adamw.eps,
          weightDecay: adamw.weight_decay,
          clipNorm: adamw.max_grad_norm,
        },
        output,
      },
      `${name}.json`,
    );
    const { code, stderr, stdout } = await lockstep(['train', config, '--json']);
    expect([code, stderr]).toEqual([0, expect.any(String)]);
    const metrics = await metricsOf(output);
    expect(
      stdout
        .trimEnd()
        .split('\n')
        .map((line) => JSON.parse(line)),
    ).toEqual(metrics);
    expect(metrics).toHaveLength(losses.length);
    metrics.forEach((row, i) => {
      expect(Math.abs(row.loss! - losses[i]!)).toBeLessThan(3.2e-5);
      expect(Math.abs(row['gradient.norm']! / grad_norms[i]! - 1)).toBeLessThan(8e-5);
    });
  });
});

describe('sft, then a reward model, then ppo', () => {
  const chat = (i: number) => `\n\nHuman: count from ${i % 7}\n\nAssistant:`;
  const good = (i: number) => ` ${i % 7} ${(i + 1) % 7} ${(i + 2) % 7}`;

  it('runs on text in both directions, with the canary over every token', async () => {
    const prompts = Array.from({ length: 24 }, (_, i) => chat(i));
    const common = {
      dtype: 'bfloat16',
      batch: { sequences: 8, microTokens: 2048 },
      steps: 3,
      memory: { device: '2GiB' },
    };
    const optimizer = { learningRate: 1e-3 };
    const train = async (name: string, config: object, rows: readonly object[]) => {
      const data = { train: await writeRows(join(folder, `${name}.jsonl`), rows), eval: join(folder, `${name}.jsonl`) };
      const output = join(folder, name);
      const path = await configFile(folder, { ...common, optimizer, data, output, ...config }, `${name}.json`);
      const { code, stderr } = await lockstep(['train', path]);
      expect([name, code, stderr]).toEqual([name, 0, expect.any(String)]);
      return join(output, 'checkpoints', 'step-000003');
    };
    const policy = await train(
      'sft',
      { algorithm: 'sft', model: smallModel, rollout: { maxNewTokens: 8 } },
      prompts.map((prompt, i) => ({ prompt, response: good(i) })),
    );
    const scorer = await train(
      'reward',
      { algorithm: 'reward', model: policy },
      prompts.map((prompt, i) => ({ chosen: prompt + good(i), rejected: `${prompt} no` })),
    );
    const ppo = {
      algorithm: 'ppo',
      model: policy,
      reward: { model: scorer },
      rollout: { samples: 2, maxNewTokens: 10 },
      ppo: { miniBatches: 2 },
      checks: { mismatch: 'all' },
    };
    const tuned = await train(
      'ppo',
      ppo,
      prompts.map((prompt) => ({ prompt })),
    );
    const [before, first] = await metricsOf(join(folder, 'ppo'));
    expect(before).toMatchObject({ step: 0, 'eval.reward.mean': expect.any(Number) });
    expect(first).toMatchObject({ step: 1, 'mismatch.max': 0, 'policy.clipFraction': expect.any(Number) });
    expect(first!['mismatch.tokens']).toBe(Math.round(8 * first!['response.length']!));
    const kept = (await readFile(join(folder, 'ppo', 'rollouts', 'eval-000003.jsonl'), 'utf8')).trim().split('\n');
    expect(JSON.parse(kept[0]!)).toMatchObject({ index: 0, prompt: chat(0), response: expect.any(String) });
    const critic = JSON.parse(await readFile(join(tuned, 'critic', 'config.json'), 'utf8'));
    expect(critic.architectures).toEqual(['LlamaForTokenClassification']);
    const generated = await lockstep(['generate', tuned, '--prompt', chat(1), '--max-new-tokens', '4', '--json']);
    expect([generated.code, JSON.parse(generated.stdout).tokens.length]).toEqual([0, expect.any(Number)]);
  });

  it('guessed tokens change no byte of a run, which may turn them on when it goes on', async () => {
    const rows = Array.from({ length: 8 }, (_, i) => ({ prompt: chat(i) + good(i) + good(i) + good(i) }));
    const train = await writeRows(join(folder, 'guessed.jsonl'), rows);
    const ran = async (name: string, speculation: number, steps = 2, ...flags: string[]) => {
      const output = join(folder, name);
      const config = {
        ...{ algorithm: 'grpo', model: smallModel, data: { train }, dtype: 'float32', output, steps },
        ...{ batch: { sequences: 4 }, reward: [{ length: { max: 30, buffer: 10 } }], memory: { device: '2GiB' } },
        ...{ rollout: { samples: 2, maxNewTokens: 40, temperature: 0.02, speculation }, checks: { mismatch: 'all' } },
      };
      const path = await configFile(folder, config, `${name}.json`);
      const { code, stderr } = await lockstep(['train', path, ...flags]);
      expect([name, code, stderr]).toEqual([name, 0, expect.any(String)]);
      return { bytes: await digests(join(output, 'checkpoints', `step-00000${steps}`)), rows: await metricsOf(output) };
    };
    const plain = await ran('plain', 0);
    const guessed = await ran('guessed', 3);
    expect(guessed.bytes).toEqual(plain.bytes);
    await ran('resumed', 0, 1);
    expect((await ran('resumed', 3, 2, '--resume')).bytes).toEqual(plain.bytes);
    expect(plain.rows[0]).not.toHaveProperty(['speculation.tokens']);
    for (const row of guessed.rows) {
      expect(row['speculation.accepted']).toBeGreaterThan(0);
      expect(row['speculation.tokens']).toBeGreaterThanOrEqual(row['speculation.accepted']!);
    }
    const [prompt] = rows;
    const words = [
      'generate',
      smallModel,
      '--prompt',
      prompt!.prompt,
      '--max-new-tokens',
      '200',
      '--temperature',
      '0',
      '--ignore-eos',
    ];
    const [alone, guessing] = [await lockstep(words), await lockstep([...words, '--speculate', '3'])];
    expect(guessing.stdout).toBe(alone.stdout);
    expect(guessing.stderr).toMatch(/^[1-9]\d* of [1-9]\d* guessed tokens were right$/m);
  });

  it('a TypeScript reward with await, and one that throws', async () => {
    const reward = join(folder, 'reward.ts');
    await writeFile(
      reward,
      `interface Sample { response: string; row: { wanted: string } }
      export default async (samples: readonly Sample[]): Promise<number[]> => {
        await new Promise((resolve) => setTimeout(resolve, 5));
        return samples.map(({ response, row }) => (response.includes(row.wanted) ? 1 : 0));
      };`,
    );
    const rows = Array.from({ length: 8 }, (_, i) => ({ prompt: `count ${i}`, wanted: 'e' }));
    const config = (name: string, path: string) =>
      configFile(
        folder,
        {
          algorithm: 'ppo',
          model: smallModel,
          data: { train: join(folder, 'prompts.jsonl') },
          batch: { sequences: 8, microTokens: 1024 },
          rollout: { maxNewTokens: 6 },
          ppo: { miniBatches: 2 },
          reward: { function: path },
          steps: 1,
          output: join(folder, name),
        },
        `${name}.json`,
      );
    await writeRows(join(folder, 'prompts.jsonl'), rows);
    expect((await lockstep(['train', await config('typed', reward)])).code).toBe(0);
    await writeFile(join(folder, 'throws.ts'), "export default () => { throw new Error('no idea'); };\n");
    const thrown = await lockstep(['train', await config('throwing', join(folder, 'throws.ts'))]);
    expect([thrown.code, thrown.stderr]).toEqual([1, expect.stringMatching(/sample 0[\s\S]*no idea/)]);
    expect(thrown.stderr).not.toMatch(/^\s+at /m);
  });
});
