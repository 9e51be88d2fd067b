/** Reinforcement learning as a task: one iteration of prompts, rollout, rewards and updates per step. */
import type { Models, Prompt, Rollout, RolloutAlgorithm } from '../algorithms/algorithm.js';
import { costMetrics, rolloutMetrics } from '../algorithms/metrics.js';
import { sumsBySequence } from '../algorithms/rollout.js';
import { sftBatch } from '../algorithms/sft.js';
import { evenLength } from '../data/batch.js';
import { checkTokens, toPrompt } from '../data/examples.js';
import { placeText, type Row, type RowPlace } from '../data/rows.js';
import type { Engine } from '../engine/engine.js';
import { LockstepError } from '../errors.js';
import { checkLength } from '../inference/generate.js';
import { ActorWorker } from '../workers/actor.js';
import { CostWorker } from '../workers/cost.js';
import { CriticWorker } from '../workers/critic.js';
import { ReferenceWorker } from '../workers/reference.js';
import { RewardWorker } from '../workers/reward.js';
import { rolloutAlgorithm, truncationOf } from './algorithms.js';
import type { Config, ConfigOf, RolloutConfig } from './config.js';
import { openJudge } from './rewards.js';
import { openEngine, type Role, type RoleName } from './roles.js';
import { RowSource } from './row-source.js';
import { samplesOf, unknownMetric } from './samples.js';
import { evaluation, openSources, type Sources } from './sources.js';
import { sftItem } from './supervised.js';
import {
  learnerSettings,
  type Outcome,
  ofEvaluation,
  type Task,
  type TrainedModel,
  trainedModel,
  type Workshop,
} from './task.js';

/** `algorithm` takes the place of the one that the configuration names. */
export async function rolloutTask(
  config: RolloutConfig,
  workshop: Workshop,
  algorithm: RolloutAlgorithm = rolloutAlgorithm(config),
): Promise<Task> {
  const { roles, tokenizer } = workshop;
  const [policy] = roles as [Role];
  const convert = (row: Row) => promptOf(row, policy, workshop);
  const sources = await openSources(config, convert, workshop);
  const pretraining = await openPretraining(config, policy, workshop);
  const engines: Engines = {};
  for (const role of roles) engines[role.name] = await openEngine(role, workshop);
  const trained: TrainedModel[] = [];
  for (const role of roles) if (role.trained) trained.push(await trainedModel(role, engines[role.name]!, workshop));
  const models = await openModels(config, engines, trained, workshop);
  const data = new PromptData(sources, config, workshop);
  return {
    skipped: sources.train.skipped,
    data: { 'data.train': sources.train.size, ...(pretraining ? { 'ptx.data': pretraining.size } : {}) },
    trained,
    step: async (iteration): Promise<Outcome> => {
      const before = models.actor.guesses();
      const prompts = await data.begin(iteration);
      const context = { iteration, pretraining: await pretraining?.batch(iteration), draw: data.draw };
      const { metrics, rollout, rewards } = await algorithm.iterate(models, prompts, context);
      const { max, tokens } = models.actor.mismatch();
      const { guessed, accepted } = models.actor.guesses();
      return {
        metrics: {
          ...metrics,
          ...(rollout ? { ...unknownMetric(rollout, tokenizer), tokens: rollout.tokens.length } : {}),
          ...(tokens > 0 ? { 'mismatch.max': max, 'mismatch.tokens': tokens } : {}),
          ...(config.rollout.speculation > 0
            ? {
                'speculation.tokens': guessed - before.guessed,
                'speculation.accepted': accepted - before.accepted,
              }
            : {}),
        },
        samples: rollout
          ? samplesOf(rollout, tokenizer, {
              ...(rewards ? { scores: rewards.scores } : {}),
              count: config.evaluation.samples,
            })
          : [],
      };
    },
    ...evaluation(sources, config, (prompts: Prompt[]) => evaluate(config, models, prompts, workshop)),
    state: () => ({ ...algorithm.state(), ...sources.train.state(), ...data.state() }),
    restore: (state) => {
      algorithm.restore(state);
      sources.train.restore(state);
      data.restore(state);
    },
  };
}

type Engines = Partial<Record<RoleName, Engine>>;
type OpenModels = Awaited<ReturnType<typeof openModels>>;

/** The workers of the roles that a run has, under the names that algorithms know. */
async function openModels(
  config: RolloutConfig,
  engines: Engines,
  trained: readonly TrainedModel[],
  workshop: Workshop,
) {
  const { pools, tokenizer, endTokens } = workshop;
  const { rollout, seed, checks, batch } = config;
  const { temperature } = rollout;
  const forward = { microTokens: batch.microTokens, temperature };
  const modelOf = (name: RoleName) => trained.find(({ role }) => role.name === name)!;
  const actor = pools.place(
    'policy',
    ActorWorker.create(engines.policy!, {
      ...learnerSettings(config, modelOf('policy')),
      temperature,
      sampling: { ...rollout, seed, stopTokens: endTokens },
      stop: rollout.stop,
      tokenizer,
      mismatch: checks.mismatch,
    }),
    {
      generateSequences: 'generation',
      generateForEvaluation: 'evaluation',
      computeLogprobs: 'logprobs',
      computeLoss: 'logprobs',
      update: 'policyUpdate',
    },
  );
  const critic = (role: 'critic' | 'costCritic', values: string, update: string) => {
    const engine = engines[role];
    if (!engine) return undefined;
    const own = (config as Partial<ConfigOf<'safe-rlhf'>>)[role]?.optimizer;
    const settings = learnerSettings(config, modelOf(role), own);
    const methods = { computeValues: values, computeLoss: values, update };
    return pools.place(role, CriticWorker.create(engine, settings), methods);
  };
  const frozen = (role: 'reference' | 'teacher') => {
    const engine = engines[role];
    return engine && pools.place(role, ReferenceWorker.create(engine, forward), { computeLogprobs: role });
  };
  const { reward, cost } = config as Partial<Pick<ConfigOf<'safe-rlhf'>, 'reward' | 'cost'>>;
  const scoring = { microTokens: batch.microTokens };
  const rewardModel =
    engines.reward &&
    pools.place('reward', RewardWorker.create(engines.reward, scoring), { computeRewards: 'reward' }).computeRewards;
  const costModel =
    engines.cost &&
    pools.place('cost', CostWorker.create(engines.cost, scoring), { computeCosts: 'cost' }).computeCosts;
  return {
    actor,
    critic: critic('critic', 'values', 'valueUpdate'),
    costCritic: critic('costCritic', 'costValues', 'costValueUpdate'),
    reference: frozen('reference'),
    teacher: frozen('teacher'),
    reward: reward && { computeRewards: await openJudge(reward, 'reward', rewardModel, workshop) },
    cost: cost && { computeCosts: await openJudge(cost, 'cost', costModel, workshop) },
    // An algorithm uses the roles that it names, and those are there.
  } as Models & { actor: typeof actor };
}

/** Greedy or sampled answers to held-out prompts, with what judges them. */
async function evaluate(
  config: RolloutConfig,
  { actor, reward, cost, teacher }: OpenModels,
  prompts: Prompt[],
  { tokenizer }: Workshop,
): Promise<Outcome> {
  const rollout = await actor.generateForEvaluation(prompts);
  const given = reward ? await reward.computeRewards(rollout) : await towards(teacher, rollout);
  const costs = cost && (await cost.computeCosts(rollout));
  const metrics = {
    ...rolloutMetrics(rollout, given, truncationOf(config)),
    ...(costs ? costMetrics(costs) : {}),
  };
  return {
    metrics: ofEvaluation(metrics),
    samples: samplesOf(rollout, tokenizer, { scores: given.scores, count: config.evaluation.samples }),
  };
}

/** Without a reward a student is judged by Σ log q − log π of its answers, q the teacher. */
async function towards(teacher: Models['teacher'], rollout: Rollout) {
  const taught = await teacher.computeLogprobs(rollout);
  const gap = Float64Array.from(taught, (logprob, t) => (rollout.responseMask[t] ? logprob - rollout.logprobs[t]! : 0));
  return { scores: sumsBySequence(rollout, gap) };
}

/**
 * Which prompts an iteration has. An algorithm that draws more than its batch makes positions in the data depend on the course of
 * the run, and part of its state.
 */
class PromptData {
  readonly #rowsPerStep: number;
  /** The position that comes next; of the iteration, until something is drawn. */
  #next = 0;
  #drew = false;

  constructor(
    private readonly sources: Sources<Prompt>,
    private readonly config: RolloutConfig,
    private readonly workshop: Workshop,
  ) {
    this.#rowsPerStep = config.batch.sequences / config.rollout.samples;
  }

  /** The batch of an iteration; rows that are skipped are missing. */
  begin(iteration: number): Promise<Prompt[]> {
    if (!this.#drew) this.#next = (iteration - 1) * this.#rowsPerStep;
    const begin = this.#advance(this.#rowsPerStep);
    return this.#prompts(() => this.sources.train.take(begin, this.#rowsPerStep));
  }

  /** For rows that are skipped come the next ones: the batch had one that is not, so that there is an end. */
  readonly draw = (count: number): Promise<Prompt[]> => {
    this.#drew = true;
    return this.#prompts(async () => {
      const drawn: Prompt[] = [];
      while (drawn.length < count) {
        const missing = count - drawn.length;
        drawn.push(...(await this.sources.train.usable(this.#advance(missing), missing)));
      }
      return drawn;
    });
  };

  #advance(count: number): number {
    const begin = this.#next;
    this.#next += count;
    return begin;
  }

  /** Each row as often as it is answered. */
  async #prompts(read: () => Promise<Prompt[]>): Promise<Prompt[]> {
    const rows = await this.workshop.recorder.phase('data', read);
    const { samples } = this.config.rollout;
    return rows.flatMap((prompt) => Array.from({ length: samples }, () => prompt));
  }

  state(): Record<string, number> {
    return this.#drew ? { dataPosition: this.#next } : {};
  }

  restore({ dataPosition }: Readonly<Record<string, unknown>>): void {
    if (dataPosition === undefined) return;
    this.#next = Number(dataPosition);
    this.#drew = true;
  }
}

/** Batches of text to imitate beside the rollouts, where the configuration has them (ptx). */
async function openPretraining(config: RolloutConfig, policy: Role, workshop: Workshop) {
  const ptx = 'ptx' in config ? config.ptx : undefined;
  if (!ptx) return undefined;
  const { shuffle, onError } = config.data;
  const convert = (row: Row) => sftItem(row, policy, workshop);
  const source = workshop.own(await RowSource.open(ptx.data, convert, { shuffle, onError, seed: config.seed }));
  const count = ptx.sequences ?? config.batch.sequences;
  return {
    size: source.size,
    batch: async (iteration: number) => sftBatch(await source.take((iteration - 1) * count, count)),
  };
}

function promptOf(row: Row, { shape, checkpoint }: Role, { tokenizer, config }: Workshop): Prompt {
  const { tokens } = toPrompt(row, tokenizer, { directory: checkpoint.directory });
  checkTokens(tokens, shape.vocabulary, row.place);
  checkLength(tokens.length, config.rollout.maxNewTokens, shape, row.place);
  checkMicroBatch(tokens.length, config, row.place);
  return { tokens, row: row.columns };
}

/** @throws LockstepError PROMPT_TOO_LONG when a prompt with its answer is more than a micro-batch takes. */
function checkMicroBatch(
  prompt: number,
  { batch: { microTokens }, rollout: { maxNewTokens } }: Config,
  place: RowPlace,
) {
  if (evenLength(prompt + maxNewTokens) <= microTokens) return;
  throw new LockstepError(
    'PROMPT_TOO_LONG',
    `${placeText(place)}: a prompt of ${prompt} tokens and ${maxNewTokens} new ones (rollout.maxNewTokens), padded to an even length, ` +
      `are more than batch.microTokens (${microTokens}); raise it, shorten the prompt, or lower rollout.maxNewTokens`,
    { ...place, prompt, maxNewTokens, microTokens },
  );
}
