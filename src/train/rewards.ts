/** Rewards of a rollout: from a model, from a function of the user's, or their sum. */
import type { Awaitable, Rewards, Rollout } from '../algorithms/algorithm.js';
import { callSignal } from '../cluster/call-context.js';
import type { Engine } from '../engine/engine.js';
import { LockstepError } from '../errors.js';
import { openReward } from '../rewards/load-reward.js';
import { type RewardFunction, scoreSamples } from '../rewards/reward-function.js';
import { spreadRewards } from '../rewards/spread-rewards.js';
import { offsets } from '../workers/batches.js';
import { RewardWorker } from '../workers/reward.js';
import type { PpoConfig } from './config.js';
import { textsOf } from './samples.js';
import type { Workshop } from './task.js';

export interface RewardSource {
  readonly computeRewards: (rollout: Awaitable<Rollout>) => Promise<Rewards>;
}

/** `engine` is that of the reward model, when there is one. */
export async function openRewards(
  { reward, batch }: PpoConfig,
  engine: Engine | undefined,
  { pools, recorder, tokenizer, own }: Workshop,
): Promise<RewardSource> {
  const model =
    engine &&
    pools.place('reward', RewardWorker.create(engine, { microTokens: batch.microTokens }), {
      computeRewards: 'reward',
    });
  const opened = reward.function === undefined ? undefined : own(await openReward(reward.function));
  const fromFunction = async (rollout: Rollout): Promise<Rewards> => {
    const samples = textsOf(rollout, tokenizer).map((texts, i) => ({ ...texts, row: rollout.prompts[i]!.row }));
    const given = await scoreSamples(opened!.reward as RewardFunction, samples, {
      timeoutSeconds: reward.timeoutSeconds,
      signal: callSignal(),
    });
    return spreadRewards(given, rollout.lengths, rollout.promptLengths);
  };
  const call = (rollout: Rollout) => recorder.phase('rewardFunction', () => fromFunction(rollout));
  return {
    computeRewards: async (rollout) => {
      const [scored, given] = await Promise.all([model?.computeRewards(rollout), opened && call(await rollout)]);
      if (scored) checkFinite(scored);
      return scored && given ? sum(await rollout, scored, given) : (scored ?? given!);
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
