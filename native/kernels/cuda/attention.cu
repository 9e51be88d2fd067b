// Softmax attention over pages of keys and values (Vaswani et al., 2017; online softmax: Milakov and Gimelshein, 2018;
// on registers of tensor cores: Dao, 2023).
//
// Of bfloat16 there are two ways through the same sums. Long sequences: a block takes 64 query rows of one head through
// the pages that they see, a warp 16 of them; scores become weights in the very registers that the next product reads.
// Few rows (decode): the rows are the query heads that share a key/value head, and the steps that need no order go in
// parallel: scores of all pages; then, a block per row, maxima, weights and their sums; then, a warp per 32 dimensions,
// the one chain that is left.
//
// Why bits hold: a score is one chain of `mma` over K from zero, an output one chain over the slots of a page in steps
// of 16 that continues from o a; which rows share a tile or what kernel it is changes neither. Slots that a row does
// not see have weight 0; values that no row of a tile sees, which may be NaN, are zeroed as they are read. Sums of
// weights are lanes sums over the 64 slots of a page, spread over the threads as the fragments of `mma` are.
#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/cuda/cuda.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr int kPage = static_cast<int>(kPagePositions);
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// --- what the kernels share
// --------------------------------------------------------------------------------------------

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
__device__ Slots visible(const Call& call, int base, int first, int last) {
  const int begin = call.firstVisible(first) - base, end = last + 1 - base;
  return {begin > 0 ? begin : 0, end < kPage ? end : kPage};
}
__device__ Slots visible(const Call& call, int base, int position) {
  return visible(call, base, position, position);
}

// The bits of a pair of slots of which only `slots` count.
__device__ unsigned maskOfPair(Slots slots, int even) {
  return (slots.has(even) ? 0xffffu : 0u) | (slots.has(even + 1) ? 0xffff0000u : 0u);
}

// A pair of weights as bfloat16. They are zero, normal or NaN, which spares the branches of toBFloat16.
__device__ unsigned weightPair(float even, float odd) {
  const auto upper = [](float x) {
    const unsigned bits = std::bit_cast<unsigned>(x);
    return x != x ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
  };
  return __byte_perm(upper(even), upper(odd), 0x7632);
}

// The pair of dimensions i, i + 1 of a head of a row of q; zeros past its width.
__device__ unsigned queryPair(const Call& call, int64_t row, int h, int i) {
  if (i >= call.width) return 0;
  const BFloat16* x = call.q.row<BFloat16>(row) + static_cast<int64_t>(h) * call.width + i;
  if (call.wholePairs) return *reinterpret_cast<const unsigned*>(x);
  return x[0].bits | (i + 1 < call.width ? static_cast<unsigned>(x[1].bits) << 16 : 0u);
}

// The same of out; n is even.
__device__ void storePair(const Call& call, int64_t row, int h, int n, float even, float odd) {
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
__device__ const unsigned* keyPanel(const Call& call, int64_t page, int g) {
  return reinterpret_cast<const unsigned*>(static_cast<const BFloat16*>(call.kv.data) + call.kv.keyPanel(page, g));
}

// --- many rows, bfloat16
// -----------------------------------------------------------------------------------------------

constexpr int kTileRows = 64, kTileThreads = kTileRows / 16 * kWarp;
// Words between pairs of dimensions of a key, 8 (mod 32): the 4 x 8 words of a fragment's register lie in 32 banks. So
// do 8 x 4 words of q, at 4 (mod 8) words between rows, and 4 x 8 of values.
constexpr int kKeyStride = kPage + 8;

// 8 kTiles dimensions of the output to a block: all K <= 16 kSteps of them, or (kSteps 0) a slice.
template <int kSteps, int kTiles>
class TileKernel {
 public:
  static constexpr int kDimensions = 8 * kTiles, kValueStride = kDimensions + 8;

  static_assert(kSteps == 0 || 16 * kSteps == kDimensions);
  static int slices(int64_t width) {
    return kSteps > 0 ? 1 : static_cast<int>((width + kDimensions - 1) / kDimensions);
  }
  static size_t sharedBytes(int64_t width) {
    const int64_t pairs = roundUp(width, 16) / 2;
    return 4 * static_cast<size_t>(kTileRows * (pairs + 4) + pairs * kKeyStride + kPage / 2 * kValueStride);
  }

  __device__ __forceinline__ TileKernel(const Call& call, const QueryTile& tile, int h, int dimension)
      : call_(call),
        tile_(tile),
        h_(h),
        g_(h / call.group),
        dimension_(dimension),
        pairs_(static_cast<int>(roundUp(call.width, 16)) / 2),
        queries_(shared_memory<unsigned>()),
        keys_(queries_ + kTileRows * (pairs_ + 4)),
        values_(keys_ + pairs_ * kKeyStride) {}

  __device__ __forceinline__ void run() {
    const int begin = call_.pageBegin(tile_), end = call_.pageEnd(tile_);
    copyKeys(begin);
    copyQueries();
    __syncthreads();
    loadQueries();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      m_[half] = kLowest;
      l_[half] = 0;
    }
#pragma unroll
    for (auto& tile : o_)
      for (float& x : tile) x = 0;
    for (int page = begin; page < end; ++page) {
      cp_async_wait<0>();
      __syncthreads();  // the keys are there for all, and all have used the values before
      copyValues(page);
      float s[kPage / 8][4];
      scores(s);
      float a[2];
      softmax(s, page * kPage, a);
      cp_async_wait<0>();
      __syncthreads();  // the values are there for all, and all have used the keys
      if (page + 1 < end) copyKeys(page + 1);
      weigh(s, a);
    }
    finish();
  }

 private:
  static __device__ int lane() {
    return static_cast<int>(threadIdx.x) % kWarp;
  }
  // The first of this thread's two rows of the tile; the other is 8 below.
  static __device__ int row() {
    return static_cast<int>(threadIdx.x) / kWarp * 16 + lane() / 4;
  }

  __device__ __forceinline__ void copyQueries() {
    for (int index = threadIdx.x; index < kTileRows * pairs_; index += kTileThreads) {
      const int r = index / pairs_, pair = index - r * pairs_;
      queries_[r * (pairs_ + 4) + pair] = r < tile_.count ? queryPair(call_, tile_.row + r, h_, 2 * pair) : 0;
    }
  }
  // Slots that no row sees may come as NaN: their scores are not used.
  __device__ __forceinline__ void copyKeys(int page) {
    constexpr int kCopies = kPage / 4, kPairsAtOnce = kTileThreads / kCopies;
    const int column = static_cast<int>(threadIdx.x) % kCopies * 4, pairs = (call_.width + 1) / 2;
    const unsigned* from = keyPanel(call_, call_.pageOf(tile_, page), g_) + column;
#pragma unroll 2
    for (int pair = static_cast<int>(threadIdx.x) / kCopies; pair < pairs_; pair += kPairsAtOnce)
      cp_async_16(keys_ + pair * kKeyStride + column, pair < pairs ? from + pair * kPage : from, pair < pairs);
    cp_async_commit();
  }
  __device__ __forceinline__ void copyValues(int page) {
    constexpr int kCopies = kDimensions / 4, kPairsAtOnce = kTileThreads / kCopies;
    const int column = static_cast<int>(threadIdx.x) % kCopies * 4, n = dimension_ + column;
    const ValuePanel panel = ValuePanel::of(call_, call_.pageOf(tile_, page), g_);
    const Slots slots = visible(call_, page * kPage, tile_.position, tile_.position + tile_.count - 1);
    if (n < panel.padded && static_cast<int>(threadIdx.x) < kPairsAtOnce * kCopies) {
      const unsigned* from = panel.at(n);
      const int w = panel.width(n);
      const bool isWhole = slots.begin == 0 && slots.end == kPage;
#pragma unroll 1
      for (int pair = static_cast<int>(threadIdx.x) / kCopies; pair < kPage / 2; pair += kPairsAtOnce) {
        const unsigned mask = isWhole ? ~0u : maskOfPair(slots, 2 * pair);
        unsigned* to = values_ + pair * kValueStride + column;
        if (mask == 0 || mask == ~0u) {
          cp_async_16(to, from + pair * w, mask != 0);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) to[i] = from[pair * w + i] & mask;
        }
      }
    }
    cp_async_commit();
  }

  __device__ __forceinline__ void loadQuery(int step, unsigned (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = queries_[(row() + i % 2 * 8) * (pairs_ + 4) + step * 8 + lane() % 4 + i / 2 * 4];
  }
  __device__ __forceinline__ void loadQueries() {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      if (8 * step < pairs_) loadQuery(step, q_[step]);
  }

  __device__ __forceinline__ void scores(float (&s)[kPage / 8][4]) const {
#pragma unroll
    for (auto& tile : s)
      for (float& x : tile) x = 0;
    const unsigned* keys = keys_ + lane() % 4 * kKeyStride + lane() / 4;
    const auto multiply = [&](int step, const unsigned(&a)[4]) {
#pragma unroll
      for (int t = 0; t < kPage / 8; ++t) {
        const unsigned b[2] = {keys[8 * step * kKeyStride + 8 * t], keys[(8 * step + 4) * kKeyStride + 8 * t]};
        mma_m16n8k16_bf16(s[t], a, b);
      }
    };
    if constexpr (kSteps > 0) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        if (8 * step < pairs_) multiply(step, q_[step]);
    } else {
      for (int step = 0; 8 * step < pairs_; ++step) {
        unsigned a[4];
        loadQuery(step, a);
        multiply(step, a);
      }
    }
  }

  // Scores become weights, m and l move on; a: by how much o shrinks.
  __device__ __forceinline__ void softmax(float (&s)[kPage / 8][4], int base, float (&a)[2]) {
    const int last = tile_.position + tile_.count - 1;
    const bool isWhole = base + kPage <= tile_.position + 1 && call_.firstVisible(last) <= base;  // for all rows
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row() + 8 * half, position = tile_.position + (r < tile_.count ? r : tile_.count - 1);
      const Slots slots = visible(call_, base, position);
      float top = m_[half];
#pragma unroll
      for (int t = 0; t < kPage / 8; ++t) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[t][2 * half + j];
          x = call_.scale * x;
          if (!isWhole && !slots.has(8 * t + lane() % 4 * 2 + j)) x = kLowest;
          top = maximum(top, x);
        }
      }
#pragma unroll
      for (int across = 1; across <= 2; across *= 2) top = maximum(top, __shfl_xor_sync(kAllLanes, top, across));
      // A row that sees nothing of the page stays as it is; its weights are exp(-inf).
      const float shift = slots.empty() ? 0.0f : top;
      a[half] = slots.empty() ? 1.0f : exp(m_[half] - shift);
      // Of the lanes sum this thread has the lanes 2 (lane % 4) + {0, 1} + {0, 8}.
      float sum[2][2] = {};
#pragma unroll
      for (int t = 0; t < kPage / 8; ++t) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[t][2 * half + j];
          x = exp(x - shift);
          sum[t % 2][j] = sum[t % 2][j] + x;
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sum[0][j] = sum[0][j] + sum[1][j];
#pragma unroll
        for (int across = 2; across >= 1; across /= 2)
          sum[0][j] = sum[0][j] + __shfl_xor_sync(kAllLanes, sum[0][j], across);
      }
      l_[half] = fma(l_[half], a[half], sum[0][0] + sum[0][1]);
      m_[half] = top;
    }
  }

  // o = o a + weights values. Two neighbouring fragments of scores are, rounded, one of the left operand.
  __device__ __forceinline__ void weigh(const float (&s)[kPage / 8][4], const float (&a)[2]) {
#pragma unroll
    for (auto& tile : o_)
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[i] = tile[i] * a[i / 2];
    const unsigned* values = values_ + lane() % 4 * kValueStride + lane() / 4;
#pragma unroll
    for (int step = 0; step < kPage / 16; ++step) {
      unsigned p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&from)[4] = s[2 * step + i / 2];
        p[i] = weightPair(from[i % 2 * 2], from[i % 2 * 2 + 1]);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {  // past the last dimension too: nobody reads what comes of it
        const unsigned b[2] = {values[8 * step * kValueStride + 8 * t], values[(8 * step + 4) * kValueStride + 8 * t]};
        mma_m16n8k16_bf16(o_[t], p, b);
      }
    }
  }

  __device__ __forceinline__ void finish() const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row() + 8 * half;
      if (r >= tile_.count) continue;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        storePair(call_, tile_.row + r, h_, dimension_ + 8 * t + lane() % 4 * 2, o_[t][2 * half] / l_[half],
                  o_[t][2 * half + 1] / l_[half]);
      }
      if (!call_.logSumExp.empty() && lane() % 4 == 0 && dimension_ == 0)
        call_.logSumExp.row(h_)[tile_.row + r] = m_[half] + log(l_[half]);
    }
  }

  const Call& call_;
  const QueryTile& tile_;
  const int h_, g_, dimension_, pairs_;  // pairs of dimensions, padded
  unsigned *queries_, *keys_, *values_;
  unsigned q_[kSteps > 0 ? kSteps : 1][4];
  float o_[kTiles][4];
  float m_[2], l_[2];  // of this thread's rows
};

template <int kSteps, int kTiles>
__global__ void __launch_bounds__(kTileThreads, kTiles > 8 ? 3 : 4) tileKernel(Call call, int slices) {
  if (kSteps > 0) slices = 1;
  const int index = static_cast<int>(blockIdx.x) / slices, slice = static_cast<int>(blockIdx.x) % slices;
  const QueryTile tile = call.tiles[index / call.heads];
  TileKernel<kSteps, kTiles>(call, tile, index % call.heads, slice * 8 * kTiles).run();
}

template <int kSteps, int kTiles>
void launchTiles(cudaStream_t stream, const Call& call, int64_t tiles) {
  using Kernel = TileKernel<kSteps, kTiles>;
  const int slices = Kernel::slices(call.width);
  launch(tileKernel<kSteps, kTiles>, blocksFor(tiles * call.heads * slices, 1), kTileThreads,
         Kernel::sharedBytes(call.width), stream, call, slices);
}

// --- few rows, bfloat16
// ------------------------------------------------------------------------------------------------

constexpr int kFewRows = 16;  // of a unit, at most: query rows times heads of one key/value head
constexpr int kScoreThreads = 128, kWeightThreads = 128, kSlice = 32, kStages = 8;

// A unit is a tile and `heads` of the query heads that share a key/value head. Its row r is query row r / heads of the
// tile, head r % heads. Of each of its pages there are, one page after the other,
//   scores   [rows][64]
//   weights  [32 lanes][4 steps][2 or 4]: the fragments of the left operand, with 2 words when rows 8..15 do not exist
//   shrink   [16]: by how much the o of a row shrinks before the page
// and of the unit l [16].
struct FewCall {
  Call call;
  int heads, splits, rows, pages;  // splits: units of a tile and key/value head; pages: room for that many
  float* scores;
  unsigned* weights;
  float *shrink, *l;

  constexpr int unitsOfTile() const { return call.heads / call.group * splits; }
  constexpr int halves() const { return rows > 8 ? 2 : 1; }
  constexpr int64_t weightWords() const { return kPage / 2 * 8 * halves(); }
  constexpr int64_t bytesOfUnit() const { return 4 * (pages * (rows * kPage + weightWords() + kFewRows) + kFewRows); }
};

struct Unit {
  QueryTile tile;
  int g, headBegin, headEnd;
  int64_t page;  // of scratch, the first

  __device__ static Unit of(const FewCall& few, int64_t index) {
    const int units = few.unitsOfTile(), within = static_cast<int>(index % units), g = within / few.splits;
    const int end = (g + 1) * few.call.group, begin = g * few.call.group + within % few.splits * few.heads;
    return {few.call.tiles[index / units], g, begin, begin + few.heads < end ? begin + few.heads : end,
            index * few.pages};
  }
  // Query row and head of row r.
  __device__ int query(const FewCall& few, int r) const { return r / few.heads; }
  __device__ int head(const FewCall& few, int r) const { return headBegin + r % few.heads; }
  __device__ bool has(const FewCall& few, int r) const {
    return r < few.rows && query(few, r) < tile.count && head(few, r) < headEnd;
  }
};

// A warp takes 32 slots of a page, straight from the page: a thread reads 4 neighbouring slots at a time, which it
// gives to 4 products, so that slot 4 c + t is column c of product t.
__global__ void __launch_bounds__(kScoreThreads) scoreKernel(FewCall few) {
  const Call& call = few.call;
  const Unit unit = Unit::of(few, blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int item = static_cast<int>(blockIdx.y * kScoreThreads + threadIdx.x) / kWarp;
  const int index = item / 2, first = item % 2 * 32, page = call.pageBegin(unit.tile) + index;
  if (page >= call.pageEnd(unit.tile)) return;
  const unsigned* keys = keyPanel(call, call.pageOf(unit.tile, page), unit.g) + first + lane / 4 * 4;
  const int steps = (call.width + 15) / 16, pairs = (call.width + 1) / 2, row = lane / 4;
  bool has[2];
  for (int half = 0; half < 2; ++half) has[half] = unit.has(few, row + 8 * half);
  float s[4][4] = {};
#pragma unroll 4
  for (int step = 0; step < steps; ++step) {
    const int pair = step * 8 + lane % 4;
    unsigned a[4];
    uint4 b[2];
    for (int i = 0; i < 4; ++i) {
      const int r = row + i % 2 * 8;
      a[i] = has[i % 2] ? queryPair(call, unit.tile.row + unit.query(few, r), unit.head(few, r), 2 * (pair + i / 2 * 4))
                        : 0;
    }
    for (int i = 0; i < 2; ++i) {
      const int at = pair + 4 * i;
      b[i] = at < pairs ? *reinterpret_cast<const uint4*>(keys + at * kPage) : uint4{0, 0, 0, 0};
    }
    mma_m16n8k16_bf16(s[0], a, {b[0].x, b[1].x});
    mma_m16n8k16_bf16(s[1], a, {b[0].y, b[1].y});
    mma_m16n8k16_bf16(s[2], a, {b[0].z, b[1].z});
    mma_m16n8k16_bf16(s[3], a, {b[0].w, b[1].w});
  }
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half;
    if (!has[half]) continue;
    float* to = few.scores + ((unit.page + index) * few.rows + r) * kPage + first + lane % 4 * 8;
    for (int j = 0; j < 2; ++j) {
      const int i = 2 * half + j;
      *reinterpret_cast<float4*>(to + 4 * j) = {call.scale * s[0][i], call.scale * s[1][i], call.scale * s[2][i],
                                                call.scale * s[3][i]};
    }
  }
}

// A block takes a row. A warp takes a page, a thread a pair of its slots.
__global__ void __launch_bounds__(kWeightThreads) weightKernel(FewCall few) {
  const Call& call = few.call;
  const Unit unit = Unit::of(few, blockIdx.x / few.rows);
  const int r = static_cast<int>(blockIdx.x % few.rows);
  if (!unit.has(few, r)) return;
  float *tops = shared_memory<float>(), *sums = tops + few.pages, *shrinks = sums + few.pages;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int begin = call.pageBegin(unit.tile), count = call.pageEnd(unit.tile) - begin;
  const int position = unit.tile.position + unit.query(few, r);
  const auto slotsOf = [&](int index) { return visible(call, (begin + index) * kPage, position); };
  const auto scoresOf = [&](int index) {
    return *reinterpret_cast<const float2*>(few.scores + ((unit.page + index) * few.rows + r) * kPage + 2 * lane);
  };
  for (int index = warp; index < count; index += kWeightThreads / kWarp) {
    const Slots slots = slotsOf(index);
    const float2 s = scoresOf(index);
    float top = maximum(slots.has(2 * lane) ? s.x : kLowest, slots.has(2 * lane + 1) ? s.y : kLowest);
    for (int across = 1; across < kWarp; across *= 2) top = maximum(top, __shfl_xor_sync(kAllLanes, top, across));
    if (lane == 0) tops[index] = top;
  }
  __syncthreads();
  if (warp == 0) {  // the maximum so far of every page
    float before = kLowest;
    for (int first = 0; first < count; first += kWarp) {
      float top = first + lane < count ? tops[first + lane] : kLowest;
      for (int by = 1; by < kWarp; by *= 2) {
        const float lower = __shfl_up_sync(kAllLanes, top, by);
        if (lane >= by) top = maximum(lower, top);
      }
      top = maximum(before, top);
      if (first + lane < count) tops[first + lane] = top;
      before = __shfl_sync(kAllLanes, top, kWarp - 1);
    }
  }
  __syncthreads();
  for (int index = warp; index < count; index += kWeightThreads / kWarp) {
    const Slots slots = slotsOf(index);
    const float2 s = scoresOf(index);
    const float top = tops[index];
    float e[2] = {slots.has(2 * lane) ? exp(s.x - top) : 0.0f, slots.has(2 * lane + 1) ? exp(s.y - top) : 0.0f};
    const int halves = few.halves();
    few.weights[(unit.page + index) * few.weightWords() + (r % 8 * 4 + lane % 4) * 8 * halves + lane / 8 * 2 * halves +
                lane / 4 % 2 * halves + r / 8] = weightPair(e[0], e[1]);
    // Threads 0..7 get the lanes 2 i and 2 i + 1 of the lanes sum.
    for (float& x : e) {
      const float second = __shfl_sync(kAllLanes, x, lane % 8 + 8), third = __shfl_sync(kAllLanes, x, lane % 8 + 16),
                  fourth = __shfl_sync(kAllLanes, x, lane % 8 + 24);
      x = x + second + third + fourth;
      for (int across = 4; across >= 1; across /= 2) x = x + __shfl_xor_sync(kAllLanes, x, across);
    }
    if (lane != 0) continue;
    const float a = slots.empty() ? 1.0f : exp((index == 0 ? kLowest : tops[index - 1]) - top);
    sums[index] = e[0] + e[1];
    shrinks[index] = a;
    few.shrink[(unit.page + index) * kFewRows + r] = a;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  float l = 0;
  for (int index = 0; index < count; ++index) l = fma(l, shrinks[index], sums[index]);
  few.l[blockIdx.x / few.rows * kFewRows + r] = l;
  if (!call.logSumExp.empty())
    call.logSumExp.row(unit.head(few, r))[unit.tile.row + unit.query(few, r)] = tops[count - 1] + log(l);
}

// A block is one warp, which takes 32 dimensions of a unit through all pages, some pages ahead of itself. A thread
// copies just the words that it will read, so nothing has to be waited for but its own copies. As above, dimension
// 4 c + t is column c of product t.
template <int kHalves>
__global__ void __launch_bounds__(kWarp) chainKernel(FewCall few, int slices) {
  const Call& call = few.call;
  const int64_t at = blockIdx.x / slices;
  const Unit unit = Unit::of(few, at);
  const int lane = static_cast<int>(threadIdx.x), n = static_cast<int>(blockIdx.x % slices) * kSlice + lane / 4 * 4;
  const int begin = call.pageBegin(unit.tile), count = call.pageEnd(unit.tile) - begin;
  // A stage, in units of 16 bytes per thread: 8 of values, 2 or 4 of weights, 1 or 2 of shrink.
  constexpr int kUnits = 8 + 3 * kHalves;
  uint4* shared = shared_memory<uint4>() + lane;
  const auto copy = [&](int index) {
    if (index < count) {
      uint4* to = shared + index % kStages * kUnits * kWarp;
      const ValuePanel panel = ValuePanel::of(call, call.pageOf(unit.tile, begin + index), unit.g);
      const bool exists = n < panel.padded;
      const int w = exists ? panel.width(n) : 0;
      const unsigned* values = exists ? panel.at(n) + lane % 4 * w : panel.words;
#pragma unroll
      for (int i = 0; i < 8; ++i) cp_async_16(to + i * kWarp, values + 4 * i * w, exists);
      const unsigned* weights = few.weights + (unit.page + index) * few.weightWords() + lane * 8 * kHalves;
#pragma unroll
      for (int i = 0; i < 2 * kHalves; ++i) cp_async_16(to + (8 + i) * kWarp, weights + 4 * i);
      const float* shrink = few.shrink + (unit.page + index) * kFewRows + lane / 16 * 4;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) cp_async_16(to + (8 + 2 * kHalves + half) * kWarp, shrink + 8 * half);
    }
    cp_async_commit();
  };
  float o[4][4] = {};
  for (int index = 0; index + 1 < kStages; ++index) copy(index);
  for (int index = 0; index < count; ++index) {
    cp_async_wait<kStages - 2>();
    copy(index + kStages - 1);
    const uint4* from = shared + index % kStages * kUnits * kWarp;
    unsigned v[8][4], p[4][2 * kHalves];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint4 word = from[i * kWarp];
      v[i][0] = word.x, v[i][1] = word.y, v[i][2] = word.z, v[i][3] = word.w;
    }
#pragma unroll
    for (int i = 0; i < 2 * kHalves; ++i) {
      const uint4 word = from[(8 + i) * kWarp];
      const unsigned words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) p[(4 * i + k) / (2 * kHalves)][(4 * i + k) % (2 * kHalves)] = words[k];
    }
    const int base = (begin + index) * kPage, last = unit.tile.position + unit.tile.count - 1;
    const Slots slots = visible(call, base, unit.tile.position, last);
    if (slots.begin > 0 || slots.end < kPage) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const unsigned mask = maskOfPair(slots, 2 * (lane % 4 + 4 * i));
#pragma unroll
        for (int t = 0; t < 4; ++t) v[i][t] &= mask;
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const float a = reinterpret_cast<const float*>(from + (8 + 2 * kHalves + half) * kWarp)[lane / 4 % 4];
#pragma unroll
      for (int t = 0; t < 4; ++t)
        for (int j = 0; j < 2; ++j) o[t][2 * half + j] = o[t][2 * half + j] * a;
    }
#pragma unroll
    for (int step = 0; step < kPage / 16; ++step) {
      const unsigned a[4] = {p[step][0], kHalves == 2 ? p[step][1] : 0, p[step][kHalves],
                             kHalves == 2 ? p[step][kHalves + 1] : 0};
#pragma unroll
      for (int t = 0; t < 4; ++t) mma_m16n8k16_bf16(o[t], a, {v[2 * step][t], v[2 * step + 1][t]});
    }
  }
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const int r = lane / 4 + 8 * half;
    if (!unit.has(few, r)) continue;
    const float l = few.l[at * kFewRows + r];
    const int first = static_cast<int>(blockIdx.x % slices) * kSlice + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      storePair(call, unit.tile.row + unit.query(few, r), unit.head(few, r), first + i, o[i % 4][2 * half + i / 4] / l,
                o[i % 4 + 1][2 * half + i / 4] / l);
    }
  }
}

// Query heads of a unit, and query rows that a tile of few rows may have.
int headsOfUnit(int64_t group) {
  return static_cast<int>(std::min<int64_t>(group, kFewRows));
}
int64_t fewQueries(int64_t group) {
  return kFewRows / headsOfUnit(group);
}

// Sizes depend on the numbers of tiles, rows and pages only, not on positions: a graph may repeat the launches.
void attendFew(lockstep::cuda::Queue& queue, const Call& call, const std::vector<QueryTile>& tiles) {
  constexpr int64_t kMostBytes = int64_t{128} << 20;
  int queries = 1;
  for (const QueryTile& tile : tiles) queries = std::max(queries, tile.count);
  FewCall few{};
  few.call = call;
  few.heads = headsOfUnit(call.group);
  few.splits = (call.group + few.heads - 1) / few.heads;
  few.rows = queries * few.heads;
  few.pages = static_cast<int>(call.pageStride);
  if (call.window > 0) few.pages = std::min(few.pages, (std::min(call.window, 1 << 30) + queries - 2) / kPage + 2);
  const auto count = static_cast<int64_t>(tiles.size());
  const int64_t bytesOfTile = few.bytesOfUnit() * few.unitsOfTile();
  const int64_t atOnce = std::min(count, std::max<int64_t>(1, kMostBytes / bytesOfTile));
  char* scratch = static_cast<char*>(queue.scratch(static_cast<size_t>(atOnce * bytesOfTile)));
  const int64_t units = atOnce * few.unitsOfTile(), pages = units * few.pages;
  few.scores = reinterpret_cast<float*>(scratch);
  few.weights = reinterpret_cast<unsigned*>(few.scores + pages * few.rows * kPage);
  few.shrink = reinterpret_cast<float*>(few.weights + pages * few.weightWords());
  few.l = few.shrink + pages * kFewRows;
  few.call.tiles = queue.stage(tiles.data(), count);
  cudaStream_t const stream = queue.stream();
  const int slices = (call.width + kSlice - 1) / kSlice;
  for (int64_t begin = 0; begin < count; begin += atOnce, few.call.tiles += atOnce) {
    const int64_t blocks = std::min(atOnce, count - begin) * few.unitsOfTile();
    launch(scoreKernel, dim3(blocksFor(blocks, 1), blocksFor(2 * few.pages, kScoreThreads / kWarp)), kScoreThreads, 0,
           stream, few);
    launch(weightKernel, blocksFor(blocks * few.rows, 1), kWeightThreads, 3 * sizeof(float) * few.pages, stream, few);
    launch(few.halves() == 1 ? chainKernel<1> : chainKernel<2>, blocksFor(blocks * slices, 1), kWarp,
           static_cast<size_t>(kStages * kWarp * 16 * (8 + 3 * few.halves())), stream, few, slices);
  }
}

// --- float32
// -----------------------------------------------------------------------------------------------------------

// A block takes one row of one head; a thread has a slot, then some dimensions.
__global__ void __launch_bounds__(kPage) rowKernel(Call call) {
  __shared__ Shared<float[kPage]> shared;
  __shared__ Shared<float[1]> total;
  float *scores = shared, *sum = total, *o = shared_memory<float>();
  const int h = static_cast<int>(blockIdx.x) % call.heads, g = h / call.group, j = static_cast<int>(threadIdx.x);
  const QueryTile tile = call.tiles[blockIdx.x / call.heads];
  if (static_cast<int>(blockIdx.y) >= tile.count) return;
  const int position = tile.position + static_cast<int>(blockIdx.y), padded = static_cast<int>(roundUp(call.width, 16));
  const int64_t row = tile.row + blockIdx.y;
  const float* q = call.q.row<float>(row) + static_cast<int64_t>(h) * call.width;
  for (int i = j; i < call.width; i += kPage) o[i] = 0;
  float m = kLowest, l = 0;
  for (int page = call.firstVisible(position) / kPage; page <= position / kPage; ++page) {
    const int64_t at = call.pageOf(tile, page);
    const Slots slots = visible(call, page * kPage, position);
    const float* keys = static_cast<const float*>(call.kv.data) + call.kv.keyPanel(at, g);
    float s = 0;
    for (int i = 0; i < call.width && slots.has(j); ++i) s = fma(q[i], keys[i * kPage + j], s);
    s = slots.has(j) ? call.scale * s : kLowest;
    __syncthreads();  // the last page's weights have been used
    scores[j] = s;
    __syncthreads();
    float top = m;
    for (int i = slots.begin; i < slots.end; ++i) top = maximum(top, scores[i]);
    const float e = slots.has(j) ? exp(s - top) : 0.0f, a = exp(m - top);
    __syncthreads();
    scores[j] = e;
    __syncthreads();
    if (j < kWarp) {
      const float lanes = lanesSum16(j % 16, kPage, [&](float acc, int64_t i) { return acc + scores[i]; });
      if (j == 0) *sum = lanes;
    }
    __syncthreads();
    l = fma(l, a, *sum);
    m = top;
    const float* values = static_cast<const float*>(call.kv.data) + call.kv.valuePanel(at, g);
    for (int i = j; i < call.width; i += kPage) {
      const int begin = i / kPage * kPage, w = padded - begin < kPage ? padded - begin : kPage;
      const float* column = values + begin * kPage + i - begin;
      float acc = o[i] * a;
      for (int t = slots.begin; t < slots.end; ++t) acc = fma(scores[t], column[t * w], acc);
      o[i] = acc;
    }
  }
  float* out = call.out.row<float>(row) + static_cast<int64_t>(h) * call.width;
  for (int i = j; i < call.width; i += kPage) out[i] = o[i] / l;
  if (!call.logSumExp.empty() && j == 0) call.logSumExp.row(h)[row] = m + log(l);
}

// --- the operation
// -----------------------------------------------------------------------------------------------------

// Rows begin .. begin + count - 1 belong to no sequence.
struct Gap {
  int32_t begin, count;
};
constexpr int kGapThreads = 128;
__global__ void zeroKernel(Operand out, int64_t columns, const Gap* gaps) {
  const Gap gap = gaps[blockIdx.x];
  for (int r = 0; r < gap.count; ++r)
    for (int64_t i = threadIdx.x; i < columns; i += kGapThreads) store(out, gap.begin + r, i, 0.0f);
}

// The memory is kept, so that queues see the lists at the same place again.
struct Lists {
  std::vector<QueryTile> many, few;
  std::vector<Gap> gaps;
};

// Sequences of at most mostFew rows go to `few`.
const Lists& listsOf(const Sequences& sequences, int64_t rows, int64_t mostFew) {
  static thread_local Lists lists;
  lists.many.clear();
  lists.few.clear();
  lists.gaps.clear();
  int64_t row = 0;
  const auto gapUntil = [&](int64_t end) {
    if (row < end) lists.gaps.push_back({static_cast<int32_t>(row), static_cast<int32_t>(end - row)});
  };
  for (int64_t b = 0; b < sequences.count; ++b) {
    gapUntil(sequences.rowBegin[b]);
    row = sequences.rowBegin[b];
    const int64_t end = row + sequences.length[b];
    const bool isFew = sequences.length[b] <= mostFew;
    for (int64_t position = sequences.offset[b]; row < end;) {
      const int64_t count = isFew ? end - row : std::min(end - row, kTileRows - position % kTileRows);
      (isFew ? lists.few : lists.many)
          .push_back({static_cast<int32_t>(b), static_cast<int32_t>(row), static_cast<int32_t>(position),
                      static_cast<int32_t>(count)});
      row += count;
      position += count;
    }
  }
  gapUntil(rows);
  // Those that see the most begin first, so that the last to begin end soon.
  std::stable_sort(lists.many.begin(), lists.many.end(),
                   [](const QueryTile& x, const QueryTile& y) { return x.position / kPage > y.position / kPage; });
  return lists;
}

// Whether even elements of every row lie at words.
bool inWords(const Operand& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 4 == 0 && x.stride % 2 == 0;
}

}  // namespace

void attention(Queue& queue, const AttentionShape& shape, Operand q, const KvPages& kv, const Sequences& sequences,
               Operand out, View<float> logSumExp) {
  lockstep::cuda::Queue& gpu = onGpu(queue);
  const bool isFloat = q.dtype == DType::kFloat32;
  const Lists& lists = listsOf(sequences, q.rows, isFloat ? 0 : fewQueries(shape.heads / shape.keyValueHeads));
  const int64_t columns = shape.heads * shape.headWidth;
  if (!lists.gaps.empty()) {
    const auto count = static_cast<int64_t>(lists.gaps.size());
    launch(zeroKernel, blocksFor(count, 1), kGapThreads, 0, gpu.stream(), out, columns,
           gpu.stage(lists.gaps.data(), count));
  }
  const int64_t longest = std::numeric_limits<int32_t>::max();
  Call call{q,
            out,
            kv,
            logSumExp,
            gpu.stage(sequences.pages, sequences.count * sequences.pageStride),
            sequences.pageStride,
            nullptr,
            static_cast<int>(shape.heads),
            static_cast<int>(shape.heads / shape.keyValueHeads),
            static_cast<int>(shape.headWidth),
            static_cast<int>(std::min(shape.window, longest)),
            shape.scale,
            inWords(q) && inWords(out) && shape.headWidth % 2 == 0};
  if (const auto count = static_cast<int64_t>(lists.many.size()); count > 0) {
    call.tiles = gpu.stage(lists.many.data(), count);
    if (isFloat) {
      const dim3 grid(blocksFor(count * shape.heads, 1), kTileRows);
      launch(rowKernel, grid, kPage, static_cast<size_t>(shape.headWidth) * sizeof(float), gpu.stream(), call);
    } else {
      const auto run = shape.headWidth <= 64    ? launchTiles<4, 8>
                       : shape.headWidth <= 128 ? launchTiles<8, 16>
                                                : launchTiles<0, 16>;
      run(gpu.stream(), call, count);
    }
  }
  if (!lists.few.empty()) attendFew(gpu, call, lists.few);
}

}  // namespace lockstep::kernels::cuda
