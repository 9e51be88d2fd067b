/**
 * The `reward` key of every algorithm that learns from rewards: a list of terms, or the short form for a model and a function. Both
 * become one list, whose weighted sum the reward is.
 */
import { resolve } from 'node:path';
import { z } from 'zod';
import { compileSchema } from '../rewards/built-in/json-schema.js';
import { compileRegex } from '../rewards/built-in/regex.js';
import { count, positive, text } from './schema-parts.js';

const common = {
  /** The metric `reward.<name>` and errors call the term so; default: its kind. */
  name: z
    .string()
    .regex(/^[A-Za-z][\w-]*$/, 'expected a letter followed by letters, digits, - or _')
    .optional(),
  weight: z.number().default(1),
};

/** Of terms that run in worker threads. */
const threaded = {
  threads: count.default(1),
  /** Samples per call. Left out: those of a step in equal shares, a call for each thread. */
  batchSize: count.optional(),
  /** For each call; a thread that takes longer is ended, and the run with it. */
  timeoutSeconds: positive.default(60),
};

type Threaded = Record<keyof typeof threaded, unknown>;

/** The data row's column with the right answer. */
const column = text;

const regex = z
  .strictObject({ pattern: z.string(), flags: z.string().default('') })
  .check(explained('pattern', ({ pattern, flags }) => compileRegex(pattern, flags)));

const inlineSchema = z
  .strictObject({
    schema: z.union([z.record(z.string(), z.unknown()), z.boolean()]),
    extract: z.enum(['whole', 'fenced']).default('whole'),
  })
  .check(explained('schema', ({ schema }) => compileSchema(schema)));
const schemaFile = z.strictObject({ file: text, extract: z.enum(['whole', 'fenced']).default('whole') });

const overlong = z
  .strictObject({ max: count, buffer: count })
  .refine(({ max, buffer }) => buffer <= max, { path: ['buffer'], error: 'at most max' });
const target = z
  .strictObject({ target: count, width: positive.optional() })
  .transform(({ target, width }) => ({ target, width: width ?? target }));

const url = z.string().check(
  explained(undefined, (given) => {
    const { protocol, username, password } = new URL(given);
    if (!/^https?:$/.test(protocol)) throw new Error(`${protocol} is neither http: nor https:`);
    if (username || password) throw new Error('credentials belong in headers');
  }),
);
const http = z.strictObject({
  url,
  headers: z.record(z.string(), z.string()).default({}),
  batchSize: count.default(16),
  concurrency: count.default(4),
  timeoutSeconds: positive.default(60),
  retries: z.int().nonnegative().default(3),
  backoffSeconds: z.number().nonnegative().default(0.5),
});

const exact = z.strictObject({ column, ignoreCase: z.boolean().default(false) });
const numeric = z.strictObject({ column, tolerance: z.number().nonnegative().default(1e-6) });
const boxed = z.strictObject({ column });

const cosine = z.strictObject({
  max: count,
  correct: z.tuple([z.number(), z.number()]).default([1, 0.5]),
  wrong: z.tuple([z.number(), z.number()]).default([-1, -0.5]),
  answer: z.union([z.strictObject({ exact }), z.strictObject({ numeric }), z.strictObject({ boxed })]),
});

/** One kind of term each, under its own key. */
const term = z.union([
  z.strictObject({ model: text, ...common }),
  z.strictObject({ function: text, ...common, ...threaded }),
  z.strictObject({ exact, ...common }),
  z.strictObject({ numeric, ...common }),
  z.strictObject({ boxed, ...common }),
  z.strictObject({ regex, ...common, ...threaded }),
  z.strictObject({ jsonSchema: z.union([inlineSchema, schemaFile]), ...common, ...threaded }),
  z.strictObject({ length: z.union([overlong, target]), ...common }),
  z.strictObject({ cosine, ...common }),
  z.strictObject({ repetition: z.strictObject({ ngram: count.default(3) }), ...common }),
  z.strictObject({ http, ...common }),
]);

const shortForm = z.strictObject({
  model: text.optional(),
  function: text.optional(),
  timeoutSeconds: positive.default(60),
});

type ParsedTerm = z.output<typeof term>;
type KeysOfUnion<T> = T extends unknown ? keyof T : never;

export type RewardKind = Exclude<KeysOfUnion<ParsedTerm>, keyof typeof common | keyof typeof threaded>;
/** A term with its defaults; which kind it is says the key that it has. */
export type RewardTerm = ParsedTerm & { name: string };
export type RewardTermOf<Kind extends RewardKind> = Extract<RewardTerm, Record<Kind, unknown>>;

export const rewardKinds = term.options.map((option) => Object.keys(option.shape)[0]) as RewardKind[];

export function kindOf(given: ParsedTerm): RewardKind {
  return rewardKinds.find((kind) => kind in given)!;
}

/** Parses to a list of terms, and the list to itself. Rules about several terms are in `reward-rules.ts`. */
export const rewardSchema = z
  .union([shortForm, ...term.options, z.array(term)])
  .transform((given): RewardTerm[] => termsOf(given).map((one) => ({ ...one, name: one.name ?? kindOf(one) })));

function termsOf(given: z.output<typeof shortForm> | ParsedTerm | readonly ParsedTerm[]): readonly ParsedTerm[] {
  if (Array.isArray(given)) return given;
  const { model, function: file, ...rest } = given as z.output<typeof shortForm>;
  // What has a weight was parsed as a term.
  if ('weight' in given) return [given as ParsedTerm];
  return [
    ...(model === undefined ? [] : [term.parse({ model })]),
    ...(file === undefined ? [] : [term.parse({ function: file, ...rest })]),
  ];
}

/** The reward model among the terms; there is at most one. */
export function rewardModel(terms: readonly RewardTerm[]): string | undefined {
  return terms.find((one) => 'model' in one)?.model;
}

/** An issue with the message of what `attempt` throws. */
function explained<T>(key: string | undefined, attempt: (value: T) => unknown) {
  return ({ value, issues }: z.core.ParsePayload<T>): void => {
    try {
      attempt(value);
    } catch (error) {
      const message = `one that can be used: ${(error as Error).message}`;
      issues.push({ code: 'custom', message, input: value, path: key === undefined ? [] : [key] });
    }
  };
}

/** What of a reward decides the rewards, with paths as they lie on this machine. Takes the key in any of its forms. */
export function rewardIdentity(given: unknown): unknown {
  const place = (path: unknown) => (typeof path === 'string' ? resolve(path) : path);
  const parsed = rewardSchema.safeParse(given);
  if (!parsed.success) return given;
  return parsed.data.map(({ name: _, ...one }) => {
    const { threads, batchSize, timeoutSeconds, ...settings } = one as typeof one & Partial<Threaded>;
    if ('model' in settings) return { ...settings, model: place(settings.model) };
    if ('function' in settings) {
      // It may look at the other samples of its call; threads decide which those are where no batch size does.
      const calls = batchSize === undefined ? { threads } : { batchSize };
      return { ...settings, ...calls, function: place(settings.function) };
    }
    if ('http' in settings) return { weight: settings.weight, http: { url: settings.http.url } };
    if ('jsonSchema' in settings && 'file' in settings.jsonSchema) {
      return { ...settings, jsonSchema: { ...settings.jsonSchema, file: place(settings.jsonSchema.file) } };
    }
    return settings;
  });
}
