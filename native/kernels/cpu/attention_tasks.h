// How attention cuts its work: tiles of query rows that end where a page of 64 positions (or a part of one) ends, and
// what the kernels read from a page.
#pragma once

#include <cstring>

#include "core/queue.h"
#include "kernels/cpu/attention_product.h"
#include "kernels/cpu/rows.h"
#include "kernels/kernels.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

// `count` query rows of one sequence, in one block of `grain` absolute positions.
struct QueryTile {
  int64_t sequence, row, position, count;
};

// The tiles of all sequences. The prefix [B + 1] lies at the head of thread 0's scratch while the operation runs.
struct QueryTiles {
  const Sequences& sequences;
  int64_t grain;
  int32_t* prefix;

  static size_t bytes(const Sequences& sequences) { return roundUp((sequences.count + 1) * sizeof(int32_t), 64); }

  int64_t firstBlock(int64_t b) const { return sequences.offset[b] / grain; }
  int64_t blocks(int64_t b) const {
    return (sequences.offset[b] + sequences.length[b] + grain - 1) / grain - firstBlock(b);
  }
  int64_t total() const { return prefix[sequences.count]; }

  void fill() const {
    prefix[0] = 0;
    for (int64_t b = 0; b < sequences.count; ++b) prefix[b + 1] = prefix[b] + static_cast<int32_t>(blocks(b));
  }

  QueryTile at(int64_t index) const {
    int64_t low = 0, high = sequences.count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (prefix[middle] <= index) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int64_t start = sequences.offset[low], stop = start + sequences.length[low];
    const int64_t block = (firstBlock(low) + index - prefix[low]) * grain;
    const int64_t begin = block > start ? block : start, end = block + grain < stop ? block + grain : stop;
    return {low, sequences.rowBegin[low] + begin - start, begin, end - begin};
  }
};

// body(row) for every row of 0..rows-1 that belongs to no sequence.
template <class Body>
LOCKSTEP_INLINE void forEachPaddingRow(const Sequences& sequences, int64_t rows, const Body& body) {
  int64_t row = 0;
  for (int64_t b = 0; b < sequences.count; ++b) {
    for (; row < sequences.rowBegin[b]; ++row) body(row);
    row = sequences.rowBegin[b] + sequences.length[b];
  }
  for (; row < rows; ++row) body(row);
}

// Hands out pieces of one thread's scratch, 64-byte aligned. With base null it only adds up.
struct Carver {
  char* base = nullptr;
  size_t used = 0;

  float* floats(int64_t count) {
    const size_t at = used;
    used += roundUp(count * 4, 64);
    return base == nullptr ? nullptr : reinterpret_cast<float*>(base + at);
  }
};

// First key that the query at `position` sees.
LOCKSTEP_INLINE int64_t firstVisible(const AttentionShape& shape, int64_t position) {
  return shape.window > 0 && position >= shape.window ? position - shape.window + 1 : 0;
}

alignas(64) const float kLaneIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// x in the slots begin..end-1, `other` elsewhere; the vector holds the slots from `slot` on.
LOCKSTEP_INLINE Vec selectSlots(int64_t slot, int64_t begin, int64_t end, Vec x, Vec other) {
  if (begin <= slot && slot + 16 <= end) return x;
  const Vec lane = loadu(kLaneIndex);
  const Vec fromBegin = selectLessEqual(Vec::broadcast(static_cast<float>(begin - slot)), lane, x, other);
  return selectLessEqual(lane, Vec::broadcast(static_cast<float>(end - 1 - slot)), fromBegin, other);
}

// x rounded to bfloat16.
LOCKSTEP_INLINE Vec rounded(Vec x) {
  return widen(roundToBf16(x));
}

// Units (of 32 bits) per row of a left operand that holds `count` steps, and groups of its chain.
template <Chain kChain>
constexpr int64_t unitsOf(int64_t count) {
  return kChain == Chain::kPlain ? count : kChain == Chain::kSwapped ? roundUp(count, 2) : (count + 1) / 2;
}
template <Chain kChain>
constexpr int64_t groupsOf(int64_t count) {
  return kChain == Chain::kPlain ? count : (count + 1) / 2;
}

// Wide tiles of bfloat16 are widened once where the instruction set lacks VDPBF16PS; narrow ones (decode) read the
// pairs as they lie in the page.
constexpr Chain kWideBFloat16 = kDotPairInstruction ? Chain::kPairs : Chain::kSwapped;

// Rows of pairs [pairs][2 w] in bfloat16 -> float32 [2 pairs][w].
LOCKSTEP_INLINE void widenPanel(const BFloat16* src, int64_t pairs, int64_t w, float* dst) {
  for (int64_t p = 0; p < pairs; ++p) {
    for (int64_t n = 0; n < w; n += 16) {
      const Pairs x = loadPairs(src + (p * w + n) * 2);
      storeu(dst + 2 * p * w + n, even(x));
      storeu(dst + (2 * p + 1) * w + n, odd(x));
    }
  }
}

// The panels of one page and head as right operands. `staging` (K2 * 64 + 64 * K16 floats) is used by kSwapped only.
struct PagePanels {
  const float* key;    // kPlain, kSwapped: [K2][64] float32; kPairs: [K2 / 2][64] pairs of dimensions
  const float* value;  // panels of 64 dimensions (the last narrower): [64][w] float32, or [32][w] pairs of positions
};

template <Chain kChain>
LOCKSTEP_INLINE PagePanels pagePanels(const KvPages& kv, int64_t page, int64_t g, float* staging) {
  const int64_t key = kv.keyPanel(page, g), value = kv.valuePanel(page, g);
  if constexpr (kChain == Chain::kPlain) {
    const float* data = static_cast<const float*>(kv.data);
    return {data + key, data + value};
  } else {
    const BFloat16* data = static_cast<const BFloat16*>(kv.data);
    if constexpr (kChain == Chain::kPairs) {
      return {reinterpret_cast<const float*>(data + key), reinterpret_cast<const float*>(data + value)};
    } else {
      float* values = staging + kv.keyPanelElements();
      widenPanel(data + key, roundUp(kv.headWidth, 2) / 2, kPagePositions, staging);
      for (int64_t n = 0; n < roundUp(kv.headWidth, kPanelGrain); n += kPanel) {
        const int64_t left = roundUp(kv.headWidth, kPanelGrain) - n, w = left < kPanel ? left : kPanel;
        widenPanel(data + value + n * kPagePositions, kPagePositions / 2, w, values + n * kPagePositions);
      }
      return {staging, values};
    }
  }
}

// `count` elements of one head of an operand's row as a left operand: unitsOf(count) units, padded by zero.
template <Chain kChain>
LOCKSTEP_INLINE void packRow(const Operand& x, int64_t row, int64_t column, int64_t count, float* dst) {
  if constexpr (kChain == Chain::kPlain) {
    memcpy(dst, x.row<float>(row) + column, count * sizeof(float));
  } else if constexpr (kChain == Chain::kSwapped) {
    const BFloat16* src = x.row<BFloat16>(row) + column;
    eachVector(count, [&](int64_t i, auto lanes) { store(dst + i, load(src + i, lanes), lanes); });
    if (count % 2 == 1) dst[count] = 0.0f;
  } else {
    memcpy(dst, x.row<BFloat16>(row) + column, count * sizeof(BFloat16));
    if (count % 2 == 1) reinterpret_cast<uint16_t*>(dst)[count] = 0;
  }
}

}  // namespace
}  // namespace lockstep::kernels::LOCKSTEP_ISA
