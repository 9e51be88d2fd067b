/** A training run from configuration to events: opens what it needs, hands it to the loop, and closes it again. */
import type { RolloutAlgorithm } from '../algorithms/algorithm.js';
import { loadTokenizerIfPresent } from '../data/tokenizer.js';
import { type Backend, nativeBackend } from '../inference/backend.js';
import { endTokensOf } from '../inference/open-model.js';
import { learnsFromRollouts } from './algorithms.js';
import { checkResumable, restoreCheckpoint } from './checkpoint.js';
import { Closing } from './closing.js';
import { type Config, type ConfigInput, parseConfig, printConfig } from './config.js';
import type { TrainEvent } from './events.js';
import { architectureOf } from './gpus.js';
import { loadProgram } from './load-program.js';
import { cameOf, interrupted, loop, type Run, type RunWarning } from './loop.js';
import { RunPools } from './pools.js';
import { ktoTask, preferenceTask } from './preferences.js';
import { preflight } from './preflight.js';
import { Recorder } from './recorder.js';
import { architectureWarning, dataWarnings, layoutWarning } from './resumed-bits.js';
import { foreignTokenizers, type Role, rolesOf } from './roles.js';
import { rolloutTask } from './rollouts.js';
import { RunFolder } from './run-folder.js';
import { scorerTask, sftTask } from './supervised.js';
import { supervised, type Task, type Workshop } from './task.js';

export interface TrainOptions {
  /** Aborting it ends the run after the present step and a checkpoint. */
  signal?: AbortSignal;
  /** Aborting it ends the run at once, in the middle of a step: what was saved before is complete, and `resume` goes on from it. */
  cancel?: AbortSignal;
  /** Continue the run that the output folder holds. */
  resume?: boolean;
  /**
   * Takes the place of the algorithm that the configuration names, for one that learns from rollouts: the run has the models that
   * it uses and those that judge in evaluations, the settings are the configuration's.
   */
  algorithm?: RolloutAlgorithm;
  /** What runs the models; default: the native engine. */
  backend?: Backend;
}

/**
 * Trains. A run that is stopped early ends with the event `interrupted`. The run folder is written as the events come; leaving the iteration early stops the run where it is.
 *
 * @throws LockstepError CONFIG_*; PROGRAM_*; RUN_EXISTS, RUN_LOCKED, RUN_FOLDER; MEMORY_BUDGET; RUN_CONFIG_DIFFERS,
 * CHECKPOINT_OTHER_MODEL; MISMATCH; LOSS_NOT_FINITE; WORKER_HUNG; CHECKPOINT_WRITE_FAILED; what models, data and rewards throw.
 */
export async function* train(input: Config | ConfigInput, options: TrainOptions = {}): AsyncGenerator<TrainEvent> {
  const { signal, cancel, resume = false, backend = nativeBackend } = options;
  const started = performance.now();
  const config = parseConfig(input);
  const folder = await RunFolder.open(config.output, { resume });
  const recorder = new Recorder();
  const closing = new Closing();
  closing.own(folder);
  closing.own(recorder);
  let pools: RunPools | undefined;
  // What runs on engines and devices ends before they are closed.
  const close = async () => {
    await pools?.close();
    await closing.close();
  };
  let latest: { step: number; directory: string } | undefined;
  try {
    latest = (await folder.checkpoints()).at(-1);
    const step = latest?.step ?? 0;
    const algorithm = options.algorithm ?? (await programOf(config));
    const roles = await rolesOf(config, algorithm?.models);
    const { memory, pools: plans } = preflight(roles, config);
    const architecture = architectureOf(
      plans.map(({ devices }) => devices),
      config,
    );
    const earlier = await folder.config();
    const earlierArchitecture = await folder.architecture();
    if (latest) await checkResumable(latest.directory, config, roles, earlier);
    pools = await RunPools.open({
      ...{ config, plans, backend, recorder, cancel, closing },
      offloadFolder: folder.path,
    });
    const own: Workshop['own'] = (resource) => closing.own(resource);
    const interrupt = AbortSignal.any([signal, cancel].filter((given) => given !== undefined));
    const parts = { roles, recorder, pools, own, from: latest?.directory, interrupt };
    const task = await openTask(config, parts, algorithm);
    const earlierData = latest && (await restoreCheckpoint(task, config, latest.directory));
    await folder.begin(printConfig(config), architecture, step);
    await recorder.open(folder.path);
    const run: Run = { config, folder, recorder, task: supervised(task, pools), signal, cancel, started };
    yield {
      type: 'start',
      step,
      steps: config.steps,
      config,
      output: folder.path,
      ...(latest ? { resumedFrom: latest.directory } : {}),
      memory,
    };
    const resumed = latest && [
      layoutWarning(earlier?.parallel, config.parallel, trainedShapes(roles)),
      architectureWarning(earlierArchitecture, architecture, config.dtype),
      ...dataWarnings(earlierData ?? {}, task.data),
    ];
    const differing = (resumed ?? []).filter((warning) => warning !== undefined);
    for (const warning of [...differing, ...(await warnings(config, roles))]) {
      yield { type: 'warning', step, ...warning };
    }
    yield* loop(run, step);
  } catch (error) {
    if (!cameOf(error, cancel) && !cameOf(error, signal)) {
      // Closing may fail for the same reason; what ended the run is what to tell.
      await close().catch(() => undefined);
      throw error;
    }
    yield interrupted(latest?.step ?? 0, latest?.directory, folder.path);
  } finally {
    await close();
  }
}

async function programOf(config: Config): Promise<RolloutAlgorithm | undefined> {
  if (!learnsFromRollouts(config) || config.program === undefined) return undefined;
  return loadProgram(config.program, config);
}

const trainedShapes = (roles: readonly Role[]) => roles.filter(({ trained }) => trained).map(({ shape }) => shape);

async function openTask(
  config: Config,
  parts: Pick<Workshop, 'roles' | 'recorder' | 'pools' | 'own' | 'from' | 'interrupt'>,
  algorithm: RolloutAlgorithm | undefined,
): Promise<Task> {
  const { checkpoint } = parts.roles[0]!;
  const tokenizer = await loadTokenizerIfPresent(checkpoint.directory);
  const endTokens = await endTokensOf(checkpoint, tokenizer);
  const workshop: Workshop = { ...parts, config, tokenizer, endTokens };
  if (learnsFromRollouts(config)) return rolloutTask(config, workshop, algorithm);
  switch (config.algorithm) {
    case 'sft':
      return sftTask(config, workshop);
    case 'reward':
    case 'cost':
      return scorerTask(config, workshop);
    case 'kto':
      return ktoTask(config, workshop);
    default:
      return preferenceTask(config, workshop);
  }
}

async function warnings(config: Config, roles: readonly Role[]): Promise<RunWarning[]> {
  const found: RunWarning[] = [];
  const { topP, topK } = config.rollout;
  if (learnsFromRollouts(config) && (topP < 1 || topK > 0)) {
    found.push({
      code: 'SAMPLING_BIAS',
      message:
        `rollout.topP ${topP} and rollout.topK ${topK} sample from a truncated distribution, but log-probs are those of the model's ` +
        'own: the policy gradient is biased; use topP 1 and topK 0 for an exact one',
    });
  }
  for (const name of await foreignTokenizers(roles)) {
    found.push({
      code: 'TOKENIZER_DIFFERS',
      message: `the tokenizer.json of the ${name} model differs from the policy's: the same ids may mean other texts to it`,
    });
  }
  return found;
}
