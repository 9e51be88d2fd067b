// What the kernels of attention share: a call, the rows that go through it together, what they see, and their operands.
#pragma once

#include "device.h"

#include <limits>
#include <vector>

#include "kernels/cuda/cuda.h"

namespace lockstep::kernels::cuda::attending {

constexpr int kPage = static_cast<int>(kPagePositions);
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// `count` query rows of one sequence; of a long one, those of one page of positions.
struct QueryTile {
  int32_t sequence, row, position, count;
};

struct Call {
  Operand q, out;
  KvPages kv;
  View<float> logSumExp;
  const int32_t* pageTable;
  int64_t pageStride;
  const QueryTile* tiles;
  int heads, group, width, window;  // group: query heads of a key/value head
  float scale;
  bool wholePairs;  // pairs of q and out lie in words

  constexpr int firstVisible(int position) const {
    return window > 0 && position >= window ? position - window + 1 : 0;
  }
  // Pages that the rows of a tile see: begin .. end - 1.
  constexpr int pageBegin(const QueryTile& tile) const { return firstVisible(tile.position) / kPage; }
  constexpr int pageEnd(const QueryTile& tile) const { return (tile.position + tile.count - 1) / kPage + 1; }
  constexpr int64_t pageOf(const QueryTile& tile, int page) const {
    return pageTable[tile.sequence * pageStride + page];
  }
};

// Slots begin .. end - 1 of a page.
struct Slots {
  int begin, end;
  constexpr bool has(int slot) const { return begin <= slot && slot < end; }
  constexpr bool empty() const { return begin >= end; }
};
// Those that the rows at the positions first .. last see of the page that begins at position `base`, at least one each.
__device__ inline Slots visible(const Call& call, int base, int first, int last) {
  const int begin = call.firstVisible(first) - base, end = last + 1 - base;
  return {begin > 0 ? begin : 0, end < kPage ? end : kPage};
}
__device__ inline Slots visible(const Call& call, int base, int position) {
  return visible(call, base, position, position);
}

// The bits of a pair of slots of which only `slots` count.
__device__ inline unsigned maskOfPair(Slots slots, int even) {
  return (slots.has(even) ? 0xffffu : 0u) | (slots.has(even + 1) ? 0xffff0000u : 0u);
}

// A pair of weights as bfloat16. They are zero, normal or NaN, which spares the branches of toBFloat16.
__device__ inline unsigned weightPair(float even, float odd) {
  const auto upper = [](float x) {
    const unsigned bits = std::bit_cast<unsigned>(x);
    return x != x ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
  };
  return __byte_perm(upper(even), upper(odd), 0x7632);
}

// The pair of dimensions i, i + 1 of a head of a row of q; zeros past its width.
__device__ inline unsigned queryPair(const Call& call, int64_t row, int h, int i) {
  if (i >= call.width) return 0;
  const BFloat16* x = call.q.row<BFloat16>(row) + static_cast<int64_t>(h) * call.width + i;
  if (call.wholePairs) return *reinterpret_cast<const unsigned*>(x);
  return x[0].bits | (i + 1 < call.width ? static_cast<unsigned>(x[1].bits) << 16 : 0u);
}

// The same of out; n is even.
__device__ inline void storePair(const Call& call, int64_t row, int h, int n, float even, float odd) {
  if (n >= call.width) return;
  BFloat16* to = call.out.row<BFloat16>(row) + static_cast<int64_t>(h) * call.width + n;
  const BFloat16 low = toBFloat16(even), high = toBFloat16(odd);
  if (call.wholePairs) {
    *reinterpret_cast<unsigned*>(to) = low.bits | static_cast<unsigned>(high.bits) << 16;
  } else {
    to[0] = low;
    if (n + 1 < call.width) to[1] = high;
  }
}

// Words of the value panel of a page: the word of the positions 2 p, 2 p + 1 and dimension n is at(n)[p * width(n)].
struct ValuePanel {
  const unsigned* words;
  int padded;  // dimensions

  __device__ static ValuePanel of(const Call& call, int64_t page, int g) {
    const BFloat16* data = static_cast<const BFloat16*>(call.kv.data) + call.kv.valuePanel(page, g);
    return {reinterpret_cast<const unsigned*>(data), static_cast<int>(roundUp(call.width, kPanelGrain))};
  }
  __device__ int width(int n) const {
    constexpr int kFull = kPanel;
    const int left = padded - n / kFull * kFull;
    return left < kFull ? left : kFull;
  }
  __device__ const unsigned* at(int n) const {
    constexpr int kFull = kPanel;
    return words + n / kFull * kFull * (kPage / 2) + n % kFull;
  }
};
__device__ inline const unsigned* keyPanel(const Call& call, int64_t page, int g) {
  return reinterpret_cast<const unsigned*>(static_cast<const BFloat16*>(call.kv.data) + call.kv.keyPanel(page, g));
}

constexpr int kFewRows = 16;  // of a unit, at most: query rows times heads of one key/value head

// Query heads of a unit, and query rows that a tile of few rows may have (attention_few.cu).
constexpr int headsOfUnit(int64_t group) {
  return static_cast<int>(group < kFewRows ? group : kFewRows);
}
constexpr int64_t fewQueries(int64_t group) {
  return kFewRows / headsOfUnit(group);
}

// Attention of tiles of few rows; sizes depend on the numbers of tiles, rows and pages only, not on positions: a graph
// may repeat the launches.
void attendFew(lockstep::cuda::Queue& queue, const Call& call, const std::vector<QueryTile>& tiles);

}  // namespace lockstep::kernels::cuda::attending
