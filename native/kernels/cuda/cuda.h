// The operations on a GPU, declared as kernels.h documents them, and what they share. A .cu file is compiled by nvcc
// with the headers of cuda/hardware, and by the host's compiler with those of cuda/emulation, for tests: it includes
// this file, or "device.h", first, and has no #ifdef.
#pragma once

#include "device.h"

#include "cuda/queue.h"
#include "kernels/kernels.h"
#include "kernels/math.h"

namespace lockstep::kernels::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;

constexpr unsigned blocksFor(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

inline lockstep::cuda::Queue& onGpu(Queue& queue) {
  return static_cast<lockstep::cuda::Queue&>(queue);
}

// --- in kernels ------------------------------------------------------------------------------------------------------

__device__ inline float load(const Operand& x, int64_t row, int64_t col) {
  return x.dtype == DType::kFloat32 ? x.row<float>(row)[col] : toFloat(x.row<BFloat16>(row)[col]);
}

__device__ inline void store(const Operand& y, int64_t row, int64_t col, float value) {
  if (y.dtype == DType::kFloat32) {
    y.row<float>(row)[col] = value;
  } else {
    y.row<BFloat16>(row)[col] = toBFloat16(value);
  }
}

// The lanes sum by 16 neighbouring threads, of which this is number `lane`: next(acc, i) returns acc with element i
// added. All 16 get the sum; all threads of the warp call.
template <class Next>
__device__ inline float lanesSum16(int lane, int64_t count, const Next& next) {
  float sum = 0;
  for (int64_t i = lane; i < count; i += 16) sum = next(sum, i);
  for (int width = 8; width >= 1; width /= 2) sum = sum + __shfl_xor_sync(kAllLanes, sum, width);
  return sum;
}

// --- operations ------------------------------------------------------------------------------------------------------

void publish(Queue&, const WeightLayout&, const float* master, void* weights);
void round(Queue&, View<const float> src, Operand dst);
void linear(Queue&, Operand x, const Weight&, const float* bias, Output y);
void finishSum(Queue&, View<const float> sum, const float* bias, View<const float> residual, View<float> y);
void activatedLinear(Queue&, Operand x, const Weight&, const float* bias, Activation, Operand y, Operand saved);
void linearBackwardInput(Queue&, Operand dy, const Weight&, Output dx);
void linearBackwardWeight(Queue&, Operand dy, Operand x, WeightGradient dW, float* dBias);
void activationBackward(Queue&, Activation, const WeightLayout& up, Operand saved, View<const float> dActivated,
                        Operand dSaved);
void embed(Queue&, const int32_t* tokens, const int32_t* positions, const Weight& e, const float* positionTable,
           View<float> x);
void embedBackward(Queue&, const int32_t* tokens, const int32_t* positions, View<const float> dx, WeightGradient dE,
                   float* dPositionTable);
void rmsNorm(Queue&, View<const float> x, const float* gain, float eps, Operand y, float* inverseRms);
void rmsNormBackward(Queue&, View<const float> x, const float* gain, const float* inverseRms, View<const float> dy,
                     View<float> dx, float* dGain);
void layerNorm(Queue&, View<const float> x, const float* gain, const float* bias, float eps, Operand y, float* mean,
               float* inverseStd);
void layerNormBackward(Queue&, View<const float> x, const float* gain, const float* mean, const float* inverseStd,
                       View<const float> dy, View<float> dx, float* dGain, float* dBias);
void qkvPrepare(Queue&, const QkvLayout&, View<const float> qkv, const Sequences&, const HeadNorm&, const Rope&,
                Operand q, const KvPages&, Operand savedQk);
void attention(Queue&, const AttentionShape&, Operand q, const KvPages&, const Sequences&, Operand out,
               View<float> logSumExp);
void attentionBackward(Queue&, const QkvLayout&, Operand q, const KvPages&, const Sequences&, Operand out,
                       View<const float> logSumExp, Operand dOut, View<float> dqkv);
void qkvPrepareBackward(Queue&, const QkvLayout&, View<const float> dqkv, const int32_t* positions, const HeadNorm&,
                        const Rope&, Operand savedQk, Operand dqkvOut, float* dQueryGain, float* dKeyGain);
void softmaxStatistics(Queue&, Operand hidden, const Weight& w, const int32_t* targets, float inverseTemperature,
                       SoftmaxStatistics* out, Staging);
void mergeStatistics(Queue&, const SoftmaxStatistics* statistics, int64_t groups, int64_t rows, const int32_t* targets,
                     LogSoftmax out);
void logprobsBackward(Queue&, Operand hidden, const Weight& w, const int32_t* targets, float inverseTemperature,
                      LogSoftmax forward, const float* dLogprobs, const float* dEntropies, View<float> dHidden,
                      WeightGradient dW, Staging);
void sample(Queue&, View<const float> logits, const WeightLayout& vocabulary, const Sampling* settings, int32_t* tokens,
            float* logprobs);
void accumulate(Queue&, int64_t count, float* src, float* dst);
double sumOfSquares(Queue&, const float* gradient, int64_t count);
void adamw(Queue&, const AdamW&, int64_t count, float* parameter, float* m, float* v, float* gradient,
           const WeightLayout* layout, void* weights);

}  // namespace lockstep::kernels::cuda
