/** Learning from preferences as tasks: one optimizer step per batch of pairs, or of judged answers. */
import { evaluateKto, type JudgedAnswer, judgedBatch, kto } from '../algorithms/kto.js';
import { judgedMetrics, preferenceMetrics } from '../algorithms/metrics.js';
import {
  comparesWithReference,
  evaluatePreference,
  type Preference,
  type PreferenceModels,
  preference,
  preferenceBatch,
} from '../algorithms/preference.js';
import type { SftExample } from '../algorithms/sft.js';
import { checkTokens, toPair, toTrainingExample } from '../data/examples.js';
import { badRow, type Row } from '../data/rows.js';
import type { Loss } from '../losses/loss.js';
import { preferenceLosses } from '../losses/preference.js';
import { ActorWorker } from '../workers/actor.js';
import { ReferenceWorker } from '../workers/reference.js';
import type { ConfigOf, PreferenceConfig } from './config.js';
import { openEngine, type Role } from './roles.js';
import { checkRowLength } from './row-source.js';
import { evaluationSamples } from './samples.js';
import { evaluation, openSources } from './sources.js';
import { supervised } from './supervised.js';
import { learnerSettings, type Outcome, ofEvaluation, type Task, trainedModel, type Workshop } from './task.js';

type PairConfig = ConfigOf<'dpo' | 'simpo' | 'orpo'>;

/** The loss that a configuration names. */
export function preferenceLoss(config: PairConfig): Loss {
  switch (config.algorithm) {
    case 'dpo': {
      const { loss, ...settings } = config.dpo;
      return preferenceLosses[loss](settings);
    }
    case 'simpo':
      return preferenceLosses.simpo(config.simpo);
    case 'orpo':
      return preferenceLosses.orpo(config.orpo);
  }
}

/** Roles beside the policy. */
export const preferenceModels = (config: PreferenceConfig): readonly 'reference'[] =>
  config.algorithm === 'kto' || comparesWithReference(preferenceLoss(config)) ? ['reference'] : [];

export async function preferenceTask(config: PairConfig, workshop: Workshop): Promise<Task> {
  const settings = { loss: preferenceLoss(config) };
  const convert = (row: Row) => preferenceOf(row, workshop);
  const sources = await openSources(config, convert, workshop);
  const models = await openModels(config, workshop);
  return {
    ...supervised(sources, config, preference(settings), models.workers, preferenceBatch, workshop),
    trained: models.trained,
    ...evaluation(sources, config, async (pairs: Preference[]): Promise<Outcome> => {
      const { loss, statistics } = await evaluatePreference(models.workers, preferenceBatch(pairs), settings);
      const prompts = pairs.map(({ chosen }) => promptOf(chosen));
      const samples = await evaluationSamples(models.actor, prompts, workshop);
      return { metrics: ofEvaluation({ loss, ...preferenceMetrics(statistics) }), samples };
    }),
  };
}

export async function ktoTask(config: ConfigOf<'kto'>, workshop: Workshop): Promise<Task> {
  const convert = (row: Row) => judgedAnswerOf(row, workshop);
  const sources = await openSources(config, convert, workshop);
  const models = await openModels(config, workshop);
  return {
    ...supervised(sources, config, kto(config.kto), models.workers, judgedBatch, workshop),
    trained: models.trained,
    ...evaluation(sources, config, async (answers: JudgedAnswer[]): Promise<Outcome> => {
      const { loss, statistics } = await evaluateKto(models.workers, judgedBatch(answers), config.kto);
      const samples = await evaluationSamples(models.actor, answers.map(promptOf), workshop);
      return { metrics: ofEvaluation({ loss, ...judgedMetrics(statistics) }), samples };
    }),
  };
}

async function openModels(config: PreferenceConfig, workshop: Workshop) {
  const { roles, pools, tokenizer, endTokens } = workshop;
  const [policy, reference] = roles as [Role, Role | undefined];
  const engine = await openEngine(policy, workshop);
  const model = await trainedModel(policy, engine, workshop);
  const actor = pools.place(
    policy.name,
    ActorWorker.create(engine, {
      ...learnerSettings(config, model),
      sampling: { ...config.rollout, seed: config.seed, stopTokens: endTokens },
      stop: config.rollout.stop,
      tokenizer,
      mismatch: config.checks.mismatch,
    }),
    {
      ...{ computeLogprobs: 'logprobs', update: 'update' },
      ...{ computeLoss: 'evaluation', generateForEvaluation: 'generation' },
    },
  );
  const anchor =
    reference &&
    pools.place(
      reference.name,
      ReferenceWorker.create(await openEngine(reference, workshop), { microTokens: config.batch.microTokens }),
      { computeLogprobs: 'reference' },
    );
  return {
    actor,
    // Losses without a reference call none.
    workers: { actor, reference: anchor ?? actor } as PreferenceModels,
    trained: [model],
  };
}

function preferenceOf(row: Row, { roles: [policy], tokenizer, config }: Workshop): Preference {
  const { shape, checkpoint } = policy!;
  const pair = toPair(row, tokenizer, { directory: checkpoint.directory, endToken: true });
  const chosen = { tokens: pair.chosen, mask: pair.chosenMask };
  const rejected = { tokens: pair.rejected, mask: pair.rejectedMask };
  for (const { tokens, mask } of [chosen, rejected]) {
    checkTokens(tokens, shape.vocabulary, row.place);
    if (mask.indexOf(1) < 0) throw badRow(row.place, 'an answer has no tokens; expected at least one');
  }
  checkRowLength(row, [pair.chosen, pair.rejected], shape, config.batch);
  return { chosen, rejected };
}

/** Any row to learn from, with a column `desirable`. */
function judgedAnswerOf(row: Row, { roles: [policy], tokenizer, config }: Workshop): JudgedAnswer {
  const { shape, checkpoint } = policy!;
  const { desirable } = row.columns;
  if (typeof desirable !== 'boolean') {
    throw badRow(row.place, `expected desirable: true or false, received ${JSON.stringify(desirable) ?? 'nothing'}`);
  }
  const { tokens, mask } = toTrainingExample(row, tokenizer, { directory: checkpoint.directory });
  checkTokens(tokens, shape.vocabulary, row.place);
  checkRowLength(row, [tokens], shape, config.batch);
  if (mask.indexOf(1) < 0) throw badRow(row.place, 'the row has no token to learn; expected a response');
  return { tokens, mask, desirable };
}

/** What comes before the first token of an answer. */
const promptOf = ({ tokens, mask }: SftExample): Int32Array => tokens.subarray(0, mask.indexOf(1));
