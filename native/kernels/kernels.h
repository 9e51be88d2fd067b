// Every operation of the engine, once: shapes, formula, order of summation, rounding points. The page to read first.
//
// Letters: T packed tokens (rows), B sequences, D model width, F feed-forward width, H query heads, G key/value heads,
// K head width, V vocabulary, P parts. Matrices are row-major; a `Weight` is prepacked (weight.h).
//
// The law: an output row depends on its own inputs only, never on T, on its neighbours, on tiles, threads or
// instruction sets; every sum is the chain or the tree written beside it. `reference/` (plain loops) and `cpu/` give
// equal bits; so does `cuda/`, but for the products of bfloat16 on tensor cores, which round in a way of their own.
//
// Terms used below
//   chain over i     acc = fma(a_i, b_i, acc), i ascending, from zero (or from what is accumulated into). Of bfloat16
//                    operands i goes pair by pair (2j, 2j+1), odd element first, then even (the order of VDPBF16PS);
//                    an odd count is padded by one zero. Denormals are flushed (FTZ, DAZ).
//   lanes sum        16 partial sums, lane l adds elements l, l+16, l+32, ... in order; then the tree
//                    ((l, l+8), (l, l+4), (l, l+2), (l, l+1)).
//   tree over parts  balanced binary tree in float32: neighbours (0,1), (2,3), ..., then their sums, ...
//   operand          a matrix in the compute dtype, rounded once, where it is produced (core/view.h).
//   where it lies    Tensors (views, operands, weights, gradients, vectors, tables, pages, staging) are in the memory
//   of
//                    the device. What counts or answers per row is in the host's: tokens, positions, targets, the
//                    arrays of Sequences, LogSoftmax, SoftmaxStatistics, dLogprobs, dEntropies, Sampling and what is
//                    sampled. On a CPU both are one.
//   exp, log, ...    math.h of this folder: explicit-FMA polynomials, the same expression on every instruction set.
#pragma once

#include <cstdint>

#include "core/queue.h"
#include "core/view.h"
#include "kernels/weight.h"

namespace lockstep::kernels {

// Where a product goes. kStore: y = value; kRound: y = rounded value (operand dtype); kAdd: y = residual + value, where
// residual is another float32 matrix of the same shape, or y itself.
struct Output {
  enum class Kind : uint8_t { kStore, kRound, kAdd } kind = Kind::kStore;
  View<float> f32;             // kStore, kAdd
  Operand operand;             // kRound
  View<const float> residual;  // kAdd

  static Output store(View<float> y) { return {Kind::kStore, y, {}, {}}; }
  static Output round(Operand y) { return {Kind::kRound, {}, y, {}}; }
  static Output add(View<const float> residual, View<float> y) { return {Kind::kAdd, y, {}, residual}; }
};

enum class Activation : uint8_t { kSwiGlu, kGeluTanh };

// Packed sequences of one call. Rows of sequence b are rowBegin[b] .. rowBegin[b] + length[b] - 1 and stand at absolute
// positions offset[b] .. offset[b] + length[b] - 1; sequences ascend by row. In training every sequence starts at an
// multiple of Kernels::rowGrain and offset is 0; the padding rows between sequences belong to none and are zero in
// every operand (operations that are given the sequences write those zeros).
struct Sequences {
  int64_t count = 0;
  const int32_t* rowBegin = nullptr;  // [B]
  const int32_t* length = nullptr;    // [B], >= 1
  const int32_t* offset = nullptr;    // [B]
  const int32_t* pages = nullptr;     // [B, pageStride]: page holding positions 64 i .. 64 i + 63 of a sequence
  int64_t pageStride = 0;
};

// Keys and values in pages of 64 positions, in the compute dtype. A page holds, for each key/value head g, a key panel
// (K x 64: element (position s, dimension i) as a weight panel of width 64 with n = s, k = i) and then, after all key
// panels, for each g a value panel (64 x K: n = dimension, k = position; width roundUp(K, 16)). KPadded = roundUp(K,
// 2).
constexpr int64_t kPagePositions = 64;
struct KvPages {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t keyValueHeads = 0, headWidth = 0;

  constexpr int64_t keyPanelElements() const { return roundUp(headWidth, 2) * kPagePositions; }
  constexpr int64_t valuePanelElements() const { return kPagePositions * roundUp(headWidth, kPanelGrain); }
  constexpr int64_t pageElements() const { return keyValueHeads * (keyPanelElements() + valuePanelElements()); }
  constexpr int64_t keyPanel(int64_t page, int64_t g) const { return page * pageElements() + g * keyPanelElements(); }
  constexpr int64_t valuePanel(int64_t page, int64_t g) const {
    return page * pageElements() + keyValueHeads * keyPanelElements() + g * valuePanelElements();
  }
};

struct AttentionShape {
  int64_t heads, keyValueHeads, headWidth;  // H, G, K; query head h uses key/value head h / (H / G)
  int64_t window;                           // a query at position t sees keys max(0, t - window + 1) .. t; 0: no window
  int64_t parts;                            // P
  float scale;                              // of the scores, 1 / sqrt(K)
};

// A row of the qkv projection is laid out part by part: part p holds its query heads (H / P of them), then its key
// heads, then its value heads. With G >= P it has G / P key/value heads, else one when p is a multiple of P / G, else
// none.
struct QkvLayout {
  AttentionShape attention;
  constexpr int64_t columns() const { return (attention.heads + 2 * attention.keyValueHeads) * attention.headWidth; }
  constexpr int64_t queryColumn(int64_t h) const {
    const int part = static_cast<int>(h) / headsPerPart(), owners = (part + everyPart() - 1) / everyPart();
    return (h + 2 * owners * ownedHeads()) * attention.headWidth;
  }
  constexpr int64_t keyColumn(int64_t g) const {
    const int owner = static_cast<int>(g) / ownedHeads(), part = owner * everyPart();
    return ((part + 1) * headsPerPart() + owner * ownedHeads() + g) * attention.headWidth;
  }
  constexpr int64_t valueColumn(int64_t g) const { return keyColumn(g) + ownedHeads() * attention.headWidth; }

 private:  // Numbers of heads and parts, in 32 bits: a GPU divides by 64 slowly.
  constexpr int parts() const { return static_cast<int>(attention.parts); }
  constexpr int keyValueHeads() const { return static_cast<int>(attention.keyValueHeads); }
  constexpr int headsPerPart() const { return static_cast<int>(attention.heads) / parts(); }
  // A part that has key/value heads has so many of them; every so many parts there is one.
  constexpr int ownedHeads() const { return keyValueHeads() >= parts() ? keyValueHeads() / parts() : 1; }
  constexpr int everyPart() const { return keyValueHeads() >= parts() ? 1 : parts() / keyValueHeads(); }
};

// Per-head RMSNorm of q and k before rotation (Qwen3); gains [K], empty when the model has none.
struct HeadNorm {
  const float* queryGain = nullptr;
  const float* keyGain = nullptr;
  float eps = 0;
};

// Rotary embedding of q and k: tables [positions, K / 2]; element i of a head is paired with i + K / 2. Empty: none.
struct Rope {
  const float* cosine = nullptr;
  const float* sine = nullptr;
};

// What softmax over the vocabulary leaves behind per row: x = logit * inverseTemperature, logZ = max + log(sum exp(x -
// max)).
struct LogSoftmax {
  float* logprobs;   // [T] x_target - logZ; 0 where target < 0
  float* entropies;  // [T] logZ - sum(p x), computed as log s - u / s with u = sum exp(x - m)(x - m)
  float* logZ;       // [T]
};

// The same before it is finished: of one row, over some parts of the vocabulary. x_target is -infinity where the target
// is not among their columns.
struct SoftmaxStatistics {
  float m, s, u, target;
};

// Memory for one block of rows of logits and, in backward, of their gradients as an operand.
struct Staging {
  void* data;
  int64_t bytes;
};
inline int64_t vocabularyStagingBytes(int64_t rows, int64_t vocabulary, DType dtype, bool backward) {
  const int64_t stride = roundUp(vocabulary, kPanelGrain);
  return rows * stride * (4 + (backward && dtype == DType::kBFloat16 ? 2 : 0));
}

struct AdamW {  // each constant of the formula is computed in float64 and rounded to float32 once
  double learningRate, beta1, beta2, epsilon, weightDecay;  // weightDecay 0 for vectors
  double correction1, correction2;                          // 1 - beta1^n, 1 - beta2^n of step n
  double gradientScale;                                     // clip factor min(1, clipNorm / (norm + 1e-6))
};

struct Run {
  const float* data;
  int64_t count;
};

struct Sampling {
  float temperature;  // 0: argmax, ties to the lowest id
  float topP;         // 1 or more: off; 0 or less keeps one token
  int32_t topK;       // 0: off
  uint64_t seed;      // Philox key
  uint64_t request;   // with `position`: Philox counter
  uint32_t position;  // absolute position of the sampled token
};

// One implementation of everything. Filled once at load; every pointer is set.
struct Kernels {
  const char* name;  // "reference", "avx2", "avx512", "avx512-bf16", "cuda"
  // In training sequences start at multiples of it, so that no step of a chain over rows has rows of two: 2, of tensor
  // cores 16.
  int64_t rowGrain;

  // --- weights ---

  // Publishes float32 masters (float32 order) as compute weights (bfloat16 order), rounded once. Padding stays zero.
  void (*publish)(Queue&, const WeightLayout&, const float* master, void* weights);
  // dst = src, rounded to the operand dtype.
  void (*round)(Queue&, View<const float> src, Operand dst);

  // --- matrix products ---

  // y = x W^T + bias.
  // x [T, in], y [T, out], bias [out] float32 or null. Each element: a chain over in from zero within a part; a weight
  // split along in sums its parts by the tree over parts; then bias is added, then the Output rule.
  void (*linear)(Queue&, Operand x, const Weight&, const float* bias, Output y);
  // Finishes a product whose parts ranks have summed: y = residual + (sum + bias), as `linear` with Output::add; bias
  // may be null, y may be sum or residual.
  void (*finishSum)(Queue&, View<const float> sum, const float* bias, View<const float> residual, View<float> y);
  // y = activation(x W^T + bias). kSwiGlu: part p of W holds F/P gate rows, then F/P up rows; y = silu(gate) * up [T,
  // F], silu(g) = g / (1 + exp(-g)). kGeluTanh: W [F, D], y = gelu_tanh. The pre-activations are float32, unrounded;
  // `saved` ([T, out], empty in inference) receives them rounded to the operand dtype, in W's row order.
  void (*activatedLinear)(Queue&, Operand x, const Weight&, const float* bias, Activation, Operand y, Operand saved);
  // dx = dy W. dy [T, out], dx [T, in]. Each element: within a part a chain over its rows of W; a weight split along
  // out sums its parts by the tree over parts.
  void (*linearBackwardInput)(Queue&, Operand dy, const Weight&, Output dx);
  // dW += dy^T x, dBias += sum of dy. Chains over rows t ascending from what is accumulated (dBias by additions, row
  // after row in either dtype); T is even, padding rows are zero. dBias may be null.
  void (*linearBackwardWeight)(Queue&, Operand dy, Operand x, WeightGradient dW, float* dBias);
  // dSaved (rounded) from dActivated [T, F] float32 and the saved pre-activations.
  void (*activationBackward)(Queue&, Activation, const WeightLayout& up, Operand saved, View<const float> dActivated,
                             Operand dSaved);

  // --- embeddings ---

  // x[t] = E[token[t]] (+ positionTable[position[t]]), widened to float32; zero where token < 0 (padding). E [V, D]
  // packed; positionTable [positions, D] float32 row-major or null.
  void (*embed)(Queue&, const int32_t* tokens, const int32_t* positions, const Weight& e, const float* positionTable,
                View<float> x);
  // dE[token[t]] += dx[t], dPositionTable[position[t]] += dx[t], t ascending, each where the index is not negative.
  void (*embedBackward)(Queue&, const int32_t* tokens, const int32_t* positions, View<const float> dx,
                        WeightGradient dE, float* dPositionTable);

  // --- norms ---

  // y = round(x * inverseRms * gain), inverseRms = 1 / sqrt(lanes sum of x^2 / D + eps). x [T, D]. inverseRms [T] may
  // be null.
  void (*rmsNorm)(Queue&, View<const float> x, const float* gain, float eps, Operand y, float* inverseRms);
  // dx += r (dy gain - x c), c = (lanes sum of (dy gain) x) r^2 / D; dGain += dy (x r) over t ascending, one chain per
  // element.
  void (*rmsNormBackward)(Queue&, View<const float> x, const float* gain, const float* inverseRms, View<const float> dy,
                          View<float> dx, float* dGain);
  // y = round((x - mean) * inverseStd * gain + bias), population variance, both by lanes sums (mean first). mean and
  // inverseStd [T] may be null.
  void (*layerNorm)(Queue&, View<const float> x, const float* gain, const float* bias, float eps, Operand y,
                    float* mean, float* inverseStd);
  // With n = (x - mean) inverseStd and g = dy gain: dx += inverseStd (g - lanes sum of g / D - n (lanes sum of g n /
  // D)); dGain += dy n, dBias += dy over t ascending, one chain per element.
  void (*layerNormBackward)(Queue&, View<const float> x, const float* gain, const float* mean, const float* inverseStd,
                            View<const float> dy, View<float> dx, float* dGain, float* dBias);

  // --- attention ---

  // From qkv [T, columns] float32 (QkvLayout): head norm x r gain (as rmsNorm, over K), rotation by absolute position,
  // rounding; queries go to q [T, H K] in head order, keys and values into the pages of their sequence, zeros into the
  // padding of their slots. With (x, y) = elements i and i + K / 2: x' = fma(x, cos, -(y sin)), y' = fma(y, cos, x
  // sin). savedQk (empty unless training with a head norm) keeps q and k before the norm, rounded: [T, (H + G) K],
  // query heads then key heads.
  void (*qkvPrepare)(Queue&, const QkvLayout&, View<const float> qkv, const Sequences&, const HeadNorm&, const Rope&,
                     Operand q, const KvPages&, Operand savedQk);
  // out [T, H K] = softmax(scale q k^T) v, rounded. Keys are visited in pages of 64 at absolute positions, in order:
  //   s_j = scale * chain over K; m' = max(m, max_j s_j); a = exp(m - m'); e_j = exp(s_j - m');
  //   l = fma(l, a, lanes sum of e_j) (64 slots, invisible ones 0); o = chain over j from o a of (rounded e_j) v_j.
  // out = o / l. Invisible keys are never read into the result (pages may hold NaN); of a half-visible bfloat16 pair
  // the invisible half is zero times zero, a wholly invisible one is no step of the chain. The first page: m = -inf, l
  // = 0, o = 0 and no rescaling. Of bfloat16 a GPU has room for K <= 544, and throws CUDA_HEAD_WIDTH. logSumExp [H, T]
  // (m + log l; may be null) is kept for backward.
  void (*attention)(Queue&, const AttentionShape&, Operand q, const KvPages&, const Sequences&, Operand out,
                    View<float> logSumExp);
  // Training only (offset 0). p_ij = exp(scale q_i k_j - logSumExp_i); delta_i = lanes sum of dOut_i * out_i;
  // dS_ij = (p_ij (dP_ij - delta_i)) scale with p unrounded, dP = chain over K of dOut v. p and dS are rounded as
  // operands. dq_i: chain over j in key order. dk_j, dv_j: per query head a chain over i in order, continued over the
  // query heads of a part that share the key/value head; parts that share it are joined by the balanced tree. dqkv [T,
  // columns] float32 (QkvLayout); padding rows are written as zero.
  void (*attentionBackward)(Queue&, const QkvLayout&, Operand q, const KvPages&, const Sequences&, Operand out,
                            View<const float> logSumExp, Operand dOut, View<float> dqkv);
  // Through rotation and head norm: dqkvOut = round(...). dx = fma(dx', cos, dy' sin), dy = fma(dy', cos, -(dx' sin));
  // the norm as in rmsNormBackward, with r recomputed from savedQk and dx stored as r fma(-c, x, dy gain), c = dot (r
  // r) / K. Gains' gradients: chains over t, then heads, ascending, of dy (x r). A row whose position is negative is
  // padding: zeros.
  void (*qkvPrepareBackward)(Queue&, const QkvLayout&, View<const float> dqkv, const int32_t* positions,
                             const HeadNorm&, const Rope&, Operand savedQk, Operand dqkvOut, float* dQueryGain,
                             float* dKeyGain);

  // --- vocabulary ---

  // Products work row block by row block, never T x V: `staging` (64-byte aligned, planned memory outside the Queue's
  // scratch, which the products inside need) holds a block of logits [rows, V] float32, in backward also its operand
  // copy; the op takes as many rows as fit (an even number, at least 2: vocabularyStagingBytes). Bits do not depend on
  // the block. A row with target < 0 predicts no token (the last of a sequence): its logprob is 0 and
  // its dLogprob must be 0, but its entropy, logZ and dEntropy count like any other's. Padding rows have target < 0 and
  // zero gradients. logits = hidden W^T, x = logit * inverseTemperature. Per part: m = max x, s = lanes sum of exp(x -
  // m), u = lanes sum of exp(x - m)(x - m), over the part's columns in order; parts are merged by the tree: (m, s, u)
  // with m = max(m1, m2), d_i = m_i - m, s = fma(s2, e^d2, s1 e^d1), u = e^d1 (u1 + d1 s1) + e^d2 (u2 + d2 s2). m
  // starts at the lowest float32 and passes over NaN, which s then shows; x - m is held at -100 from below (e^-100 =
  // 0), so a logit of -inf and an empty part add nothing. softmaxStatistics [T] holds what a rank's parts give, targets
  // being rows of its w; mergeStatistics continues the tree over `groups` (a power of two) such arrays, [groups, T],
  // and finishes: targets only tells rows without one.
  void (*softmaxStatistics)(Queue&, Operand hidden, const Weight& w, const int32_t* targets, float inverseTemperature,
                            SoftmaxStatistics* out, Staging);
  void (*mergeStatistics)(Queue&, const SoftmaxStatistics* statistics, int64_t groups, int64_t rows,
                          const int32_t* targets, LogSoftmax out);
  // dlogit_v = inverseTemperature * (dLogprob (1[v = target] - p_v) - dEntropy p_v (log p_v + H)), rounded as an
  // operand; dHidden [T, D] float32 stored as linearBackwardInput does, dW += as linearBackwardWeight does. T is even.
  // dLogprobs, dEntropies [T] or null (zeros); padding rows have zeros. targets are rows of w; a row whose target is
  // among another rank's has target < 0 and its dLogprob. dHidden is what these parts of the vocabulary give of it.
  void (*logprobsBackward)(Queue&, Operand hidden, const Weight& w, const int32_t* targets, float inverseTemperature,
                           LogSoftmax forward, const float* dLogprobs, const float* dEntropies, View<float> dHidden,
                           WeightGradient dW, Staging);
  // Samples one token per row of logits [N, V] (V = rows of `vocabulary`; its parts fix the order of prefix sums).
  // tokens [N]; logprobs [N] = x_token - logZ at the sampling temperature (1 when it is 0), the very number that
  // mergeStatistics gives. With u = Philox4x32-10(key seed, counter (request, position)) in (0, 1): the token is the
  // first v, in id order, whose running sum of kept weights exceeds u times their total. Top-k keeps the k largest
  // (ties: lowest id), top-p then the shortest prefix in decreasing probability (ties: lowest id) whose share reaches
  // topP; shares are integers, floor(2^40 weight), of the sum of all that top-k kept. A weight is e_v a_p, e_v =
  // exp(x_v - m_p), a_p = exp(m_p - m), p the part of v; dropped: e_v = 0. A part is cut into blocks of 256 columns.
  // The running sum is float64: over blocks in id order it adds a_p times the block's lanes sum of e; inside the block
  // that passes the target it adds a_p e_v, v ascending, from the sum before the block; when the rounding of the
  // block's sum leaves none that exceeds it, the token is the block's last with a weight. u = (i + 1/2) / 2^52, i the
  // upper 52 bits of the first two words; the counter's words are request (low, high), position, 0. Logits whose
  // weights have no positive total (NaN) give the argmax and a log-probability of NaN.
  void (*sample)(Queue&, View<const float> logits, const WeightLayout& vocabulary, const Sampling* settings,
                 int32_t* tokens, float* logprobs);

  // --- optimizer ---

  // dst += src; src = 0. Joins the two accumulators of a tied embedding.
  void (*accumulate)(Queue&, int64_t count, float* src, float* dst);
  // sums[i] = sum of squares of runs[i]: leaves of 4096 elements, each a lanes sum in float32; a balanced tree in
  // float64 over leaves.
  void (*sumsOfSquares)(Queue&, const Run* runs, int64_t count, double* sums);
  // g = gradient * gradientScale; m = fma(beta1, m, (1 - beta1) g); v = fma(beta2, v, (1 - beta2) (g g));
  // p = p (1 - lr wd) - (lr / correction1) m / fma(sqrt(v), 1 / sqrt(correction2), epsilon); gradient = 0. For a matrix
  // in bfloat16 `weights` is published in the same pass (layout and weights null otherwise).
  void (*adamw)(Queue&, const AdamW&, int64_t count, float* parameter, float* m, float* v, float* gradient,
                const WeightLayout* layout, void* weights);
};

const Kernels& referenceKernels();

// The CUDA implementation; its operations take a Queue of cuda::makeQueue. Throws as cuda::requireGpu(0).
const Kernels& cudaKernels();

// The CPU implementation. isa: "avx2", "avx512", "avx512-bf16" or "" for the best one that the CPU has and that passes
// its self-check. Throws Error("ISA_UNSUPPORTED") naming what is lacking.
const Kernels& cpuKernels(const char* isa);

}  // namespace lockstep::kernels
