// Random problems for the contracts of attention and of what stands before it: shapes at every threshold, sequences
// packed with gaps, pages in shuffled order with NaN wherever nothing was written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "harness.h"

namespace lockstep::contracts {

inline float at(const Matrix& m, int64_t row, int64_t col) {
  return m.dtype == DType::kFloat32 ? m.view().row(row)[col] : toFloat(m.operand().row<BFloat16>(row)[col]);
}

inline void put(const Matrix& m, int64_t row, int64_t col, float value) {
  if (m.dtype == DType::kFloat32) {
    m.view().row(row)[col] = value;
  } else {
    m.operand().row<BFloat16>(row)[col] = toBFloat16(value);
  }
}

// Rows `source` of a matrix, in that order; gaps are zero.
inline Matrix gather(const Matrix& from, const std::vector<int64_t>& source) {
  const int64_t rows = static_cast<int64_t>(source.size());
  Matrix to{Buffer(static_cast<size_t>((rows - 1) * from.stride + from.cols) * bytesOf(from.dtype)), from.dtype, rows,
            from.cols, from.stride};
  std::memset(to.buffer.as<char>(), 0, to.buffer.bytes());
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(to.operand().rowBytes(r), from.operand().rowBytes(source[r]),
                static_cast<size_t>(from.cols) * bytesOf(from.dtype));
  }
  return to;
}

// Sequences with the arrays that they point to.
struct Batch {
  std::vector<int32_t> rowBegin, length, offset, pages;
  int64_t pageStride = 0;

  int64_t count() const { return static_cast<int64_t>(length.size()); }
  kernels::Sequences sequences() const {
    return {count(), rowBegin.data(), length.data(), offset.data(), pages.data(), pageStride};
  }
};

// Part of a batch as a batch of its own: sourceRow names where each of its rows comes from.
struct SubBatch : Batch {
  std::vector<int64_t> sourceRow;
  int64_t rows() const { return static_cast<int64_t>(sourceRow.size()); }
};

// Of up to 128 columns; or of more, which no register has room for.
enum class Heads { kUsual, kWide };

// Shape, sequences and pages of one problem.
struct AttentionProblem {
  kernels::QkvLayout layout;
  DType dtype;
  Batch batch;
  int64_t rows = 0, pageCount = 0;
  kernels::KvPages kv;
  Buffer pageMemory;

  const kernels::AttentionShape& shape() const { return layout.attention; }
  int64_t queryColumns() const { return shape().heads * shape().headWidth; }

  // training: offsets 0, even first rows, padding between. Else decode steps and chunks at any offset, some with the
  // first pages of another sequence.
  static AttentionProblem draw(Trial& t, bool training, Heads heads = Heads::kUsual) {
    AttentionProblem p;
    p.dtype = t.dtype();
    p.layout.attention = drawShape(t, heads);
    // The reference costs T x S x H x K: long sequences only for few and narrow heads.
    const int64_t longest = p.queryColumns() <= 128 ? 300 : p.queryColumns() <= 512 ? 140 : 70;
    const int64_t count = t.integer(1, training ? 3 : 4);
    int64_t row = training ? 0 : t.integer(0, 1);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t total = std::min(longest, t.pick({1, 2, 3, 15, 63, 64, 65, 127, 129, 200, 300}) + t.integer(0, 2));
      const int64_t length = training ? total : t.chance(0.5) ? 1 : t.integer(1, total);
      if (training) row += row % 2 + 2 * t.integer(0, 1);
      p.batch.rowBegin.push_back(static_cast<int32_t>(row));
      p.batch.length.push_back(static_cast<int32_t>(length));
      p.batch.offset.push_back(static_cast<int32_t>(training ? 0 : total - length));
      row += length;
    }
    p.rows = training ? row + row % 2 : row + t.integer(0, 1);
    p.placePages(t, training);
    p.describe(t);
    return p;
  }

  int64_t keyIndex(int64_t b, int64_t g, int64_t position, int64_t i) const {
    const int64_t s = position % kernels::kPagePositions;
    const int64_t within = dtype == DType::kFloat32 ? i * kernels::kPagePositions + s
                                                    : i / 2 * 2 * kernels::kPagePositions + 2 * s + i % 2;
    return kv.keyPanel(page(b, position), g) + within;
  }
  int64_t valueIndex(int64_t b, int64_t g, int64_t position, int64_t i) const {
    const int64_t s = position % kernels::kPagePositions, begin = i / kernels::kPanel * kernels::kPanel, n = i - begin;
    const int64_t w = std::min(kernels::kPanel, kernels::roundUp(kv.headWidth, kernels::kPanelGrain) - begin);
    const int64_t within = dtype == DType::kFloat32 ? s * w + n : s / 2 * 2 * w + 2 * n + s % 2;
    return kv.valuePanel(page(b, position), g) + begin * kernels::kPagePositions + within;
  }
  float element(int64_t index) const {
    return dtype == DType::kFloat32 ? pageMemory.as<float>()[index] : toFloat(pageMemory.as<BFloat16>()[index]);
  }

  // NaN in every slot of every page.
  void clearPages() { std::memset(pageMemory.as<char>(), 0xff, pageMemory.bytes()); }

  // Keys and values of every position that a sequence has reached, each page slot once.
  void fillPages(Trial& t, float keyScale) {
    std::vector<char> written(static_cast<size_t>(pageCount * kernels::kPagePositions), 0);
    const int64_t width = shape().headWidth;
    for (int64_t b = 0; b < batch.count(); ++b) {
      for (int64_t position = 0; position < batch.offset[b] + batch.length[b]; ++position) {
        char& done = written[page(b, position) * kernels::kPagePositions + position % kernels::kPagePositions];
        if (done != 0) continue;
        done = 1;
        for (int64_t g = 0; g < shape().keyValueHeads; ++g) {
          for (int64_t i = 0; i < kernels::roundUp(width, 2); ++i) {
            setElement(keyIndex(b, g, position, i), i < width ? t.number(keyScale) : 0.0f);
          }
          for (int64_t i = 0; i < kernels::roundUp(width, kernels::kPanelGrain); ++i) {
            setElement(valueIndex(b, g, position, i), i < width ? t.number(2) : 0.0f);
          }
        }
      }
    }
  }

  // Chunks of random size (single rows, not all of them, when `decode`) from all sequences, in random order.
  SubBatch drawSubBatch(Trial& t, bool decode) const {
    struct Chunk {
      int64_t b, begin, count;
    };
    std::vector<Chunk> chunks;
    for (int64_t b = 0; b < batch.count(); ++b) {
      for (int64_t begin = 0; begin < batch.length[b];) {
        const int64_t count = decode ? 1 : std::min<int64_t>(batch.length[b] - begin, t.integer(1, 90));
        if (!decode || t.chance(0.25)) chunks.push_back({b, begin, count});
        begin += count;
      }
    }
    if (chunks.empty()) chunks.push_back({0, batch.length[0] - 1, 1});
    std::shuffle(chunks.begin(), chunks.end(), t.random());
    SubBatch sub;
    sub.pageStride = batch.pageStride;
    for (const Chunk& chunk : chunks) {
      sub.rowBegin.push_back(static_cast<int32_t>(sub.rows()));
      sub.length.push_back(static_cast<int32_t>(chunk.count));
      sub.offset.push_back(static_cast<int32_t>(batch.offset[chunk.b] + chunk.begin));
      for (int64_t i = 0; i < chunk.count; ++i) sub.sourceRow.push_back(batch.rowBegin[chunk.b] + chunk.begin + i);
      const auto first = batch.pages.begin() + chunk.b * batch.pageStride;
      sub.pages.insert(sub.pages.end(), first, first + batch.pageStride);
    }
    return sub;
  }

 private:
  int64_t page(int64_t b, int64_t position) const {
    return batch.pages[b * batch.pageStride + position / kernels::kPagePositions];
  }
  void setElement(int64_t index, float value) {
    if (dtype == DType::kFloat32) {
      pageMemory.as<float>()[index] = value;
    } else {
      pageMemory.as<BFloat16>()[index] = toBFloat16(value);
    }
  }

  static kernels::AttentionShape drawShape(Trial& t, Heads heads) {
    kernels::AttentionShape shape{};
    const bool wide = heads == Heads::kWide;
    shape.parts = wide ? t.pick({1, 2}) : t.pick({1, 1, 2, 4, 8});
    // Key/value heads: a multiple of the parts, or a divisor of them.
    if (t.chance(0.5)) {
      shape.keyValueHeads = shape.parts * (shape.parts <= 2 ? t.pick({1, 1, 2, 3}) : 1);
    } else {
      do {
        shape.keyValueHeads = t.pick({1, 2, 4, 8});
      } while (shape.keyValueHeads > shape.parts);
    }
    const int64_t sharers = std::max<int64_t>(1, shape.parts / shape.keyValueHeads);
    int64_t group = wide ? t.pick({1, 2}) : t.pick({1, 2, 3, 8});
    if (group % sharers != 0) group = sharers * t.pick({1, 1, 2});
    if (group * shape.keyValueHeads > 24) group = sharers;
    shape.heads = shape.keyValueHeads * group;
    shape.headWidth = wide ? t.pick({130, 144, 161, 256, 544}) : t.pick({17, 18, 20, 32, 64, 80, 128});
    shape.window = t.pick({0, 0, 0, 1, 17, 63, 64, 65, 100, 150});
    shape.scale = 1.0f / std::sqrt(static_cast<float>(shape.headWidth));
    return shape;
  }

  void placePages(Trial& t, bool training) {
    for (int64_t b = 0; b < batch.count(); ++b) {
      batch.pageStride = std::max(batch.pageStride, (batch.offset[b] + batch.length[b] + kernels::kPagePositions - 1) /
                                                        kernels::kPagePositions);
    }
    batch.pageStride += t.integer(0, 1);
    pageCount = batch.count() * batch.pageStride + 2;
    for (int64_t i = 0; i < pageCount; ++i) batch.pages.push_back(static_cast<int32_t>(i));
    std::shuffle(batch.pages.begin(), batch.pages.end(), t.random());
    batch.pages.resize(batch.count() * batch.pageStride);
    for (int64_t b = 1; b < batch.count() && !training; ++b) {
      const int64_t shared = std::min(batch.offset[b], batch.offset[b - 1]) / kernels::kPagePositions;
      if (shared == 0 || t.chance(0.3)) continue;
      std::copy_n(batch.pages.begin() + (b - 1) * batch.pageStride, shared, batch.pages.begin() + b * batch.pageStride);
    }
    kv = {nullptr, dtype, shape().keyValueHeads, shape().headWidth};
    pageMemory = Buffer(static_cast<size_t>(pageCount * kv.pageElements()) * bytesOf(dtype));
    kv.data = pageMemory.as<char>();
    clearPages();
  }

  void describe(Trial& t) const {
    t.note("H", shape().heads);
    t.note("G", shape().keyValueHeads);
    t.note("K", shape().headWidth);
    t.note("P", shape().parts);
    t.note("window", shape().window);
    t.note("T", rows);
    const auto wide = [](const std::vector<int32_t>& x) { return std::vector<int64_t>(x.begin(), x.end()); };
    t.note("rowBegin", wide(batch.rowBegin));
    t.note("length", wide(batch.length));
    t.note("offset", wide(batch.offset));
  }
};

}  // namespace lockstep::contracts
