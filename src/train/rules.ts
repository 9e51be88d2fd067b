/** What keys of a configuration say about each other. The schema has checked each on its own. */
import { LockstepError } from '../errors.js';
import type { Config, PpoConfig } from './schema.js';

/** A rule: undefined when it holds, else what is wrong and what to do. */
type Rule<C> = (config: C) => { path: string; problem: string; unsupported?: boolean } | undefined;

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

const ppoRules: Rule<PpoConfig>[] = [
  ({ reward }) =>
    reward.model === undefined && reward.function === undefined
      ? contradiction('reward', 'ppo needs a reward; set reward.model, reward.function or both')
      : undefined,
  ({ batch, rollout }) =>
    batch.sequences % rollout.samples !== 0
      ? contradiction(
          'batch.sequences',
          `${batch.sequences} responses cannot be ${rollout.samples} per prompt (rollout.samples); use a multiple of it`,
        )
      : undefined,
  ({ batch, ppo }) =>
    batch.sequences < ppo.miniBatches
      ? contradiction(
          'ppo.miniBatches',
          `${ppo.miniBatches} mini-batches cannot be cut from ${batch.sequences} sequences (batch.sequences); lower it`,
        )
      : undefined,
  ({ rollout }) =>
    rollout.temperature === 0
      ? contradiction('rollout.temperature', 'a greedy rollout explores nothing; use a temperature above 0')
      : undefined,
  ({ ppo: { kl } }) =>
    kl.in === 'loss' && kl.estimator === 'k1'
      ? contradiction('ppo.kl', 'the gradient of k1 as a loss is zero on average; use k2 or k3, or kl.in: reward')
      : undefined,
  ({ critic, optimizer, steps }) =>
    (critic.optimizer.warmupSteps ?? optimizer.warmupSteps) > steps
      ? contradiction('critic.optimizer.warmupSteps', `${critic.optimizer.warmupSteps} is more than steps (${steps})`)
      : undefined,
];

/** @throws LockstepError CONFIG_CONTRADICTION or CONFIG_UNSUPPORTED, listing every rule that fails. */
export function checkRules(config: Config): void {
  const failures = [
    ...commonRules.map((rule) => rule(config)),
    ...(config.algorithm === 'ppo' ? ppoRules.map((rule) => rule(config)) : []),
  ].filter((failure) => failure !== undefined);
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
