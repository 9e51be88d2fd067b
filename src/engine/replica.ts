/** Ranks that generate together, one copy of the model between them. */
import { evenRanges, type RowRange } from '../data/batch.js';
import { checkTokens } from '../data/examples.js';
import { LockstepError } from '../errors.js';
import { pagePositions } from '../layout/memory-plan.js';
import type { Generated, GenerateOptions, GenerateRequest } from './engine.js';
import { generationNeeds } from './generation-needs.js';
import type { NativeGenerate } from './native.js';
import type { NativeEngine } from './native-engine.js';
import { together } from './together.js';

export class Replica {
  /** `leader` has the answers. */
  constructor(
    readonly ranks: readonly NativeEngine[],
    readonly leader: number,
  ) {}

  /**
   * The calls of all ranks, with as many pages as the one with the least room has. What one rank would refuse is refused
   * here, before any starts. `first` is the number of the first request in messages.
   * @throws LockstepError PROMPT_TOO_LONG, TOKEN_OUT_OF_RANGE, KV_BUDGET, MEMORY_BUDGET
   */
  plan(requests: readonly GenerateRequest[], options: GenerateOptions, first = 0): NativeGenerate[] {
    const needs = generationNeeds(this.ranks[0]!.shape, requests, options);
    const pages = Math.min(...this.ranks.map((rank) => rank.pagesFor(needs)));
    for (const [i, request] of needs.requests.entries()) this.checkRequest(request, first + i, pages);
    return this.ranks.map((rank) => rank.planGeneration(needs, pages));
  }

  async run(calls: readonly NativeGenerate[], options: GenerateOptions): Promise<Generated[]> {
    const results = await together(
      this.ranks.map((rank, i) =>
        i === this.leader ? rank.runGeneration(calls[i]!, options) : rank.followGeneration(calls[i]!),
      ),
    );
    return results[this.leader]!;
  }

  private checkRequest(
    { prompt, maxNewTokens }: NativeGenerate['requests'][number],
    index: number,
    pages: number,
  ): void {
    checkTokens(prompt, this.ranks[0]!.shape.vocabulary, `prompt ${index}`);
    const positions = prompt.length + maxNewTokens;
    const needed = Math.ceil(positions / pagePositions);
    if (needed <= pages) return;
    const { more } = this.ranks[0]!.device.limit;
    const message =
      `Request ${index} needs ${needed} pages of keys and values (${positions} positions), the smallest budget of a rank holds ${pages}; ` +
      `${more}, or lower the number of new tokens.`;
    throw new LockstepError('KV_BUDGET', message, { request: index, needed, pages });
  }
}

type Report = NonNullable<GenerateOptions['onProgress']>;

/** Progress of one share of the requests as progress of all. Requests to end go to the share that has them, at its next report. */
class SharedProgress {
  private readonly totals: number[];
  private readonly ending: number[][];

  constructor(
    private readonly shares: readonly RowRange[],
    private readonly report: Report,
  ) {
    this.totals = shares.map(() => 0);
    this.ending = shares.map(() => []);
  }

  of(share: number): Report {
    const { begin } = this.shares[share]!;
    return ({ requests, tokens, total }) => {
      this.totals[share] = total;
      const all = this.totals.reduce((sum, count) => sum + count, 0);
      const ended = this.report({ requests: requests.map((request) => request + begin), tokens, total: all });
      for (const request of ended ?? []) {
        const owner = this.shares.findIndex((range) => request >= range.begin && request < range.end);
        this.ending[owner]?.push(request - this.shares[owner]!.begin);
      }
      return this.ending[share]!.splice(0);
    };
  }
}

/**
 * Requests over replicas, answers in their order. When one replica fails the others end within a step.
 * @param all replicas without requests make the call, too
 */
export async function generateOver(
  replicas: readonly Replica[],
  requests: readonly GenerateRequest[],
  options: GenerateOptions,
  all = false,
): Promise<Generated[]> {
  const shares = evenRanges(requests.length, replicas.length);
  const progress = options.onProgress && new SharedProgress(shares, options.onProgress);
  const failure = new AbortController();
  const signal = AbortSignal.any([failure.signal, ...(options.signal ? [options.signal] : [])]);
  const planned = shares.map(({ begin, end }, i) =>
    begin === end && !all ? [] : replicas[i]!.plan(requests.slice(begin, end), options, begin),
  );
  const running = planned.map(async (calls, i) => {
    if (calls.length === 0) return [];
    try {
      const own = { ...options, signal, ...(progress && { onProgress: progress.of(i) }) };
      return await replicas[i]!.run(calls, own);
    } catch (error) {
      failure.abort(error);
      throw error;
    }
  });
  return (await together(running)).flat();
}
