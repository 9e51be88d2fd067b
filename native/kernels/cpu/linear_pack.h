// Packing the operands of a matrix product for the register tile (linear_tile.h). Packing reorders and widens; it never
// rounds. Float32 steps are in chain order: of a bfloat16 pair the odd element comes first. With pair arithmetic
// (AVX512-BF16) bfloat16 operands stay pairs and a step is a pair.
#pragma once

#include "core/view.h"
#include "kernels/cpu/linear_tile.h"
#include "kernels/weight.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

namespace {

constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

LOCKSTEP_INLINE bool asPairSteps(DType dtype) {
  return kPairArithmetic && dtype == DType::kBFloat16;
}
// Steps of a chain of `count` elements: an odd count of bfloat16 is padded by one zero.
LOCKSTEP_INLINE int64_t chainSteps(DType dtype, int64_t count) {
  if (dtype == DType::kFloat32) return count;
  return asPairSteps(dtype) ? (count + 1) / 2 : (count + 1) / 2 * 2;
}
// Elements of a step.
LOCKSTEP_INLINE int64_t stepElements(DType dtype) {
  return asPairSteps(dtype) ? 2 : 1;
}

template <class T>
LOCKSTEP_INLINE Vec loadUpTo(const T* p, int64_t count) {
  return count >= 16 ? loadu(p) : loadPartial(p, count);
}

template <class T>
LOCKSTEP_INLINE void storeUpTo(T* p, Vec x, int64_t count) {
  if (count >= 16) {
    storeu(p, x);
  } else {
    storePartial(p, x, count);
  }
}

// A step of a left operand of `rows` rows. Whole vectors are stored, to be overwritten by the next step, except where
// the last steps would reach past the end.
LOCKSTEP_INLINE void putStep(float* to, int64_t k, int64_t steps, int64_t rows, Vec x) {
  if (k * rows + 16 <= steps * rows) {
    storeu(to + k * rows, x);
  } else {
    storePartial(to + k * rows, x, rows);
  }
}

// 16 steps of a row from element `k` on: `count` elements exist.
LOCKSTEP_INLINE Vec loadSteps(const Operand& x, int64_t row, int64_t k, int64_t count) {
  if (x.dtype == DType::kFloat32) return loadUpTo(x.row<float>(row) + k, count);
  if (kPairArithmetic) return asFloats(loadPairsOf(x.row<BFloat16>(row) + k, smaller(count, 32)));
  return swapNeighbours(loadUpTo(x.row<BFloat16>(row) + k, count));
}

// Left operand of a tile from rows: `rows` (at most 16) of them from `row`, `count` elements from column `col`.
inline void packTile(const Operand& x, int64_t row, int64_t rows, int64_t col, int64_t count, int64_t steps,
                     float* to) {
  const int64_t elements = stepElements(x.dtype);
  for (int64_t first = 0; first < steps; first += 16) {
    const int64_t k = first * elements, some = smaller(16, steps - first);
    if (rows == 1) {
      storeUpTo(to + first, loadSteps(x, row, col + k, count - k), some);
      continue;
    }
    Vec r[16];
    for (int64_t i = 0; i < 16; ++i) r[i] = i < rows ? loadSteps(x, row + i, col + k, count - k) : zero();
    transpose(r);
    for (int64_t i = 0; i < some; ++i) putStep(to, first + i, steps, rows, r[i]);
  }
}

// The rows of an operand as steps of a chain: 16 columns (`count` of them exist) of step k.
struct StepRows {
  Operand x;
  int64_t firstRow, rows;  // rows of the operand in this block; firstRow is even

  LOCKSTEP_MEMBER Vec load(int64_t k, int64_t col, int64_t count) const {
    if (x.dtype == DType::kFloat32) return loadUpTo(x.row<float>(firstRow + k) + col, count);
    if (kPairArithmetic) {
      const BFloat16* odd = 2 * k + 1 < rows ? x.row<BFloat16>(firstRow + 2 * k + 1) + col : nullptr;
      return asFloats(interleave(x.row<BFloat16>(firstRow + 2 * k) + col, odd, smaller(count, 16)));
    }
    const int64_t row = k ^ 1;
    return row < rows ? loadUpTo(x.row<BFloat16>(firstRow + row) + col, count) : zero();
  }
};

// A panel of one part, at a column inside of it.
struct PanelView {
  const float* data;  // dwords
  int64_t width;      // dwords from a step (float32: an element; bfloat16: a pair) to the next
};

LOCKSTEP_INLINE PanelView panelAt(const Weight& w, const Part& part, int64_t column) {
  const int64_t panel = column / kPanel;
  const char* base =
      static_cast<const char*>(w.data) + part.panelOffset(panel) * static_cast<int64_t>(bytesOf(w.dtype));
  return {reinterpret_cast<const float*>(base) + column % kPanel, part.panelWidth(panel)};
}

// Right operand from a panel, steps first .. first + steps - 1 in chain order.
inline void stagePanel(DType dtype, PanelView panel, int64_t first, int64_t steps, int vectors, float* to) {
  if (dtype == DType::kFloat32) {
    const float* from = panel.data + first * panel.width;
    for (int64_t k = 0; k < steps; ++k, from += panel.width) {
      for (int v = 0; v < vectors; ++v, to += 16) storeu(to, loadu(from + 16 * v));
    }
    return;
  }
  const float* from = panel.data + first / 2 * panel.width;
  for (int64_t k = 0; k < steps; k += 2, from += panel.width, to += 32 * vectors) {
    for (int v = 0; v < vectors; ++v) {
      const Pairs pairs = loadPairs(from + 16 * v);
      storeu(to + 16 * v, odd(pairs));
      storeu(to + 16 * (vectors + v), even(pairs));
    }
  }
}

// 16 columns of W (from `column` of the part) against 16 rows of W (from `row`): lane i of r[n] is W[row + n][column +
// i], zero past the end of the part's columns.
LOCKSTEP_INLINE void loadTransposed(const Weight& w, const Part& part, int64_t row, int64_t column, Vec (&r)[16]) {
  const PanelView panel = panelAt(w, part, row);
  if (w.dtype == DType::kFloat32) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      r[i] = column + i < part.in ? loadu(panel.data + (column + i) * panel.width) : zero();
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      const bool exists = column + i < part.in;
      const Pairs pairs = exists ? loadPairs(panel.data + (column + i) / 2 * panel.width) : asPairs(zero());
      r[i] = even(pairs);
      r[i + 1] = odd(pairs);
    }
  }
  transpose(r);
}

// The same in pairs of rows: lane i of r[j] is the pair (W[row + 2j][column + i], W[row + 2j + 1][column + i]), 32
// rows.
LOCKSTEP_INLINE void loadTransposedPairs(const Weight& w, const Part& part, int64_t row, int64_t column, Vec (&r)[16]) {
  const PanelView panel = panelAt(w, part, row);
  const bool wide = row % kPanel + 16 < panel.width;
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    Vec first = zero(), second = zero();
    if (column + i < part.in) {
      const float* from = panel.data + (column + i) / 2 * panel.width;
      first = loadu(from);
      if (wide) second = loadu(from + 16);
    }
    const Pairs even = asPairs(evenLanes(first, second)), odd = asPairs(oddLanes(first, second));
    r[i] = asFloats(lowHalves(even, odd));
    r[i + 1] = asFloats(highHalves(even, odd));
  }
  transpose(r);
}

// Right operand from W transposed: rows of the part are steps, its columns are columns. `first` is a multiple of 32.
inline void stageTransposed(const Weight& w, const Part& part, int64_t first, int64_t steps, int64_t column,
                            int vectors, float* to) {
  const int64_t stride = 16 * vectors;
  const bool pairs = asPairSteps(w.dtype);
  const int64_t swap = w.dtype == DType::kBFloat16 && !pairs ? 1 : 0;
  for (int64_t k = 0; k < steps; k += 16) {
    const int64_t count = smaller(16, steps - k);
    for (int v = 0; v < vectors; ++v) {
      Vec r[16];
      if (pairs) {
        loadTransposedPairs(w, part, 2 * (first + k), column + 16 * v, r);
      } else {
        loadTransposed(w, part, first + k, column + 16 * v, r);
      }
      for (int64_t n = 0; n < count; ++n) storeu(to + (k + (n ^ swap)) * stride + 16 * v, r[n]);
    }
  }
}

}  // namespace

}  // namespace lockstep::kernels::LOCKSTEP_ISA
