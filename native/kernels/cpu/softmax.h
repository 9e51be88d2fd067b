// Softmax statistics of a row of logits: per part, merged by the tree over parts (kernels.h, vocabulary). Training and
// sampling share this code, so the log-probability of a sampled token is the one that training computes.
#pragma once

#include "kernels/cpu/rows.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();

// An empty part, and one of nothing but -inf, is (lowest, 0, 0), which adds nothing to another.
struct SoftmaxPart {
  float m = kLowest, s = 0, u = 0;
};

// x - m, held at -100 from below; NaN stays NaN.
template <class V>
LOCKSTEP_INLINE V below(V x, V m) {
  return maximum(broadcast<V>(-100.0f), x - m);
}

// The largest x, NaN passed over.
LOCKSTEP_INLINE float largest(const float* logits, float inverseTemperature, int64_t count) {
  const Vec scale = Vec::broadcast(inverseTemperature);
  Vec m = Vec::broadcast(kLowest);
  eachVector(count, [&](int64_t i, auto lanes) { m = keep(maximum(load(logits + i, lanes) * scale, m), m, lanes); });
  return lanesMaximum(m);
}

// Statistics of `count` logits. kEntropy: with u. weights (may be null) receives exp(x - m).
template <bool kEntropy>
SoftmaxPart softmaxPart(const float* logits, float inverseTemperature, int64_t count, float* weights) {
  SoftmaxPart part;
  part.m = largest(logits, inverseTemperature, count);
  const Vec scale = Vec::broadcast(inverseTemperature), m = Vec::broadcast(part.m);
  Vec s = zero(), u = zero();
  eachVector(count, [&](int64_t i, auto lanes) {
    const Vec d = below(load(logits + i, lanes) * scale, m), e = exp(d);
    if (weights != nullptr) store(weights + i, e, lanes);
    s = keep(s + e, s, lanes);
    if constexpr (kEntropy) u = keep(fma(e, d, u), u, lanes);
  });
  part.s = lanesSum(s);
  if constexpr (kEntropy) part.u = lanesSum(u);
  return part;
}

LOCKSTEP_INLINE SoftmaxPart merge(SoftmaxPart a, SoftmaxPart b) {
  SoftmaxPart c;
  c.m = maximum(a.m, b.m);
  const float d1 = below(a.m, c.m), d2 = below(b.m, c.m), e1 = exp(d1), e2 = exp(d2);
  c.s = fma(b.s, e2, a.s * e1);
  c.u = fma(e2, fma(d2, b.s, b.u), e1 * fma(d1, a.s, a.u));
  return c;
}

// The balanced tree over `count` parts (a power of two) from `begin`; leaf(p) gives the statistics of part p.
template <class Leaf>
SoftmaxPart mergeTree(int64_t begin, int64_t count, const Leaf& leaf) {
  if (count == 1) return leaf(begin);
  const SoftmaxPart left = mergeTree(begin, count / 2, leaf);
  return merge(left, mergeTree(begin + count / 2, count / 2, leaf));
}

}  // namespace
}  // namespace lockstep::kernels::LOCKSTEP_ISA
