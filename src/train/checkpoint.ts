/**
 * A run's checkpoint: the trained model at the root, further trained models in folders of their own, and under trainer/ what else
 * a run needs to go on as if it had never stopped. Nothing in it depends on paths or on time.
 */
import { readFile, writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import type { AlgorithmState } from '../algorithms/algorithm.js';
import { beginSavingModel, openCheckpoint } from '../checkpoints/hugging-face.js';
import { beginSavingOptimizerState, loadOptimizerState } from '../checkpoints/state.js';
import { awaitedLater } from '../engine/device.js';
import type { Saving } from '../engine/engine.js';
import { LockstepError } from '../errors.js';
import type { ModelShape } from '../layout/model-shape.js';
import type { UpdateCount } from '../workers/learner.js';
import { learnsFromRollouts } from './algorithms.js';
import type { Config, ConfigOf } from './config.js';
import { rewardIdentity } from './reward-schema.js';
import type { Role } from './roles.js';
import type { Task } from './task.js';

interface TrainerState {
  format: 1;
  step: number;
  algorithm: AlgorithmState;
  /** numerics.parts of each trained model, as it was chosen. */
  parts: Readonly<Record<string, number>>;
  /** Of trained models whose count is not that of so many steps of the configuration's epochs and mini-batches. */
  counts?: Readonly<Record<string, UpdateCount>>;
  /** What decides the course of the run. */
  settings: Settings;
  /** Of the task; checkpoints without it say nothing of their data. */
  data?: Task['data'];
}

type Settings = Readonly<Record<string, unknown>>;

/**
 * Begins to fill `directory` with the task's state after `step`. With `checkpoint.async` the task may go on when this has
 * resolved; `written` resolves when the directory is complete.
 */
export async function beginSaving(task: Task, config: Config, step: number, directory: string): Promise<Saving> {
  const copy = config.checkpoint.async;
  const savings: Saving[] = [];
  const begin = async () => {
    for (const { role, engine, companions, hold } of task.trained) {
      const { config: configJson } = role.checkpoint;
      await hold(async () => {
        savings.push(await beginSavingModel(engine, join(directory, role.folder), { configJson, companions, copy }));
        savings.push(await beginSavingOptimizerState(engine, join(directory, 'trainer', role.name), { copy }));
      });
    }
    await writeFile(
      join(directory, 'trainer', 'state.json'),
      `${JSON.stringify(stateOf(task, config, step), null, 2)}\n`,
    );
  };
  // The first failure ends all, but not before what has begun has ended: nobody writes into the directory then.
  const all = async () => {
    const settled = await Promise.allSettled(savings.map(({ written }) => written));
    for (const result of settled) if (result.status === 'rejected') throw result.reason;
  };
  try {
    await begin();
  } catch (error) {
    await all().catch(() => undefined);
    throw error;
  }
  return { copiedBytes: savings.reduce((sum, { copiedBytes }) => sum + copiedBytes, 0), written: awaitedLater(all()) };
}

function stateOf(task: Task, config: Config, step: number): TrainerState {
  return {
    format: 1,
    step,
    algorithm: task.state(),
    parts: partsOf(task),
    ...countsOf(task, config, step),
    settings: settingsOf(config),
    data: task.data,
  };
}

/** Gives a task, whose models were loaded from `directory`, the rest of its state. Returns what the data was. */
export async function restoreCheckpoint(task: Task, config: Config, directory: string): Promise<Task['data']> {
  for (const { role, engine, hold } of task.trained) {
    await hold(() => loadOptimizerState(engine, join(directory, 'trainer', role.name)));
  }
  const state = await readState(directory);
  const difference = firstDifference(state.parts, partsOf(task), 'numerics.parts');
  if (difference) throw configDiffers(directory, difference);
  for (const { role, count } of task.trained) {
    Object.assign(count, state.counts?.[role.name] ?? expectedCount(config, state.step));
  }
  task.restore(state.algorithm);
  return state.data ?? {};
}

function countsOf({ trained }: Task, config: Config, step: number): Pick<TrainerState, 'counts'> {
  const expected = expectedCount(config, step);
  const others = trained.filter(({ count }) => firstDifference(count, expected));
  if (others.length === 0) return {};
  return { counts: Object.fromEntries(others.map(({ role, count }) => [role.name, count])) };
}

/** After so many steps, each of one update call that made all its mini-batches. */
function expectedCount(config: Config, step: number): UpdateCount {
  const { epochs = 1, miniBatches = 1 } = (sectionOf(config)[config.algorithm] ?? {}) as {
    epochs?: number;
    miniBatches?: number;
  };
  return { updates: step * epochs * miniBatches, passes: step * epochs };
}

/**
 * Refuses to continue a run under a configuration that would change its course, or with another model.
 *
 * @throws LockstepError RUN_CONFIG_DIFFERS or CHECKPOINT_OTHER_MODEL, naming the key that differs.
 */
export async function checkResumable(
  directory: string,
  config: Config,
  roles: readonly Role[],
  earlier: Config | undefined,
): Promise<void> {
  const { settings } = await readState(directory);
  const difference = firstDifference(settings, settingsOf(config)) ?? earlierDifference(earlier, config);
  if (difference) throw configDiffers(directory, difference);
  for (const role of roles.filter(({ trained }) => trained)) await checkSameModel(join(directory, role.folder), role);
}

function configDiffers(directory: string, difference: Difference): LockstepError {
  return new LockstepError(
    'RUN_CONFIG_DIFFERS',
    `cannot continue ${directory}: ${difference.path} was ${show(difference.before)} and is now ${show(difference.now)}; ` +
      'set it back, or start a new run in another output',
    { directory, ...difference },
  );
}

function partsOf({ trained }: Task): Record<string, number> {
  return Object.fromEntries(trained.map(({ role, engine }) => [role.name, engine.parts]));
}

async function checkSameModel(directory: string, role: Role): Promise<void> {
  const { shape } = await openCheckpoint(directory);
  const difference = firstDifference(mathematicsOf(shape), mathematicsOf(role.shape));
  if (!difference) return;
  throw new LockstepError(
    'CHECKPOINT_OTHER_MODEL',
    `${directory} is a checkpoint of another ${role.name} model: its ${difference.path} is ${show(difference.before)}, that of ` +
      `${role.checkpoint.directory} is ${show(difference.now)}; continue with the model that the run started from`,
    { directory, ...difference },
  );
}

/** What a new head leaves as it was. */
function mathematicsOf({ head, headBias, tied, padToken, ...trunk }: ModelShape): Settings {
  return trunk;
}

async function readState(directory: string): Promise<TrainerState> {
  const path = join(directory, 'trainer', 'state.json');
  try {
    const state = JSON.parse(await readFile(path, 'utf8')) as TrainerState;
    if (state.format !== 1) throw new Error(`expected format 1, received ${JSON.stringify(state.format)}`);
    return state;
  } catch (cause) {
    throw new LockstepError(
      'CHECKPOINT_CORRUPT',
      `cannot read ${path}: ${(cause as Error).message}; remove that checkpoint folder to continue from the one before`,
      { path },
      { cause },
    );
  }
}

/**
 * The part of a configuration that decides what the weights become. Paths are compared by `earlierDifference`; threads, memory,
 * micro-batches and speculation change no bit; how often a run is saved or evaluated and (at a constant rate) how long it goes may change.
 */
function settingsOf(config: Config): Settings {
  const { algorithm, dtype, optimizer, numerics, seed, steps, data } = config;
  const { speculation, ...rollout } = config.rollout;
  const varies = (schedule: string | undefined) => schedule !== undefined && schedule !== 'constant';
  const { critic, costCritic, ptx } = config as Partial<ConfigOf<'safe-rlhf'>>;
  const critics = Object.entries({ critic, costCritic }).filter(([, given]) => given !== undefined);
  const schedules = [optimizer.schedule, ...critics.map(([, given]) => given!.optimizer.schedule)];
  return {
    algorithm,
    dtype,
    optimizer,
    batch: { sequences: config.batch.sequences },
    data: { shuffle: data.shuffle, onError: data.onError },
    numerics,
    seed,
    ...(schedules.some(varies) ? { steps } : {}),
    ...(learnsFromRollouts(config) ? { rollout } : {}),
    ...sectionOf(config),
    ...(ptx ? { ptx: { coefficient: ptx.coefficient, sequences: ptx.sequences } } : {}),
    ...Object.fromEntries(critics.map(([name, given]) => [name, { optimizer: given!.optimizer }])),
  };
}

/** The section under the algorithm's name. */
function sectionOf(config: Config): Settings {
  const section = (config as unknown as Settings)[config.algorithm];
  return section === undefined ? {} : { [config.algorithm]: section };
}

/** Models, data and reward as the run folder's config.yaml names them; relative paths are relative to here. */
function earlierDifference(earlier: Config | undefined, config: Config): Difference | undefined {
  return earlier && firstDifference(pathsOf(earlier), pathsOf(config));
}

function pathsOf(config: Config): Settings {
  const place = (path: string | undefined) => path && resolve(path);
  const { reward, cost, reference, critic, costCritic, teacher, ptx, program } = config as Partial<
    ConfigOf<'safe-rlhf'> & Pick<ConfigOf<'distillation'>, 'teacher'>
  >;
  const models = { reference, critic, costCritic, teacher };
  return {
    model: place(config.model),
    data: { train: place(config.data?.train) },
    ...Object.fromEntries(
      Object.entries({ reward, cost }).flatMap(([name, given]) => (given ? [[name, rewardIdentity(given)]] : [])),
    ),
    ...Object.fromEntries(Object.entries(models).map(([name, given]) => [name, { model: place(given?.model) }])),
    ptx: { data: place(ptx?.data) },
    program: place(program),
  };
}

interface Difference {
  path: string;
  before: unknown;
  now: unknown;
}

/** The first leaf, in the order of keys, at which two trees differ; an absent key counts as undefined. */
function firstDifference(before: unknown, now: unknown, path = ''): Difference | undefined {
  if (isTree(before) && isTree(now)) {
    for (const key of new Set([...Object.keys(before), ...Object.keys(now)])) {
      const found = firstDifference(before[key], now[key], path === '' ? key : `${path}.${key}`);
      if (found) return found;
    }
    return undefined;
  }
  return Object.is(before, now) ? undefined : { path, before, now };
}

function isTree(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null;
}

function show(value: unknown): string {
  return value === undefined ? 'not set' : JSON.stringify(value);
}
