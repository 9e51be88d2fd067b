/** From a configuration to the algorithm that it names. */
import type { RolloutAlgorithm } from '../algorithms/algorithm.js';
import { distillation } from '../algorithms/distillation.js';
import { type GrpoSettings, grpo } from '../algorithms/grpo.js';
import { ppo } from '../algorithms/ppo.js';
import { reinforcePlusPlus } from '../algorithms/reinforce-plus-plus.js';
import { remax } from '../algorithms/remax.js';
import { rloo } from '../algorithms/rloo.js';
import type { TruncationSettings } from '../algorithms/rollout.js';
import { safeRlhf } from '../algorithms/safe-rlhf.js';
import type { Config, ConfigOf, RolloutConfig } from './config.js';

type Makers = { readonly [Name in RolloutConfig['algorithm']]: (config: ConfigOf<Name>) => RolloutAlgorithm };

/** Algorithms that learn from rollouts, by their name in a configuration. */
const rolloutAlgorithms: Makers = {
  ppo: (config) => ppo({ ...config.ppo, ...truncationOf(config), ptxCoefficient: config.ptx?.coefficient ?? 0 }),
  remax: (config) => remax({ ...config.remax, ...truncationOf(config), samples: config.rollout.samples }),
  'safe-rlhf': (config) =>
    safeRlhf({ ...config['safe-rlhf'], ...truncationOf(config), ptxCoefficient: config.ptx?.coefficient ?? 0 }),
  grpo: (config) => grpo(groupSettings(config, config.grpo)),
  rloo: (config) => rloo(groupSettings(config, config.rloo)),
  'reinforce++': (config) =>
    reinforcePlusPlus({ ...config['reinforce++'], ...truncationOf(config), samples: config.rollout.samples }),
  distillation: (config) => distillation({ ...config.distillation, ...truncationOf(config) }),
};

export const learnsFromRollouts = (config: Config): config is RolloutConfig =>
  Object.hasOwn(rolloutAlgorithms, config.algorithm);

export const rolloutAlgorithm = (config: RolloutConfig): RolloutAlgorithm =>
  (rolloutAlgorithms[config.algorithm] as (config: RolloutConfig) => RolloutAlgorithm)(config);

export const truncationOf = ({ rollout }: Pick<RolloutConfig, 'rollout'>): TruncationSettings => ({
  truncation: rollout.truncation,
  truncationPenalty: rollout.truncationPenalty,
});

function groupSettings<Section extends ConfigOf<'grpo'>['grpo'] | ConfigOf<'rloo'>['rloo']>(
  config: ConfigOf<'grpo' | 'rloo'>,
  section: Section,
): Section &
  Pick<GrpoSettings, keyof TruncationSettings | 'samples' | 'maxNewTokens' | 'ptxCoefficient' | 'aggregation'> {
  const { samples, maxNewTokens } = config.rollout;
  return {
    ...section,
    ...truncationOf(config),
    samples,
    maxNewTokens,
    aggregation: { ...section.aggregation, horizon: section.aggregation.horizon ?? maxNewTokens },
    ptxCoefficient: config.ptx?.coefficient ?? 0,
  };
}
