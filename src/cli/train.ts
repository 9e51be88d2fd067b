/** `lockstep train`: a run from a configuration. */
import type { Command, Input, Session } from './command.js';
import { TrainProgress } from './progress.js';

export const trainCommand: Command = {
  name: 'train',
  summary: 'train a model: fine-tuning, reward models, PPO and its relatives, preferences',
  words: [{ name: 'CONFIG', help: 'a YAML or JSON configuration' }],
  flags: {
    set: { value: 'path=value', help: 'Override a setting; may be repeated', repeated: true },
    resume: { help: 'Continue the run in the output folder from its newest checkpoint' },
    json: { help: 'Print the rows of metrics.jsonl on stdout as they come' },
  },
  notes: [
    'The first Ctrl-C finishes the step and saves a checkpoint (exit code 130), the second stops in the middle of the step: --resume ' +
      'goes on from the checkpoint before. The run folder ' +
      '(output in the configuration) holds config.yaml, device.json, metrics.jsonl, checkpoints/, rollouts/ and trace.json. ' +
      'Relative paths in a configuration are relative to the current directory.',
  ],
  examples: [
    'lockstep train config.yaml',
    'lockstep train config.yaml --set optimizer.learningRate=1e-5 --set output=runs/second',
    'lockstep train config.yaml --resume',
  ],
  run,
};

async function run(input: Input, { terminal, interrupts, verbose }: Session): Promise<number> {
  const { loadConfig } = await import('../train/config.js');
  const config = await loadConfig(input.words[0]!, input.values.get('set'));
  const { train } = await import('../train/train.js');
  const json = input.switches.has('json');
  const progress = new TrainProgress(terminal, { verbose });
  return interrupts.during(
    'finishing the step and saving',
    async (signal, cancel) => {
      let exitCode = 0;
      for await (const event of train(config, { signal, cancel, resume: input.switches.has('resume') })) {
        progress.show(event);
        const row = event.type === 'step' || (event.type === 'evaluation' && event.step === 0);
        if (json && row) terminal.print(JSON.stringify(event.metrics));
        if (event.type === 'interrupted') exitCode = interrupts.exitCode ?? 1;
      }
      return exitCode;
    },
    'stopping in the middle of the step',
  );
}
