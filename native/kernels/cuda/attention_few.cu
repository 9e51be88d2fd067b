// Attention of few rows in bfloat16, which is decoding: the query heads that share a key/value head are the rows of a
// product. What needs no order goes in parallel: scores of all pages; then, a block per row, maxima, weights and their
// sums; then, a warp per 32 dimensions, the one chain that is left. The sums are those of attention.cu.
#include "kernels/cuda/attention.h"

#include <algorithm>

namespace lockstep::kernels::cuda::attending {

namespace {

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

}  // namespace

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

}  // namespace lockstep::kernels::cuda::attending
