import { mkdtemp, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { editDistance, LockstepError } from '../../src/errors.js';
import {
  type ConfigOf,
  configJsonSchema,
  defineConfig,
  loadConfig,
  parseBytes,
  parseConfig,
  printConfig,
} from '../../src/train/config.js';
import { presets } from '../../src/train/presets.js';
import { configSchema } from '../../src/train/schema.js';

const sft = { algorithm: 'sft', model: 'm', data: { train: 'd.jsonl' } };
const ppo = { algorithm: 'ppo', model: 'm', data: { train: 'd.jsonl' }, reward: { function: './r.ts' } };

function failure(input: unknown): LockstepError {
  try {
    parseConfig(input);
  } catch (error) {
    expect(LockstepError.isInstance(error)).toBe(true);
    return error as LockstepError;
  }
  throw new Error('the configuration was accepted');
}

async function file(text: string, name = 'c.yaml'): Promise<string> {
  const path = join(await mkdtemp(join(tmpdir(), 'lockstep-config-')), name);
  await writeFile(path, text);
  return path;
}

describe('defaults', () => {
  it('are those of the contract', () => {
    expect(parseConfig(ppo)).toMatchObject({
      data: { shuffle: true, onError: 'stop' },
      dtype: 'bfloat16',
      optimizer: {
        learningRate: 1e-6,
        betas: [0.9, 0.95],
        epsilon: 1e-8,
        weightDecay: 0.1,
        clipNorm: 1,
        schedule: 'constant',
        warmupSteps: 0,
      },
      batch: { sequences: 64, microTokens: 8192 },
      rollout: {
        samples: 1,
        maxNewTokens: 256,
        temperature: 1,
        topP: 1,
        topK: 0,
        speculation: 0,
        stop: [],
        truncation: 'keep',
      },
      ppo: {
        epochs: 1,
        miniBatches: 4,
        clip: 0.2,
        valueClip: 0.2,
        gamma: 1,
        lambda: 0.95,
        klCoefficient: 0.05,
        kl: { in: 'reward', estimator: 'k1', controller: 'fixed' },
      },
      parallel: { pipeline: 1, tensor: 1, data: 1, zero: 0, schedule: '1f1b' },
      placement: 'colocated',
      memory: { device: 'auto', host: '16GiB', offload: 'none' },
      numerics: { parts: 'auto' },
      checks: { mismatch: 'first' },
      evaluation: { every: 50 },
      steps: 100,
      seed: 0,
      checkpoint: { every: 20, keep: 2 },
    });
  });

  it('only algorithm, model and data are needed, and a reward for ppo', () => {
    expect(parseConfig(sft).output).toBe('runs/sft');
    expect(failure({ ...ppo, reward: undefined }).message).toContain(
      'reward: expected an object or a list, received nothing',
    );
    expect(failure({ ...ppo, reward: {} }).message).toMatch(/reward: ppo needs a reward/);
  });
});

describe('a resolved configuration', () => {
  const givenMemory = { ...sft, memory: { device: '12GiB' } };
  it.each([sft, ppo, { ...sft, algorithm: 'reward', memory: { device: 1000 } }, givenMemory])(
    'parses to itself: %j',
    (input) => {
      const config = parseConfig(input);
      expect(parseConfig(config)).toEqual(config);
    },
  );

  it('printed and loaded is the same object', async () => {
    const config = parseConfig({
      ...ppo,
      optimizer: { learningRate: 3.3e-7 },
      rollout: { stop: ['\n\nHuman:', ': #'] },
    });
    expect(await loadConfig(await file(printConfig(config)))).toEqual(config);
    expect(await loadConfig(await file(JSON.stringify(config), 'c.json'))).toEqual(config);
  });

  it('is typed by defineConfig, which changes nothing', () => {
    const input = defineConfig({ algorithm: 'sft', model: 'm', data: { train: 'd' } });
    expect(parseConfig(input)).toEqual(parseConfig({ algorithm: 'sft', model: 'm', data: { train: 'd' } }));
  });
});

describe('unknown keys', () => {
  it.each([
    [{ ...sft, optimiser: {} }, 'optimiser', 'optimizer'],
    [{ ...sft, optimizer: { learningrate: 1 } }, 'optimizer.learningrate', 'optimizer.learningRate'],
    [{ ...sft, learningRate: 1 }, 'learningRate', 'optimizer.learningRate'],
    [{ ...ppo, ppo: { kl: { estimater: 'k3' } } }, 'ppo.kl.estimater', 'ppo.kl.estimator'],
    [{ ...ppo, ppo: { minibatches: 2 } }, 'ppo.minibatches', 'ppo.miniBatches'],
  ])('name the nearest known key: %j', (input, key, nearest) => {
    const error = failure(input);
    expect(error.code).toBe('CONFIG_UNKNOWN_KEY');
    expect(error.message).toContain(`${key}: unknown key; did you mean ${nearest}?`);
  });

  it('of another algorithm say whose they are', () => {
    expect(failure({ ...sft, ppo: {} }).message).toContain('ppo: unknown key; it belongs to algorithm: ppo');
  });

  it('without any likeness list what is known there', () => {
    expect(failure({ ...sft, data: { train: 'd', zzzzzzzz: 1 } }).message).toContain(
      'known keys here: train, eval, shuffle, onError',
    );
  });

  it('are all reported at once', () => {
    const error = failure({ ...sft, optimiser: {}, batch: { sequence: 3 }, steps: 'many' });
    expect(error.message.split('\n')).toHaveLength(3);
  });

  it('include __proto__ from a setting', async () => {
    await expect(loadConfig(await file(JSON.stringify(sft)), ['__proto__.x=1'])).rejects.toMatchObject({
      code: 'CONFIG_UNKNOWN_KEY',
    });
  });
});

describe('wrong values', () => {
  it.each([
    [{ ...sft, steps: 'many' }, 'steps: expected a number, received "many"'],
    [{ ...sft, steps: 1.5 }, 'steps: expected a whole number, received 1.5'],
    [{ ...sft, steps: 0 }, 'steps: expected a number > 0, received 0'],
    [{ ...sft, dtype: 'float16' }, 'dtype: expected one of float32, bfloat16, received "float16"'],
    [{ ...sft, optimizer: { betas: [0.9] } }, 'optimizer.betas: expected a list of 2, received [0.9]'],
    [{ ...sft, optimizer: { betas: [0.9, 1] } }, 'optimizer.betas.1: expected a number < 1, received 1'],
    [{ ...sft, data: 'd.jsonl' }, 'data: expected an object, received "d.jsonl"'],
    [{ ...sft, model: '' }, 'model: expected a text that is not empty, received ""'],
    [{ ...sft, memory: { device: 'much' } }, 'memory.device: expected bytes, such as 8GiB'],
    [{ ...sft, numerics: { parts: 'none' } }, 'numerics.parts: expected auto or a number, received "none"'],
    [
      { ...sft, algorithm: 'pppo' },
      'algorithm: expected one of sft, reward, cost, ppo, remax, safe-rlhf, grpo, rloo, reinforce++, distillation, dpo, simpo, orpo, kto, received "pppo"',
    ],
    [
      { ...sft, algorithm: undefined },
      'algorithm: expected one of sft, reward, cost, ppo, remax, safe-rlhf, grpo, rloo, reinforce++, distillation, dpo, simpo, orpo, kto, received nothing',
    ],
    [null, 'configuration: expected an object, received null'],
    [[], 'configuration: expected an object, received []'],
  ])('say the key, what was expected and what came: %j', (input, message) => {
    const error = failure(input);
    expect(error.code).toBe('CONFIG_INVALID');
    expect(error.message).toContain(message);
  });
});

describe('contradictions', () => {
  it.each([
    [{ ...ppo, batch: { sequences: 2 } }, '4 mini-batches cannot be cut from 2 sequences'],
    [{ ...ppo, batch: { sequences: 10 }, rollout: { samples: 4 } }, '10 responses cannot be 4 per prompt'],
    [{ ...ppo, ppo: { kl: { in: 'loss' } } }, 'use k2 or k3'],
    [{ ...ppo, rollout: { temperature: 0 } }, 'a greedy rollout explores nothing'],
    [
      { ...ppo, batch: { microTokens: 16 }, rollout: { maxNewTokens: 16 } },
      'batch.microTokens: 16 tokens are too few for a prompt and 16 new ones',
    ],
    [{ ...sft, steps: 3, optimizer: { warmupSteps: 4 } }, '4 is more than steps (3)'],
    [{ ...sft, numerics: { parts: 3 } }, '3 is not a power of two'],
    [{ ...sft, generation: { tensor: 2 } }, 'generation.tensor: 2 does not divide parallel.tensor (1)'],
    [{ ...sft, parallel: { data: 2, pipeline: 2, zero: 2 } }, 'set zero to 1 or pipeline to 1'],
    [{ ...sft, parallel: { data: 2, tensor: 2, zero: 3 }, generation: {} }, 'set zero to 2 or leave out generation'],
    [{ ...sft, parallel: { zero: 1 } }, 'parallel.data is 1; set zero to 0 or raise data'],
    [{ ...sft, parallel: { data: 4 }, batch: { sequences: 3 } }, '3 rows leave some of the 4 data-parallel ranks'],
    [{ ...sft, parallel: { pipeline: 3, tensor: 8, data: 3 } }, 'are 72 ranks; a process has at most 64'],
  ])('are refused: %j', (input, message) => {
    const error = failure(input);
    expect(error.code).toBe('CONFIG_CONTRADICTION');
    expect(error.message).toContain(message);
  });

  it('the same KL loss with k3 is accepted', () => {
    expect(parseConfig({ ...ppo, ppo: { kl: { in: 'loss', estimator: 'k3' } } })).toMatchObject({ algorithm: 'ppo' });
  });
});

describe('groups of answers', () => {
  const grpo = { ...ppo, algorithm: 'grpo' };
  const rloo = { ...ppo, algorithm: 'rloo' };
  const dpo = { ...sft, algorithm: 'dpo' };
  const plusPlus = { ...ppo, algorithm: 'reinforce++', rollout: { samples: 2 } };
  const section = (given: object) => (parseConfig({ ...grpo, grpo: given }) as { grpo: Record<string, unknown> }).grpo;

  it('a variant sets what its paper sets, and keys that are given win', () => {
    expect(section({})).toMatchObject({ variant: 'grpo', advantage: 'grpo', loss: 'ppo', klCoefficient: 0.04 });
    expect(section({ variant: 'dapo' })).toMatchObject({
      ...{ clip: 0.2, clipHigh: 0.28, klCoefficient: 0, samplingRounds: 4, overlongBuffer: 51 },
      aggregation: { mode: 'token-mean' },
    });
    expect(section({ variant: 'dapo', clipHigh: 0.3 })).toMatchObject({ clipHigh: 0.3 });
    expect(section({ variant: 'gspo' })).toMatchObject({ loss: 'gspo', clip: 3e-4, clipHigh: 4e-4 });
    for (const variant of Object.keys(presets)) {
      const parsed = parseConfig({ ...grpo, grpo: { variant } });
      expect(parseConfig(parsed)).toEqual(parsed);
    }
    expect(failure({ ...grpo, grpo: { variant: 'dopa' } }).message).toContain(
      'grpo.variant: expected one of grpo, dr-grpo',
    );
  });

  it('a variant keeps what a given section leaves out', () => {
    expect(section({ variant: 'dr-grpo', aggregation: { horizon: 512 } })).toMatchObject({
      aggregation: { mode: 'seq-mean-token-sum-norm', sequences: 'all', horizon: 512 },
    });
    expect(section({ variant: 'dr-grpo', aggregation: { sequences: 'none' } })).toMatchObject({
      aggregation: { mode: 'seq-mean-token-sum-norm', sequences: 'none' },
    });
  });

  it('the baseline form of reinforce++ has another estimator of KL', () => {
    const estimator = (given: object) =>
      (parseConfig({ ...plusPlus, 'reinforce++': given }) as ConfigOf<'reinforce++'>)['reinforce++'].klEstimator;
    expect([{}, { baseline: true }, { baseline: true, klEstimator: 'k3' }].map(estimator)).toEqual(['k1', 'k2', 'k3']);
    expect(estimator({ baseline: true, klEstimator: 'k1', klCoefficient: 0 })).toBe('k1');
  });

  it.each([
    { ...grpo, grpo: { loss: 'ppo', clipHigh: 0.3, dualClip: 3 } },
    { ...rloo, rloo: { loss: 'dppo', clipHigh: 0.3 } },
    { ...dpo, dpo: { loss: 'ipo', lengthNormalised: true } },
    { ...dpo, dpo: { loss: 'exo-pair', labelSmoothing: 0.01 } },
    { ...dpo, dpo: { loss: 'robust', labelSmoothing: 0 } },
    { ...ppo, ptx: { data: 'd', sequences: 4 } },
  ])('%j has keys that are read', (input) => {
    expect(parseConfig(input).algorithm).toBe(input.algorithm);
  });

  it.each([
    [{ ...grpo, grpo: { loss: 'sapo', clipHigh: 0.3 } }, 'grpo.clipHigh: the loss sapo does not read it'],
    [{ ...rloo, rloo: { loss: 'gmpo', dualClip: 3 } }, 'rloo.dualClip: the loss gmpo does not read it'],
    [
      { ...rloo, rloo: { aggregation: { horizon: 9 } } },
      'rloo.aggregation.horizon: seq-mean-token-mean does not divide',
    ],
    [
      { ...grpo, grpo: { variant: 'dapo' }, reference: { model: 'm' } },
      'reference.model: there is no KL term where grpo.klCoefficient is 0',
    ],
    [{ ...ppo, ptx: { data: 'd', sequences: 3 } }, 'ptx.sequences: 3 rows cannot be part of 4 mini-batches'],
    [
      { ...sft, algorithm: 'distillation', teacher: { model: 't' }, rollout: { truncation: 'penalise' } },
      'rollout.truncation: distillation has no reward',
    ],
    [{ ...dpo, dpo: { loss: 'hinge', labelSmoothing: 0.1 } }, 'dpo.labelSmoothing: the loss hinge does not read it'],
    [{ ...dpo, dpo: { lengthNormalised: true } }, 'dpo.lengthNormalised: the loss dpo does not read it'],
    [
      { ...dpo, dpo: { loss: 'exo-pair', labelSmoothing: 0 } },
      'dpo.labelSmoothing: the loss exo-pair has its logarithm',
    ],
    [{ ...grpo, rollout: { samples: 1 } }, 'rollout.samples: grpo judges an answer against the others of its prompt'],
    [{ ...grpo, algorithm: 'rloo', rollout: { samples: 1 } }, 'rollout.samples: rloo judges'],
    [{ ...grpo, grpo: { kl: { estimator: 'k1' } } }, 'grpo.kl: the gradient of k1 as a loss is zero'],
    [{ ...grpo, grpo: { miniBatches: 128 } }, 'grpo.miniBatches: 128 mini-batches cannot be cut from 64 sequences'],
    [
      { ...plusPlus, 'reinforce++': { baseline: true, klEstimator: 'k1' } },
      'reinforce++.klEstimator: the baseline form has KL in the loss',
    ],
    [{ ...sft, algorithm: 'kto', batch: { sequences: 1 } }, 'batch.sequences: the point of reference pairs prompts'],
    [
      { ...ppo, algorithm: 'safe-rlhf', cost: {} },
      'cost: safe-rlhf needs a cost; set cost.model, cost.function, or a list of terms',
    ],
  ])('%j contradicts itself', (input, message) => {
    const error = failure(input);
    expect(error.code).toBe('CONFIG_CONTRADICTION');
    expect(error.message).toContain(message);
  });
});

describe('keys that other keys leave without a reader', () => {
  const grpo = { ...ppo, algorithm: 'grpo' };
  const rloo = { ...ppo, algorithm: 'rloo', rollout: { samples: 2 } };
  const safe = { ...ppo, algorithm: 'safe-rlhf', cost: { function: './c.ts' } };
  const plusPlus = { ...ppo, algorithm: 'reinforce++', rollout: { samples: 2 } };

  it.each([
    [
      { ...grpo, grpo: { variant: 'sapo', clip: 0.1 } },
      'grpo.clip: the loss sapo does not read it; leave it out, or use ppo,',
    ],
    [{ ...grpo, grpo: { variant: 'opo', clip: 0.1 } }, 'grpo.clip: the loss reinforce does not read it'],
    [{ ...rloo, rloo: { loss: 'gpg', clip: 0.1 } }, 'rloo.clip: the loss gpg does not read it'],
    [
      { ...grpo, grpo: { aggregation: { mode: 'token-mean', sequences: 'all' } } },
      'grpo.aggregation.sequences: token-mean does not divide by a number of sequences',
    ],
    [
      { ...grpo, grpo: { klCoefficient: 0, kl: { in: 'reward' } } },
      'grpo.kl.in: there is no KL term where grpo.klCoefficient is 0',
    ],
    [{ ...ppo, ppo: { klCoefficient: 0, kl: { estimator: 'k3' } } }, 'ppo.kl.estimator: there is no KL term'],
    [{ ...ppo, ppo: { klCoefficient: 0 }, reference: { model: 'm' } }, 'reference.model: there is no KL term'],
    [
      { ...ppo, ppo: { kl: { target: 3 } } },
      'ppo.kl.target: ppo.kl.controller is fixed; leave it out, or set that to adaptive',
    ],
    [{ ...ppo, ppo: { kl: { horizon: 30 } } }, 'ppo.kl.horizon: ppo.kl.controller is fixed'],
    [{ ...ppo, ppo: { klCoefficient: 0, kl: { controller: 'adaptive' } } }, 'ppo.kl.controller: adaptive multiplies'],
    [
      { ...plusPlus, 'reinforce++': { baseline: true, gamma: 0.9 } },
      'reinforce++.gamma: the baseline form has one advantage',
    ],
    [
      { ...ppo, rollout: { truncationPenalty: 2 } },
      'rollout.truncationPenalty: rollout.truncation is keep; leave it out, or set',
    ],
    [{ ...sft, rollout: { truncation: 'mask' } }, 'rollout.truncation: sft learns from no rollouts; leave it out'],
    [{ ...sft, rollout: { samples: 4 } }, 'rollout.samples: sft learns from no rollouts'],
    [{ ...sft, algorithm: 'dpo', checks: { mismatch: 'all' } }, 'checks.mismatch: dpo learns from no rollouts'],
    [
      { ...safe, 'safe-rlhf': { constraint: { initial: 10 } } },
      'safe-rlhf.constraint.initial: 10 is more than maximum (5)',
    ],
    [
      { ...grpo, rollout: { maxNewTokens: 64 }, grpo: { overlongBuffer: 65 } },
      'grpo.overlongBuffer: the last 65 tokens are more than an answer has (rollout.maxNewTokens 64)',
    ],
  ])('are refused: %j', (input, message) => {
    const error = failure(input);
    expect(error.code).toBe('CONFIG_CONTRADICTION');
    expect(error.message).toContain(message);
  });

  it.each([
    { ...grpo, grpo: { variant: 'sapo', clip: 0.2 } },
    { ...grpo, grpo: { variant: 'gspo', loss: 'reinforce' } },
    { ...grpo, grpo: { variant: 'dr-grpo', aggregation: { mode: 'token-mean' } } },
    { ...plusPlus, 'reinforce++': { klCoefficient: 0, baseline: true } },
    { ...ppo, rollout: { truncation: 'penalise', truncationPenalty: 2 } },
    { ...ppo, ppo: { kl: { controller: 'adaptive', target: 3 } } },
    { ...safe, 'safe-rlhf': { constraint: { initial: 5 } } },
    { ...grpo, program: './p.ts', grpo: { loss: 'sapo', clip: 0.1 } },
  ])('are not refused by values that nobody gave, nor before a program that may read them: %j', (input) => {
    const parsed = parseConfig(input);
    expect(parseConfig(parsed)).toEqual(parsed);
  });

  it('are none of those of any algorithm with its defaults', () => {
    const needs = { reward: { function: './r.ts' }, cost: { function: './c.ts' }, teacher: { model: 't' } };
    for (const option of configSchema.options) {
      const algorithm = option.shape.algorithm.value;
      const own = Object.entries(needs).filter(([key]) => key in option.shape);
      const samples = algorithm === 'grpo' || algorithm === 'rloo' ? { rollout: { samples: 2 } } : {};
      const parsed = parseConfig({ ...sft, algorithm, ...Object.fromEntries(own), ...samples });
      expect(parseConfig(parsed)).toEqual(parsed);
    }
  });
});

describe('--set', () => {
  it('takes YAML scalars at a path, making sections on the way', async () => {
    const path = await file('algorithm: sft\nmodel: m\ndata: {train: d}\n');
    const config = await loadConfig(path, [
      'optimizer.learningRate=1e-3',
      'data.shuffle=false',
      'optimizer.betas=[0.8, 0.9]',
      'output=runs/a=b',
    ]);
    expect(config).toMatchObject({
      optimizer: { learningRate: 1e-3, betas: [0.8, 0.9] },
      data: { train: 'd', shuffle: false },
      output: 'runs/a=b',
    });
  });

  it('is checked like the file', async () => {
    const path = await file(JSON.stringify(sft));
    await expect(loadConfig(path, ['optimizer.lerningRate=1'])).rejects.toThrow('did you mean optimizer.learningRate');
    await expect(loadConfig(path, ['steps'])).rejects.toMatchObject({ code: 'USAGE_SET' });
    await expect(loadConfig(path, ['model.path=x'])).rejects.toMatchObject({ code: 'USAGE_SET' });
  });
});

describe('configuration files', () => {
  it('that are missing or no YAML are named', async () => {
    await expect(loadConfig('/nowhere/c.yaml')).rejects.toMatchObject({ code: 'CONFIG_FILE_MISSING' });
    await expect(loadConfig(await file('a: [1,'))).rejects.toMatchObject({ code: 'CONFIG_SYNTAX' });
    await expect(loadConfig(await file('- 1'))).rejects.toMatchObject({ code: 'CONFIG_INVALID' });
  });
});

describe('the JSON Schema', () => {
  it('describes every algorithm and requires only what has no default', () => {
    const { oneOf } = configJsonSchema() as {
      oneOf: { required: string[]; properties: { algorithm: { const: string } } }[];
    };
    const required = oneOf.map(({ required, properties }) => [
      properties.algorithm.const,
      required.filter((key) => !['algorithm', 'data', 'model'].includes(key)),
    ]);
    expect(Object.fromEntries(required)).toEqual({
      ...Object.fromEntries(['sft', 'reward', 'cost', 'dpo', 'simpo', 'orpo', 'kto'].map((name) => [name, []])),
      ...Object.fromEntries(['ppo', 'remax', 'grpo', 'rloo', 'reinforce++'].map((name) => [name, ['reward']])),
      'safe-rlhf': ['reward', 'cost'],
      distillation: ['teacher'],
    });
  });
});

it('sizes are bytes', () => {
  expect([parseBytes('8GiB'), parseBytes('1.5 KiB'), parseBytes('2GB'), parseBytes(7)]).toEqual([
    2 ** 33,
    1536,
    2e9,
    7,
  ]);
});

it('the edit distance counts insertions, deletions and replacements', () => {
  expect([editDistance('kitten', 'sitting'), editDistance('', 'abc'), editDistance('same', 'same')]).toEqual([3, 3, 0]);
});
