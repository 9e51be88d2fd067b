/**
 * Generation on every model shape of the fixtures: what is sampled carries the scoring pass's log-probs, bit for bit, and a
 * text is a function of weights, prompt, settings, seed and id alone (DESIGN §2). Freed pages are NaN.
 */
import { describe, expect, test } from 'vitest';
import type { Generated, GenerateOptions } from '../../src/engine/engine.js';
import {
  budgetForPages,
  dtypes,
  fixtureModels,
  generatedAsScored,
  pagesOf,
  requestsOf,
  sameGenerated,
  sampling,
  sequencesOf,
  type TestModel,
  withEngine,
} from './support.js';

const models = await fixtureModels();
const newTokens = 24;

/** Prompts of many lengths, each three times: the three read it once. */
const promptsOf = ({ shape }: TestModel) =>
  sequencesOf(
    shape,
    [5, 70, 1, 64, 33, 100, 65, 2].filter((length) => length + newTokens <= shape.maxPositions),
  ).flatMap((prompt) => [prompt, prompt, prompt]);

const settings: { what: string; options: Partial<GenerateOptions> }[] = [
  { what: 'greedy', options: { temperature: 0 } },
  { what: 'temperature 0.7, top-k and top-p', options: { temperature: 0.7, topK: 20, topP: 0.9 } },
  { what: 'temperature 1', options: { temperature: 1 } },
];
const cases = models.flatMap((model) => dtypes.map((dtype) => ({ name: `${model.name} ${dtype}`, model, dtype })));

describe.each(cases)('generation with $name', ({ model, dtype }) => {
  const prompts = promptsOf(model);
  const requests = requestsOf(prompts);

  test.each(settings)('$what: log-probs are those of scoring', ({ options }) =>
    withEngine(model, { dtype, poison: true }, async (engine) => {
      const all = { ...sampling, maxNewTokens: newTokens, ...options };
      const generated = await engine.generate(requests, all);
      for (const { tokens, finish } of generated) {
        expect(tokens.length).toBe(newTokens);
        expect(finish).toBe('length');
      }
      expect(engine.lastGeneration!.sharedPositions).toBeGreaterThan(0);
      await generatedAsScored(engine, prompts, generated, all.temperature);
    }),
  );

  test('a text depends on no other request, nor on pages taken away and given back', async () => {
    const options = { ...sampling, maxNewTokens: newTokens };
    let together: Generated[] = [];
    let budget = 0;
    await withEngine(model, { dtype, poison: true }, async (engine, device) => {
      together = await engine.generate(requests, options);
      expect(engine.lastGeneration!.preemptions).toBe(0);
      const longest = Math.max(...prompts.map(({ length }) => pagesOf(length + newTokens)));
      budget = budgetForPages(engine, device.heldBytes, requests, 2 * longest + 1);
      const reversed = await engine.generate(requests.toReversed(), options);
      for (const [i, expected] of together.entries()) {
        sameGenerated(reversed.at(-1 - i)!, expected, `request ${i}, reversed`);
      }
      for (const i of [0, 4, prompts.length - 1]) {
        const [alone] = await engine.generate([requests[i]!], options);
        sameGenerated(alone!, together[i]!, `request ${i}, alone`);
      }
    });
    await withEngine(model, { dtype, poison: true, memoryBytes: budget, threads: 1 }, async (engine) => {
      const squeezed = await engine.generate(requests, options);
      for (const [i, expected] of together.entries()) sameGenerated(squeezed[i]!, expected, `request ${i}, few pages`);
    });
  });
});
