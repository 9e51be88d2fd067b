// The fast kernels of one instruction set, declared as kernels.h documents them.
#pragma once

#include "kernels/kernels.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

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

}  // namespace lockstep::kernels::LOCKSTEP_ISA
