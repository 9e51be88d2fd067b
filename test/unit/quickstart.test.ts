/** The quickstart's language, data, model and folder; its training is an end-to-end test. */
import { access, mkdir, mkdtemp, readdir, readFile, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { reward } from '../../examples/quickstart/check.js';
import { openCheckpoint } from '../../src/checkpoints/hugging-face.js';
import { loadTokenizer } from '../../src/data/tokenizer.js';
import { loadConfig, parseConfig } from '../../src/train/config.js';
import { quickstartConfigs, stages, trainedModel } from '../../src/train/quickstart/configs.js';
import { quickstartRows } from '../../src/train/quickstart/data.js';
import {
  allOrders,
  answerText,
  checkAnswer,
  dishes,
  goodAnswer,
  ingredients,
  promptsFor,
  staffAnswer,
} from '../../src/train/quickstart/language.js';
import { endToken, writeStartingModel } from '../../src/train/quickstart/model.js';
import { quickstart } from '../../src/train/quickstart/quickstart.js';
import { pick, randomStream, shuffled } from '../../src/train/quickstart/random.js';

const temporary = () => mkdtemp(join(tmpdir(), 'lockstep-quickstart-'));
const order = { dish: 'soup', first: 'leek', second: 'corn' };
const [prompt] = promptsFor(order) as [string];
const good = goodAnswer(order);
const points = (answer: string) => Math.round(checkAnswer(prompt, answer) * 6);

describe('the check', () => {
  test('gives a good answer to any order, in any wording, every point', () => {
    for (const each of allOrders())
      for (const asked of promptsFor(each)) expect(checkAnswer(asked, goodAnswer(each))).toBe(1);
  });

  test.each([
    ['no greeting', good.replace(' Good day!', ''), 5],
    ['a gruff greeting', good.replace(' Good day!', ' You again.'), 5],
    ['another dish', good.replace('soup', 'stew'), 5],
    ['another first ingredient', good.replace('leek', 'fig'), 5],
    ['another second ingredient', good.replace('corn', 'fig'), 5],
    ['ingredients swapped', good.replace('leek and corn', 'corn and leek'), 4],
    ['a rude remark', good.replace(' Enjoy', ' Pay first. Enjoy'), 5],
    ['no wish', good.replace(' Enjoy your meal!', ''), 5],
    ['text after the wish', `${good} Enjoy`, 5],
    ['nothing served', ' Good day! Enjoy your meal!', 2],
    ['served twice', good.replace(' Here', ' Here is your soup with leek and corn. Here'), 2],
    ['nothing said', '', 0],
  ])('%s', (_, answer, expected) => expect(points(answer)).toBe(expected));

  test('refuses a prompt that orders nothing', () => {
    expect(() => checkAnswer('hello', good)).toThrow(expect.objectContaining({ code: 'QUICKSTART_PROMPT' }));
  });

  test("is the example's reward function, in points", () => {
    const random = randomStream(5, 'answers');
    const samples = Array.from({ length: 500 }, () => {
      const asked = pick(allOrders(), random);
      const answer = () => answerText(staffAnswer(pick([asked, order], random), random));
      const words = (random() < 0.2 ? answer() + answer() : answer()).split(/(?= )/);
      // Words left out, doubled or moved make answers that no staff gives.
      const broken =
        random() < 0.5 ? words : shuffled([...words, pick(words, random)], random).slice(random() < 0.5 ? 1 : 0);
      return { prompt: pick(promptsFor(asked), random), response: broken.join('') };
    });
    const expected = samples.map((sample) => Math.round(checkAnswer(sample.prompt, sample.response) * 6));
    expect(reward(samples)).toEqual(expected);
    expect(new Set(expected).size).toBe(7);
  });
});

describe('the data', () => {
  const rows = quickstartRows(3);
  const ordersOf = (part: readonly { prompt?: string }[]) =>
    new Set(part.map((row) => /\w+ with \w+ and \w+/.exec(row.prompt!)![0]));

  test('is a function of the seed', () => {
    expect(quickstartRows(3)).toEqual(rows);
    expect(quickstartRows(4).train.sft).not.toEqual(rows.train.sft);
    expect(ordersOf(quickstartRows(4).heldOut.prompts)).not.toEqual(ordersOf(rows.heldOut.prompts));
  });

  test('never trains on a held-out order', () => {
    const heldOut = ordersOf(rows.heldOut.prompts);
    expect(heldOut.size).toBe(64);
    for (const part of Object.values(rows.train))
      expect([...ordersOf(part)].filter((each) => heldOut.has(each))).toEqual([]);
    for (const part of Object.values(rows.heldOut)) expect(ordersOf(part)).toEqual(heldOut);
  });

  test('prefers the better answer, mostly, and never equal ones', () => {
    const ahead = rows.train.pairs.map(({ prompt, chosen, rejected }) => {
      for (const answer of [chosen!, rejected!]) expect(answer.endsWith(endToken)).toBe(true);
      const share = (answer: string) => checkAnswer(prompt!, answer.slice(0, -endToken.length));
      return share(chosen!) - share(rejected!);
    });
    const wrong = ahead.filter((difference) => difference < 0).length / ahead.length;
    expect(ahead.every((difference) => Math.abs(difference) > 0.1)).toBe(true);
    expect(wrong).toBeGreaterThan(0.01);
    expect(wrong).toBeLessThan(0.06);
  });

  test('shows answers that leave room for improvement', () => {
    const shares = rows.train.sft.map((row) => checkAnswer(row.prompt!, row.response!));
    const mean = shares.reduce((sum, share) => sum + share, 0) / shares.length;
    expect(mean).toBeGreaterThan(0.5);
    expect(mean).toBeLessThan(0.65);
  });
});

describe('the starting model', () => {
  test('is a checkpoint whose every byte is a function of the seed', async () => {
    const [one, again, other] = await Promise.all([temporary(), temporary(), temporary()]);
    const parameters = await writeStartingModel(one, 1);
    await writeStartingModel(again, 1);
    await writeStartingModel(other, 2);
    for (const name of await readdir(one)) {
      const [bytes, same] = [await readFile(join(one, name)), await readFile(join(again, name))];
      expect([name, bytes.equals(same)]).toEqual([name, true]);
    }
    const weights = (directory: string) => readFile(join(directory, 'model.safetensors'));
    expect((await weights(one)).equals(await weights(other))).toBe(false);
    const { shape, tensors } = await openCheckpoint(one);
    const sizes = [...tensors.values()].map((tensor) => tensor.bytes / 4);
    expect(sizes.reduce((sum, size) => sum + size, 0)).toBe(parameters);
    expect(shape.tied).toBe(true);
  });

  test('reads each word of the language as one token, and any other text in pieces', async () => {
    const directory = await temporary();
    await writeStartingModel(directory, 0);
    const tokenizer = await loadTokenizer(directory);
    const { shape } = await openCheckpoint(directory);
    expect(tokenizer.vocabularySize).toBe(shape.vocabulary);
    for (const word of [...dishes, ...ingredients]) expect([...tokenizer.encodePrompt(` ${word}`)]).toHaveLength(1);
    for (const text of [prompt, good, ' You again. Eat fast.', 'Grüße, 世界 🍲\n\tsoups']) {
      expect(tokenizer.decode(tokenizer.encodePrompt(text))).toBe(text);
    }
    expect([...tokenizer.encodePrompt(`${good}${endToken}`)].at(-1)).toBe(tokenizer.endToken);
    expect(tokenizer.encodePrompt(prompt + good).length).toBeLessThan(45);
  });
});

describe('the configurations', () => {
  test('are complete, and each stage starts from what the one before leaves', () => {
    const configs = quickstartConfigs('runs/quickstart', 7);
    for (const stage of stages) {
      const config = parseConfig(configs[stage]);
      expect([config.algorithm, config.seed]).toEqual([stage, 7]);
      const last = join(config.output, 'checkpoints', `step-${String(config.steps).padStart(6, '0')}`);
      expect(trainedModel('runs/quickstart', stage)).toBe(last);
    }
    expect(configs.reward.model).toBe(trainedModel('runs/quickstart', 'sft'));
    expect(configs.ppo).toMatchObject({
      reward: { model: trainedModel('runs/quickstart', 'reward') },
      checks: { mismatch: 'all' },
    });
  });

  test.each(stages)('examples/quickstart/%s.yaml is the same, with its own output', async (stage) => {
    const example = JSON.stringify(await loadConfig(`examples/quickstart/${stage}.yaml`));
    const own = JSON.stringify(parseConfig(quickstartConfigs('runs/quickstart', 0)[stage]));
    const renamed = own.replaceAll(/runs\/quickstart(?=\/(sft|reward|ppo)\b)/g, 'runs/by-hand');
    expect(JSON.parse(example)).toEqual(JSON.parse(renamed));
  });

  test('the example takes the check in place of the reward model, as its text says', async () => {
    const set = 'reward={function: examples/quickstart/check.ts}';
    expect(await readFile('examples/quickstart/README.md', 'utf8')).toContain(`--set '${set}'`);
    const config = await loadConfig('examples/quickstart/ppo.yaml', [set]);
    expect(config).toMatchObject({ reward: [{ function: 'examples/quickstart/check.ts' }] });
  });
});

/** Lets a quickstart go as far as its data and model, and no further. */
async function prepare(output: string, seed = 0): Promise<string[]> {
  const events: string[] = [];
  for await (const event of quickstart({ output, seed })) {
    events.push(event.type);
    if (event.type === 'prepared') break;
  }
  return events;
}

describe('the folder', () => {
  test('of an earlier quickstart is replaced; files of others in it stay', async () => {
    const output = join(await temporary(), 'deep', 'quickstart');
    expect(await prepare(output)).toEqual(['prepared']);
    const data = await readFile(join(output, 'data', 'sft.jsonl'), 'utf8');
    await mkdir(join(output, 'ppo'));
    await writeFile(join(output, 'notes.txt'), 'mine');
    expect(await prepare(output, 1)).toEqual(['replacing', 'prepared']);
    expect(await readFile(join(output, 'data', 'sft.jsonl'), 'utf8')).not.toBe(data);
    expect(await readFile(join(output, 'notes.txt'), 'utf8')).toBe('mine');
    await expect(access(join(output, 'ppo'))).rejects.toThrow();
    expect(await readdir(output)).not.toContain('.lock');
  });

  test('that holds something else is refused and left alone', async () => {
    const output = await temporary();
    await mkdir(join(output, 'data'));
    await writeFile(join(output, 'data', 'mine.jsonl'), '{}');
    await expect(prepare(output)).rejects.toThrow(expect.objectContaining({ code: 'QUICKSTART_FOLDER' }));
    expect(await readdir(output)).toEqual(['data']);
    expect(await readdir(join(output, 'data'))).toEqual(['mine.jsonl']);
  });

  test('that is a file is refused', async () => {
    const output = join(await temporary(), 'file');
    await writeFile(output, '');
    await expect(prepare(output)).rejects.toThrow(expect.objectContaining({ code: 'QUICKSTART_FOLDER' }));
  });

  test('is for one quickstart at a time', async () => {
    const output = await temporary();
    const first = quickstart({ output });
    await first.next();
    await expect(prepare(output)).rejects.toThrow(expect.objectContaining({ code: 'RUN_LOCKED' }));
    await first.return(undefined);
  });
});
