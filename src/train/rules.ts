/** What keys of a configuration say about each other. The schema has checked each on its own. */
import { evenLength } from '../data/batch.js';
import { LockstepError } from '../errors.js';
import { learnsFromRollouts } from './algorithms.js';
import { rewardRules } from './reward-rules.js';
import type { RewardTerm } from './reward-schema.js';
import type { Config, ConfigOf, RolloutConfig } from './schema.js';
import { unreadKeys } from './unread-keys.js';

/** A rule: undefined when it holds, else what is wrong and what to do. */
export type Rule<C> = (config: C) => { path: string; problem: string; unsupported?: boolean } | undefined;

const mostRanks = 64;

const commonRules: Rule<Config>[] = [
  ({ parallel: { pipeline, tensor, data } }) =>
    pipeline * tensor * data > mostRanks
      ? contradiction(
          'parallel',
          `pipeline ${pipeline} x tensor ${tensor} x data ${data} are ${pipeline * tensor * data} ranks; a process has at most ${mostRanks}`,
        )
      : undefined,
  ({ parallel }) =>
    parallel.zero > 0 && parallel.data === 1
      ? contradiction(
          'parallel.zero',
          `${parallel.zero} divides state among data-parallel ranks, and parallel.data is 1; set zero to 0 or raise data`,
        )
      : undefined,
  ({ parallel: { zero, pipeline } }) =>
    zero > 1 && pipeline > 1
      ? contradiction(
          'parallel.zero',
          `${zero} needs all micro-batches to pass a layer at once, and a pipeline of ${pipeline} stages takes one after the other; set zero to 1 or pipeline to 1`,
        )
      : undefined,
  ({ parallel, generation }) =>
    parallel.zero > 2 && generation
      ? contradiction(
          'generation',
          `weights that are divided among replicas (parallel.zero ${parallel.zero}) are no shards to generate from; set zero to 2 or leave out generation`,
        )
      : undefined,
  ({ parallel, batch }) =>
    batch.sequences < parallel.data
      ? contradiction(
          'batch.sequences',
          `${batch.sequences} rows leave some of the ${parallel.data} data-parallel ranks without any; raise it or lower parallel.data`,
        )
      : undefined,
  ...(['pipeline', 'tensor'] as const).map(
    (axis) =>
      ({ parallel, generation }: Config) =>
        generation && parallel[axis] % generation[axis] !== 0
          ? contradiction(
              `generation.${axis}`,
              `${generation[axis]} does not divide parallel.${axis} (${parallel[axis]}): a rank generates with whole training shards; use a divisor of it`,
            )
          : undefined,
  ),
  ({ generation, parallel }) =>
    generation?.transition === 'ds-chat' && parallel.data > 1
      ? unsupported(
          'generation.transition',
          'ds-chat',
          'it gathers from data-parallel pieces that no model trains on; use hybridflow',
        )
      : undefined,
  ({ generation, memory }) =>
    generation && memory.offload !== 'none'
      ? unsupported(
          'memory.offload',
          memory.offload,
          'it does not move weights that two layouts share; leave out generation',
        )
      : undefined,
  ({ numerics: { parts } }) =>
    parts !== 'auto' && (parts & (parts - 1)) !== 0
      ? contradiction('numerics.parts', `${parts} is not a power of two; use auto, 1, 2, 4 or 8`)
      : undefined,
  ({ optimizer, steps }) =>
    optimizer.warmupSteps > steps
      ? contradiction('optimizer.warmupSteps', `${optimizer.warmupSteps} is more than steps (${steps})`)
      : undefined,
];

interface Section {
  miniBatches: number;
  kl?: { in: string; estimator: string };
  overlongBuffer?: number;
}

/** The section under the algorithm's own name. */
const sectionOf = (config: RolloutConfig) => (config as unknown as Record<string, Section>)[config.algorithm]!;

/** Algorithms that judge an answer against the others of its prompt. */
const judgesGroups = (config: RolloutConfig): boolean =>
  config.algorithm === 'grpo' ||
  config.algorithm === 'rloo' ||
  (config.algorithm === 'reinforce++' && config['reinforce++'].baseline);

const rolloutRules: Rule<RolloutConfig>[] = [
  ...(['reward', 'cost'] as const).flatMap((key) =>
    rewardRules(key).map((rule) => (config: RolloutConfig) => {
      const terms = (config as Partial<Record<typeof key, readonly RewardTerm[]>>)[key];
      return terms && rule({ algorithm: config.algorithm, terms });
    }),
  ),
  ({ batch, rollout }) =>
    batch.sequences % rollout.samples !== 0
      ? contradiction(
          'batch.sequences',
          `${batch.sequences} responses cannot be ${rollout.samples} per prompt (rollout.samples); use a multiple of it`,
        )
      : undefined,
  ({ batch, rollout }) =>
    evenLength(1 + rollout.maxNewTokens) > batch.microTokens
      ? contradiction(
          'batch.microTokens',
          `${batch.microTokens} tokens are too few for a prompt and ${rollout.maxNewTokens} new ones (rollout.maxNewTokens); raise it or lower maxNewTokens`,
        )
      : undefined,
  (config) =>
    judgesGroups(config) && config.rollout.samples < 2
      ? contradiction(
          'rollout.samples',
          `${config.algorithm} judges an answer against the others of its prompt, and there is 1; set it to 2 or more`,
        )
      : undefined,
  (config) =>
    config.batch.sequences < sectionOf(config).miniBatches
      ? contradiction(
          `${config.algorithm}.miniBatches`,
          `${sectionOf(config).miniBatches} mini-batches cannot be cut from ${config.batch.sequences} sequences (batch.sequences); lower it`,
        )
      : undefined,
  ({ rollout }) =>
    rollout.temperature === 0
      ? contradiction('rollout.temperature', 'a greedy rollout explores nothing; use a temperature above 0')
      : undefined,
  (config) => {
    const { kl } = sectionOf(config);
    return kl?.in === 'loss' && kl.estimator === 'k1'
      ? contradiction(
          `${config.algorithm}.kl`,
          'the gradient of k1 as a loss is zero on average; use k2 or k3, or kl.in: reward',
        )
      : undefined;
  },
  (config) => {
    if (config.algorithm !== 'reinforce++') return undefined;
    const { baseline, klCoefficient, klEstimator } = config['reinforce++'];
    return baseline && klCoefficient > 0 && klEstimator === 'k1'
      ? contradiction(
          'reinforce++.klEstimator',
          'the baseline form has KL in the loss, where the gradient of k1 is zero on average; use k2 or k3',
        )
      : undefined;
  },
  (config) => {
    const { ptx } = config as Partial<ConfigOf<'ppo'>>;
    const { miniBatches } = sectionOf(config);
    return ptx?.sequences !== undefined && ptx.sequences < miniBatches
      ? contradiction(
          'ptx.sequences',
          `${ptx.sequences} rows cannot be part of ${miniBatches} mini-batches (${config.algorithm}.miniBatches); raise it`,
        )
      : undefined;
  },
  ({ algorithm, rollout }) =>
    algorithm === 'distillation' && rollout.truncation === 'penalise'
      ? contradiction('rollout.truncation', 'distillation has no reward that a penalty could lower; use keep or mask')
      : undefined,
  (config) => {
    if (config.algorithm !== 'ppo') return undefined;
    const { kl, klCoefficient } = config.ppo;
    return kl.controller === 'adaptive' && klCoefficient === 0
      ? contradiction(
          'ppo.kl.controller',
          'adaptive multiplies klCoefficient, and 0 stays 0; use fixed, or start from a coefficient above 0',
        )
      : undefined;
  },
  (config) => {
    if (config.algorithm !== 'safe-rlhf') return undefined;
    const { initial, maximum } = config['safe-rlhf'].constraint;
    return initial > maximum
      ? contradiction(
          'safe-rlhf.constraint.initial',
          `${initial} is more than maximum (${maximum}); lower it or raise maximum`,
        )
      : undefined;
  },
  (config) => {
    const { overlongBuffer = 0 } = sectionOf(config);
    const { maxNewTokens } = config.rollout;
    return overlongBuffer > maxNewTokens
      ? contradiction(
          `${config.algorithm}.overlongBuffer`,
          `the last ${overlongBuffer} tokens are more than an answer has (rollout.maxNewTokens ${maxNewTokens}); lower it`,
        )
      : undefined;
  },
  ...(['critic', 'costCritic'] as const).map((key) => (config: RolloutConfig) => {
    const given = (config as Partial<Record<typeof key, ConfigOf<'ppo'>['critic']>>)[key];
    const warmup = given?.optimizer.warmupSteps ?? config.optimizer.warmupSteps;
    return given && warmup > config.steps
      ? contradiction(`${key}.optimizer.warmupSteps`, `${warmup} is more than steps (${config.steps})`)
      : undefined;
  }),
];

const dpoRules: Rule<ConfigOf<'dpo'>>[] = [
  ({ dpo }) =>
    dpo.loss === 'exo-pair' && dpo.labelSmoothing === 0
      ? contradiction('dpo.labelSmoothing', 'the loss exo-pair has its logarithm, which is infinite at 0; use 1e-3')
      : undefined,
];

const ktoRules: Rule<ConfigOf<'kto'>>[] = [
  ({ batch }) =>
    batch.sequences < 2
      ? contradiction('batch.sequences', 'the point of reference pairs prompts with answers of others; use 2 or more')
      : undefined,
];

/** @throws LockstepError CONFIG_CONTRADICTION or CONFIG_UNSUPPORTED, listing every rule that fails. */
export function checkRules(config: Config): void {
  const results: ReturnType<Rule<Config>>[] = [
    ...commonRules.map((rule) => rule(config)),
    ...(learnsFromRollouts(config) ? rolloutRules.map((rule) => rule(config)) : []),
    ...(config.algorithm === 'dpo' ? dpoRules.map((rule) => rule(config)) : []),
    ...(config.algorithm === 'kto' ? ktoRules.map((rule) => rule(config)) : []),
    ...unreadKeys(config),
  ];
  const failures = results.filter((failure) => failure !== undefined);
  const [first] = failures;
  if (!first) return;
  throw new LockstepError(
    first.unsupported ? 'CONFIG_UNSUPPORTED' : 'CONFIG_CONTRADICTION',
    failures.map(({ path, problem }) => `${path}: ${problem}`).join('\n'),
    { path: first.path },
  );
}

function contradiction(path: string, problem: string) {
  return { path, problem };
}

function unsupported(path: string, received: unknown, advice: string) {
  return { path, problem: `${JSON.stringify(received)} is not in this version: ${advice}`, unsupported: true };
}
