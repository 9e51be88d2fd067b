/**
 * Training over two ranks: against one rank with as many threads; and the bubble of a pipeline against its formula.
 *
 * A step is one of llama-25m on 8 x 256 tokens, in turn on one rank and on two of half its threads. The pipeline takes eight
 * micro-batches of one sequence, the others one micro-batch a replica.
 *
 * The bubble is the idle time of the stages over their busy time: (p - 1) / m for m micro-batches on p equal stages. Measured
 * on two stages of four equal layers each, with a vocabulary that costs next to nothing: idle is what lies between a rank's
 * works, within the time from the first begin to the last end of all ranks; busy is the rest. Medians of many passes, in turn.
 */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { TokenBatch } from '../src/data/batch.js';
import type { Device, Work } from '../src/engine/device.js';
import type { Dtype, Engine, MicroBatches } from '../src/engine/engine.js';
import { ParallelEngine } from '../src/engine/parallel-engine.js';
import type { ModelShape } from '../src/layout/model-shape.js';
import { type Degrees, worldSize } from '../src/layout/parallel.js';
import { pipelineSchedules, type ScheduleName, simulateSchedule } from '../src/layout/pipeline-schedule.js';
import { createDevice, randomEngine, randomTokens, round, shapeOf, spread } from './support.js';

const sequences = 8;
const length = 256;
const ranks = 2;

const one: Degrees = { pipeline: 1, tensor: 1, data: 1 };
const layouts = {
  'one rank': one,
  'data parallel': { ...one, data: ranks },
  'tensor parallel': { ...one, tensor: ranks },
  pipeline: { ...one, pipeline: ranks },
} satisfies Record<string, Degrees>;
type LayoutName = keyof typeof layouts;

/** Batches of equal sequences, cut into micro-batches of `rows`. */
function microBatchesOf(tokens: Int32Array, rows: number): TokenBatch[] {
  return Array.from({ length: tokens.length / length / rows }, (_, i) => ({
    tokens: tokens.subarray(i * rows * length, (i + 1) * rows * length),
    lengths: new Int32Array(rows).fill(length),
  }));
}

/** Engines over ranks of equal weights; they close with their devices. */
class Ranks implements AsyncDisposable {
  private readonly open: { close(): Promise<void> }[] = [];

  async engine(options: {
    shape: ModelShape;
    degrees: Degrees;
    dtype: Dtype;
    threads: number;
    schedule?: ScheduleName;
    onWork?: (work: Work, rank: number) => void;
  }): Promise<ParallelEngine> {
    const { shape, degrees, dtype, threads, onWork, ...rest } = options;
    const devices: Device[] = Array.from({ length: worldSize(degrees) }, (_, rank) =>
      createDevice({ threads, onWork: (work) => onWork?.(work, rank) }),
    );
    this.open.push(...devices);
    const engine = await ParallelEngine.create({ shape, devices, degrees, dtype, train: true, ...rest });
    this.open.push(engine);
    await copyWeights(shape, dtype, engine);
    return engine;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const each of this.open.reverse()) await each.close();
  }
}

async function copyWeights(shape: ModelShape, dtype: Dtype, to: Engine): Promise<void> {
  await using device = createDevice({ threads: 1 });
  await using from = await randomEngine({ shape, device, dtype });
  for (const name of namesOf(from)) await to.writeTensor(name, await from.readTensor(name));
  await to.publish();
}

const namesOf = ({ table }: { table: readonly { sources: readonly { name: string }[] }[] }): string[] => [
  ...new Set(table.flatMap(({ sources }) => sources.map(({ name }) => name))),
];

const accumulate = (engine: Engine, microBatches: MicroBatches): Promise<void> =>
  engine.accumulate(microBatches, { outputs: ['logprobs'] }, ({ logprobs }) => ({
    logprobs: new Float32Array(logprobs!.length).fill(-1 / (sequences * (length - 1))),
  }));

const step = (engine: Engine, number: number): Promise<unknown> =>
  engine.step({ learningRate: 3e-4, betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0.1, clipNorm: 1, step: number });

/** Largest difference of a tensor's gradients relative to the largest of them. */
function distance(actual: Float32Array, expected: Float32Array): number {
  let most = 0;
  let largest = 0;
  for (const [i, x] of expected.entries()) {
    most = Math.max(most, Math.abs(x - actual[i]!));
    largest = Math.max(largest, Math.abs(x));
  }
  return most === 0 ? 0 : most / largest;
}

/** Gradients of one rank, bit for bit over tensor and pipeline ranks, within the bound over replicas. */
async function verify(name: string, engine: ParallelEngine, reference: ParallelEngine): Promise<void> {
  const bound = engine.replicas > 1 ? 5e-6 : 0;
  const names = new Set(reference.ranks.flatMap((rank) => namesOf(rank)));
  for (const tensor of names) {
    const found = distance(
      await engine.readTensor(tensor, 'gradients'),
      await reference.readTensor(tensor, 'gradients'),
    );
    if (found <= bound) continue;
    throw new Error(`${name}: gradients of ${tensor} differ by ${found} of the largest; nothing was measured`);
  }
}

async function* trainingSteps(
  dtype: Dtype,
  { threads, runs, signal, note }: BenchOptions,
): AsyncGenerator<Measurement> {
  const shape = shapeOf('llama-25m');
  const tokens = randomTokens(sequences * length, shape.vocabulary);
  await using open = new Ranks();
  const engines = new Map<LayoutName, { engine: ParallelEngine; batches: MicroBatches; seconds: number[] }>();
  for (const name of Object.keys(layouts) as LayoutName[]) {
    note(`training over ranks, ${dtype}: ${name}, verified`);
    const degrees = layouts[name];
    const each = threads / worldSize(degrees);
    const engine = await open.engine({ shape, degrees, dtype, threads: Math.max(1, Math.floor(each)) });
    const rows = degrees.pipeline > 1 ? 1 : sequences / degrees.data;
    const all = microBatchesOf(tokens, rows);
    const batches = degrees.data > 1 ? all.map((batch) => [batch]) : [all];
    await accumulate(engine, batches);
    engines.set(name, { engine, batches, seconds: [] });
    await verify(name, engine, engines.get('one rank')!.engine);
  }
  for (const { engine } of engines.values()) await step(engine, 1);
  for (let i = 0; i <= Math.max(runs, 5); i++) {
    note(`training over ranks, ${dtype}: round ${i}`);
    for (const { engine, batches, seconds } of engines.values()) {
      signal.throwIfAborted();
      const start = performance.now();
      await accumulate(engine, batches);
      await step(engine, i + 2);
      if (i > 0) seconds.push((performance.now() - start) / 1000);
    }
  }
  const base = engines.get('one rank')!.seconds;
  for (const [name, { seconds, engine }] of engines) {
    const rate = spread(seconds.map((each) => tokens.length / each));
    const ratio = spread(seconds.map((each, i) => base[i]! / each));
    yield {
      name: `training step 8 x 256, ${name}, ${dtype}`,
      value: round(ratio.median),
      unit: 'x one rank',
      min: round(ratio.min),
      max: round(ratio.max),
      tokensPerSecond: round(rate.median),
      ranks: engine.ranks.length,
    };
  }
}

/** Two stages of four equal layers; embedding, final norm and head are next to nothing. */
function equalStages(): ModelShape {
  const base = shapeOf('llama-25m');
  const layers = 8;
  return {
    ...base,
    width: 256,
    heads: 8,
    keyValueHeads: 8,
    headWidth: 32,
    feedForward: 768,
    vocabulary: 64,
    layers,
    tied: false,
    windows: Array.from({ length: layers }, () => 0),
  };
}

/** Idle time over busy time, and the seconds of the pass. */
function bubbleOf(works: readonly (readonly Work[])[]): number {
  const all = works.flat();
  const makespan = Math.max(...all.map(({ end }) => end)) - Math.min(...all.map(({ begin }) => begin));
  const busy = all.reduce((sum, { begin, end, waiting }) => sum + end - begin - waiting, 0);
  return (works.length * makespan - busy) / busy;
}

async function* bubbles({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  const shape = equalStages();
  const works: Work[][] = [[], []];
  await using open = new Ranks();
  const cases: { schedule: ScheduleName; engine: ParallelEngine; batches: TokenBatch[]; found: number[] }[] = [];
  for (const schedule of Object.keys(pipelineSchedules) as ScheduleName[]) {
    const engine = await open.engine({
      ...{
        shape,
        degrees: layouts.pipeline,
        dtype: 'float32' as const,
        threads: Math.max(1, Math.floor(threads / ranks)),
        schedule,
      },
      onWork: (work, rank) => works[rank]!.push(work),
    });
    for (const microBatches of [2, 4, 8]) {
      const batches = microBatchesOf(randomTokens(microBatches * length, shape.vocabulary), 1);
      cases.push({ schedule, engine, batches, found: [] });
    }
  }
  for (let i = 0; i <= Math.max(runs, 15); i++) {
    note(`bubble of a pipeline: round ${i}`);
    for (const { engine, batches, found } of cases) {
      signal.throwIfAborted();
      for (const list of works) list.length = 0;
      await accumulate(engine, [batches]);
      if (i > 0) found.push(bubbleOf(works));
    }
  }
  for (const { schedule, batches, found } of cases) {
    const { bubbleOverIdeal } = simulateSchedule(pipelineSchedules[schedule](ranks, batches.length), {
      forward: 1,
      backward: 2,
    });
    const bubble = spread(found);
    yield {
      name: `bubble, ${schedule}, 2 stages, ${batches.length} micro-batches`,
      value: round(bubble.median),
      unit: 'idle over busy',
      min: round(bubble.min),
      max: round(bubble.max),
      formula: bubbleOverIdeal,
      againstFormula: round(bubble.median / bubbleOverIdeal),
    };
  }
}

export async function* measure(options: BenchOptions): AsyncGenerator<Measurement> {
  for (const dtype of ['float32', 'bfloat16'] as const) yield* trainingSteps(dtype, options);
  yield* bubbles(options);
}
