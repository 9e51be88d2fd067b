/** The policy: generates, scores and learns (HybridFlow, Table 4). */
import { callFirstRow, callProgress, callSignal } from '../cluster/call-context.js';
import type { TokenBatch } from '../data/batch.js';
import type { GenerationOptions, Prompt, Rollout } from '../data/rollout.js';
import { watchStops } from '../data/stop-strings.js';
import type { Tokenizer } from '../data/tokenizer.js';
import type { Engine, Guesses, SamplingOptions } from '../engine/engine.js';
import type { Experience, Loss } from '../losses/loss.js';
import { forwardAll } from './batches.js';
import { Canary, type CanaryReport } from './canary.js';
import { computeLoss } from './learn.js';
import { counting, type LearnerSettings, learnerProtocols, type UpdateOptions, update } from './learner.js';
import type { Protocols } from './protocols.js';
import { cutAtStop, packRollout } from './responses.js';

export interface ActorSettings extends LearnerSettings {
  sampling: SamplingOptions;
  /** Strings that end a response; they need the tokenizer. */
  stop?: readonly string[];
  tokenizer?: Tokenizer | undefined;
  /** Which of a rollout's tokens an update checks before its first step: the first mini-batch's, or all. */
  mismatch: 'first' | 'all';
}

export type ActorWorker = ReturnType<typeof create>;

/** A worker over an engine with a language-model head. */
function create(engine: Engine, settings: ActorSettings) {
  const counted = counting(settings);
  const forward = { microTokens: settings.microTokens, temperature: settings.temperature ?? 1 };
  let report: CanaryReport = { max: 0, tokens: 0 };
  let guesses: Guesses = { guessed: 0, accepted: 0 };

  const sample = async (
    prompts: readonly Prompt[],
    { iteration, round, greedy }: GenerationOptions,
  ): Promise<Rollout> => {
    const stops = watchStops(settings.stop, settings.tokenizer, prompts.length, 'rollout.stop');
    const first = callFirstRow();
    const alive = callProgress();
    const signal = callSignal();
    const generated = await engine.generate(
      prompts.map(({ tokens }, i) => ({
        prompt: tokens,
        id: requestId(iteration, round ?? 0, first + i),
        maxNewTokens: Math.min(settings.sampling.maxNewTokens, engine.shape.maxPositions - tokens.length),
      })),
      {
        ...settings.sampling,
        ...(greedy ? { temperature: 0 } : {}),
        ...(signal ? { signal } : {}),
        onProgress: ({ requests, tokens, total }) => {
          alive(`token ${total} of a generation`);
          return stops?.push(requests, tokens);
        },
        onGuesses: ({ guessed, accepted }) => {
          guesses = { guessed: guesses.guessed + guessed, accepted: guesses.accepted + accepted };
        },
      },
    );
    return packRollout(
      prompts,
      generated.map((result, i) => cutAtStop(result, stops, i)),
    );
  };

  return {
    /** Responses to prompts: a function of the weights, the prompts, the settings, the iteration and the index in the call. */
    generateSequences: sample,
    /** Like `generateSequences` for iteration 0, which training does not use: the texts of an evaluation. */
    generateForEvaluation: (prompts: readonly Prompt[]) => sample(prompts, { iteration: 0 }),
    computeLogprobs: (batch: TokenBatch) => forwardAll(engine, batch, 'logprobs', forward),
    /** A batch with the columns `sampledLogprobs` and `sampledMask` is checked before its first step. */
    update: async (batch: Experience, loss: Loss, options: UpdateOptions) => {
      const canary = canaryOf(batch);
      if (canary && settings.mismatch === 'all') {
        const rows = Int32Array.from(batch.lengths, (_, row) => row);
        canary.compare(batch, rows, await forwardAll(engine, batch, 'logprobs', forward));
      }
      const result = await update(engine, batch, loss, options, counted, canary);
      if (canary) report = canary.report();
      return result;
    },
    computeLoss: (batch: Experience, loss: Loss) => computeLoss(engine, batch, loss, settings),
    /** Of the last update from a rollout. */
    mismatch: () => report,
    /** Of all generations so far. */
    guesses: () => guesses,
  };
}

const protocols = {
  generateSequences: '3D_ALL_MICRO_DP',
  generateForEvaluation: '3D_ALL_MICRO_DP',
  computeLogprobs: '3D_PROTO',
  ...learnerProtocols,
} as const satisfies Protocols<ActorWorker>;

/** `create(engine, settings)`: the policy, over an engine with a language-model head. `protocols` are those of a group of them. */
export const ActorWorker = { create, protocols };

/** Counter of a response's random stream. */
function requestId(iteration: number, round: number, index: number): number {
  return iteration * 2 ** 32 + round * 2 ** 24 + index;
}

/** Of a batch that says which of its tokens the policy sampled, and with what log-probs (`sampledExperience`). */
function canaryOf({ tokens, lengths, columns }: Experience): Canary | undefined {
  const { sampledLogprobs: logprobs, sampledMask: responseMask } = columns;
  return logprobs && responseMask ? new Canary({ tokens, lengths, logprobs, responseMask }) : undefined;
}
