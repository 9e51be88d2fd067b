/** Keys that nothing reads under other keys. A key with the value of its default counts as left out. */
import { learnsFromRollouts } from './algorithms.js';
import { withPreset } from './presets.js';
import { type AlgorithmName, type Config, type ConfigOf, configSchema, type RolloutConfig } from './schema.js';

/** By path: why it is not read and what to do, or false where it is read. */
type Keys<C> = Readonly<Record<string, (config: C) => string | false>>;

const withoutRollouts: Keys<Config> = Object.fromEntries(
  ['checks.mismatch', 'rollout.samples', 'rollout.truncation', 'rollout.truncationPenalty'].map((path) => [
    path,
    ({ algorithm }) => `${algorithm} learns from no rollouts; leave it out`,
  ]),
);

const withoutKl = ({ algorithm, ...sections }: RolloutConfig): string | false =>
  at(sections, `${algorithm}.klCoefficient`) === 0 &&
  `there is no KL term where ${algorithm}.klCoefficient is 0; leave it out or raise the coefficient`;

const ofRollouts: Keys<RolloutConfig> = {
  'rollout.truncationPenalty': ({ rollout: { truncation } }) =>
    truncation !== 'penalise' && `rollout.truncation is ${truncation}; leave it out, or set that to penalise`,
  'reference.model': withoutKl,
};

type GroupConfig = ConfigOf<'grpo' | 'rloo'>;
const groupSection = (config: GroupConfig) => (config.algorithm === 'grpo' ? config.grpo : config.rloo);

const unlessLoss = <Loss extends string>(loss: Loss, readers: readonly Loss[]): string | false =>
  !readers.includes(loss) && `the loss ${loss} does not read it; leave it out, or use ${readers.join(', ')}`;

const byGroupLoss =
  (...readers: ConfigOf<'grpo'>['grpo']['loss'][]) =>
  (config: GroupConfig) =>
    unlessLoss(groupSection(config).loss, readers);

const byPairLoss =
  (...readers: ConfigOf<'dpo'>['dpo']['loss'][]) =>
  ({ dpo }: ConfigOf<'dpo'>) =>
    unlessLoss(dpo.loss, readers);

/** Of GRPO or RLOO. */
const ofGroups = (name: GroupConfig['algorithm']): Keys<GroupConfig> => ({
  [`${name}.clip`]: byGroupLoss('ppo', 'gspo', 'gmpo', 'rloo', 'cispo', 'dppo'),
  [`${name}.clipHigh`]: byGroupLoss('ppo', 'gspo', 'gmpo', 'rloo', 'cispo', 'dppo'),
  [`${name}.dualClip`]: byGroupLoss('ppo', 'gspo', 'rloo'),
  [`${name}.aggregation.horizon`]: (config) => {
    const { mode } = groupSection(config).aggregation;
    return (
      mode !== 'seq-mean-token-sum-norm' &&
      `${mode} does not divide by a constant length; leave it out, or use the mode seq-mean-token-sum-norm`
    );
  },
  [`${name}.aggregation.sequences`]: (config) => {
    const { mode } = groupSection(config).aggregation;
    return (
      (mode === 'token-mean' || mode === 'token-sum') &&
      `${mode} does not divide by a number of sequences; leave it out, or use a mode that begins with seq-mean`
    );
  },
  [`${name}.kl.in`]: withoutKl,
  [`${name}.kl.estimator`]: withoutKl,
});

const ofFixed = ({ ppo: { kl } }: ConfigOf<'ppo'>): string | false =>
  kl.controller === 'fixed' && 'ppo.kl.controller is fixed; leave it out, or set that to adaptive';

const byAlgorithm: { readonly [Name in AlgorithmName]?: Keys<ConfigOf<Name>> } = {
  ppo: {
    'ppo.kl.in': withoutKl,
    'ppo.kl.estimator': withoutKl,
    'ppo.kl.target': ofFixed,
    'ppo.kl.horizon': ofFixed,
  },
  grpo: ofGroups('grpo'),
  rloo: ofGroups('rloo'),
  'reinforce++': {
    'reinforce++.gamma': ({ 'reinforce++': { baseline } }) =>
      baseline &&
      'the baseline form has one advantage for all tokens of an answer; leave it out, or set baseline to false',
  },
  dpo: {
    'dpo.labelSmoothing': byPairLoss('dpo', 'robust', 'exo-pair'),
    'dpo.lengthNormalised': byPairLoss('ipo'),
  },
};

/** Keys that are given and not read. What a program reads is its own affair. */
export function unreadKeys(config: Config): { path: string; problem: string }[] {
  const rollouts = learnsFromRollouts(config);
  if (rollouts && config.program !== undefined) return [];
  const own = byAlgorithm[config.algorithm] as Keys<Config> | undefined;
  const keys = { ...((rollouts ? ofRollouts : withoutRollouts) as Keys<Config>), ...own };
  const defaults = defaultsOf(config);
  return Object.entries(keys).flatMap(([path, unread]) => {
    const problem = at(config, path) !== at(defaults, path) && unread(config);
    return problem ? [{ path, problem }] : [];
  });
}

/** What a configuration is where it gives only what has no default, and what chooses among defaults (presets.ts). */
function defaultsOf(config: Config): Config {
  const required = ['algorithm', 'model', 'data', 'reward', 'cost', 'teacher'].filter((key) => key in config);
  const section = Object.entries(at(config, config.algorithm) ?? {});
  const chosen = section.filter(([key]) => key === 'variant' || key === 'baseline');
  const given = {
    ...Object.fromEntries(required.map((key) => [key, at(config, key)])),
    ...(chosen.length > 0 ? { [config.algorithm]: Object.fromEntries(chosen) } : {}),
  };
  return configSchema.parse(withPreset(given));
}

const at = (tree: unknown, path: string): unknown =>
  path.split('.').reduce((node, key) => (node as Record<string, unknown> | undefined)?.[key], tree);
