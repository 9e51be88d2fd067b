/** Ranks that generate together, one copy of the model between them. */
import { LockstepError } from '../errors.js';
import { pagePositions } from '../layout/memory-plan.js';
import type { ModelShape } from '../layout/model-shape.js';
import type { Generated, GenerateOptions, GenerateRequest } from './engine.js';
import type { NativeGenerate } from './native.js';
import type { NativeEngine } from './native-engine.js';
import { together } from './together.js';

/** @throws TOKEN_OUT_OF_RANGE */
export function checkTokens({ vocabulary }: ModelShape, tokens: Int32Array, where: string): void {
  const outside = tokens.findIndex((token) => token < 0 || token >= vocabulary);
  if (outside < 0) return;
  const message = `Token id ${tokens[outside]} at position ${outside} of ${where} is outside the model's vocabulary 0..${vocabulary - 1}.`;
  throw new LockstepError('TOKEN_OUT_OF_RANGE', message, { position: outside, token: tokens[outside] });
}

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
    const needs = this.ranks[0]!.generationNeeds(requests, options);
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
    checkTokens(this.ranks[0]!.shape, prompt, `prompt ${index}`);
    const positions = prompt.length + maxNewTokens;
    const needed = Math.ceil(positions / pagePositions);
    if (needed <= pages) return;
    const message =
      `Request ${index} needs ${needed} pages of keys and values (${positions} positions), the smallest budget of a rank holds ${pages}; ` +
      'raise memory.device or lower the number of new tokens.';
    throw new LockstepError('KV_BUDGET', message, { request: index, needed, pages });
  }
}
