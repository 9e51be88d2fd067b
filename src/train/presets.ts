/** Published settings of the group methods: `grpo.variant` names one, and keys that are given win over it. */
import type { GrpoVariant } from './algorithm-schemas.js';
import { type ConfigInput, defaultMaxNewTokens } from './schema.js';

type GroupInput = Omit<NonNullable<Extract<ConfigInput, { algorithm: 'grpo' }>['grpo']>, 'variant'>;

/** What differs from GRPO's own defaults. `maxNewTokens` is the rollout's. */
export const presets: Record<GrpoVariant, (maxNewTokens: number) => GroupInput> = {
  /** Shao et al. 2024, arXiv:2402.03300. */
  grpo: () => ({}),
  /** Liu et al. 2025, arXiv:2503.20783: no division by the standard deviation nor by an answer's length. */
  'dr-grpo': () => ({
    advantage: 'dr-grpo',
    aggregation: { mode: 'seq-mean-token-sum-norm', sequences: 'all' },
    klCoefficient: 0,
  }),
  /** Yu et al. 2025, arXiv:2503.14476: the last fifth of the length costs, as 4096 of 20480 tokens there. */
  dapo: (maxNewTokens) => ({
    aggregation: { mode: 'token-mean' },
    clipHigh: 0.28,
    klCoefficient: 0,
    samplingRounds: 4,
    overlongBuffer: Math.floor(maxNewTokens / 5),
  }),
  /** Zheng et al. 2025, arXiv:2507.18071, section 5.1. */
  gspo: () => ({ loss: 'gspo', clip: 3e-4, clipHigh: 4e-4, klCoefficient: 0 }),
  /** MiniMax 2025, arXiv:2506.13585: no lower bound of the weight. */
  cispo: () => ({ loss: 'cispo', aggregation: { mode: 'token-mean' }, clip: 1, clipHigh: 4, klCoefficient: 0 }),
  /** Gao et al. 2025, arXiv:2511.20347. */
  sapo: () => ({ loss: 'sapo', klCoefficient: 0 }),
  /** Zhao et al. 2025, arXiv:2507.20673: the log ratio is clipped to ±0.4. */
  gmpo: () => ({ loss: 'gmpo', clip: 0.4, klCoefficient: 0 }),
  /** Hao et al. 2025, arXiv:2505.23585: exactly on-policy. */
  opo: () => ({ advantage: 'opo', loss: 'reinforce', aggregation: { mode: 'token-mean' }, klCoefficient: 0 }),
};

/** The configuration with its variant's settings under those that are given; anything else is left to the schema. */
export function withPreset(input: unknown): unknown {
  const config = input as { algorithm?: unknown; rollout?: unknown };
  if (!isObject(config) || typeof config.algorithm !== 'string') return input;
  const section = (config as Record<string, unknown>)[config.algorithm];
  const preset = isObject(section) ? presetOf(config.algorithm, section, config.rollout) : undefined;
  return preset ? { ...config, [config.algorithm]: under(preset, section as object) } : input;
}

function presetOf(algorithm: string, section: object, rollout: unknown): object | undefined {
  const { variant, baseline } = section as { variant?: unknown; baseline?: unknown };
  // The baseline form has KL in the loss, where k1 teaches nothing.
  if (algorithm === 'reinforce++' && baseline === true) return { klEstimator: 'k2' };
  if (algorithm !== 'grpo' || typeof variant !== 'string' || !Object.hasOwn(presets, variant)) return undefined;
  const { maxNewTokens } = (isObject(rollout) ? rollout : {}) as { maxNewTokens?: unknown };
  return presets[variant as GrpoVariant](typeof maxNewTokens === 'number' ? maxNewTokens : defaultMaxNewTokens);
}

/** Keys that are given win, also inside a section (`aggregation`). */
function under(preset: object, given: object): object {
  const sections = Object.entries(preset).filter(([key, value]) => isObject(value) && isObject(at(given, key)));
  const merged = sections.map(([key, value]) => [key, { ...value, ...(at(given, key) as object) }]);
  return { ...preset, ...given, ...Object.fromEntries(merged) };
}

const at = (section: object, key: string): unknown => (section as Record<string, unknown>)[key];
const isObject = (value: unknown): value is object =>
  typeof value === 'object' && value !== null && !Array.isArray(value);
