/** Every golden case of the policy losses of single tokens and of sequences, also with NaN in masked inputs. */
import type { Aggregation } from '../../src/losses/aggregation.js';
import { evaluateLoss, type Loss, type LossBatch, type Outputs } from '../../src/losses/loss.js';
import { selectForClip, selectForKl } from '../../src/losses/policy-covariance.js';
import { policyLosses } from '../../src/losses/policy-losses.js';
import { type Case, describeTopics, expectClose, flat, type Json, number, type Variant } from '../rl-fixtures.js';
import { checkModes, policyInputs, tokenLosses, twice, verlLogRatioBound } from './rl-policy-cases.js';

describeTopics({ policy_sequence: twice(checkPolicy), policy_other: twice(checkPolicy) });

interface Terms {
  aggregation?: Aggregation;
  weighted?: true;
}
type Statistics = Readonly<Record<string, number>>;

/** How the cases of one family are read: the loss with its settings, and what the names of verl's metrics are here. */
interface Family {
  loss(inputs: Record<string, Json>): (terms: Terms) => Loss;
  metrics: Readonly<Record<string, (statistics: Statistics) => number | undefined>>;
  /** Columns that are made from the batch before the loss. */
  columns?(batch: LossBatch, outputs: Outputs, inputs: Record<string, Json>): Record<string, Float64Array>;
  variants?: Readonly<Record<string, (variant: Variant, inputs: Record<string, Json>) => Loss>>;
  /**
   * Under these rules (`expected` or a variant's) a sequence without a learned token adds −A / sequences: a ratio of 1.
   */
  emptyHaveRatioOne?: readonly string[];
}

const clips = (inputs: Record<string, Json>) => ({ clip: number(inputs.clip_low), clipHigh: number(inputs.clip_high) });
const allSequences: Aggregation = { mode: 'seq-mean-token-mean', sequences: 'all' };
const bounded = { logRatioBound: verlLogRatioBound };
const kls = { approx_kl_k1: (s: Statistics) => s.klLinear, approx_kl_k3: (s: Statistics) => s.kl };
const clipFraction = { clip_fraction: (s: Statistics) => s.clipFraction };
const none = { clip_fraction_lower: () => 0 };

const dppo = (divergence: 'tv' | 'kl'): Family => ({
  loss: (inputs) => (terms) =>
    policyLosses.dppo({
      clip: number(inputs.eps_low),
      clipHigh: number(inputs.eps_high),
      ratioCap: number(inputs.ratio_cap),
      divergence,
      ...bounded,
      ...terms,
    }),
  metrics: { ...kls, ...clipFraction, clip_fraction_lower: (s) => s.cappedFraction },
});

/** By the beginning of a case's name. */
const families: Readonly<Record<string, Family>> = {
  gspo: {
    loss: (inputs) => (terms) => policyLosses.gspo({ ...clips(inputs), sequenceLogRatioBound: 10, ...terms }),
    metrics: { ...kls, ...clipFraction, clip_fraction_lower: (s) => s.dualClipFraction },
    variants: {
      trl_sequence: (_, inputs) => policyLosses.gspo({ ...clips(inputs), aggregation: allSequences }),
    },
  },
  cispo: {
    loss: (inputs) => (terms) => policyLosses.cispo({ ...clips(inputs), ...bounded, ...terms }),
    metrics: { ...kls, ...clipFraction, ...none },
    variants: {
      trl: ({ who }) =>
        policyLosses.cispo({ clip: Infinity, clipHigh: Number(/epsilon_high = ([\d.]+)/.exec(who)![1]) - 1 }),
    },
  },
  sapo: {
    loss: (inputs) => (terms) => policyLosses.sapo({ ...temperatures(inputs), ...bounded, ...terms }),
    metrics: { ...kls, ...none, clip_fraction: () => 0 },
    variants: { trl: (_, inputs) => policyLosses.sapo({ ...temperatures(inputs), aggregation: allSequences }) },
  },
  gmpo: {
    loss: (inputs) => (terms) => policyLosses.gmpo({ ...clips(inputs), ...terms }),
    metrics: { ...kls },
    variants: { trl: (_, inputs) => policyLosses.gmpo({ ...clips(inputs), aggregation: allSequences }) },
    emptyHaveRatioOne: ['trl'],
  },
  rloo: {
    loss: (inputs) => (terms) => policyLosses.rloo({ ...clips(inputs), ...terms }),
    metrics: {},
    emptyHaveRatioOne: ['expected'],
  },
  reinforce: { loss: () => (terms) => policyLosses.reinforce(terms), metrics: kls },
  gpg: { loss: () => (terms) => policyLosses.gpg(terms), metrics: kls },
  clip_cov: {
    loss: (inputs) => (terms) => policyLosses['clip-cov']({ ...clips(inputs), ...terms }),
    metrics: { ...kls, clip_fraction: (s) => s.selectedFraction },
    columns: (batch, outputs, inputs) => ({
      selected: selectForClip(covarianceInputs(batch, outputs), {
        ...clips(inputs),
        low: number(inputs.clip_cov_lb),
        high: number(inputs.clip_cov_ub),
        ratio: number(inputs.clip_cov_ratio),
        seed: 0,
      }),
    }),
  },
  kl_cov: {
    loss: (inputs) => (terms) => policyLosses['kl-cov']({ coefficient: number(inputs.ppo_kl_coef), ...terms }),
    metrics: { ...kls, approx_kl_k1: (s) => s.klAbsolute },
    columns: (batch, outputs, inputs) => ({
      selected: selectForKl(covarianceInputs(batch, outputs), { ratio: number(inputs.kl_cov_ratio) }),
    }),
  },
  dppo_tv: dppo('tv'),
  dppo_kl: dppo('kl'),
  dro: { loss: (inputs) => (terms) => policyLosses.dro({ beta: number(inputs.beta), ...terms }), metrics: kls },
};

const temperatures = (inputs: Record<string, Json>) => ({
  temperaturePositive: number(inputs.tau_pos),
  temperatureNegative: number(inputs.tau_neg),
});

function covarianceInputs({ lengths, mask, columns }: LossBatch, { logprobs }: Outputs) {
  return { lengths, mask, logprobs: logprobs!, oldLogprobs: columns.oldLogprobs!, advantages: columns.advantages! };
}

/** A constant without a gradient: what empty sequences add to a mean over all where their ratio is taken to be 1. */
function emptyTerm({ emptyHaveRatioOne = [] }: Family, rule: string, inputs: Record<string, Json>): number {
  if (!emptyHaveRatioOne.includes(rule)) return 0;
  const empty = (inputs.response_mask as number[][]).map((row) => !row.some(Boolean));
  return flat(inputs.advantages!).reduce((sum, advantage, b) => sum - (empty[b] ? advantage / empty.length : 0), 0);
}

function checkPolicy(test: Case, inputs: Record<string, Json>, poisoned: boolean): void {
  const name = Object.keys(families).find((family) => test.name.startsWith(family));
  if (name === undefined) throw new Error(`no policy loss is known by the name of case ${test.name}`);
  const family = families[name]!;
  const { batch: plain, outputs } = policyInputs(inputs, poisoned);
  const batch = { ...plain, columns: { ...plain.columns, ...family.columns?.(plain, outputs, inputs) } };
  const lossOf = family.loss(inputs);
  const constant = emptyTerm(family, 'expected', inputs);
  checkModes(test, inputs.horizon, (aggregation) => {
    const result = evaluateLoss(lossOf({ aggregation }), batch, outputs);
    return { ...result, loss: result.loss + constant };
  });
  if (test.expected.token_losses) expectClose(tokenLosses(lossOf, batch, outputs), test.expected.token_losses);

  const { statistics } = evaluateLoss(lossOf({}), batch, outputs);
  const metrics = (test.expected.metrics ?? {}) as Record<string, Json>;
  for (const [metric, value] of Object.entries(metrics)) {
    const own = family.metrics[metric];
    if (own) expectClose(own(statistics)!, value);
  }
  // verl counts GMPO's tokens beyond a bound by the sign of the advantage.
  if (name === 'gmpo') {
    expectClose(statistics.outsideFraction!, number(metrics.clip_fraction) + number(metrics.clip_fraction_lower));
  }
  for (const [variant, of] of Object.entries(family.variants ?? {})) {
    const expected = test.variants?.[variant];
    if (!expected) continue;
    const result = evaluateLoss(of(expected, inputs), batch, outputs);
    expectClose(result.loss + emptyTerm(family, variant, inputs), expected.loss!);
    if (expected.gradient) expectClose(result.gradients.logprobs!, expected.gradient);
  }
}
