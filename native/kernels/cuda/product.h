// A tile of x W^T on tensor cores, of bfloat16 operands in float32: what the forward products share.
//
// W is the left operand of `mma` and x the right one, so y^T = W x^T: a tile holds kRows rows of W and kTokens rows of
// x, and a decoded token costs 8 columns. A packed panel, [k / 2][w][2], holds in one word just the pair (k, k + 1) of
// a row that a fragment's register wants, and so does a row of x: both go to shared memory as they lie, 16 bytes a
// copy, some steps of k ahead of the multiplication, and every fragment register is one word read from there.
//
// Why bits hold: an element is one chain of `mma` over k in steps of 16, ascending, from zero, whatever the tile. Past
// the end of a part, k is padded: W by 0, x by -0, whose product changes no sum, not even one of -0. The odd end of a
// pair is padded by 0 in both, as kernels.h wants it. Rows of the tile past the end of W or x are not padded: what lies
// there reaches only elements that nobody reads.
#pragma once

#include <algorithm>

#include "kernels/cuda/cuda.h"

namespace lockstep::kernels::cuda {

// The parts of a weight as kernels see them: the first ones among the arguments of the launch, which are read without
// delay, the others in device memory.
struct Parts {
  static constexpr int kHere = 8;
  Part here[kHere];
  const Part* all;
  int count;

  constexpr Part operator[](int p) const { return p < kHere ? here[p] : all[p]; }
};

inline Parts partsOf(Queue& queue, const WeightLayout& layout) {
  Parts parts{};
  parts.count = static_cast<int>(layout.parts.size());
  for (int p = 0; p < parts.count && p < Parts::kHere; ++p) parts.here[p] = layout.parts[p];
  if (parts.count > Parts::kHere) parts.all = onGpu(queue).stage(layout.parts.data(), parts.count);
  return parts;
}

// x W^T of packed weights.
struct Product {
  Operand x;
  const void* weight;
  Parts parts;
  bool wide;  // bfloat16: every 8 columns of a part of a row of x lie at a multiple of 16 bytes

  static Product make(Queue& queue, const Operand& x, const Weight& w) {
    bool wide = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 8 == 0;
    for (const Part& part : w.layout->parts) wide = wide && (part.in == 0 || part.inBegin % 8 == 0);
    return {x, w.data, partsOf(queue, *w.layout), wide};
  }
};

// kWarpsAlongRows x kWarpsAlongTokens warps share a tile; each has its own rows and tokens.
template <int kRows_, int kTokens_, int kDepth_, int kStages_, int kWarpsAlongRows, int kWarpsAlongTokens, int kBlocks_>
struct Tile {
  static constexpr int kRows = kRows_, kTokens = kTokens_, kDepth = kDepth_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kThreads = kWarpsAlongRows * kWarpsAlongTokens * kWarp;
  static constexpr int kRowBlocks = kRows / kWarpsAlongRows / 16;       // of 16 rows, of a warp
  static constexpr int kTokenBlocks = kTokens / kWarpsAlongTokens / 8;  // of 8 tokens, of a warp
  static constexpr int kPairs = kDepth / 2;
  // In words. With 8 (mod 32) words between pairs and 4 or 20 between tokens the 32 lanes that read a fragment's
  // register (4 pairs x 8 rows or 8 tokens x 4 pairs) meet 32 banks.
  static constexpr int kPairStride = kRows + 8, kTokenStride = kPairs + 4;
  static constexpr int kStageWords = kPairs * kPairStride + kTokens * kTokenStride;
  // A finished tile, [token][row]; 4 (mod 32), for the same reason.
  static constexpr int kResultStride = kRows + 4;
  static constexpr size_t kSharedBytes =
      4 * (kStages * kStageWords > kTokens * kResultStride ? kStages * kStageWords : kTokens * kResultStride);

  using Sums = float[kRowBlocks][kTokenBlocks][4];

  // Where this thread's warp begins.
  __device__ static int warpRow() { return static_cast<int>(threadIdx.x) / kWarp % kWarpsAlongRows * kRowBlocks * 16; }
  __device__ static int warpToken() {
    return static_cast<int>(threadIdx.x) / kWarp / kWarpsAlongRows * kTokenBlocks * 8;
  }
};

// The rows of a part that a tile takes: its first half from `first`, its second half from `second`, both multiples
// of 4.
struct TileRows {
  int64_t first, second;
};

// Brings the operands of one step after another to shared memory, part after part without a break, `T::kStages` in
// turn.
template <class T>
class Feed {
 public:
  __device__ __forceinline__ Feed(const Product& product, TileRows rows, int64_t token, int part, int partEnd,
                                  unsigned* shared)
      : product_(product), shared_(shared), partEnd_(partEnd) {
    const int row = kWeightCopy * weightColumn(), half = T::kRows / 2;
    row_ = row < half ? rows.first + row : rows.second + row - half;
    const int own = static_cast<int>(threadIdx.x) / kTokenCopies;
    token_ = product.x.template row<BFloat16>(token + own);
    const int64_t left = product.x.rows - token - own;
    tokensLeft_ = static_cast<int>(left < T::kTokens ? left : T::kTokens);
    enter(part);
  }

  // Starts the copies of the next step, if there is one, as a group of its own.
  __device__ __forceinline__ void next() {
    if (part_ < partEnd_) {
      unsigned* const weights = shared_ + stage_ * T::kStageWords;
      copyWeights(weights);
      copyTokens(weights + T::kPairs * T::kPairStride);
      k_ += T::kDepth;
      if (k_ >= in_) enter(part_ + 1);
    }
    stage_ = stage_ + 1 == T::kStages ? 0 : stage_ + 1;
    cp_async_commit();
  }

 private:
  // Copies of 16 bytes: 4 rows of W in one pair of k, 8 elements of a row of x. A thread's copies are of the same rows
  // of W, and of the same columns of x.
  static constexpr int kWeightCopy = 4, kTokenCopy = 8;
  static constexpr int kWeightCopies = T::kRows / kWeightCopy, kTokenCopies = T::kDepth / kTokenCopy;
  static constexpr int kPairsAtOnce = T::kThreads / kWeightCopies, kTokensAtOnce = T::kThreads / kTokenCopies;
  static_assert(T::kPairs % kPairsAtOnce == 0 && T::kTokens % kTokensAtOnce == 0);

  __device__ static int weightColumn() { return static_cast<int>(threadIdx.x) % kWeightCopies; }

  // Goes to the first part from `part` on that has columns.
  __device__ __forceinline__ void enter(int part) {
    while (part < partEnd_ && product_.parts[part].in == 0) ++part;
    part_ = part;
    if (part == partEnd_) return;
    const Part p = product_.parts[part];
    const int64_t panel = row_ / kPanel;
    k_ = 0;
    in_ = static_cast<int>(p.in);
    rowExists_ = row_ < roundUp(p.out, kPanelGrain);
    width_ = rowExists_ ? static_cast<int>(p.panelWidth(panel)) : 0;
    words_ =
        static_cast<const unsigned*>(product_.weight) + (rowExists_ ? p.panelOffset(panel) / 2 + row_ % kPanel : 0);
    column_ = p.inBegin;
  }

  __device__ __forceinline__ void copyWeights(unsigned* to) const {
    if (!rowExists_) return;
    const int first = static_cast<int>(threadIdx.x) / kWeightCopies, pairs = (in_ + 1) / 2;
    for (int i = 0; i < T::kPairs; i += kPairsAtOnce) {
      const int pair = k_ / 2 + first + i;
      const bool exists = pair < pairs;
      cp_async_16(to + (first + i) * T::kPairStride + kWeightCopy * weightColumn(),
                  words_ + (exists ? static_cast<int64_t>(pair) * width_ : 0), exists);
    }
  }

  __device__ __forceinline__ void copyTokens(unsigned* to) const {
    const int own = static_cast<int>(threadIdx.x) / kTokenCopies;
    const int column = static_cast<int>(threadIdx.x) % kTokenCopies * kTokenCopy, left = in_ - k_ - column;
    const BFloat16* const from = token_ + column_ + k_ + column;
    const bool whole = product_.wide && left >= kTokenCopy;
    for (int i = 0; i < T::kTokens; i += kTokensAtOnce) {
      if (i >= tokensLeft_) break;
      unsigned* const at = to + (own + i) * T::kTokenStride + column / 2;
      if (whole)
        cp_async_16(at, from + i * product_.x.stride);
      else
        copyEdge(at, from + i * product_.x.stride, left);
    }
  }

  // As many of 8 elements as exist, one by one, and the padding.
  __device__ static __forceinline__ void copyEdge(unsigned* to, const BFloat16* from, int left) {
    for (int i = 0; i < kTokenCopy; i += 2) {
      const unsigned low = i < left ? from[i].bits : 0x8000u;
      const unsigned high = i + 1 < left ? from[i + 1].bits : i < left ? 0u : 0x8000u;
      to[i / 2] = high << 16 | low;
    }
  }

  const Product& product_;
  unsigned* shared_;
  int part_ = 0, partEnd_, stage_ = 0;
  int64_t row_;            // of the part, the first of this thread's copies
  const BFloat16* token_;  // the first of this thread's rows of x
  int tokensLeft_;         // from there on
  int k_ = 0, in_ = 0;     // where the next step begins, where the part ends
  const unsigned* words_ = nullptr;
  int width_ = 0;
  bool rowExists_ = false;
  int64_t column_ = 0;  // of x, where the part begins
};

// sums += what one step brought.
template <class T>
__device__ __forceinline__ void multiply(const unsigned* weights, typename T::Sums& sums) {
  const unsigned* const tokens = weights + T::kPairs * T::kPairStride;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned* const w = weights + lane % 4 * T::kPairStride + T::warpRow() + lane / 4;
  const unsigned* const x = tokens + (T::warpToken() + lane / 4) * T::kTokenStride + lane % 4;
  for (int pair = 0; pair < T::kPairs; pair += 8) {
    unsigned a[T::kRowBlocks][4], b[T::kTokenBlocks][2];
    for (int r = 0; r < T::kRowBlocks; ++r)
      for (int i = 0; i < 4; ++i) a[r][i] = w[(pair + i / 2 * 4) * T::kPairStride + r * 16 + i % 2 * 8];
    for (int t = 0; t < T::kTokenBlocks; ++t)
      for (int i = 0; i < 2; ++i) b[t][i] = x[t * 8 * T::kTokenStride + pair + i * 4];
    for (int r = 0; r < T::kRowBlocks; ++r)
      for (int t = 0; t < T::kTokenBlocks; ++t) mma_m16n8k16_bf16(sums[r][t], a[r], b[t]);
  }
}

// The tree over parts, as they come: after part p the sums of as many neighbours are joined as p ends in ones, and the
// result waits in `pending` (of the block, a level after the other, each thread's own) for the part that it pairs with.
// Storing a float32 is exact. After the last part `sums` holds the total.
template <class T>
__device__ __forceinline__ void joinPart(typename T::Sums& sums, int p, int parts, float4* pending) {
  constexpr int kLevel = T::kRowBlocks * T::kTokenBlocks * T::kThreads;
  float4* at = pending + threadIdx.x;
  for (int bits = p; bits % 2 == 1; bits /= 2, at += kLevel) {
    for (int r = 0; r < T::kRowBlocks; ++r) {
      for (int t = 0; t < T::kTokenBlocks; ++t) {
        const float4 left = at[(r * T::kTokenBlocks + t) * T::kThreads];
        float(&right)[4] = sums[r][t];
        right[0] = left.x + right[0];
        right[1] = left.y + right[1];
        right[2] = left.z + right[2];
        right[3] = left.w + right[3];
      }
    }
  }
  if (p + 1 == parts) return;
  for (int r = 0; r < T::kRowBlocks; ++r) {
    for (int t = 0; t < T::kTokenBlocks; ++t) {
      float(&sum)[4] = sums[r][t];
      at[(r * T::kTokenBlocks + t) * T::kThreads] = {sum[0], sum[1], sum[2], sum[3]};
      for (int i = 0; i < 4; ++i) sum[i] = 0;
    }
  }
}
// So many blocks run at a time, two on each multiprocessor, and join what they keep in the cache.
inline unsigned joiningBlocks(Queue& queue) {
  return 2 * std::min(kMultiprocessors, onGpu(queue).multiprocessors());
}
template <class T>
constexpr size_t pendingBytes(int parts) {
  size_t levels = 0;
  while (1 << levels < parts) ++levels;
  return levels * sizeof(typename T::Sums) * T::kThreads;
}

// The product of some rows of W with kTokens rows of x from `token`, over parts `part` .. partEnd - 1, which are joined
// by the tree, to shared memory: [token][row], kResultStride apart.
template <class T>
__device__ __forceinline__ const float* productTile(const Product& product, TileRows rows, int64_t token, int part,
                                                    int partEnd, float4* pending) {
  unsigned* const shared = shared_memory<unsigned>();
  typename T::Sums sums = {};
  Feed<T> feed(product, rows, token, part, partEnd, shared);
  for (int i = 0; i + 1 < T::kStages; ++i) feed.next();
  int stage = 0;
  for (int p = part; p < partEnd; ++p) {
    const int in = static_cast<int>(product.parts[p].in);
    for (int k = 0; k < in; k += T::kDepth) {
      cp_async_wait<T::kStages - 2>();
      __syncthreads();  // the step is there for all, and the stage before it, which next() fills again, has been used
      feed.next();
      multiply<T>(shared + stage * T::kStageWords, sums);
      stage = stage + 1 == T::kStages ? 0 : stage + 1;
    }
    if (partEnd - part > 1) joinPart<T>(sums, p - part, partEnd - part, pending);
  }
  __syncthreads();
  float* const result = shared_memory<float>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float* const own = result + (T::warpToken() + lane % 4 * 2) * T::kResultStride + T::warpRow() + lane / 4;
  for (int r = 0; r < T::kRowBlocks; ++r)
    for (int t = 0; t < T::kTokenBlocks; ++t)
      for (int i = 0; i < 4; ++i) own[(t * 8 + i % 2) * T::kResultStride + r * 16 + i / 2 * 8] = sums[r][t][i];
  __syncthreads();
  return result;
}

}  // namespace lockstep::kernels::cuda
