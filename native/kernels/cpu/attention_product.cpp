// Register tiles of attention's products, compiled once per instruction set for forward and backward.
#include "kernels/cpu/attention_product.h"

#include <cstring>

#include "kernels/cpu/simd.h"
#include "kernels/math.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

// 24 of 32 registers (AVX-512) or 12 of 16 (AVX2, where a Vec takes two) are accumulators: with at least 12 chains in
// flight the latency of FMA is hidden, and each step loads C + R values for R * C FMAs.
constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 1;
#endif
// A single row (decode, and the ragged ends of rows) has only its columns to keep the multipliers busy.
constexpr int kRowVectors = 4;

template <int R, int C>
LOCKSTEP_INLINE void unitStep(Vec (&acc)[R][C], const float* a, int64_t row, const float* b) {
  Vec right[C];
  for (int c = 0; c < C; ++c) right[c] = loadu(b + 16 * c);
  for (int r = 0; r < R; ++r) {
    const Vec left = Vec::broadcast(a[r * row]);
    for (int c = 0; c < C; ++c) acc[r][c] = fma(left, right[c], acc[r][c]);
  }
}

template <int R, int C>
LOCKSTEP_INLINE void pairStep(Vec (&acc)[R][C], const float* a, int64_t row, const float* b) {
  Pairs right[C];
  for (int c = 0; c < C; ++c) right[c] = loadPairs(b + 16 * c);
  for (int r = 0; r < R; ++r) {
    uint32_t pair;
    memcpy(&pair, a + r * row, sizeof pair);
    const Pairs left = broadcastPair(pair);
    for (int c = 0; c < C; ++c) acc[r][c] = dotPair(acc[r][c], left, right[c]);
  }
}

// R x C chains over the groups begin..end-1.
template <Chain kChain, int R, int C>
void tile(Rows a, Panel b, int64_t begin, int64_t end, float* o, int64_t ldo, bool fresh) {
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = fresh ? Vec::broadcast(0.0f) : loadu(o + r * ldo + 16 * c);
  }
  for (int64_t group = begin; group < end; ++group) {
    if constexpr (kChain == Chain::kPlain) {
      unitStep<R, C>(acc, a.data + group * a.step, a.row, b.data + group * b.step);
    } else if constexpr (kChain == Chain::kSwapped) {
      unitStep<R, C>(acc, a.data + (2 * group + 1) * a.step, a.row, b.data + (2 * group + 1) * b.step);
      unitStep<R, C>(acc, a.data + 2 * group * a.step, a.row, b.data + 2 * group * b.step);
    } else {
      pairStep<R, C>(acc, a.data + group * a.step, a.row, b.data + group * b.step);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) storeu(o + r * ldo + 16 * c, acc[r][c]);
  }
}

// Chains for 1..kTileRows rows; returns how many it took.
template <Chain kChain, int C>
int tileRows(int64_t rows, Rows a, Panel b, int64_t begin, int64_t end, float* o, int64_t ldo, bool fresh) {
  if (rows >= 6) return tile<kChain, 6, C>(a, b, begin, end, o, ldo, fresh), 6;
  if (rows >= 4) return tile<kChain, 4, C>(a, b, begin, end, o, ldo, fresh), 4;
  if (rows >= 2) return tile<kChain, 2, C>(a, b, begin, end, o, ldo, fresh), 2;
  return tile<kChain, 1, C>(a, b, begin, end, o, ldo, fresh), 1;
}

constexpr int tileRowsOf(int64_t rows) {
  return rows >= 6 ? 6 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

// Half of pair `group` of one row: the other half is zero times zero, whatever the operands hold there.
template <Chain kChain>
void halfPair(Rows a, Panel b, int64_t group, bool isOdd, int64_t vectors, float* o) {
  for (int64_t c = 0; c < vectors; ++c) {
    Vec acc = loadu(o + 16 * c);
    if constexpr (kChain == Chain::kSwapped) {
      const int64_t unit = 2 * group + isOdd;
      const Vec left = Vec::broadcast(a.data[unit * a.step]), right = loadu(b.data + unit * b.step + 16 * c);
      acc = isOdd ? fma(left, right, acc) + zero() : fma(left, right, acc + zero());
    } else {
      uint32_t pair;
      memcpy(&pair, a.data + group * a.step, sizeof pair);
      const Pairs whole = loadPairs(b.data + group * b.step + 16 * c);
      const Pairs right = isOdd ? makePairs(zero(), odd(whole)) : makePairs(even(whole), zero());
      acc = dotPair(acc, broadcastPair(pair & (isOdd ? 0xffff0000u : 0x0000ffffu)), right);
    }
    storeu(o + 16 * c, acc);
  }
}

template <Chain kChain, int C>
void groupsOfRow(Rows a, Panel b, int64_t begin, int64_t end, int64_t vectors, float* o) {
  int64_t c = 0;
  for (; c + C <= vectors; c += C) tile<kChain, 1, C>(a, {b.data + 16 * c, b.step}, begin, end, o + 16 * c, 0, false);
  for (; c < vectors; ++c) tile<kChain, 1, 1>(a, {b.data + 16 * c, b.step}, begin, end, o + 16 * c, 0, false);
}

// One row's chains over the positions begin..end-1, which may cut pairs in half.
template <Chain kChain>
void positionsOfRow(Rows a, Panel b, int64_t begin, int64_t end, int64_t vectors, float* o) {
  if (begin >= end) return;
  if constexpr (kChain == Chain::kPlain) {
    groupsOfRow<kChain, kRowVectors>(a, b, begin, end, vectors, o);
  } else {
    if (begin % 2 == 1) halfPair<kChain>(a, b, begin / 2, true, vectors, o);
    groupsOfRow<kChain, kRowVectors>(a, b, (begin + 1) / 2, end / 2, vectors, o);
    if (end % 2 == 1) halfPair<kChain>(a, b, end / 2, false, vectors, o);
  }
}

template <Chain kChain>
int tileColumns(int64_t vectors, int64_t rows, Rows a, Panel b, int64_t begin, int64_t end, float* o, int64_t ldo,
                bool fresh) {
  if constexpr (kTileVectors == 4) {
    if (vectors >= 4) return tileRows<kChain, 4>(rows, a, b, begin, end, o, ldo, fresh), 4;
    if (vectors == 3) return tileRows<kChain, 3>(rows, a, b, begin, end, o, ldo, fresh), 3;
    if (vectors == 2) return tileRows<kChain, 2>(rows, a, b, begin, end, o, ldo, fresh), 2;
  }
  if (kTileVectors < kRowVectors && rows == 1 && vectors >= kRowVectors) {
    return tile<kChain, 1, kRowVectors>(a, b, begin, end, o, ldo, fresh), kRowVectors;
  }
  return tileRows<kChain, 1>(rows, a, b, begin, end, o, ldo, fresh), 1;
}

}  // namespace

template <Chain kChain>
void multiply(Rows a, int64_t rows, Panel b, int64_t vectors, int64_t groups, const int32_t* columnEnd, float* o,
              int64_t ldo) {
  for (int64_t r = 0; r < rows;) {
    const int64_t count = tileRowsOf(rows - r);
    int64_t needed = columnEnd == nullptr ? vectors : 0;
    for (int64_t i = r; columnEnd != nullptr && i < r + count; ++i) {
      const int64_t end = (columnEnd[i] + 15) / 16;
      if (end > needed) needed = end;
    }
    for (int64_t c = 0; c < needed;) {
      const Rows left{a.data + r * a.row, a.row, a.step};
      c += tileColumns<kChain>(needed - c, count, left, {b.data + 16 * c, b.step}, 0, groups, o + r * ldo + 16 * c, ldo,
                               true);
    }
    r += count;
  }
}

// Rows of a tile share the groups that all of them see whole; what only some see before and after is done row by row.
template <Chain kChain>
void accumulate(Rows a, int64_t rows, Panel b, int64_t vectors, const int32_t* begin, const int32_t* end, float* o,
                int64_t ldo) {
  constexpr int64_t kGroup = kChain == Chain::kPlain ? 1 : 2;
  for (int64_t r = 0; r < rows;) {
    const int64_t count = tileRowsOf(rows - r);
    int64_t first = 0, last = 64;
    for (int64_t i = r; i < r + count; ++i) {
      if (begin[i] > first) first = begin[i];
      if (end[i] < last) last = end[i];
    }
    const int64_t firstGroup = (first + kGroup - 1) / kGroup, lastGroup = last / kGroup;
    const bool shared = firstGroup < lastGroup;
    const Rows left{a.data + r * a.row, a.row, a.step};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t until = shared ? firstGroup * kGroup : end[r + i];
      positionsOfRow<kChain>({left.data + i * a.row, 0, a.step}, b, begin[r + i], until, vectors, o + (r + i) * ldo);
    }
    for (int64_t c = 0; shared && c < vectors;) {
      const Panel right{b.data + 16 * c, b.step};
      c +=
          tileColumns<kChain>(vectors - c, count, left, right, firstGroup, lastGroup, o + r * ldo + 16 * c, ldo, false);
    }
    for (int64_t i = 0; shared && i < count; ++i) {
      positionsOfRow<kChain>({left.data + i * a.row, 0, a.step}, b, lastGroup * kGroup, end[r + i], vectors,
                             o + (r + i) * ldo);
    }
    r += count;
  }
}

#define LOCKSTEP_INSTANTIATE(kChain)                                                                       \
  template void multiply<kChain>(Rows, int64_t, Panel, int64_t, int64_t, const int32_t*, float*, int64_t); \
  template void accumulate<kChain>(Rows, int64_t, Panel, int64_t, const int32_t*, const int32_t*, float*, int64_t)
LOCKSTEP_INSTANTIATE(Chain::kPlain);
LOCKSTEP_INSTANTIATE(Chain::kPairs);
#ifndef __AVX512BF16__
LOCKSTEP_INSTANTIATE(Chain::kSwapped);
#endif

}  // namespace lockstep::kernels::LOCKSTEP_ISA
