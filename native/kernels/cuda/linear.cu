// y = x W^T + bias and the activations behind it. Of bfloat16 the product runs on tensor cores (product.h). How it is
// cut depends on the number of rows of x only in which tile a block takes, so bits do not:
//   - few rows (decoding): narrow tiles, so that there are enough blocks to draw W through all of the memory's
//     channels. A weight split along in gives every part a block of its own; another kernel joins the parts.
//   - many rows (training): tiles of 128 x 128. A block goes through all parts of a weight split along in.
// Of float32, which is for tests, a thread computes 4 x 4 elements with plain multiply-adds.
//
// Either way an element is one chain over k, its parts are summed by the tree, and bias and output follow. A gated
// product takes a gate row and its up row into one tile, as long as up rows begin at a multiple of 4; otherwise, and of
// float32, the pre-activations go through memory, some rows at a time.
#include <algorithm>

#include "kernels/cuda/product.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr int64_t kManyRows = 1024;          // of x: always in tiles of 128
constexpr int64_t kScratchBytes = 64 << 20;  // about so much for the sums of parts or for pre-activations
constexpr unsigned kTileGroup = 16;          // so many tiles along tokens share a tile of W before the next one

// rows, tokens, depth, stages, warps along rows and along tokens, blocks that a multiprocessor of an A100 has room for
using Tile8 = Tile<32, 8, 128, 4, 2, 1, 3>;
using Tile32 = Tile<32, 32, 64, 4, 2, 2, 4>;
using Tile64 = Tile<64, 64, 64, 3, 2, 2, 2>;
using Tile128 = Tile<128, 128, 32, 4, 2, 2, 2>;

// --- what follows a product ------------------------------------------------------------------------------------------

enum class Then : uint8_t { kPart, kOutput, kSwiGlu, kGeluTanh };

struct Finish {
  Then then;
  const float* bias = nullptr;
  Output y{};                    // kOutput
  Operand activated{}, saved{};  // kSwiGlu, kGeluTanh; saved may be empty
  View<float> parts{};           // kPart: the sums of part p from row p T on
};

__device__ inline float biased(const float* bias, int64_t n, float value) {
  return bias == nullptr ? value : value + bias[n];
}

__device__ inline void putGated(const Finish& f, int64_t t, const Part& part, int64_t i, float gate, float up) {
  const int64_t half = part.out / 2, n = part.outBegin + i;
  gate = biased(f.bias, n, gate);
  up = biased(f.bias, n + half, up);
  if (!f.saved.empty()) {
    store(f.saved, t, n, gate);
    store(f.saved, t, n + half, up);
  }
  store(f.activated, t, part.outBegin / 2 + i, silu(gate) * up);
}

__device__ inline void putGelu(const Finish& f, int64_t t, int64_t n, float value) {
  value = biased(f.bias, n, value);
  if (!f.saved.empty()) store(f.saved, t, n, value);
  store(f.activated, t, n, geluTanh(value));
}

// --- where a tile is -------------------------------------------------------------------------------------------------

// All tiles of a product. A tile takes `rows` rows of W of a part, or as many gate and up rows together.
struct Grid {
  int rows, tokens;
  unsigned rowTiles, tokenTiles;
  bool gated, splitIn;

  static Grid make(const WeightLayout& layout, int64_t rowsOfX, int rows, int tokens, bool gated) {
    Grid grid{rows, tokens, 0, blocksFor(rowsOfX, tokens), gated, layout.split == Split::kIn};
    for (const Part& part : layout.parts) {
      grid.rowTiles += grid.tilesOf(part);
      if (grid.splitIn) break;
    }
    return grid;
  }
  constexpr unsigned count() const { return rowTiles * tokenTiles; }
  constexpr unsigned tilesOf(const Part& part) const {
    return gated ? blocksFor(part.out / 2, rows / 2) : blocksFor(part.out, rows);
  }
};

struct Place {
  int part;       // whose rows of W these are
  int64_t row;    // of the part; gated: of its gate rows
  int64_t token;  // of x
};

// kTileGroup tiles along tokens go through all of W together, so that blocks that run at a time read little of either.
__device__ inline Place placeOf(const Grid& grid, const Parts& parts, unsigned tile) {
  const unsigned perGroup = kTileGroup * grid.rowTiles, group = tile / perGroup, first = group * kTileGroup;
  const unsigned left = grid.tokenTiles - first, width = left < kTileGroup ? left : kTileGroup;
  const unsigned inGroup = tile - group * perGroup;
  unsigned row = inGroup / width;
  Place place{0, 0, static_cast<int64_t>(first + inGroup % width) * grid.tokens};
  for (; !grid.splitIn; ++place.part) {
    const unsigned tiles = grid.tilesOf(parts[place.part]);
    if (row < tiles) break;
    row -= tiles;
  }
  place.row = static_cast<int64_t>(row) * (grid.gated ? grid.rows / 2 : grid.rows);
  return place;
}

// From a tile in shared memory, [token][row], kStride apart; `own` is the part that it is of with Then::kPart.
// Neighbours write neighbours.
template <int kRows, int kTokens, int kThreads, int kStride>
__device__ __forceinline__ void finishTile(const Finish& f, const Grid& grid, const Place& place, const Part& part,
                                           int own, int64_t rowsOfX, const float* tile) {
  const int64_t tokens = rowsOfX - place.token;
  if (grid.gated) {
    constexpr int kColumns = kRows / 2;
    for (int i = threadIdx.x; i < kTokens * kColumns; i += kThreads) {
      const int t = i / kColumns, n = i % kColumns;
      const float* const at = tile + t * kStride + n;
      if (t < tokens && place.row + n < part.out / 2)
        putGated(f, place.token + t, part, place.row + n, at[0], at[kColumns]);
    }
    return;
  }
  for (int i = threadIdx.x; i < kTokens * kRows; i += kThreads) {
    const int t = i / kRows, n = i % kRows;
    if (t >= tokens || place.row + n >= part.out) continue;
    const int64_t token = place.token + t, column = part.outBegin + place.row + n;
    const float value = tile[t * kStride + n];
    if (f.then == Then::kPart)
      f.parts.row(own * rowsOfX + token)[column] = value;
    else if (f.then == Then::kOutput)
      put(f.y, token, column, biased(f.bias, column, value));
    else
      putGelu(f, token, column, value);
  }
}

// --- bfloat16 --------------------------------------------------------------------------------------------------------

// With Then::kPart blockIdx.y is the part that a block multiplies; otherwise it multiplies all of a weight split along
// in, and `pending` has room for what waits to be joined, of each block its own.
template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    productKernel(Product product, Grid grid, Finish f, float4* pending, size_t pendingOfBlock) {
  const bool apart = f.then == Then::kPart;
  pending += blockIdx.x * pendingOfBlock;
  for (unsigned tile = blockIdx.x; tile < grid.count(); tile += gridDim.x) {
    const Place place = placeOf(grid, product.parts, tile);
    const Part part = product.parts[place.part];
    const TileRows rows{place.row, place.row + (grid.gated ? part.out / 2 : T::kRows / 2)};
    const int begin = apart ? static_cast<int>(blockIdx.y) : place.part;
    const int end = grid.splitIn && !apart ? product.parts.count : begin + 1;
    const float* const result = productTile<T>(product, rows, place.token, begin, end, pending);

    finishTile<T::kRows, T::kTokens, T::kThreads, T::kResultStride>(f, grid, place, part, begin, product.x.rows,
                                                                    result);
    __syncthreads();  // before the next tile's operands arrive where the result lies
  }
}

// --- float32 ---------------------------------------------------------------------------------------------------------

constexpr int kPlainRows = 64, kPlainTokens = 32, kPlainDepth = 16, kPlainThreads = 128;

// A thread has rows 4 (thread % 16) .. + 3 of W and tokens 4 (thread / 16) .. + 3.
__global__ void __launch_bounds__(kPlainThreads) plainProductKernel(Product product, Grid grid, Finish f) {
  __shared__ Shared<float[kPlainDepth][kPlainRows]> w;
  __shared__ Shared<float[kPlainDepth][kPlainTokens + 1]> x;  // + 1: a warp writes 16 x 2 of them, a column each
  __shared__ Shared<float[kPlainTokens][kPlainRows]> result;
  const Place place = placeOf(grid, product.parts, blockIdx.x);
  const int own = grid.splitIn ? static_cast<int>(blockIdx.y) : place.part;
  const Part part = product.parts[own];
  const int64_t panel = place.row / kPanel, width = part.panelWidth(panel), tokens = product.x.rows - place.token;
  const float* const weight = static_cast<const float*>(product.weight) + part.panelOffset(panel);
  const int thread = static_cast<int>(threadIdx.x), row = thread % 16 * 4, token = thread / 16 * 4;
  float sums[4][4] = {};  // [token][row]
  for (int64_t begin = 0; begin < part.in; begin += kPlainDepth) {
    const int depth = static_cast<int>(part.in - begin < kPlainDepth ? part.in - begin : kPlainDepth);
    __syncthreads();
    for (int i = thread; i < kPlainDepth * kPlainRows; i += kPlainThreads) {
      const int k = i / kPlainRows, n = i % kPlainRows;
      if (k < depth && n < width) w[k][n] = weight[(begin + k) * width + n];
    }
    for (int i = thread; i < kPlainDepth * kPlainTokens; i += kPlainThreads) {
      const int k = i % kPlainDepth, t = i / kPlainDepth;
      if (k < depth && t < tokens) x[k][t] = product.x.row<float>(place.token + t)[part.inBegin + begin + k];
    }
    __syncthreads();
    for (int k = 0; k < depth; ++k) {
      for (int t = 0; t < 4; ++t)
        for (int n = 0; n < 4; ++n) sums[t][n] = fma(x[k][token + t], w[k][row + n], sums[t][n]);
    }
  }
  for (int t = 0; t < 4; ++t)
    for (int n = 0; n < 4; ++n) result[token + t][row + n] = sums[t][n];
  __syncthreads();
  finishTile<kPlainRows, kPlainTokens, kPlainThreads, kPlainRows>(f, grid, place, part, own, product.x.rows, result[0]);
}

// --- rows, element by element ----------------------------------------------------------------------------------------

constexpr int kRowThreads = 256, kEach = 4;  // elements of a thread

// A block has kRowThreads * kEach columns of a row.
struct RowSegments {
  unsigned perRow;
  static constexpr int kColumns = kRowThreads * kEach;
  explicit RowSegments(int64_t columns) : perRow(blocksFor(columns, kColumns)) {}

  // each(row, column) for the elements of this thread.
  template <class Each>
  __device__ void forEach(int64_t columns, const Each& each) const {
    const int64_t row = blockIdx.x / perRow, first = static_cast<int64_t>(blockIdx.x % perRow) * kColumns + threadIdx.x;
    for (int i = 0; i < kEach; ++i) {
      const int64_t column = first + i * kRowThreads;
      if (column < columns) each(row, column);
    }
  }
};

// The tree over kCount leaves.
template <int kCount>
__device__ inline float treeOf(const float* leaf, int64_t stride) {
  if constexpr (kCount == 1) {
    return *leaf;
  } else {
    const float left = treeOf<kCount / 2>(leaf, stride);
    return left + treeOf<kCount / 2>(leaf + kCount / 2 * stride, stride);
  }
}

// y from the sums of `count` parts. kGroup parts are read at once; their sums are joined as they come (joinPart).
template <int kGroup>
__global__ void joinPartsKernel(View<const float> parts, int count, int64_t rows, const float* bias, Output y,
                                RowSegments segments) {
  constexpr int kLevels = 16;
  const int64_t stride = rows * parts.stride;
  segments.forEach(parts.cols, [&](int64_t t, int64_t n) {
    float pending[kLevels] = {}, sum = 0;
    for (int group = 0; group < count / kGroup; ++group) {
      sum = treeOf<kGroup>(parts.row(t) + n + group * kGroup * stride, stride);
      bool joining = true;
      for (int level = 0; level < kLevels; ++level) {  // unrolled: `pending` stays in registers
        const bool full = group >> level & 1;
        if (joining && full) sum = pending[level] + sum;
        if (joining && !full) pending[level] = sum;
        joining = joining && full;
      }
    }
    put(y, t, n, biased(bias, n, sum));
  });
}

__global__ void finishSumKernel(View<const float> sum, const float* bias, View<const float> residual, View<float> y,
                                RowSegments segments) {
  segments.forEach(sum.cols,
                   [&](int64_t t, int64_t n) { y.row(t)[n] = residual.row(t)[n] + biased(bias, n, sum.row(t)[n]); });
}

__global__ void geluKernel(View<const float> pre, Finish f, RowSegments segments) {
  segments.forEach(pre.cols, [&](int64_t t, int64_t n) { putGelu(f, t, n, pre.row(t)[n]); });
}

__global__ void swiGluKernel(View<const float> pre, Parts parts, Finish f, RowSegments segments) {
  segments.forEach(pre.cols / 2, [&](int64_t t, int64_t n) {
    int p = 0;
    while (2 * n >= parts[p].outBegin + parts[p].out) ++p;
    const Part part = parts[p];
    const int64_t i = n - part.outBegin / 2;
    putGated(f, t, part, i, pre.row(t)[part.outBegin + i], pre.row(t)[part.outBegin + part.out / 2 + i]);
  });
}

// --- hosts -----------------------------------------------------------------------------------------------------------

template <class T>
void runTiles(Queue& queue, const Product& product, const WeightLayout& layout, const Finish& f) {
  const Grid grid = Grid::make(layout, product.x.rows, T::kRows, T::kTokens, f.then == Then::kSwiGlu);
  const bool apart = f.then == Then::kPart, joins = grid.splitIn && !apart && product.parts.count > 1;
  // What waits to be joined should stay in the cache: as many blocks as run at a time.
  const unsigned blocks = joins ? std::min(grid.count(), joiningBlocks(queue)) : grid.count();
  if (blocks == 0) return;
  const size_t pendingOfBlock = joins ? pendingBytes<T>(product.parts.count) : 0;
  auto* const pending = joins ? static_cast<float4*>(onGpu(queue).scratch(blocks * pendingOfBlock)) : nullptr;
  launch(productKernel<T>, dim3(blocks, apart ? product.parts.count : 1), T::kThreads, T::kSharedBytes,
         onGpu(queue).stream(), product, grid, f, pending, pendingOfBlock / sizeof(float4));
}

// Whether tiles of 128 x 128 keep the GPU busy.
bool takesLargeTiles(const WeightLayout& layout, int64_t rows, bool gated) {
  if (rows >= kManyRows) return true;
  return rows > Tile64::kTokens &&
         Grid::make(layout, rows, Tile128::kRows, Tile128::kTokens, gated).count() >= kMultiprocessors;
}

void runProduct(Queue& queue, const Product& product, const WeightLayout& layout, const Finish& f) {
  const int64_t rows = product.x.rows;
  if (product.x.dtype == DType::kFloat32) {
    const Grid grid = Grid::make(layout, rows, kPlainRows, kPlainTokens, false);
    const unsigned parts = f.then == Then::kPart ? product.parts.count : 1;
    if (grid.count() > 0)
      launch(plainProductKernel, dim3(grid.count(), parts), kPlainThreads, 0, onGpu(queue).stream(), product, grid, f);
  } else if (f.then != Then::kPart && takesLargeTiles(layout, rows, f.then == Then::kSwiGlu)) {
    runTiles<Tile128>(queue, product, layout, f);
  } else if (rows > Tile32::kTokens) {
    runTiles<Tile64>(queue, product, layout, f);
  } else if (rows > Tile8::kTokens) {
    runTiles<Tile32>(queue, product, layout, f);
  } else {
    runTiles<Tile8>(queue, product, layout, f);
  }
}

Output slice(const Output& y, int64_t begin, int64_t count) {
  switch (y.kind) {
    case Output::Kind::kStore:
      return Output::store(y.f32.slice(begin, count));
    case Output::Kind::kRound:
      return Output::round(y.operand.slice(begin, count));
    case Output::Kind::kAdd:
      return Output::add(y.residual.slice(begin, count), y.f32.slice(begin, count));
  }
  return y;
}

// body(first row, rows) for all rows, as many at a time as kScratchBytes have room for at `bytes` each.
template <class Body>
void someRowsAtATime(int64_t rows, int64_t bytes, const Body& body) {
  const int64_t most = std::max<int64_t>(1, kScratchBytes / bytes);
  for (int64_t first = 0; first < rows; first += most) body(first, std::min(most, rows - first));
}

// A weight split along in, its parts multiplied apart and then joined.
void linearOfParts(Queue& queue, const Operand& x, const Weight& w, const float* bias, const Output& y) {
  const WeightLayout& layout = *w.layout;
  const int64_t count = static_cast<int64_t>(layout.parts.size());
  someRowsAtATime(x.rows, count * layout.out * 4, [&](int64_t first, int64_t rows) {
    const View<float> sums = dense(onGpu(queue).scratchOf<float>(count * rows * layout.out), count * rows, layout.out);
    const Product product = Product::make(queue, x.slice(first, rows), w);
    runProduct(queue, product, layout, {.then = Then::kPart, .parts = sums});
    const RowSegments segments(layout.out);
    const auto kernel = count == 2 ? joinPartsKernel<2> : count == 4 ? joinPartsKernel<4> : joinPartsKernel<8>;
    launch(kernel, segments.perRow * static_cast<unsigned>(rows), kRowThreads, 0, onGpu(queue).stream(), sums,
           static_cast<int>(count), rows, bias, slice(y, first, rows), segments);
  });
}

}  // namespace

void linear(Queue& queue, Operand x, const Weight& w, const float* bias, Output y) {
  const WeightLayout& layout = *w.layout;
  if (x.rows == 0 || layout.out == 0) return;
  const bool parts = layout.split == Split::kIn && layout.parts.size() > 1;
  if (parts && (w.dtype == DType::kFloat32 || !takesLargeTiles(layout, x.rows, false)))
    return linearOfParts(queue, x, w, bias, y);
  runProduct(queue, Product::make(queue, x, w), layout, {.then = Then::kOutput, .bias = bias, .y = y});
}

void finishSum(Queue& queue, View<const float> sum, const float* bias, View<const float> residual, View<float> y) {
  if (sum.rows == 0 || sum.cols == 0) return;
  const RowSegments segments(sum.cols);
  launch(finishSumKernel, segments.perRow * static_cast<unsigned>(sum.rows), kRowThreads, 0, onGpu(queue).stream(), sum,
         bias, residual, y, segments);
}

void activatedLinear(Queue& queue, Operand x, const Weight& w, const float* bias, Activation activation, Operand y,
                     Operand saved) {
  const WeightLayout& layout = *w.layout;
  if (x.rows == 0 || layout.out == 0) return;
  const bool gated = activation == Activation::kSwiGlu;
  const Finish f{.then = gated ? Then::kSwiGlu : Then::kGeluTanh, .bias = bias, .activated = y, .saved = saved};
  const bool fuses =
      w.dtype == DType::kBFloat16 && std::all_of(layout.parts.begin(), layout.parts.end(),
                                                 [&](const Part& part) { return !gated || part.out / 2 % 4 == 0; });
  if (fuses) return runProduct(queue, Product::make(queue, x, w), layout, f);
  someRowsAtATime(x.rows, layout.out * 4, [&](int64_t first, int64_t rows) {
    const View<float> pre = dense(onGpu(queue).scratchOf<float>(rows * layout.out), rows, layout.out);
    const Product product = Product::make(queue, x.slice(first, rows), w);
    runProduct(queue, product, layout, {.then = Then::kOutput, .y = Output::store(pre)});
    Finish rest = f;
    rest.activated = y.slice(first, rows);
    if (!saved.empty()) rest.saved = saved.slice(first, rows);
    const RowSegments segments(gated ? layout.out / 2 : layout.out);
    const unsigned blocks = segments.perRow * static_cast<unsigned>(rows);
    cudaStream_t const stream = onGpu(queue).stream();
    if (gated)
      launch(swiGluKernel, blocks, kRowThreads, 0, stream, pre, product.parts, rest, segments);
    else
      launch(geluKernel, blocks, kRowThreads, 0, stream, pre, rest, segments);
  });
}

}  // namespace lockstep::kernels::cuda
