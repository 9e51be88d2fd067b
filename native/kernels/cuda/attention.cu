// Softmax attention over pages of keys and values (Vaswani et al., 2017; online softmax: Milakov and Gimelshein, 2018;
// on registers of tensor cores: Dao, 2023).
//
// Of bfloat16 there are two ways through the same sums. Long sequences: a block takes 64 query rows of one head through
// the pages that they see, a warp 16 of them; scores become weights in the very registers that the next product reads.
// Few rows (decode): attention_few.cu.
//
// Why bits hold: a score is one chain of `mma` over K from zero, an output one chain over the slots of a page in steps
// of 16 that continues from o a; which rows share a tile or what kernel it is changes neither. Slots that a row does
// not see have weight 0; values that no row of a tile sees, which may be NaN, are zeroed as they are read. Sums of
// weights are lanes sums over the 64 slots of a page, spread over the threads as the fragments of `mma` are.
#include "kernels/cuda/attention.h"

#include <algorithm>
#include <string>

#include "core/error.h"

namespace lockstep::kernels::cuda {

using namespace attending;

namespace {

// --- many rows, bfloat16 --------------------------------------------------------------------------------------------

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
  static constexpr size_t sharedBytes(int64_t width) {
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

// What a block may have of shared memory on an A100 bounds how wide a head may be.
constexpr int64_t kWidestHead = 544;
static_assert(TileKernel<0, 16>::sharedBytes(kWidestHead) <= 163 * 1024);

template <int kSteps, int kTiles>
__global__ void __launch_bounds__(kTileThreads, kTiles > 8 ? 2 : 3) tileKernel(Call call, int slices) {
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

// --- float32 --------------------------------------------------------------------------------------------------------

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

// --- the operation --------------------------------------------------------------------------------------------------

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
  if (!isFloat && shape.headWidth > kWidestHead) {
    throw Error("CUDA_HEAD_WIDTH", "attention on a GPU in bfloat16: expected heads of at most " +
                                       std::to_string(kWidestHead) + " columns, received " +
                                       std::to_string(shape.headWidth) +
                                       "; compute in float32 (dtype) or on the CPU (device)");
  }
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
