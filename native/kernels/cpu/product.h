// y = x W^T and dx = dy W as one loop nest: tasks of rows x output panels; within a task the contraction goes leaf by leaf
// (a part of a split dimension is a leaf) in chunks that fit the caches, panels of the right operand outside, tiles of rows
// inside. Where the operands come from and where results go is the caller's.
#pragma once

#include <cstring>

#include "core/queue.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/tile.h"
#include "kernels/kernels.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

constexpr int64_t kChunk = 512;       // steps of a chain at a time: a panel chunk is 128 KiB of float32
constexpr int64_t kBlockPanels = 3;   // panels of a block: 384 KiB, kept in the second-level cache while rows pass by
constexpr int64_t kBlockRows = 512;   // rows of a task: what preparing a panel costs is spread over them
constexpr int kMaxLevels = 8;         // levels of the tree over parts, plus one
// Up to so many rows bfloat16 pairs are split on the way: widening a panel first would cost more than it saves.
constexpr int64_t kDirectRows = 12;

LOCKSTEP_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LOCKSTEP_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// One leaf of the contraction: columns begin .. begin + count - 1 of the left operand.
struct Leaf {
  int64_t begin, count;
};

// One panel of output columns: `columns` of them (the width is rounded up to 16) from column `begin` of the output.
struct OutputPanel {
  int64_t begin, columns;
  int vectors() const { return static_cast<int>((columns + 15) / 16); }
};

// How the operands of one product are read. Pairs count as one step.
struct Format {
  DType dtype;
  Steps steps;
  // Steps of `count` elements, and the element where step s begins.
  int64_t of(int64_t count) const { return dtype == DType::kFloat32 ? count : steps == Steps::kPairs ? (count + 1) / 2 : roundUp(count, 2); }
};

// 8 pairs: halves swapped, then widened.
LOCKSTEP_INLINE void swapWiden(const BFloat16* from, float* out) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i swapped = _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_srli_epi32(x, 16));
  const __m256i low = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(swapped)), 16);
  const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(swapped, 1)), 16);
  _mm256_storeu_ps(out, _mm256_castsi256_ps(low));
  _mm256_storeu_ps(out + 8, _mm256_castsi256_ps(high));
}

// Rows begin .. begin + rows - 1, columns column .. column + count - 1 of a bfloat16 operand as steps: widened with the odd
// element of each pair first, or as pairs; a missing last element is zero. [rows][format.of(count)].
inline void prepareLeft(Operand x, int64_t begin, int64_t rows, int64_t column, int64_t count, Format format, float* out) {
  const int64_t steps = format.of(count);
  for (int64_t r = 0; r < rows; ++r, out += steps) {
    const BFloat16* from = x.row<BFloat16>(begin + r) + column;
    if (format.steps == Steps::kPairs) {
      out[steps - 1] = 0.0f;
      std::memcpy(out, from, static_cast<size_t>(count) * 2);
      continue;
    }
    int64_t k = 0;
    for (; k + 16 <= count; k += 16) swapWiden(from + k, out + k);
    for (; k + 2 <= count; k += 2) {
      out[k] = toFloat(from[k + 1]);
      out[k + 1] = toFloat(from[k]);
    }
    if (k < count) {
      out[k] = 0.0f;
      out[k + 1] = toFloat(from[k]);
    }
  }
}

// pairs rows of 16 * vectors bfloat16 pairs, `from` apart by fromStep floats -> 2 * pairs rows of float32, odd elements first.
inline void widenPanel(const float* from, int64_t fromStep, int64_t pairs, int vectors, float* out) {
  for (int64_t p = 0; p < pairs; ++p, from += fromStep, out += 2 * 16 * vectors) {
    for (int j = 0; j < vectors; ++j) {
      const Pairs x = loadPairs(from + 16 * j);
      storeu(out + 16 * j, odd(x));
      storeu(out + 16 * (vectors + j), even(x));
    }
  }
}

// What a finished tile becomes. `values` [rows][ldv]: value of row r, column j of the panel.
struct Sink {
  const Output* output;
  const float* bias;  // per output column, or null

  void take(int64_t row, int64_t rows, int64_t column, int64_t columns, const float* values, int64_t ldv) const {
    for (int64_t r = 0; r < rows; ++r) takeRow(row + r, column, columns, values + r * ldv);
  }

  LOCKSTEP_MEMBER void takeRow(int64_t row, int64_t column, int64_t columns, const float* values) const {
    eachVector(columns, [&](int64_t j, auto lanes) {
      Vec x = load(values + j, lanes);
      if (bias != nullptr) x = x + load(bias + column + j, lanes);
      switch (output->kind) {
        case Output::Kind::kStore:
          return store(output->f32.row(row) + column + j, x, lanes);
        case Output::Kind::kAdd:
          return store(output->f32.row(row) + column + j, load(output->residual.row(row) + column + j, lanes) + x, lanes);
        case Output::Kind::kRound:
          if (output->operand.dtype == DType::kFloat32) {
            store(output->operand.row<float>(row) + column + j, x, lanes);
          } else {
            store(output->operand.row<BFloat16>(row) + column + j, x, lanes);
          }
      }
    });
  }
};

// A product: its left operand, its leaves, its output panels, and the right operand, which gives a panel's steps
// [begin, begin + count) elements of a leaf: prepare(panel, leaf, begin, count, format, buffer) returns them, in place or in
// `buffer`.
template <class RightOperand>
struct Product {
  Operand left;
  int64_t leafCount;
  int64_t panelCount;
  const RightOperand& right;
  Sink sink;
};

// Chunks of the contraction: as many whole leaves as fit, or a piece of one.
struct Segment {
  int64_t leaf, begin, count;
  bool first, last;  // of its leaf
};

// The state of a tile between chunks: a running chain and the levels of the tree over leaves.
struct TileState {
  float* chain;
  float* levels;  // level l at levels + l * levelStride
  int64_t ld, levelStride;
};

LOCKSTEP_INLINE void addTile(float* to, const float* a, const float* b, int64_t rows, int vectors, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < vectors; ++j) {
      storeu(to + r * ld + 16 * j, loadu(a + r * ld + 16 * j) + loadu(b + r * ld + 16 * j));
    }
  }
}

LOCKSTEP_INLINE void copyTile(float* to, const float* from, int64_t rows, int vectors, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < vectors; ++j) storeu(to + r * ld + 16 * j, loadu(from + r * ld + 16 * j));
  }
}

// Leaf `leaf` of the tile is complete in state.chain: joined with what waits on the levels of the balanced tree (in the manner
// of a binary counter); after the last leaf the chain holds the whole sum.
inline void joinLeaf(const TileState& s, int64_t leaf, bool lastLeaf, int64_t rows, int vectors) {
  int level = 0;
  for (; (leaf >> level) & 1; ++level) addTile(s.chain, s.levels + level * s.levelStride, s.chain, rows, vectors, s.ld);
  if (!lastLeaf) copyTile(s.levels + level * s.levelStride, s.chain, rows, vectors, s.ld);
}

// Buffers of one thread inside a task.
struct TaskBuffers {
  float *left, *right, *state;
  static int64_t floats(int64_t rows, int levels) {
    return rows * kChunk + kBlockPanels * kChunk * kPanel + (1 + levels) * rows * kBlockPanels * kPanel;
  }
};

template <class RightOperand>
struct Task {
  const Product<RightOperand>& product;
  Format format;
  int64_t rowBegin, rows, panelBegin, panelEnd;
  int levels;
  TaskBuffers buffers;

  void run() const;
  int64_t nextChunk(int64_t leaf, int64_t begin, Segment* segments, int64_t* count) const;
  void chunk(const Segment* segments, int64_t count, int64_t panel, int64_t panels, bool wholeContraction) const;
};

// Fills the segments of the next chunk from (leaf, begin); returns how many.
template <class RightOperand>
int64_t Task<RightOperand>::nextChunk(int64_t leaf, int64_t begin, Segment* segments, int64_t* count) const {
  int64_t left = kChunk, n = 0;
  *count = 0;
  while (leaf < product.leafCount && n < kChunk / 16) {
    const int64_t size = product.right.leaf(leaf).count, steps = format.of(size - begin);
    if (steps > left && n > 0) break;
    // A piece of a leaf is even, so that pairs stay together.
    const int64_t take = least(size - begin, left & ~int64_t{1});
    segments[n++] = {leaf, begin, take, begin == 0, begin + take == size};
    *count += take;
    left -= format.of(take);
    begin += take;
    if (begin < size) break;
    ++leaf;
    begin = 0;
  }
  return n;
}

template <class RightOperand>
void Task<RightOperand>::run() const {
  Segment segments[kChunk / 16];
  for (int64_t leaf = 0, begin = 0; leaf < product.leafCount;) {
    int64_t elements;
    const int64_t n = nextChunk(leaf, begin, segments, &elements);
    const Segment& last = segments[n - 1];
    const bool whole = leaf == 0 && begin == 0 && last.last && last.leaf + 1 == product.leafCount;
    if (format.dtype == DType::kBFloat16) {
      float* to = buffers.left;
      for (int64_t s = 0; s < n; ++s) {
        const int64_t column = product.right.leaf(segments[s].leaf).begin + segments[s].begin;
        prepareLeft(product.left, rowBegin, rows, column, segments[s].count, format, to);
        to += rows * format.of(segments[s].count);
      }
    }
    for (int64_t p = panelBegin; p < panelEnd; p += kBlockPanels) chunk(segments, n, p, least(kBlockPanels, panelEnd - p), whole);
    leaf = last.last ? last.leaf + 1 : last.leaf;
    begin = last.last ? 0 : last.begin + last.count;
  }
}

// One chunk of the contraction for a block of panels and all rows of the task.
template <class RightOperand>
void Task<RightOperand>::chunk(const Segment* segments, int64_t count, int64_t panel, int64_t panels, bool wholeContraction) const {
  const float* right[kBlockPanels][kChunk / 16];
  int64_t rightStep[kBlockPanels][kChunk / 16];
  float* to = buffers.right;
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t s = 0; s < count; ++s) {
      right[p][s] = product.right.prepare(panel + p, segments[s].leaf, segments[s].begin, segments[s].count, format, to, &rightStep[p][s]);
      if (right[p][s] == to) to += format.of(segments[s].count) * rightStep[p][s];
    }
  }
  // A contraction done in one chunk needs no state beyond a tile that stays in the first-level cache.
  const int64_t ld = wholeContraction ? kPanel : (panelEnd - panelBegin) * kPanel;
  alignas(64) float local[(1 + kMaxLevels) * kTileRows * kPanel];
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const int64_t tileRowsCount = least(kTileRows, rows - r);
    for (int64_t p = 0; p < panels; ++p) {
      const OutputPanel out = product.right.panel(panel + p);
      TileState state{local, local + kTileRows * kPanel, kPanel, kTileRows * kPanel};
      if (!wholeContraction) {
        float* at = buffers.state + r * ld + (panel + p - panelBegin) * kPanel;
        state = {at, at + rows * ld, ld, rows * ld};
      }
      const float* left = buffers.left;
      for (int64_t s = 0; s < count; ++s) {
        const Segment& segment = segments[s];
        const int64_t steps = format.of(segment.count);
        Left a{left + r * steps, steps, 1};
        if (format.dtype == DType::kFloat32) {
          a = {product.left.template row<float>(rowBegin + r) + product.right.leaf(segment.leaf).begin + segment.begin, product.left.stride, 1};
        }
        left += rows * steps;
        const Right b{right[p][s], rightStep[p][s]};
        if (format.steps == Steps::kPlain) {
          tileRows<Steps::kPlain>(static_cast<int>(tileRowsCount), a, b, steps, out.vectors(), state.chain, state.ld, segment.first);
        } else {
          tileRows<Steps::kPairs>(static_cast<int>(tileRowsCount), a, b, steps, out.vectors(), state.chain, state.ld, segment.first);
        }
        if (!segment.last) continue;
        const bool lastLeaf = segment.leaf + 1 == product.leafCount;
        if (product.leafCount > 1) joinLeaf(state, segment.leaf, lastLeaf, tileRowsCount, out.vectors());
        if (lastLeaf) product.sink.take(rowBegin + r, tileRowsCount, out.begin, out.columns, state.chain, state.ld);
      }
    }
  }
}

// Cuts the product into tasks: rows first, then panels until every thread has several. Small products stay on the caller.
template <class RightOperand>
void runProduct(Queue& queue, const Product<RightOperand>& product, int64_t elements) {
  const int64_t rows = product.left.rows, threads = queue.threads();
  if (rows == 0 || product.panelCount == 0) return;
  const Format format{product.left.dtype, product.left.dtype == DType::kBFloat16 && (kHasDotPair || rows <= kDirectRows) ? Steps::kPairs : Steps::kPlain};
  const bool alone = threads == 1 || rows * elements < 50000;
  const int64_t rowTasks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t rowsOfTask = roundUp((rows + rowTasks - 1) / rowTasks, kTileRows);
  const int64_t wanted = alone ? 1 : (4 * threads + rowTasks - 1) / rowTasks;
  const int64_t panelsOfTask = most(1, (product.panelCount + wanted - 1) / wanted);
  int levels = 0;
  while ((int64_t{1} << levels) < product.leafCount) ++levels;
  const int64_t taskPanels = roundUp(panelsOfTask, kBlockPanels);
  const int64_t panelTasks = (product.panelCount + panelsOfTask - 1) / panelsOfTask;
  const int64_t blockRows = least(rows, rowsOfTask);
  const int64_t leftFloats = roundUp(blockRows * (kChunk + 32), 16), rightFloats = kBlockPanels * (kChunk + 32) * kPanel;
  const int64_t bytes = 4 * (leftFloats + rightFloats + (1 + levels) * blockRows * taskPanels * kPanel);
  const auto body = [&](int64_t index, int thread) {
    auto* memory = static_cast<float*>(queue.scratch(thread, static_cast<size_t>(bytes)));
    const int64_t row = index / panelTasks * rowsOfTask, panel = index % panelTasks * panelsOfTask;
    if (row >= rows) return;
    const Task<RightOperand> task{product, format, row, least(rowsOfTask, rows - row), panel, least(product.panelCount, panel + panelsOfTask), levels,
                                  {memory, memory + leftFloats, memory + leftFloats + rightFloats}};
    task.run();
  };
  if (alone) {
    for (int64_t i = 0; i < rowTasks * panelTasks; ++i) body(i, 0);
  } else {
    queue.pool().forEach(rowTasks * panelTasks, body);
  }
}

}  // namespace
}  // namespace lockstep::kernels::LOCKSTEP_ISA
