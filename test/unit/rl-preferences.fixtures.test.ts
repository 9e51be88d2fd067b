/**
 * Every golden case of preference losses, KTO, Safe-RLHF and the pretraining mix, also with NaN in masked inputs.
 */
import { expect } from 'vitest';
import type { AggregationMode } from '../../src/losses/aggregation.js';
import { kto, ktoBaseline } from '../../src/losses/kto.js';
import { combineAdvantages, lagrangeMultiplier, safetyPenalty } from '../../src/losses/lagrange.js';
import { evaluateLoss, type Loss, type LossBatch, type LossResult } from '../../src/losses/loss.js';
import { pretrainingLoss } from '../../src/losses/mixed.js';
import { policyLoss } from '../../src/losses/policy.js';
import { logOddsRatio, preferenceLosses } from '../../src/losses/preference.js';
import { select } from '../../src/losses/selection.js';
import { TokenArray } from '../../src/losses/tokens.js';
import {
  Batch,
  type Case,
  describeTopics,
  expectClose,
  flat,
  gradientsOf,
  type Json,
  number,
  type Ragged,
  type Topic,
} from '../rl-fixtures.js';

type Inputs = Record<string, Json>;
type Check = (test: Case, inputs: Inputs, poisoned: boolean) => void;

const topics: Record<string, Check> = {
  preference: (test, inputs, poisoned) => (inputs.desirable ? checkKto : checkPreference)(test, inputs, poisoned),
  safe_rlhf: checkSafeRlhf,
  ptx: checkPretrainingMix,
};

describeTopics(
  Object.fromEntries(
    Object.entries(topics).map(([name, check]) => [
      name,
      (test: Case, { batches }: Topic) => {
        const batch = typeof test.inputs.batch === 'string' ? batches![test.inputs.batch]! : {};
        for (const poisoned of [false, true]) check(test, { ...batch, ...test.inputs }, poisoned);
      },
    ]),
  ),
);

/** Answers as rows of packed tokens: behind a prompt token and before a last token that predicts nothing, both masked. */
class Answers {
  readonly lengths: number[];
  readonly mask: number[];

  constructor(
    private readonly rows: Ragged,
    private readonly poisoned: boolean,
  ) {
    this.lengths = rows.map((row) => row.length + 2);
    this.mask = rows.flatMap((row) => [0, ...row.map(() => 1), 0]);
  }

  /** Numbers of the answers' tokens, or one number for each token of an answer. */
  tokens(values: Json[]): number[] {
    const masked = this.poisoned ? Number.NaN : 9;
    return this.rows.flatMap((row, b) => {
      const value = values[b]!;
      return [masked, ...(Array.isArray(value) ? flat(value) : row.map(() => number(value))), masked];
    });
  }

  /** A packed array as one list per row, of the answers' tokens alone. */
  answers(packed: ArrayLike<number>): number[][] {
    let end = 0;
    return this.lengths.map((length) => {
      end += length;
      return Array.from(packed).slice(end - length + 1, end - 1);
    });
  }
}

/** The loss of a case by the base of its name; a name that starts with none of them is an error. */
const preferences: Record<string, (inputs: Inputs) => Loss> = {
  sigmoid: ({ beta }) => preferenceLosses.dpo({ beta: number(beta) }),
  cdpo: (inputs) => preferenceLosses.dpo(smoothed(inputs)),
  hinge: ({ beta }) => preferenceLosses.hinge({ beta: number(beta) }),
  robust: (inputs) => preferenceLosses.robust(smoothed(inputs)),
  ipo: ({ beta }) => preferenceLosses.ipo({ beta: number(beta), lengthNormalised: true }),
  apo_zero: ({ beta }) => preferenceLosses['apo-zero']({ beta: number(beta) }),
  sppo_hard: ({ beta }) => preferenceLosses['sppo-hard']({ beta: number(beta) }),
  exo_pair: (inputs) => preferenceLosses['exo-pair'](smoothed(inputs)),
  simpo: ({ beta, gamma }) => preferenceLosses.simpo({ beta: number(beta), gamma: number(gamma) }),
  orpo: ({ beta }) => preferenceLosses.orpo({ beta: number(beta) }),
};

const smoothed = (inputs: Inputs) => ({
  beta: number(inputs.beta),
  labelSmoothing: number(inputs.label_smoothing ?? 0),
});

const interleave = <T>(chosen: T[], rejected: T[]): T[] => chosen.flatMap((row, i) => [row, rejected[i]!]);

function checkPreference(test: Case, inputs: Inputs, poisoned: boolean): void {
  const rows = (prefix: string) =>
    interleave(inputs[`${prefix}chosen_log_probs`] as Ragged, inputs[`${prefix}rejected_log_probs`] as Ragged);
  const answers = new Answers(rows(''), poisoned);
  const logprobs = answers.tokens(rows(''));
  const columns = { referenceLogprobs: answers.tokens(rows('ref_')) };
  const evaluate = (loss: Loss) => evaluateLoss(loss, { ...answers, columns }, { logprobs });
  const base = Object.keys(preferences).find((name) => test.name.startsWith(name));
  const result = evaluate(preferences[base!]!(inputs));
  const { expected, variants } = test;
  expectClose(result.loss, expected.loss!);
  checkSides(answers, result, gradientsOf(test));
  checkStatistics(result, expected);
  if (expected.log_odds) {
    const selection = select(answers.lengths, answers.mask);
    expectClose(logOddsRatio(TokenArray.leaf(selection, logprobs)).data, expected.log_odds);
  }
  if (variants?.sums) {
    const sums = evaluate(preferenceLosses.ipo({ beta: number(inputs.beta) }));
    expectClose(sums.loss, variants.sums.loss!);
    checkSides(answers, sums, gradientsOf(variants.sums as unknown as Case));
  }
}

function checkSides(answers: Answers, { gradients }: LossResult, expected: ReturnType<typeof gradientsOf>): void {
  expect(expected.length).toBeGreaterThan(0);
  const rows = answers.answers(gradients.logprobs!);
  for (const { wrt, values } of expected) {
    const side = wrt.startsWith('chosen') ? 0 : 1;
    expectClose(rows.filter((_, b) => b % 2 === side).flat(), values);
  }
}

function checkStatistics({ statistics }: LossResult, expected: Record<string, Json>): void {
  const names: Record<string, string> = {
    rewards_chosen: 'rewardsChosen',
    rewards_rejected: 'rewardsRejected',
    accuracy: 'accuracy',
    margin: 'margin',
    nll: 'nll',
  };
  for (const [theirs, ours] of Object.entries(names)) {
    if (expected[theirs] !== undefined) expectClose(statistics[ours]!, expected[theirs]);
  }
}

function checkKto(test: Case, inputs: Inputs, poisoned: boolean): void {
  const baseline = ktoBaseline(flat(inputs.kl_log_probs_sum!), flat(inputs.kl_ref_log_probs_sum!));
  expectClose(baseline, test.expected.kl!);
  const rows = inputs.log_probs as Ragged;
  const answers = new Answers(rows, poisoned);
  const columns = {
    referenceLogprobs: answers.tokens(inputs.ref_log_probs as Ragged),
    desirable: answers.tokens((inputs.desirable as Json[]).map(Number)),
    klBaseline: answers.tokens(rows.map(() => baseline)),
  };
  const loss = kto({
    beta: number(inputs.beta),
    desirableWeight: number(inputs.desirable_weight),
    undesirableWeight: number(inputs.undesirable_weight),
  });
  const result = evaluateLoss(loss, { ...answers, columns }, { logprobs: answers.tokens(rows) });
  expectClose(result.loss, test.expected.loss!);
  for (const { values } of gradientsOf(test)) {
    expectClose(answers.answers(result.gradients.logprobs!).flat(), values);
  }
}

function checkSafeRlhf(test: Case, inputs: Inputs, poisoned: boolean): void {
  if (inputs.episode_costs) checkMultiplier(test, inputs);
  else if (test.expected.token_costs) checkSafetyPenalty(test, inputs, poisoned);
  else checkCombinedAdvantages(test, inputs, poisoned);
}

function checkMultiplier({ expected }: Case, inputs: Inputs): void {
  const lagrange = lagrangeMultiplier({
    initial: number(inputs.initial),
    learningRate: number(inputs.learning_rate),
    threshold: number(inputs.threshold),
    window: number(inputs.window),
    delay: number(inputs.delay),
    maximum: inputs.maximum === null ? undefined : number(inputs.maximum),
  });
  const steps = (inputs.episode_costs as Ragged).map((costs) => {
    lagrange.update(flat(costs));
    return { multiplier: lagrange.multiplier, meanCost: lagrange.meanCost };
  });
  expectClose(
    steps.map(({ multiplier }) => multiplier),
    expected.lambda!,
  );
  expectClose(
    steps.map(({ meanCost }) => meanCost),
    expected.mean_costs!,
  );
}

function checkSafetyPenalty({ expected }: Case, inputs: Inputs, poisoned: boolean): void {
  const masks = inputs.response_mask as number[][];
  const atLastToken = (name: string) =>
    masks.map((row, b) => row.map((_, t) => (t === row.lastIndexOf(1) ? (inputs[name] as Json[])[b]! : 0)));
  const placed = { ...inputs, reward_scores: atLastToken('rewards'), cost_scores: atLastToken('costs') };
  const batch = new Batch(placed, poisoned);
  const { rewards, costs } = safetyPenalty(
    {
      lengths: batch.lengths,
      mask: batch.mask,
      rewardScores: batch.tokens('reward_scores'),
      costScores: batch.tokens('cost_scores'),
      logprobs: batch.tokens('old_log_probs'),
      reference: batch.tokens('ref_log_probs'),
    },
    { coefficient: number(inputs.beta), estimator: 'k1', rewardBound: number(inputs.clip) },
  );
  expectClose(rewards.rewards, expected.token_rewards!);
  expectClose(costs, expected.token_costs!);
}

function checkCombinedAdvantages(test: Case, inputs: Inputs, poisoned: boolean): void {
  const batch = new Batch(inputs, poisoned);
  const [rewards, costs] = [batch.tokens('reward_advantages'), batch.tokens('cost_advantages')];
  const advantages = combineAdvantages(rewards, costs, number(inputs.lambda), batch.mask);
  expectClose(advantages, test.expected.advantages!);
  const evaluate = (mode: string) =>
    evaluatePolicy(inputs, batch, combineAdvantages(rewards, costs, number(inputs.lambda)), mode);
  for (const [mode, value] of Object.entries(test.expected.loss as Record<string, Json>)) {
    expectClose(evaluate(mode).loss, value);
  }
  for (const { of, values } of gradientsOf(test)) expectClose(evaluate(of).gradients.logprobs!, values);
}

function evaluatePolicy(inputs: Inputs, batch: Batch, advantages: ArrayLike<number>, mode: string): LossResult {
  const loss = policyLoss({ clip: number(inputs.clip), aggregation: { mode: mode as AggregationMode } });
  const columns = { oldLogprobs: batch.tokens('old_log_probs'), advantages };
  const whole: LossBatch = { lengths: batch.lengths, mask: batch.mask, columns };
  return evaluateLoss(loss, whole, { logprobs: batch.tokens('log_probs'), entropies: batch.mask.map(() => 0) });
}

function checkPretrainingMix(test: Case, inputs: Inputs, poisoned: boolean): void {
  const rollout = new Batch(inputs, poisoned);
  const text = new Batch(inputs, poisoned, 'ptx_mask');
  const policy = evaluatePolicy(inputs, rollout, rollout.tokens('advantages'), 'token-mean');
  const pretraining = evaluateLoss(
    pretrainingLoss(number(inputs.coefficient)),
    { lengths: text.lengths, mask: text.mask, columns: {} },
    { logprobs: text.tokens('ptx_log_probs') },
  );
  expectClose(policy.loss, test.expected.policy_loss!);
  expectClose(pretraining.statistics.pretrainingLoss!, test.expected.ptx_loss!);
  expectClose(policy.loss + pretraining.loss, test.expected.loss!);
  for (const { wrt, values } of gradientsOf(test)) {
    expectClose((wrt.startsWith('ptx') ? pretraining : policy).gradients.logprobs!, values);
  }
}
