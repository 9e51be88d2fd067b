/** Checks of published literals of policy losses: their values per token and of a batch, with and without weights. */

import { evaluateLoss, type Loss, type LossBatch, type LossResult, type Outputs } from '../../src/losses/loss.js';
import type { PolicyTermSettings } from '../../src/losses/policy.js';
import { policyLosses } from '../../src/losses/policy-losses.js';
import { correctionWeights } from '../../src/losses/rollout-correction.js';
import { categorical } from '../categorical.js';
import { type Case, expectClose, gradientsOf, number } from '../rl-fixtures.js';
import { tokenLosses } from './rl-policy-cases.js';
import { bound, expectPrinted, type Formula, has, numbers, ones, rowsAndMask, text } from './rl-published-inputs.js';

export const policyFormulas: Record<string, Formula> = {
  'clipped surrogate of logits': {
    is: (test) => has(test, 'logits', 'old_logits', 'advantages', 'clip'),
    check: checkSurrogateOfLogits,
  },
  'policy gradient of logits': {
    is: (test) => has(test, 'logits', 'actions', 'advantages', 'weights'),
    check: checkGradientOfLogits,
  },
  'policy losses with weights of rollout correction': {
    is: (test) =>
      has(test, 'advantages', 'log_probs', 'old_log_probs', 'rollout_log_probs') &&
      (/weight|\bw\b/.test(text(test)) || has(test, 'cap')),
    check: checkWeighted,
  },
  'policy losses': {
    is: (test) => has(test, 'advantages') && (has(test, 'log_probs') || has(test, 'ratios')),
    check: checkPlain,
  },
};

type LossOf = (terms: PolicyTermSettings) => Loss;
type Level = 'token' | 'sequence';

const clips = ({ inputs }: Case) => ({
  clip: number(inputs.clip),
  clipHigh: inputs.clip_high === undefined ? undefined : number(inputs.clip_high),
});
const ppo = (test: Case): LossOf => {
  const dualClip = test.inputs.c === undefined ? undefined : number(test.inputs.c);
  return (terms) => policyLosses.ppo({ ...clips(test), dualClip, ...terms });
};
const unclippedGspo: LossOf = (terms) => policyLosses.gspo({ clip: Infinity, ...terms });

const reinforce: LossOf = (terms) => policyLosses.reinforce(terms);

/** Losses whose inputs are those of PPO or REINFORCE, by what a case calls them. */
const families: readonly (readonly [RegExp, (test: Case) => LossOf])[] = [
  [/cispo/, (test) => (terms) => policyLosses.cispo({ ...clips(test), ...terms })],
  [/gspo/, (test) => (terms) => policyLosses.gspo({ ...clips(test), ...terms })],
  [/reinforce/, () => reinforce],
];

function lossOf(test: Case): LossOf {
  const family = families.find(([pattern]) => pattern.test(text(test)));
  if (family) return family[1](test);
  return has(test, 'clip') ? ppo(test) : reinforce;
}

function policyBatch(test: Case): { batch: LossBatch; outputs: Outputs } {
  const { lengths, mask } = rowsAndMask(test, 'advantages');
  const logprobs = has(test, 'ratios') ? numbers(test, 'ratios').map(Math.log) : numbers(test, 'log_probs');
  // A loss without a ratio has no old policy: its log-probs reach statistics alone.
  const oldLogprobs = has(test, 'old_log_probs') ? numbers(test, 'old_log_probs') : logprobs.map(() => 0);
  const columns = { oldLogprobs, advantages: numbers(test, 'advantages') };
  return { batch: { lengths, mask, columns }, outputs: { logprobs, entropies: logprobs.map(() => 0) } };
}

/** Of a packed array, the first number of each row. */
function firstTokens(lengths: ArrayLike<number>, packed: ArrayLike<number>): number[] {
  let end = 0;
  return Array.from(lengths, (length) => {
    end += length;
    return packed[end - length]!;
  });
}

function checkPlain(test: Case): void {
  const { batch, outputs } = policyBatch(test);
  const loss = lossOf(test);
  expectPrinted(test, 'tokens', tokenLosses(loss, batch, outputs));
  checkTotals(test, (terms) => evaluateLoss(loss(terms), batch, outputs));
  // With A = −1 and no clip, the loss of a token is the ratio of its sequence.
  const advantages = ones(batch.mask.length).map((one) => -one);
  const ratios = tokenLosses(unclippedGspo, { ...batch, columns: { ...batch.columns, advantages } }, outputs);
  expectPrinted(test, 'ratio', firstTokens(batch.lengths, ratios));
}

/** Token mean, sum, and derivatives of the token mean by the log-probs. */
function checkTotals(test: Case, evaluate: (terms: PolicyTermSettings) => LossResult): void {
  const [mean, sum] = (['token-mean', 'token-sum'] as const).map((mode) => evaluate({ aggregation: { mode } }));
  expectPrinted(test, 'mean', mean!.loss);
  expectPrinted(test, 'sum', sum!.loss);
  for (const { of, values } of gradientsOf(test)) {
    expectClose((of === 'sum' ? sum : mean)!.gradients.logprobs!, values, bound(test));
  }
}

/**
 * The weights are min(r, cap), of tokens or of sequences, on the loss that the case names; `token` and `sequence` are
 * means of PPO under weights of tokens and of GSPO under those of sequences.
 */
function checkWeighted(test: Case): void {
  const { batch, outputs } = policyBatch(test);
  const { lengths, mask, columns } = batch;
  const rolloutLogprobs = numbers(test, 'rollout_log_probs');
  const high = has(test, 'cap') ? number(test.inputs.cap) : Infinity;
  const weightsOf = (level: Level) =>
    correctionWeights(
      { lengths, mask, oldLogprobs: columns.oldLogprobs!, rolloutLogprobs },
      { rule: 'tis', level, high },
    ).weights;
  const evaluate = (loss: LossOf, level: Level) => (terms: PolicyTermSettings) => {
    const weighted = { ...batch, columns: { ...columns, weights: weightsOf(level) } };
    return evaluateLoss(loss({ ...terms, weighted: true }), weighted, outputs);
  };
  const tokenMean = { aggregation: { mode: 'token-mean' } } as const;
  expectPrinted(test, 'token', evaluate(ppo(test), 'token')(tokenMean).loss);
  expectPrinted(test, 'sequence', evaluate(unclippedGspo, 'sequence')(tokenMean).loss);
  const level = /sequence|sum\(/.test(text(test)) ? 'sequence' : 'token';
  const weights = weightsOf(level);
  expectPrinted(test, 'weight', level === 'sequence' ? firstTokens(lengths, weights) : weights);
  checkTotals(test, evaluate(lossOf(test), level));
}

/** log p of the actions under rows of logits. */
function logprobsOf(test: Case, name: string, actions: number[]): number[] {
  return (test.inputs[name] as number[][]).map((logits, t) => categorical(logits).logprobs[actions[t]!]!);
}

/** The token mean of a loss over one sequence. */
function meanOf(loss: LossOf, logprobs: number[], columns: Record<string, number[]>, weighted?: true): number {
  const batch = { lengths: [logprobs.length], mask: ones(logprobs.length), columns };
  const terms = { aggregation: { mode: 'token-mean' }, weighted } as const;
  return evaluateLoss(loss(terms), batch, { logprobs, entropies: logprobs.map(() => 0) }).loss;
}

function checkSurrogateOfLogits(test: Case): void {
  const actions = numbers(test, 'actions');
  const logprobs = logprobsOf(test, 'logits', actions);
  const oldLogprobs = logprobsOf(test, 'old_logits', actions);
  const losses = [1, -1].map((sign) => {
    const advantages = numbers(test, 'advantages').map((advantage) => sign * advantage);
    return meanOf(ppo(test), logprobs, { oldLogprobs, advantages });
  });
  expectClose(losses, test.expected.losses!, bound(test));
}

/** The second row of the case: actions 0, −A, logits + 1 (the same policy) and weights − 1. */
function checkGradientOfLogits(test: Case): void {
  const actions = numbers(test, 'actions');
  const advantages = numbers(test, 'advantages');
  const weights = numbers(test, 'weights');
  const shifted = (test.inputs.logits as number[][]).map((row) => row.map((logit) => logit + 1));
  const second: Case = { ...test, inputs: { ...test.inputs, logits: shifted } };
  const rows = [
    { logprobs: logprobsOf(test, 'logits', actions), advantages, weights },
    {
      logprobs: logprobsOf(
        second,
        'logits',
        actions.map(() => 0),
      ),
      advantages: advantages.map((advantage) => -advantage),
      weights: weights.map((weight) => weight - 1),
    },
  ];
  const losses = rows.map(({ logprobs, ...columns }) =>
    meanOf(reinforce, logprobs, { ...columns, oldLogprobs: logprobs }, true),
  );
  expectClose(losses, test.expected.losses!, bound(test));
}
