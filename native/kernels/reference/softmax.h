// Softmax statistics of one row of logits: per part, then merged by the tree over parts (kernels.h, vocabulary).
#pragma once

#include <limits>
#include <vector>

#include "kernels/math.h"
#include "kernels/reference/rows.h"

namespace lockstep::kernels::reference {

struct SoftmaxPart {
  float m = std::numeric_limits<float>::lowest(), s = 0, u = 0;
};

// x - m, held at -100 from below; NaN stays NaN.
inline float below(float x, float m) {
  return maximum(-100.0f, x - m);
}

inline SoftmaxPart softmaxPart(const float* logits, float inverseTemperature, int64_t begin, int64_t count) {
  SoftmaxPart part;
  for (int64_t v = begin; v < begin + count; ++v) part.m = maximum(logits[v] * inverseTemperature, part.m);
  const auto distance = [&](int64_t i) { return below(logits[begin + i] * inverseTemperature, part.m); };
  part.s = lanesSum(count, [&](float acc, int64_t i) { return acc + exp(distance(i)); });
  part.u = lanesSum(count, [&](float acc, int64_t i) { return fma(exp(distance(i)), distance(i), acc); });
  return part;
}

inline SoftmaxPart merge(SoftmaxPart a, SoftmaxPart b) {
  SoftmaxPart c;
  c.m = maximum(a.m, b.m);
  const float d1 = below(a.m, c.m), d2 = below(b.m, c.m), e1 = exp(d1), e2 = exp(d2);
  c.s = fma(b.s, e2, a.s * e1);
  c.u = fma(e2, fma(d2, b.s, b.u), e1 * fma(d1, a.s, a.u));
  return c;
}

inline SoftmaxPart mergeTree(std::vector<SoftmaxPart> parts) {
  while (parts.size() > 1) {
    std::vector<SoftmaxPart> next;
    for (size_t i = 0; i < parts.size(); i += 2) next.push_back(merge(parts[i], parts[i + 1]));
    parts = next;
  }
  return parts[0];
}

// The range of columns of a part of the vocabulary: all of them when the vocabulary is not cut.
inline std::vector<SoftmaxPart> softmaxParts(const float* logits, float inverseTemperature,
                                             const WeightLayout& layout) {
  std::vector<SoftmaxPart> parts;
  for (const Part& part : layout.parts) {
    parts.push_back(softmaxPart(logits, inverseTemperature, part.outBegin, part.out));
  }
  return parts;
}

}  // namespace lockstep::kernels::reference
