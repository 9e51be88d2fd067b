/** Fine-tuning and reward modelling as tasks: one optimizer step per batch of rows. */
import type { Algorithm, Experience } from '../algorithms/algorithm.js';
import { pairMetrics } from '../algorithms/metrics.js';
import {
  costBatch,
  costModel,
  type Pair,
  rewardBatch,
  rewardModel,
  type SafetyPair,
  type ScoreAlgorithm,
} from '../algorithms/reward-model.js';
import { evaluateSft, type SftExample, sft, sftBatch } from '../algorithms/sft.js';
import { checkTokens, toPair, toPrompt, toTrainingExample } from '../data/examples.js';
import { badRow, type Row } from '../data/rows.js';
import { scorePosition } from '../data/score-position.js';
import { ActorWorker } from '../workers/actor.js';
import { RewardWorker } from '../workers/reward.js';
import type { Config, ConfigOf } from './config.js';
import { openEngine, type Role } from './roles.js';
import { checkRowLength } from './row-source.js';
import { evaluationSamples } from './samples.js';
import { evaluation, openSources, type Sources } from './sources.js';
import { learnerSettings, type Outcome, ofEvaluation, type Task, trainedModel, type Workshop } from './task.js';

/** An example, and the prompt that an evaluation lets the model continue. */
interface SftItem extends SftExample {
  prompt: Int32Array;
}

export async function sftTask(config: ConfigOf<'sft'>, workshop: Workshop): Promise<Task> {
  const { roles, pools, tokenizer } = workshop;
  const [policy] = roles as [Role];
  const convert = (row: Row): SftItem => sftItem(row, policy, workshop);
  const sources = await openSources(config, convert, workshop);
  const engine = await openEngine(policy, workshop);
  const model = await trainedModel(policy, engine, workshop);
  const actor = pools.place(
    policy.name,
    ActorWorker.create(engine, {
      ...learnerSettings(config, model),
      sampling: { ...config.rollout, seed: config.seed, stopTokens: workshop.endTokens },
      stop: config.rollout.stop,
      tokenizer,
      mismatch: config.checks.mismatch,
    }),
    { update: 'update', computeLoss: 'evaluation', generateForEvaluation: 'generation' },
  );
  return {
    ...supervised(sources, config, sft(), { actor }, sftBatch, workshop),
    trained: [model],
    ...evaluation(sources, config, async (items: SftItem[]): Promise<Outcome> => {
      const { loss } = await evaluateSft({ actor }, sftBatch(items));
      const prompts = items.map(({ prompt }) => prompt);
      return { metrics: ofEvaluation({ loss }), samples: await evaluationSamples(actor, prompts, workshop) };
    }),
  };
}

/** A reward model or a cost model: both score whole answers and learn from pairs. */
export const scorerTask = (config: ConfigOf<'reward' | 'cost'>, workshop: Workshop): Promise<Task> =>
  config.algorithm === 'reward'
    ? pairTask(config, rewardModel(), pairOf, rewardBatch, workshop)
    : pairTask(config, costModel(), safetyPairOf, costBatch, workshop);

async function pairTask<P extends Pair>(
  config: ConfigOf<'reward' | 'cost'>,
  algorithm: ScoreAlgorithm,
  convert: (row: Row, role: Role, workshop: Workshop) => P,
  pack: (pairs: readonly P[]) => Experience,
  workshop: Workshop,
): Promise<Task> {
  const { roles, pools } = workshop;
  const [role] = roles as [Role];
  const sources = await openSources(config, (row) => convert(row, role, workshop), workshop);
  const engine = await openEngine(role, workshop);
  const model = await trainedModel(role, engine, workshop);
  const reward = pools.place(role.name, RewardWorker.createLearner(engine, learnerSettings(config, model)), {
    ...{ update: 'update', computeLoss: 'evaluation' },
  });
  return {
    ...supervised(sources, config, algorithm, { reward }, pack, workshop),
    trained: [model],
    ...evaluation(sources, config, async (pairs: P[]) => {
      const { loss, statistics } = await algorithm.evaluate({ reward }, pack(pairs));
      return { metrics: ofEvaluation({ loss, ...pairMetrics(statistics) }), samples: [] };
    }),
  };
}

/** Steps of one batch of rows each. */
export function supervised<Item, Models, Batch>(
  { train }: Sources<Item>,
  config: Config,
  algorithm: Algorithm<Models, Batch>,
  models: Models,
  pack: (items: readonly Item[]) => Batch & ({ tokens: Int32Array } | { answers: { tokens: Int32Array } }),
  { recorder }: Workshop,
): Pick<Task, 'skipped' | 'data' | 'step' | 'state' | 'restore'> {
  const rowsPerStep = config.batch.sequences;
  return {
    skipped: train.skipped,
    data: { 'data.train': train.size },
    step: async (step) => {
      const batch = await recorder.phase('data', async () =>
        pack(await train.take((step - 1) * rowsPerStep, rowsPerStep)),
      );
      const { metrics } = await algorithm.iterate(models, batch, { iteration: step });
      const { tokens } = 'answers' in batch ? batch.answers : batch;
      return { metrics: { ...metrics, tokens: tokens.length }, samples: [] };
    },
    state: () => ({ ...algorithm.state(), ...train.state() }),
    restore: (state) => {
      algorithm.restore(state);
      train.restore(state);
    },
  };
}

export function sftItem(row: Row, { shape, checkpoint }: Role, { tokenizer, config }: Workshop): SftItem {
  const { directory } = checkpoint;
  const { tokens, mask } = toTrainingExample(row, tokenizer, { directory });
  checkTokens(tokens, shape.vocabulary, row.place);
  checkRowLength(row, [tokens], shape, config.batch);
  if (mask.indexOf(1) < 0)
    throw badRow(row.place, 'the row has no token to learn; expected a response or a mask with ones');
  const asks = row.kind === 'prompt' && tokenizer !== undefined;
  return { tokens, mask, prompt: asks ? toPrompt(row, tokenizer, { directory }).tokens : opening(tokens, mask) };
}

/** What comes before the first learned token; of a row that is learned throughout, its first third (at most 16 tokens). */
function opening(tokens: Int32Array, mask: Uint8Array): Int32Array {
  const first = mask.indexOf(1);
  return tokens.subarray(0, first > 1 ? first : Math.min(16, Math.ceil(tokens.length / 3)));
}

function pairOf(row: Row, { shape, checkpoint }: Role, { tokenizer, config }: Workshop): Pair {
  const { chosen, rejected, margin } = toPair(row, tokenizer, { directory: checkpoint.directory });
  for (const tokens of [chosen, rejected]) checkTokens(tokens, shape.vocabulary, row.place);
  checkRowLength(row, [chosen, rejected], shape, config.batch);
  // Padding behind the token that is scored changes nothing before it.
  const trimmed = (tokens: Int32Array) => tokens.subarray(0, scorePosition(tokens, shape.padToken) + 1);
  return { chosen: trimmed(chosen), rejected: trimmed(rejected), margin };
}

/** A pair whose chosen answer is the safer one; the column `unsafe` says of both whether they are unsafe. */
function safetyPairOf(row: Row, role: Role, workshop: Workshop): SafetyPair {
  const { unsafe } = row.columns;
  if (!Array.isArray(unsafe) || unsafe.length !== 2 || !unsafe.every((value) => typeof value === 'boolean')) {
    const received = JSON.stringify(unsafe) ?? 'nothing';
    throw badRow(
      row.place,
      `expected unsafe: [true or false of the chosen answer, of the rejected one], received ${received}`,
    );
  }
  return { ...pairOf(row, role, workshop), unsafe: unsafe as [boolean, boolean] };
}
