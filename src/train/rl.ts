/** Reinforcement learning as a task: one iteration of prompts, rollout, rewards and updates per step. */
import type { Prompt } from '../algorithms/algorithm.js';
import { rolloutMetrics } from '../algorithms/metrics.js';
import { ppo } from '../algorithms/ppo.js';

import { checkTokens, toPrompt } from '../data/examples.js';
import type { Row } from '../data/rows.js';
import type { Engine } from '../engine/engine.js';
import { checkLength } from '../inference/generate.js';
import { ActorWorker } from '../workers/actor.js';
import { CriticWorker } from '../workers/critic.js';
import { ReferenceWorker } from '../workers/reference.js';
import type { PpoConfig } from './config.js';
import { openRewards } from './rewards.js';
import { openEngine, type Role } from './roles.js';
import { samplesOf, unknownMetric } from './samples.js';
import { evaluation, openSources } from './sources.js';
import { learnerSettings, type Outcome, ofEvaluation, type Task, trainedModel, type Workshop } from './task.js';

export async function ppoTask(config: PpoConfig, workshop: Workshop): Promise<Task> {
  const { roles, tokenizer } = workshop;
  const named = Object.fromEntries(roles.map((role) => [role.name, role])) as Record<Role['name'], Role | undefined>;
  const convert = (row: Row) => promptOf(row, named.policy!, workshop, config.rollout.maxNewTokens);
  const sources = await openSources(config, convert, workshop);
  const engines: Partial<Record<Role['name'], Engine>> = {};
  for (const role of roles) engines[role.name] = await openEngine(role, workshop);
  const rewards = await openRewards(config, engines.reward, workshop);
  const models = { ...learners(config, engines, workshop), reward: rewards };
  const truncation = { truncation: config.rollout.truncation, truncationPenalty: config.rollout.truncationPenalty };
  const algorithm = ppo({ ...config.ppo, ...truncation });
  const { samples } = config.rollout;
  const rowsPerStep = config.batch.sequences / samples;
  return {
    rowsPerStep,
    skipped: sources.train.skipped,
    trained: [
      trainedModel(named.policy!, engines.policy!, workshop),
      trainedModel(named.critic!, engines.critic!, workshop),
    ],
    step: async (step): Promise<Outcome> => {
      const rows = await workshop.recorder.phase('data', () =>
        sources.train.take((step - 1) * rowsPerStep, rowsPerStep),
      );
      const prompts = rows.flatMap((prompt) => Array.from({ length: samples }, () => prompt));
      const { metrics, rollout, rewards: given } = await algorithm.iterate(models, prompts, { iteration: step });
      const { max, tokens } = models.actor.mismatch();
      return {
        metrics: {
          ...metrics,
          ...unknownMetric(rollout!, tokenizer),
          'mismatch.max': max,
          'mismatch.tokens': tokens,
          tokens: rollout!.tokens.length,
        },
        samples: samplesOf(rollout!, tokenizer, { scores: given!.scores, count: config.evaluation.samples }),
      };
    },
    ...evaluation(sources, config, async (prompts: Prompt[]): Promise<Outcome> => {
      const rollout = await models.actor.generateForEvaluation(prompts);
      const given = await models.reward.computeRewards(rollout);
      return {
        metrics: ofEvaluation(rolloutMetrics(rollout, given, truncation)),
        samples: samplesOf(rollout, tokenizer, { scores: given.scores, count: config.evaluation.samples }),
      };
    }),
    state: () => algorithm.state(),
    restore: (state) => algorithm.restore(state),
  };
}

function learners(
  config: PpoConfig,
  engines: Partial<Record<Role['name'], Engine>>,
  { pools, tokenizer, endTokens }: Workshop,
) {
  const { rollout, seed, checks, critic } = config;
  const { temperature } = rollout;
  return {
    actor: pools.place(
      'policy',
      ActorWorker.create(engines.policy!, {
        ...learnerSettings(config),
        temperature,
        sampling: { ...rollout, seed, stopTokens: endTokens },
        stop: rollout.stop,
        tokenizer,
        mismatch: checks.mismatch,
      }),
      {
        ...{ generateSequences: 'generation', generateForEvaluation: 'evaluation' },
        ...{ computeLogprobs: 'logprobs', update: 'policyUpdate' },
      },
    ),
    critic: pools.place('critic', CriticWorker.create(engines.critic!, learnerSettings(config, critic.optimizer)), {
      ...{ computeValues: 'values', update: 'valueUpdate' },
    }),
    reference: pools.place(
      'reference',
      ReferenceWorker.create(engines.reference!, { microTokens: config.batch.microTokens, temperature }),
      { computeLogprobs: 'reference' },
    ),
  };
}

function promptOf(row: Row, { shape, checkpoint }: Role, { tokenizer }: Workshop, maxNewTokens: number): Prompt {
  const { tokens } = toPrompt(row, tokenizer, { directory: checkpoint.directory });
  checkTokens(tokens, shape.vocabulary, row.place);
  checkLength(tokens.length, maxNewTokens, shape, row.place);
  return { tokens, row: row.columns };
}
