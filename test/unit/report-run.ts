/** A synthetic run folder, as `train` writes them: curves of a known shape, samples before and after, a cut last line. */
import { mkdirSync, mkdtempSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { stringify } from 'yaml';

export type SyntheticKind = 'ppo' | 'sft' | 'reward';

/** A counter-based noise in [-1, 1]: the same everywhere. */
function noise(step: number, stream: number): number {
  return Math.sin(step * 12.9898 + stream * 78.233) * Math.cos(step * 4.1414 + stream * 9.17);
}

function ppoRow(step: number, steps: number): Record<string, number> {
  const share = step / steps;
  return {
    step,
    'reward.mean': 0.2 + 1.8 * (1 - Math.exp(-3 * share)) + 0.15 * noise(step, 1),
    'reward.model': 0.3 + 1.9 * (1 - Math.exp(-3 * share)) + 0.15 * noise(step, 1),
    'kl.mean': 4 * share + 0.2 * Math.abs(noise(step, 2)),
    'policy.kl': 0.01 + 0.003 * noise(step, 3),
    'value.loss': 0.8 * Math.exp(-4 * share) + 0.05 * (1 + noise(step, 4)),
    'value.explained': 0.9 * share + 0.05 * noise(step, 5),
    'policy.loss': -0.02 + 0.01 * noise(step, 6),
    'policy.clipFraction': 0.08 + 0.03 * noise(step, 7),
    entropy: 2.4 - 0.9 * share + 0.05 * noise(step, 8),
    'response.length': 24 + 6 * share + noise(step, 9),
    'response.truncated': Math.max(0, 0.1 - 0.1 * share),
    'gradient.norm': 1.4 - 0.6 * share + 0.2 * Math.abs(noise(step, 10)),
    learningRate: 1e-4 * Math.min(1, step / 10) * (1 - 0.9 * share),
    'mismatch.max': 0,
    'mismatch.tokens': 800,
    tokens: 2048 + Math.round(200 * noise(step, 11)),
    'seconds.generate': 0.5 + 0.05 * noise(step, 12),
    'seconds.reward': 0.1,
    'seconds.reference': 0.12,
    'seconds.update': 0.45 + 0.04 * noise(step, 13),
    'seconds.native': 1.1,
  };
}

function lossRow(step: number, steps: number): Record<string, number> {
  const share = step / steps;
  return {
    step,
    loss: 0.7 + 3.2 * Math.exp(-5 * share) + 0.06 * noise(step, 1),
    'gradient.norm': 1 + Math.abs(noise(step, 2)),
    learningRate: 1e-3 * (1 - share),
    tokens: 4096,
    'seconds.forward': 0.1,
    'seconds.backward': 0.2,
    'seconds.step': 0.05,
  };
}

function evaluation(kind: SyntheticKind, step: number, steps: number): Record<string, number> {
  const share = step / steps;
  if (kind === 'ppo') return { 'eval.reward.mean': 0.2 + 1.7 * share };
  if (kind === 'reward') return { 'eval.loss': 0.7 - 0.3 * share, 'eval.reward.accuracy': 0.5 + 0.4 * share };
  return { 'eval.loss': 0.8 + 3 * Math.exp(-5 * share) };
}

export const hostileText = '</script><script>document.title="broken"</script> & <b>bold</b> "quoted" \u0007 ünïcödé 🦊';

function samples(step: number): string {
  const after = step > 0;
  const rows = [
    {
      index: 0,
      prompt: 'Sort the letters: d a c b',
      response: after ? ' a b c d' : ' d c c a b d a',
      reward: after ? 2.1 : -0.4,
      finish: 'stop',
    },
    {
      index: 1,
      prompt: `Repeat after me:\n${hostileText}`,
      response: after ? ` ${hostileText}` : '',
      reward: after ? 1.4 : 0.3,
      finish: 'stop',
    },
    {
      index: 2,
      prompt: 'Count from one to five.',
      response: after ? ' one two three four five' : ' one one one one one one one one',
      reward: after ? 1.9 : 0.1,
      finish: after ? 'stop' : 'length',
    },
  ];
  return rows.map((row) => `${JSON.stringify(row)}\n`).join('');
}

export interface SyntheticOptions {
  steps?: number;
  /** Steps that have been done; default: all. */
  done?: number;
  /** Ends metrics.jsonl in the middle of a line. */
  cut?: boolean;
  directory?: string;
}

/** Writes the folder and returns its path. */
export function syntheticRun(kind: SyntheticKind, options: SyntheticOptions = {}): string {
  const { steps = 100, cut = false } = options;
  const done = options.done ?? steps;
  const folder = join(options.directory ?? mkdtempSync(join(tmpdir(), 'lockstep-report-')), `${kind}-run`);
  mkdirSync(join(folder, 'rollouts'), { recursive: true });
  mkdirSync(join(folder, 'checkpoints', `step-${String(done).padStart(6, '0')}`), { recursive: true });
  const config = {
    algorithm: kind,
    model: 'models/small',
    data: { train: 'train.jsonl', eval: 'held-out.jsonl', shuffle: true },
    dtype: 'bfloat16',
    optimizer: { learningRate: 1e-4, betas: [0.9, 0.95], schedule: 'linear' },
    steps,
    seed: 7,
    output: folder,
  };
  writeFileSync(join(folder, 'config.yaml'), stringify(config));
  const rows: Record<string, number>[] = [{ step: 0, ...evaluation(kind, 0, steps) }];
  for (let step = 1; step <= done; step++) {
    const row = kind === 'ppo' ? ppoRow(step, steps) : lossRow(step, steps);
    rows.push(step % 20 === 0 || step === done ? { ...row, ...evaluation(kind, step, steps) } : row);
  }
  const text = rows.map((row) => `${JSON.stringify(row)}\n`).join('');
  writeFileSync(join(folder, 'metrics.jsonl'), cut ? text.slice(0, -25) : text);
  if (kind !== 'reward') {
    writeFileSync(join(folder, 'rollouts', 'eval-000000.jsonl'), samples(0));
    writeFileSync(join(folder, 'rollouts', `eval-${String(done).padStart(6, '0')}.jsonl`), samples(done));
  }
  return folder;
}
