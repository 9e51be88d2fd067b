/**
 * The value of a LaTeX expression without letters: numbers, + − · / ^, parentheses, \frac, \sqrt[n], \pi, a product without a sign
 * (2\sqrt{3}) and a mixed number (1\frac{1}{2}). A recursive-descent evaluation; anything else has no value.
 */

/** Deeper nesting has no value: a response is no reason to overflow the stack. */
const deepest = 50;

const tokenPattern = /\d+(?:\.\d+)?|\.\d+|\\[a-z]+|[-+*/^(){}[\]]/y;

/** Undefined for what is no number. The text has no spaces and one spelling of each command (`normalise`). */
export function mathValue(text: string): number | undefined {
  const tokens = tokensOf(text);
  if (tokens === undefined || tokens.length === 0) return undefined;
  try {
    const parser = new Parser(tokens);
    const value = parser.sum();
    return parser.done && Number.isFinite(value) ? value : undefined;
  } catch (error) {
    if (error instanceof NoValue) return undefined;
    throw error;
  }
}

class NoValue extends Error {}

function tokensOf(text: string): string[] | undefined {
  const tokens: string[] = [];
  tokenPattern.lastIndex = 0;
  while (tokenPattern.lastIndex < text.length) {
    const match = tokenPattern.exec(text);
    if (!match) return undefined;
    tokens.push(match[0]);
  }
  return tokens;
}

const isNumber = (token: string | undefined): boolean => token !== undefined && /^[\d.]/.test(token);

class Parser {
  private at = 0;
  private depth = 0;

  constructor(private readonly tokens: readonly string[]) {}

  get done(): boolean {
    return this.at === this.tokens.length;
  }

  /** [sign] product {sign product} */
  sum(): number {
    if (++this.depth > deepest) throw new NoValue();
    const sign = this.take('-') ? -1 : 1;
    if (sign > 0) this.take('+');
    let total = sign * this.product();
    for (;;) {
      if (this.take('+')) total += this.product();
      else if (this.take('-')) total -= this.product();
      else break;
    }
    this.depth--;
    return total;
  }

  /** power {[sign] power} */
  private product(): number {
    let total = this.power();
    for (;;) {
      if (this.take('*')) total *= this.power();
      else if (this.take('/')) total /= this.power();
      else if (this.isFactor()) total *= this.power();
      else return total;
    }
  }

  /** Begins a factor behind another one: a number there would be a second number, not a product. */
  private isFactor(): boolean {
    const token = this.tokens[this.at];
    return token === '(' || token === '\\frac' || token === '\\sqrt' || token === '\\pi';
  }

  private power(): number {
    const base = this.atom();
    if (!this.take('^')) return base;
    const negative = this.take('-');
    const exponent = this.argument();
    return base ** (negative ? -exponent : exponent);
  }

  private atom(): number {
    const token = this.next();
    if (isNumber(token)) return this.mixed(Number(token));
    switch (token) {
      case '(':
        return this.closed(')');
      case '{':
        return this.closed('}');
      case '\\frac':
        return this.argument() / this.argument();
      case '\\sqrt': {
        const degree = this.take('[') ? this.closed(']') : 2;
        const radicand = this.argument();
        return degree === 2 ? Math.sqrt(radicand) : radicand ** (1 / degree);
      }
      case '\\pi':
        return Math.PI;
      default:
        throw new NoValue();
    }
  }

  /** A whole number before a fraction of whole numbers counts with it. */
  private mixed(whole: number): number {
    const isFraction = Number.isInteger(whole) && this.tokens[this.at] === '\\frac';
    if (!isFraction || !/^\\frac\{\d+\}\{\d+\}/.test(this.tokens.slice(this.at, this.at + 7).join(''))) return whole;
    return whole + this.atom();
  }

  /** What a command applies to: a group, or one digit or command. */
  private argument(): number {
    if (this.take('{')) return this.closed('}');
    const token = this.next();
    if (isNumber(token)) return Number(token);
    if (token === '\\pi') return Math.PI;
    throw new NoValue();
  }

  private closed(bracket: string): number {
    const value = this.sum();
    if (!this.take(bracket)) throw new NoValue();
    return value;
  }

  private next(): string | undefined {
    return this.tokens[this.at++];
  }

  private take(token: string): boolean {
    if (this.tokens[this.at] !== token) return false;
    this.at++;
    return true;
  }
}
