/**
 * Training over two ranks: against one rank with as many threads, and the bubble of a pipeline against its formula.
 *
 * A step is one of llama-25m on 8 x 256 tokens, in turn on one rank and on two of half its threads. The pipeline takes eight
 * micro-batches of one sequence, the others one micro-batch a replica.
 *
 * The bubble of m micro-batches on p stages is the time that a stage idles over the time that it works, (p - 1) / m when stages
 * are equal: here two of two equal layers, with a vocabulary that costs next to nothing. A pass takes T(m) from the first begin
 * of a work to the last end. What one more micro-batch takes, t, is the slope of T(m) fitted over m = 1, 2, 4, 8, so that the
 * bubble is T(m) / (m t) - 1. T(m) is the shortest of many passes in turn: what else the machine does only adds to it, and
 * makes equal stages unequal. Beside it, over all passes: the median of idle over busy time; and of that over what it is when
 * the same works each begin as soon as their input is there, which is what the engine itself adds.
 */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { TokenBatch } from '../src/data/batch.js';
import type { Device, Work } from '../src/engine/device.js';
import type { Dtype, Engine, MicroBatches } from '../src/engine/engine.js';
import { ParallelEngine } from '../src/engine/parallel-engine.js';
import type { ModelShape } from '../src/layout/model-shape.js';
import { type Degrees, worldSize } from '../src/layout/parallel.js';
import {
  type PipelineOperation,
  type PipelineSchedule,
  pipelineSchedules,
  type ScheduleName,
  simulateSchedule,
} from '../src/layout/pipeline-schedule.js';
import { createDevice, measured, randomEngine, randomTokens, round, shapeOf, spread } from './support.js';

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

/** Sequences of `size` tokens, cut into micro-batches of `rows`. */
function microBatchesOf(tokens: Int32Array, rows: number, size = length): TokenBatch[] {
  return Array.from({ length: tokens.length / size / rows }, (_, i) => ({
    tokens: tokens.subarray(i * rows * size, (i + 1) * rows * size),
    lengths: new Int32Array(rows).fill(size),
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
    onWork?: (work: Work, rank: number) => unknown;
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

interface Timing {
  engine: ParallelEngine;
  batches: MicroBatches;
  works: Work[];
  seconds: number[];
  /** Of all threads of the process. */
  processorSeconds: number[];
  /** Of a step, a rank's share in communicators without waits, and its share without work. */
  communication: number[];
  idle: number[];
}

async function* trainingSteps(
  dtype: Dtype,
  { threads, runs, signal, note }: BenchOptions,
): AsyncGenerator<Measurement> {
  const shape = shapeOf('llama-25m');
  const tokens = randomTokens(sequences * length, shape.vocabulary);
  await using open = new Ranks();
  const engines = new Map<LayoutName, Timing>();
  for (const name of Object.keys(layouts) as LayoutName[]) {
    note(`training over ranks, ${dtype}: ${name}, verified`);
    const degrees = layouts[name];
    const each = threads / worldSize(degrees);
    const works: Work[] = [];
    const onWork = (work: Work): unknown => works.push(work);
    const engine = await open.engine({ shape, degrees, dtype, threads: Math.max(1, Math.floor(each)), onWork });
    const rows = degrees.pipeline > 1 ? 1 : sequences / degrees.data;
    const all = microBatchesOf(tokens, rows);
    const batches = degrees.data > 1 ? all.map((batch) => [batch]) : [all];
    await accumulate(engine, batches);
    engines.set(name, { engine, batches, works, seconds: [], processorSeconds: [], communication: [], idle: [] });
    await verify(name, engine, engines.get('one rank')!.engine);
  }
  for (const { engine } of engines.values()) await step(engine, 1);
  for (let i = 0; i <= Math.max(runs, 5); i++) {
    note(`training over ranks, ${dtype}: round ${i}`);
    for (const { engine, batches, works, seconds, processorSeconds, communication, idle } of engines.values()) {
      signal.throwIfAborted();
      works.length = 0;
      const start = performance.now();
      const before = process.cpuUsage();
      await accumulate(engine, batches);
      await step(engine, i + 2);
      if (i === 0) continue;
      const all = (performance.now() - start) / 1000;
      const share = (of: (work: Work) => number) =>
        works.reduce((sum, work) => sum + of(work), 0) / engine.ranks.length / all;
      seconds.push(all);
      const { user, system } = process.cpuUsage(before);
      processorSeconds.push((user + system) / 1e6);
      communication.push(share((work) => work.communicating - work.waiting));
      idle.push(1 - share((work) => work.end - work.begin - work.waiting));
    }
  }
  const base = engines.get('one rank')!;
  for (const [name, { engine, seconds, processorSeconds, communication, idle }] of engines) {
    const rate = spread(seconds.map((each) => tokens.length / each));
    const ratios = seconds.map((each, i) => base.seconds[i]! / each);
    const processor = spread(processorSeconds.map((each, i) => each / base.processorSeconds[i]!));
    yield measured(`training step 8 x 256, ${name}, ${dtype}`, ratios, 'x one rank', {
      tokensPerSecond: round(rate.median),
      processorTime: round(processor.median),
      communication: round(spread(communication).median),
      idle: round(spread(idle).median),
      ranks: engine.ranks.length,
    });
  }
}

/** Two stages of equal layers; embedding, final norm and head are next to nothing. */
function equalStages(): ModelShape {
  const widths = { width: 256, heads: 8, keyValueHeads: 8, headWidth: 32, feedForward: 768, vocabulary: 64 };
  return { ...shapeOf('llama-25m'), ...widths, layers: 2 * ranks, windows: [0, 0, 0, 0], tied: false };
}

interface Pass {
  /** Seconds from the first begin to the last end. */
  makespan: number;
  /** Idle time over busy time. */
  bubble: number;
  /** The same of these works when each begins as soon as its input is there. */
  ofItsWorks: number;
}

/** Of what each stage did in one `accumulate`. */
function passOf(works: readonly (readonly Work[])[], schedule: PipelineSchedule): Pass {
  const all = works.flat();
  const makespan = Math.max(...all.map(({ end }) => end)) - Math.min(...all.map(({ begin }) => begin));
  const busy = all.reduce((sum, { begin, end }) => sum + end - begin, 0);
  const timeOf = (stage: number, { kind, microBatch }: PipelineOperation): number => {
    const work = works[stage]!.find((each) => each.operation === kind && each.microBatch === microBatch)!;
    return work.end - work.begin;
  };
  const { bubbleOverIdeal } = simulateSchedule(schedule, timeOf);
  return { makespan, bubble: (works.length * makespan - busy) / busy, ofItsWorks: bubbleOverIdeal };
}

/** Of the line through points with the least sum of squares. */
function slope(points: readonly { x: number; y: number }[]): number {
  const mean = (of: (point: { x: number; y: number }) => number) =>
    points.reduce((sum, point) => sum + of(point), 0) / points.length;
  const middle = { x: mean(({ x }) => x), y: mean(({ y }) => y) };
  return mean(({ x, y }) => (x - middle.x) * (y - middle.y)) / mean(({ x }) => (x - middle.x) ** 2);
}

async function* bubbles(options: BenchOptions): AsyncGenerator<Measurement> {
  const shape = equalStages();
  const works: Work[][] = [[], []];
  const threads = Math.ceil(options.threads / ranks);
  const onWork = (work: Work, rank: number): unknown => works[rank]!.push(work);
  await using open = new Ranks();
  const cases: { schedule: ScheduleName; engine: ParallelEngine; batches: TokenBatch[]; passes: Pass[] }[] = [];
  for (const schedule of ['gpipe', '1f1b'] as const) {
    const each = { shape, degrees: layouts.pipeline, dtype: 'float32', threads, schedule, onWork } as const;
    const engine = await open.engine(each);
    for (const microBatches of [1, 2, 4, 8]) {
      const batches = microBatchesOf(randomTokens((microBatches * length) / 2, shape.vocabulary), 1, length / 2);
      cases.push({ schedule, engine, batches, passes: [] });
    }
  }
  for (let i = 0; i <= Math.max(options.runs, 60); i++) {
    if (i % 10 === 0) options.note(`bubble of a pipeline: round ${i}`);
    for (const { schedule, engine, batches, passes } of cases) {
      options.signal.throwIfAborted();
      for (const list of works) list.length = 0;
      await accumulate(engine, [batches]);
      if (i > 0) passes.push(passOf(works, pipelineSchedules[schedule](ranks, batches.length)));
    }
  }
  const shortest = (passes: readonly Pass[]): number => Math.min(...passes.map(({ makespan }) => makespan));
  for (const { schedule, batches, passes } of cases.filter((each) => each.batches.length > 1)) {
    const own = cases.filter((each) => each.schedule === schedule);
    const each = slope(own.map((other) => ({ x: other.batches.length, y: shortest(other.passes) })));
    const formula = (ranks - 1) / batches.length;
    const bubble = shortest(passes) / (batches.length * each) - 1;
    yield {
      name: `bubble, ${schedule}, 2 stages, ${batches.length} micro-batches`,
      value: round(bubble / formula),
      unit: 'x (p - 1) / m',
      bubble: round(bubble),
      formula,
      ofAllPasses: round(spread(passes.map((pass) => pass.bubble)).median / formula),
      ofTheirWorks: round(spread(passes.map((pass) => pass.bubble / pass.ofItsWorks)).median),
    };
  }
}

/** Forward passes over a pipeline: one after the other, and under way together. */
async function* scoring({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  const shape = equalStages();
  const each = { shape, degrees: layouts.pipeline, dtype: 'float32', threads: Math.ceil(threads / ranks) } as const;
  await using open = new Ranks();
  const engine = await open.engine(each);
  const batches = microBatchesOf(randomTokens(sequences * length, shape.vocabulary), 1);
  const outputs = ['logprobs'] as const;
  note('scoring over a pipeline');
  const ratios: number[] = [];
  for (let i = 0; i <= Math.max(runs, 15); i++) {
    signal.throwIfAborted();
    const start = performance.now();
    const inTurn = [];
    for (const batch of batches) inTurn.push(await engine.forward(batch, { outputs }));
    const middle = performance.now();
    const together = await engine.forwardEach(batches, { outputs });
    if (i > 0) ratios.push((middle - start) / (performance.now() - middle));
    for (const [k, { logprobs }] of together.entries()) {
      if (distance(logprobs!, inTurn[k]!.logprobs!) !== 0) throw new Error('scoring: forwardEach gives other bits');
    }
  }
  yield measured(`scoring ${sequences} micro-batches together, 2 stages`, ratios, 'x one after the other');
}

export async function* measure(options: BenchOptions): AsyncGenerator<Measurement> {
  for (const dtype of ['float32', 'bfloat16'] as const) yield* trainingSteps(dtype, options);
  yield* bubbles(options);
  yield* scoring(options);
}
