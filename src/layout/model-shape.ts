/** The mathematics of a model, read from config.json: everything that decides a number, and nothing else. */

export type RopeScaling =
  | { type: 'default' }
  | { type: 'linear'; factor: number }
  | { type: 'llama3'; factor: number; lowFrequencyFactor: number; highFrequencyFactor: number; originalLength: number }
  | {
      type: 'yarn';
      factor: number;
      betaFast: number;
      betaSlow: number;
      originalLength: number;
      attentionFactor: number;
      truncate: boolean;
    }
  | { type: 'dynamic'; originalLength: number };

export type Head = 'language' | 'score' | 'value';

export interface ModelShape {
  family: 'llama' | 'mistral' | 'qwen2' | 'qwen3' | 'gpt2';
  /** V */ vocabulary: number;
  /** D */ width: number;
  /** L */ layers: number;
  /** H */ heads: number;
  /** G */ keyValueHeads: number;
  /** K */ headWidth: number;
  /** F */ feedForward: number;
  norm: 'rms' | 'layer';
  normEpsilon: number;
  activation: 'swiglu' | 'gelu-tanh';
  /** Biases of the q, k, v projections; of the attention output; of the MLP. */
  qkvBias: boolean;
  outputBias: boolean;
  mlpBias: boolean;
  /** RMSNorm of each q and k head before rotation (Qwen3). */
  headNorm: boolean;
  positions: { type: 'rope'; theta: number; scaling: RopeScaling } | { type: 'learned' };
  /** Most positions a sequence may have. */
  maxPositions: number;
  /** Sliding window per layer: a query sees that many latest keys, itself included; 0: all. */
  windows: readonly number[];
  head: Head;
  /** The value or score head has a bias. */
  headBias: boolean;
  /** The vocabulary projection is the embedding. */
  tied: boolean;
  /** Padding token: a sequence classifier's score is read at the rightmost other token; null: at the last token. */
  padToken: number | null;
}
