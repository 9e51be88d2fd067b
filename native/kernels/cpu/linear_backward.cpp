// Gradients of y = x W^T: to the input through transposed panels, to the weight in the panels' own order.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/linear_block.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

namespace {

// dy W.
struct BackwardInput final : BlockedProduct {
  Operand dy;
  const Weight& w;
  Output dx;

  BackwardInput(Operand left, const Weight& weight, Output to)
      : BlockedProduct(directOutput(to, nullptr)), dy(left), w(weight), dx(to) {}

  const Part& part(int64_t p) const { return w.layout->parts[p]; }
  int64_t parts() const { return static_cast<int64_t>(w.layout->parts.size()); }
  int64_t leaves() const override { return w.layout->split == Split::kIn ? 1 : parts(); }
  int64_t columnParts() const { return w.layout->split == Split::kIn ? parts() : 1; }
  int64_t steps(int64_t leaf) const override { return chainSteps(w.dtype, part(leaf).out); }
  int64_t fmas(int64_t rows) const override { return rows * w.layout->out * w.layout->in; }
  Form form() const override { return asPairSteps(w.dtype) ? Form::kPairs : Form::kPlain; }

  void pack(int64_t leaf, int64_t first, int64_t steps, int64_t row, int64_t rows, float* to) const override {
    const int64_t n = first * stepElements(w.dtype), count = steps * stepElements(w.dtype);
    packTile(dy, row, rows, part(leaf).outBegin + n, smaller(count, part(leaf).out - n), steps, to);
  }
  const float* right(int64_t leaf, const Group& group, int64_t first, int64_t steps, float* stage,
                     int64_t& step) const override {
    stageTransposed(w, part(leaves() == 1 ? group.part : leaf), first, steps, group.column, group.vectors, stage);
    step = 16 * group.vectors;
    return stage;
  }
  int64_t strips() const override {
    return countStrips(columnParts(), [&](int64_t p) { return part(p).in; });
  }
  void strip(int64_t index, Strip& strip) const override {
    cutStrip(
        index, columnParts(), [&](int64_t p) { return part(p).in; }, [&](int64_t p) { return part(p).inBegin; }, strip);
  }
  void finish(const float* from, int64_t stride, const Strip& strip, int64_t row, int64_t rows) const override {
    finishBlock(from, stride, strip, row, rows, direct, nullptr,
                [&](int64_t r, int64_t column, Vec value, int64_t count) { put(dx, r, column, value, count); });
  }
};

// dW += dy^T x: rows of a tile are columns of x, its columns are rows of W, its chains run over tokens from the
// gradient where it lies. Both operands are packed once per chunk of tokens, on all threads, then tiles are dealt.
struct WeightProduct {
  Operand dy, x;
  WeightGradient dW;
  float* memory = nullptr;  // packed x, then packed dy
  int64_t chunk = 0;        // steps packed at a time

  const Part& part(int64_t p) const { return dW.layout->parts[p]; }
  int64_t parts() const { return static_cast<int64_t>(dW.layout->parts.size()); }
  bool splitIn() const { return dW.layout->split == Split::kIn; }

  // Tiles of x's columns, part after part when the parts split them; else all parts share them. The same for strips of
  // dy's.
  int64_t tilesOf(int64_t p) const { return Tiles(part(p).in).last; }
  int64_t stripsOf(int64_t p) const { return (part(p).out + kStripColumns - 1) / kStripColumns; }
  int64_t leftParts() const { return splitIn() ? parts() : 1; }
  int64_t tilesBefore(int64_t p) const {
    int64_t tiles = 0;
    for (int64_t i = 0; i < p && splitIn(); ++i) tiles += tilesOf(i);
    return tiles;
  }
  int64_t stripsBefore(int64_t p) const {
    int64_t strips = 0;
    for (int64_t i = 0; i < p && !splitIn(); ++i) strips += stripsOf(i);
    return strips;
  }
  int64_t tiles() const { return splitIn() ? tilesBefore(parts()) : tilesOf(0); }
  int64_t strips() const { return splitIn() ? stripsOf(0) : stripsBefore(parts()); }

  // Rows are packed one by one into all tiles and groups: an extra cache line between them keeps them in different
  // sets.
  int64_t tileFloats() const { return chunk * kTileRows + 16; }
  int64_t groupFloats(const Group& group) const { return group.at * (chunk + 1); }  // before a group of a strip
  int64_t stripFloats() const { return kStripColumns * (chunk + 1); }
  int64_t floats() const { return roundUp(tiles() * tileFloats(), 16) + strips() * stripFloats(); }
  float* left(int64_t tile) const { return memory + tile * tileFloats(); }
  float* right(int64_t strip) const { return memory + roundUp(tiles() * tileFloats(), 16) + strip * stripFloats(); }

  // Tiles tileFirst .. tileLast - 1 of part p of the left operand, row after row of x.
  void packTiles(int64_t p, int64_t tileFirst, int64_t tileLast, int64_t first, int64_t steps) const {
    const Tiles tiles(part(p).in);
    float* const to = left(tilesBefore(p));
    for (int64_t k = 0; k < steps; ++k) {
      withStep(x, first * stepElements(x.dtype), k, [&](const auto& from) {
        for (int64_t i = tileFirst; i < tileLast; ++i) {
          const int64_t column = part(p).inBegin + tiles.begin(i);
          putStep(to + i * tileFloats(), k, steps, tiles.count(i), from.load(column, x.cols - column));
        }
      });
    }
  }
  void cut(int64_t p, int64_t index, Strip& strip) const {
    const int64_t begin = index * kStripColumns;
    strip.add(p, begin, smaller(begin + kStripColumns, part(p).out), part(p).outBegin);
  }
  // A strip of the right operand, row after row of dy.
  void packStrip(int64_t index, int64_t first, int64_t steps) const {
    int64_t p = 0, i = index;
    for (; i >= stripsOf(p); ++p) i -= stripsOf(p);
    Strip strip;
    cut(p, i, strip);
    float* const memory = right(index);
    for (int64_t k = 0; k < steps; ++k) {
      withStep(dy, first * stepElements(dy.dtype), k, [&](const auto& from) {
        for (int g = 0; g < strip.count; ++g) {
          const Group& group = strip.groups[g];
          float* const to = memory + groupFloats(group) + k * 16 * group.vectors;
          for (int v = 0; v < group.vectors; ++v) {
            storeu(to + 16 * v, from.load(group.output + 16 * v, group.count - 16 * v));
          }
        }
      });
    }
  }
  // Tiles tileFirst .. tileLast - 1 of part p against one strip of it.
  void accumulate(int64_t p, int64_t index, int64_t tileFirst, int64_t tileLast, int64_t steps) const {
    Strip strip;
    cut(p, index, strip);
    const Tiles tiles(part(p).in);
    const float* const lefts = left(tilesBefore(p));
    const float* const rights = right(stripsBefore(p) + index);
    const Form form = asPairSteps(dy.dtype) ? Form::kPairs : Form::kPlain;
    for (int64_t first = 0; first < steps; first += kDepth) {
      for (int g = 0; g < strip.count; ++g) {
        const Group& group = strip.groups[g];
        const int64_t panel = group.column / kPanel, width = part(p).panelWidth(panel);
        float* const to = dW.data + part(p).panelOffset(panel) + group.column % kPanel;
        TileCall call{};
        call.rightStep = 16 * group.vectors;
        call.right = rights + groupFloats(group) + first * call.rightStep;
        call.steps = smaller(kDepth, steps - first);
        call.stride = width;
        for (int64_t i = tileFirst; i < tileLast; ++i) {
          const int64_t begin = tiles.begin(i), end = tiles.begin(i + 1);
          call.leftStep = end - begin;
          call.left = lefts + i * tileFloats() + first * call.leftStep;
          call.to = to + begin * width;
          call.from = call.to;
          call.toStride = width;
          call.ahead = call.to + (end - begin) * width;
          call.aheadStride = width;
          call.aheadLines = i + 1 < tileLast ? group.vectors : 0;
          runTile(form, static_cast<int>(end - begin), group.vectors, call);
        }
      }
    }
  }
};

constexpr int64_t kTokens = 1024;      // steps packed at a time, at most
constexpr int64_t kFewestTokens = 64;  // fewer only when there are no more
constexpr int64_t kPackedBytes = int64_t{32} << 20;
constexpr int64_t kTilesOfTask = 16;  // tiles that stay in the second-level cache while the columns of a strip pass by

void accumulateWeight(Queue& queue, WeightProduct product) {
  const int64_t steps = chainSteps(product.dy.dtype, product.dy.rows), strips = product.strips();
  const int64_t fmas = product.dy.rows * product.dW.layout->out * product.dW.layout->in;
  const auto rowTasks = [&](int64_t p) { return (product.tilesOf(p) + kTilesOfTask - 1) / kTilesOfTask; };
  const auto tileOf = [&](int64_t p, int64_t row) { return product.tilesOf(p) * row / rowTasks(p); };
  int64_t packTasks = strips, tasks = 0;
  for (int64_t p = 0; p < product.leftParts(); ++p) packTasks += rowTasks(p);
  for (int64_t p = 0; p < product.parts(); ++p) tasks += rowTasks(p) * product.stripsOf(p);
  const int64_t limit = smaller(kPackedBytes, static_cast<int64_t>(queue.scratchBytes()));
  product.chunk = smaller(kTokens, roundUp(steps, 2));
  while (product.chunk > kFewestTokens && product.floats() * 4 > limit) product.chunk = roundUp(product.chunk / 2, 2);
  product.memory = static_cast<float*>(queue.shared(static_cast<size_t>(product.floats()) * sizeof(float)));
  for (int64_t first = 0; first < steps; first += product.chunk) {
    const int64_t count = smaller(product.chunk, steps - first);
    deal(queue, packTasks, fmas, [&](int64_t task, int) {
      if (task < strips) return product.packStrip(task, first, count);
      int64_t p = 0, row = task - strips;
      for (; row >= rowTasks(p); ++p) row -= rowTasks(p);
      product.packTiles(p, tileOf(p, row), tileOf(p, row + 1), first, count);
    });
    deal(queue, tasks, fmas, [&](int64_t task, int) {
      int64_t p = 0;
      for (; task >= rowTasks(p) * product.stripsOf(p); ++p) task -= rowTasks(p) * product.stripsOf(p);
      const int64_t row = task % rowTasks(p);
      product.accumulate(p, task / rowTasks(p), tileOf(p, row), tileOf(p, row + 1), count);
    });
  }
}

// dBias: eight vectors of columns at a time, rows in order.
void accumulateBias(const Operand& dy, int64_t begin, int64_t end, float* dBias) {
  constexpr int kVectors = 8;
  for (int64_t c = begin; c < end; c += 16 * kVectors) {
    Vec sum[kVectors];
    const int64_t columns = smaller(end - c, 16 * kVectors);
    for (int v = 0; v < kVectors; ++v)
      sum[v] = 16 * v < columns ? loadUpTo(dBias + c + 16 * v, columns - 16 * v) : zero();
    for (int64_t t = 0; t < dy.rows; ++t) {
      for (int v = 0; v < kVectors && 16 * v < columns; ++v) {
        const int64_t at = c + 16 * v, count = columns - 16 * v;
        sum[v] = sum[v] + (dy.dtype == DType::kFloat32 ? loadUpTo(dy.row<float>(t) + at, count)
                                                       : loadUpTo(dy.row<BFloat16>(t) + at, count));
      }
    }
    for (int v = 0; v < kVectors && 16 * v < columns; ++v) storeUpTo(dBias + c + 16 * v, sum[v], columns - 16 * v);
  }
}

constexpr int64_t kBiasColumns = 128;  // columns of a task
constexpr int64_t kBiasWork = 4;       // what an addition costs, in FMAs of a product

}  // namespace

void linearBackwardInput(Queue& queue, Operand dy, const Weight& w, Output dx) {
  multiply(queue, BackwardInput(dy, w, dx), dy.rows);
}

void linearBackwardWeight(Queue& queue, Operand dy, Operand x, WeightGradient dW, float* dBias) {
  accumulateWeight(queue, {dy, x, dW});
  if (dBias == nullptr) return;
  const int64_t columns = dW.layout->out, tasks = (columns + kBiasColumns - 1) / kBiasColumns;
  deal(queue, tasks, dy.rows * columns * kBiasWork, [&](int64_t task, int) {
    accumulateBias(dy, task * kBiasColumns, smaller(columns, (task + 1) * kBiasColumns), dBias);
  });
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
