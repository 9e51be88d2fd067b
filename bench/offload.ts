/**
 * PPO with actor and critic in the memory of one: the time that moving takes, beside a run with room for all models.
 * bfloat16; both runs go step by step in turn and must report the same numbers.
 */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createEngine } from '../src/checkpoints/load-model.js';
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { Device } from '../src/engine/device.js';
import type { Backend } from '../src/inference/backend.js';
import { type Config, parseConfig } from '../src/train/config.js';
import type { MetricsRow, TrainEvent } from '../src/train/events.js';
import { preflight } from '../src/train/preflight.js';
import { rolesOf } from '../src/train/roles.js';
import { train } from '../src/train/train.js';
import { createDevice, measured, randomTokens, round, shapeOf, spread, subject, writeModel } from './support.js';

/** One rank whose device can be asked what it held. */
function watched(): { backend: Backend; devices: Device[] } {
  const devices: Device[] = [];
  const openDevice: Backend['openDevice'] = async ({ onWork: _, layout: __, ...settings }) => {
    const device = createDevice(settings);
    devices.push(device);
    return {
      createEngine: (model, options) => createEngine({ ...options, model, device }),
      close: () => device.close(),
    };
  };
  return { backend: { openDevice }, devices };
}

/** The next row, or none at the end. */
async function nextRow(events: AsyncIterator<TrainEvent>): Promise<MetricsRow | undefined> {
  for (;;) {
    const { value, done } = await events.next();
    if (done) return undefined;
    if (value.type === 'step') return value.metrics;
  }
}

/** What both runs must agree on. */
const numbers = (row: MetricsRow): string =>
  JSON.stringify(Object.entries(row).filter(([name]) => !/^(seconds|bytes)\./.test(name)));

async function* pairs(
  configs: [Config, Config],
  backends: [Backend, Backend],
  signal: AbortSignal,
): AsyncGenerator<[MetricsRow, MetricsRow]> {
  const runs = configs.map((config, i) => train(config, { signal, backend: backends[i]! }));
  try {
    for (;;) {
      const whole = await nextRow(runs[0]!);
      const inTurn = await nextRow(runs[1]!);
      if (!whole || !inTurn) return;
      if (numbers(whole) !== numbers(inTurn)) throw new Error(`offload: step ${whole.step} gives other numbers`);
      yield [whole, inTurn];
    }
  } finally {
    for (const run of runs) await run.return(undefined);
  }
}

/** GB/s of copies between pinned memory and the device, there and back. */
async function pinnedRate(bytes: number): Promise<number> {
  await using device = createDevice();
  const { value } = await device.native.bench({ what: 'moves', runs: 3, bytes });
  return value.work / spread(value.seconds).median / 1e9;
}

export async function* measure({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  const { small: model, rollout, ceilingBytes } = subject();
  const { sequences, promptTokens, newTokens, microTokens } = rollout;
  const folder = await mkdtemp(join(tmpdir(), 'lockstep-bench-'));
  try {
    const pinned = await pinnedRate(ceilingBytes / 2);
    note('writing a policy');
    await writeModel(model, join(folder, 'policy'), 'language', 1);
    const rows = Array.from({ length: sequences * (runs + 1) }, (_, i) =>
      JSON.stringify({ tokens: [...randomTokens(promptTokens, Math.min(4096, shapeOf(model).vocabulary), i + 1)] }),
    );
    await writeFile(join(folder, 'prompts.jsonl'), rows.join('\n'));
    await writeFile(
      join(folder, 'reward.mjs'),
      'export default (samples) => samples.map(({ tokens }) => tokens.filter((t) => t % 2 === 0).length / tokens.length);\n',
    );
    const config = {
      algorithm: 'ppo',
      model: join(folder, 'policy'),
      reward: { function: join(folder, 'reward.mjs') },
      data: { train: join(folder, 'prompts.jsonl') },
      batch: { sequences, microTokens },
      rollout: { maxNewTokens: newTokens },
      ppo: { miniBatches: 1 },
      steps: runs + 1,
      threads,
      checkpoint: { every: 0 },
    };
    const turns = parseConfig({ ...config, memory: { offload: 'host' }, output: join(folder, 'in-turn') });
    const roles = await rolesOf(turns);
    const plan = preflight(roles, turns).memory.totalBytes;
    turns.memory.device = plan;
    const all = preflight(roles, { ...turns, memory: { ...turns.memory, offload: 'none', device: 2 ** 40 } }).memory;
    const { hostBytes, roundBytes } = preflight(roles, turns).pools[0]!.rotation!;
    const watch = watched();
    const share: number[] = [];
    const slower: number[] = [];
    const rate: number[] = [];
    const whole = parseConfig({ ...config, output: join(folder, 'whole') });
    for await (const [alone, inTurn] of pairs([whole, turns], [watched().backend, watch.backend], signal)) {
      const [step, offload, transfer] = ['step', 'offload', 'transfer'].map((name) => inTurn[`seconds.${name}`]!);
      note(`iteration ${inTurn.step}: ${step!.toFixed(2)} s, in moves ${offload!.toFixed(3)} s`);
      if (inTurn.step === 1) continue;
      share.push(offload! / step!);
      slower.push(step! / alone['seconds.step']! - 1);
      rate.push((inTurn['bytes.offload']! + inTurn['bytes.restore']!) / transfer! / 1e9);
      // Without the checkpoints that follow the last step.
      if (inTurn.step === turns.steps) break;
    }
    const { device, host } = watch.devices[0]!.spaces();
    yield measured('waiting for moves', share, 'share of an iteration', {
      movedBytes: roundBytes.offload + roundBytes.restore,
    });
    yield measured('against room for all models', slower, 'share of an iteration');
    yield measured('transfer thread, both directions', rate, 'GB/s');
    yield measured(
      'transfer thread beside pinned copies',
      rate.map((of) => of / pinned),
      'share of pinned copies',
      { ceiling: round(pinned) },
    );
    const peak = round(device.highWater / plan);
    yield {
      name: 'peak of the device',
      value: peak,
      unit: 'share of the plan',
      bytes: device.highWater,
      planBytes: plan,
    };
    yield {
      name: 'memory of all models',
      value: round(all.totalBytes / plan),
      unit: 'times the plan',
      bytes: all.totalBytes,
    };
    yield {
      name: 'peak of the host',
      value: round(host.highWater / hostBytes),
      unit: 'share of the plan',
      bytes: host.highWater,
    };
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}
