// Log-probabilities and entropies of the next token, forward and backward.
#include <limits>
#include <vector>

#include "kernels/reference/reference.h"
#include "kernels/reference/softmax.h"

namespace lockstep::kernels::reference {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

void softmaxStatistics(Queue& queue, Operand hidden, const Weight& w, const int32_t* targets, float inverseTemperature,
                       SoftmaxStatistics* out, Staging) {
  std::vector<float> logits(w.layout->out);
  for (int64_t t = 0; t < hidden.rows; ++t) {
    linear(queue, hidden.slice(t, 1), w, nullptr, Output::store(dense(logits.data(), 1, w.layout->out)));
    const SoftmaxPart all = mergeTree(softmaxParts(logits.data(), inverseTemperature, *w.layout));
    out[t] = {all.m, all.s, all.u, targets[t] < 0 ? -kInfinity : logits[targets[t]] * inverseTemperature};
  }
}

void mergeStatistics(Queue&, const SoftmaxStatistics* statistics, int64_t groups, int64_t rows, const int32_t* targets,
                     LogSoftmax out) {
  for (int64_t t = 0; t < rows; ++t) {
    std::vector<SoftmaxPart> parts;
    float target = -kInfinity;
    for (int64_t g = 0; g < groups; ++g) {
      const SoftmaxStatistics& own = statistics[g * rows + t];
      parts.push_back({own.m, own.s, own.u});
      if (own.target != -kInfinity) target = own.target;
    }
    const SoftmaxPart all = mergeTree(parts);
    const float logS = log(all.s);
    out.logZ[t] = all.m + logS;
    out.entropies[t] = logS - all.u / all.s;
    out.logprobs[t] = targets[t] < 0 ? 0.0f : target - out.logZ[t];
  }
}

void logprobsBackward(Queue& queue, Operand hidden, const Weight& w, const int32_t* targets, float inverseTemperature,
                      LogSoftmax forward, const float* dLogprobs, const float* dEntropies, View<float> dHidden,
                      WeightGradient dW, Staging) {
  const int64_t rows = hidden.rows, vocabulary = w.layout->out;
  std::vector<float> logits(vocabulary), gradient(rows * vocabulary);
  Operand dLogits = denseOperand(gradient.data(), hidden.dtype, rows, vocabulary);
  for (int64_t t = 0; t < rows; ++t) {
    linear(queue, hidden.slice(t, 1), w, nullptr, Output::store(dense(logits.data(), 1, vocabulary)));
    const float dLogprob = dLogprobs == nullptr ? 0.0f : dLogprobs[t];
    const float dEntropy = dEntropies == nullptr ? 0.0f : dEntropies[t];
    for (int64_t v = 0; v < vocabulary; ++v) {
      const float logp = below(logits[v] * inverseTemperature, forward.logZ[t]);
      const float pull = exp(logp) * fma(dEntropy, logp + forward.entropies[t], dLogprob);
      const float push = v == targets[t] ? dLogprob : 0.0f;
      store(dLogits, t, v, dLogprob == 0 && dEntropy == 0 ? 0.0f : (push - pull) * inverseTemperature);
    }
  }
  linearBackwardInput(queue, dLogits, w, Output::store(dHidden));
  linearBackwardWeight(queue, dLogits, hidden, dW, nullptr);
}

}  // namespace lockstep::kernels::reference
