/**
 * The configuration's one schema: names, types and defaults of every key. The same object is a YAML file, a JSON file and
 * the argument of `train()`. Rules that involve several keys are in rules.ts.
 */
import { z } from 'zod';
import { placementSchema } from './placement.js';

const positive = z.number().positive();
const nonNegative = z.number().nonnegative();
const count = z.int().positive();
const countOrZero = z.int().nonnegative();
const fraction = z.number().min(0).max(1);
const sizePattern = /^\s*\d+(\.\d+)?\s*(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)\s*$/;
const bytes = z.union([count, z.string().regex(sizePattern, 'expected bytes, such as 8GiB, 512MiB or 1000000')]);

/** A section whose keys all have defaults may itself be left out. */
function section<Shape extends z.ZodRawShape>(shape: Shape) {
  return z.strictObject(shape).prefault({} as never);
}

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

/** Overrides of the policy's optimizer: a key left out takes the policy's value. */
const optimizerOverrides = z.strictObject({
  learningRate: nonNegative.optional(),
  betas: z.tuple([z.number().min(0).lt(1), z.number().min(0).lt(1)]).optional(),
  epsilon: positive.optional(),
  weightDecay: nonNegative.optional(),
  clipNorm: nonNegative.optional(),
  schedule: z.enum(['constant', 'linear', 'cosine']).optional(),
  warmupSteps: countOrZero.optional(),
});

const rolloutShape = {
  /** Responses per prompt. */
  samples: count.default(1),
  maxNewTokens: count.default(256),
  temperature: nonNegative.default(1),
  topP: z.number().positive().max(1).default(1),
  topK: countOrZero.default(0),
  /** Strings that end a response. */
  stop: z.array(z.string().min(1)).default([]),
  /** A response cut by `maxNewTokens`: learned from as it is, left out of losses, or charged `truncationPenalty`. */
  truncation: z.enum(['keep', 'mask', 'penalise']).default('keep'),
  truncationPenalty: nonNegative.default(1),
};

const common = {
  /** A Hugging Face directory, or a hub name in the local cache: the model to train. */
  model: z.string().min(1),
  data: z.strictObject({
    train: z.string().min(1),
    eval: z.string().min(1).optional(),
    shuffle: z.boolean().default(true),
    /** What a bad row does: stop the run, or be skipped, counted and reported. */
    onError: z.enum(['stop', 'skip']).default('stop'),
  }),
  dtype: z.enum(['float32', 'bfloat16']).default('bfloat16'),
  optimizer: section(optimizerShape),
  batch: section({ sequences: count.default(64), microTokens: count.default(8192) }),
  /** Sampling: of PPO's responses, and of the sample texts that evaluations keep. */
  rollout: section(rolloutShape),
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
    /** Of each rank's device; ranks of one process have as much each, whatever the host has. */
    device: bytes.default('8GiB'),
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

const sft = z.strictObject({ algorithm: z.literal('sft'), ...common, output: z.string().min(1).default('runs/sft') });

const reward = z.strictObject({
  algorithm: z.literal('reward'),
  ...common,
  output: z.string().min(1).default('runs/reward'),
});

const ppo = z.strictObject({
  algorithm: z.literal('ppo'),
  ...common,
  /** What the value model starts from (default: the reward model, else the policy) and how it is optimised. */
  critic: section({ model: z.string().min(1).optional(), optimizer: optimizerOverrides.prefault({}) }),
  /** What the KL term measures against; default: the policy as it starts. */
  reference: section({ model: z.string().min(1).optional() }),
  /** A reward model, a function, or both: their sum. */
  reward: z.strictObject({
    model: z.string().min(1).optional(),
    function: z.string().min(1).optional(),
    timeoutSeconds: positive.default(60),
  }),
  ppo: section({
    epochs: count.default(1),
    miniBatches: count.default(4),
    clip: positive.default(0.2),
    valueClip: positive.default(0.2),
    gamma: fraction.default(1),
    lambda: fraction.default(0.95),
    klCoefficient: nonNegative.default(0.05),
    kl: section({
      in: z.enum(['reward', 'loss']).default('reward'),
      estimator: z.enum(['k1', 'k2', 'k3']).default('k1'),
      controller: z.enum(['fixed', 'adaptive']).default('fixed'),
      /** KL per sequence that the adaptive controller steers to, and its horizon in sequences. */
      target: positive.default(6),
      horizon: positive.default(10000),
    }),
    /** Advantages to mean 0 and variance 1 over the whole rollout. */
    whiten: z.boolean().default(true),
    /** Weight of the entropy bonus. */
    entropyCoefficient: nonNegative.default(0),
  }),
  output: z.string().min(1).default('runs/ppo'),
});

export const configSchema = z.discriminatedUnion('algorithm', [sft, reward, ppo]);

export type Config = z.output<typeof configSchema>;
/** What a user writes: defaults left out. */
export type ConfigInput = z.input<typeof configSchema>;
export type SftConfig = z.output<typeof sft>;
export type RewardConfig = z.output<typeof reward>;
export type PpoConfig = z.output<typeof ppo>;

/** Names that the configuration reserves for algorithms of other versions. */
export const laterAlgorithms = ['remax', 'safe-rlhf', 'grpo', 'rloo', 'reinforce++', 'dpo'];
export const algorithms = ['sft', 'reward', 'ppo'] as const;
