// The gradients of a linear layer: dx = dy W, dW += dy^T x, dBias += sum of dy. Of bfloat16 they run on tensor cores in
// tiles of 128 x 128 that four warps share, 64 x 64 each; operands come to shared memory as they lie, by 16-byte copies
// some steps ahead of the multiplication.
//
// `mma` wants in one register two elements that follow each other along the sum. Along the rows of W and along tokens
// those lie in two words of memory, each with a neighbour of its own: the even and the odd column of two rows. So two
// words make two registers, one of the even columns and one of the odd, and a fragment takes even columns for some of
// its rows and odd ones for others: that only says which element of the result lies in which register.
//   dx   W is the left operand and dy the right one, whose words hold pairs along the sum already: dx^T = W^T dy^T. A
//        block goes through all parts of a weight split along out, and joins them by the tree.
//   dW   dy^T times x. A block takes two panels of a part, starts from what is accumulated and goes through all tokens.
//        The blocks of a part's first columns add up the bias's gradient as well, a thread per row of W.
//
// Why bits hold: an element is one chain over the sum in steps of 16, ascending, whatever the tile, and of dW from the
// first row that is given. Past the end the sum is padded by 0 times -0, which changes no accumulator, not even -0; the
// odd end of a pair by 0 times 0, as kernels.h wants it. What lies past the other edges of a tile may be anything: it
// reaches only elements that nobody reads. Of float32, which is for tests, a thread computes 4 x 4 elements with plain
// multiply-adds.
#include <algorithm>

#include "kernels/cuda/product.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr unsigned kTileGroup = 16;  // rows of tiles that neighbouring blocks share a column of tiles in
constexpr int kSide = 128, kDepth = 32, kStages = 4, kThreads = 128;  // of bfloat16 tiles
constexpr int kWarpSide = 64, kWarpsAlong = kSide / kWarpSide;
constexpr int kFloatSide = 64, kFloatDepth = 32, kFloatThreads = 256, kFloatGrid = 16;  // of float32 tiles

// Sums of a tile by thread, as product.h's joinPart takes them.
template <int kRowBlocks_, int kTokenBlocks_, int kThreads_>
struct TileSums {
  static constexpr int kRowBlocks = kRowBlocks_, kTokenBlocks = kTokenBlocks_, kThreads = kThreads_;
  using Sums = float[kRowBlocks][kTokenBlocks][4];
};
using BFloat16Sums = TileSums<kWarpSide / 16, kWarpSide / 8, kThreads>;
using FloatSums = TileSums<4, 1, kFloatThreads>;

// --- what both share -------------------------------------------------------------------------------------------------

struct Place {
  unsigned row, column;
};

// Neighbouring tiles share a column, and then rows, of a grid of tiles, so that what is read at a time is little.
__device__ inline Place placeOf(unsigned tile, unsigned rows, unsigned columns) {
  const unsigned group = tile / (kTileGroup * columns), first = group * kTileGroup;
  const unsigned left = rows - first, height = left < kTileGroup ? left : kTileGroup;
  const unsigned inGroup = tile - first * columns;
  return {first + inGroup % height, inGroup / height};
}

// Eight columns of an operand to shared memory, of which `left` exist. Wide: they begin at a multiple of 16 bytes.
__device__ inline void copyEight(bool wide, unsigned* to, const BFloat16* from, int left, unsigned padding) {
  if (wide && left >= 8) {
    cp_async_16(to, from);
    return;
  }
  for (int i = 0; i < 8; i += 2) {
    const unsigned low = i < left ? from[i].bits : padding;
    const unsigned high = i + 1 < left ? from[i + 1].bits : i < left ? 0u : padding;
    to[i / 2] = high << 16 | low;
  }
}

// The same of rows 0, kApart, ... < kEnd, of which the first `rows` exist.
template <int kEnd, int kApart, int kToStride>
__device__ __forceinline__ void copyColumns(bool wide, unsigned* to, const BFloat16* from, int64_t stride, int rows,
                                            int left, unsigned padding) {
  if (wide && left >= 8 && rows > kEnd - kApart) {  // inside the matrix: nothing but copies
    for (int i = 0; i < kEnd; i += kApart) cp_async_16(to + i * kToStride, from + i * stride);
    return;
  }
  for (int i = 0; i < kEnd; i += kApart)
    copyEight(wide, to + i * kToStride, from + i * stride, i < rows ? left : 0, padding);
}

constexpr unsigned kMinusZero = 0x8000u;

__device__ inline int atMost(int64_t count, int most) {
  return count < most ? static_cast<int>(count) : most;
}

// Of two words, which follow each other along the sum, the lower halves and the upper ones.
__device__ inline unsigned lowerHalves(unsigned first, unsigned second) {
  return __byte_perm(first, second, 0x5410);
}
__device__ inline unsigned upperHalves(unsigned first, unsigned second) {
  return __byte_perm(first, second, 0x7632);
}

bool startsWide(const Operand& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride % 8 == 0;
}

// --- dx = dy W -------------------------------------------------------------------------------------------------------

struct InputProduct {
  Operand dy;
  const void* weight;
  Parts parts;
  bool splitIn;
  bool wide;  // every 8 columns of a part of a row of dy begin at a multiple of 16 bytes
  Output dx;
  unsigned tokenTiles, columnTiles;  // columns of dx; tiles do not cross parts
};

// Where a tile of dx is: rows from `token` on, columns from `column` on of parts `part` .. partEnd - 1, which are
// summed.
struct InputTile {
  int64_t token, column;
  int part, partEnd;
};

template <int kTileSide>
__device__ inline InputTile inputTile(const InputProduct& product, unsigned tile) {
  const Place place = placeOf(tile, product.tokenTiles, product.columnTiles);
  const int64_t token = static_cast<int64_t>(place.row) * kTileSide;
  if (!product.splitIn) return {token, static_cast<int64_t>(place.column) * kTileSide, 0, product.parts.count};
  unsigned column = place.column;
  int part = 0;
  for (;; ++part) {
    const unsigned tiles = blocksFor(product.parts[part].in, kTileSide);
    if (column < tiles) break;
    column -= tiles;
  }
  return {token, static_cast<int64_t>(column) * kTileSide, part, part + 1};
}

// Steps of dx's operands in shared memory, in words: [pair of columns][row of W], then [token][pair of rows of W]. With
// 8 (mod 32) words between pairs and 20 between tokens, the lanes of a load (4 x 4 of two words, 8 x 4 of one) meet all
// banks.
constexpr int kColumnPairs = kSide / 2, kPairStride = kDepth + 8, kTokenStride = kDepth / 2 + 4;
constexpr int kInputStageWords = kColumnPairs * kPairStride + kSide * kTokenStride;

// Brings one step after another to shared memory, part after part without a break. A step is half a panel.
class InputFeed {
 public:
  __device__ __forceinline__ InputFeed(const InputProduct& product, const InputTile& tile, unsigned* shared)
      : product_(product), shared_(shared), partEnd_(tile.partEnd) {
    const int ownPair = static_cast<int>(threadIdx.x) / kWeightCopies,
              ownToken = static_cast<int>(threadIdx.x) / kTokenCopies;
    pair_ = tile.column / 2 + ownPair;
    token_ = product.dy.template row<BFloat16>(tile.token + ownToken);
    tokensLeft_ = atMost(product.dy.rows - tile.token - ownToken, kSide);
    enter(tile.part);
  }

  // Starts the copies of the next step, if there is one, as a group of its own.
  __device__ __forceinline__ void next() {
    if (part_ < partEnd_) {
      unsigned* const to = shared_ + stage_ * kInputStageWords;
      copyWeights(to);
      copyTokens(to + kColumnPairs * kPairStride);
      n_ += kDepth;
      if (n_ >= out_) enter(part_ + 1);
    }
    stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
    cp_async_commit();
  }

 private:
  static constexpr int kWeightCopies = kDepth / 4, kTokenCopies = kDepth / 8;  // of 16 bytes, in a row
  static constexpr int kPairsAtOnce = kThreads / kWeightCopies, kTokensAtOnce = kThreads / kTokenCopies;

  // Goes to the first part from `part` on that has rows.
  __device__ __forceinline__ void enter(int part) {
    while (part < partEnd_ && product_.parts[part].out == 0) ++part;
    part_ = part;
    if (part == partEnd_) return;
    const Part p = product_.parts[part];
    n_ = 0;
    out_ = static_cast<int>(p.out);
    pairs_ = p.inPadded() / 2;
    pairsLeft_ = atMost(pairs_ - pair_, kColumnPairs);
    words_ = static_cast<const unsigned*>(product_.weight) + p.offset / 2;
    dyColumn_ = p.outBegin;
  }

  __device__ __forceinline__ void copyWeights(unsigned* to) const {
    const int inPanel = n_ % static_cast<int>(kPanel), left = out_ - n_ + inPanel;
    const int width = left >= kPanel ? static_cast<int>(kPanel) : static_cast<int>(roundUp(left, kPanelGrain));
    const int own = static_cast<int>(threadIdx.x) / kWeightCopies;
    const int column = static_cast<int>(threadIdx.x) % kWeightCopies * 4;
    if (inPanel + column >= width) return;
    const unsigned* const from = words_ + (n_ - inPanel) * pairs_ + pair_ * width + inPanel + column;
    for (int i = 0; i < kColumnPairs; i += kPairsAtOnce)
      if (i < pairsLeft_) cp_async_16(to + (own + i) * kPairStride + column, from + i * width);
  }

  __device__ __forceinline__ void copyTokens(unsigned* to) const {
    const int own = static_cast<int>(threadIdx.x) / kTokenCopies;
    const int column = static_cast<int>(threadIdx.x) % kTokenCopies * 8;
    copyColumns<kSide, kTokensAtOnce, kTokenStride>(product_.wide, to + own * kTokenStride + column / 2,
                                                    token_ + dyColumn_ + n_ + column, product_.dy.stride, tokensLeft_,
                                                    out_ - n_ - column, kMinusZero);
  }

  const InputProduct& product_;
  unsigned* shared_;
  int part_ = 0, partEnd_, stage_ = 0;
  int64_t pair_;                     // of the part's columns, the first of this thread's copies
  const BFloat16* token_;            // the first of this thread's rows of dy
  int tokensLeft_;                   // from there on
  int n_ = 0, out_ = 0;              // where the next step begins, where the part ends
  int64_t pairs_ = 0;                // of the part's columns
  int pairsLeft_ = 0;                // from pair_ on
  const unsigned* words_ = nullptr;  // of the part
  int64_t dyColumn_ = 0;             // where the part begins
};

// sums += what one step of `rows` rows of W (16 or 32) brought. Row i of a block of 16 stands for column 2 i of W, row
// i + 8 for column 2 i + 1.
__device__ __forceinline__ void multiplyInput(const unsigned* stage, int rows, BFloat16Sums::Sums& sums) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned* const weights =
      stage + (warp % kWarpsAlong * (kWarpSide / 2) + lane / 4) * kPairStride + lane % 4 * 2;
  const unsigned* const tokens =
      stage + kColumnPairs * kPairStride + (warp / kWarpsAlong * kWarpSide + lane / 4) * kTokenStride + lane % 4;
  for (int n = 0; n < kDepth; n += 16) {
    if (n == rows) break;
    unsigned a[BFloat16Sums::kRowBlocks][4], b[BFloat16Sums::kTokenBlocks][2];
    for (int r = 0; r < BFloat16Sums::kRowBlocks; ++r) {
      for (int half = 0; half < 2; ++half) {
        const uint2 w = *reinterpret_cast<const uint2*>(weights + r * 8 * kPairStride + n + half * 8);
        a[r][2 * half] = lowerHalves(w.x, w.y);
        a[r][2 * half + 1] = upperHalves(w.x, w.y);
      }
    }
    for (int t = 0; t < BFloat16Sums::kTokenBlocks; ++t)
      for (int half = 0; half < 2; ++half) b[t][half] = tokens[t * 8 * kTokenStride + n / 2 + half * 4];
    for (int r = 0; r < BFloat16Sums::kRowBlocks; ++r)
      for (int t = 0; t < BFloat16Sums::kTokenBlocks; ++t) mma_m16n8k16_bf16(sums[r][t], a[r], b[t]);
  }
}

// A finished tile goes through shared memory, [token][column], so that a warp writes whole rows. 4 (mod 16) words
// between tokens: the half warps that store two words a lane, to 4 even tokens and 4 places, meet all banks.
constexpr int kResultStride = kSide + 4;
constexpr size_t kInputSharedBytes = 4 * std::max(kStages * kInputStageWords, kSide* kResultStride);

__device__ __forceinline__ void putInput(const InputProduct& product, const InputTile& tile,
                                         const BFloat16Sums::Sums& sums) {
  float* const result = shared_memory<float>();
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  float* const own = result + (warp / kWarpsAlong * kWarpSide + lane % 4 * 2) * kResultStride +
                     warp % kWarpsAlong * kWarpSide + lane / 4 * 2;
  __syncthreads();  // the last step has been used
  for (int r = 0; r < BFloat16Sums::kRowBlocks; ++r) {
    for (int t = 0; t < BFloat16Sums::kTokenBlocks; ++t) {
      const float(&d)[4] = sums[r][t];
      *reinterpret_cast<float2*>(own + t * 8 * kResultStride + r * 16) = {d[0], d[2]};
      *reinterpret_cast<float2*>(own + (t * 8 + 1) * kResultStride + r * 16) = {d[1], d[3]};
    }
  }
  __syncthreads();
  const Part part = product.parts[tile.part];
  const int64_t column = tile.column + threadIdx.x, tokensLeft = product.dy.rows - tile.token;
  static_assert(kThreads == kSide);
  if (column < part.in) {
    for (int t = 0; t < kSide && t < tokensLeft; ++t)
      put(product.dx, tile.token + t, part.inBegin + column, result[t * kResultStride + threadIdx.x]);
  }
}

// A block takes one tile after another. pending: room of joinPart, of each block its own.
__global__ void __launch_bounds__(kThreads, 2)
    inputKernel(InputProduct product, float4* pending, size_t pendingOfBlock) {
  unsigned* const shared = shared_memory<unsigned>();
  pending += blockIdx.x * pendingOfBlock;
  const unsigned tiles = product.tokenTiles * product.columnTiles;
  for (unsigned number = blockIdx.x; number < tiles; number += gridDim.x) {
    const InputTile tile = inputTile<kSide>(product, number);
    BFloat16Sums::Sums sums = {};
    __syncthreads();  // the last tile's steps have been used
    InputFeed feed(product, tile, shared);
    for (int i = 0; i + 1 < kStages; ++i) feed.next();
    int stage = 0;
    for (int p = tile.part; p < tile.partEnd; ++p) {
      const int out = static_cast<int>(product.parts[p].out);
      for (int n = 0; n < out; n += kDepth) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the step is there for all, and the one before it, whose place next() fills, has been used
        feed.next();
        multiplyInput(shared + stage * kInputStageWords, out - n > 16 ? 32 : 16, sums);
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      if (tile.partEnd - tile.part > 1) joinPart<BFloat16Sums>(sums, p, tile.partEnd, pending);
    }
    putInput(product, tile, sums);
  }
}

__global__ void __launch_bounds__(kFloatThreads)
    inputFloatKernel(InputProduct product, float4* pending, size_t pendingOfBlock) {
  __shared__ Shared<float[kFloatSide][kFloatDepth + 1]> weights;  // [column][row of W]; 1: lanes step by columns
  __shared__ Shared<float[kFloatSide][kFloatDepth + 1]> tokens;
  const int x = threadIdx.x % kFloatGrid, y = threadIdx.x / kFloatGrid;
  const int copyRow = threadIdx.x % kFloatDepth, copyFirst = threadIdx.x / kFloatDepth;
  pending += blockIdx.x * pendingOfBlock;
  const unsigned tiles = product.tokenTiles * product.columnTiles;
  for (unsigned number = blockIdx.x; number < tiles; number += gridDim.x) {
    const InputTile tile = inputTile<kFloatSide>(product, number);
    FloatSums::Sums sums = {};
    for (int p = tile.part; p < tile.partEnd; ++p) {
      const Part part = product.parts[p];
      for (int64_t n = 0; n < part.out; n += kFloatDepth) {
        const int64_t row = n + copyRow, panel = row / kPanel;
        __syncthreads();
        for (int i = copyFirst; i < kFloatSide; i += kFloatThreads / kFloatDepth) {
          const int64_t k = tile.column + i, t = tile.token + i;
          const bool exists = row < part.out;
          weights[i][copyRow] =
              exists && k < part.in
                  ? static_cast<const float*>(
                        product.weight)[part.panelOffset(panel) + k * part.panelWidth(panel) + row % kPanel]
                  : 0;
          tokens[i][copyRow] = exists && t < product.dy.rows ? product.dy.row<float>(t)[part.outBegin + row] : 0;
        }
        __syncthreads();
        for (int r = 0; r < kFloatDepth && n + r < part.out; ++r)
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j)
              sums[i][0][j] = fma(tokens[y + j * kFloatGrid][r], weights[x + i * kFloatGrid][r], sums[i][0][j]);
      }
      if (tile.partEnd - tile.part > 1) joinPart<FloatSums>(sums, p, tile.partEnd, pending);
    }
    const Part part = product.parts[tile.part];
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 4; ++i) {
        const int64_t t = tile.token + y + j * kFloatGrid, k = tile.column + x + i * kFloatGrid;
        if (t < product.dy.rows && k < part.in) put(product.dx, t, part.inBegin + k, sums[i][0][j]);
      }
    }
  }
}

// --- dW += dy^T x, dBias += sum of dy --------------------------------------------------------------------------------

struct WeightProduct {
  Operand dy, x;
  float* dW;
  Parts parts;
  bool wide;  // as in InputProduct, of both
  float* dBias;
  int biasPart;  // the one whose blocks add to dBias; -1: each to its own rows
};

// Where a tile of dW is: rows and columns of a part.
struct WeightTile {
  int part;
  int64_t row, column;
};

template <int kTileSide>
__device__ inline WeightTile weightTile(const Parts& parts, unsigned tile) {
  for (int p = 0;; ++p) {
    const unsigned rows = blocksFor(parts[p].out, kTileSide), columns = blocksFor(parts[p].in, kTileSide);
    if (tile >= rows * columns) {
      tile -= rows * columns;
      continue;
    }
    const Place place = placeOf(tile, rows, columns);
    return {p, static_cast<int64_t>(place.row) * kTileSide, static_cast<int64_t>(place.column) * kTileSide};
  }
}

// The element of dBias that this thread adds to, if its block is one that does.
__device__ inline float* biasOf(const WeightProduct& product, const WeightTile& tile, const Part& part, int side) {
  const int64_t row = tile.row + threadIdx.x;
  const bool here =
      product.dBias != nullptr && tile.column == 0 && (product.biasPart < 0 || product.biasPart == tile.part);
  return here && static_cast<int>(threadIdx.x) < side && row < part.out ? product.dBias + part.outBegin + row : nullptr;
}

// Steps of dW's operands in shared memory, in words: [token][pair of rows of W], then [token][pair of columns]. Four
// words (mod 16) between tokens: the quarters of a warp that load 4 words a lane, from 4 even tokens and 2 places, meet
// all banks.
constexpr int kRowStride = kSide / 2 + 4;
constexpr int kWeightStageWords = 2 * kDepth * kRowStride;

// Brings one step after another to shared memory. A thread's copies are of the same columns of dy, and of x.
class WeightFeed {
 public:
  __device__ __forceinline__ WeightFeed(const WeightProduct& product, const WeightTile& tile, const Part& part,
                                        unsigned* shared)
      : product_(product), shared_(shared) {
    const int column = static_cast<int>(threadIdx.x) % kCopies * 8, token = static_cast<int>(threadIdx.x) / kCopies;
    at_ = token * kRowStride + column / 2;
    dy_ = product.dy.template row<BFloat16>(token) + part.outBegin + tile.row + column;
    x_ = product.x.template row<BFloat16>(token) + part.inBegin + tile.column + column;
    dyLeft_ = atMost(part.out - tile.row - column, 8);
    xLeft_ = atMost(part.in - tile.column - column, 8);
    tokensLeft_ = static_cast<int>(product.x.rows) - token;
  }

  // Starts the copies of the next step, if there is one, as a group of its own.
  __device__ __forceinline__ void next() {
    if (tokensLeft_ > -kTokensAtOnce) {
      unsigned* const to = shared_ + stage_ * kWeightStageWords + at_;
      copyColumns<kDepth, kTokensAtOnce, kRowStride>(product_.wide, to, dy_, product_.dy.stride, tokensLeft_, dyLeft_,
                                                     0);
      copyColumns<kDepth, kTokensAtOnce, kRowStride>(product_.wide, to + kDepth * kRowStride, x_, product_.x.stride,
                                                     tokensLeft_, xLeft_, kMinusZero);
      dy_ += kDepth * product_.dy.stride;
      x_ += kDepth * product_.x.stride;
      tokensLeft_ -= kDepth;
    }
    stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
    cp_async_commit();
  }

 private:
  static constexpr int kCopies = kSide / 8, kTokensAtOnce = kThreads / kCopies;  // of 16 bytes

  const WeightProduct& product_;
  unsigned* shared_;
  int at_, stage_ = 0;
  const BFloat16 *dy_, *x_;  // what comes next, of this thread's first copies
  int dyLeft_, xLeft_;       // columns from there on, at most 8
  int tokensLeft_;           // from there on
};

struct FourWords {
  unsigned at[4];
};
__device__ inline FourWords loadFour(const unsigned* from) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}

// sums += what one step of `count` tokens (16 or 32) brought. With a lane's eight rows and its eight columns in four
// words each: word r gives row block r its rows lane / 4 (the lower half) and lane / 4 + 8; word c gives its lower half
// to column block 2 c, its upper half to column block 2 c + 1.
__device__ __forceinline__ void multiplyWeight(const unsigned* stage, int count, BFloat16Sums::Sums& sums) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned* const rows = stage + lane % 4 * 2 * kRowStride + warp % kWarpsAlong * (kWarpSide / 2) + lane / 4 * 4;
  const unsigned* const columns =
      stage + (kDepth + lane % 4 * 2) * kRowStride + warp / kWarpsAlong * (kWarpSide / 2) + lane / 4 * 4;
  for (int t = 0; t < kDepth; t += 16) {
    if (t == count) break;
    unsigned a[BFloat16Sums::kRowBlocks][4], b[BFloat16Sums::kTokenBlocks][2];
    for (int half = 0; half < 2; ++half) {
      const int at = (t + half * 8) * kRowStride;
      const FourWords row = loadFour(rows + at), nextRow = loadFour(rows + at + kRowStride);
      const FourWords column = loadFour(columns + at), nextColumn = loadFour(columns + at + kRowStride);
      for (int i = 0; i < 4; ++i) {
        a[i][2 * half] = lowerHalves(row.at[i], nextRow.at[i]);
        a[i][2 * half + 1] = upperHalves(row.at[i], nextRow.at[i]);
        b[2 * i][half] = lowerHalves(column.at[i], nextColumn.at[i]);
        b[2 * i + 1][half] = upperHalves(column.at[i], nextColumn.at[i]);
      }
    }
    for (int r = 0; r < BFloat16Sums::kRowBlocks; ++r)
      for (int c = 0; c < BFloat16Sums::kTokenBlocks; ++c) mma_m16n8k16_bf16(sums[r][c], a[r], b[c]);
  }
}

// each(address of four rows of a column of dW, how many of them exist, their sums) for all of this thread, whose warp
// has a panel's width of rows.
template <class Each>
__device__ __forceinline__ void eachOfWeight(const WeightProduct& product, const WeightTile& tile, const Part& part,
                                             BFloat16Sums::Sums& sums, const Each& each) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t panel = tile.row / kPanel + warp % kWarpsAlong;
  if (panel >= part.panels()) return;
  const int64_t width = part.panelWidth(panel);
  const int row = lane / 4 * 8,
            left = static_cast<int>(part.out - panel * kPanel < kPanel ? part.out - panel * kPanel : kPanel) - row;
  const int64_t column = tile.column + warp / kWarpsAlong * kWarpSide + lane % 4 * 16;
  float* const first = product.dW + part.panelOffset(panel) + column * width + row;
  for (int k = 0; k < 16; ++k) {
    if (column + k >= part.in) break;
    const int block = k % 8, second = k / 8;
    for (int i = 0; i < 2; ++i) {
      float(&even)[4] = sums[2 * i][block], (&odd)[4] = sums[2 * i + 1][block];
      each(first + k * width + 4 * i, left - 4 * i, even[second], even[2 + second], odd[second], odd[2 + second]);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2) weightKernel(WeightProduct product) {
  unsigned* const shared = shared_memory<unsigned>();
  const WeightTile tile = weightTile<kSide>(product.parts, blockIdx.x);
  const Part part = product.parts[tile.part];
  const int tokens = static_cast<int>(product.x.rows);
  float* const dBias = biasOf(product, tile, part, kSide);
  float bias = dBias == nullptr ? 0 : *dBias;

  WeightFeed feed(product, tile, part, shared);
  for (int i = 0; i + 1 < kStages; ++i) feed.next();
  BFloat16Sums::Sums sums = {};
  eachOfWeight(product, tile, part, sums, [](const float* from, int left, float& a, float& b, float& c, float& d) {
    if (left >= 4) {
      const float4 v = *reinterpret_cast<const float4*>(from);
      a = v.x, b = v.y, c = v.z, d = v.w;
      return;
    }
    if (left > 0) a = from[0];
    if (left > 1) b = from[1];
    if (left > 2) c = from[2];
  });
  int step = 0;
  for (int t = 0; t < tokens; t += kDepth) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the step is there for all, and the one before it, whose place next() fills, has been used
    feed.next();
    const unsigned* const stage = shared + step * kWeightStageWords;
    step = step + 1 == kStages ? 0 : step + 1;
    multiplyWeight(stage, tokens - t > 16 ? 32 : 16, sums);
    if (dBias != nullptr) {
      const BFloat16* const dy = reinterpret_cast<const BFloat16*>(stage) + threadIdx.x;
      for (int i = 0; i < kDepth && i < tokens - t; ++i) bias = bias + toFloat(dy[i * 2 * kRowStride]);
    }
  }
  eachOfWeight(product, tile, part, sums, [](float* to, int left, float a, float b, float c, float d) {
    if (left >= 4) {
      *reinterpret_cast<float4*>(to) = {a, b, c, d};
      return;
    }
    if (left > 0) to[0] = a;
    if (left > 1) to[1] = b;
    if (left > 2) to[2] = c;
  });
  if (dBias != nullptr) *dBias = bias;
}

__global__ void __launch_bounds__(kFloatThreads) weightFloatKernel(WeightProduct product) {
  __shared__ Shared<float[kFloatDepth][kFloatSide]> rows;
  __shared__ Shared<float[kFloatDepth][kFloatSide]> columns;
  const int x = threadIdx.x % kFloatGrid, y = threadIdx.x / kFloatGrid;
  const WeightTile tile = weightTile<kFloatSide>(product.parts, blockIdx.x);
  const Part part = product.parts[tile.part];
  const int64_t tokens = product.x.rows, panel = tile.row / kPanel, width = part.panelWidth(panel);
  static_assert(kFloatSide == kPanel);
  float* const first = product.dW + part.panelOffset(panel) + (tile.column + y) * width + x;
  float* const dBias = biasOf(product, tile, part, kFloatSide);
  float bias = dBias == nullptr ? 0 : *dBias;
  const auto exists = [&](int i, int j) {
    return tile.row + x + i * kFloatGrid < part.out && tile.column + y + j * kFloatGrid < part.in;
  };

  float sums[4][4] = {};
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j)
      if (exists(i, j)) sums[i][j] = first[j * kFloatGrid * width + i * kFloatGrid];
  for (int64_t t = 0; t < tokens; t += kFloatDepth) {
    __syncthreads();
    for (int i = threadIdx.x; i < kFloatDepth * kFloatSide; i += kFloatThreads) {
      const int own = i / kFloatSide, column = i % kFloatSide;
      const bool token = t + own < tokens;
      rows[own][column] =
          token && tile.row + column < part.out ? product.dy.row<float>(t + own)[part.outBegin + tile.row + column] : 0;
      columns[own][column] = token && tile.column + column < part.in
                                 ? product.x.row<float>(t + own)[part.inBegin + tile.column + column]
                                 : 0;
    }
    __syncthreads();
    for (int own = 0; own < kFloatDepth && t + own < tokens; ++own) {
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j)
          sums[i][j] = fma(rows[own][x + i * kFloatGrid], columns[own][y + j * kFloatGrid], sums[i][j]);
      if (dBias != nullptr) bias = bias + rows[own][threadIdx.x];
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j)
      if (exists(i, j)) first[j * kFloatGrid * width + i * kFloatGrid] = sums[i][j];
  if (dBias != nullptr) *dBias = bias;
}

}  // namespace

void linearBackwardInput(Queue& queue, Operand dy, const Weight& w, Output dx) {
  const WeightLayout& layout = *w.layout;
  const bool isFloat = w.dtype == DType::kFloat32, splitIn = layout.split == Split::kIn;
  const int side = isFloat ? kFloatSide : kSide;
  InputProduct product{dy, w.data, partsOf(queue, layout), splitIn, startsWide(dy), dx, blocksFor(dy.rows, side), 0};
  for (const Part& part : layout.parts) product.wide = product.wide && (part.out == 0 || part.outBegin % 8 == 0);
  for (const Part& part : layout.parts) {
    product.columnTiles += blocksFor(part.in, side);
    if (!splitIn) break;
  }
  unsigned blocks = product.tokenTiles * product.columnTiles;
  if (blocks == 0) return;

  float4* pending = nullptr;
  size_t pendingOfBlock = 0;
  if (!splitIn && product.parts.count > 1) {  // as many blocks as run at a time, so that what they keep is little
    blocks = std::min(blocks, joiningBlocks(queue));
    pendingOfBlock = (isFloat ? pendingBytes<FloatSums> : pendingBytes<BFloat16Sums>)(product.parts.count);
    pending = static_cast<float4*>(onGpu(queue).scratch(blocks * pendingOfBlock));
  }
  cudaStream_t const stream = onGpu(queue).stream();
  if (isFloat) {
    launch(inputFloatKernel, blocks, kFloatThreads, 0, stream, product, pending, pendingOfBlock / sizeof(float4));
  } else {
    launch(inputKernel, blocks, kThreads, kInputSharedBytes, stream, product, pending, pendingOfBlock / sizeof(float4));
  }
}

void linearBackwardWeight(Queue& queue, Operand dy, Operand x, WeightGradient dW, float* dBias) {
  const WeightLayout& layout = *dW.layout;
  const bool isFloat = dy.dtype == DType::kFloat32;
  const int side = isFloat ? kFloatSide : kSide;
  WeightProduct product{dy, x, dW.data, partsOf(queue, layout), startsWide(dy) && startsWide(x), dBias, -1};
  unsigned blocks = 0;
  for (int p = 0; p < product.parts.count; ++p) {
    const Part& part = layout.parts[p];
    const unsigned tiles = blocksFor(part.out, side) * blocksFor(part.in, side);
    if (tiles == 0) continue;
    product.wide = product.wide && part.outBegin % 8 == 0 && part.inBegin % 8 == 0;
    if (layout.split == Split::kIn && product.biasPart < 0) product.biasPart = p;
    blocks += tiles;
  }
  if (blocks == 0 || x.rows == 0) return;
  cudaStream_t const stream = onGpu(queue).stream();
  if (isFloat) {
    launch(weightFloatKernel, blocks, kFloatThreads, 0, stream, product);
  } else {
    launch(weightKernel, blocks, kThreads, kStages * kWeightStageWords * sizeof(unsigned), stream, product);
  }
}

}  // namespace lockstep::kernels::cuda
