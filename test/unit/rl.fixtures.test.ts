/** Every golden case of the reinforcement-learning mathematics this library implements, also with NaN in masked inputs. */
import { adaptiveLambda, gae } from '../../src/losses/advantages.js';
import { type Aggregation, type AggregationMode, aggregate } from '../../src/losses/aggregation.js';
import type { KlEstimator } from '../../src/losses/kl.js';
import { evaluateLoss, type Loss, type LossBatch, type Outputs } from '../../src/losses/loss.js';
import { clippedSurrogate, type PolicyLossSettings, policyLoss } from '../../src/losses/policy.js';
import { bradleyTerry, costModel } from '../../src/losses/reward-model.js';
import { select } from '../../src/losses/selection.js';
import { explainedVariance, normaliseScores, whiten } from '../../src/losses/statistics.js';
import { gradients, TokenArray } from '../../src/losses/tokens.js';
import { valueLoss } from '../../src/losses/value.js';
import { type Categorical, categorical, categoricalGradient } from '../categorical.js';
import {
  Batch,
  type Case,
  describeTopics,
  expectClose,
  flat,
  gradientsOf,
  type Json,
  number,
  type Topic,
} from '../rl-fixtures.js';
import { checkKl, verlClamp } from './losses-kl-cases.js';

type Check = (test: Case, inputs: Record<string, Json>, poisoned: boolean) => void;

/** verl's bound on log ratios, which the expected numbers have. */
const verlLogRatioBound = 20;

const topics: Record<string, Check> = {
  gae: checkGae,
  whitening: checkWhitening,
  kl: checkKl,
  aggregation: checkAggregation,
  entropy: checkEntropy,
  value_loss: checkValueLoss,
  policy_ppo: checkPolicy,
  actor_total: checkActorTotal,
  reward_model: checkRewardModel,
};

describeTopics(
  Object.fromEntries(
    Object.entries(topics).map(([name, check]) => [
      name,
      (test: Case, topic: Topic) => {
        for (const poisoned of [false, true]) check(test, inputsOf(topic, test), poisoned);
      },
    ]),
  ),
);

function inputsOf({ batches }: Topic, { inputs }: Case): Record<string, Json> {
  if (typeof inputs.batch !== 'string') return inputs;
  const batch = batches![inputs.batch]!;
  const advantages = typeof inputs.advantages === 'string' ? { advantages: batch[inputs.advantages]! } : {};
  return { ...batch, ...inputs, ...advantages };
}

function checkGae({ expected }: Case, inputs: Record<string, Json>, poisoned: boolean): void {
  const batch = new Batch(inputs, poisoned);
  const { lengths, mask } = batch;
  const alpha = inputs.alpha === undefined ? undefined : number(inputs.alpha);
  const { advantages, returns } = gae(
    {
      lengths,
      mask,
      rewards: batch.tokens('token_level_rewards'),
      values: batch.tokens('values'),
      bootstrap: inputs.bootstrap_values === undefined ? undefined : flat(inputs.bootstrap_values),
    },
    {
      gamma: number(inputs.gamma),
      lambda: number(inputs.lambda ?? Number.NaN),
      valueLambda: inputs.lambda_value === undefined ? undefined : number(inputs.lambda_value),
      lengthAdaptive: alpha,
    },
  );
  expectClose(advantages, expected.advantages!);
  expectClose(returns, expected.returns!);
  if (expected.advantages_whitened) expectClose(whiten(advantages, mask), expected.advantages_whitened);
  if (expected.lambda_policy) {
    const counts = (inputs.response_mask as number[][]).map((row) => row.filter(Boolean).length);
    expectClose(
      counts.map((count) => adaptiveLambda(alpha!, count)),
      expected.lambda_policy,
    );
  }
}

function checkWhitening(test: Case, inputs: Record<string, Json>, poisoned: boolean): void {
  const batch = new Batch(inputs, poisoned, 'mask');
  const x = batch.tokens('x');
  const shiftMean = inputs.shift_mean as boolean;
  const bound = whiteningBound(test, flat(inputs.x!));
  expectClose(whiten(x, batch.mask, { shiftMean, single: 'formula' }), test.expected.whitened!, bound);
  const { bessel_exact_denominators: exact, population, unwhitened, zeros } = test.variants ?? {};
  const variant = (options: Parameters<typeof whiten>[2], value: Json | undefined) => {
    if (value !== undefined) expectClose(whiten(x, batch.mask, { shiftMean, ...options }), value);
  };
  variant({}, exact?.whitened);
  variant({ variance: 'population', single: 'formula' }, population?.whitened);
  variant({ single: 'keep' }, unwhitened?.whitened);
  variant({}, zeros?.whitened);
}

/** A case's own tolerance: "|error| <= 1e-5 times the offset over 1000". */
function whiteningBound({ tolerance }: Case, x: number[]): number | undefined {
  if (tolerance === undefined) return undefined;
  const stated = typeof tolerance === 'number' ? tolerance : Number(/<= (\d[\d.e-]*\d)/.exec(tolerance)![1]);
  const offset = String(tolerance).includes('times the offset over 1000') ? Math.max(...x.map(Math.abs)) / 1000 : 1;
  return stated * offset;
}

function checkAggregation(test: Case, inputs: Record<string, Json>, poisoned: boolean): void {
  const batch = new Batch(inputs, poisoned, 'mask');
  const selection = select(batch.lengths, batch.mask);
  const aggregation = { mode: inputs.mode as AggregationMode, horizon: number(inputs.horizon) };
  const losses = TokenArray.leaf(selection, batch.tokens('losses'));
  const result = aggregate(losses, aggregation);
  expectClose(result.value, test.expected.loss!);
  for (const { values } of gradientsOf(test)) expectClose(gradients(result, [losses])[0]!, values);

  const { zero_when_empty: zero, all_sequences: all, no_batch_size: none } = test.variants ?? {};
  if (zero) expectClose(result.value, zero.loss!);
  if (all) expectClose(aggregate(losses, { ...aggregation, sequences: 'all' }).value, all.loss!);
  if (none) expectClose(aggregate(losses, { ...aggregation, sequences: 'none' }).value, none.loss!);

  const splits = (inputs.splits ?? []) as number[][];
  const rankLosses = splits.map((rows) => {
    const pick = (name: string) => rows.map((row) => (inputs[name] as Json[][])[row]!);
    const rank = new Batch({ losses: pick('losses'), mask: pick('mask') }, poisoned, 'mask');
    const part = select(rank.lengths, rank.mask, selection.totals);
    return aggregate(TokenArray.leaf(part, rank.tokens('losses')), aggregation).value;
  });
  // The fixture's ranks multiply by their number and average; ours add up.
  if (test.expected.rank_losses) {
    expectClose(
      rankLosses.map((loss) => loss * splits.length),
      test.expected.rank_losses,
    );
    expectClose(
      rankLosses.reduce((a, b) => a + b, 0),
      test.expected.loss!,
    );
  }
}

function checkEntropy(test: Case, inputs: Record<string, Json>, poisoned: boolean): void {
  const temperature = number(inputs.temperature);
  const labels = flat(inputs.labels!);
  const tokens = (inputs.logits as number[][][]).flat().map((logits) => categorical(logits, temperature));
  expectClose(
    tokens.map(({ logprobs }, t) => logprobs[labels[t]!]!),
    test.expected.log_probs!,
  );
  expectClose(
    tokens.map(({ entropy }) => entropy),
    test.expected.entropies!,
  );
  expectClose(
    tokens.map(({ sumOfSquares }) => sumOfSquares),
    test.expected.sum_pi_squared!,
  );
  const batch = new Batch({ ...inputs, entropies: [tokens.map(({ entropy }) => entropy)] }, poisoned);
  const selection = select(batch.lengths, batch.mask);
  const entropies = TokenArray.leaf(selection, batch.tokens('entropies'));
  const bonus = (mode: string) =>
    aggregate(entropies, { mode: mode as AggregationMode, horizon: number(inputs.horizon) });
  for (const [mode, value] of Object.entries(test.expected.bonus!)) expectClose(bonus(mode).value, value as Json);
  for (const { of, values } of gradientsOf(test)) {
    const mode = /^bonus\[(.*)\]$/.exec(of)?.[1];
    const upstream = mode ? gradients(bonus(mode), [entropies])[0]! : Float64Array.from(batch.mask);
    const logits = tokens.flatMap((token: Categorical, t) => [
      ...categoricalGradient(token, { [mode ? 'entropy' : 'logprob']: upstream[t], label: labels[t], temperature }),
    ]);
    expectClose(logits, values);
  }
}

function checkValueLoss(test: Case, inputs: Record<string, Json>, poisoned: boolean): void {
  const batch = new Batch(inputs, poisoned);
  if (test.expected.explained_variance !== undefined) {
    const values = batch.tokens((inputs.of as string | undefined) ?? 'old_values');
    const returns = batch.tokens('returns');
    expectClose(explainedVariance(values, returns, batch.mask), test.expected.explained_variance);
    const variant = test.variants?.population?.explained_variance;
    const population = { variance: 'population', epsilon: 0 } as const;
    if (variant !== undefined) expectClose(explainedVariance(values, returns, batch.mask, population), variant);
    return;
  }
  const columns = { oldValues: batch.tokens('old_values'), returns: batch.tokens('returns') };
  const clip = inputs.clip === null ? undefined : number(inputs.clip);
  const evaluate = (aggregation: Aggregation) =>
    evaluateLoss(valueLoss({ clip, aggregation }), { ...batch, columns }, { values: batch.tokens('values') });
  checkModes(test, number(inputs.horizon), evaluate, 'values');
  const token = evaluate({ mode: 'token-mean' });
  expectClose(token.statistics.clipFraction!, test.expected.clip_fraction!);
  const skyrl = test.variants?.skyrl;
  if (skyrl) expectClose(evaluate({ mode: 'seq-mean-token-mean', sequences: 'all' }).loss, skyrl.loss!);
}

/** The loss of every aggregation mode that a case names, and the gradients it gives. */
function checkModes(
  test: Case,
  horizon: number,
  evaluate: (aggregation: Aggregation) => ReturnType<typeof evaluateLoss>,
  output: 'logprobs' | 'values',
): void {
  for (const [mode, value] of Object.entries(test.expected.loss as Record<string, Json>)) {
    expectClose(evaluate({ mode: mode as AggregationMode, horizon }).loss, value);
  }
  for (const { of, values } of gradientsOf(test)) {
    expectClose(evaluate({ mode: of as AggregationMode, horizon }).gradients[output]!, values);
  }
}

function policyInputs(inputs: Record<string, Json>, poisoned: boolean): { batch: LossBatch; outputs: Outputs } {
  const batch = new Batch(inputs, poisoned);
  const columns = {
    oldLogprobs: batch.tokens('old_log_probs'),
    advantages: batch.broadcast('advantages'),
    referenceLogprobs: batch.tokens('ref_log_probs'),
  };
  const entropies = inputs.entropies ? batch.tokens('entropies') : batch.mask.map(() => 0);
  return { batch: { ...batch, columns }, outputs: { logprobs: batch.tokens('log_probs'), entropies } };
}

function policySettings(inputs: Record<string, Json>): PolicyLossSettings {
  return {
    clip: number(inputs.clip_low),
    clipHigh: number(inputs.clip_high),
    dualClip: inputs.clip_c === null ? undefined : number(inputs.clip_c),
    logRatioBound: verlLogRatioBound,
  };
}

function checkPolicy(test: Case, inputs: Record<string, Json>, poisoned: boolean): void {
  const { batch, outputs } = policyInputs(inputs, poisoned);
  const settings = policySettings(inputs);
  const horizon = number(inputs.horizon);
  const run = (loss: Loss) => evaluateLoss(loss, batch, outputs);
  checkModes(test, horizon, (aggregation) => run(policyLoss({ ...settings, aggregation })), 'logprobs');

  const selection = select(batch.lengths, batch.mask);
  const tokens = clippedSurrogate(
    {
      logprobs: TokenArray.leaf(selection, outputs.logprobs!),
      oldLogprobs: TokenArray.constant(selection, batch.columns.oldLogprobs!),
      advantages: TokenArray.constant(selection, batch.columns.advantages!),
    },
    settings,
  );
  expectClose(tokens.expand(), test.expected.token_losses!);
  const { statistics } = run(policyLoss(settings));
  const metrics = test.expected.metrics as Record<string, Json>;
  expectClose(statistics.clipFraction!, metrics.clip_fraction!);
  expectClose(statistics.dualClipFraction!, metrics.clip_fraction_lower!);
  expectClose(statistics.klLinear!, metrics.approx_kl_k1!);
  expectClose(statistics.kl!, metrics.approx_kl_k3!);

  const trl: Record<string, Aggregation> = {
    trl_grpo: { mode: 'seq-mean-token-mean', sequences: 'all' },
    trl_dapo: { mode: 'token-mean' },
    trl_dr_grpo: { mode: 'seq-mean-token-sum-norm', horizon, sequences: 'all' },
  };
  for (const [name, aggregation] of Object.entries(trl)) {
    const variant = test.variants?.[name];
    if (!variant) continue;
    const result = run(policyLoss({ ...settings, logRatioBound: undefined, aggregation }));
    expectClose(result.loss, variant.loss!);
    if (variant.gradient) expectClose(result.gradients.logprobs!, variant.gradient);
  }
}

function checkActorTotal(test: Case, inputs: Record<string, Json>, poisoned: boolean): void {
  const { batch, outputs } = policyInputs(inputs, poisoned);
  const estimator = inputs.estimator as KlEstimator;
  const aggregation = { mode: inputs.mode as AggregationMode, horizon: number(inputs.horizon) };
  const plain = { ...policySettings(inputs), aggregation };
  const entropyCoefficient = number(inputs.entropy_coefficient);
  const kl = { coefficient: number(inputs.kl_coefficient), estimator, clamp: verlClamp(estimator) };
  const evaluate = (settings: PolicyLossSettings) => evaluateLoss(policyLoss(settings), batch, outputs);
  const total = evaluate({ ...plain, entropyCoefficient, kl });
  expectClose(total.loss, test.expected.loss!);
  expectClose(total.statistics.policyLoss!, test.expected.policy_loss!);
  expectClose(evaluate(plain).loss - evaluate({ ...plain, entropyCoefficient: 1 }).loss, test.expected.entropy!);
  expectClose(evaluate({ ...plain, kl: { ...kl, coefficient: 1 } }).loss - evaluate(plain).loss, test.expected.kl!);
  for (const { wrt, values } of gradientsOf(test)) {
    expectClose(total.gradients[wrt === 'entropies' ? 'entropies' : 'logprobs']!, values);
  }
}

function checkRewardModel(test: Case, inputs: Record<string, Json>): void {
  if (inputs.reference_scores) {
    const scores = flat(inputs.scores!);
    const reference = flat(inputs.reference_scores);
    expectClose(normaliseScores(scores, reference), test.expected.normalised!);
    const bessel = test.variants?.bessel;
    if (bessel) expectClose(normaliseScores(scores, reference, 'bessel'), bessel.normalised!);
    return;
  }
  const chosen = flat(inputs.chosen!);
  const rejected = flat(inputs.rejected!);
  const interleave = (a: number[], b: number[]) => a.flatMap((x, i) => [x, b[i]!]);
  const sign = (safe: Json) => (safe as boolean[]).map((isSafe) => (isSafe ? -1 : 1));
  const zeros = chosen.map(() => 0);
  const columns: Record<string, number[]> = inputs.chosen_is_safe
    ? { unsafe: interleave(sign(inputs.chosen_is_safe), sign(inputs.rejected_is_safe!)) }
    : { margins: interleave(inputs.margin ? flat(inputs.margin) : zeros, zeros) };
  const ones = Array<number>(2 * chosen.length).fill(1);
  const coefficient = inputs.coefficient === undefined ? 0 : number(inputs.coefficient);
  const regularized = test.formula.includes('score^2');
  const loss: Loss = inputs.chosen_is_safe
    ? costModel()
    : bradleyTerry(regularized ? { regularization: coefficient } : { centering: coefficient });
  const outputs = { values: interleave(chosen, rejected) };
  const result = evaluateLoss(loss, { lengths: ones, mask: ones, columns }, outputs);
  expectClose(result.loss, test.expected.loss!);
  if (test.expected.accuracy !== undefined) expectClose(result.statistics.accuracy!, test.expected.accuracy);
  if (test.expected.mean_margin !== undefined) expectClose(result.statistics.margin!, test.expected.mean_margin);
  for (const { wrt, values } of gradientsOf(test)) {
    const offset = wrt === 'chosen' ? 0 : 1;
    expectClose(
      result.gradients.values!.filter((_, i) => i % 2 === offset),
      values,
    );
  }
}
