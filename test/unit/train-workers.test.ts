import { describe, expect, it } from 'vitest';
import { packBatch } from '../../src/data/batch.js';
import { countUnknown, generatedText } from '../../src/data/generated-text.js';
import { StopStrings } from '../../src/data/stop-strings.js';
import { loadTokenizer } from '../../src/data/tokenizer.js';
import type { Engine, StepOptions } from '../../src/engine/engine.js';
import { parseModelConfig, withHead } from '../../src/layout/config.js';
import type { Loss } from '../../src/losses/loss.js';
import { pretrainingLoss } from '../../src/losses/mixed.js';
import { bradleyTerry } from '../../src/losses/reward-model.js';
import { crossEntropy } from '../../src/losses/sft.js';
import { initialScoreHead } from '../../src/train/roles.js';
import { ActorWorker } from '../../src/workers/actor.js';
import { forwardAll, offsets } from '../../src/workers/batches.js';
import { Canary } from '../../src/workers/canary.js';
import { computeLoss, learn, takeRows } from '../../src/workers/learn.js';
import { learner } from '../../src/workers/learner.js';
import { packRollout } from '../../src/workers/responses.js';
import { RewardWorker } from '../../src/workers/reward.js';
import { TableEngine } from './train-fake-engine.js';

const shape = parseModelConfig(
  {
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    hidden_size: 4,
    intermediate_size: 4,
    num_attention_heads: 1,
    num_hidden_layers: 1,
    vocab_size: 9,
    max_position_embeddings: 32,
    rms_norm_eps: 1e-6,
    hidden_act: 'silu',
    tie_word_embeddings: false,
  },
  'config.json',
);

function engine(head: 'language' | 'value' | 'score' = 'language', padToken: number | null = null): TableEngine {
  const table = new TableEngine({ ...withHead(shape, head), padToken });
  for (const [n, tensor] of [...table.spaces.weights.values()].entries()) {
    for (let i = 0; i < tensor.length; i++) tensor[i] = Math.sin(1 + n * 31 + i * 7);
  }
  return table;
}

const sequences = [
  [1, 2, 3],
  [4, 5],
  [6, 7, 8, 1, 2],
  [3, 1],
  [5, 5, 5, 5],
].map((s) => Int32Array.from(s));
const learned = packBatch(sequences);
const mask = Uint8Array.from(learned.tokens, (_, t) => (offsets(learned.lengths).includes(t + 1) ? 0 : 1));
const batch = { ...learned, mask, columns: {} };
const optimizer: StepOptions = {
  learningRate: 0.1,
  betas: [0.9, 0.95],
  epsilon: 1e-8,
  weightDecay: 0,
  clipNorm: 0,
  step: 1,
};

/** Records the steps of an engine, and lets them change nothing. */
function recording(table: TableEngine): { engine: Engine; steps: { options: StepOptions; gradients: Float32Array }[] } {
  const steps: { options: StepOptions; gradients: Float32Array }[] = [];
  const fake = Object.assign(Object.create(table) as TableEngine, {
    step: async (options: StepOptions) => {
      const gradients = table.spaces.gradients.get('lm_head.weight') ?? table.spaces.gradients.get('score.weight')!;
      steps.push({ options, gradients: gradients.slice() });
      for (const gradient of table.spaces.gradients.values()) gradient.fill(0);
      return { gradientNorm: 1 };
    },
  });
  return { engine: fake, steps };
}

describe('learn', () => {
  it('the gradient of a batch is the same however it is cut into micro-batches', async () => {
    const gradients: Float32Array[] = [];
    for (const microTokens of [2, 6, 8, 100]) {
      const { engine: fake, steps } = recording(engine());
      await learn(fake, batch, crossEntropy(), { microTokens, epochs: 1, miniBatches: 1, optimizer });
      gradients.push(steps[0]!.gradients);
    }
    for (const other of gradients) expect(other).toEqual(gradients[0]);
    expect(gradients[0]!.some((g) => g !== 0)).toBe(true);
  });

  it('the loss is the mean over the learned tokens of the mini-batch', async () => {
    const table = engine();
    const logprobs = await forwardAll(table, batch, 'logprobs', { microTokens: 100 });
    const count = mask.reduce((a, b) => a + b, 0);
    const expected = -logprobs.reduce((sum, lp, t) => sum + (mask[t] ? lp : 0), 0) / count;
    const { engine: fake } = recording(table);
    const { loss } = await learn(fake, batch, crossEntropy(), { microTokens: 4, epochs: 1, miniBatches: 1, optimizer });
    expect(loss).toBeCloseTo(expected, 10);
    expect((await computeLoss(table, batch, crossEntropy(), { microTokens: 3 })).loss).toBeCloseTo(expected, 10);
  });

  it('visits every row once per epoch, in an order of its own', async () => {
    const seen: number[][] = [];
    const spy: Loss = {
      couples: 'token',
      reads: ['logprobs', 'ids'],
      formula: (t) => {
        seen.push([...new Set(t.ids!.data)]);
        return t.logprobs!.sum();
      },
    };
    const ids = Float64Array.from(batch.tokens, (_, t) => offsets(batch.lengths).findIndex((end) => end > t) - 1);
    const { engine: fake, steps } = recording(engine());
    await learn(fake, { ...batch, columns: { ids } }, spy, {
      microTokens: 4,
      epochs: 3,
      miniBatches: 2,
      optimizer: { ...optimizer, step: 7 },
      shuffle: { seed: 1, firstPass: 0 },
    });
    expect(steps.map(({ options }) => options.step)).toEqual([7, 8, 9, 10, 11, 12]);
    const rows = seen.flat();
    expect(rows).toHaveLength(15);
    const epochs = [rows.slice(0, 5), rows.slice(5, 10), rows.slice(10)];
    for (const epoch of epochs) expect([...epoch].sort()).toEqual([0, 1, 2, 3, 4]);
    expect(new Set(epochs.map(String)).size).toBeGreaterThan(1);
  });

  it('keeps pairs together', async () => {
    const pairs = packBatch([...sequences, Int32Array.of(8)]);
    const ends = offsets(pairs.lengths).slice(1);
    const pairMask = Uint8Array.from(pairs.tokens, (_, t) => (ends.includes(t + 1) ? 1 : 0));
    const whole = { ...pairs, mask: pairMask, columns: { margins: new Float64Array(pairs.tokens.length) } };
    const results = await Promise.all(
      [1, 6, 100].map(async (microTokens) => {
        const { engine: fake, steps } = recording(engine('score'));
        const { loss } = await learn(fake, whole, bradleyTerry(), {
          microTokens,
          epochs: 1,
          miniBatches: 1,
          optimizer,
        });
        return [loss, [...steps[0]!.gradients]];
      }),
    );
    for (const [loss, gradient] of results) {
      expect(loss).toBeCloseTo(results[0]![0] as number, 12);
      expect(gradient).toEqual(results[0]![1]);
    }
  });

  it('a loss that is no number stops before the update it would spoil', async () => {
    const { engine: fake, steps } = recording(engine());
    const broken: Loss = { couples: 'token', reads: ['logprobs'], formula: (t) => t.logprobs!.sum().times(Number.NaN) };
    await expect(
      learn(fake, batch, broken, { microTokens: 9, epochs: 1, miniBatches: 1, optimizer }),
    ).rejects.toMatchObject({
      code: 'LOSS_NOT_FINITE',
    });
    expect(steps).toEqual([]);
  });

  it('updates number their steps one after the other, whatever their shape, and have the rate of the iteration', async () => {
    const { engine: fake, steps } = recording(engine());
    const learningRate = (iteration: number) => iteration / 10;
    const count = { updates: 8, passes: 4 };
    const worker = learner(fake, { microTokens: 9, optimizer, learningRate, seed: 1, count });
    await worker.update(batch, crossEntropy(), { epochs: 2, miniBatches: 2, iteration: 3 });
    await worker.update(batch, crossEntropy(), { epochs: 1, miniBatches: 2, iteration: 3 });
    await worker.update(batch, crossEntropy(), { epochs: 1, miniBatches: 9, iteration: 4 });
    expect(steps.map(({ options }) => [options.step, options.learningRate])).toEqual([
      ...[9, 10, 11, 12, 13, 14].map((n) => [n, 0.3]),
      ...[15, 16, 17, 18, 19].map((n) => [n, 0.4]),
    ]);
    expect(count).toEqual({ updates: 19, passes: 8 });
  });

  it('two updates of one iteration take the rows in orders of their own', async () => {
    const { engine: fake, steps } = recording(engine());
    const worker = learner(fake, { microTokens: 9, optimizer, learningRate: () => 0, seed: 1 });
    const order = async () => {
      steps.length = 0;
      await worker.update(batch, crossEntropy(), { epochs: 1, miniBatches: 5, iteration: 1 });
      return steps.map(({ gradients }) => String(gradients));
    };
    const [first, second] = [await order(), await order()];
    expect(first).not.toEqual(second);
    expect(first.sort()).toEqual(second.sort());
  });

  it('an addition of fewer rows than mini-batches reports its mean over those that had one', async () => {
    for (const rows of [[0], [0, 1]]) {
      const also = [{ experience: takeRows(batch, Int32Array.from(rows)), loss: pretrainingLoss(1) }];
      const still = { ...optimizer, learningRate: 0 };
      const options = { microTokens: 9, epochs: 1, miniBatches: 3, optimizer: still, also };
      const { statistics } = await learn(recording(engine()).engine, batch, crossEntropy(), options);
      const values = rows.map(async (row) => {
        const alone = takeRows(batch, Int32Array.of(row));
        return (await computeLoss(engine(), alone, crossEntropy(), { microTokens: 9 })).loss;
      });
      const mean = (await Promise.all(values)).reduce((sum, value) => sum + value, 0) / rows.length;
      expect(statistics.pretrainingLoss).toBeCloseTo(mean, 10);
    }
  });

  it('an addition has the temperature of its own, 1 unless given, beside a batch of another', async () => {
    const experience = takeRows(batch, Int32Array.of(2, 4));
    const gradientOf = async (given: Parameters<typeof learn>[1], loss: Loss, options: object) => {
      const { engine: fake, steps } = recording(engine());
      const settings = { microTokens: 100, epochs: 1, miniBatches: 1, optimizer };
      const result = await learn(fake, given, loss, { ...settings, ...options });
      return { ...result, gradients: steps[0]!.gradients };
    };
    const main = await gradientOf(batch, crossEntropy(), { temperature: 0.5 });
    for (const temperature of [undefined, 2]) {
      const alone = await gradientOf(experience, pretrainingLoss(1), temperature ? { temperature } : {});
      const addition = { experience, loss: pretrainingLoss(1), temperature };
      const both = await gradientOf(batch, crossEntropy(), { temperature: 0.5, also: [addition] });
      expect(both.statistics.pretrainingLoss).toBeCloseTo(alone.statistics.pretrainingLoss!, 12);
      both.gradients.forEach((g, i) => {
        expect(g).toBeCloseTo(main.gradients[i]! + alone.gradients[i]!, 5);
      });
    }
  });

  it('more mini-batches than rows make one of each row', async () => {
    const { engine: fake, steps } = recording(engine());
    await learn(fake, batch, crossEntropy(), { microTokens: 9, epochs: 1, miniBatches: 9, optimizer });
    expect(steps).toHaveLength(5);
  });
});

it('rows taken from a batch bring their share of every array', () => {
  const {
    tokens,
    lengths,
    mask: taken,
    columns,
  } = takeRows({ ...batch, columns: { c: batch.tokens } }, Int32Array.of(3, 0));
  expect([[...tokens], [...lengths], [...(taken as Float64Array)], [...(columns.c as Float64Array)]]).toEqual([
    [3, 1, 1, 2, 3],
    [2, 3],
    [1, 0, 1, 1, 0],
    [3, 1, 1, 2, 3],
  ]);
});

describe('a rollout', () => {
  const prompts = [[1, 2], [3]].map((tokens) => ({ tokens: Int32Array.from(tokens), row: {} }));
  const rollout = packRollout(prompts, [
    { tokens: Int32Array.of(7, 8), logprobs: Float32Array.of(-1, -2), finish: 'stop' },
    { tokens: Int32Array.of(4), logprobs: Float32Array.of(-3), finish: 'length' },
  ]);

  it('has each sampled token one position before it stands', () => {
    expect([...rollout.tokens]).toEqual([1, 2, 7, 8, 3, 4]);
    expect([...rollout.responseMask]).toEqual([0, 1, 1, 0, 1, 0]);
    expect([...rollout.logprobs]).toEqual([0, -1, -2, 0, -3, 0]);
    expect(rollout.finish).toEqual(['stop', 'length']);
  });

  it('passes the canary when all sampled log-probs are equal, wherever the others are', () => {
    const canary = new Canary(rollout);
    canary.compare(rollout, [0, 1], Float32Array.of(9, -1, -2, 9, -3, 9));
    canary.compare({ tokens: Int32Array.of(3, 4), lengths: Int32Array.of(2) }, [1], Float32Array.of(-3, 9));
    expect(canary.report()).toEqual({ max: 0, tokens: 3 });
  });

  it('trips the canary at one different bit, with place and values', () => {
    const off = Math.fround(-3 * (1 + 2 ** -23));
    const compare = () =>
      new Canary(rollout).compare(
        { tokens: Int32Array.of(3, 4), lengths: Int32Array.of(2) },
        [1],
        Float32Array.of(off, 0),
      );
    expect(compare).toThrow(
      expect.objectContaining({ details: { sequence: 1, position: 1, token: 4, trainer: off, rollout: -3 } }),
    );
  });
});

describe('an actor', () => {
  const settings = (sampling = {}) => ({
    microTokens: 64,
    optimizer,
    learningRate: () => 0.1,
    seed: 1,
    sampling: { maxNewTokens: 6, temperature: 1, topP: 1, topK: 0, stopTokens: [0], seed: 3, ...sampling },
    mismatch: 'all' as const,
  });
  const prompts = [[1], [2, 3], [4]].map((tokens) => ({ tokens: Int32Array.from(tokens), row: {} }));

  it('samples by iteration and index, whatever came before', async () => {
    const [a, b] = [ActorWorker.create(engine(), settings()), ActorWorker.create(engine(), settings())];
    await a.generateSequences(prompts, { iteration: 1 });
    const second = await a.generateSequences(prompts, { iteration: 2 });
    expect((await b.generateSequences(prompts, { iteration: 2 })).tokens).toEqual(second.tokens);
    expect((await b.generateSequences(prompts, { iteration: 3 })).tokens).not.toEqual(second.tokens);
    expect((await b.generateForEvaluation(prompts)).tokens).toEqual((await a.generateForEvaluation(prompts)).tokens);
  });

  it('samples and scores one distribution, at the sampling temperature', async () => {
    const actor = ActorWorker.create(engine(), { ...settings({ temperature: 0.7 }), temperature: 0.7 });
    const rollout = await actor.generateSequences(prompts, { iteration: 1 });
    const logprobs = await actor.computeLogprobs(rollout);
    for (const [t, sampled] of rollout.responseMask.entries())
      if (sampled) expect(logprobs[t]).toBe(rollout.logprobs[t]);
  });
});

it('a reward worker reads the score at the rightmost token that is not padding', async () => {
  const table = engine('score', 8);
  const worker = RewardWorker.create(table, { microTokens: 4 });
  const values = async (s: number[]) =>
    (await table.forward(packBatch([Int32Array.from(s)]), { outputs: ['values'] })).values!;
  const padded = packBatch(
    [
      [1, 8, 2, 8, 8],
      [3, 4],
      [8, 8],
    ].map((s) => Int32Array.from(s)),
  );
  const { scores } = await worker.computeRewards(padded);
  expect([...scores]).toEqual([(await values([2]))[0], (await values([4]))[0], (await values([8]))[0]]);
});

it('a new score head is normal with standard deviation 1/sqrt(D + 1), by the seed', () => {
  const head = initialScoreHead(4096, 1);
  const mean = head.reduce((a, b) => a + b, 0) / head.length;
  const deviation = Math.sqrt(head.reduce((a, b) => a + (b - mean) ** 2, 0) / head.length);
  expect(Math.abs(mean)).toBeLessThan(0.001);
  expect(deviation * Math.sqrt(4097)).toBeCloseTo(1, 1);
  expect(initialScoreHead(4096, 1)).toEqual(head);
  expect(initialScoreHead(4096, 2)).not.toEqual(head);
});

describe('generated text', () => {
  it('shows ids that the tokenizer lacks, which decode refuses', async () => {
    const tokenizer = await loadTokenizer('test/fixtures/models/llama');
    const [a, b] = ['river', ' stone'].map((text) => [...tokenizer.encode(text, { special: false })]);
    const beyond = tokenizer.vocabularySize + 3;
    const ids = [...a!, beyond, ...b!];
    expect(generatedText(tokenizer, ids)).toBe('river\uFFFD stone');
    expect(generatedText(tokenizer, a!)).toBe(tokenizer.decode(a!));
    expect(countUnknown(tokenizer, ids)).toBe(1);
    expect(() => tokenizer.decode(ids)).toThrow(expect.objectContaining({ code: 'TOKEN_OUT_OF_RANGE' }));
  });
});

describe('stop strings', () => {
  it('cut a generation where they appear, also across tokens and after late tokens', async () => {
    const tokenizer = await loadTokenizer('test/fixtures/models/llama');
    const text = 'river stone lamp';
    const tokens = tokenizer.encode(`${text} END garden END`, { special: false });
    const stops = new StopStrings(tokenizer, ['END', ' gar'], 2);
    const ended: number[] = [];
    for (const token of tokens) ended.push(...stops.push([1], [token]));
    expect(ended).toEqual([1]);
    const cut = stops.finish(1, tokens)!;
    expect(cut.text).toBe(`${text} `);
    expect(tokenizer.decode(tokens.subarray(0, cut.tokens))).toMatch(/END/);
    expect(cut.tokens).toBeLessThan(tokens.length);
    expect(stops.finish(0, tokens)).toEqual(cut);
    expect(new StopStrings(tokenizer, ['absent'], 1).finish(0, tokens)).toBeUndefined();
  });
});
