/** `lockstep quickstart`: from nothing to a policy improved by PPO, in a minute or two. */
import { formatSeconds } from '../reports/numbers.js';
import type { QuickstartEvent, QuickstartSummary } from '../train/quickstart/quickstart.js';
import type { Command, Input, Session } from './command.js';
import { TrainProgress } from './progress.js';
import type { Terminal } from './terminal.js';
import { number, text } from './values.js';

export const quickstartCommand: Command = {
  name: 'quickstart',
  summary: 'make data and a small model, then fine-tune, train a reward model, and run PPO',
  words: [],
  flags: {
    output: {
      value: 'DIR',
      help: 'Where everything goes (default runs/quickstart); an earlier quickstart is replaced',
    },
    seed: { value: 'N', help: 'Seed of data, starting weights and training (default 0)' },
    json: { help: 'Print the summary as one JSON object on stdout' },
  },
  notes: [
    'The folder gets data/, model/, the runs sft/, reward/ and ppo/ with a report.html each, and summary.json. Exit code 1 when ' +
      'the reward model or the check improves by less than one standard deviation of the fine-tuned policy.',
  ],
  examples: ['lockstep quickstart', 'lockstep quickstart --seed 1 --output runs/quickstart-1 --json'],
  run,
};

const stageTitles = {
  sft: 'Stage 1 of 3: fine-tuning on answers of mixed quality',
  reward: 'Stage 2 of 3: a reward model from pairs of answers',
  ppo: 'Stage 3 of 3: PPO against the reward model',
};

async function run(input: Input, { terminal, interrupts, verbose }: Session): Promise<number> {
  const output = text(input, 'output');
  const seed = number(input, 'seed', { minimum: 0, whole: true });
  const { quickstart } = await import('../train/quickstart/quickstart.js');
  const show = new Screen(terminal, verbose);
  return interrupts.during('finishing the step and saving', async (signal) => {
    const options = { signal, ...(output === undefined ? {} : { output }), ...(seed === undefined ? {} : { seed }) };
    for await (const event of quickstart(options)) {
      show.event(event);
      if (event.type === 'interrupted') return interrupts.exitCode ?? 1;
      if (event.type === 'done') return finish(event, input, terminal);
    }
    return 1;
  });
}

class Screen {
  #stage = '';
  #progress: TrainProgress;

  constructor(
    private readonly terminal: Terminal,
    private readonly verbose: boolean,
  ) {
    this.#progress = new TrainProgress(terminal, { verbose });
  }

  event(event: QuickstartEvent): void {
    const { terminal } = this;
    if (event.type === 'replacing') terminal.note(`replacing the earlier quickstart in ${event.output}`);
    if (event.type === 'prepared') {
      terminal.note(
        `made ${event.trainingRows} rows of data, ${event.heldOutPrompts} held-out prompts and a model of ${event.parameters} random weights in ${event.output}`,
      );
    }
    if (event.type === 'interrupted') terminal.note('a quickstart does not resume: run it again from the start');
    // A stage's own word on interruption advises to resume it, which a quickstart does not.
    if (event.type !== 'stage' || event.event.type === 'interrupted') return;
    if (event.stage !== this.#stage) {
      this.#stage = event.stage;
      this.#progress = new TrainProgress(terminal, { verbose: this.verbose });
      terminal.note(`\n${terminal.style('bold', stageTitles[event.stage])}`);
    }
    this.#progress.show(event.event);
  }
}

async function finish(event: Extract<QuickstartEvent, { type: 'done' }>, input: Input, terminal: Terminal) {
  const { writeReport } = await import('../reports/report.js');
  const { relative, join } = await import('node:path');
  const { output, summary, samples, trainingSeconds } = event;
  for (const stage of ['sft', 'reward', 'ppo']) await writeReport(join(output, stage));
  const folder = relative('.', output).startsWith('..') ? output : relative('.', output) || '.';
  const gains = gainsOf(summary);
  const lines = [
    '',
    ...table(summary, gains, terminal),
    `training took ${formatSeconds(trainingSeconds)}`,
    '',
    ...samples.flatMap(({ before, after }) => [
      terminal.style('dim', `order   ${(before.prompt ?? '').trim().split('\n')[0]}`),
      `before  ${(before.response ?? '').trim()}`,
      `after   ${(after.response ?? '').trim()}`,
      '',
    ]),
    ...nextSteps(folder),
  ];
  if (input.switches.has('json')) {
    for (const line of lines) terminal.note(line);
    terminal.print(JSON.stringify(summary));
  } else terminal.print(lines.join('\n'));
  if (gains.score >= 1 && gains.check >= 1) return 0;
  terminal.error('the improvement is below one standard deviation; another --seed may show it');
  return 1;
}

/** Improvements in standard deviations of the fine-tuned policy. */
function gainsOf(summary: QuickstartSummary): { score: number; check: number } {
  return {
    score: (summary.after - summary.before) / summary.standardDeviation,
    check: (summary.checkAfter - summary.checkBefore) / summary.checkStandardDeviation,
  };
}

function table(summary: QuickstartSummary, gains: { score: number; check: number }, terminal: Terminal): string[] {
  const row = (cells: readonly string[]) =>
    `${cells[0]!.padEnd(34)}${cells
      .slice(1)
      .map((cell) => cell.padStart(12))
      .join('')}`;
  const numbers = (before: number, after: number, gain: number) => [
    before.toFixed(3),
    after.toFixed(3),
    `${gain < 0 ? '' : '+'}${gain.toFixed(2)} SD`,
  ];
  const { before, after, checkBefore, checkAfter, mismatchMax, mismatchTokens } = summary;
  return [
    terminal.style('bold', row(['held-out prompts', 'before', 'after PPO', 'gain'])),
    row(["reward model's score", ...numbers(before, after, gains.score)]),
    row(['check (share of six points)', ...numbers(checkBefore, checkAfter, gains.check)]),
    `rollout and trainer: largest difference of log-probs ${mismatchMax} over ${mismatchTokens} tokens`,
  ];
}

function nextSteps(folder: string): string[] {
  return [
    `report:   ${folder}/ppo/report.html   (also ${folder}/sft/report.html, ${folder}/reward/report.html)`,
    `summary:  ${folder}/summary.json`,
    `configs:  ${folder}/{sft,reward,ppo}/config.yaml`,
    '',
    'The same with your own model and data: copy the configuration of a stage, set model, data, reward.model and output, then',
    '  npx lockstep train my-sft.yaml      (likewise the reward model and PPO; `dtype: bfloat16` suits large models)',
    '  npx lockstep report RUN             (RUN: the output of a configuration)',
    'examples/quickstart in the repository explains the data and has the three configurations with comments.',
  ];
}
