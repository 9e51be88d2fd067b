/** Golden groups, regions and costs of the 3D-HybridEngine, and golden pipeline schedules: every field of every case. */
import { expect } from 'vitest';
import {
  type Grouping,
  generationGroups,
  generationRegion,
  type Region,
  regionSlices,
  sharedSlices,
  type TransitionCost,
  type TransitionEngine,
  trainingRegion,
  transitionCost,
} from '../../src/layout/hybrid-engine.js';
import {
  dataGroups,
  generationReplicas,
  microReplicas,
  pipelineGroups,
  tensorGroups,
  worldSize,
} from '../../src/layout/parallel.js';
import {
  microBatchesInFlight,
  pipelineSchedules,
  type ScheduleName,
  simulateSchedule,
} from '../../src/layout/pipeline-schedule.js';
import { type Case, describeTopics, type Json } from '../rl-fixtures.js';

type Fields = Record<string, Json>;

// The whole object is compared: a field that is expected and not computed is a failure.
const equal = (compute: (test: Case) => Fields) => (test: Case) =>
  expect(rounded(compute(test))).toEqual(rounded(test.expected));

describeTopics({ hybrid_engine: equal(hybridEngine), pipeline_schedules: equal(pipelineSchedule) });

/** Numbers to twelve digits: fractions may be computed in another order; bytes, ranks and times are below that. */
function rounded(fields: Fields): Json {
  const text = JSON.stringify(fields);
  return JSON.parse(text, (_, value) => (typeof value === 'number' ? Number(value.toPrecision(12)) : value)) as Json;
}

const list = (region: Region) => [region.begin, region.end, region.firstSlice, region.endSlice];
const table2 = ({ receiveBytes, peakBytes, redundantBytes }: TransitionCost) => ({
  receive_bytes: receiveBytes,
  peak_bytes: peakBytes,
  redundant_bytes: redundantBytes,
});

function hybridEngine({ inputs, expected }: Case): Fields {
  const { p, t, d } = inputs.train as Record<'p' | 't' | 'd', number>;
  const { p: pipeline, t: tensor } = inputs.generation as Record<'p' | 't', number>;
  const train = { pipeline: p, tensor: t, data: d };
  const generation = { pipeline, tensor };
  const cost = (engine: TransitionEngine, modelBytes: number) =>
    table2(transitionCost(engine, modelBytes, train, generation));
  if (inputs.model_bytes !== undefined) {
    const bytes = inputs.model_bytes as number;
    return {
      ds_chat: cost('ds-chat', bytes),
      vanilla: cost('hybridflow-v', bytes),
      hybridflow: cost('hybridflow', bytes),
    };
  }
  const layers = inputs.layers as number;
  const sliceBytes = inputs.bytes_per_layer_slice as number;
  const world = worldSize(train);
  const ranks = Array.from({ length: world }, (_, rank) => rank);
  const modelBytes = layers * t * sliceBytes;
  const training = ranks.map((rank) => trainingRegion(rank, train, layers));
  const stage = (grouping: Grouping, engine: TransitionEngine): Fields => {
    const groups = generationGroups(train, generation, grouping);
    const regions = ranks.map((rank) => generationRegion(rank, train, generation, grouping, layers));
    const shared = ranks.map((rank) => sharedSlices(training[rank]!, regions[rank]!));
    return {
      tp_groups: groups.tensor,
      pp_groups: groups.pipeline,
      micro_dp_groups: groups.microData,
      replica_of_rank: groups.replicaOfRank,
      layers_and_slices: regions.map(list),
      missing_bytes: ranks.map((rank) => (regionSlices(regions[rank]!) - shared[rank]!) * sliceBytes),
      unused_training_bytes: ranks.map((rank) => (regionSlices(training[rank]!) - shared[rank]!) * sliceBytes),
      ranks_without_overlap: ranks.filter((rank) => shared[rank] === 0),
      table2: cost(engine, modelBytes),
    };
  };
  const { replicaOfRank, count } = generationReplicas(train, generation);
  expect(replicaOfRank).toEqual((expected.hybridflow as Fields).replica_of_rank);
  expect(count).toBe(d * (expected.micro_dp_size as number));
  return {
    world,
    micro_dp_size: microReplicas(train, generation),
    model_bytes: modelBytes,
    training: {
      tp_groups: tensorGroups(train),
      pp_groups: pipelineGroups(train),
      dp_groups: dataGroups(train),
      layers_and_slices: training.map(list),
      bytes_per_rank: regionSlices(training[0]!) * sliceBytes,
    },
    hybridflow: stage('hybridflow', 'hybridflow'),
    vanilla: stage('vanilla', 'hybridflow-v'),
    ds_chat: { table2: cost('ds-chat', modelBytes) },
  };
}

function pipelineSchedule({ name, inputs }: Case): Fields {
  const scheduleName = Object.keys(pipelineSchedules).find((start) => name.startsWith(`${start}_`)) as ScheduleName;
  const schedule = pipelineSchedules[scheduleName](inputs.stages as number, inputs.microbatches as number);
  const times = simulateSchedule(schedule, {
    forward: inputs.forward_time as number,
    backward: inputs.backward_time as number,
  });
  return {
    order: schedule.map((stage) =>
      stage.map(({ kind, microBatch }) => `${kind === 'forward' ? 'F' : 'B'}${microBatch}`),
    ),
    start: times.start,
    makespan: times.makespan,
    bubble_fraction: times.bubbleFraction,
    bubble_over_ideal: times.bubbleOverIdeal,
    in_flight: microBatchesInFlight(schedule),
  };
}
