/** What the loop knows of training: steps, evaluations, models to save, numbers to carry over. */
import type { AlgorithmState } from '../algorithms/algorithm.js';
import { type Companions, readCompanions } from '../checkpoints/hugging-face.js';
import type { Tokenizer } from '../data/tokenizer.js';
import type { Engine } from '../engine/engine.js';
import type { LearnerSettings, UpdateCount } from '../workers/learner.js';
import type { Config } from './config.js';
import type { Sample } from './events.js';
import type { RunPools } from './pools.js';
import type { EngineContext, Role } from './roles.js';
import type { DataSize, Skipped } from './row-source.js';
import { learningRateAt, type ScheduleSettings } from './schedule.js';

export interface Outcome {
  metrics: Readonly<Record<string, number>>;
  samples: readonly Sample[];
}

/** A trained model as checkpoints keep it. */
export interface TrainedModel {
  role: Role;
  engine: Engine;
  count: UpdateCount;
  /** Of the checkpoint that the model starts from, read when the run begins: that folder may go away. */
  companions: Companions;
  /** Runs `work` when all that a checkpoint keeps of the model can be read and written. */
  hold<T>(work: () => Promise<T>): Promise<T>;
}

export async function trainedModel(
  role: Role,
  engine: Engine,
  { pools }: Pick<Workshop, 'pools'>,
): Promise<TrainedModel> {
  return {
    ...{ role, engine, count: { updates: 0, passes: 0 } },
    companions: await readCompanions(role.checkpoint.directory),
    hold: (work) => pools.hold(role.name, work),
  };
}

/** A task whose steps and evaluations end with the first call that fails, or with a cancel. */
export function supervised(task: Task, pools: RunPools): Task {
  const { evaluate } = task;
  return {
    ...task,
    step: (step) => pools.supervise(() => task.step(step)),
    ...(evaluate ? { evaluate: () => pools.supervise(() => evaluate()) } : {}),
  };
}

export interface Task {
  readonly trained: readonly TrainedModel[];
  readonly skipped: Skipped;
  /** Files that are trained on, by their keys in the configuration. */
  readonly data: Readonly<Record<string, DataSize>>;
  /** Step n = 1, 2, ... */
  step(step: number): Promise<Outcome>;
  /** Absent without `data.eval`. */
  evaluate?(): Promise<Outcome>;
  state(): AlgorithmState;
  restore(state: AlgorithmState): void;
}

/** What tasks are made of. */
export interface Workshop extends EngineContext {
  roles: readonly Role[];
  tokenizer: Tokenizer | undefined;
  endTokens: readonly number[];
  /** Aborted when the run is to end: nobody waits longer for a reward to load. */
  interrupt?: AbortSignal | undefined;
}

/** Metrics under the names of an evaluation. */
export function ofEvaluation(metrics: Readonly<Record<string, number>>): Record<string, number> {
  return Object.fromEntries(Object.entries(metrics).map(([name, value]) => [`eval.${name}`, value]));
}

/** How a model's worker learns under a configuration. */
export function learnerSettings(
  { optimizer, batch, seed, steps }: Config,
  { count }: Pick<TrainedModel, 'count'>,
  overrides: Partial<{ [Key in keyof Config['optimizer']]: Config['optimizer'][Key] | undefined }> = {},
): LearnerSettings {
  const chosen = Object.fromEntries(Object.entries(overrides).filter(([, value]) => value !== undefined));
  const { learningRate, schedule, warmupSteps, ...adamw } = { ...optimizer, ...chosen } as Config['optimizer'];
  const rates: ScheduleSettings = { learningRate, schedule, warmupSteps };
  return {
    microTokens: batch.microTokens,
    optimizer: adamw,
    learningRate: (step) => learningRateAt(step, rates, steps),
    seed,
    count,
  };
}
