/** The quickstart's data files, made by script: answers to imitate, pairs to compare, prompts to answer. */
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import {
  type Answer,
  allOrders,
  answerText,
  checkAnswer,
  type Order,
  promptsFor,
  staffAnswer,
  staffServing,
} from './language.js';
import { endToken } from './model.js';
import { pick, type Random, randomStream, shuffled } from './random.js';

/** Orders that no training data has, each asked in every wording; the rest is trained on. */
const heldOutOrders = 64;
const trainingRows = { sft: 4096, pairs: 6144, prompts: 4096, judged: 4096 };

/** How strongly the judge of pairs prefers a point more: log-odds a point. The judge errs now and then, as people do. */
const oddsPerPoint = 3;
const points = 6;

export type RowKind = keyof typeof trainingRows;

interface JudgedRow {
  prompt: string;
  response: string;
  desirable: boolean;
}
type RowOf<Kind extends RowKind> = Kind extends 'judged' ? JudgedRow : Record<string, string>;
/** A row about an order, for one wording of it. */
type Maker<Kind extends RowKind> = (prompt: string, order: Order, random: Random) => RowOf<Kind>;

const makers: { [Kind in RowKind]: Maker<Kind> } = {
  sft: (prompt, order, random) => ({ prompt, response: answerText(staffAnswer(order, random)) }),
  pairs: preference,
  prompts: (prompt) => ({ prompt }),
  judged: judgement,
};

/**
 * Two answers of the staff to an order, of different worth; every other pair differs in what is served alone. The better one
 * is chosen with probability σ(3 · points ahead). Answers of pairs are read as they stand, so they end with the end token,
 * where PPO will ask for the score.
 */
function preference(prompt: string, order: Order, random: Random): Record<string, string> {
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

/** An answer of the staff, called desirable with probability σ(3 · points above half of them). */
function judgement(prompt: string, order: Order, random: Random): JudgedRow {
  const answer = staffAnswer(order, random);
  const above = pointsOf(prompt, answer) - points / 2;
  return { prompt, response: answerText(answer), desirable: random() < 1 / (1 + Math.exp(-oddsPerPoint * above)) };
}

const pointsOf = (prompt: string, answer: Answer): number =>
  Math.round(checkAnswer(prompt, answerText(answer)) * points);

export type Rows = { [Kind in RowKind]: RowOf<Kind>[] };

/** All rows, a function of the seed. No order of held-out rows is in a training row. */
export function quickstartRows(seed: number): { train: Rows; heldOut: Rows } {
  const orders = shuffled(allOrders(), randomStream(seed, 'orders'));
  const [heldOut, seen] = [orders.slice(0, heldOutOrders), orders.slice(heldOutOrders)];
  const train = <Kind extends RowKind>(kind: Kind): RowOf<Kind>[] => {
    const random = randomStream(seed, `train ${kind}`);
    return Array.from({ length: trainingRows[kind] }, () => {
      const order = pick(seen, random);
      return makers[kind](pick(promptsFor(order), random), order, random);
    });
  };
  // Wordings take turns, so that neighbouring rows are about different orders.
  const wordings = Array.from(promptsFor(orders[0]!).keys());
  const test = <Kind extends RowKind>(kind: Kind): RowOf<Kind>[] => {
    const random = randomStream(seed, `held-out ${kind}`);
    return wordings.flatMap((turn) =>
      heldOut.map((order, i) => makers[kind](promptsFor(order)[(i + turn) % wordings.length]!, order, random)),
    );
  };
  return { train: ofKinds(train), heldOut: ofKinds(test) };
}

const ofKinds = (make: <Kind extends RowKind>(kind: Kind) => RowOf<Kind>[]): Rows => ({
  sft: make('sft'),
  pairs: make('pairs'),
  prompts: make('prompts'),
  judged: make('judged'),
});

/** Where `writeData` puts rows of a kind. */
export const dataFile = (folder: string, kind: RowKind, part: 'train' | 'heldOut'): string =>
  join(folder, part === 'train' ? `${kind}.jsonl` : `held-out-${kind}.jsonl`);

/** Writes every kind of rows as JSONL. */
export async function writeData(folder: string, seed: number): Promise<{ train: Rows; heldOut: Rows }> {
  const rows = quickstartRows(seed);
  await mkdir(folder, { recursive: true });
  for (const part of ['train', 'heldOut'] as const) {
    for (const [kind, lines] of Object.entries(rows[part]) as [RowKind, object[]][]) {
      await writeFile(dataFile(folder, kind, part), lines.map((row) => `${JSON.stringify(row)}\n`).join(''));
    }
  }
  return rows;
}
