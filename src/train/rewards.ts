/** Rewards of a rollout: from a model, from a function of the user's, or their sum. */
import type { Awaitable, Rewards, Rollout } from '../algorithms/algorithm.js';
import type { Engine } from '../engine/engine.js';
import { LockstepError } from '../errors.js';
import { openReward } from '../rewards/load-reward.js';
import { type RewardFunction, scoreSamples } from '../rewards/reward-function.js';
import { spreadRewards } from '../rewards/spread-rewards.js';
import { offsets } from '../workers/batches.js';
import { RewardWorker } from '../workers/reward.js';
import type { ConfigOf, RolloutConfig } from './config.js';
import { textsOf } from './samples.js';
import type { Workshop } from './task.js';

export interface RewardSource {
  computeRewards(rollout: Awaitable<Rollout>): Promise<Rewards>;
}

/** `engine` is that of the model that scores, when there is one; `phase` is the name of its calls. */
export async function openRewards(
  reward: ConfigOf<'ppo'>['reward'],
  phase: 'reward' | 'cost',
  engine: Engine | undefined,
  { batch }: Pick<RolloutConfig, 'batch'>,
  { turns, recorder, tokenizer, own }: Workshop,
): Promise<RewardSource> {
  const model =
    engine &&
    turns.wrap(RewardWorker.create(engine, { microTokens: batch.microTokens }), { computeRewards: phase }, recorder);
  const opened = reward.function === undefined ? undefined : own(await openReward(reward.function));
  const fromFunction = async (rollout: Rollout): Promise<Rewards> => {
    const samples = textsOf(rollout, tokenizer).map((texts, i) => ({ ...texts, row: rollout.prompts[i]!.row }));
    const given = await scoreSamples(opened!.reward as RewardFunction, samples, {
      timeoutSeconds: reward.timeoutSeconds,
    });
    return spreadRewards(given, rollout.lengths, rollout.promptLengths);
  };
  return {
    computeRewards: async (given) => {
      const rollout = await given;
      const [scored, answered] = await Promise.all([
        model?.computeRewards(rollout),
        opened && recorder.phase(`${phase}Function`, () => fromFunction(rollout)),
      ]);
      if (scored) checkFinite(scored);
      return scored && answered ? sum(rollout, scored, answered) : (scored ?? answered!);
    },
  };
}

function checkFinite({ scores }: Rewards): void {
  const bad = scores.findIndex((score) => !Number.isFinite(score));
  if (bad < 0) return;
  throw new LockstepError(
    'REWARD_NOT_FINITE',
    `the reward model's score of sample ${bad} is ${scores[bad]}; its weights or the policy have gone wrong`,
    { sample: bad, score: scores[bad] },
  );
}

/** The model's score is added at the last token of a response whose other rewards lie on tokens. */
function sum(rollout: Rollout, model: Rewards, given: Rewards): Rewards {
  const scores = model.scores.map((score, row) => score + given.scores[row]!);
  if (!given.tokens) return { scores };
  const tokens = given.tokens.slice();
  const starts = offsets(rollout.lengths);
  model.scores.forEach((score, row) => {
    const responds = rollout.lengths[row]! > rollout.promptLengths[row]!;
    if (responds) tokens[starts[row + 1]! - 2]! += score;
  });
  return { scores, tokens };
}
