/** What each algorithm adds to the configuration: its models, and a section under its name. */
import { z } from 'zod';
import { type AggregationMode, aggregationModes } from '../losses/aggregation.js';
import type { GroupAdvantageName } from '../losses/group-advantages.js';
import type { PolicyLossName } from '../losses/policy-losses.js';
import { rewardSchema as reward } from './reward-schema.js';
import { count, countOrZero, fraction, nonNegative, positive, section, text } from './schema-parts.js';

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

/** A model that learns beside the policy: what it starts from, and how its optimizer differs from the policy's. */
const critic = section({ model: text.optional(), optimizer: optimizerOverrides.prefault({}) });

/** What the KL term measures against; default: the policy as it starts. */
const reference = section({ model: text.optional() });

/** Text to imitate in the same steps, γ times its cross-entropy (ptx). */
const ptx = z.strictObject({
  data: text,
  coefficient: nonNegative.default(1),
  /** Rows of it per step; default: as many as batch.sequences. */
  sequences: count.optional(),
});

/** Steps that an update makes of one batch. */
const steps = (miniBatches: number) => ({ epochs: count.default(1), miniBatches: count.default(miniBatches) });
const klEstimator = z.enum(['k1', 'k2', 'k3']);

const clips = {
  clip: positive.default(0.2),
  /** Upper clip when it differs (clip-higher). */
  clipHigh: positive.optional(),
  /** Where an advantage is below zero, a token's loss is at most so many times its size; above 1. */
  dualClip: z.number().gt(1).optional(),
};

/** Of a policy with a critic. */
const actorCritic = {
  ...steps(4),
  ...clips,
  valueClip: positive.default(0.2),
  gamma: fraction.default(1),
  lambda: fraction.default(0.95),
  /** 0: no KL term, and no reference model; so with every algorithm. */
  klCoefficient: nonNegative.default(0.05),
  /** Advantages to mean 0 and variance 1 over the whole rollout. */
  whiten: z.boolean().default(true),
  /** Weight of the entropy bonus. */
  entropyCoefficient: nonNegative.default(0),
};

const ppo = {
  /** Default of its model: the reward model, else the policy. */
  critic,
  reference,
  reward,
  ptx: ptx.optional(),
  ppo: section({
    ...actorCritic,
    kl: section({
      in: z.enum(['reward', 'loss']).default('reward'),
      estimator: klEstimator.default('k1'),
      controller: z.enum(['fixed', 'adaptive']).default('fixed'),
      /** KL per sequence that the adaptive controller steers to, and its horizon in sequences. */
      target: positive.default(6),
      horizon: positive.default(10000),
    }),
  }),
};

const remax = {
  reference,
  reward,
  remax: section({
    ...steps(1),
    gamma: fraction.default(1),
    klCoefficient: nonNegative.default(0.05),
    /** A token pays for its own KL, or for all that follows, too. */
    klReturn: z.enum(['token', 'to-go']).default('token'),
  }),
};

const safeRlhf = {
  critic,
  /** The value function of costs; default of its model: the cost model, else the policy. */
  costCritic: critic,
  reference,
  reward,
  /** Like a reward; higher is worse. */
  cost: reward,
  ptx: ptx.optional(),
  'safe-rlhf': section({
    ...actorCritic,
    /** Largest magnitude of a token's reward or cost; 0: none. */
    rewardBound: nonNegative.default(0),
    /** Mean cost per answer at most `threshold`, by a multiplier that starts at `initial`. */
    constraint: section({
      threshold: z.number().default(0),
      initial: positive.default(1),
      learningRate: positive.default(0.1),
      /** Answers over which the mean cost is taken. */
      window: count.default(128),
      /** Iterations before the multiplier moves. */
      delay: countOrZero.default(0),
      maximum: positive.default(5),
    }),
  }),
};

/** The policy losses that need nothing but a rollout and advantages. */
const policyLossName = z.enum([
  ...(['ppo', 'gspo', 'gmpo', 'rloo', 'cispo', 'sapo', 'reinforce', 'gpg', 'dppo'] as const),
] as const satisfies readonly PolicyLossName[]);
/** The advantages that need nothing but scores. */
const groupAdvantageName = z.enum([
  ...(['grpo', 'dr-grpo', 'rloo', 'opo', 'maxrl', 'gpg', 'pass@k'] as const),
] as const satisfies readonly GroupAdvantageName[]);

const aggregation = (mode: AggregationMode) =>
  section({
    mode: z.enum(aggregationModes).default(mode),
    /** Constant length of seq-mean-token-sum-norm; default: rollout.maxNewTokens. */
    horizon: positive.optional(),
    sequences: z.enum(['non-empty', 'all', 'none']).default('non-empty'),
  });

const groupKl = (where: 'reward' | 'loss', estimator: 'k1' | 'k2' | 'k3') =>
  section({ in: z.enum(['reward', 'loss']).default(where), estimator: klEstimator.default(estimator) });

const group = {
  ...steps(1),
  advantage: groupAdvantageName.default('grpo'),
  loss: policyLossName.default('ppo'),
  aggregation: aggregation('seq-mean-token-mean'),
  ...clips,
  klCoefficient: nonNegative.default(0.04),
  kl: groupKl('loss', 'k3'),
  entropyCoefficient: nonNegative.default(0),
  /** Rounds of sampling in which groups of equal scores are replaced; 1: they stay. */
  samplingRounds: z.int().min(1).max(64).default(1),
  /** Last tokens before maxNewTokens in which an answer's length costs, up to 1; 0: none. */
  overlongBuffer: countOrZero.default(0),
};

/** What iterations of groups of answers have in common. */
const grouped = { reference, reward, ptx: ptx.optional() };

const variants = ['grpo', 'dr-grpo', 'dapo', 'gspo', 'cispo', 'sapo', 'gmpo', 'opo'] as const;
export type GrpoVariant = (typeof variants)[number];

const grpo = {
  ...grouped,
  grpo: section({
    /** A published setting of the other keys (presets.ts); keys that are given win. */
    variant: z.enum(variants).default('grpo'),
    ...group,
  }),
};

const { advantage: _, ...groupOfRloo } = group;
const rloo = {
  ...grouped,
  rloo: section({
    ...groupOfRloo,
    loss: policyLossName.default('rloo'),
    klCoefficient: nonNegative.default(0.05),
    kl: groupKl('reward', 'k1'),
  }),
};

const reinforcePlusPlus = {
  reference,
  reward,
  'reinforce++': section({
    ...steps(1),
    /** Subtracts the mean score of the prompt's answers; KL is then part of the loss. */
    baseline: z.boolean().default(false),
    clip: positive.default(0.2),
    gamma: fraction.default(1),
    klCoefficient: nonNegative.default(0.01),
    /** With `baseline` the default is k2 (presets.ts). */
    klEstimator: klEstimator.default('k1'),
    entropyCoefficient: nonNegative.default(0),
  }),
};

const distillation = {
  /** The model whose distribution the policy learns; it reads the same token ids. */
  teacher: z.strictObject({ model: text }),
  distillation: section({ ...steps(1), clip: positive.default(0.2), entropyCoefficient: nonNegative.default(0) }),
};

const dpo = section({
  loss: z.enum(['dpo', 'ipo', 'hinge', 'robust', 'apo-zero', 'sppo-hard', 'exo-pair']).default('dpo'),
  beta: positive.default(0.1),
  /** Probability that a pair is the wrong way round (cDPO with dpo); default 0, of exo-pair 1e-3. */
  labelSmoothing: z.number().min(0).lt(0.5).optional(),
  /** IPO: mean instead of sum over an answer's tokens. */
  lengthNormalised: z.boolean().default(false),
});

const simpo = section({ beta: positive.default(2), gamma: nonNegative.default(1) });
const orpo = section({ beta: positive.default(0.1) });
const kto = section({
  beta: positive.default(0.1),
  desirableWeight: positive.default(1),
  undesirableWeight: positive.default(1),
});

/** By algorithm. */
export const shapes = {
  sft: {},
  reward: {},
  cost: {},
  ppo,
  remax,
  'safe-rlhf': safeRlhf,
  grpo,
  rloo,
  'reinforce++': reinforcePlusPlus,
  distillation,
  dpo: { reference, dpo },
  simpo: { simpo },
  orpo: { orpo },
  kto: { reference, kto },
} as const;
