/** `lockstep report`: a run folder as a page and a summary. */
import type { Command, Input, Session } from './command.js';
import { text } from './values.js';

export const reportCommand: Command = {
  name: 'report',
  summary: 'summarise a run and write its HTML report',
  words: [{ name: 'RUN', help: 'a run folder: the output of a configuration' }],
  flags: {
    html: { value: 'FILE', help: 'Where to write the page (default RUN/report.html)' },
    json: { help: 'Print the numbers as one JSON object' },
  },
  notes: [
    'The page is one file that loads nothing: curves, samples before and after, configuration. Works for a run that is still going.',
  ],
  examples: ['lockstep report runs/ppo', 'lockstep report runs/ppo --html ppo.html --json'],
  run,
};

async function run(input: Input, { terminal }: Session): Promise<number> {
  const { writeReport } = await import('../reports/report.js');
  const html = text(input, 'html');
  const report = await writeReport(input.words[0]!, {
    ...(html === undefined ? {} : { html }),
    width: terminal.columns,
  });
  if (input.switches.has('json')) terminal.print(JSON.stringify({ ...report.summary, html: report.html }));
  else terminal.print(`${report.text}\n\nreport: ${report.html}`);
  return 0;
}
