// dW += dy^T x, straight into the gradient's panels: rows of a tile are columns of x, its columns are the 64 rows of W
// of a panel, its chain runs over tokens from the accumulator.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/product.h"

namespace lockstep::kernels::LOCKSTEP_ISA {
namespace {

// Tokens of one pass: a panel of dy is 256 KiB, a tile's piece of x 24 KiB, and the gradient is read and written once a
// pass.
constexpr int64_t kTokens = 1024;

// x as tiles of 6 columns, [tile][steps][6], for the columns of one part of `in` after the other.
struct LeftTiles {
  const WeightLayout& layout;
  Operand x;
  Format format;
  float* memory;

  int64_t groups() const { return layout.split == Split::kIn ? static_cast<int64_t>(layout.parts.size()) : 1; }
  Leaf columns(int64_t group) const {
    if (layout.split != Split::kIn) return {0, layout.in};
    return {layout.parts[static_cast<size_t>(group)].inBegin, layout.parts[static_cast<size_t>(group)].in};
  }
  static int64_t tiles(int64_t columns) { return (columns + kTileRows - 1) / kTileRows; }
  float* tiles(int64_t group, int64_t steps) const {
    int64_t before = 0;
    for (int64_t g = 0; g < group; ++g) before += tiles(columns(g).count);
    return memory + before * steps * kTileRows;
  }
  int64_t allTiles() const {
    int64_t all = 0;
    for (int64_t g = 0; g < groups(); ++g) all += tiles(columns(g).count);
    return all;
  }

  // Rows begin .. begin + count - 1; tiles first .. last - 1 of a group.
  void pack(int64_t group, int64_t begin, int64_t count, int64_t first, int64_t last) const {
    const Leaf leaf = columns(group);
    const int64_t steps = format.of(count);
    float* out = tiles(group, steps);
    for (int64_t t = 0; t < count; t += 2) {
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t column = leaf.begin + tile * kTileRows,
                      width = least(kTileRows, leaf.begin + leaf.count - column);
        packPair(begin + t, column, width,
                 out + (tile * steps + (format.steps == Steps::kPairs ? t / 2 : t)) * kTileRows);
      }
    }
  }

 private:
  LOCKSTEP_MEMBER void packPair(int64_t t, int64_t column, int64_t width, float* to) const {
    if (format.dtype == DType::kFloat32) {
      const float *even = x.row<float>(t) + column, *odd = x.row<float>(t + 1) + column;
      for (int64_t i = 0; i < width; ++i) to[i] = even[i];
      for (int64_t i = 0; i < width; ++i) to[kTileRows + i] = odd[i];
      return;
    }
    const BFloat16 *even = x.row<BFloat16>(t) + column, *odd = x.row<BFloat16>(t + 1) + column;
    if (format.steps == Steps::kPairs) {
      for (int64_t i = 0; i < width; ++i)
        to[i] = std::bit_cast<float>(uint32_t{even[i].bits} | uint32_t{odd[i].bits} << 16);
    } else {
      for (int64_t i = 0; i < width; ++i) to[i] = toFloat(odd[i]);
      for (int64_t i = 0; i < width; ++i) to[kTileRows + i] = toFloat(even[i]);
    }
  }
};

// Columns column .. column + columns - 1 of dy as steps of width 16 * vectors.
void packRight(Operand dy, int64_t begin, int64_t count, int64_t column, int64_t columns, int vectors, Format format,
               float* out) {
  const int64_t width = 16 * vectors;
  for (int64_t t = begin; t < begin + count; t += 2) {
    eachVector(columns, [&](int64_t j, auto lanes) {
      if (format.dtype == DType::kFloat32) {
        storeu(out + j, load(dy.row<float>(t) + column + j, lanes));
        storeu(out + width + j, load(dy.row<float>(t + 1) + column + j, lanes));
        return;
      }
      const Vec even = load(dy.row<BFloat16>(t) + column + j, lanes),
                odd = load(dy.row<BFloat16>(t + 1) + column + j, lanes);
      if (format.steps == Steps::kPairs) {
        storePairs(out + j, makePairs(even, odd));
      } else {
        storeu(out + j, odd);
        storeu(out + width + j, even);
      }
    });
    out += format.steps == Steps::kPairs ? width : 2 * width;
  }
}

// One panel of one part over the tokens begin .. begin + count - 1.
void panelGradient(const LeftTiles& left, Operand dy, const Part& part, int64_t group, int64_t panel, int64_t begin,
                   int64_t count, float* dW, float* buffer) {
  const int64_t width = part.panelWidth(panel), steps = left.format.of(count);
  packRight(dy, begin, count, part.outBegin + panel * kPanel, least(kPanel, part.out - panel * kPanel),
            static_cast<int>(width / 16), left.format, buffer);
  const float* a = left.tiles(group, steps);
  float* c = dW + part.panelOffset(panel);
  for (int64_t k = 0; k < part.in; k += kTileRows, a += steps * kTileRows) {
    const int rows = static_cast<int>(least(kTileRows, part.in - k));
    const Left from{a, 1, kTileRows};
    if (left.format.steps == Steps::kPairs) {
      tileRows<Steps::kPairs>(rows, from, {buffer, width}, steps, static_cast<int>(width / 16), c + k * width, width,
                              false);
    } else {
      tileRows<Steps::kPlain>(rows, from, {buffer, width}, steps, static_cast<int>(width / 16), c + k * width, width,
                              false);
    }
  }
}

template <class T>
void biasGradient(Queue& queue, Operand dy, float* dBias) {
  forColumns(queue, dy.rows, dy.cols, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < dy.rows; ++t) {
      eachVector(end - begin, [&](int64_t j, auto lanes) {
        store(dBias + begin + j, load(dBias + begin + j, lanes) + load(dy.row<T>(t) + begin + j, lanes), lanes);
      });
    }
  });
}

}  // namespace

void linearBackwardWeight(Queue& queue, Operand dy, Operand x, WeightGradient dW, float* dBias) {
  const WeightLayout& layout = *dW.layout;
  const Format format{x.dtype, x.dtype == DType::kBFloat16 && kHasDotPair ? Steps::kPairs : Steps::kPlain};
  LeftTiles left{layout, x, format, nullptr};
  const int64_t stepsMost = format.of(least(kTokens, x.rows)), tiles = left.allTiles();
  left.memory = static_cast<float*>(queue.shared(static_cast<size_t>(tiles * stepsMost * kTileRows) * 4));
  int64_t panels = 0;
  for (const Part& part : layout.parts) panels += part.panels();
  constexpr int64_t kTilesOfTask = 16;
  for (int64_t begin = 0; begin < x.rows; begin += kTokens) {
    const int64_t count = least(kTokens, x.rows - begin);
    for (int64_t group = 0; group < left.groups(); ++group) {
      const int64_t groupTiles = LeftTiles::tiles(left.columns(group).count);
      queue.pool().forEach((groupTiles + kTilesOfTask - 1) / kTilesOfTask, [&](int64_t task, int) {
        left.pack(group, begin, count, task * kTilesOfTask, least(groupTiles, (task + 1) * kTilesOfTask));
      });
    }
    queue.pool().forEach(panels, [&](int64_t number, int thread) {
      auto* buffer = static_cast<float*>(queue.scratch(thread, static_cast<size_t>(stepsMost * kPanel) * 4));
      for (size_t p = 0; p < layout.parts.size(); ++p) {
        const Part& part = layout.parts[p];
        if (number < part.panels()) {
          panelGradient(left, dy, part, layout.split == Split::kIn ? static_cast<int64_t>(p) : 0, number, begin, count,
                        dW.data, buffer);
          return;
        }
        number -= part.panels();
      }
    });
  }
  if (dBias == nullptr) return;
  if (dy.dtype == DType::kFloat32) {
    biasGradient<float>(queue, dy, dBias);
  } else {
    biasGradient<BFloat16>(queue, dy, dBias);
  }
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
