// Packing the operands of a matrix product for the register tile (linear_tile.h). Packing reorders and widens; it never
// rounds. Float32 steps are in chain order: of a bfloat16 pair the odd element comes first. With pair arithmetic
// (AVX512-BF16) bfloat16 operands stay pairs and a step is a pair.
#pragma once

#include <type_traits>

#include "core/view.h"
#include "kernels/cpu/linear_tile.h"
#include "kernels/weight.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

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

// --- operands by rows ------------------------------------------------------------------------------------

// 16 steps of a row of an operand, by how its elements become steps; `count` elements exist.
struct PlainRow {
  using Element = float;
  static LOCKSTEP_MEMBER Vec load(const float* p) { return loadu(p); }
  static LOCKSTEP_MEMBER Vec load(const float* p, int64_t count) { return loadUpTo(p, count); }
};
struct WidenedRow {
  using Element = BFloat16;
  static LOCKSTEP_MEMBER Vec load(const BFloat16* p) { return swapNeighbours(loadu(p)); }
  static LOCKSTEP_MEMBER Vec load(const BFloat16* p, int64_t count) { return swapNeighbours(loadUpTo(p, count)); }
};
struct PairedRow {
  using Element = BFloat16;
  static LOCKSTEP_MEMBER Vec load(const BFloat16* p) { return asFloats(loadPairs(p)); }
  static LOCKSTEP_MEMBER Vec load(const BFloat16* p, int64_t count) {
    return asFloats(loadPairsOf(p, smaller(count, 32)));
  }
};

template <class Row>
void packTileOf(const typename Row::Element* x, int64_t stride, int64_t rows, int64_t count, int64_t steps, float* to) {
  constexpr int64_t kElements = std::is_same_v<Row, PairedRow> ? 2 : 1;
  for (int64_t first = 0; first < steps; first += 16) {
    const typename Row::Element* from = x + first * kElements;
    const int64_t left = count - first * kElements;
    if (rows == 1) {
      storeUpTo(to + first, Row::load(from, left), steps - first);
      continue;
    }
    // Lanes past the last row repeat it and are overwritten.
    Vec r[16];
    if (left >= 16 * kElements) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) r[i] = Row::load(from + smaller(i, rows - 1) * stride);
    } else {
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) r[i] = Row::load(from + smaller(i, rows - 1) * stride, left);
    }
    transpose(r);
    if ((first + 15) * rows + 16 <= steps * rows) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) storeu(to + (first + i) * rows, r[i]);
    } else {
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        if (first + i < steps) putStep(to, first + i, steps, rows, r[i]);
      }
    }
  }
}

// The same row by row, whole vectors at a time: a row has room for one more than it needs.
template <class Row>
void packRowsOf(const typename Row::Element* x, int64_t stride, int64_t rows, int64_t count, int64_t steps, float* to) {
  for (int64_t r = 0; r < rows; ++r, x += stride, to += kLeftFloats) {
    int64_t k = 0;
    for (; k + 16 <= count; k += 16) storeu(to + k, Row::load(x + k));
    for (; k < steps; k += 16) storeu(to + k, Row::load(x + k, count - k));
  }
}

// Left operand of a tile from rows: `rows` (at most 16) of them from `row`, `count` elements from column `col`.
inline void packTile(const Operand& x, int64_t row, int64_t rows, int64_t col, int64_t count, int64_t steps,
                     float* to) {
  if constexpr (kLeftByRows) {
    if (x.dtype == DType::kFloat32) {
      packRowsOf<PlainRow>(x.row<float>(row) + col, x.stride, rows, count, steps, to);
    } else {
      packRowsOf<WidenedRow>(x.row<BFloat16>(row) + col, x.stride, rows, count, steps, to);
    }
  } else if (x.dtype == DType::kFloat32) {
    packTileOf<PlainRow>(x.row<float>(row) + col, x.stride, rows, count, steps, to);
  } else if constexpr (kPairArithmetic) {
    packTileOf<PairedRow>(x.row<BFloat16>(row) + col, x.stride, rows, count, steps, to);
  } else {
    packTileOf<WidenedRow>(x.row<BFloat16>(row) + col, x.stride, rows, count, steps, to);
  }
}

// --- rows as steps ---------------------------------------------------------------------------------------

// A step of a chain over rows of an operand: 16 columns from `col`, of which `count` exist.
struct PlainStep {
  const float* row;
  LOCKSTEP_MEMBER Vec load(int64_t col, int64_t count) const { return loadUpTo(row + col, count); }
};
struct WidenedStep {
  const BFloat16* row;
  LOCKSTEP_MEMBER Vec load(int64_t col, int64_t count) const { return loadUpTo(row + col, count); }
};
struct PairedStep {
  const BFloat16 *even, *odd;  // odd null: zeros
  LOCKSTEP_MEMBER Vec load(int64_t col, int64_t count) const {
    return asFloats(interleave(even + col, odd == nullptr ? nullptr : odd + col, smaller(count, 16)));
  }
};
struct ZeroStep {
  LOCKSTEP_MEMBER Vec load(int64_t, int64_t) const { return zero(); }
};

// body(step) with step k of a chain over the rows of x from row `first` on (even): of a pair of rows the odd one comes
// first, and is zero when it does not exist.
template <class Body>
LOCKSTEP_INLINE void withStep(const Operand& x, int64_t first, int64_t k, const Body& body) {
  if (x.dtype == DType::kFloat32) {
    body(PlainStep{x.row<float>(first + k)});
  } else if constexpr (kPairArithmetic) {
    const int64_t even = first + 2 * k;
    body(PairedStep{x.row<BFloat16>(even), even + 1 < x.rows ? x.row<BFloat16>(even + 1) : nullptr});
  } else if (first + (k ^ 1) < x.rows) {
    body(WidenedStep{x.row<BFloat16>(first + (k ^ 1))});
  } else {
    body(ZeroStep{});
  }
}

// --- panels ----------------------------------------------------------------------------------------------

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

// Rows of a panel between what is read and what is fetched from memory meanwhile.
constexpr int64_t kRowsAhead = 16;

// Right operand from a panel, steps first .. first + steps - 1 in chain order.
inline void stagePanel(DType dtype, PanelView panel, int64_t first, int64_t steps, int vectors, float* to) {
  const int64_t ahead = kRowsAhead * panel.width;
  if (dtype == DType::kFloat32) {
    const float* from = panel.data + first * panel.width;
    for (int64_t k = 0; k < steps; ++k, from += panel.width) {
      for (int v = 0; v < vectors; ++v, to += 16) {
        __builtin_prefetch(from + ahead + 16 * v);
        storeu(to, loadu(from + 16 * v));
      }
    }
    return;
  }
  const float* from = panel.data + first / 2 * panel.width;
  for (int64_t k = 0; k < steps; k += 2, from += panel.width, to += 32 * vectors) {
    for (int v = 0; v < vectors; ++v) {
      __builtin_prefetch(from + ahead + 16 * v);
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
  const int64_t exist = part.in - column;
  if (w.dtype == DType::kFloat32) {
    const float* from = panel.data + column * panel.width;
    for (int i = 0; i < 16; ++i) __builtin_prefetch(from + i * panel.width + kPanel * part.inPadded(), 0, 2);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = i < exist ? loadu(from + i * panel.width) : zero();
  } else {
    const float* from = panel.data + column / 2 * panel.width;
    for (int i = 0; i < 8; ++i) __builtin_prefetch(from + i * panel.width + kPanel / 2 * part.inPadded(), 0, 2);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      const Pairs pairs = i < exist ? loadPairs(from + i / 2 * panel.width) : asPairs(zero());
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
  const int64_t swap = w.dtype == DType::kBFloat16 && !pairs ? stride : 0;
  for (int64_t k = 0; k < steps; k += 16) {
    for (int v = 0; v < vectors; ++v) {
      Vec r[16];
      if (pairs) {
        loadTransposedPairs(w, part, 2 * (first + k), column + 16 * v, r);
      } else {
        loadTransposed(w, part, first + k, column + 16 * v, r);
      }
      float* const at = to + k * stride + 16 * v;
#pragma GCC unroll 8
      for (int64_t n = 0; n < 16; n += 2) {
        if (k + n < steps) storeu(at + n * stride + swap, r[n]);
        if (k + n + 1 < steps) storeu(at + (n + 1) * stride - swap, r[n + 1]);
      }
    }
  }
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
