// y = x W^T, with bias, with an activation. Many rows take the blocked product; few rows read the panels as they lie,
// once.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/linear_block.h"
#include "kernels/math.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

namespace {

// Up to so many rows the panels are read in place: staging them would cost more than it gives.
constexpr int64_t kFewRows = 64;

// x W^T.
struct Forward {
  Operand x;
  const Weight& w;
  Direct direct;

  const Part& part(int64_t p) const { return w.layout->parts[p]; }
  int64_t parts() const { return static_cast<int64_t>(w.layout->parts.size()); }
  int64_t leaves() const { return w.layout->split == Split::kIn ? parts() : 1; }
  int64_t columnParts() const { return w.layout->split == Split::kIn ? 1 : parts(); }
  int64_t steps(int64_t leaf) const { return chainSteps(w.dtype, part(leaf).in); }
  int64_t fmas(int64_t rows) const { return rows * w.layout->out * w.layout->in; }
  // Pairs are read from the panels as they lie; for float32 a copy that is dense costs less than it gives.
  bool staged() const { return !asPairSteps(w.dtype); }
  Form form() const { return asPairSteps(w.dtype) ? Form::kPairs : Form::kPlain; }

  void pack(int64_t leaf, int64_t first, int64_t steps, int64_t row, int64_t rows, float* to) const {
    const int64_t k = first * stepElements(w.dtype), count = steps * stepElements(w.dtype);
    packTile(x, row, rows, part(leaf).inBegin + k, smaller(count, part(leaf).in - k), steps, to);
  }
  PanelView panel(int64_t leaf, int64_t p, int64_t column) const {
    return panelAt(w, part(leaves() == 1 ? p : leaf), column);
  }
  const float* right(int64_t leaf, const Group& group, int64_t first, int64_t steps, float* stage,
                     int64_t& step) const {
    const PanelView from = panel(leaf, group.part, group.column);
    if (!staged()) {
      step = from.width;
      return from.data + first * from.width;
    }
    stagePanel(w.dtype, from, first, steps, group.vectors, stage);
    step = 16 * group.vectors;
    return stage;
  }
  int64_t strips() const {
    return countStrips(columnParts(), [&](int64_t p) { return part(p).out; });
  }
  void strip(int64_t index, Strip& strip) const {
    cutStrip(
        index, columnParts(), [&](int64_t p) { return part(p).out; }, [&](int64_t p) { return part(p).outBegin; },
        strip);
  }
};

// The same, in strips that hold a range of gate columns and the up columns that belong to them.
struct GatedForward : Forward {
  static constexpr int64_t kGates = kStripColumns / 2;

  int64_t stripsOf(int64_t p) const { return (part(p).out / 2 + kGates - 1) / kGates; }
  int64_t strips() const {
    int64_t count = 0;
    for (int64_t p = 0; p < parts(); ++p) count += stripsOf(p);
    return count;
  }
  void strip(int64_t index, Strip& strip) const {
    int64_t p = 0;
    for (; index >= stripsOf(p); ++p) index -= stripsOf(p);
    const int64_t half = part(p).out / 2;
    strip.begin = index * kGates;
    strip.end = smaller(strip.begin + kGates, half);
    strip.add(p, strip.begin, strip.end, part(p).outBegin);
    strip.second = strip.columns + (half + strip.begin) % 16;
    strip.add(p, half + strip.begin, half + strip.end, part(p).outBegin);
  }
};

// --- few rows --------------------------------------------------------------------------------------------

constexpr int64_t kFewStride = kPanel + 16;  // of a panel's accumulators

// x, packed once for all panels: per leaf and block of kDepth steps, tile by tile.
struct FewRows {
  const Forward& product;
  Tiles tiles;

  static int64_t blocks(int64_t steps) { return steps > kDepth ? (steps + kDepth - 1) / kDepth : 1; }
  int64_t blockFloats() const { return tiles.rows * kDepth; }
  int64_t leftFloats() const {
    int64_t count = 0;
    for (int64_t leaf = 0; leaf < product.leaves(); ++leaf) count += blocks(product.steps(leaf)) * blockFloats();
    return count;
  }
  int64_t levelFloats() const { return tiles.rows * kFewStride; }
  size_t bytes() const {
    return static_cast<size_t>(leftFloats() + (treeLevels(product.leaves()) + 1) * levelFloats()) * sizeof(float);
  }
  void pack(float* to) const {
    for (int64_t leaf = 0; leaf < product.leaves(); ++leaf) {
      const int64_t steps = product.steps(leaf);
      for (int64_t first = 0; first < steps || first == 0; first += kDepth, to += blockFloats()) {
        for (int64_t i = 0; i < tiles.last; ++i) {
          product.pack(leaf, first, smaller(kDepth, steps - first), tiles.begin(i), tiles.count(i),
                       to + tiles.begin(i) * kDepth);
        }
      }
    }
  }
};

// All rows against one block of steps of a panel of `vectors` vectors, which is column `column` of the output on. Every
// row tile but the first finds the panel cached.
inline void sweepPanel(Form form, TileCall call, const Tiles& tiles, int64_t vectors, const Direct& direct,
                       Group group) {
  const TileCall base = call;
  const int64_t columns = group.count;
  // The next block of the panel comes nearer while this one is used: every tile fetches an equal share of it.
  const int64_t first = panelVectors(tiles.count(0), vectors), sweeps = (vectors + first - 1) / first;
  const int64_t fetches = (base.steps + kStepsPerFetch - 1) / kStepsPerFetch;
  const int64_t lines = base.steps * vectors / (sweeps * tiles.last * (fetches > 0 ? fetches : 1)) + 1;
  const int64_t share = lines * fetches;
  const float* next = base.right + base.steps * base.rightStep;
  call.aheadLines = static_cast<int>(lines);
  call.aheadStride = lines * 16;
  for (int64_t v = 0; v < vectors;) {
    const int width = panelVectors(tiles.count(0), vectors - v);
    group.vectors = width;
    call.bias = nullptr;
    call.residual = nullptr;
    group.count = smaller(16 * width, columns - 16 * v);
    for (int64_t i = 0; i < tiles.last; ++i) {
      const int64_t at = tiles.begin(i) * kFewStride + 16 * v;
      call.left = base.left + tiles.begin(i) * kDepth;
      call.leftStep = tiles.count(i);
      call.right = base.right + 16 * v;
      call.ahead = next + (v / first * tiles.last + i) * share * 16;
      call.from = base.from == nullptr ? nullptr : base.from + at;
      call.levels = base.levels + at;
      call.to = base.to + at;
      call.toStride = kFewStride;
      if (direct.takes(group)) direct.aim(call, tiles, i, group.output + 16 * v);
      runTile(form, static_cast<int>(call.leftStep), width, call);
    }
    v += width;
  }
}

// A panel's accumulators, finished, kFewStride apart; what is direct has gone its way.
inline const float* multiplyPanel(const FewRows& few, const float* left, const Group& group, int64_t vectors,
                                  float* levels) {
  const Forward& product = few.product;
  const bool pairPanel = product.w.dtype == DType::kBFloat16;
  const int64_t leaves = product.leaves(), stepsPerPanelRow = pairPanel && !kPairArithmetic ? 2 : 1;
  float* const result = levels + treeLevels(leaves) * few.levelFloats();
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    const int64_t steps = product.steps(leaf), blocks = FewRows::blocks(steps);
    const PanelView panel = product.panel(leaf, group.part, group.column);
    for (int64_t block = 0; block < blocks; ++block, left += few.blockFloats()) {
      const bool last = block == blocks - 1;
      TileCall call{};
      call.left = left;
      call.right = panel.data + block * kDepth / stepsPerPanelRow * panel.width;
      call.rightStep = panel.width;
      call.steps = smaller(kDepth, steps - block * kDepth) / stepsPerPanelRow;
      call.from = block == 0 ? nullptr : result;
      call.levels = levels;
      call.levelStride = few.levelFloats();
      call.levelCount = last ? __builtin_ctzll(~static_cast<uint64_t>(leaf)) : 0;
      call.to = last ? levels + call.levelCount * few.levelFloats() : result;
      call.stride = kFewStride;
      const bool finished = last && leaf == leaves - 1;
      sweepPanel(pairPanel ? Form::kPairs : Form::kPlain, call, few.tiles, vectors,
                 finished ? product.direct : Direct{}, group);
    }
  }
  return result;
}

// Columns of a finished panel that sweepPanel has not stored directly: the last ones of a part, or all of them.
template <class Put>
void finishPanel(const float* result, const FewRows& few, const Group& group, int64_t vectors, const float* bias,
                 const Put& put) {
  for (int64_t v = 0; v < vectors;) {
    const int width = panelVectors(few.tiles.count(0), vectors - v);
    Strip strip;
    strip.count = 1;
    strip.groups[0] = {
        group.part, group.column, 16 * v, group.output + 16 * v, smaller(16 * width, group.count - 16 * v), width};
    finishBlock(result, kFewStride, strip, 0, few.tiles.rows, few.product.direct, bias, put);
    v += width;
  }
}

template <class Put>
void multiplyFewRows(Queue& queue, const Forward& product, const float* bias, const Put& put) {
  const FewRows few{product, Tiles(product.x.rows)};
  const size_t bytes = few.bytes();
  float* const left = static_cast<float*>(queue.scratch(0, bytes));
  few.pack(left);
  int64_t panels = 0;
  for (int64_t p = 0; p < product.columnParts(); ++p) panels += product.part(p).panels();
  const int64_t tasks = queue.threads() == 1 ? 1 : smaller(panels, 4 * queue.threads());
  deal(queue, tasks, product.fmas(product.x.rows), [&](int64_t task, int thread) {
    float* const levels = static_cast<float*>(queue.scratch(thread, bytes)) + few.leftFloats();
    int64_t begin = panels * task / tasks, end = panels * (task + 1) / tasks;
    for (int64_t p = 0; p < product.columnParts() && end > 0; ++p) {
      const Part& part = product.part(p);
      for (int64_t panel = begin; panel < smaller(end, part.panels()); ++panel) {
        const int64_t column = panel * kPanel, vectors = part.panelWidth(panel) / 16;
        const Group group{p, column, 0, part.outBegin + column, smaller(kPanel, part.out - column), 0};
        finishPanel(multiplyPanel(few, left, group, vectors, levels), few, group, vectors, bias, put);
      }
      begin = begin > part.panels() ? begin - part.panels() : 0;
      end -= part.panels();
    }
  });
}

// put(row, column, value + bias, count) for every vector of the product.
template <class Put>
void multiplyRows(Queue& queue, const Forward& product, const float* bias, const Put& put) {
  if (product.x.rows <= kFewRows) return multiplyFewRows(queue, product, bias, put);
  multiply(queue, product, product.x.rows, [&](const float* result, const Strip& strip, int64_t row, int64_t rows) {
    finishBlock(result, kStripStride, strip, row, rows, product.direct, bias, put);
  });
}

// --- activations -----------------------------------------------------------------------------------------

// silu(gate) * up of one vector: pre-activations at column `gate` and half a part further of W's rows.
struct Gate {
  Operand y, saved;
  const float* bias;

  LOCKSTEP_MEMBER void operator()(int64_t row, const Part& part, int64_t column, Vec gate, Vec up,
                                  int64_t count) const {
    const int64_t gateColumn = part.outBegin + column, upColumn = gateColumn + part.out / 2;
    if (bias != nullptr) {
      gate = gate + loadUpTo(bias + gateColumn, count);
      up = up + loadUpTo(bias + upColumn, count);
    }
    if (!saved.empty()) {
      putOperand(saved, row, gateColumn, gate, count);
      putOperand(saved, row, upColumn, up, count);
    }
    putOperand(y, row, part.outBegin / 2 + column, silu(gate) * up, count);
  }
};

void gatedBlocks(Queue& queue, const GatedForward& product, const Gate& gate) {
  multiply(queue, product, product.x.rows, [&](const float* result, const Strip& strip, int64_t row, int64_t rows) {
    const Part& part = product.part(strip.groups[0].part);
    for (int64_t r = 0; r < rows; ++r, result += kStripStride) {
      for (int64_t c = strip.begin; c < strip.end; c += 16) {
        const float* at = result + (c - strip.begin);
        gate(row + r, part, c, loadu(at), loadu(at + strip.second), smaller(16, strip.end - c));
      }
    }
  });
}

// Few rows: the pre-activations of all columns first, then the gates, row by row.
void gatedFewRows(Queue& queue, const Forward& product, const Gate& gate) {
  const int64_t rows = product.x.rows, stride = roundUp(product.w.layout->out, 16) + 16;
  float* const pre = static_cast<float*>(queue.shared(static_cast<size_t>(rows * stride) * sizeof(float)));
  const View<float> all{pre, rows, product.w.layout->out, stride};
  multiplyFewRows(
      queue, {product.x, product.w, {all, {}, nullptr}}, nullptr,
      [&](int64_t row, int64_t column, Vec value, int64_t count) { storeUpTo(all.row(row) + column, value, count); });
  deal(queue, rows, rows * product.w.layout->out * 8, [&](int64_t row, int) {
    for (int64_t p = 0; p < product.parts(); ++p) {
      const Part& part = product.part(p);
      const float* at = pre + row * stride + part.outBegin;
      const int64_t half = part.out / 2;
      for (int64_t c = 0; c < half; c += 16) {
        gate(row, part, c, loadu(at + c), loadUpTo(at + half + c, part.out - half - c), smaller(16, half - c));
      }
    }
  });
}

}  // namespace

void linear(Queue& queue, Operand x, const Weight& w, const float* bias, Output y) {
  multiplyRows(queue, Forward{x, w, directOutput(y, bias)}, bias,
               [&](int64_t row, int64_t column, Vec value, int64_t count) { put(y, row, column, value, count); });
}

void activatedLinear(Queue& queue, Operand x, const Weight& w, const float* bias, Activation activation, Operand y,
                     Operand saved) {
  if (activation == Activation::kGeluTanh) {
    return multiplyRows(queue, Forward{x, w, {}}, bias, [&](int64_t row, int64_t column, Vec value, int64_t count) {
      if (!saved.empty()) putOperand(saved, row, column, value, count);
      putOperand(y, row, column, geluTanh(value), count);
    });
  }
  const Gate gate{y, saved, bias};
  if (x.rows <= kFewRows) return gatedFewRows(queue, Forward{x, w, {}}, gate);
  gatedBlocks(queue, GatedForward{{x, w, {}}}, gate);
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
