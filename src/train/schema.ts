/**
 * The configuration's one schema: names, types and defaults of every key. The same object is a YAML file, a JSON file and
 * the argument of `train()`. Rules that involve several keys are in rules.ts.
 */
import { z } from 'zod';
import { shapes } from './algorithm-schemas.js';
import { placementSchema } from './placement.js';
import { bytes, count, countOrZero, nonNegative, positive, section, text } from './schema-parts.js';

const optimizerShape = {
  learningRate: nonNegative.default(1e-6),
  betas: z.tuple([z.number().min(0).lt(1), z.number().min(0).lt(1)]).default([0.9, 0.95]),
  epsilon: positive.default(1e-8),
  weightDecay: nonNegative.default(0.1),
  /** Largest gradient norm; 0 turns clipping off. */
  clipNorm: nonNegative.default(1),
  schedule: z.enum(['constant', 'linear', 'cosine']).default('constant'),
  warmupSteps: countOrZero.default(0),
};

export const defaultMaxNewTokens = 256;

const rolloutShape = (samples: number) => ({
  /** Responses per prompt. */
  samples: count.default(samples),
  maxNewTokens: count.default(defaultMaxNewTokens),
  temperature: nonNegative.default(1),
  topP: z.number().positive().max(1).default(1),
  topK: countOrZero.default(0),
  /** Tokens that are guessed for a sequence and step where few sequences are left, at most. It changes no bit; 0 turns it off. */
  speculation: countOrZero.default(0),
  /** Strings that end a response. */
  stop: z.array(text).default([]),
  /** A response cut by `maxNewTokens`: learned from as it is, left out of losses, or charged `truncationPenalty`. */
  truncation: z.enum(['keep', 'mask', 'penalise']).default('keep'),
  truncationPenalty: nonNegative.default(1),
});

const common = {
  /** A Hugging Face directory, or a hub name in the local cache: the model to train. */
  model: text,
  data: z.strictObject({
    train: text,
    eval: text.optional(),
    shuffle: z.boolean().default(true),
    /** What a bad row does: stop the run, or be skipped, counted and reported. */
    onError: z.enum(['stop', 'skip']).default('stop'),
  }),
  /** What computes. `auto`: GPUs where there are some that can be used, one for each rank, else the CPU. */
  device: z.enum(['auto', 'cpu', 'cuda']).default('auto'),
  dtype: z.enum(['float32', 'bfloat16']).default('bfloat16'),
  optimizer: section(optimizerShape),
  batch: section({
    sequences: count.default(64),
    /** Most tokens of a forward or backward pass. Each row, pair, or prompt with its answer fits in it. */
    microTokens: count.default(8192),
  }),
  /** Sampling: of the responses to learn from, and of the sample texts that evaluations keep. */
  rollout: section(rolloutShape(1)),
  parallel: section({
    pipeline: count.default(1),
    tensor: count.default(1),
    data: count.default(1),
    /** ZeRO stage: what is divided among the data-parallel ranks. 1: optimizer state; 2: and gradients; 3: and weights. */
    zero: z.int().min(0).max(3).default(0),
    /** Order of micro-batches on the stages of the pipeline. */
    schedule: z.enum(['1f1b', 'gpipe']).default('1f1b'),
  }),
  /** The layout in which a model over ranks generates (HybridFlow, section 5): replicas of so many ranks. Left out: as it trains. */
  generation: z
    .strictObject({
      pipeline: count.default(1),
      tensor: count.default(1),
      /** How weights come from one layout to the other, after HybridFlow's Table 2. */
      transition: z.enum(['hybridflow', 'hybridflow-v', 'ds-chat']).default('hybridflow'),
    })
    .optional(),
  placement: placementSchema,
  memory: section({
    /**
     * Of each rank's device; ranks of one process have as much each, whatever the host has. A GPU gives at most what it has free;
     * `auto`: nine tenths of that, and on a CPU 8GiB.
     */
    device: bytes.or(z.literal('auto')).default('auto'),
    /** Host memory for state that is moved off the device. */
    host: bytes.default('16GiB'),
    /**
     * Models that take turns on the device: what a call does not need waits in host memory, or in files of the run folder, when
     * there is no room for it. Changes no bit.
     */
    offload: z.enum(['none', 'host', 'file']).default('none'),
    /** Recompute each layer's activations in backward instead of keeping them. */
    recompute: z.boolean().default(false),
  }),
  threads: count.default(2),
  numerics: section({ parts: z.union([z.literal('auto'), count]).default('auto') }),
  /** Which tokens of a rollout must have equal log-probs in the trainer: the first mini-batch's, or all. */
  checks: section({ mismatch: z.enum(['first', 'all']).default('first') }),
  evaluation: section({
    /** Steps between evaluations of `data.eval`; 0: none. */
    every: countOrZero.default(50),
    /** Rows of `data.eval` that are used, from the first. */
    rows: count.default(256),
    /** Sample texts kept by an evaluation. */
    samples: countOrZero.default(8),
  }),
  steps: count.default(100),
  seed: z.int().nonnegative().default(0),
  checkpoint: section({
    every: countOrZero.default(20),
    keep: count.default(2),
    /** Files are written behind the next step, from a copy of the state in host memory; it changes no byte of them. */
    async: z.boolean().default(true),
  }),
};

const schemaOf = <Name extends keyof typeof shapes, Shape extends z.ZodRawShape>(name: Name, more: Shape) =>
  z.strictObject({
    algorithm: z.literal(name),
    ...common,
    ...shapes[name],
    ...more,
    output: text.default(`runs/${name}`),
  });
/** Of those that learn from rollouts: a file whose default export takes the place of the named algorithm's iteration. */
const rollouts = { program: text.optional() };
/** Each answer is judged against the others of its prompt. */
const groups = { ...rollouts, rollout: section(rolloutShape(8)) };

export const configSchema = z.discriminatedUnion('algorithm', [
  schemaOf('sft', {}),
  schemaOf('reward', {}),
  schemaOf('cost', {}),
  schemaOf('ppo', rollouts),
  schemaOf('remax', rollouts),
  schemaOf('safe-rlhf', rollouts),
  schemaOf('grpo', groups),
  schemaOf('rloo', groups),
  schemaOf('reinforce++', rollouts),
  schemaOf('distillation', rollouts),
  schemaOf('dpo', {}),
  schemaOf('simpo', {}),
  schemaOf('orpo', {}),
  schemaOf('kto', {}),
]);

export type Config = z.output<typeof configSchema>;
/** What a user writes: defaults left out. */
export type ConfigInput = z.input<typeof configSchema>;
export type AlgorithmName = Config['algorithm'];
export type ConfigOf<Name extends AlgorithmName> = Extract<Config, { algorithm: Name }>;
/** Algorithms that learn from rollouts. */
export type RolloutConfig = ConfigOf<'ppo' | 'remax' | 'safe-rlhf' | 'grpo' | 'rloo' | 'reinforce++' | 'distillation'>;
/** Algorithms that learn from pairs or judged answers. */
export type PreferenceConfig = ConfigOf<'dpo' | 'simpo' | 'orpo' | 'kto'>;

export const algorithms = configSchema.options.map(({ shape }) => shape.algorithm.value) as readonly AlgorithmName[];
