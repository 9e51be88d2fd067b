// y = x W^T, with bias, with an activation. Many rows take the blocked product; few rows read the panels as they lie,
// once.
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/linear_block.h"
#include "kernels/math.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

namespace {

// Up to so many rows the panels are read in place: staging them would cost more than it gives.
constexpr int64_t kFewRows = 64;
constexpr int64_t kGateWork = 8;  // what silu(gate) * up costs, in FMAs of a product

// x W^T.
struct Forward : BlockedProduct {
  Operand x;
  const Weight& w;
  const float* bias;

  Forward(Operand left, const Weight& weight, const float* b, Direct to)
      : BlockedProduct(to), x(left), w(weight), bias(b) {}

  const Part& part(int64_t p) const { return w.layout->parts[p]; }
  int64_t parts() const { return static_cast<int64_t>(w.layout->parts.size()); }
  int64_t leaves() const final { return w.layout->split == Split::kIn ? parts() : 1; }
  int64_t columnParts() const { return w.layout->split == Split::kIn ? 1 : parts(); }
  int64_t steps(int64_t leaf) const final { return chainSteps(w.dtype, part(leaf).in); }
  int64_t fmas(int64_t rows) const final { return rows * w.layout->out * w.layout->in; }
  // Pairs are read from the panels as they lie; for float32 a copy that is dense costs less than it gives.
  bool staged() const { return !asPairSteps(w.dtype); }
  Form form() const final { return asPairSteps(w.dtype) ? Form::kPairs : Form::kPlain; }

  void pack(int64_t leaf, int64_t first, int64_t steps, int64_t row, int64_t rows, float* to) const final {
    const int64_t k = first * stepElements(w.dtype), count = steps * stepElements(w.dtype);
    packTile(x, row, rows, part(leaf).inBegin + k, smaller(count, part(leaf).in - k), steps, to);
  }
  PanelView panel(int64_t leaf, int64_t p, int64_t column) const {
    return panelAt(w, part(leaves() == 1 ? p : leaf), column);
  }
  const float* right(int64_t leaf, const Group& group, int64_t first, int64_t steps, float* stage,
                     int64_t& step) const final {
    const PanelView from = panel(leaf, group.part, group.column);
    if (!staged()) {
      step = from.width;
      return from.data + first * from.width;
    }
    stagePanel(w.dtype, from, first, steps, group.vectors, stage);
    step = 16 * group.vectors;
    return stage;
  }
  int64_t strips() const override {
    return countStrips(columnParts(), [&](int64_t p) { return part(p).out; });
  }
  void strip(int64_t index, Strip& strip) const override {
    cutStrip(
        index, columnParts(), [&](int64_t p) { return part(p).out; }, [&](int64_t p) { return part(p).outBegin; },
        strip);
  }
};

// --- few rows --------------------------------------------------------------------------------------------

constexpr int64_t kFewStride = kPanel + 16;  // of a panel's accumulators

// x, packed once for all panels: per leaf and block of kDepth steps, tile by tile.
struct FewRows {
  const Forward& product;
  Tiles tiles;

  static int64_t blocks(int64_t steps) { return steps > kDepth ? (steps + kDepth - 1) / kDepth : 1; }
  int64_t blockFloats() const { return tiles.rows * kLeftFloats; }
  int64_t leftFloats() const {
    int64_t count = 0;
    for (int64_t leaf = 0; leaf < product.leaves(); ++leaf) count += blocks(product.steps(leaf)) * blockFloats();
    return count;
  }
  int64_t levelFloats() const { return tiles.rows * kFewStride; }
  // Steps of the left operand for a row of a panel, which of bfloat16 holds pairs.
  int64_t leftPerRow() const { return product.w.dtype == DType::kBFloat16 && !kPairArithmetic ? 2 : 1; }
  size_t bytes() const {
    return static_cast<size_t>(leftFloats() + (treeLevels(product.leaves()) + 1) * levelFloats()) * sizeof(float);
  }
  void pack(float* to) const {
    for (int64_t leaf = 0; leaf < product.leaves(); ++leaf) {
      const int64_t steps = product.steps(leaf);
      for (int64_t first = 0; first < steps || first == 0; first += kDepth, to += blockFloats()) {
        for (int64_t i = 0; i < tiles.last; ++i) {
          product.pack(leaf, first, smaller(kDepth, steps - first), tiles.begin(i), tiles.count(i),
                       to + tiles.begin(i) * kLeftFloats);
        }
      }
    }
  }
};

// All rows, from step `leftSteps` of their block on, against `call.steps` rows of a panel of `vectors` vectors. Every
// row tile but the first finds them cached.
inline void sweepRows(Form form, TileCall call, int64_t leftSteps, const Tiles& tiles, int64_t vectors,
                      const Direct& direct, Group group) {
  const TileCall base = call;
  const int64_t columns = group.count;
  // As many rows of the panel come nearer while these are used: every tile fetches an equal share of them.
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
      call.leftStep = kLeftByRows ? 1 : tiles.count(i);
      call.left = base.left + tiles.begin(i) * kLeftFloats + leftSteps * call.leftStep;
      call.right = base.right + 16 * v;
      call.ahead = next + (v / first * tiles.last + i) * share * 16;
      call.from = base.from == nullptr ? nullptr : base.from + at;
      call.levels = base.levels + at;
      call.to = base.to + at;
      call.toStride = kFewStride;
      if (direct.takes(group)) direct.aim(call, tiles, i, group.output + 16 * v);
      runTile(form, static_cast<int>(tiles.count(i)), width, call);
    }
    v += width;
  }
}

// All rows against a block of a panel, sweepDepth rows of it at a time; sums wait in `waiting` in between.
inline void sweepPanel(Form form, const TileCall& block, const FewRows& few, int64_t vectors, const Direct& direct,
                       const Group& group, float* waiting) {
  const int64_t depth = sweepDepth(few.tiles.rows), leftPerRow = few.leftPerRow();
  for (int64_t first = 0; first < block.steps || first == 0; first += depth) {
    const bool last = first + depth >= block.steps;
    TileCall call = block;
    call.right += first * block.rightStep;
    call.steps = smaller(depth, block.steps - first);
    if (first > 0) call.from = waiting;
    if (!last) {
      call.levelCount = 0;
      call.to = waiting;
    }
    sweepRows(form, call, first * leftPerRow, few.tiles, vectors, last ? direct : Direct{}, group);
  }
}

// A panel's accumulators, finished, kFewStride apart; what is direct has gone its way.
inline const float* multiplyPanel(const FewRows& few, const float* left, const Group& group, int64_t vectors,
                                  float* levels) {
  const Forward& product = few.product;
  const bool pairPanel = product.w.dtype == DType::kBFloat16;
  const int64_t leaves = product.leaves(), leftPerRow = few.leftPerRow();
  float* const result = levels + treeLevels(leaves) * few.levelFloats();
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    const int64_t steps = product.steps(leaf), blocks = FewRows::blocks(steps);
    const PanelView panel = product.panel(leaf, group.part, group.column);
    for (int64_t block = 0; block < blocks; ++block, left += few.blockFloats()) {
      const bool last = block == blocks - 1;
      TileCall call{};
      call.left = left;
      call.leftByRows = kLeftByRows;
      call.right = panel.data + block * kDepth / leftPerRow * panel.width;
      call.rightStep = panel.width;
      call.steps = smaller(kDepth, steps - block * kDepth) / leftPerRow;
      call.from = block == 0 ? nullptr : result;
      call.levels = levels;
      call.levelStride = few.levelFloats();
      call.levelCount = last ? __builtin_ctzll(~static_cast<uint64_t>(leaf)) : 0;
      call.to = last ? levels + call.levelCount * few.levelFloats() : result;
      call.stride = kFewStride;
      const bool finished = last && leaf == leaves - 1;
      sweepPanel(pairPanel ? Form::kPairs : Form::kPlain, call, few, vectors, finished ? product.direct : Direct{},
                 group, result);
    }
  }
  return result;
}

// What sweepPanel has done, as a strip in its widths.
inline void panelStrip(const FewRows& few, const Group& group, int64_t vectors, Strip& strip) {
  for (int64_t v = 0; v < vectors;) {
    const int width = panelVectors(few.tiles.count(0), vectors - v);
    const int64_t exist = smaller(16 * width, group.count - 16 * v);
    strip.groups[strip.count++] = {group.part, group.column + 16 * v, 16 * v, group.output + 16 * v, exist, width};
    v += width;
  }
}

void multiplyFewRows(Queue& queue, const Forward& product) {
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
        Strip strip;
        panelStrip(few, group, vectors, strip);
        product.finish(multiplyPanel(few, left, group, vectors, levels), kFewStride, strip, 0, few.tiles.rows);
      }
      begin = begin > part.panels() ? begin - part.panels() : 0;
      end -= part.panels();
    }
  });
}

void multiplyForward(Queue& queue, const Forward& product) {
  if (product.x.rows == 0) return;
  if (product.x.rows <= kFewRows) return multiplyFewRows(queue, product);
  multiply(queue, product, product.x.rows);
}

// --- where results go ------------------------------------------------------------------------------------

struct LinearForward final : Forward {
  Output y;

  LinearForward(Operand left, const Weight& weight, const float* b, Output to)
      : Forward(left, weight, b, directOutput(to, b)), y(to) {}
  void finish(const float* from, int64_t stride, const Strip& strip, int64_t row, int64_t rows) const override {
    finishBlock(from, stride, strip, row, rows, direct, bias,
                [&](int64_t r, int64_t column, Vec value, int64_t count) { put(y, r, column, value, count); });
  }
};

struct GeluForward final : Forward {
  Operand y, saved;

  GeluForward(Operand left, const Weight& weight, const float* b, Operand to, Operand pre)
      : Forward(left, weight, b, {}), y(to), saved(pre) {}
  void finish(const float* from, int64_t stride, const Strip& strip, int64_t row, int64_t rows) const override {
    finishBlock(from, stride, strip, row, rows, direct, bias, [&](int64_t r, int64_t column, Vec value, int64_t count) {
      if (!saved.empty()) putOperand(saved, r, column, value, count);
      putOperand(y, r, column, geluTanh(value), count);
    });
  }
};

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

// Strips hold a range of gate columns and the up columns that belong to them.
struct GatedForward final : Forward {
  static constexpr int64_t kGates = kStripColumns / 2;
  Gate gate;

  GatedForward(Operand left, const Weight& weight, const Gate& g) : Forward(left, weight, nullptr, {}), gate(g) {}
  int64_t stripsOf(int64_t p) const { return (part(p).out / 2 + kGates - 1) / kGates; }
  int64_t strips() const override {
    int64_t count = 0;
    for (int64_t p = 0; p < parts(); ++p) count += stripsOf(p);
    return count;
  }
  void strip(int64_t index, Strip& strip) const override {
    int64_t p = 0;
    for (; index >= stripsOf(p); ++p) index -= stripsOf(p);
    const int64_t half = part(p).out / 2;
    strip.begin = index * kGates;
    strip.end = smaller(strip.begin + kGates, half);
    strip.add(p, strip.begin, strip.end, part(p).outBegin);
    strip.second = strip.columns + (half + strip.begin) % 16;
    strip.add(p, half + strip.begin, half + strip.end, part(p).outBegin);
  }
  void finish(const float* from, int64_t stride, const Strip& strip, int64_t row, int64_t rows) const override {
    const Part& p = part(strip.groups[0].part);
    for (int64_t r = 0; r < rows; ++r, from += stride) {
      for (int64_t c = strip.begin; c < strip.end; c += 16) {
        const float* at = from + (c - strip.begin);
        gate(row + r, p, c, loadu(at), loadu(at + strip.second), smaller(16, strip.end - c));
      }
    }
  }
};

// Few rows: the pre-activations of all columns first, then the gates, row by row.
void gatedFewRows(Queue& queue, Operand x, const Weight& w, const Gate& gate) {
  const int64_t stride = roundUp(w.layout->out, 16) + 16;
  float* const memory = static_cast<float*>(queue.shared(static_cast<size_t>(x.rows * stride) * sizeof(float)));
  const View<float> pre{memory, x.rows, w.layout->out, stride};
  multiplyForward(queue, LinearForward(x, w, nullptr, Output::store(pre)));
  deal(queue, x.rows, x.rows * w.layout->out * kGateWork, [&](int64_t row, int) {
    for (const Part& part : w.layout->parts) {
      const float* at = pre.row(row) + part.outBegin;
      const int64_t half = part.out / 2;
      for (int64_t c = 0; c < half; c += 16) {
        gate(row, part, c, loadu(at + c), loadUpTo(at + half + c, half - c), smaller(16, half - c));
      }
    }
  });
}

}  // namespace

void linear(Queue& queue, Operand x, const Weight& w, const float* bias, Output y) {
  multiplyForward(queue, LinearForward(x, w, bias, y));
}

void activatedLinear(Queue& queue, Operand x, const Weight& w, const float* bias, Activation activation, Operand y,
                     Operand saved) {
  if (activation == Activation::kGeluTanh) return multiplyForward(queue, GeluForward(x, w, bias, y, saved));
  const Gate gate{y, saved, bias};
  if (x.rows <= kFewRows) return gatedFewRows(queue, x, w, gate);
  multiplyForward(queue, GatedForward(x, w, gate));
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
