/** `lockstep generate`: text from a model. */
import { LockstepError } from '../errors.js';
import type { Completion, GenerateSettings } from '../inference/generate.js';
import { type Command, type Input, modelFlags, type Session } from './command.js';
import { float32Array } from './float32.js';
import { failWithFlags, inputRows, modelOptions } from './model-input.js';
import { given, number, text } from './values.js';

export const generateCommand: Command = {
  name: 'generate',
  summary: 'generate text with a model',
  words: [{ name: 'MODEL', help: 'a Hugging Face directory, or a hub name in the local cache' }],
  flags: {
    input: { value: 'FILE.jsonl', help: 'Prompts, one row a line; - reads stdin' },
    prompt: { value: 'TEXT', help: 'One prompt, taken literally' },
    'max-new-tokens': { value: 'N', help: 'Length limit of a sample (default 256)' },
    temperature: { value: 'X', help: '0 is greedy (default 1)' },
    'top-p': { value: 'X', help: 'Sample from the smallest set with this probability (default 1: off)' },
    'top-k': { value: 'N', help: 'Sample from the N likeliest tokens (default 0: off)' },
    seed: { value: 'N', help: 'The same seed gives the same text (default 0)' },
    samples: { value: 'N', help: 'Samples of each prompt (default 1)' },
    speculate: { value: 'N', help: 'Guess up to N tokens a step from what was seen; same text (default 0: off)' },
    'ignore-eos': { help: "Go on past the model's end tokens" },
    json: { help: 'One object per sample: tokens, text, logprobs, finish' },
    ...modelFlags,
  },
  notes: [
    'A row is {"prompt": ..}, {"messages": [..]}, {"text": ..} or {"tokens": [..]}; tokens need no tokenizer. A sample depends on ' +
      'weights, prompt, settings, seed and row number only, not on what else is in the file.',
  ],
  examples: [
    'lockstep generate path/to/model --prompt "Once upon a time" --temperature 0.8',
    'lockstep generate path/to/model --input prompts.jsonl --samples 4 --seed 7 --json > samples.jsonl',
  ],
  run,
};

async function run(input: Input, { terminal, interrupts }: Session): Promise<number> {
  const options = modelOptions(input);
  const settings = settingsOf(input);
  const rows = await inputRows(input, '--prompt TEXT or --input FILE.jsonl');
  const json = input.switches.has('json');
  const alone = text(input, 'prompt') !== undefined && (settings.samples ?? 1) === 1;
  const { generate } = await import('../inference/generate.js');
  const work = interrupts.during('stopping', async (signal) => {
    const ending = AbortSignal.any([signal, terminal.closed]);
    let streamed = '';
    const onText = (piece: string) => {
      streamed += piece;
      terminal.write(piece);
    };
    const live = alone && !json ? { onText } : {};
    const total = { guessed: 0, accepted: 0 };
    const onGuesses = ({ guessed, accepted }: typeof total) => {
      total.guessed += guessed;
      total.accepted += accepted;
    };
    for await (const completion of generate(options, rows, { ...settings, ...live, onGuesses, signal: ending })) {
      if (json) terminal.print(completionJson(completion));
      else if (alone) terminal.print(plainText(completion).slice(streamed.length));
      else terminal.print(`[row ${completion.index + 1}, sample ${completion.sample + 1}]\n${plainText(completion)}\n`);
    }
    if (settings.speculation) terminal.note(`${total.accepted} of ${total.guessed} guessed tokens were right`);
    return 0;
  });
  return work.catch(failWithFlags);
}

function settingsOf(input: Input): GenerateSettings {
  return {
    ...given({
      maxNewTokens: number(input, 'max-new-tokens', { minimum: 1, whole: true }),
      temperature: number(input, 'temperature', { minimum: 0 }),
      topP: topP(input),
      topK: number(input, 'top-k', { minimum: 0, whole: true }),
      seed: number(input, 'seed', { minimum: 0, whole: true }),
      samples: number(input, 'samples', { minimum: 1, whole: true }),
      speculation: number(input, 'speculate', { minimum: 0, whole: true }),
    }),
    ignoreEndTokens: input.switches.has('ignore-eos'),
  };
}

function topP(input: Input): number | undefined {
  const value = number(input, 'top-p', { minimum: 0, maximum: 1 });
  if (value !== 0) return value;
  throw new LockstepError('USAGE_VALUE', '--top-p: expected a number above 0 and at most 1, received 0');
}

function plainText({ text, tokens }: Completion): string {
  return text ?? tokens.join(' ');
}

/** `text` is absent for rows of tokens. */
export function completionJson({ tokens, text, logprobs, finish }: Completion): string {
  const words = text === undefined ? '' : `"text":${JSON.stringify(text)},`;
  return `{"tokens":[${tokens.join(',')}],${words}"logprobs":${float32Array(logprobs)},"finish":"${finish}"}`;
}
