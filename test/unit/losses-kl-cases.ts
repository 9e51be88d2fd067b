/** Checks of the golden cases of KL: estimators, exact divergence, penalty in the reward, adaptive controller. */
import { meanOverTokens } from '../../src/losses/aggregation.js';
import { adaptiveKl } from '../../src/losses/controllers.js';
import {
  importanceWeighted,
  type KlClamp,
  type KlEstimator,
  type KlPenaltySettings,
  klEstimate,
  klPenalty,
} from '../../src/losses/kl.js';
import { select } from '../../src/losses/selection.js';
import { gradients, TokenArray } from '../../src/losses/tokens.js';
import { categorical, categoricalKl } from '../categorical.js';
import { Batch, type Case, expectClose, flat, gradientsOf, type Json, number } from '../rl-fixtures.js';

/** verl's clamps, which the expected numbers of k3 have. */
export const verlClamp = (estimator: KlEstimator): KlClamp =>
  estimator.startsWith('k3') ? { input: 20, output: 10 } : {};

export function checkKl(test: Case, inputs: Record<string, Json>, poisoned: boolean): void {
  if (inputs.logits) checkFullKl(test, inputs);
  else if (inputs.current_kl) checkController(test, inputs);
  else if (inputs.token_level_scores) checkKlInReward(test, inputs, poisoned);
  else checkEstimator(test, inputs, poisoned);
}

function checkEstimator(test: Case, inputs: Record<string, Json>, poisoned: boolean): void {
  const batch = new Batch(inputs, poisoned);
  const selection = select(batch.lengths, batch.mask);
  const reference = TokenArray.constant(selection, batch.tokens('ref_log_probs'));
  const check = (expected: Record<string, Json>, gradient: Json, clamp: KlClamp) => {
    const logprobs = TokenArray.leaf(selection, batch.tokens('log_probs'));
    let kl = klEstimate(logprobs, reference, (inputs.estimator ?? 'k3') as KlEstimator, clamp);
    if (inputs.old_log_probs) {
      kl = importanceWeighted(kl, logprobs, TokenArray.constant(selection, batch.tokens('old_log_probs')));
    }
    expectClose(kl.expand(), expected.kl!);
    if (expected.masked_mean !== undefined) expectClose(meanOverTokens(kl).value, expected.masked_mean);
    expectClose(gradients(kl.sum(), [logprobs])[0]!, gradient);
  };
  const clamp = inputs.old_log_probs ? {} : verlClamp(inputs.estimator as KlEstimator);
  check(test.expected, gradientsOf(test)[0]!.values, clamp);
  const { output_10: output, input_20_output_10: both, unclamped } = test.variants ?? {};
  if (output) check(output, output.gradient!, { output: 10 });
  if (both) check(both, both.gradient!, { input: 20, output: 10 });
  if (unclamped) check(unclamped, unclamped.gradient!, {});
}

function checkFullKl(test: Case, inputs: Record<string, Json>): void {
  const rows = (inputs.logits as number[][]).map((logits) => categorical(logits));
  const references = (inputs.ref_logits as number[][]).map((logits) => categorical(logits));
  const forward = rows.map((row, i) => categoricalKl(row, references[i]!));
  expectClose(
    forward.map(({ kl }) => kl),
    test.expected.kl!,
  );
  expectClose(
    rows.map((row, i) => categoricalKl(references[i]!, row).kl),
    test.expected.reverse_kl!,
  );
  expectClose(
    forward.flatMap(({ gradient }) => [...gradient]),
    gradientsOf(test)[0]!.values,
  );
}

function checkController({ expected }: Case, inputs: Record<string, Json>): void {
  const controller = adaptiveKl({
    coefficient: number(inputs.initial),
    target: number(inputs.target),
    horizon: number(inputs.horizon),
  });
  const sequences = flat(inputs.n_steps!);
  const coefficients = flat(inputs.current_kl!).map((kl, i) => {
    controller.update(kl, sequences[i]!);
    return controller.coefficient;
  });
  expectClose(coefficients, expected.coefficients!);
}

export function checkKlInReward({ expected, variants }: Case, inputs: Record<string, Json>, poisoned: boolean): void {
  const batch = new Batch(inputs, poisoned);
  const estimator = inputs.estimator as KlEstimator;
  const penalty = (settings: Partial<KlPenaltySettings> = {}) =>
    klPenalty(
      {
        lengths: batch.lengths,
        mask: batch.mask,
        scores: batch.tokens('token_level_scores'),
        logprobs: batch.tokens('log_probs'),
        reference: batch.tokens('ref_log_probs'),
      },
      { coefficient: number(inputs.beta), estimator, clamp: verlClamp(estimator), sequences: 'all', ...settings },
    );
  const { rewards, mean } = penalty();
  expectClose(rewards, expected.token_level_rewards!);
  expectClose(mean, expected.current_kl!);
  const controller = adaptiveKl({
    coefficient: number(inputs.beta),
    target: number(inputs.target),
    horizon: number(inputs.horizon),
  });
  controller.update(mean, batch.lengths.length);
  expectClose(controller.coefficient, expected.next_coefficient!);
  const { clamped_sum: sum, clamped_score: score } = variants ?? {};
  if (sum) expectClose(penalty({ rewardBound: number(sum.clip_range_score) }).rewards, sum.token_level_rewards!);
  if (score) expectClose(penalty({ scoreBound: number(score.clip_range_score) }).rewards, score.token_level_rewards!);
}
