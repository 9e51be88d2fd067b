/**
 * Lockstep: reinforcement learning from human or programmatic feedback, from Node.js. Importing it starts nothing; the native
 * addon is loaded when a model is opened. What programs of one's own are made of: `lockstep-rlhf/algorithms`, `/losses`,
 * `/workers` and `/cluster`.
 */
export { type Checkpoint, openCheckpoint } from './checkpoints/hugging-face.js';
// What those are made of.
export type { StoredTensor } from './checkpoints/safetensors.js';
export type { TokenBatch } from './data/batch.js';
export type { ChatTemplate, Message, RenderOptions } from './data/chat-template.js';
export type { Columns } from './data/jsonl.js';
export type { RowPlace } from './data/rows.js';
export type {
  DecodeOptions,
  EncodeOptions,
  MaskedTokens,
  MaskOptions,
  Tokenizer,
  TokenStream,
} from './data/tokenizer.js';
export type { MemoryLimit, Work } from './engine/device.js';
export type * from './engine/engine.js';
export type { StreamWork, WorkTimes } from './engine/native.js';
export { type ErrorCode, type ErrorDetails, LockstepError } from './errors.js';
export {
  type Backend,
  type BackendDevice,
  type DeviceSettings,
  type EngineSettings,
  type GenerationSettings,
  type LayoutSettings,
  nativeBackend,
} from './inference/backend.js';
export {
  type Completion,
  type GenerateSettings,
  generate,
  type InputRow,
  type PlacedRow,
} from './inference/generate.js';
export { type OpenModel, type OpenModelOptions, openModel } from './inference/open-model.js';
export { type Scored, type ScoreSettings, score } from './inference/score.js';
export type { TransitionEngine } from './layout/hybrid-engine.js';
export type { Head, ModelShape, RopeScaling } from './layout/model-shape.js';
export type { ScheduleName } from './layout/pipeline-schedule.js';
export type { BoxedSettings } from './rewards/built-in/boxed.js';
export type { AnswerCheck, CosineSettings, Ends } from './rewards/built-in/cosine.js';
export type { ExactSettings } from './rewards/built-in/exact.js';
export type { HttpSettings } from './rewards/built-in/http.js';
export type { JsonSchemaSettings } from './rewards/built-in/json-schema.js';
export type { LengthSettings } from './rewards/built-in/length.js';
export type { NumericSettings } from './rewards/built-in/numeric.js';
export type { RegexSettings } from './rewards/built-in/regex.js';
export { rewardFunctions } from './rewards/built-in/registry.js';
export type { RepetitionSettings } from './rewards/built-in/repetition.js';
export type { Reward, RewardFunction, RewardSample, RewardStep } from './rewards/reward-function.js';
export {
  type Config,
  type ConfigInput,
  type ConfigOf,
  configJsonSchema,
  defineConfig,
  loadConfig,
  parseConfig,
} from './train/config.js';
export type * from './train/events.js';
export type { RewardTerm } from './train/reward-schema.js';
export type { AlgorithmName } from './train/schema.js';
export { type TrainOptions, train } from './train/train.js';
