// Gradients of y = x W^T: to the input through transposed panels, to the weight in the panels' own order.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/linear_block.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

namespace {

// dy W.
struct BackwardInput {
  Operand dy;
  const Weight& w;

  const Part& part(int64_t p) const { return w.layout->parts[p]; }
  int64_t parts() const { return static_cast<int64_t>(w.layout->parts.size()); }
  int64_t leaves() const { return w.layout->split == Split::kIn ? 1 : parts(); }
  int64_t columnParts() const { return w.layout->split == Split::kIn ? parts() : 1; }
  int64_t steps(int64_t leaf) const { return chainSteps(w.dtype, part(leaf).out); }
  int64_t fmas(int64_t rows) const { return rows * w.layout->out * w.layout->in; }
  Form form() const { return asPairSteps(w.dtype) ? Form::kPairPanel : Form::kRows; }

  void pack(int64_t leaf, int64_t first, int64_t steps, int64_t row, int64_t rows, float* to) const {
    const int64_t n = first * stepElements(w.dtype), count = steps * stepElements(w.dtype);
    packRows(dy, row, rows, part(leaf).outBegin + n, smaller(count, part(leaf).out - n), to);
  }
  const float* right(int64_t leaf, const Group& group, int64_t first, int64_t steps, float* stage,
                     int64_t& step) const {
    stageTransposed(w, part(leaves() == 1 ? group.part : leaf), first, steps, group.column, group.vectors, stage);
    step = 16 * group.vectors;
    return stage;
  }
  int64_t strips() const {
    return countStrips(columnParts(), [&](int64_t p) { return part(p).in; });
  }
  void strip(int64_t index, Strip& strip) const {
    cutStrip(
        index, columnParts(), [&](int64_t p) { return part(p).in; }, [&](int64_t p) { return part(p).inBegin; }, strip);
  }
};

// dW of one part, cut into blocks of W's columns (rows of the product, the left operand) and strips of W's rows.
struct WeightBlocks {
  const Part& part;

  int64_t rowBlocks() const { return (part.in + kLeftRows - 1) / kLeftRows; }
  int64_t strips() const { return (part.out + kStripColumns - 1) / kStripColumns; }
  int64_t count() const { return rowBlocks() * strips(); }
  int64_t rowBegin(int64_t block) const {
    return block == rowBlocks() ? part.in : (part.in + 1) / 2 * block / rowBlocks() * 2;
  }
};

// One block: chains over all rows of dy and x, continued from the gradient where it lies.
void accumulateBlock(const Operand& dy, const Operand& x, const Part& part, float* gradient, int64_t inBegin,
                     int64_t inEnd, const Strip& strip, float* left, float* right) {
  const int64_t steps = chainSteps(dy.dtype, dy.rows), elements = stepElements(dy.dtype),
                tiles = tileCount(inEnd - inBegin);
  const Form form = asPairSteps(dy.dtype) ? Form::kPairSteps : Form::kSteps;
  for (int64_t first = 0; first < steps; first += kDepth) {
    const int64_t count = smaller(kDepth, steps - first), row = first * elements;
    const StepRows xRows{x, row, x.rows - row}, dyRows{dy, row, dy.rows - row};
    packSteps(xRows, count, part.inBegin + inBegin, inEnd - inBegin, left);
    for (int g = 0; g < strip.count; ++g) {
      const Group& group = strip.groups[g];
      stageSteps(dyRows, count, group.output, group.count, group.vectors, right);
      const int64_t panel = group.column / kPanel, width = part.panelWidth(panel);
      float* const to = gradient + part.panelOffset(panel) + group.column % kPanel;
      TileCall call{};
      call.right = right;
      call.rightStep = 16 * group.vectors;
      call.steps = count;
      call.stride = width;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t begin = tileBegin(inEnd - inBegin, i), end = tileBegin(inEnd - inBegin, i + 1);
        call.left = left + i * kStepTileStride;
        call.to = to + (inBegin + begin) * width;
        call.from = call.to;
        runTile(form, static_cast<int>(end - begin), group.vectors, call);
      }
    }
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

constexpr int64_t kBiasColumns = 128;

}  // namespace

void linearBackwardInput(Queue& queue, Operand dy, const Weight& w, Output dx) {
  multiply(
      queue, BackwardInput{dy, w}, dy.rows, [&](const float* result, const Strip& strip, int64_t row, int64_t rows) {
        finishBlock(result, kStripStride, strip, row, rows, nullptr,
                    [&](int64_t r, int64_t column, Vec value, int64_t count) { put(dx, r, column, value, count); });
      });
}

void linearBackwardWeight(Queue& queue, Operand dy, Operand x, WeightGradient dW, float* dBias) {
  constexpr int64_t kLeftFloats = (kLeftRows / kTileRows + 1) * kStepTileStride;
  const size_t bytes = static_cast<size_t>(kLeftFloats + BlockScratch::kRightFloats) * sizeof(float);
  const WeightLayout& layout = *dW.layout;
  const int64_t biasTasks = dBias == nullptr ? 0 : (layout.out + kBiasColumns - 1) / kBiasColumns;
  int64_t tasks = biasTasks;
  for (const Part& part : layout.parts) tasks += WeightBlocks{part}.count();
  queue.scratch(0, bytes);
  deal(queue, tasks, dy.rows * layout.out * layout.in, [&](int64_t task, int thread) {
    if (task < biasTasks) {
      return accumulateBias(dy, task * kBiasColumns, smaller(layout.out, (task + 1) * kBiasColumns), dBias);
    }
    int64_t index = task - biasTasks, p = 0;
    for (; index >= WeightBlocks{layout.parts[p]}.count(); ++p) index -= WeightBlocks{layout.parts[p]}.count();
    const Part& part = layout.parts[p];
    const WeightBlocks blocks{part};
    const int64_t stripBegin = index / blocks.rowBlocks() * kStripColumns, block = index % blocks.rowBlocks();
    Strip strip;
    strip.add(p, stripBegin, smaller(stripBegin + kStripColumns, part.out), part.outBegin);
    float* const left = static_cast<float*>(queue.scratch(thread, bytes));
    accumulateBlock(dy, x, part, dW.data, blocks.rowBegin(block), blocks.rowBegin(block + 1), strip, left,
                    left + kLeftFloats);
  });
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
