/** The same prompts answered before and after training, side by side. */
import type { Sample } from '../train/events.js';
import { element, escapeText } from './markup.js';
import { formatNumber } from './numbers.js';
import type { RunRecord, SampleSet } from './run-record.js';

export interface SamplePair {
  prompt: string;
  before?: Sample;
  after: Sample;
}

/** At most this many pairs are shown. */
const limit = 24;

/** Pairs the first and the last evaluation's samples (else the rollouts') by prompt; several samples of a prompt by order. */
export function pairSamples(run: RunRecord): { pairs: SamplePair[]; before: number; after: number } | undefined {
  const sets = [run.evaluations, run.rollouts].find((each) => each.some(({ samples }) => samples.length > 0));
  if (!sets) return undefined;
  const [first, last] = [sets[0]!, sets.at(-1)!];
  const earlier = first === last ? new Map<string, Sample[]>() : byPrompt(first);
  const pairs = last.samples.slice(0, limit).map((after): SamplePair => {
    const prompt = promptText(after);
    const before = earlier.get(prompt)?.shift();
    return before ? { prompt, before, after } : { prompt, after };
  });
  return { pairs, before: first.step, after: last.step };
}

function byPrompt({ samples }: SampleSet): Map<string, Sample[]> {
  const groups = new Map<string, Sample[]>();
  for (const sample of samples) {
    const prompt = promptText(sample);
    groups.set(prompt, [...(groups.get(prompt) ?? []), sample]);
  }
  return groups;
}

function promptText({ prompt, promptTokens }: Sample): string {
  return prompt ?? (promptTokens ? `tokens ${promptTokens.join(' ')}` : '');
}

function responseText({ response, responseTokens }: Sample): string {
  return response ?? (responseTokens ? `tokens ${responseTokens.join(' ')}` : '');
}

/** The section of the page; empty when the run kept no samples. */
export function samplesSection(run: RunRecord): string {
  const found = pairSamples(run);
  if (!found) return '';
  const { pairs, before, after } = found;
  const compared = pairs.some((pair) => pair.before);
  const lead = compared
    ? `The same prompts, answered at step ${before} and at step ${after}.`
    : `Sampled at step ${after}.`;
  return element(
    'section',
    { id: 'samples' },
    element('h2', {}, compared ? 'Samples, before and after' : 'Samples'),
    element('p', { class: 'lead' }, escapeText(lead)),
    ...pairs.map((pair) => samplePair(pair, before, after)),
  );
}

function samplePair({ prompt, before, after }: SamplePair, beforeStep: number, afterStep: number): string {
  return element(
    'article',
    { class: before ? 'sample compared' : 'sample' },
    element('div', { class: 'prompt' }, element('h4', {}, 'Prompt'), text(prompt)),
    before ? answer(before, `Step ${beforeStep}`) : '',
    answer(after, `Step ${afterStep}`, before?.reward),
  );
}

function answer(sample: Sample, heading: string, baseline?: number): string {
  const better =
    baseline === undefined || sample.reward === undefined ? '' : sample.reward > baseline ? ' up' : ' down';
  const badge =
    sample.reward === undefined
      ? ''
      : element(
          'span',
          { class: `badge${sample.reward === baseline ? '' : better}` },
          `reward ${formatNumber(sample.reward, 3)}`,
        );
  const cut = sample.finish === 'length' ? element('span', { class: 'badge cut' }, 'cut at the length limit') : '';
  return element(
    'div',
    { class: 'answer' },
    element('h4', {}, escapeText(heading), badge, cut),
    text(responseText(sample)),
  );
}

function text(content: string): string {
  return content === ''
    ? element('pre', { class: 'empty' }, '(empty)')
    : element('pre', {}, escapeText(content.length > 4000 ? `${content.slice(0, 4000)}…` : content));
}
