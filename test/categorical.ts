/**
 * One token's distribution from its logits, in double precision: the oracle of what native code computes per token, and the
 * exact KL between two distributions.
 */
import type { Numbers } from '../src/losses/selection.js';

export interface Categorical {
  /** log p over the vocabulary, of softmax(logits / temperature). */
  readonly logprobs: Float64Array;
  /** H = −Σ p log p, in nats. */
  readonly entropy: number;
  /** Σ p². */
  readonly sumOfSquares: number;
}

/** log p = z − logsumexp(z) with z = logits / temperature. */
export function categorical(logits: Numbers, temperature = 1): Categorical {
  const z = Float64Array.from(logits, (logit) => logit / temperature);
  const largest = z.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (const x of z) sum += Math.exp(x - largest);
  const normaliser = largest + Math.log(sum);
  const logprobs = z.map((x) => x - normaliser);
  let entropy = 0;
  let sumOfSquares = 0;
  for (const logprob of logprobs) {
    const p = Math.exp(logprob);
    if (p > 0) entropy -= p * logprob;
    sumOfSquares += p * p;
  }
  return { logprobs, entropy, sumOfSquares };
}

/** What a loss says about one token: its derivative with respect to the label's log-prob and to the entropy. */
export interface CategoricalGradient {
  readonly label?: number | undefined;
  readonly logprob?: number | undefined;
  readonly entropy?: number | undefined;
  readonly temperature?: number | undefined;
}

/** d/dlogit_v = ( g_logprob (1[v = label] − p_v) − g_entropy p_v (log p_v + H) ) / temperature. */
export function categoricalGradient(distribution: Categorical, gradient: CategoricalGradient): Float64Array {
  const { label, logprob = 0, entropy = 0, temperature = 1 } = gradient;
  return distribution.logprobs.map((logp, v) => {
    const p = Math.exp(logp);
    const ofEntropy = p > 0 ? p * (logp + distribution.entropy) : 0;
    return (logprob * ((v === label ? 1 : 0) - p) - entropy * ofEntropy) / temperature;
  });
}

/** KL(p‖q) = Σ p (log p − log q), in nats, and its derivative p_v (log p_v − log q_v − KL) with respect to p's logits. */
export function categoricalKl(p: Categorical, q: Categorical): { kl: number; gradient: Float64Array } {
  let kl = 0;
  p.logprobs.forEach((logp, v) => {
    const probability = Math.exp(logp);
    if (probability > 0) kl += probability * (logp - q.logprobs[v]!);
  });
  const gradient = p.logprobs.map((logp, v) => {
    const probability = Math.exp(logp);
    return probability > 0 ? probability * (logp - q.logprobs[v]! - kl) : 0;
  });
  return { kl, gradient };
}
