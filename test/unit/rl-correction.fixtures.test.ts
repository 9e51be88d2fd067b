/**
 * Every golden case of rollout correction: weights, rejection masks, metrics and the losses with them; also with NaN
 * masked.
 */
import { evaluateLoss, type Loss, type LossBatch } from '../../src/losses/loss.js';
import { offPolicyMetrics } from '../../src/losses/off-policy.js';
import { policyLosses } from '../../src/losses/policy-losses.js';
import {
  type CorrectionInputs,
  type CorrectionSettings,
  type CorrectionWeightSettings,
  correctionWeights,
  type Rejection,
  rejectionMask,
} from '../../src/losses/rollout-correction.js';
import { Batch, type Case, describeTopics, expectClose, flat, gradientsOf, type Json, number } from '../rl-fixtures.js';
import { aggregationOf, twice, verlLogRatioBound } from './rl-policy-cases.js';

describeTopics({ rollout_correction: twice(check) });

type Inputs = Record<string, Json>;

/** verl bounds log ratios, and counts empty sequences with ratio 1. */
const verl = { logRatioBound: verlLogRatioBound, sequences: 'all' } as const;
const ppo = { clip: 0.2, dualClip: 3, logRatioBound: verlLogRatioBound };

function check(test: Case, inputs: Inputs, poisoned: boolean): void {
  const batch = new Batch(inputs, poisoned);
  const policies: CorrectionInputs = {
    lengths: batch.lengths,
    mask: batch.mask,
    oldLogprobs: batch.tokens('old_log_probs'),
    rolloutLogprobs: batch.tokens('rollout_log_probs'),
  };
  if (inputs.loss_type) checkBypass(test, inputs, batch, policies);
  else if (inputs.level) checkWeights(test, inputs, batch, policies);
  else if (inputs.option) checkRejection(test, inputs, policies);
  else checkMetrics(test, policies);
}

/** verl's 1e-8 in denominators enters its metrics several times over. */
function expectMetrics(actual: Readonly<Record<string, number>>, expected: Json): void {
  for (const [name, value] of Object.entries(expected as Inputs)) {
    if (actual[name] === undefined) throw new Error(`no metric is known by the name of ${name}`);
    expectClose(actual[name], value, 1e-6 * Math.max(1, Math.abs(number(value))));
  }
}

function checkMetrics({ expected }: Case, policies: CorrectionInputs): void {
  const metrics = offPolicyMetrics(policies, verl);
  expectMetrics(
    {
      kl: metrics.kl,
      k3_kl: metrics.k3,
      training_ppl: metrics.trainingPerplexity,
      rollout_ppl: metrics.rolloutPerplexity,
      training_log_ppl: metrics.trainingLogPerplexity,
      rollout_log_ppl: metrics.rolloutLogPerplexity,
      log_ppl_diff: metrics.logPerplexityDifference,
      log_ppl_abs_diff: metrics.absoluteLogPerplexityDifference,
      ppl_ratio: metrics.perplexityRatio,
      chi2_token: metrics.chiSquareToken,
      chi2_seq: metrics.chiSquareSequence,
    },
    expected.metrics!,
  );
}

/** One number truncates at it, two are the bounds of IcePop. */
function correctionOf(inputs: Inputs): CorrectionSettings & { level: 'token' | 'sequence' } {
  const level = inputs.level as 'token' | 'sequence';
  const bounds = flat(inputs.threshold!);
  return bounds.length === 1
    ? { rule: 'tis', level, high: bounds[0]!, ...verl }
    : { rule: 'icepop', level, low: bounds[0]!, high: bounds[1]!, ...verl };
}

function checkWeights(test: Case, inputs: Inputs, batch: Batch, policies: CorrectionInputs): void {
  const { expected } = test;
  const settings = correctionOf(inputs);
  const { weights, statistics } = correctionWeights(policies, { ...settings, normalize: inputs.normalize as boolean });
  expectClose(weights, expected.weights!);
  const ofSequences = settings.level === 'sequence';
  if (expected.metrics) {
    expectMetrics(
      {
        rollout_is_mean: statistics.mean,
        rollout_is_max: ofSequences ? statistics.maxRatio : statistics.max,
        rollout_is_min: ofSequences ? statistics.minRatio : statistics.min,
        rollout_is_eff_sample_size: statistics.effectiveSampleSize,
        rollout_is_ratio_fraction_high: statistics.highFraction,
        rollout_is_ratio_fraction_low: statistics.lowFraction,
        rollout_is_oob_ratio: statistics.zeroFraction,
        rollout_is_batch_norm_factor: statistics.normalizer,
      },
      expected.metrics,
    );
  }
  const { mask } = inputs.option ? rejectionMask(policies, rejectionsOf(inputs), verl) : batch;
  if (expected.mask) expectClose(mask, expected.mask);
  const mode = (inputs.mode as string | undefined) ?? 'token-mean';
  checkLoss(test, batch, weightedPpo(mode), { mask, weights, oldLogprobs: policies.oldLogprobs });
  checkVariants(test, inputs, policies);
}

const weightedPpo = (mode: string): Loss =>
  policyLosses.ppo({ ...ppo, weighted: true, aggregation: aggregationOf(mode) });

function checkLoss(
  test: Case,
  batch: Batch,
  loss: Loss,
  { mask, ...columns }: { mask: ArrayLike<number>; weights?: Float64Array; oldLogprobs: ArrayLike<number> },
): void {
  const whole: LossBatch = {
    lengths: batch.lengths,
    mask,
    columns: { ...columns, advantages: batch.broadcast('advantages') },
  };
  const outputs = { logprobs: batch.tokens('log_probs'), entropies: batch.mask.map(() => 0) };
  const result = evaluateLoss(loss, whole, outputs);
  expectClose(result.loss, test.expected.loss!);
  for (const { values } of gradientsOf(test)) expectClose(result.gradients.logprobs!, values);
}

function checkVariants({ variants = {} }: Case, inputs: Inputs, policies: CorrectionInputs): void {
  const bounds = flat(inputs.threshold!);
  const high = bounds.at(-1)!;
  const settings: Record<string, () => CorrectionWeightSettings> = {
    openrlhf_tis: () => {
      const [low, top] = flat(variants.openrlhf_tis!.range!) as [number, number];
      return { rule: 'tis', low, high: top };
    },
    trl_token_truncate: () => ({ rule: 'tis', high }),
    trl_token_mask: () => ({ rule: 'icepop', high }),
    trl_sequence_mask: () => ({ rule: 'icepop', level: 'sequence', high }),
    openrlhf_seq_mask_tis: () => ({ rule: 'sequence-mask', low: bounds[0]!, high }),
  };
  for (const [name, of] of Object.entries(settings)) {
    const expected = variants[name];
    if (expected) expectClose(correctionWeights(policies, of()).weights, expected.weights!);
  }
}

/**
 * "token_k3,seq_max_k2" with the thresholds "0.5,0.25"; a band of k1 is "low_high" of 1 / r, one number c is [1/c, c].
 */
function rejectionsOf(inputs: Inputs): Rejection[] {
  const thresholds = String(inputs.rejection_threshold ?? inputs.threshold).split(',');
  return String(inputs.option)
    .split(',')
    .map((option, i) => {
      const [, over, estimator] = /^(?:seq_)?(token|sum|mean|max)_(k[123])$/.exec(option)!;
      const chosen = { over: over as Rejection['over'], estimator: estimator as Rejection['estimator'] };
      const band = thresholds[i]!.split('_').map(Number);
      if (estimator !== 'k1') return { ...chosen, high: band[0]! };
      const [low, high] = band.length === 1 ? [1 / band[0]!, band[0]!] : (band as [number, number]);
      return { ...chosen, low: Math.log(low), high: Math.log(high) };
    });
}

function checkRejection({ expected }: Case, inputs: Inputs, policies: CorrectionInputs): void {
  const { mask, rejectedFraction, rejectedSequences } = rejectionMask(policies, rejectionsOf(inputs), verl);
  expectClose(mask, expected.mask!);
  expectMetrics(
    { masked_fraction: rejectedFraction, sequence_masked_fraction: rejectedSequences / policies.lengths.length },
    expected.metrics!,
  );
}

/** The rollout's log-probs stand in for those of π_old; the rejection looks at π / π_rollout. */
function checkBypass(test: Case, inputs: Inputs, batch: Batch, policies: CorrectionInputs): void {
  const current = { ...policies, oldLogprobs: batch.tokens('log_probs') };
  const { mask } = rejectionMask(current, rejectionsOf(inputs), verl);
  const aggregation = aggregationOf(inputs.mode as string);
  const clips = { clip: number(inputs.clip_low), clipHigh: number(inputs.clip_high), dualClip: number(inputs.clip_c) };
  const loss =
    inputs.loss_type === 'reinforce'
      ? policyLosses['bypass-reinforce']({ ...correctionOf(inputs), aggregation })
      : policyLosses.ppo({ ...clips, logRatioBound: verlLogRatioBound, aggregation });
  checkLoss(test, batch, loss, { mask, oldLogprobs: policies.rolloutLogprobs });
}
