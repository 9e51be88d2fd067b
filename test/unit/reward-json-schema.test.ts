/** JSON schemas: what each keyword allows, and that a schema which would check less than it says is refused. */
import { describe, expect, it } from 'vitest';
import { compileSchema, jsonSchema } from '../../src/rewards/built-in/json-schema.js';
import type { RewardSample } from '../../src/rewards/reward-function.js';

const { signal } = new AbortController();
const score = async (schema: unknown, response: string, extract: 'whole' | 'fenced' = 'whole') => {
  const sample: RewardSample = { prompt: '', response, tokens: new Int32Array(), row: {} };
  return (await jsonSchema({ schema, extract })([sample], { signal }))[0];
};

const linked = {
  $defs: { list: { type: 'object', properties: { next: { $ref: '#/$defs/list' } }, required: ['value'] } },
};

/** Schema, values that it allows, values that it does not. */
const cases: [unknown, unknown[], unknown[]][] = [
  [true, [1, null], []],
  [false, [], [1, null]],
  [{}, [1, null, []], []],
  [{ type: 'integer' }, [1, 1.0, -3], [1.5, '1', true]],
  [{ type: ['string', 'null'] }, ['', null], [0, []]],
  [{ type: 'object' }, [{}], [[], null]],
  [{ enum: [1, [2], { a: 1, b: 2 }] }, [1, [2], { b: 2, a: 1 }], [2, [1], { a: 1 }, true]],
  [{ const: { a: [false] } }, [{ a: [false] }], [{ a: [0] }, {}]],
  [{ required: ['a'] }, [{ a: null }, 5], [{}, { b: 1 }]],
  [{ required: ['toString'] }, [{ toString: 1 }], [{}]],
  [{ properties: { a: { type: 'number' } } }, [{ a: 1 }, { b: 'x' }, 'x'], [{ a: 'x' }]],
  [
    { properties: { a: {} }, patternProperties: { '^x': {} }, additionalProperties: false },
    [{ a: 1, xy: 2 }],
    [{ b: 1 }],
  ],
  [{ additionalProperties: { type: 'string' } }, [{ a: 'x' }], [{ a: 1 }]],
  [{ propertyNames: { maxLength: 2 } }, [{ ab: 1 }], [{ abc: 1 }]],
  [{ minProperties: 1, maxProperties: 2 }, [{ a: 1 }], [{}, { a: 1, b: 1, c: 1 }]],
  [{ dependentRequired: { a: ['b'] } }, [{ a: 1, b: 1 }, { c: 1 }], [{ a: 1 }]],
  [{ dependentSchemas: { a: { required: ['b'] } } }, [{ a: 1, b: 1 }, {}], [{ a: 1 }]],
  [{ prefixItems: [{ type: 'number' }], items: { type: 'string' } }, [[1, 'a'], []], [['a'], [1, 2]]],
  [{ items: false }, [[]], [[1]]],
  [{ minItems: 1, maxItems: 2 }, [[1]], [[], [1, 2, 3]]],
  [
    { uniqueItems: true },
    [[1, '1', { a: 1 }]],
    [
      [
        { a: 1, b: 2 },
        { b: 2, a: 1 },
      ],
    ],
  ],
  [{ contains: { const: 1 }, minContains: 1, maxContains: 2 }, [[1, 2]], [[2], [1, 1, 1]]],
  [{ contains: { const: 1 }, minContains: 0 }, [[]], []],
  [{ minLength: 2, maxLength: 2 }, ['ab', '😀😀'], ['a', 'abc']],
  [{ pattern: '^\\p{L}+$' }, ['äb', 5], ['a1']],
  [{ minimum: 1, maximum: 2 }, [1, 2, '0'], [0.9, 2.1]],
  [{ exclusiveMinimum: 1, exclusiveMaximum: 2 }, [1.5], [1, 2]],
  [{ multipleOf: 0.01 }, [0.07, 4.35, 19.99], [0.075]],
  [{ allOf: [{ minimum: 1 }, { maximum: 2 }] }, [1.5], [0, 3]],
  [{ anyOf: [{ type: 'string' }, { minimum: 2 }] }, ['x', 2], [1]],
  [{ oneOf: [{ minimum: 1 }, { maximum: 2 }] }, [0, 3], [1.5]],
  [{ not: { type: 'null' } }, [0], [null]],
  // biome-ignore lint/suspicious/noThenProperty: the keyword
  [{ if: { minimum: 10 }, then: { multipleOf: 10 }, else: { multipleOf: 2 } }, [20, 4], [15, 3]],
  [{ ...linked, $ref: '#/$defs/list' }, [{ value: 1, next: { value: 2 } }], [{ value: 1, next: {} }]],
  [{ $defs: { 'a/b~c d': { type: 'null' } }, $ref: '#/$defs/a~1b~0c%20d' }, [null], [1]],
  [{ $ref: '#/$defs/n', maximum: 3, $defs: { n: { minimum: 1 } } }, [2], [0, 4]],
  [{ $schema: 'x', $id: 'y', title: 't', description: 'd', default: 1, examples: [1], type: 'null' }, [null], [1]],
];

describe('a schema', () => {
  it.each(cases)('%j allows %j, and not %j', (schema, allowed, refused) => {
    const check = compileSchema(schema);
    for (const value of allowed) expect(check(value), JSON.stringify(value)).toBe(true);
    for (const value of refused) expect(check(value), JSON.stringify(value)).toBe(false);
  });

  it.each<[unknown, string]>([
    ['string', '#: expected a schema, received "string"'],
    [{ type: 'strin' }, '#/type: expected of null, boolean'],
    [{ properties: { a: { minimum: '3' } } }, '#/properties/a/minimum: expected a number, received "3"'],
    [{ required: 'a' }, '#/required: expected a list of texts'],
    [{ items: [{}] }, '#/items: expected a schema'],
    [{ pattern: '(' }, '#/pattern: expected a regular expression'],
    [{ patternProperties: { '(': {} } }, '#/patternProperties: expected a regular expression'],
    [{ multipleOf: 0 }, '#/multipleOf: expected a number above 0'],
    [{ minLength: -1 }, '#/minLength: expected a whole number'],
    [{ anyOf: [] }, '#/anyOf: expected a list of schemas'],
    [{ proprties: {} }, '#/proprties: this keyword would check nothing'],
    [{ properties: { d: { format: 'date' } } }, '#/properties/d/format: this keyword would check nothing'],
    [{ unevaluatedProperties: false }, '#/unevaluatedProperties: this keyword'],
    [{ constructor: 1 }, '#/constructor: this keyword'],
    [{ $ref: '#/$defs/absent' }, '#/$ref: there is nothing at #/$defs/absent'],
    [{ $ref: 'https://example.org/s.json' }, '#/$ref: expected a reference into this schema'],
    [{ $ref: '#/%' }, '#/$ref: % is not percent-encoded'],
    [{ $ref: '#' }, '#: it refers to itself without end'],
    [{ properties: { a: { $ref: '#/properties/a' } } }, '#/properties/a: it refers to itself'],
    // biome-ignore lint/suspicious/noThenProperty: the keyword
    [{ then: { type: 'x' }, if: true }, '#/then/type: expected of null'],
    // biome-ignore lint/suspicious/noThenProperty: the keyword
    [{ then: true }, '#/then: expected an if beside it'],
    [{ items: { else: true } }, '#/items/else: expected an if beside it'],
    [{ minContains: 1 }, '#/minContains: expected a contains beside it'],
    [{ maxContains: 1 }, '#/maxContains: expected a contains beside it'],
  ])('%j is refused with the place', (schema, message) => {
    expect(() => compileSchema(schema)).toThrow(expect.objectContaining({ code: 'REWARD_SETTINGS' }));
    expect(() => compileSchema(schema)).toThrow(message);
  });
});

describe('the reward', () => {
  const schema = { type: 'object', required: ['answer'] };

  it('is 1 for JSON that the schema allows and 0 for all else', async () => {
    expect(await score(schema, ' {"answer": 1}\n')).toBe(1);
    for (const text of ['{}', '{"answer": 1', 'answer', '', '{"answer": 1} done', '```json\n{"answer": 1}\n```']) {
      expect(await score(schema, text), text).toBe(0);
    }
  });

  it('reads the last fenced block where that is asked for', async () => {
    expect(await score(schema, 'a\n```json\n{}\n```\nb\n```\n{"answer": 1}\n```\nc', 'fenced')).toBe(1);
    expect(await score(schema, '```json\n{"answer": 1}\n```\nb\n```\n{}\n```', 'fenced')).toBe(0);
    expect(await score(schema, '```json\n{"answer": 1}\n``` and ```json\n{', 'fenced')).toBe(1);
    expect(await score(schema, '{"answer": 1}', 'fenced')).toBe(0);
  });

  it('is 0 for nesting deeper than the stack', async () => {
    const nested = { $defs: { list: { type: 'array', items: { $ref: '#/$defs/list' } } }, $ref: '#/$defs/list' };
    expect(await score(nested, '[[[]]]')).toBe(1);
    expect(await score(nested, '['.repeat(1e5) + ']'.repeat(1e5))).toBe(0);
  });
});
