/**
 * Chat templates: Jinja with trim_blocks and lstrip_blocks, as Hugging Face templates expect.
 */
import { Template } from '@huggingface/jinja';
import { LockstepError } from '../errors.js';

/** One turn of a chat. Further fields (tool calls, names) reach the template unchanged. */
export interface Message {
  readonly role: string;
  readonly content?: unknown;
  readonly [field: string]: unknown;
}

export interface RenderOptions {
  /** Ends the text with the words that open the assistant's turn. Default false. */
  addGenerationPrompt?: boolean;
}

export class ChatTemplate {
  private readonly template: Template;

  /**
   * @param source the Jinja text
   * @param names contents of the named special tokens, which the template sees as `bos_token` and so on
   * @param where the directory, for messages
   * Errors: `CHAT_TEMPLATE_ERROR` when the text is not a template.
   */
  constructor(
    source: string,
    private readonly names: Readonly<Record<string, string>>,
    private readonly where: string,
  ) {
    try {
      this.template = new Template(source);
    } catch (cause) {
      throw this.failed('cannot be parsed', cause);
    }
  }

  /** Errors: `CHAT_TEMPLATE_ERROR` with the template's own words when it raises. */
  render(messages: readonly Message[], { addGenerationPrompt = false }: RenderOptions = {}): string {
    try {
      return this.template.render({ ...this.names, messages, add_generation_prompt: addGenerationPrompt });
    } catch (cause) {
      throw this.failed('refuses the messages', cause);
    }
  }

  private failed(what: string, cause: unknown): LockstepError {
    const reason = cause instanceof Error ? cause.message : String(cause);
    return new LockstepError(
      'CHAT_TEMPLATE_ERROR',
      `The chat template of ${this.where} ${what}: ${reason}`,
      { directory: this.where, reason },
      { cause },
    );
  }
}
