/** Rewards or costs of a rollout: the weighted sum of the terms that the configuration lists. */
import { readFile } from 'node:fs/promises';
import type { Awaitable, Rewards, Rollout } from '../algorithms/algorithm.js';
import { callSignal } from '../cluster/call-context.js';
import { LockstepError } from '../errors.js';
import { type BuiltIn, builtInReward } from '../rewards/built-in/registry.js';
import { combineRewards } from '../rewards/combine-rewards.js';
import { type RewardSample, scoreSamples } from '../rewards/reward-function.js';
import { spreadRewards } from '../rewards/spread-rewards.js';
import type { RewardKind, RewardTerm, RewardTermOf } from './reward-schema.js';
import { kindOf } from './reward-schema.js';
import { openRewardThreads, type Scorer } from './reward-threads.js';
import { textsOf } from './samples.js';
import type { Workshop } from './task.js';

/** What judges rollouts. */
export type Judge = (rollout: Awaitable<Rollout>) => Promise<Rewards>;

/** `model` is the model that scores, when there is one. Throws what opening a term does. */
export async function openJudge(
  reward: readonly RewardTerm[],
  kind: 'reward' | 'cost',
  model: Judge | undefined,
  { recorder, tokenizer, own, interrupt }: Pick<Workshop, 'recorder' | 'tokenizer' | 'own' | 'interrupt'>,
): Promise<Judge> {
  const scorers = new Map<RewardTerm, Scorer>();
  for (const term of reward) {
    if (!tokenizer) checkReadable(term);
    const scorer = await openScorer(term, interrupt);
    if (scorer) scorers.set(term, own(scorer));
  }
  const fromScorers = async (rollout: Rollout): Promise<[RewardTerm, Rewards][]> => {
    const samples = textsOf(rollout, tokenizer).map((texts, i) => ({ ...texts, row: rollout.prompts[i]!.row }));
    return inParallel([...scorers], async ([term, scorer], signal) => {
      const given = await scorer.score(samples, signal);
      return [term, spreadRewards(given, rollout.lengths, rollout.promptLengths)];
    });
  };
  // A function answers one request at a time; ReMax asks about two rollouts at once.
  let turn: Promise<unknown> = Promise.resolve();
  const inTurn = (rollout: Rollout): Promise<[RewardTerm, Rewards][]> => {
    const scored = turn.then(() => recorder.phase(`${kind}Function`, () => fromScorers(rollout)));
    turn = scored.catch(() => undefined);
    return scored;
  };
  return async (given) => {
    // The model's turn is taken now; functions read arrays, so that they wait for the rollout.
    const scoring = model?.(given);
    const rollout = await given;
    const [scored, answered] = await Promise.all([scoring, scorers.size > 0 ? inTurn(rollout) : []]);
    if (scored) checkFinite(scored, kind);
    const byTerm = new Map(answered);
    const terms = reward.map((term) => ({ ...term, rewards: byTerm.get(term) ?? scored! }));
    return {
      ...combineRewards(terms, rollout.lengths, rollout.responseMask),
      ...(terms.length > 1 ? { terms: Object.fromEntries(terms.map((term) => [term.name, term.rewards.scores])) } : {}),
    };
  };
}

/** All at once; the first that fails aborts the others, and is thrown when they have ended. So does the end of the iteration. */
async function inParallel<T, R>(items: readonly T[], work: (item: T, signal: AbortSignal) => Promise<R>): Promise<R[]> {
  const failed = new AbortController();
  const released = callSignal();
  const signal = released ? AbortSignal.any([failed.signal, released]) : failed.signal;
  const results = items.map((item) =>
    work(item, signal).catch((error: unknown) => {
      failed.abort(error);
      throw error;
    }),
  );
  await Promise.allSettled(results);
  signal.throwIfAborted();
  return Promise.all(results);
}

type Opener<Kind extends RewardKind> = (
  term: RewardTermOf<Kind>,
  name: string,
  signal: AbortSignal | undefined,
) => Promise<Scorer> | Scorer | undefined;

/** How each kind of term is opened. Those that look at every character once run here; what may take long has threads. */
const openers: { readonly [Kind in RewardKind]: Opener<Kind> } = {
  model: () => undefined,
  function: (term, _, signal) => {
    const name = `The reward function of ${term.function}`;
    return openRewardThreads({ file: term.function }, { ...term, name, signal });
  },
  regex: (term, name, signal) => openRewardThreads({ builtIn: ['regex', term.regex] }, { ...term, name, signal }),
  jsonSchema: async (term, name, signal) => {
    const { extract } = term.jsonSchema;
    const schema = 'file' in term.jsonSchema ? await readSchema(term.jsonSchema.file) : term.jsonSchema.schema;
    return openRewardThreads({ builtIn: ['jsonSchema', { schema, extract }] }, { ...term, name, signal });
  },
  exact: (term, name) => here(['exact', term.exact], name),
  numeric: (term, name) => here(['numeric', term.numeric], name),
  boxed: (term, name) => here(['boxed', term.boxed], name),
  length: (term, name) => here(['length', term.length], name),
  cosine: (term, name) => here(['cosine', term.cosine], name),
  repetition: (term, name) => here(['repetition', term.repetition], name),
  http: (term, name) => here(['http', term.http], name),
};

function openScorer(term: RewardTerm, signal: AbortSignal | undefined): ReturnType<Opener<RewardKind>> {
  // A term is one of its kind; the type of an indexed table does not keep them together.
  const open = openers[kindOf(term)] as Opener<RewardKind>;
  return open(term as never, `The reward "${term.name}"`, signal);
}

/** A built-in reward in this thread. */
function here(builtIn: BuiltIn, name: string): Scorer {
  const reward = builtInReward(builtIn);
  return {
    // The endpoint measures the time of its requests; the others compute in linear time.
    score: (samples: readonly RewardSample[], signal) =>
      scoreSamples(reward, samples, { name, signal, timeoutSeconds: Number.POSITIVE_INFINITY }),
    close: async () => {},
  };
}

async function readSchema(file: string): Promise<unknown> {
  try {
    return JSON.parse(await readFile(file, 'utf8'));
  } catch (cause) {
    throw new LockstepError(
      'REWARD_SETTINGS',
      `cannot read the JSON schema ${file}: ${(cause as Error).message}; give the path of a JSON file, relative to the current directory`,
      { file },
      { cause },
    );
  }
}

/** These read texts, and all texts would be empty. */
const readers: readonly RewardKind[] = ['exact', 'numeric', 'boxed', 'regex', 'jsonSchema', 'cosine'];

function checkReadable(term: RewardTerm): void {
  if (!readers.includes(kindOf(term))) return;
  throw new LockstepError(
    'REWARD_TOKENIZER',
    `the reward "${term.name}" reads the text of responses, and the model has no tokenizer.json to make it; add the file to the ` +
      "model's folder, or use a reward function over tokens",
    { reward: term.name },
  );
}

function checkFinite({ scores }: Rewards, kind: 'reward' | 'cost'): void {
  const bad = scores.findIndex((score) => !Number.isFinite(score));
  if (bad < 0) return;
  throw new LockstepError(
    'REWARD_NOT_FINITE',
    `the ${kind} model's score of sample ${bad} is ${scores[bad]}; its weights or the policy have gone wrong`,
    { sample: bad, score: scores[bad] },
  );
}
