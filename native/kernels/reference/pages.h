// What the references of attention share: where an element lies in a page of keys and values, which keys a query sees,
// and the chain of kernels.h over a range that may begin or end inside a pair.
#pragma once

#include <algorithm>

#include "kernels/kernels.h"
#include "kernels/math.h"

namespace lockstep::kernels::reference {

// Index, in elements of kv.data, of dimension i of the key at slot s of a page.
inline int64_t keyIndex(const KvPages& kv, int64_t page, int64_t g, int64_t s, int64_t i) {
  const int64_t within =
      kv.dtype == DType::kFloat32 ? i * kPagePositions + s : i / 2 * 2 * kPagePositions + 2 * s + i % 2;
  return kv.keyPanel(page, g) + within;
}

// The same of the value. Panels are 64 dimensions wide, the last one narrower.
inline int64_t valueIndex(const KvPages& kv, int64_t page, int64_t g, int64_t s, int64_t i) {
  const int64_t begin = i / kPanel * kPanel, n = i - begin;
  const int64_t width = std::min(kPanel, roundUp(kv.headWidth, kPanelGrain) - begin);
  const int64_t within = kv.dtype == DType::kFloat32 ? s * width + n : s / 2 * 2 * width + 2 * n + s % 2;
  return kv.valuePanel(page, g) + begin * kPagePositions + within;
}

inline float loadPage(const KvPages& kv, int64_t index) {
  return kv.dtype == DType::kFloat32 ? static_cast<const float*>(kv.data)[index]
                                     : toFloat(static_cast<const BFloat16*>(kv.data)[index]);
}

inline void storePage(const KvPages& kv, int64_t index, float value) {
  if (kv.dtype == DType::kFloat32) {
    static_cast<float*>(kv.data)[index] = value;
  } else {
    static_cast<BFloat16*>(kv.data)[index] = toBFloat16(value);
  }
}

inline float roundTo(DType dtype, float x) {
  return dtype == DType::kFloat32 ? x : toFloat(toBFloat16(x));
}

// First key that the query at `position` sees.
inline int64_t firstVisible(const AttentionShape& shape, int64_t position) {
  return shape.window > 0 ? std::max<int64_t>(0, position - shape.window + 1) : 0;
}

// acc = fma(a(i), b(i), acc) for i in begin..end-1 in the order of the dtype: ascending, or pair by pair with the odd
// element first, where the half of a pair outside the range is zero times zero.
template <class A, class B>
float chain(float acc, DType dtype, int64_t begin, int64_t end, const A& a, const B& b) {
  if (dtype == DType::kFloat32) {
    for (int64_t i = begin; i < end; ++i) acc = fma(a(i), b(i), acc);
    return acc;
  }
  for (int64_t even = begin / 2 * 2; even < end; even += 2) {
    acc = even + 1 < end ? fma(a(even + 1), b(even + 1), acc) : fma(0.0f, 0.0f, acc);
    acc = even >= begin ? fma(a(even), b(even), acc) : fma(0.0f, 0.0f, acc);
  }
  return acc;
}

// body(row) for every row of 0..rows-1 that belongs to no sequence.
template <class Body>
void forEachPaddingRow(const Sequences& sequences, int64_t rows, const Body& body) {
  int64_t row = 0;
  for (int64_t b = 0; b < sequences.count; ++b) {
    for (; row < sequences.rowBegin[b]; ++row) body(row);
    row = sequences.rowBegin[b] + sequences.length[b];
  }
  for (; row < rows; ++row) body(row);
}

}  // namespace lockstep::kernels::reference
