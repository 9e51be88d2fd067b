// Random shapes and plain float64 formulas for the contracts of the row-wise operations.
#pragma once

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "harness.h"

namespace lockstep::contracts {

// Widths around the vector length and its multiples.
inline int64_t drawWidth(Trial& t) {
  return t.pick({1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 64, 100, 255, 513});
}

// A layout with parts of equal, uneven or no size.
inline kernels::WeightLayout drawLayout(Trial& t, int64_t out, int64_t in, kernels::Split split) {
  if (split == kernels::Split::kNone) return kernels::WeightLayout::make(out, in, split, {out});
  const std::vector<int64_t> sizes = t.partSizes(split == kernels::Split::kOut ? out : in, t.pick({1, 2, 4, 8}));
  t.note("parts", sizes);
  return kernels::WeightLayout::make(out, in, split, sizes);
}

inline float valueAt(const Matrix& m, int64_t row, int64_t col) {
  return m.dtype == DType::kFloat32 ? m.buffer.as<float>()[row * m.stride + col]
                                    : toFloat(m.buffer.as<BFloat16>()[row * m.stride + col]);
}

// Fails unless |actual - expected| <= bound * (1 + |expected|).
inline void expectNear(Trial& t, const std::string& what, double expected, double actual, double bound) {
  if (std::fabs(actual - expected) <= bound * (1 + std::fabs(expected))) return;
  t.fail(what + ": float64 gives " + std::to_string(expected) + ", got " + std::to_string(actual));
}

// d f / d x[i] by central differences in float64.
inline double slope(const std::function<double(const std::vector<double>&)>& f, std::vector<double> x, size_t i) {
  const double h = 1e-5 * (1 + std::fabs(x[i])), at = x[i];
  x[i] = at + h;
  const double above = f(x);
  x[i] = at - h;
  return (above - f(x)) / (2 * h);
}

inline std::vector<double> rowOf(const Matrix& m, int64_t row) {
  std::vector<double> values;
  for (int64_t i = 0; i < m.cols; ++i) values.push_back(valueAt(m, row, i));
  return values;
}

}  // namespace lockstep::contracts
