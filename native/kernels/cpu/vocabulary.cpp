// Log-probabilities and entropies of the next token, forward and backward, by blocks of rows: the matrix products run
// on all threads inside, then the rows of the block are dealt to threads.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/softmax.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

// Logits of a block of rows and their gradients as an operand, in the staging memory.
struct Blocks {
  Staging staging;
  int64_t vocabulary, stride, rows;  // stride of both matrices, in elements; rows of a full block
  DType dtype;

  Blocks(Staging memory, int64_t vocabularySize, DType operand, bool backward)
      : staging(memory), vocabulary(vocabularySize), stride(roundUp(vocabularySize, kPanelGrain)), dtype(operand) {
    rows = memory.bytes / vocabularyStagingBytes(1, vocabularySize, operand, backward) / 2 * 2;
  }
  View<float> logits(int64_t count) const { return {static_cast<float*>(staging.data), count, vocabulary, stride}; }
  // float32 gradients take the place of the logits.
  Operand gradients(int64_t count) const {
    void* data = dtype == DType::kFloat32 ? staging.data : static_cast<float*>(staging.data) + rows * stride;
    return {data, dtype, count, vocabulary, stride};
  }
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

SoftmaxStatistics statisticsOf(const float* logits, const WeightLayout& layout, int32_t target,
                               float inverseTemperature) {
  const SoftmaxPart all = mergeTree(0, static_cast<int64_t>(layout.parts.size()), [&](int64_t p) {
    const Part& part = layout.parts[p];
    return softmaxPart<true>(logits + part.outBegin, inverseTemperature, part.out, nullptr);
  });
  return {all.m, all.s, all.u, target < 0 ? -kInfinity : logits[target] * inverseTemperature};
}

struct RowGradient {
  float inverseTemperature, logZ, entropy, dLogprob, dEntropy;

  // p_v (dLogprob + dEntropy (log p_v + H)) of a logit.
  template <class V>
  V pull(V logit) const {
    const V logp = below(logit * broadcast<V>(inverseTemperature), broadcast<V>(logZ));
    return exp(logp) * fma(broadcast<V>(dEntropy), logp + broadcast<V>(entropy), broadcast<V>(dLogprob));
  }
};

template <class T>
void gradientRow(const float* logits, int64_t count, int32_t target, const RowGradient& row, T* out) {
  const Vec scale = Vec::broadcast(row.inverseTemperature), nothing = zero();
  if (row.dLogprob == 0 && row.dEntropy == 0) {
    eachVector(count, [&](int64_t i, auto lanes) { store(out + i, nothing, lanes); });
    return;
  }
  // The target's logit is read before a gradient of the same size may take its place.
  const float atTarget = target < 0 ? 0.0f : (row.dLogprob - row.pull(logits[target])) * row.inverseTemperature;
  eachVector(count, [&](int64_t i, auto lanes) {
    store(out + i, (nothing - row.pull(load(logits + i, lanes))) * scale, lanes);
  });
  if (target < 0) return;
  if constexpr (std::is_same_v<T, float>) {
    out[target] = atTarget;
  } else {
    out[target] = toBFloat16(atTarget);
  }
}

}  // namespace

void softmaxStatistics(Queue& queue, Operand hidden, const Weight& w, const int32_t* targets, float inverseTemperature,
                       SoftmaxStatistics* out, Staging staging) {
  if (w.layout->out == 0) {
    for (int64_t t = 0; t < hidden.rows; ++t) out[t] = {kLowest, 0, 0, -kInfinity};
    return;
  }
  const Blocks blocks(staging, w.layout->out, hidden.dtype, false);
  for (int64_t begin = 0; begin < hidden.rows; begin += blocks.rows) {
    const int64_t count = hidden.rows - begin < blocks.rows ? hidden.rows - begin : blocks.rows;
    const View<float> logits = blocks.logits(count);
    linear(queue, hidden.slice(begin, count), w, nullptr, Output::store(logits));
    forRanges(queue, count, blocks.vocabulary, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        out[begin + i] = statisticsOf(logits.row(i), *w.layout, targets[begin + i], inverseTemperature);
      }
    });
  }
}

void mergeStatistics(Queue& queue, const SoftmaxStatistics* statistics, int64_t groups, int64_t rows,
                     const int32_t* targets, LogSoftmax out) {
  constexpr int64_t kRowElements = 64;  // a row's logarithm and exponentials, as elements of forRanges
  forRanges(queue, rows, groups * kRowElements, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      float target = -kInfinity;
      const SoftmaxPart all = mergeTree(0, groups, [&](int64_t g) {
        const SoftmaxStatistics& own = statistics[g * rows + t];
        if (own.target != -kInfinity) target = own.target;
        return SoftmaxPart{own.m, own.s, own.u};
      });
      const float logS = log(all.s);
      out.logZ[t] = all.m + logS;
      out.entropies[t] = logS - all.u / all.s;
      out.logprobs[t] = targets[t] < 0 ? 0.0f : target - out.logZ[t];
    }
  });
}

void logprobsBackward(Queue& queue, Operand hidden, const Weight& w, const int32_t* targets, float inverseTemperature,
                      LogSoftmax forward, const float* dLogprobs, const float* dEntropies, View<float> dHidden,
                      WeightGradient dW, Staging staging) {
  if (w.layout->out == 0) {
    forRanges(queue, hidden.rows, dHidden.cols, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        eachVector(dHidden.cols, [&](int64_t i, auto lanes) { store(dHidden.row(t) + i, zero(), lanes); });
    });
    return;
  }
  const Blocks blocks(staging, w.layout->out, hidden.dtype, true);
  for (int64_t begin = 0; begin < hidden.rows; begin += blocks.rows) {
    const int64_t count = hidden.rows - begin < blocks.rows ? hidden.rows - begin : blocks.rows;
    const View<float> logits = blocks.logits(count);
    const Operand gradients = blocks.gradients(count), x = hidden.slice(begin, count);
    linear(queue, x, w, nullptr, Output::store(logits));
    forRanges(queue, count, blocks.vocabulary, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t t = begin + i;
        const float dLogprob = dLogprobs == nullptr ? 0.0f : dLogprobs[t];
        const RowGradient row{inverseTemperature, forward.logZ[t], forward.entropies[t], dLogprob,
                              dEntropies == nullptr ? 0.0f : dEntropies[t]};
        withElement(hidden.dtype, [&](auto element) {
          gradientRow(logits.row(i), blocks.vocabulary, targets[t], row, gradients.row<decltype(element)>(i));
        });
      }
    });
    linearBackwardInput(queue, gradients, w, Output::store(dHidden.slice(begin, count)));
    linearBackwardWeight(queue, gradients, x, dW, nullptr);
  }
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
