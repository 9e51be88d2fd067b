// Backward attention without atomics, in two passes that each recompute scores from logSumExp as FlashAttention-2 does
// (Dao, 2023): by query tiles for dq, which sees keys in order, and by key tiles for dk and dv, which see the queries
// of each head in order. Nothing is ever length x length.
//
// A tile is 64 positions of a sequence, a page of keys. Of bfloat16 a block of four warps takes one: of queries, for
// one head, a warp its 16 rows; or of keys, for one key/value head and the query heads of one part that share it, a
// warp its 16 keys. Accumulators stay in registers from the first step of their chains to the last, so the chains are
// those of kernels.h: every product walks its k in steps of 16, ascending, and what is invisible is an exact zero. p
// and dS come out of the tensor cores in the very registers in which the next product wants them as its left operand.
//
// Right operands of which pairs lie the wrong way are put together in registers, two words at a time: from (x0, x1) and
// (y0, y1) come (x0, y0) and (x1, y1), which belong to neighbouring columns of the result. So one tile of 8 columns of
// a product takes the even columns of 16, the next the odd ones, and both cost one load of two words.
//
// float32, and heads wider than 128, take plain kernels that give a thread whole chains: they are for tests.
#include "kernels/cuda/attention_backward.h"

#include <algorithm>
#include <vector>

namespace lockstep::kernels::cuda {

using namespace attending_backward;

namespace {

// --- around both passes ----------------------------------------------------------------------------------------------

__global__ void zeroRowsKernel(View<float> x, const int32_t* rows) {
  for (int64_t i = threadIdx.x; i < x.cols; i += kThreads) x.row(rows[blockIdx.x])[i] = 0;
}

// 16 threads per row and head.
__global__ void deltaKernel(Call call) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / 16) + threadIdx.x / 16;
  const int64_t heads = call.heads(), width = call.width(), rows = call.dOut.rows;
  const bool inside = index < rows * heads;
  const int64_t row = inside ? index / heads : 0, h = inside ? index % heads : 0;
  const float sum = lanesSum16(static_cast<int>(threadIdx.x % 16), width, [&](float acc, int64_t k) {
    return fma(load(call.dOut, row, h * width + k), load(call.out, row, h * width + k), acc);
  });
  if (inside && threadIdx.x % 16 == 0) call.delta[h * rows + row] = sum;
}

// The tree over the parts that share a key/value head, on the rows of a tile.
__global__ void joinKernel(Call call, const Tile* tiles) {
  const int heads = call.keyValueHeads(), g = blockIdx.x % heads, width = call.width(), sharers = call.sharers();
  const Tile tile = tiles[blockIdx.x / heads];
  const int count = tile.length - tile.begin < kTile ? tile.length - tile.begin : kTile;
  const int64_t step = call.dqkv.rows * 2 * heads * width;  // from one sharer's to the next one's
  for (int isValue = 0; isValue < 2; ++isValue) {
    const View<float> from = call.keyValueGradient(g, 0, isValue != 0);
    float* to = call.dqkv.data + call.keyValueColumn(g, isValue != 0);
    for (int e = threadIdx.x; e < count * width; e += kThreads) {
      const int64_t row = tile.rowBegin + tile.begin + e / width;
      float* sum = from.row(row) + e % width;
      for (int distance = 1; distance < sharers; distance *= 2) {
        for (int i = 0; i < sharers; i += 2 * distance) sum[i * step] = sum[i * step] + sum[(i + distance) * step];
      }
      to[row * call.dqkv.stride + e % width] = sum[0];
    }
  }
}

// --- bfloat16 on tensor cores ----------------------------------------------------------------------------------------

template <int kWidth>
constexpr int kBlocks = kWidth <= 64 ? 3 : 2;      // that a multiprocessor should have room for
constexpr unsigned kLow = 0x5410, kHigh = 0x7632;  // of __byte_perm: the lower, the upper halves of two words

// As toBFloat16, in the upper half; shorter, since denormals are flushed before they come here.
__device__ inline unsigned roundedBits(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return x == x ? bits + 0x7fffu + (bits >> 16 & 1) : 0x7fc00000u;
}
__device__ inline unsigned roundPair(float low, float high) {
  return __byte_perm(roundedBits(low), roundedBits(high), kHigh);
}

// A page's panels of one head in shared memory, as words of two elements: keys [kWidth / 2][64] (dimensions 2 d and
// 2 d + 1 at a position), values [32][kWidth] (positions 2 s and 2 s + 1 at a dimension); zero beyond the head's width.
// Rows are a multiple of 32 words, so a warp that reads down a column would meet one bank. Chunks of four words
// therefore change places within eight, in an order that depends on the row: so chosen that no read of this file meets
// a bank twice.
template <int kWidth>
struct PageTile {
  static constexpr int kKeyWords = kWidth / 2 * kTile, kWords = 2 * kKeyWords;
  unsigned* words;

  __device__ unsigned* key(int d, int position) const {
    const int swap = (d & 1) * 3 | (d & 2) << 1;
    return words + d * kTile + ((position / 4 ^ swap) * 4 | position % 4);
  }
  __device__ unsigned* value(int s, int dimension) const {
    const int swap = (s & 1) << 1 | ((s >> 1 ^ s >> 2) & 1) << 2;
    return words + kKeyWords + s * kWidth + ((dimension / 4 ^ swap) * 4 | dimension % 4);
  }
  __device__ uint2 keys(int d, int position) const { return *reinterpret_cast<const uint2*>(key(d, position)); }
  __device__ uint2 values(int s, int dimension) const { return *reinterpret_cast<const uint2*>(value(s, dimension)); }

  // Begins to copy a page. A thread always has the same four positions of keys.
  __device__ void copy(const KvPages& kv, int64_t page, int g) const {
    const int position = threadIdx.x % 16 * 4, width = static_cast<int>(kv.headWidth);
    const int valueWidth = static_cast<int>(roundUp(width, kPanelGrain));
    const auto* data = static_cast<const unsigned*>(kv.data);
    const unsigned *keyWords = data + kv.keyPanel(page, g) / 2, *valueWords = data + kv.valuePanel(page, g) / 2;
    for (int d = threadIdx.x / 16; d < kWidth / 2; d += kThreads / 16) {
      cp_async_16(key(d, position), keyWords + d * kTile + position, 2 * d < width);
    }
    constexpr int kChunks = kWidth / 4;
    for (int e = threadIdx.x; e < kTile / 2 * kChunks; e += kThreads) {
      const int s = e / kChunks, i = e % kChunks * 4;
      const int panel = i / static_cast<int>(kPanel) * static_cast<int>(kPanel);
      const int panelWidth = valueWidth - panel < kPanel ? valueWidth - panel : static_cast<int>(kPanel);
      cp_async_16(value(s, i), valueWords + panel * (kTile / 2) + s * panelWidth + i - panel, i < valueWidth);
    }
  }

  // Zeros for keys from `count` on, which nobody has written: a product with dS must not meet NaN. A thread clears what
  // it has copied itself, after its wait.
  __device__ void clearKeysFrom(int count) const {
    const int position = threadIdx.x % 16 * 4;
    for (int p = position; p < position + 4; ++p) {
      if (p < count) continue;
      for (int d = threadIdx.x / 16; d < kWidth / 2; d += kThreads / 16) *key(d, p) = 0;
    }
  }
};

// Two neighbouring elements of a row of which `width` are there; zeros beyond.
template <bool kAligned>
__device__ inline unsigned loadPair(const BFloat16* row, int i, int width) {
  if (kAligned) return i < width ? *reinterpret_cast<const unsigned*>(row + i) : 0;
  const unsigned low = i < width ? row[i].bits : 0, high = i + 1 < width ? row[i + 1].bits : 0;
  return low | high << 16;
}

// Columns 16 t + 4 pair .. + 3 of a row, from the two tiles that hold the even and the odd ones.
template <bool kAligned>
__device__ inline void storeQuad(float* row, int i, int width, float a, float b, float c, float d) {
  if (kAligned) {
    if (i < width) *reinterpret_cast<float4*>(row + i) = {a, b, c, d};
    return;
  }
  if (i < width) row[i] = a;
  if (i + 1 < width) row[i + 1] = b;
  if (i + 2 < width) row[i + 2] = c;
  if (i + 3 < width) row[i + 3] = d;
}

// dq of a tile of queries and one head. kAligned: rows of q, dOut and dqkv, and their heads, begin at multiples of 16
// bytes.
template <int kWidth, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? kBlocks<kWidth> : 2)
    queryGradientKernel(Call call, const Tile* tiles) {
  constexpr int kSteps = kWidth / 16, kHalf = kTile / 2;  // keys are taken 32 at a time
  using Page = PageTile<kWidth>;
  unsigned* const memory = shared_memory<unsigned>();  // two pages
  const int heads = call.heads(), width = call.width(), h = blockIdx.x % heads, g = call.keyValueHeadOf(h);
  const Tile tile = tiles[blockIdx.x / heads];
  const int row = threadIdx.x % kWarp / 4, pair = threadIdx.x % 4;
  const int warpBegin = tile.begin + static_cast<int>(threadIdx.x) / kWarp * kWarpRows;
  const int slot = row / 2 + row % 2 * 4;  // column `row` of a pair of tiles is keys 2 slot and 2 slot + 1 of 16

  unsigned q[kSteps][4], dOut[kSteps][4];
  float logSumExp[2], delta[2];
  int count[2];                                      // keys that a row sees, from this one on
  const int first = call.firstKey(warpBegin + row);  // the second row's is 8 on
  for (int r = 0; r < 2; ++r) {
    const int i = warpBegin + row + r * 8;
    const int64_t at = tile.rowBegin + i;
    const bool inside = i < tile.length;
    count[r] = inside ? call.window : 0;
    logSumExp[r] = inside ? call.logSumExp.row(h)[at] : 0.0f;
    delta[r] = inside ? call.delta[h * call.q.rows + at] : 0.0f;
    const BFloat16* qRow = call.q.template row<BFloat16>(at) + static_cast<int64_t>(h) * width;
    const BFloat16* dOutRow = call.dOut.template row<BFloat16>(at) + static_cast<int64_t>(h) * width;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      for (int part = 0; part < 2; ++part) {
        const int i0 = 16 * k + 8 * part + 2 * pair;
        q[k][2 * part + r] = inside ? loadPair<kAligned>(qRow, i0, width) : 0;
        dOut[k][2 * part + r] = inside ? loadPair<kAligned>(dOutRow, i0, width) : 0;
      }
    }
  }

  float dq[kSteps][2][4] = {};
  const float scale = call.shape.scale;
  const int lowest = call.firstKey(tile.begin), lastPage = tile.begin / kTile;
  const int warpLowest = call.firstKey(warpBegin);
  const int firstPage = lowest > 0 ? lowest / kTile : 0;
  Page{memory}.copy(call.kv, call.pages[tile.pages + firstPage], g);
  cp_async_commit();
  for (int page = firstPage; page <= lastPage; ++page) {
    const int buffer = (page - firstPage) % 2;
    const Page here{memory + buffer * Page::kWords}, next{memory + (buffer ^ 1) * Page::kWords};
    cp_async_wait<0>();
    if (tile.length - page * kTile < kTile) here.clearKeysFrom(tile.length - page * kTile);
    __syncthreads();  // this page is there, and nobody reads the other buffer any more
    if (page < lastPage) {
      next.copy(call.kv, call.pages[tile.pages + page + 1], g);
      cp_async_commit();
    }
    for (int half = 0; half < 2; ++half) {
      const int keyBegin = page * kTile + half * kHalf;
      if (keyBegin >= warpBegin + kWarpRows || keyBegin + kHalf <= warpLowest) continue;  // all invisible
      float s[2][2][4] = {}, dP[2][2][4] = {};
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const int group = half * 2 + t;
          const uint2 k0 = here.keys(8 * k + pair, 16 * group + 2 * slot);
          const uint2 k1 = here.keys(8 * k + pair + 4, 16 * group + 2 * slot);
          mma_m16n8k16_bf16(s[t][0], q[k], {k0.x, k1.x});
          mma_m16n8k16_bf16(s[t][1], q[k], {k0.y, k1.y});
          const uint2 v0 = here.values(8 * group + slot, 16 * k + 2 * pair);
          const uint2 v1 = here.values(8 * group + slot, 16 * k + 2 * pair + 8);
          mma_m16n8k16_bf16(dP[t][0], dOut[k], {__byte_perm(v0.x, v0.y, kLow), __byte_perm(v1.x, v1.y, kLow)});
          mma_m16n8k16_bf16(dP[t][1], dOut[k], {__byte_perm(v0.x, v0.y, kHigh), __byte_perm(v1.x, v1.y, kHigh)});
        }
      }
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        unsigned dS[4];  // of 16 keys: [row, row + 8] x [keys 2 pair, 2 pair + 8, and the next ones]
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = i / 2, j = keyBegin + 16 * t + 2 * pair + i % 2 * 8 - first - 8 * r;
          const auto at = [&](int odd) {
            return gradientOf(scale, s[t][odd][i], logSumExp[r], dP[t][odd][i], delta[r],
                              static_cast<unsigned>(j + odd) < static_cast<unsigned>(count[r]))
                .dS;
          };
          dS[i % 2 * 2 + r] = roundPair(at(0), at(1));
        }
        const int group = half * 2 + t;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          const uint2 k0 = here.keys(8 * k + row, 16 * group + 2 * pair);
          const uint2 k1 = here.keys(8 * k + row, 16 * group + 2 * pair + 8);
          mma_m16n8k16_bf16(dq[k][0], dS, {__byte_perm(k0.x, k0.y, kLow), __byte_perm(k1.x, k1.y, kLow)});
          mma_m16n8k16_bf16(dq[k][1], dS, {__byte_perm(k0.x, k0.y, kHigh), __byte_perm(k1.x, k1.y, kHigh)});
        }
      }
    }
  }

  for (int r = 0; r < 2; ++r) {
    const int i = warpBegin + row + r * 8;
    if (i >= tile.length) continue;
    float* to = call.dqkv.row(tile.rowBegin + i) + call.queryColumn(h);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      storeQuad<kAligned>(to, 16 * k + 4 * pair, width, dq[k][0][2 * r], dq[k][1][2 * r], dq[k][0][2 * r + 1],
                          dq[k][1][2 * r + 1]);
    }
  }
}

// kStageRows rows of one head of q and of dOut in shared memory, with their statistics. Rows are four words longer than
// their elements need, so that eight rows at four words, or four pairs of rows at eight, fall into different banks.
template <int kWidth>
struct QueryStage {
  static constexpr int kStride = kWidth / 2 + 4, kMatrix = kStageRows * kStride;
  static constexpr int kWords = 2 * kMatrix + 2 * kStageRows;
  unsigned* words;

  __device__ const unsigned* q() const { return words; }
  __device__ const unsigned* dOut() const { return words + kMatrix; }
  __device__ float* statistics() const { return reinterpret_cast<float*>(words + 2 * kMatrix); }  // logSumExp, delta
  __device__ float2 pairOf(int statistic, int query) const {
    return *reinterpret_cast<const float2*>(statistics() + statistic * kStageRows + query);
  }

  // Begins to copy positions begin.. of a sequence; zeros from its end on.
  template <bool kAligned>
  __device__ void copy(const Call& call, const Tile& tile, int begin, int h) const {
    const int width = call.width();
    const int64_t column = static_cast<int64_t>(h) * width;
    for (int which = 0; which < 2; ++which) {
      const Operand& x = which == 0 ? call.q : call.dOut;
      unsigned* to = words + which * kMatrix;
      constexpr int kEach = kAligned ? 4 : 1, kAcross = kWidth / 2 / kEach;  // words of a copy, copies of a row
      for (int e = threadIdx.x; e < kStageRows * kAcross; e += kThreads) {
        const int r = e / kAcross, i = e % kAcross * kEach * 2;
        const bool inside = begin + r < tile.length;
        const BFloat16* from = x.template row<BFloat16>(tile.rowBegin + begin + r) + column;
        if constexpr (kAligned) {
          cp_async_16(to + r * kStride + i / 2, from + i, inside && i < width);
        } else {
          to[r * kStride + i / 2] = inside ? loadPair<false>(from, i, width) : 0;
        }
      }
    }
  }
  // What this thread, if it is one of the first 2 kStageRows, has to put into statistics().
  __device__ static float statistic(const Call& call, const Tile& tile, int begin, int h) {
    const int i = begin + static_cast<int>(threadIdx.x) % kStageRows;
    if (threadIdx.x >= 2 * kStageRows || i >= tile.length) return 0;
    const int64_t at = tile.rowBegin + i;
    return threadIdx.x < kStageRows ? call.logSumExp.row(h)[at] : call.delta[h * call.q.rows + at];
  }
  __device__ void keepStatistic(float value) const {
    if (threadIdx.x < 2 * kStageRows) statistics()[threadIdx.x] = value;
  }
};

// acc += left [16 x 16 queries] x rows [16 queries x kWidth].
template <int kWidth>
__device__ inline void accumulateRows(float (&acc)[kWidth / 16][2][4], const unsigned (&left)[4], const unsigned* rows,
                                      int row, int pair) {
  constexpr int kStride = QueryStage<kWidth>::kStride;
#pragma unroll
  for (int k = 0; k < kWidth / 16; ++k) {
    const unsigned* at = rows + 2 * pair * kStride + 8 * k + row;
    const unsigned x0 = at[0], x1 = at[kStride], x8 = at[8 * kStride], x9 = at[9 * kStride];
    mma_m16n8k16_bf16(acc[k][0], left, {__byte_perm(x0, x1, kLow), __byte_perm(x8, x9, kLow)});
    mma_m16n8k16_bf16(acc[k][1], left, {__byte_perm(x0, x1, kHigh), __byte_perm(x8, x9, kHigh)});
  }
}

// dk and dv of a tile of keys and one key/value head, from the query heads of one part. Scores are computed transposed,
// [keys, queries]. Rows `row` and `row + 8` of a warp's product are its keys 2 row and 2 row + 1.
template <int kWidth, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks<kWidth>) keyValueGradientKernel(Call call, const Tile* tiles) {
  constexpr int kSteps = kWidth / 16, kTiles = kStageRows / 8;
  using Page = PageTile<kWidth>;
  using Stage = QueryStage<kWidth>;
  const Page keys{shared_memory<unsigned>()};
  unsigned* const memory = shared_memory<unsigned>() + Page::kWords;  // two stages
  const int sharers = call.sharers(), columns = call.keyValueHeads() * sharers, width = call.width();
  const Tile tile = tiles[blockIdx.x / columns];
  const int g = blockIdx.x % columns / sharers, sharer = blockIdx.x % sharers;
  const int row = threadIdx.x % kWarp / 4, pair = threadIdx.x % 4;
  const int warpKeys = static_cast<int>(threadIdx.x) / kWarp * kWarpRows, warpBegin = tile.begin + warpKeys;
  const int key = warpBegin + 2 * row;
  const int count[2] = {call.queriesOf(key, tile.length), call.queriesOf(key + 1, tile.length)};
  const float scale = call.shape.scale;

  // Stages: head by head, and for each the queries from the tile's first position to the last that sees any of it.
  const int lastKey = (tile.length < tile.begin + kTile ? tile.length : tile.begin + kTile) - 1;
  const int queryEnd = lastKey + call.queriesOf(lastKey, tile.length);
  const int warpEnd = warpBegin + kWarpRows - 1 + call.queriesOf(warpBegin + kWarpRows - 1, tile.length);
  const int warpQueryEnd = warpBegin + kWarpRows - 1 < tile.length ? warpEnd : tile.length;
  const int shared = call.heads() / columns, headEnd = (g * sharers + sharer + 1) * shared;
  int h = headEnd - shared, begin = tile.begin;

  float dk[kSteps][2][4] = {}, dv[kSteps][2][4] = {};
  keys.copy(call.kv, call.pages[tile.pages + tile.begin / kTile], g);
  const Stage first{memory};
  first.template copy<kAligned>(call, tile, begin, h);
  cp_async_commit();
  first.keepStatistic(Stage::statistic(call, tile, begin, h));
  for (int n = 0; h < headEnd; n ^= 1) {
    int nextBegin = begin + kStageRows, nextHead = h;
    if (nextBegin >= queryEnd) nextBegin = tile.begin, ++nextHead;
    cp_async_wait<0>();
    __syncthreads();  // this stage is there, and nobody reads the other one any more
    const Stage here{memory + n * Stage::kWords}, next{memory + (n ^ 1) * Stage::kWords};
    float nextStatistic = 0;
    if (nextHead < headEnd) {
      next.template copy<kAligned>(call, tile, nextBegin, nextHead);
      cp_async_commit();
      nextStatistic = Stage::statistic(call, tile, nextBegin, nextHead);
    }
    if (begin + kStageRows > warpBegin && begin < warpQueryEnd) {  // else all invisible
      float s[kTiles][4] = {}, dP[kTiles][4] = {};
#pragma unroll 2
      for (int k = 0; k < kSteps; ++k) {
        const uint2 k0 = keys.keys(8 * k + pair, warpKeys + 2 * row);
        const uint2 k1 = keys.keys(8 * k + pair + 4, warpKeys + 2 * row);
        const uint2 v0 = keys.values(warpKeys / 2 + row, 16 * k + 2 * pair);
        const uint2 v1 = keys.values(warpKeys / 2 + row, 16 * k + 2 * pair + 8);
        const unsigned left[4] = {k0.x, k0.y, k1.x, k1.y};
        const unsigned leftValues[4] = {__byte_perm(v0.x, v0.y, kLow), __byte_perm(v0.x, v0.y, kHigh),
                                        __byte_perm(v1.x, v1.y, kLow), __byte_perm(v1.x, v1.y, kHigh)};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const int at = (8 * t + row) * Stage::kStride + 8 * k + pair;
          mma_m16n8k16_bf16(s[t], left, {here.q()[at], here.q()[at + 4]});
          mma_m16n8k16_bf16(dP[t], leftValues, {here.dOut()[at], here.dOut()[at + 4]});
        }
      }
#pragma unroll
      for (int v = 0; v < kTiles / 2; ++v) {
        unsigned p[4], dS[4];  // [key, key + 1] x [queries 2 pair and the next, 2 pair + 8 and the next]
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int t = 2 * v + part;
          const float2 logSumExp = here.pairOf(0, 8 * t + 2 * pair), delta = here.pairOf(1, 8 * t + 2 * pair);
          const int i = begin + 8 * t + 2 * pair - key;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const auto visible = [&](int odd) {
              return static_cast<unsigned>(i + odd - r) < static_cast<unsigned>(count[r]);
            };
            const Gradient even = gradientOf(scale, s[t][2 * r], logSumExp.x, dP[t][2 * r], delta.x, visible(0));
            const Gradient odd = gradientOf(scale, s[t][2 * r + 1], logSumExp.y, dP[t][2 * r + 1], delta.y, visible(1));
            p[2 * part + r] = roundPair(even.p, odd.p);
            dS[2 * part + r] = roundPair(even.dS, odd.dS);
          }
        }
        accumulateRows<kWidth>(dv, p, here.dOut() + 16 * v * Stage::kStride, row, pair);
        accumulateRows<kWidth>(dk, dS, here.q() + 16 * v * Stage::kStride, row, pair);
      }
    }
    if (nextHead < headEnd) next.keepStatistic(nextStatistic);
    begin = nextBegin;
    h = nextHead;
  }

  const View<float> dkRows = call.keyValueGradient(g, sharer, false), dvRows = call.keyValueGradient(g, sharer, true);
  for (int r = 0; r < 2; ++r) {
    if (key + r >= tile.length) continue;
    float *toKey = dkRows.row(tile.rowBegin + key + r), *toValue = dvRows.row(tile.rowBegin + key + r);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      storeQuad<kAligned>(toKey, 16 * k + 4 * pair, width, dk[k][0][2 * r], dk[k][1][2 * r], dk[k][0][2 * r + 1],
                          dk[k][1][2 * r + 1]);
      storeQuad<kAligned>(toValue, 16 * k + 4 * pair, width, dv[k][0][2 * r], dv[k][1][2 * r], dv[k][0][2 * r + 1],
                          dv[k][1][2 * r + 1]);
    }
  }
}

// --- plain: any dtype, any width -------------------------------------------------------------------------------------

__device__ inline float loadKey(const KvPages& kv, int64_t page, int g, int s, int64_t i) {
  const int64_t panel = kv.keyPanel(page, g);
  return kv.dtype == DType::kFloat32
             ? static_cast<const float*>(kv.data)[panel + i * kTile + s]
             : toFloat(static_cast<const BFloat16*>(kv.data)[panel + i / 2 * 2 * kTile + 2 * s + i % 2]);
}
__device__ inline float loadValue(const KvPages& kv, int64_t page, int g, int s, int64_t i) {
  const int64_t begin = i / kPanel * kPanel, left = roundUp(kv.headWidth, kPanelGrain) - begin, n = i - begin;
  const int64_t panelWidth = left < kPanel ? left : kPanel, panel = kv.valuePanel(page, g) + begin * kTile;
  return kv.dtype == DType::kFloat32
             ? static_cast<const float*>(kv.data)[panel + s * panelWidth + n]
             : toFloat(static_cast<const BFloat16*>(kv.data)[panel + s / 2 * 2 * panelWidth + 2 * n + s % 2]);
}

// The chain of kernels.h over begin .. end - 1; of a half-visible pair the other half is zero times zero.
template <class A, class B>
__device__ inline float chain(float acc, DType dtype, int64_t begin, int64_t end, const A& a, const B& b) {
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

// p and dS, rounded, of query i and key j of a sequence; zero where the key is invisible.
__device__ inline Gradient plainGradient(const Call& call, const Tile& tile, int i, int j, int h, int g) {
  if (i >= tile.length || j > i || j < call.firstKey(i)) return {0.0f, 0.0f};
  const DType dtype = call.q.dtype;
  const int64_t row = tile.rowBegin + i, width = call.width(), page = call.pages[tile.pages + j / kTile];
  const auto query = [&](int64_t k) { return load(call.q, row, h * width + k); };
  const auto dOut = [&](int64_t k) { return load(call.dOut, row, h * width + k); };
  const auto key = [&](int64_t k) { return loadKey(call.kv, page, g, j % kTile, k); };
  const auto value = [&](int64_t k) { return loadValue(call.kv, page, g, j % kTile, k); };
  const float score = chain(0.0f, dtype, 0, width, query, key), dP = chain(0.0f, dtype, 0, width, dOut, value);
  const Gradient exact =
      gradientOf(call.shape.scale, score, call.logSumExp.row(h)[row], dP, call.delta[h * call.q.rows + row], true);
  if (dtype == DType::kFloat32) return exact;
  return {toFloat(toBFloat16(exact.p)), toFloat(toBFloat16(exact.dS))};
}

// dq of 16 queries and one head; a thread continues its elements in memory, page by page.
__global__ void plainQueryGradientKernel(Call call, const Tile* tiles) {
  __shared__ Shared<float[kPlainRows * kTile]> dSMemory;
  float* dS = dSMemory;
  const int heads = call.heads(), width = call.width(), h = blockIdx.x % heads, g = call.keyValueHeadOf(h);
  const Tile tile = tiles[blockIdx.x / heads / (kTile / kPlainRows)];
  const int begin = tile.begin + static_cast<int>(blockIdx.x / heads % (kTile / kPlainRows)) * kPlainRows;
  const int64_t column = call.queryColumn(h);
  const int lowest = call.firstKey(begin) > 0 ? call.firstKey(begin) : 0;
  if (begin >= tile.length) return;
  for (int base = lowest / kTile * kTile; base < begin + kPlainRows; base += kTile) {
    const int64_t page = call.pages[tile.pages + base / kTile];
    for (int e = threadIdx.x; e < kPlainRows * kTile; e += kThreads) {
      dS[e] = plainGradient(call, tile, begin + e / kTile, base + e % kTile, h, g).dS;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < kPlainRows * width; e += kThreads) {
      const int r = e / width, k = e % width, i = begin + r;
      if (i >= tile.length) break;
      const int first = call.firstKey(i) > 0 ? call.firstKey(i) : 0;
      const int from = first > base ? first - base : 0, to = i + 1 < base + kTile ? i + 1 - base : kTile;
      if (from >= to) continue;
      float* dq = call.dqkv.row(tile.rowBegin + i) + column + k;
      *dq = chain(
          base <= first ? 0.0f : *dq, call.q.dtype, from, to, [&](int64_t j) { return dS[r * kTile + j]; },
          [&](int64_t j) { return loadKey(call.kv, page, g, static_cast<int>(j), k); });
    }
    __syncthreads();
  }
}

// dk and dv of 16 keys, one key/value head and one sharer, 16 queries at a time.
__global__ void plainKeyValueGradientKernel(Call call, const Tile* tiles) {
  __shared__ Shared<float[kPlainRows * kPlainRows]> pMemory;  // [key][query]
  __shared__ Shared<float[kPlainRows * kPlainRows]> dSMemory;
  float *p = pMemory, *dS = dSMemory;
  const int sharers = call.sharers(), columns = call.keyValueHeads() * sharers, width = call.width();
  const int g = blockIdx.x % columns / sharers, sharer = blockIdx.x % sharers;
  const Tile tile = tiles[blockIdx.x / columns / (kTile / kPlainRows)];
  const int keyBegin = tile.begin + static_cast<int>(blockIdx.x / columns % (kTile / kPlainRows)) * kPlainRows;
  const int keyEnd = keyBegin + kPlainRows < tile.length ? keyBegin + kPlainRows : tile.length;
  if (keyBegin >= keyEnd) return;
  const int queryEnd = keyEnd - 1 + call.queriesOf(keyEnd - 1, tile.length);
  const View<float> dkRows = call.keyValueGradient(g, sharer, false), dvRows = call.keyValueGradient(g, sharer, true);
  const int shared = call.heads() / columns, headBegin = (g * sharers + sharer) * shared;
  for (int h = headBegin; h < headBegin + shared; ++h) {
    for (int begin = keyBegin; begin < queryEnd; begin += kPlainRows) {
      for (int e = threadIdx.x; e < kPlainRows * kPlainRows; e += kThreads) {
        const Gradient gradient = plainGradient(call, tile, begin + e % kPlainRows, keyBegin + e / kPlainRows, h, g);
        p[e] = gradient.p;
        dS[e] = gradient.dS;
      }
      __syncthreads();
      for (int e = threadIdx.x; e < (keyEnd - keyBegin) * width; e += kThreads) {
        const int key = e / width, k = e % width, j = keyBegin + key, end = j + call.queriesOf(j, tile.length);
        const int from = j > begin ? j - begin : 0, to = end < begin + kPlainRows ? end - begin : kPlainRows;
        float *dk = dkRows.row(tile.rowBegin + j) + k, *dv = dvRows.row(tile.rowBegin + j) + k;
        if (h == headBegin && begin == keyBegin) *dk = *dv = 0;
        const auto continued = [&](float acc, const float* left, const Operand& x) {
          return chain(
              acc, x.dtype, from, to, [&](int64_t i) { return left[key * kPlainRows + i]; },
              [&](int64_t i) { return load(x, tile.rowBegin + begin + i, static_cast<int64_t>(h) * width + k); });
        };
        *dk = continued(*dk, dS, call.q);
        *dv = continued(*dv, p, call.dOut);
      }
      __syncthreads();
    }
  }
}

// --- on the host -----------------------------------------------------------------------------------------------------

// Tiles of all sequences, twice: for queries, then for keys, each with those that take longest first.
std::vector<Tile> tilesOf(const Sequences& sequences, int64_t window) {
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < sequences.count; ++b) {
    for (int32_t begin = 0; begin < sequences.length[b]; begin += kTile) {
      tiles.push_back(
          {sequences.rowBegin[b], sequences.length[b], begin, static_cast<int32_t>(b * sequences.pageStride)});
    }
  }
  const int64_t most = window > 0 ? window : kNoWindow;
  std::vector<Tile> keyTiles = tiles;
  const auto before = [&](const Tile& t) { return std::min<int64_t>(most, t.begin + kTile); };
  const auto after = [&](const Tile& t) { return std::min<int64_t>(most, t.length - t.begin); };
  std::stable_sort(tiles.begin(), tiles.end(), [&](const Tile& a, const Tile& b) { return before(a) > before(b); });
  std::stable_sort(keyTiles.begin(), keyTiles.end(), [&](const Tile& a, const Tile& b) { return after(a) > after(b); });
  tiles.insert(tiles.end(), keyTiles.begin(), keyTiles.end());
  return tiles;
}

std::vector<int32_t> paddingRows(const Sequences& sequences, int64_t rows) {
  std::vector<int32_t> padding;
  int32_t row = 0;
  for (int64_t b = 0; b < sequences.count; ++b) {
    for (; row < sequences.rowBegin[b]; ++row) padding.push_back(row);
    row = sequences.rowBegin[b] + sequences.length[b];
  }
  for (; row < rows; ++row) padding.push_back(row);
  return padding;
}

std::vector<int32_t> columnsOf(const QkvLayout& layout) {
  const AttentionShape& shape = layout.attention;
  std::vector<int32_t> columns;
  for (int64_t h = 0; h < shape.heads; ++h) columns.push_back(static_cast<int32_t>(layout.queryColumn(h)));
  for (int64_t g = 0; g < shape.keyValueHeads; ++g) columns.push_back(static_cast<int32_t>(layout.keyColumn(g)));
  for (int64_t g = 0; g < shape.keyValueHeads; ++g) columns.push_back(static_cast<int32_t>(layout.valueColumn(g)));
  return columns;
}

// Whether rows, and heads of `width` elements in them, begin at multiples of 16 bytes.
bool isAligned(const void* data, int64_t stride, int64_t width, size_t bytes) {
  const auto each = static_cast<int64_t>(16 / bytes);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % each == 0 && width % each == 0;
}

struct Blocks {
  const Tile *queryTiles, *keyTiles;
  unsigned queries, keys;
};

template <int kWidth, bool kAligned>
void launchOnTensorCores(cudaStream_t stream, const Call& call, const Blocks& blocks) {
  constexpr size_t kPage = PageTile<kWidth>::kWords * sizeof(unsigned);
  constexpr size_t kStage = QueryStage<kWidth>::kWords * sizeof(unsigned);
  launch(queryGradientKernel<kWidth, kAligned>, blocks.queries, kThreads, 2 * kPage, stream, call, blocks.queryTiles);
  launch(keyValueGradientKernel<kWidth, kAligned>, blocks.keys, kThreads, kPage + 2 * kStage, stream, call,
         blocks.keyTiles);
}

template <bool kAligned>
void launchOnTensorCores(cudaStream_t stream, const Call& call, const Blocks& blocks) {
  const int64_t width = call.shape.headWidth;
  const auto launchWidth = width <= 64   ? launchOnTensorCores<64, kAligned>
                           : width <= 96 ? launchOnTensorCores<kWidestUnaligned, kAligned>
                                         : launchOnTensorCores<kWidest, true>;
  launchWidth(stream, call, blocks);
}

void launchPlain(cudaStream_t stream, const Call& call, const Blocks& blocks) {
  constexpr unsigned kEach = kTile / kPlainRows;
  launch(plainQueryGradientKernel, kEach * blocks.queries, kThreads, 0, stream, call, blocks.queryTiles);
  launch(plainKeyValueGradientKernel, kEach * blocks.keys, kThreads, 0, stream, call, blocks.keyTiles);
}

}  // namespace

void attentionBackward(Queue& queue, const QkvLayout& layout, Operand q, const KvPages& kv, const Sequences& sequences,
                       Operand out, View<const float> logSumExp, Operand dOut, View<float> dqkv) {
  lockstep::cuda::Queue& gpu = onGpu(queue);
  cudaStream_t const stream = gpu.stream();
  const std::vector<int32_t> padding = paddingRows(sequences, dqkv.rows);
  if (!padding.empty()) {
    const int32_t* rows = gpu.stage(padding.data(), static_cast<int64_t>(padding.size()));
    launch(zeroRowsKernel, blocksFor(static_cast<int64_t>(padding.size()), 1), kThreads, 0, stream, dqkv, rows);
  }
  if (sequences.count == 0) return;

  const AttentionShape& shape = layout.attention;
  const int64_t sharers = std::max<int64_t>(1, shape.parts / shape.keyValueHeads), rows = dqkv.rows;
  const std::vector<Tile> tiles = tilesOf(sequences, shape.window);
  const auto count = static_cast<int64_t>(tiles.size() / 2);
  const int64_t deltas = roundUp(shape.heads * rows, 64);
  const int64_t partials = sharers > 1 ? sharers * rows * 2 * shape.keyValueHeads * shape.headWidth : 0;
  const std::vector<int32_t> columns = columnsOf(layout);
  float* scratch = gpu.scratchOf<float>(deltas + partials);
  const Call call{.shape = shape,
                  .window = shape.window > 0 ? static_cast<int>(shape.window) : kNoWindow,
                  .q = q,
                  .out = out,
                  .dOut = dOut,
                  .kv = kv,
                  .logSumExp = logSumExp,
                  .dqkv = dqkv,
                  .pages = gpu.stage(sequences.pages, sequences.count * sequences.pageStride),
                  .columns = gpu.stage(columns.data(), static_cast<int64_t>(columns.size())),
                  .delta = scratch,
                  .partial = partials > 0 ? scratch + deltas : nullptr};
  const Tile* staged = gpu.stage(tiles.data(), 2 * count);
  const Blocks blocks{staged, staged + count, blocksFor(count * shape.heads, 1),
                      blocksFor(count * shape.keyValueHeads * sharers, 1)};
  launch(deltaKernel, blocksFor(rows * shape.heads, kThreads / 16), kThreads, 0, stream, call);
  const bool aligned = isAligned(q.data, q.stride, shape.headWidth, 2) &&
                       isAligned(dOut.data, dOut.stride, shape.headWidth, 2) &&
                       isAligned(dqkv.data, dqkv.stride, shape.headWidth, 4);
  // Wide heads leave no registers for what unaligned rows take.
  if (q.dtype == DType::kFloat32 || shape.headWidth > (aligned ? kWidest : kWidestUnaligned)) {
    launchPlain(stream, call, blocks);
  } else if (aligned) {
    launchOnTensorCores<true>(stream, call, blocks);
  } else {
    launchOnTensorCores<false>(stream, call, blocks);
  }
  if (sharers > 1) {
    launch(joinKernel, blocksFor(count * shape.keyValueHeads, 1), kThreads, 0, stream, call, staged + count);
  }
}

}  // namespace lockstep::kernels::cuda
