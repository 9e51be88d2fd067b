/**
 * The quickstart's language: at a small lunch counter a guest orders a dish with two ingredients, and the answer serves it.
 * Six points say how good an answer is; they can be read off the text, so training can be judged without a model.
 */
import { LockstepError } from '../../errors.js';
import { pick, type Random } from './random.js';

export const dishes = ['soup', 'salad', 'stew', 'pie', 'rice', 'curry'];
export const ingredients = ['carrot', 'onion', 'leek', 'bean', 'corn', 'pear', 'plum', 'fig'];

export interface Order {
  dish: string;
  first: string;
  second: string;
}

/** Every order there is: a dish with two different ingredients. */
export function allOrders(): Order[] {
  return dishes.flatMap((dish) =>
    ingredients.flatMap((first) =>
      ingredients.filter((second) => second !== first).map((second) => ({ dish, first, second })),
    ),
  );
}

const requests: readonly ((what: string) => string)[] = [
  (what) => `I would like ${what}.`,
  (what) => `May I have ${what}?`,
  (what) => `One ${what}, please.`,
];
const greetings = [' Good day!', ' Welcome!'];
const gruffGreetings = ['', ' You again.'];
const rudeRemarks = [' Eat fast.', ' Pay first.'];
const wish = ' Enjoy your meal!';

const orderText = ({ dish, first, second }: Order): string => `${dish} with ${first} and ${second}`;
const serving = (order: Order): string => ` Here is your ${orderText(order)}.`;

/** The guest's turn, up to where the answer begins: an order in every wording. */
export function promptsFor(order: Order): string[] {
  return requests.map((request) => `\n\nHuman: ${request(orderText(order))}\n\nAssistant:`);
}

/** How often the counter's staff gets each point right: fine-tuning imitates them, good days and bad. */
const habits = { greeting: 0.35, serving: 0.98, dish: 0.8, ingredient: 0.75, manners: 0.45, wish: 0.35 };

/** An answer in parts; each begins with a space, or is empty. */
export interface Answer {
  greeting: string;
  serving: string;
  remark: string;
  wish: string;
}

export const answerText = ({ greeting, serving, remark, wish }: Answer): string => greeting + serving + remark + wish;

/** What the staff says to an order: each point is kept or missed independently of the others. */
export function staffAnswer(order: Order, random: Random): Answer {
  return {
    greeting: pick(random() < habits.greeting ? greetings : gruffGreetings, random),
    serving: staffServing(order, random),
    remark: random() < habits.manners ? '' : pick(rudeRemarks, random),
    wish: random() < habits.wish ? wish : '',
  };
}

/** What the staff serves, now and then nothing. */
export function staffServing({ dish, first, second }: Order, random: Random): string {
  if (random() >= habits.serving) return '';
  return serving({
    dish: random() < habits.dish ? dish : pick(dishes, random),
    first: random() < habits.ingredient ? first : pick(ingredients, random),
    second: random() < habits.ingredient ? second : pick(ingredients, random),
  });
}

/** The answer that gets every point. */
export const goodAnswer = (order: Order): string => greetings[0]! + serving(order) + wish;

const orderPattern = /(\w+) with (\w+) and (\w+)/;

/**
 * The share of six points that an answer gets: it opens with a greeting; serves the dish, the first and the second ingredient
 * that were asked for; has no rude remark; closes with the wish. The points of the serving, and the one for manners, need
 * exactly one serving.
 *
 * @throws LockstepError QUICKSTART_PROMPT when the prompt is none of this language.
 */
export function checkAnswer(prompt: string, answer: string): number {
  const asked = orderPattern.exec(prompt)?.slice(1);
  if (!asked) {
    const message = `the prompt ${JSON.stringify(prompt)} orders nothing; expected "DISH with INGREDIENT and INGREDIENT" in it`;
    throw new LockstepError('QUICKSTART_PROMPT', message, { prompt });
  }
  const servings = [...answer.matchAll(new RegExp(orderPattern, 'g'))].map((match) => match.slice(1));
  const served = servings.length === 1 ? servings[0]! : undefined;
  const points = [
    greetings.some((greeting) => answer.startsWith(greeting)),
    ...asked.map((word, i) => served?.[i] === word),
    served !== undefined && !rudeRemarks.some((remark) => answer.includes(remark)),
    answer.endsWith(wish),
  ];
  return points.filter(Boolean).length / points.length;
}

/** Every sentence part of the language, for a tokenizer that knows its words. */
export function vocabularyText(): string[] {
  const order = { dish: 'soup', first: 'leek', second: 'corn' };
  const words = [...dishes, ...ingredients].map((word) => ` ${word}`);
  return [...promptsFor(order), ...greetings, ...gruffGreetings, serving(order), ...rudeRemarks, wish, ...words];
}
