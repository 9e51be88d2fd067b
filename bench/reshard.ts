/** Table 2 of HybridFlow measured: bytes, memory and seconds of the three transitions between training and generation. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { Device } from '../src/engine/device.js';
import type { Dtype } from '../src/engine/engine.js';
import { ParallelEngine } from '../src/engine/parallel-engine.js';
import { Transition, type TransitionReport } from '../src/engine/transition.js';
import { type TransitionEngine, transitionCost } from '../src/layout/hybrid-engine.js';
import type { ModelShape } from '../src/layout/model-shape.js';
import { type Degrees, type GenerationDegrees, microReplicas, worldSize } from '../src/layout/parallel.js';
import { addBytes, type ByteCount, placeShard, tensorBytes } from '../src/layout/placed.js';
import { shardTable } from '../src/layout/shards.js';
import { type TransitionBytes, transitionBytes } from '../src/layout/transition-plan.js';
import { createDevice, fillEngine, measured, randomTokens, round, shapeOf, spread, uniform } from './support.js';

export const engines: readonly TransitionEngine[] = ['ds-chat', 'hybridflow-v', 'hybridflow'];

export interface Layout {
  train: Degrees;
  generation: GenerationDegrees;
}

const layout = (p: number, t: number, d: number, pg: number, tg: number): Layout => ({
  train: { pipeline: p, tensor: t, data: d },
  generation: { pipeline: pg, tensor: tg },
});

/** Figure 8's first. */
const layouts: readonly Layout[] = [
  layout(1, 4, 2, 1, 2),
  layout(1, 4, 2, 1, 1),
  layout(1, 8, 1, 1, 2),
  layout(2, 4, 1, 1, 2),
  layout(2, 4, 1, 2, 2),
  layout(4, 2, 1, 2, 1),
  layout(2, 2, 2, 1, 1),
];

export const layoutName = ({ train: { pipeline, tensor, data }, generation }: Layout): string => {
  const micros = microReplicas({ pipeline, tensor, data }, generation);
  return `${pipeline}-${tensor}-${data} to ${generation.pipeline}-${generation.tensor}-${micros}-${data}`;
};

/** What one rank received, and the marks of its arenas, in bytes: with the tensors that layouts replicate. */
export interface Row {
  engine: TransitionEngine;
  layout: Layout;
  receive: number[];
  peak: number[];
  redundant: number[];
  /** What of each a count of the plan says; `replicated` and `staged` are the parts that Table 2 does not have. */
  planned: TransitionBytes[];
  stagedBytes: number[];
  formula: ReturnType<typeof transitionCost>;
  reports: TransitionReport[];
}

export interface TableOptions {
  shape: ModelShape;
  parts: number;
  dtype: Dtype;
  layout: Layout;
  runs: number;
  devices: readonly Device[];
}

/** Random bytes as the training shards of all ranks. */
function fill(transition: Transition, ranks: number, replicaRanks: number): void {
  for (let rank = 0; rank < ranks; rank++) {
    const { memory, offset, bytes } = transition.trainingMemory(rank);
    const next = uniform(1 + (rank % replicaRanks) + 100 * bytes);
    memory.write(
      offset,
      new Uint8Array(Uint32Array.from({ length: Math.ceil(bytes / 4) }, () => next() * 2 ** 32).buffer, 0, bytes),
    );
  }
}

/** Slice by slice, of one rank: what lies there is what lies where it came from. */
function checkContents(transition: Transition, rank: number): void {
  for (const slice of transition.plan.slices) {
    if (slice.destinationRank !== rank) continue;
    const source = transition.trainingMemory(slice.sourceRank);
    const expected = source.memory.read(source.offset + slice.sourceOffset, slice.bytes);
    const found = transition.buffer(rank).read(slice.destinationOffset, slice.bytes);
    if (Buffer.compare(expected, found) === 0) continue;
    throw new Error(
      `reshard: ${slice.tensor} of rank ${slice.sourceRank} differs on rank ${rank}; nothing was measured`,
    );
  }
}

/** M of Table 2: what one copy of the model takes, without what the training layout replicates. */
function modelBytes({ shape, parts, dtype, layout: { train } }: TableOptions): number {
  const shards = Array.from({ length: train.pipeline * train.tensor }, (_, rank) =>
    addBytes(placeShard(shardTable(shape, parts, train, rank), dtype).tensors.map(tensorBytes)),
  );
  return addBytes(shards).sharded;
}

/** The three engines in turn, on one model and layout. @throws when a count or a mark differs from Table 2 by a byte. */
export async function measureLayout(options: TableOptions): Promise<Row[]> {
  const { layout, devices, runs, shape, parts, dtype } = options;
  const ranks = worldSize(layout.train);
  const rows: Row[] = [];
  const transitions: Transition[] = [];
  try {
    for (const engine of engines) {
      const transition = new Transition({ shape, parts, dtype, ...layout, engine, devices, timeoutSeconds: 60 });
      transitions.push(transition);
      fill(transition, ranks, ranks / layout.train.data);
      const report = await transition.enter();
      checkContents(transition, ranks - 1);
      const memory = transition.memory();
      await transition.leave();
      const row: Row = {
        ...{ engine, layout, receive: report.receivedBytes, reports: [] },
        peak: memory.map(({ buffer }) => buffer.highWater),
        redundant: memory.map(({ training }) => training?.highWater ?? 0),
        planned: transitionBytes(transition.plan),
        stagedBytes: transition.views.map(({ staging }) => staging.bytes),
        formula: transitionCost(engine, modelBytes(options), layout.train, layout.generation),
      };
      verify(row);
      rows.push(row);
    }
    for (let run = 0; run < runs; run++) {
      for (const [i, transition] of transitions.entries()) {
        rows[i]!.reports.push(await transition.enter());
        await transition.leave();
      }
    }
    return rows;
  } finally {
    for (const transition of transitions) transition.close();
  }
}

/** What was measured is, to the byte, the formula and what the layout replicates; a staged tensor is neither. */
export function verify({ engine, layout, receive, peak, redundant, planned, stagedBytes, formula }: Row): void {
  const check = (what: string, rank: number, measured: number, expected: number, { replicated }: ByteCount) => {
    if (measured - replicated === expected) return;
    throw new Error(
      `reshard ${layoutName(layout)}, ${engine}: rank ${rank} ${what} ${measured} bytes, ${replicated} of them ` +
        `replicated by the layout; Table 2 says ${expected}`,
    );
  };
  for (const [rank, bytes] of planned.entries()) {
    check('received', rank, receive[rank]!, formula.receiveBytes, bytes.receive);
    check('held at the peak', rank, peak[rank]! - stagedBytes[rank]!, formula.peakBytes, bytes.peak);
    check('held besides', rank, redundant[rank]!, formula.redundantBytes, bytes.redundant);
  }
}

const largest = (values: readonly number[]): number => Math.max(...values);

function measurementOf({ engine, layout, receive, peak, redundant, planned, formula, reports }: Row): Measurement {
  const seconds = reports.map((report) => report.seconds);
  const moving = spread(reports.map((report) => report.moveSeconds));
  const checking = spread(reports.map((report) => report.checkSeconds));
  return measured(`${layoutName(layout)}, ${engine}`, seconds, 's', {
    ...{ moveSeconds: round(moving.median), checkSeconds: round(checking.median) },
    ...{ receivedBytes: largest(receive), peakBytes: largest(peak), redundantBytes: largest(redundant) },
    formula,
    replicatedBytes: {
      receive: largest(planned.map((bytes) => bytes.receive.replicated)),
      peak: largest(planned.map((bytes) => bytes.peak.replicated)),
      redundant: largest(planned.map((bytes) => bytes.redundant.replicated)),
    },
  });
}

/** Time ratio hybridflow / ds-chat over the ratio of their bytes, run by run. */
function timeOverBytes(rows: readonly Row[]): Measurement {
  const [chat, , flow] = rows as [Row, Row, Row];
  const bytes = largest(flow.receive) / largest(chat.receive);
  const ratios = flow.reports.map(({ seconds }, run) => seconds / chat.reports[run]!.seconds / bytes);
  const name = `${layoutName(flow.layout)}, hybridflow / ds-chat`;
  return measured(name, ratios, 'time ratio / byte ratio', { floor: 1.3, byteRatio: round(bytes) });
}

/** What the checksums of a transition take of the rollout that it serves, itself a part of an iteration. */
async function checksumShare({ runs, signal }: BenchOptions): Promise<Measurement> {
  const shape = shapeOf('llama-25m');
  const devices = Array.from({ length: 4 }, () => createDevice({ threads: 1 }));
  try {
    await using engine = await ParallelEngine.create({
      ...{ shape, devices, dtype: 'bfloat16', degrees: { pipeline: 2, tensor: 2 } },
      generation: { pipeline: 1, tensor: 1 },
    });
    await fillEngine(
      engine,
      engine.ranks.flatMap(({ table }) => table),
    );
    const requests = Array.from({ length: 32 }, (_, id) => ({
      id,
      prompt: randomTokens(64, shape.vocabulary, id + 1),
    }));
    const shares: number[] = [];
    for (let run = 0; run < runs; run++) {
      const start = performance.now();
      const sampling = { maxNewTokens: 128, temperature: 1, topP: 1, topK: 0, stopTokens: [], seed: run, signal };
      const texts = await engine.generate(requests, sampling);
      if (texts.some(({ tokens }) => tokens.length !== 128)) throw new Error('reshard: tokens are missing');
      shares.push(engine.hybrid!.lastTransition!.checkSeconds / ((performance.now() - start) / 1000));
    }
    return measured('checksums, 2-2-1 to 1-1-4-1, 32 x (64 + 128)', shares, 'share of a rollout', { floor: 0.01 });
  } finally {
    for (const device of devices) await device.close();
  }
}

export async function* measure(options: BenchOptions): AsyncGenerator<Measurement> {
  const { runs, signal, note } = options;
  const shape = shapeOf('llama-25m');
  const devices = Array.from({ length: 8 }, () => createDevice({ threads: 1 }));
  try {
    for (const each of layouts) {
      signal.throwIfAborted();
      note(`reshard ${layoutName(each)}`);
      const used = devices.slice(0, worldSize(each.train));
      const rows = await measureLayout({ shape, parts: 8, dtype: 'bfloat16', layout: each, runs, devices: used });
      for (const row of rows) yield measurementOf(row);
      yield timeOverBytes(rows);
    }
  } finally {
    for (const device of devices) await device.close();
  }
  note('reshard: checksums');
  yield await checksumShare(options);
}
