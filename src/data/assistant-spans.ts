/**
 * Where in a rendered chat the assistant speaks. Templates mark nothing, so the spans come from rendering again: the messages
 * before a turn with the generation prompt, the messages up to and with it, and the chat with the turn's content exchanged for
 * a mark. Each is used as far as it agrees with the text; templates that rewrite earlier turns still have the mark.
 */
import { LockstepError } from '../errors.js';
import type { ChatTemplate, Message, RenderOptions } from './chat-template.js';

/** Characters [start, end) of a rendered chat. */
export interface TextSpan {
  start: number;
  end: number;
}

/** Private-use characters: not in any chat, not white space, so no template trims or rewrites them. */
const mark = '\u{f10c5}\u{f57e9}';

/**
 * The span of every assistant message in `text` (from message `options.from` on), from the end of the generation prompt to the end-of-turn token inclusive.
 * @param text `messages` as the template renders them with `options`
 * @param specials contents of the special tokens, one of which ends a turn; a turn without one ends with the template's text for it
 * Errors: `CHAT_TEMPLATE_ERROR` when a turn cannot be found.
 */
export function assistantSpans(
  template: ChatTemplate,
  messages: readonly Message[],
  text: string,
  options: RenderOptions & { from?: number },
  specials: readonly string[],
): TextSpan[] {
  const spans: TextSpan[] = [];
  messages.forEach((message, index) => {
    if (message.role !== 'assistant' || index < (options.from ?? 0)) return;
    const content = contentSpan(template, messages, index, text, options);
    const opening = agreeing(template, messages.slice(0, index), { addGenerationPrompt: true }, text);
    const closing = agreeing(template, messages.slice(0, index + 1), {}, text);
    const start = opening ?? content?.start;
    const afterContent = content?.end ?? start;
    if (start === undefined || afterContent === undefined) throw lost(index);
    const end = turnEnd(text, afterContent, closing, specials);
    if (end > start) spans.push({ start, end });
  });
  return spans;
}

/** Length of a partial rendering when the whole text begins with it. */
function agreeing(
  template: ChatTemplate,
  messages: readonly Message[],
  options: RenderOptions,
  text: string,
): number | undefined {
  const part = renderedOrUndefined(template, messages, options);
  return part !== undefined && text.startsWith(part) ? part.length : undefined;
}

/** Where the content of message `index` stands in `text`, found by what surrounds a mark in its place. */
function contentSpan(
  template: ChatTemplate,
  messages: readonly Message[],
  index: number,
  text: string,
  options: RenderOptions,
): TextSpan | undefined {
  if (typeof messages[index]!.content !== 'string') return undefined;
  const marked = messages.map((message, i) => (i === index ? { ...message, content: mark } : message));
  const rendered = renderedOrUndefined(template, marked, options);
  const at = rendered?.indexOf(mark) ?? -1;
  if (rendered === undefined || at < 0) return undefined;
  const after = rendered.slice(at + mark.length);
  const end = text.length - after.length;
  return end >= at && text.startsWith(rendered.slice(0, at)) && text.endsWith(after) ? { start: at, end } : undefined;
}

/** The end of the last special token of the turn's closing words; of the first one where the turn's extent is unknown. */
function turnEnd(text: string, from: number, closing: number | undefined, specials: readonly string[]): number {
  const tail = text.slice(from, closing !== undefined && closing >= from ? closing : text.length);
  let end: number | undefined;
  for (const special of specials) {
    const at = closing === undefined ? tail.indexOf(special) : tail.lastIndexOf(special);
    if (at < 0) continue;
    const after = at + special.length;
    if (end === undefined || (closing === undefined ? after < end : after > end)) end = after;
  }
  return from + (end ?? (closing === undefined ? 0 : tail.length));
}

function renderedOrUndefined(
  template: ChatTemplate,
  messages: readonly Message[],
  options: RenderOptions,
): string | undefined {
  try {
    return template.render(messages, options);
  } catch (error) {
    // A template may refuse a part of a chat that it accepts as a whole.
    if (LockstepError.isInstance(error)) return undefined;
    throw error;
  }
}

function lost(index: number): LockstepError {
  return new LockstepError(
    'CHAT_TEMPLATE_ERROR',
    `The chat template renders assistant message ${index} so that its words cannot be told from the prompt's; give the row as ` +
      'tokens with a mask, or as prompt and response.',
    { index },
  );
}
