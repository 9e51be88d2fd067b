/** Each topic of golden reinforcement-learning mathematics is checked by a test file, or is listed here as unchecked. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';
import { readTopics } from '../rl-fixtures.js';

/** Topics by the file that checks every case of them. */
const checked: Readonly<Record<string, readonly string[]>> = {
  'unit/rl.fixtures.test.ts': [
    ...['gae', 'whitening', 'kl', 'aggregation', 'entropy', 'value_loss'],
    ...['policy_ppo', 'actor_total', 'reward_model'],
  ],
  'unit/rl-policies.fixtures.test.ts': ['policy_sequence', 'policy_other'],
  'unit/rl-groups.fixtures.test.ts': ['group_advantages', 'dapo'],
  'unit/rl-correction.fixtures.test.ts': ['rollout_correction'],
  'unit/rl-preferences.fixtures.test.ts': ['preference', 'safe_rlhf', 'ptx'],
  'unit/rl-published.fixtures.test.ts': ['published'],
  'unit/layout-parallel.fixtures.test.ts': ['hybrid_engine', 'pipeline_schedules'],
  'cluster/transfer-protocols.fixtures.test.ts': ['transfer_protocols'],
};

/** Topics that no file checks, and why. */
const unchecked: Readonly<Record<string, string>> = {
  auto_mapping: 'placement search is not part of the library',
};

const root = fileURLToPath(new URL('..', import.meta.url));
const sourceOf = (file: string) => readFileSync(join(root, file), 'utf8');
/** Whether a source has the topic as a key or as a string. */
const names = (source: string, topic: string) => new RegExp(`\\b${topic}:|'${topic}'`).test(source);

describe('topics of test/fixtures/rl', () => {
  test('each is checked by one file or listed as unchecked', () => {
    const known = [...Object.values(checked).flat(), ...Object.keys(unchecked)].sort();
    expect(new Set(known).size).toBe(known.length);
    const topics = readTopics().map(({ topic }) => topic);
    expect(topics.filter((topic) => !known.includes(topic))).toEqual([]);
  });

  test.each(Object.entries(checked))('%s names its topics', (file, topics) => {
    const source = sourceOf(file);
    expect(topics.filter((topic) => !names(source, topic))).toEqual([]);
  });

  test('no fixture test names an unchecked topic', () => {
    const files = readdirSync(root, { recursive: true, encoding: 'utf8' });
    const sources = files.filter((file) => file.endsWith('.fixtures.test.ts')).map(sourceOf);
    expect(sources.length).toBeGreaterThanOrEqual(Object.keys(checked).length);
    expect(Object.keys(unchecked).filter((topic) => sources.some((source) => names(source, topic)))).toEqual([]);
  });
});
