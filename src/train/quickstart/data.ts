/** The quickstart's data files, made by script: answers to imitate, pairs to compare, prompts to answer. */
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import {
  type Answer,
  allOrders,
  answerText,
  checkAnswer,
  type Order,
  promptFor,
  staffAnswer,
  staffServing,
} from './language.js';
import { endToken } from './model.js';
import { pick, type Random, randomStream, shuffled } from './random.js';

/** Orders that no training data has; the rest is trained on. */
const heldOutOrders = 256;
const trainingRows = { sft: 4096, pairs: 6144, prompts: 4096 };

/** How strongly the judge of pairs prefers a point more: log-odds a point. The judge errs now and then, as people do. */
const oddsPerPoint = 2;
const points = 6;

export type RowKind = keyof typeof trainingRows;

type Maker = (order: Order, random: Random) => Record<string, string>;

const makers: Record<RowKind, Maker> = {
  sft: (order, random) => ({ prompt: promptFor(order, random), response: answerText(staffAnswer(order, random)) }),
  pairs: preference,
  prompts: (order, random) => ({ prompt: promptFor(order, random) }),
};

/**
 * Two answers of the staff to an order, of different worth; every other pair differs in what is served alone. The better one
 * is chosen with probability σ(2 · points ahead). Answers of pairs are read as they stand, so they end with the end token,
 * where PPO will ask for the score.
 */
function preference(order: Order, random: Random): Record<string, string> {
  const prompt = promptFor(order, random);
  const one = staffAnswer(order, random);
  const sameManner = random() < 0.5;
  let other = one;
  let ahead = 0;
  while (ahead === 0) {
    other = sameManner ? { ...one, serving: staffServing(order, random) } : staffAnswer(order, random);
    ahead = pointsOf(prompt, one) - pointsOf(prompt, other);
  }
  const chooseOne = random() < 1 / (1 + Math.exp(-oddsPerPoint * ahead));
  const [chosen, rejected] = (chooseOne ? [one, other] : [other, one]).map(answerText);
  return { prompt, chosen: chosen + endToken, rejected: rejected + endToken };
}

const pointsOf = (prompt: string, answer: Answer): number =>
  Math.round(checkAnswer(prompt, answerText(answer)) * points);

export interface QuickstartRows {
  train: Record<RowKind, Record<string, string>[]>;
  heldOut: Record<RowKind, Record<string, string>[]>;
}

/** All rows, a function of the seed. Held-out rows have one order each, in none of the training rows. */
export function quickstartRows(seed: number): QuickstartRows {
  const orders = shuffled(allOrders(), randomStream(seed, 'orders'));
  const [heldOut, seen] = [orders.slice(0, heldOutOrders), orders.slice(heldOutOrders)];
  const kinds = Object.keys(makers) as RowKind[];
  const each = (make: (kind: RowKind, random: Random) => Record<string, string>[], name: string) =>
    Object.fromEntries(kinds.map((kind) => [kind, make(kind, randomStream(seed, `${name} ${kind}`))])) as Record<
      RowKind,
      Record<string, string>[]
    >;
  return {
    train: each(
      (kind, random) => Array.from({ length: trainingRows[kind] }, () => makers[kind](pick(seen, random), random)),
      'train',
    ),
    heldOut: each((kind, random) => heldOut.map((order) => makers[kind](order, random)), 'held-out'),
  };
}

/** Where `writeData` puts rows of a kind. */
export const dataFile = (folder: string, kind: RowKind, part: 'train' | 'heldOut'): string =>
  join(folder, part === 'train' ? `${kind}.jsonl` : `held-out-${kind}.jsonl`);

/** Writes every kind of rows as JSONL. */
export async function writeData(folder: string, seed: number): Promise<QuickstartRows> {
  const rows = quickstartRows(seed);
  await mkdir(folder, { recursive: true });
  for (const part of ['train', 'heldOut'] as const) {
    for (const [kind, lines] of Object.entries(rows[part]) as [RowKind, object[]][]) {
      await writeFile(dataFile(folder, kind, part), lines.map((row) => `${JSON.stringify(row)}\n`).join(''));
    }
  }
  return rows;
}
