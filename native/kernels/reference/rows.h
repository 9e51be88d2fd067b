// What the row-wise references share: reading and writing operands, and the lanes sum of kernels.h.
#pragma once

#include "core/view.h"
#include "kernels/weight.h"

namespace lockstep::kernels::reference {

inline float load(const Operand& x, int64_t row, int64_t col) {
  return x.dtype == DType::kFloat32 ? x.row<float>(row)[col] : toFloat(x.row<BFloat16>(row)[col]);
}

inline void store(const Operand& y, int64_t row, int64_t col, float value) {
  if (y.dtype == DType::kFloat32) {
    y.row<float>(row)[col] = value;
  } else {
    y.row<BFloat16>(row)[col] = toBFloat16(value);
  }
}

// 16 partial sums and their tree. next(acc, i) returns acc with element i added.
template <class Next>
float lanesSum(int64_t count, const Next& next) {
  float lanes[16] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % 16] = next(lanes[i % 16], i);
  for (int width = 8; width >= 1; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] = lanes[l] + lanes[l + width];
  }
  return lanes[0];
}

// Where element (row of W, column of W) lies in the float32 order; every element belongs to exactly one part.
inline int64_t float32Index(const WeightLayout& layout, int64_t row, int64_t col) {
  for (const Part& part : layout.parts) {
    const int64_t n = row - part.outBegin, k = col - part.inBegin;
    if (n < 0 || n >= part.out || k < 0 || k >= part.in) continue;
    const int64_t panel = n / kPanel;
    return part.panelOffset(panel) + k * part.panelWidth(panel) + n % kPanel;
  }
  return -1;
}

// The same in the bfloat16 order.
inline int64_t bfloat16Index(const WeightLayout& layout, int64_t row, int64_t col) {
  for (const Part& part : layout.parts) {
    const int64_t n = row - part.outBegin, k = col - part.inBegin;
    if (n < 0 || n >= part.out || k < 0 || k >= part.in) continue;
    const int64_t panel = n / kPanel;
    return part.panelOffset(panel) + k / 2 * 2 * part.panelWidth(panel) + 2 * (n % kPanel) + k % 2;
  }
  return -1;
}

}  // namespace lockstep::kernels::reference
