/** Tables in place of models: the laws of algorithms without an engine. */
import type {
  ActorWorker,
  Awaitable,
  Experience,
  Learner,
  Prompt,
  Rewards,
  Rollout,
} from '../../src/algorithms/algorithm.js';
import type { TokenBatch } from '../../src/data/batch.js';
import { evaluateLoss, type Loss } from '../../src/losses/loss.js';
import { categorical, categoricalGradient } from '../categorical.js';
import { unpackBatch } from '../unpack-batch.js';

export const vocabulary = 4;
export const answerLength = 3;

/** One row of logits (or one value) per position of the answer: a policy, critic or scorer that ignores its input. */
export class Table implements Learner {
  readonly logits = Array.from({ length: answerLength }, () => Array<number>(vocabulary).fill(0));
  readonly values = Array<number>(answerLength + 1).fill(0);
  readonly log: Record<string, number>[] = [];

  constructor(private readonly learningRate: number) {}

  private outputs({ tokens, lengths }: TokenBatch) {
    const logprobs = new Float32Array(tokens.length);
    const entropies = new Float32Array(tokens.length);
    const outputValues = new Float32Array(tokens.length);
    positions(lengths).forEach((position, t) => {
      outputValues[t] = this.values[position]!;
      if (position >= answerLength) return;
      const distribution = categorical(this.logits[position]!);
      logprobs[t] = distribution.logprobs[tokens[t + 1]!]!;
      entropies[t] = distribution.entropy;
    });
    return { logprobs, entropies, values: outputValues };
  }

  computeLogprobs = async (batch: Awaitable<TokenBatch>) => this.outputs(await batch).logprobs;
  computeValues = async (batch: Awaitable<TokenBatch>) => this.outputs(await batch).values;
  computeLoss = async (given: Awaitable<Experience>, loss: Loss) => {
    const batch = await given;
    return evaluateLoss(loss, batch, this.outputs(batch));
  };

  async update(given: Awaitable<Experience>, loss: Loss, { epochs }: { epochs: number }) {
    const batch = await given;
    for (let epoch = 0; epoch < epochs; epoch++) {
      const result = evaluateLoss(loss, batch, this.outputs(batch));
      this.log.push({ ...result.statistics, loss: result.loss });
      positions(batch.lengths).forEach((position, t) => {
        this.values[position]! -= this.learningRate * (result.gradients.values?.[t] ?? 0);
        if (position >= answerLength) return;
        const distribution = categorical(this.logits[position]!);
        const logprob = result.gradients.logprobs?.[t] ?? 0;
        const gradient = categoricalGradient(distribution, { label: batch.tokens[t + 1]!, logprob });
        this.logits[position]!.forEach((_, v) => {
          this.logits[position]![v]! -= this.learningRate * gradient[v]!;
        });
      });
    }
    const statistics = this.log.at(-epochs)!;
    return { loss: statistics.loss!, gradientNorm: 1, statistics };
  }
}

const positions = (lengths: Int32Array) => Array.from(lengths).flatMap((length) => Array.from(Array(length).keys()));

/** Samples every answer in turn, weighted by nothing: the law under test needs the log-probs, not the frequencies. */
export class TableActor extends Table implements ActorWorker {
  async generateSequences(asked: Awaitable<readonly Prompt[]>): Promise<Rollout> {
    const prompts = await asked;
    const size = answerLength + 1;
    const tokens = prompts.flatMap((_, i) => [0, i % vocabulary, (i >> 2) % vocabulary, (i >> 4) % vocabulary]);
    const batch = { tokens: Int32Array.from(tokens), lengths: new Int32Array(prompts.length).fill(size) };
    return {
      ...batch,
      prompts,
      promptLengths: new Int32Array(prompts.length).fill(1),
      responseMask: Uint8Array.from(tokens, (_, t) => (t % size < answerLength ? 1 : 0)),
      logprobs: await this.computeLogprobs(batch as Experience),
      finish: prompts.map(() => 'stop'),
    };
  }
}

/** A reward that counts a token in the answers; prompts are one token long. */
export const countOf = (token: number) => ({
  computeRewards: async (given: Awaitable<Rollout>): Promise<Rewards> => {
    const sequences = unpackBatch(await given);
    return { scores: Float64Array.from(sequences, (tokens) => tokens.subarray(1).filter((x) => x === token).length) };
  },
});
