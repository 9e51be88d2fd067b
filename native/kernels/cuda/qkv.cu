// Between the qkv projection and attention: per-head RMSNorm, rotary embedding (Su et al., 2021), rounding, and the
// keys and values into their pages; and the way back.
//
// 16 neighbouring threads take a head of a row at a time, as the lanes sum wants it. Forward, a block is one head of a
// tile of rows that share a block of 16 absolute positions: keys and values pass through shared memory, so that the
// words of a panel, which go across rows, are written whole and next to each other. Gains' gradients are one chain per
// element over all rows and heads; what it adds up is prepared by the whole block, a tile of steps ahead.
#include <algorithm>
#include <vector>

#include "kernels/cuda/cuda.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr int kThreads = 128, kLanes = 16, kRowsAtOnce = kThreads / kLanes, kTileRows = 16;

// --- a head of a row ------------------------------------------------------------------------------------------------

// Cosines and sines of one position, [K / 2] each; null: no rotation.
struct Angles {
  const float *cosine, *sine;
  int half;

  __device__ static Angles at(const Rope& rope, int64_t position, int width) {
    if (rope.cosine == nullptr) return {nullptr, nullptr, width / 2};
    return {rope.cosine + position * (width / 2), rope.sine + position * (width / 2), width / 2};
  }
};

// Element i of the head x(0..K-1) rotated; kBack: by the transpose.
template <bool kBack, class Head>
__device__ float rotated(const Angles& angles, int i, const Head& x) {
  const int half = angles.half;
  if (angles.cosine == nullptr || i >= 2 * half) return x(i);
  const bool first = i < half;
  const int j = first ? i : i - half;
  const float across = x(first ? i + half : j) * angles.sine[j];
  return fma(x(i), angles.cosine[j], first == kBack ? across : -across);
}

// 1 / RMS of the head x(0..K-1), to the 16 threads that hold it.
template <class Head>
__device__ float headInverseRms(int lane, int width, float eps, const Head& x) {
  const float squares = lanesSum16(lane, width, [&](float acc, int64_t i) { return fma(x(i), x(i), acc); });
  return inverseRoot(squares / static_cast<float>(width), eps);
}

template <class Element>
__device__ Element rounded(float x) {
  if constexpr (sizeof(Element) == sizeof(float)) {
    return x;
  } else {
    return toBFloat16(x);
  }
}

__device__ unsigned pairOf(float even, float odd) {
  return toBFloat16(even).bits | static_cast<unsigned>(toBFloat16(odd).bits) << 16;
}

// --- forward --------------------------------------------------------------------------------------------------------

// `count` rows from `row` on: of one sequence, from `position` on, in one block of 16 positions of `page`; or, with
// page < 0, of no sequence.
struct RowTile {
  int32_t page, row, position, count;
};

void addPadding(std::vector<RowTile>& tiles, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kTileRows) {
    const int64_t count = std::min<int64_t>(kTileRows, end - row);
    tiles.push_back({-1, static_cast<int32_t>(row), 0, static_cast<int32_t>(count)});
  }
}

// All rows of a call. The memory is kept, so that queues see it at the same place again.
const std::vector<RowTile>& rowTiles(const Sequences& sequences, int64_t rows) {
  static thread_local std::vector<RowTile> tiles;
  tiles.clear();
  int64_t row = 0;
  for (int64_t b = 0; b < sequences.count; ++b) {
    addPadding(tiles, row, sequences.rowBegin[b]);
    row = sequences.rowBegin[b];
    const int64_t end = row + sequences.length[b];
    for (int64_t position = sequences.offset[b]; row < end;) {
      const int64_t count = std::min(end - row, kTileRows - position % kTileRows);
      tiles.push_back({sequences.pages[b * sequences.pageStride + position / kPagePositions], static_cast<int32_t>(row),
                       static_cast<int32_t>(position), static_cast<int32_t>(count)});
      row += count;
      position += count;
    }
  }
  addPadding(tiles, row, rows);
  return tiles;
}

// Keys of the slots slot..slot+count-1 from `rows` [count, stride] into their panel.
__device__ void writeKeys(float* panel, int slot, int count, const float* rows, int stride, int width) {
  const int padded = static_cast<int>(roundUp(width, 2));
  for (int index = threadIdx.x; index < padded * kTileRows; index += kThreads) {
    const int r = index % kTileRows, i = index / kTileRows;
    if (r < count) panel[i * kPagePositions + slot + r] = i < width ? rows[r * stride + i] : 0.0f;
  }
}
__device__ void writeKeys(BFloat16* panel, int slot, int count, const float* rows, int stride, int width) {
  unsigned* words = reinterpret_cast<unsigned*>(panel);
  const int pairs = (width + 1) / 2;
  for (int index = threadIdx.x; index < pairs * kTileRows; index += kThreads) {
    const int r = index % kTileRows, i = index / kTileRows * 2;
    if (r >= count) continue;
    const float* x = rows + r * stride + i;
    words[i / 2 * kPagePositions + slot + r] = pairOf(x[0], i + 1 < width ? x[1] : 0.0f);
  }
}

// Values, the same; zeros in the panel's padding. Panels are 64 dimensions wide, the last one narrower.
__device__ void writeValues(float* panel, int slot, int count, const float* rows, int stride, int width) {
  const int padded = static_cast<int>(roundUp(width, kPanelGrain)), full = kPanel;
  for (int index = threadIdx.x; index < padded * count; index += kThreads) {
    const int r = index / padded, n = index - r * padded, begin = n / full * full;
    const int w = padded - begin < full ? padded - begin : full;
    panel[begin * kPagePositions + (slot + r) * w + n - begin] = n < width ? rows[r * stride + n] : 0.0f;
  }
}
// A word holds the positions 2 p and 2 p + 1 of a dimension. Of one that reaches beyond the tile only its half is
// written: the other may belong to another block.
__device__ void writeValues(BFloat16* panel, int slot, int count, const float* rows, int stride, int width) {
  const int padded = static_cast<int>(roundUp(width, kPanelGrain)), full = kPanel;
  const int first = slot / 2, pairs = (slot + count + 1) / 2 - first;
  for (int index = threadIdx.x; index < padded * pairs; index += kThreads) {
    const int p = index / padded, n = index - p * padded, begin = n / full * full;
    const int w = padded - begin < full ? padded - begin : full;
    const int even = 2 * (first + p) - slot, odd = even + 1;  // rows
    const auto value = [&](int r) { return n < width ? rows[r * stride + n] : 0.0f; };
    BFloat16* to = panel + begin * kPagePositions + (first + p) * 2 * w + 2 * (n - begin);
    if (even >= 0 && odd < count) {
      *reinterpret_cast<unsigned*>(to) = pairOf(value(even), value(odd));
    } else if (even >= 0) {
      to[0] = toBFloat16(value(even));
    } else {
      to[1] = toBFloat16(value(odd));
    }
  }
}

// blockIdx.y: a query head, a key head or a value head.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    prepareKernel(QkvLayout layout, View<const float> qkv, const RowTile* tiles, HeadNorm norm, Rope rope, Operand q,
                  KvPages kv, Operand savedQk) {
  const AttentionShape& shape = layout.attention;
  const int width = static_cast<int>(shape.headWidth), heads = static_cast<int>(shape.heads);
  const int groups = static_cast<int>(shape.keyValueHeads), head = static_cast<int>(blockIdx.y);
  const bool isQuery = head < heads, isValue = head >= heads + groups;
  const int g = isQuery ? 0 : isValue ? head - heads - groups : head - heads;
  const int64_t column = isQuery ? layout.queryColumn(head) : isValue ? layout.valueColumn(g) : layout.keyColumn(g);
  const RowTile tile = tiles[blockIdx.x];
  const float* gain = isQuery ? norm.queryGain : isValue ? nullptr : norm.keyGain;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, stride = width | 1;  // odd: no bank conflicts across rows
  float* rows = shared_memory<float>();                                         // [count, stride]
  for (int first = 0; first < tile.count; first += kRowsAtOnce) {
    const int r = first + static_cast<int>(threadIdx.x) / kLanes;
    const bool active = r < tile.count;
    const int64_t row = tile.row + (active ? r : 0);  // all threads of a warp take part in its sums
    const float* in = qkv.row(row) + column;
    const bool saves = active && !isValue && !savedQk.empty();
    Element* saved = saves ? savedQk.row<Element>(row) + static_cast<int64_t>(head) * width : nullptr;
    if (tile.page < 0) {
      for (int i = lane; i < width && active && isQuery; i += kLanes)
        q.row<Element>(row)[static_cast<int64_t>(head) * width + i] = rounded<Element>(0.0f);
      for (int i = lane; i < width && saves; i += kLanes) saved[i] = rounded<Element>(0.0f);
      continue;
    }
    const auto x = [&](int64_t i) { return in[i]; };
    const float scale = gain == nullptr ? 1.0f : headInverseRms(lane, width, norm.eps, x);
    if (!active) continue;
    const auto normed = [&](int i) { return gain == nullptr ? in[i] : in[i] * scale * gain[i]; };
    const Angles angles = Angles::at(isValue ? Rope{} : rope, tile.position + r, width);
    for (int i = lane; i < width; i += kLanes) {
      if (saves) saved[i] = rounded<Element>(in[i]);
      const float y = rotated<false>(angles, i, normed);
      if (isQuery) {
        q.row<Element>(row)[static_cast<int64_t>(head) * width + i] = rounded<Element>(y);
      } else {
        rows[r * stride + i] = y;
      }
    }
  }
  if (isQuery || tile.page < 0) return;
  __syncthreads();
  Element* data = static_cast<Element*>(kv.data);
  const int slot = tile.position % static_cast<int>(kPagePositions);
  if (isValue) {
    writeValues(data + kv.valuePanel(tile.page, g), slot, tile.count, rows, stride, width);
  } else {
    writeKeys(data + kv.keyPanel(tile.page, g), slot, tile.count, rows, stride, width);
  }
}

// --- backward -------------------------------------------------------------------------------------------------------

// dqkvOut; and, where there is a norm, 1 / RMS of every head to inverseRms [T, H + G]. blockIdx.y as above.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    prepareBackwardKernel(QkvLayout layout, View<const float> dqkv, const int32_t* positions, HeadNorm norm, Rope rope,
                          Operand savedQk, Operand dqkvOut, float* inverseRms) {
  const AttentionShape& shape = layout.attention;
  const int width = static_cast<int>(shape.headWidth), heads = static_cast<int>(shape.heads);
  const int groups = static_cast<int>(shape.keyValueHeads), head = static_cast<int>(blockIdx.y);
  const bool isQuery = head < heads, isValue = head >= heads + groups;
  const int64_t column = isQuery   ? layout.queryColumn(head)
                         : isValue ? layout.valueColumn(head - heads - groups)
                                   : layout.keyColumn(head - heads);
  const float* gain = isQuery ? norm.queryGain : isValue ? nullptr : norm.keyGain;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * kRowsAtOnce + threadIdx.x / kLanes;
  const bool active = mine < dqkv.rows;
  const int64_t t = active ? mine : 0;  // all threads of a warp take part in its sums
  const int position = positions[t] < 0 ? 0 : positions[t];
  const float* in = dqkv.row(t) + column;
  Element* out = dqkvOut.row<Element>(t) + column;
  const auto incoming = [&](int i) { return in[i]; };
  const Angles angles = Angles::at(isValue ? Rope{} : rope, position, width);
  const auto dy = [&](int i) { return rotated<true>(angles, i, incoming); };
  const auto write = [&](const auto& dx) {
    if (!active) return;
    for (int i = lane; i < width; i += kLanes) out[i] = rounded<Element>(positions[t] < 0 ? 0.0f : dx(i));
  };
  if (gain == nullptr) return write(dy);
  const Element* saved = savedQk.row<Element>(t) + static_cast<int64_t>(head) * width;
  const auto x = [&](int64_t i) { return toFloat(saved[i]); };
  const float r = headInverseRms(lane, width, norm.eps, x);
  const float dot =
      lanesSum16(lane, width, [&](float acc, int64_t i) { return fma(dy(static_cast<int>(i)) * gain[i], x(i), acc); });
  const float c = dot * (r * r) / static_cast<float>(width);
  write([&](int i) { return r * fma(-c, x(i), dy(i) * gain[i]); });
  if (active && lane == 0) inverseRms[t * (heads + groups) + head] = r;
}

constexpr int kGainThreads = 256, kGainColumns = 16, kGainSteps = 128;  // steps: a row and a head each
constexpr int kGainRows = kGainThreads / kGainColumns, kGainEach = kGainSteps / kGainRows;

// Both gains' gradients: blockIdx.y is 0 for queries, 1 for keys; a block has kGainColumns of the K chains.
template <class Element>
__global__ void __launch_bounds__(kGainThreads)
    gainKernel(QkvLayout layout, View<const float> dqkv, const int32_t* positions, HeadNorm norm, Rope rope,
               Operand savedQk, const float* inverseRms, float* dQueryGain, float* dKeyGain) {
  __shared__ Shared<float[2][kGainSteps][kGainColumns]> dyTile, xrTile;
  __shared__ Shared<bool[2][kGainSteps]> isStep;
  auto& dys = static_cast<float(&)[2][kGainSteps][kGainColumns]>(dyTile);
  auto& xrs = static_cast<float(&)[2][kGainSteps][kGainColumns]>(xrTile);
  auto& present = static_cast<bool(&)[2][kGainSteps]>(isStep);
  const AttentionShape& shape = layout.attention;
  const bool isQuery = blockIdx.y == 0;
  float* dGain = isQuery ? dQueryGain : dKeyGain;
  if ((isQuery ? norm.queryGain : norm.keyGain) == nullptr) return;
  const int width = static_cast<int>(shape.headWidth), all = static_cast<int>(shape.heads + shape.keyValueHeads);
  const int heads = static_cast<int>(isQuery ? shape.heads : shape.keyValueHeads);
  const int firstHead = isQuery ? 0 : static_cast<int>(shape.heads);
  const int lane = static_cast<int>(threadIdx.x) % kGainColumns, group = static_cast<int>(threadIdx.x) / kGainColumns;
  const int i = static_cast<int>(blockIdx.x) * kGainColumns + lane;
  const int64_t steps = dqkv.rows * heads;

  float dy[kGainEach], xr[kGainEach];
  unsigned isRow = 0;  // a bit for each
  const auto prepare = [&](int64_t begin) {
    isRow = 0;
#pragma unroll
    for (int n = 0; n < kGainEach; ++n) {
      const int64_t index = begin + n * kGainRows + group;
      const int64_t t = index / heads;
      const bool counts = index < steps && positions[t] >= 0;
      if (counts) isRow |= 1u << n;
      if (!counts || i >= width) continue;
      const int head = static_cast<int>(index - t * heads);
      const float* in = dqkv.row(t) + (isQuery ? layout.queryColumn(head) : layout.keyColumn(head));
      dy[n] = rotated<true>(Angles::at(rope, positions[t], width), i, [&](int k) { return in[k]; });
      const float x = toFloat(savedQk.row<Element>(t)[static_cast<int64_t>(firstHead + head) * width + i]);
      xr[n] = x * inverseRms[t * all + firstHead + head];
    }
  };
  prepare(0);
  float sum = threadIdx.x < kGainColumns && i < width ? dGain[i] : 0.0f;
  int buffer = 0;
  for (int64_t begin = 0; begin < steps; begin += kGainSteps, buffer ^= 1) {
#pragma unroll
    for (int n = 0; n < kGainEach; ++n) {
      const int s = n * kGainRows + group;
      dys[buffer][s][lane] = dy[n];
      xrs[buffer][s][lane] = xr[n];
      if (lane == 0) present[buffer][s] = (isRow >> n & 1) != 0;
    }
    // One barrier per tile is enough: the buffer written next was read before it.
    __syncthreads();
    prepare(begin + kGainSteps);
    if (threadIdx.x < kGainColumns) {
#pragma unroll 16
      for (int s = 0; s < kGainSteps; ++s) {
        const float next = fma(dys[buffer][s][lane], xrs[buffer][s][lane], sum);
        sum = present[buffer][s] ? next : sum;
      }
    }
  }
  if (threadIdx.x < kGainColumns && i < width) dGain[i] = sum;
}

template <class Element>
void prepare(lockstep::cuda::Queue& queue, const QkvLayout& layout, View<const float> qkv, const Sequences& sequences,
             const HeadNorm& norm, const Rope& rope, Operand q, const KvPages& kv, Operand savedQk) {
  const std::vector<RowTile>& tiles = rowTiles(sequences, qkv.rows);
  const RowTile* staged = queue.stage(tiles.data(), static_cast<int64_t>(tiles.size()));
  const AttentionShape& shape = layout.attention;
  const dim3 grid(static_cast<unsigned>(tiles.size()), static_cast<unsigned>(shape.heads + 2 * shape.keyValueHeads));
  const size_t sharedBytes = kTileRows * static_cast<size_t>(shape.headWidth | 1) * sizeof(float);
  launch(prepareKernel<Element>, grid, kThreads, sharedBytes, queue.stream(), layout, qkv, staged, norm, rope, q, kv,
         savedQk);
}

template <class Element>
void prepareBackward(lockstep::cuda::Queue& queue, const QkvLayout& layout, View<const float> dqkv,
                     const int32_t* positions, const HeadNorm& norm, const Rope& rope, Operand savedQk, Operand dqkvOut,
                     float* dQueryGain, float* dKeyGain) {
  const AttentionShape& shape = layout.attention;
  const int32_t* staged = queue.stage(positions, dqkv.rows);
  const bool hasNorm = norm.queryGain != nullptr || norm.keyGain != nullptr;
  float* inverseRms = hasNorm ? queue.scratchOf<float>(dqkv.rows * (shape.heads + shape.keyValueHeads)) : nullptr;
  const dim3 grid(blocksFor(dqkv.rows, kRowsAtOnce), static_cast<unsigned>(shape.heads + 2 * shape.keyValueHeads));
  launch(prepareBackwardKernel<Element>, grid, kThreads, 0, queue.stream(), layout, dqkv, staged, norm, rope, savedQk,
         dqkvOut, inverseRms);
  if (!hasNorm) return;
  launch(gainKernel<Element>, dim3(blocksFor(shape.headWidth, kGainColumns), 2), kGainThreads, 0, queue.stream(),
         layout, dqkv, staged, norm, rope, savedQk, inverseRms, dQueryGain, dKeyGain);
}

}  // namespace

void qkvPrepare(Queue& queue, const QkvLayout& layout, View<const float> qkv, const Sequences& sequences,
                const HeadNorm& norm, const Rope& rope, Operand q, const KvPages& kv, Operand savedQk) {
  if (qkv.rows == 0) return;
  const auto run = q.dtype == DType::kFloat32 ? prepare<float> : prepare<BFloat16>;
  run(onGpu(queue), layout, qkv, sequences, norm, rope, q, kv, savedQk);
}

void qkvPrepareBackward(Queue& queue, const QkvLayout& layout, View<const float> dqkv, const int32_t* positions,
                        const HeadNorm& norm, const Rope& rope, Operand savedQk, Operand dqkvOut, float* dQueryGain,
                        float* dKeyGain) {
  if (dqkv.rows == 0) return;
  const auto run = dqkvOut.dtype == DType::kFloat32 ? prepareBackward<float> : prepareBackward<BFloat16>;
  run(onGpu(queue), layout, dqkv, positions, norm, rope, savedQk, dqkvOut, dQueryGain, dKeyGain);
}

}  // namespace lockstep::kernels::cuda
