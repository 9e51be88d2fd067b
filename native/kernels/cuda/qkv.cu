// Between the qkv projection and attention: per-head RMSNorm, rotary embedding (Su et al., 2021), rounding, and the
// keys and values into their pages; and the way back.
//
// 16 neighbouring threads take a head of a row at a time, as the lanes sum wants it. Forward, a block is one head of a
// tile of rows that share a block of 16 absolute positions: keys and values pass through shared memory, so that the
// words of a panel, which go across rows, are written whole and next to each other. Gains' gradients are one chain per
// element over all rows and heads: a block has few elements, of which a thread each adds up what the others prepare, a
// tile of steps ahead.
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

__device__ inline float rotated(float x, float across, float cosine, float sine, bool adds) {
  const float turn = across * sine;
  return fma(x, cosine, adds ? turn : -turn);
}

// Element i of the head x(0..K-1) rotated; kBack: by the transpose.
template <bool kBack, class Head>
__device__ float rotated(const Angles& angles, int i, const Head& x) {
  const int half = angles.half;
  if (angles.cosine == nullptr || i >= 2 * half) return x(i);
  const bool first = i < half;
  const int j = first ? i : i - half;
  return rotated(x(i), x(first ? i + half : j), angles.cosine[j], angles.sine[j], first == kBack);
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

constexpr int kGainColumns = 8, kGainSteps = 256;  // of a block, of a tile; a step is a row and a head
constexpr int kPreparers = 256, kGainThreads = kWarp + kPreparers;

// A step of one chain: it adds dy x r.
struct GainStep {
  float dy, xr;
};
using GainTile = GainStep[kGainSteps][kGainColumns];

template <int kCount>
__device__ inline void loadFloats(const float* from, float (&to)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = from[0];
  } else {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
}
template <int kCount>
__device__ inline void loadFloats(const BFloat16* from, float (&to)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = toFloat(from[0]);
  } else {
    const uint2 four = *reinterpret_cast<const uint2*>(from);
    const unsigned pairs[2] = {four.x, four.y};
    for (int i = 0; i < 4; ++i) to[i] = std::bit_cast<float>(i % 2 == 0 ? pairs[i / 2] << 16 : pairs[i / 2] & ~0xffffu);
  }
}

// What the gradients of gains are made of.
struct GainCall {
  QkvLayout layout;
  View<const float> dqkv;
  const int32_t* positions;
  Rope rope;
  Operand savedQk;
  const float* inverseRms;
};

// The steps of kEach of a block's columns, which begin at `first`, that a thread prepares of each tile: first loaded,
// then put where the chains find them. A step that is none, of padding or past the end, is -0 times 0: it changes no
// sum, not even one of -0.
template <class Element, int kEach>
class GainSteps {
 public:
  __device__ GainSteps(const GainCall& call, const int32_t* columns, int heads, int firstHead, int first)
      : call_(call), columns_(columns), heads_(heads), firstHead_(firstHead) {
    width_ = static_cast<int>(call.layout.attention.headWidth);
    column_ = first + preparer() % kAcross * kEach;
    const int half = width_ / 2, step = preparer() / kAcross;
    turns_ = call.rope.cosine != nullptr && column_ < 2 * half;
    isFirst_ = column_ < half;
    angle_ = isFirst_ ? column_ : column_ - half;
    across_ = isFirst_ ? column_ + half : angle_;
    row_ = step / heads;
    head_ = step % heads;
    rowsOn_ = kAtOnce / heads;
    headsOn_ = kAtOnce % heads;
  }

  // Finds out where the steps of the next tile are: a tile ahead, since what is loaded depends on it.
  __device__ void look() {
#pragma unroll
    for (int n = 0; n < kRounds; ++n) {
      next_[n] = {row_, head_, row_ < call_.dqkv.rows ? call_.positions[row_] : -1};
      row_ += rowsOn_;
      head_ += headsOn_;
      if (head_ < heads_) continue;
      head_ -= heads_;
      ++row_;
    }
  }

  // Begins to load what look() found, and looks further.
  __device__ void load() {
    const int half = width_ / 2, all = static_cast<int>(call_.layout.attention.heads) +
                                       static_cast<int>(call_.layout.attention.keyValueHeads);
#pragma unroll
    for (int n = 0; n < kRounds; ++n) {
      const Place at = next_[n];
      isStep_[n] = at.position >= 0 && column_ < width_;
      if (!isStep_[n]) continue;
      const float* in = call_.dqkv.row(at.row) + columns_[at.head];
      loadFloats(in + column_, own_[n]);
      if (turns_) {
        const int64_t angles = static_cast<int64_t>(at.position) * half + angle_;
        loadFloats(in + across_, opposite_[n]);
        loadFloats(call_.rope.cosine + angles, cosine_[n]);
        loadFloats(call_.rope.sine + angles, sine_[n]);
      }
      const int head = firstHead_ + at.head;
      loadFloats(call_.savedQk.row<Element>(at.row) + static_cast<int64_t>(head) * width_ + column_, x_[n]);
      r_[n] = call_.inverseRms[static_cast<int64_t>(at.row) * all + head];
    }
    look();
  }

  __device__ void put(GainTile& tile) const {
#pragma unroll
    for (int n = 0; n < kRounds; ++n) {
      GainStep steps[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float dy =
            turns_ ? rotated(own_[n][i], opposite_[n][i], cosine_[n][i], sine_[n][i], isFirst_) : own_[n][i];
        steps[i] = isStep_[n] ? GainStep{dy, x_[n][i] * r_[n]} : GainStep{-0.0f, 0.0f};
      }
      GainStep* to = &tile[n * kAtOnce + preparer() / kAcross][preparer() % kAcross * kEach];
      if constexpr (kEach == 1) {
        *to = steps[0];
      } else {
        auto* four = reinterpret_cast<float4*>(to);
        four[0] = {steps[0].dy, steps[0].xr, steps[1].dy, steps[1].xr};
        four[1] = {steps[2].dy, steps[2].xr, steps[3].dy, steps[3].xr};
      }
    }
  }

 private:
  static constexpr int kAcross = kGainColumns / kEach, kAtOnce = kPreparers / kAcross, kRounds = kGainSteps / kAtOnce;

  struct Place {
    int row, head, position;  // position < 0: no step
  };

  __device__ static int preparer() {
    return static_cast<int>(threadIdx.x) - kWarp;
  }

  const GainCall& call_;
  const int32_t* columns_;
  int heads_, firstHead_, column_, width_, angle_, across_;
  bool turns_, isFirst_;
  int row_, head_, rowsOn_, headsOn_;
  Place next_[kRounds];
  bool isStep_[kRounds] = {};
  float own_[kRounds][kEach] = {}, opposite_[kRounds][kEach] = {}, cosine_[kRounds][kEach] = {};
  float sine_[kRounds][kEach] = {}, x_[kRounds][kEach] = {}, r_[kRounds] = {};
};

// Both gains' gradients: blockIdx.y is 0 for queries, 1 for keys; a block has kGainColumns of the K chains, which are
// the first warp's. The other threads prepare the steps of kEach columns at a time.
template <class Element, int kEach>
__global__ void __launch_bounds__(kGainThreads, 1) gainKernel(GainCall call, float* dQueryGain, float* dKeyGain) {
  auto* tiles = shared_memory<GainTile>();                // two
  auto* columns = reinterpret_cast<int32_t*>(tiles + 2);  // where each head begins in a row of dqkv
  const AttentionShape& shape = call.layout.attention;
  const bool isQuery = blockIdx.y == 0, prepares = threadIdx.x >= kWarp;
  float* dGain = isQuery ? dQueryGain : dKeyGain;
  if (dGain == nullptr) return;
  const int heads = static_cast<int>(isQuery ? shape.heads : shape.keyValueHeads);
  const int lane = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kGainColumns,
            own = first + lane;
  for (int h = lane; h < heads; h += kGainThreads) {
    columns[h] = static_cast<int32_t>(isQuery ? call.layout.queryColumn(h) : call.layout.keyColumn(h));
  }
  __syncthreads();
  const int64_t steps = call.dqkv.rows * heads;
  GainSteps<Element, kEach> mine(call, columns, heads, isQuery ? 0 : static_cast<int>(shape.heads), first);
  if (prepares) {
    mine.look();
    mine.load();
  }
  const bool sums = lane < kGainColumns && own < shape.headWidth;
  float sum = sums ? dGain[own] : 0.0f;
  int buffer = 0;
  for (int64_t begin = 0; begin < steps; begin += kGainSteps, buffer ^= 1) {
    if (prepares) mine.put(tiles[buffer]);
    // One barrier per tile is enough: the buffer written next was read before it.
    __syncthreads();
    if (prepares) mine.load();
    if (!sums) continue;
#pragma unroll 64
    for (int s = 0; s < kGainSteps; ++s) {
      const GainStep step = tiles[buffer][s][lane];
      sum = fma(step.dy, step.xr, sum);
    }
  }
  if (sums) dGain[own] = sum;
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
  // A chain without steps keeps its sum, a denormal one too.
  const bool hasSteps = std::any_of(positions, positions + dqkv.rows, [](int32_t position) { return position >= 0; });
  if (!hasNorm || !hasSteps) return;
  const auto inFours = [](const void* data, int64_t stride, size_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % (4 * bytes) == 0 && stride % 4 == 0;
  };
  const bool whole = shape.headWidth % 8 == 0 && inFours(dqkv.data, dqkv.stride, sizeof(float)) &&
                     inFours(savedQk.data, savedQk.stride, sizeof(Element)) && inFours(rope.cosine, 0, sizeof(float)) &&
                     inFours(rope.sine, 0, sizeof(float));
  const size_t columnBytes = static_cast<size_t>(std::max(shape.heads, shape.keyValueHeads)) * sizeof(int32_t);
  launch(whole ? gainKernel<Element, 4> : gainKernel<Element, 1>, dim3(blocksFor(shape.headWidth, kGainColumns), 2),
         kGainThreads, 2 * sizeof(GainTile) + columnBytes, queue.stream(),
         GainCall{layout, dqkv, staged, rope, savedQk, inverseRms}, norm.queryGain == nullptr ? nullptr : dQueryGain,
         norm.keyGain == nullptr ? nullptr : dKeyGain);
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
