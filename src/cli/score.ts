/** `lockstep score`: what a model makes of given sequences. */
import { LockstepError } from '../errors.js';
import type { Scored } from '../inference/score.js';
import { formatNumber } from '../reports/numbers.js';
import { type Command, type Input, modelFlags, type Session } from './command.js';
import { float32Array, float32ToString } from './float32.js';
import { failWithFlags, inputRows, modelOptions } from './model-input.js';
import { number } from './values.js';

export const scoreCommand: Command = {
  name: 'score',
  summary: 'log-probabilities, values or scores of given sequences',
  words: [{ name: 'MODEL', help: 'a Hugging Face directory, or a hub name in the local cache' }],
  flags: {
    input: { value: 'FILE.jsonl', help: 'Sequences, one row a line; - reads stdin' },
    temperature: { value: 'X', help: 'Logits are divided by it (default 1)' },
    json: { help: 'One object per row, in order' },
    ...modelFlags,
  },
  notes: [
    'With --json a row of n tokens gives logprobs (n-1) and entropies (n) for a language model, values (n) for a value head, ' +
      'score for a sequence classifier.',
  ],
  examples: [
    'lockstep score path/to/model --input sequences.jsonl --json > scores.jsonl',
    'lockstep score path/to/reward-model --input dialogues.jsonl',
  ],
  run,
};

async function run(input: Input, { terminal, interrupts }: Session): Promise<number> {
  const options = modelOptions(input);
  const temperature = number(input, 'temperature', { minimum: 0 }) ?? 1;
  if (temperature === 0) {
    throw new LockstepError('USAGE_VALUE', '--temperature: expected a number above 0, received 0');
  }
  const rows = await inputRows(input, '--input FILE.jsonl');
  const json = input.switches.has('json');
  const { score } = await import('../inference/score.js');
  const work = interrupts.during('stopping', async (signal) => {
    const ending = AbortSignal.any([signal, terminal.closed]);
    let printed = 0;
    for await (const scored of score(options, rows, { temperature, signal: ending })) {
      if (json) terminal.print(scoredJson(scored));
      else {
        const columns = scoredColumns(scored);
        if (printed++ === 0) terminal.print(['row', 'tokens', ...Object.keys(columns)].map(cell).join(''));
        const cells = [String(scored.index + 1), String(scored.tokens.length), ...Object.values(columns).map(display)];
        terminal.print(cells.map(cell).join(''));
      }
    }
    return 0;
  });
  return work.catch(failWithFlags);
}

const cell = (content: string, index: number): string => content.padStart(index === 0 ? 6 : 14);
const display = (value: number): string => (Number.isNaN(value) ? '-' : formatNumber(value, 6));

/** Fields in the order of the contract; those that the model's head does not give are absent. */
export function scoredJson({ logprobs, entropies, values, score }: Scored): string {
  const fields = [
    ...(logprobs ? [`"logprobs":${float32Array(logprobs)}`] : []),
    ...(entropies ? [`"entropies":${float32Array(entropies)}`] : []),
    ...(values ? [`"values":${float32Array(values)}`] : []),
    ...(score === undefined ? [] : [`"score":${float32ToString(score)}`]),
  ];
  return `{${fields.join(',')}}`;
}

/** What a person compares: NaN where a sequence is too short to have it. */
function scoredColumns({ logprobs, entropies, values, score }: Scored): Record<string, number> {
  return {
    ...(logprobs ? { 'mean logprob': average(logprobs), perplexity: Math.exp(-average(logprobs)) } : {}),
    ...(entropies ? { 'mean entropy': average(entropies) } : {}),
    ...(values ? { 'mean value': average(values), 'last value': values.at(-1) ?? Number.NaN } : {}),
    ...(score === undefined ? {} : { score }),
  };
}

function average(values: Float32Array): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}
