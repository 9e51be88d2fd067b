#include "model/transformer.h"

#include <algorithm>

#include "core/error.h"
#include "core/range.h"
#include "core/work_clock.h"

namespace lockstep::model {

Transformer::Transformer(const Spec& spec, const Parallel& parallel, const Parameters& parameters,
                         GatheredWeights& weights, GradientBuckets& gradients, const kernels::Kernels& kernels,
                         Queue& queue, Memory& memory, const std::atomic<bool>& cancelled)
    : spec_(spec),
      parallel_(parallel),
      parameters_(parameters),
      weights_(weights),
      gradients_(gradients),
      k_(kernels),
      queue_(queue),
      cancelled_(cancelled),
      link_(parallel),
      tables_("rotary tables", memory.isHost() ? 0 : (spec.cosine.size() + spec.sine.size()) * sizeof(float), nullptr,
              memory) {
  const size_t bytes = spec.cosine.size() * sizeof(float);
  if (memory.isHost() || bytes == 0) return;
  memory.fromHost(tables_.data(), spec.cosine.data(), bytes);
  memory.fromHost(tables_.data() + bytes, spec.sine.data(), bytes);
}

// In the device's memory: on the host the tables are the spec's own.
kernels::Rope Transformer::rope() {
  if (spec_.cosine.empty()) return {};
  if (tables_.planned() == 0) return {spec_.cosine.data(), spec_.sine.data()};
  const auto* cosine = reinterpret_cast<const float*>(tables_.data());
  return {cosine, cosine + spec_.cosine.size()};
}

std::string Transformer::named(int64_t layer, const char* tensor) const {
  return "layers." + std::to_string(spec_.firstLayer + layer) + "." + tensor;
}

void Transformer::checkCancelled() const {
  if (cancelled_) throw Error("ABORTED", "the model was closed while it was working");
}

LayerBuffers Transformer::layer(const Pass& pass, int64_t l, Keep what) const {
  const bool keep = what == Keep::kActivations;
  const Workspace& w = pass.workspace;
  const int64_t rows = pass.rows();
  const Shape& s = spec_.shape;
  const DType dtype = spec_.dtype;
  const int64_t queries = s.heads * s.headWidth, norms = s.norm == Norm::kLayer ? 2 : 1;
  LayerBuffers b;
  b.in = w.f32("x", l, rows, s.width);
  b.out = w.f32("x", l + 1, rows, s.width);
  b.middle = keep ? w.f32("middle", l, rows, s.width) : b.in;
  b.normed1 = w.operand("normed1", l, dtype, rows, s.width);
  b.normed2 = keep ? w.operand("normed2", l, dtype, rows, s.width) : b.normed1;
  b.q = w.operand("q", l, dtype, rows, queries);
  b.attended = w.operand("attended", l, dtype, rows, queries);
  b.activated = w.operand("activated", l, dtype, rows, s.feedForward);
  b.pages = {nullptr, dtype, s.keyValueHeads, s.headWidth};
  const int64_t pageBytes = pass.pageCount * b.pages.pageElements() * static_cast<int64_t>(bytesOf(dtype));
  b.pages.data = what == Keep::kCache ? static_cast<char*>(w.take("kv", s.layers * pageBytes)) + l * pageBytes
                                      : w.take("kv", l, pageBytes);
  if (!keep) return b;
  b.stat1 = w.f32("stat1", l, rows, norms).data;
  b.stat2 = w.f32("stat2", l, rows, norms).data;
  b.logSumExp = w.f32("logSumExp", l, s.heads, rows);
  b.up = w.operand("up", l, dtype, rows, s.upColumns());
  if (s.headNorm) b.savedQk = w.operand("savedQk", l, dtype, rows, (s.heads + s.keyValueHeads) * s.headWidth);
  return b;
}

void Transformer::norm(const std::string& name, View<const float> x, Operand y, float* stat) {
  const float* gain = parameters_.vector(name);
  if (spec_.shape.norm == Norm::kRms) return k_.rmsNorm(queue_, x, gain, spec_.shape.normEps, y, stat);
  float* deviation = stat == nullptr ? nullptr : stat + x.rows;
  k_.layerNorm(queue_, x, gain, parameters_.vector(name + "Bias"), spec_.shape.normEps, y, stat, deviation);
}

void Transformer::normBackward(const std::string& name, View<const float> x, const float* stat, View<const float> dy,
                               View<float> dx) {
  const float* gain = parameters_.vector(name);
  float* dGain = parameters_.vectorGradient(name);
  if (spec_.shape.norm == Norm::kRms) return k_.rmsNormBackward(queue_, x, gain, stat, dy, dx, dGain);
  k_.layerNormBackward(queue_, x, gain, stat, stat + x.rows, dy, dx, dGain, parameters_.vectorGradient(name + "Bias"));
}

void Transformer::blockForward(const Pass& pass, int64_t l, const LayerBuffers& b) {
  checkCancelled();
  const Range range(named(l, "forward"));
  const Batch& batch = pass.batch;
  const Workspace& w = pass.workspace;
  const Shape& s = spec_.shape;
  const kernels::QkvLayout qkv = s.qkv(l);
  const auto weight = [&](const char* name) { return parameters_.weight(named(l, name)); };
  const auto vector = [&](const char* name) { return parameters_.vector(named(l, name)); };
  const kernels::HeadNorm headNorm{vector("queryNorm"), vector("keyNorm"), s.normEps};
  const kernels::Rope rope = this->rope();

  norm(named(l, "norm1"), b.in, b.normed1, b.stat1);
  const View<float> wide = w.f32("wide", kAbsent, batch.rows(), qkv.columns());
  k_.linear(queue_, b.normed1, weight("qkv"), vector("qkvBias"), kernels::Output::store(wide));
  k_.qkvPrepare(queue_, qkv, wide, batch.sequences(), headNorm, rope, b.q, b.pages, b.savedQk);
  k_.attention(queue_, qkv.attention, b.q, b.pages, batch.sequences(), b.attended, b.logSumExp);
  rowProduct(w, b.attended, named(l, "attentionOut"), b.in, b.middle);

  norm(named(l, "norm2"), b.middle, b.normed2, b.stat2);
  k_.activatedLinear(queue_, b.normed2, weight("up"), vector("upBias"), s.activation, b.activated, b.up);
  if (b.out.empty()) return;  // recomputation for backward needs what the block saves, not what it returns
  rowProduct(w, b.activated, named(l, "down"), b.middle, b.out);
}

void Transformer::rowProduct(const Workspace& w, Operand x, const std::string& name, View<const float> residual,
                             View<float> y) {
  const kernels::Weight weight = parameters_.weight(name);
  const float* bias = parameters_.vector(name + "Bias");
  if (parallel_.tensor == nullptr) return k_.linear(queue_, x, weight, bias, kernels::Output::add(residual, y));
  const View<float> sum = w.f32("wide", kAbsent, y.rows, y.cols);
  k_.linear(queue_, x, weight, nullptr, kernels::Output::store(sum));
  sumOverTensor(sum, name);
  k_.finishSum(queue_, sum, bias, residual, y);
}

void Transformer::sumOverTensor(View<float> y, const std::string& site) {
  if (parallel_.tensor != nullptr) parallel_.tensor->allReduce(y.data, y.data, y.rows * y.cols, site);
}

// Tokens as rows of the rank's part of the vocabulary, -1 for those of other ranks.
std::vector<int32_t> Transformer::localTokens(const std::vector<int32_t>& tokens, int64_t rows) const {
  std::vector<int32_t> local;
  local.reserve(tokens.size());
  for (const int32_t token : tokens) {
    const int64_t row = token - spec_.vocabularyBegin;
    local.push_back(token < 0 || row < 0 || row >= rows ? -1 : static_cast<int32_t>(row));
  }
  return local;
}

// One rank of the group has the token; the others add zero.
void Transformer::embed(const Batch& batch, View<float> x) {
  const kernels::Weight weight = parameters_.weight("embed");
  const std::vector<int32_t> tokens = localTokens(batch.tokens, weight.layout->out);
  k_.embed(queue_, tokens.data(), batch.positions.data(), weight, parameters_.vector("positions"), x);
  sumOverTensor(x, "embed");
}

void Transformer::forward(std::span<Pass> passes, Keep what) {
  for (const Pass& pass : passes) receive(pass);
  if (what != Keep::kCache) WorkClock::begin();  // a generation is one work of many passes
  weights_.enter(0);
  for (const Pass& pass : passes) {
    if (parallel_.firstStage()) embed(pass.batch, pass.workspace.f32("x", 0, pass.rows(), spec_.shape.width));
  }
  for (int64_t l = 0; l < spec_.shape.layers; ++l) {
    weights_.enter(static_cast<size_t>(l) + 1);
    for (const Pass& pass : passes) blockForward(pass, l, layer(pass, l, what));
  }
  weights_.enter(headUnit());
  for (Pass& pass : passes) finish(pass, what);
}

void Transformer::receive(const Pass& pass) {
  if (parallel_.firstStage()) return flush();
  link_.receive(pass.workspace.f32("x", 0, pass.rows(), spec_.shape.width), -1, "activations");
}

void Transformer::finish(Pass& pass, Keep what) {
  const Shape& s = spec_.shape;
  const Workspace& w = pass.workspace;
  const View<float> last = w.f32("x", s.layers, pass.rows(), s.width);
  if (!parallel_.lastStage()) {
    link_.send(last, +1);
    if (what == Keep::kNothing) {
      queue_.synchronize();
      WorkClock::end();
    }
    if (what != Keep::kActivations) flush();
    return;
  }
  pass.hidden = w.operand("hidden", kAbsent, spec_.dtype, pass.rows(), s.width);
  float* stat = what == Keep::kActivations
                    ? w.f32("hiddenStat", kAbsent, pass.rows(), s.norm == Norm::kLayer ? 2 : 1).data
                    : nullptr;
  norm("finalNorm", last, pass.hidden, stat);
}

void Transformer::logprobs(Pass& pass) {
  const Workspace& w = pass.workspace;
  const kernels::Staging staging{w.take("staging", w.bytes("staging")), w.bytes("staging")};
  const kernels::Weight weight = parameters_.weight(vocabularyName());
  const std::vector<int32_t> targets = localTokens(pass.batch.targets, weight.layout->out);
  const int64_t rows = pass.rows(), groups = parallel_.tensorRanks();
  for (auto* array : {&pass.logprobs, &pass.entropies, &pass.logZ}) array->resize(static_cast<size_t>(rows));
  std::vector<kernels::SoftmaxStatistics> all(static_cast<size_t>(groups * rows));
  kernels::SoftmaxStatistics* own = all.data() + (parallel_.tensor == nullptr ? 0 : parallel_.tensor->rank() * rows);
  k_.softmaxStatistics(queue_, pass.hidden, weight, targets.data(), pass.inverseTemperature, own, staging);
  if (parallel_.tensor != nullptr) {
    constexpr int64_t kFloats = sizeof(kernels::SoftmaxStatistics) / sizeof(float);
    parallel_.tensor->allGather(own, all.data(), rows * kFloats, comm::Element::kFloat32, "softmax statistics");
  }
  k_.mergeStatistics(queue_, all.data(), groups, rows, pass.batch.targets.data(), pass.softmax());
}

void Transformer::values(Operand hidden, View<float> values) {
  k_.linear(queue_, hidden, parameters_.weight("scalarHead"), parameters_.vector("scalarHeadBias"),
            kernels::Output::store(values));
}

void Transformer::logits(Operand hidden, View<float> logits) {
  const kernels::Weight weight = parameters_.weight(vocabularyName());
  const int64_t begin = spec_.vocabularyBegin, columns = weight.layout->out;
  const View<float> own{logits.data + begin, logits.rows, columns, logits.stride};
  if (columns > 0) k_.linear(queue_, hidden, weight, nullptr, kernels::Output::store(own));
  if (parallel_.tensor == nullptr) return;
  std::vector<comm::Piece> pieces;
  for (int64_t r = 0; r < logits.rows && columns > 0; ++r) {
    pieces.push_back({own.row(r), (r * logits.stride + begin) * 4, columns * 4});
  }
  parallel_.tensor->allGatherPieces(pieces, logits.data, logits.rows * logits.stride * 4, "logits");
}

kernels::WeightLayout Transformer::vocabularyLayout() const {
  return kernels::WeightLayout::make(spec_.shape.vocabulary, spec_.shape.width, kernels::Split::kOut,
                                     spec_.vocabularyParts);
}

Operand Transformer::asOperand(const Workspace& w, View<float> dx) {
  if (spec_.dtype == DType::kFloat32) return denseOperand(dx.data, DType::kFloat32, dx.rows, dx.cols);
  const Operand rounded = w.operand("dxOperand", kAbsent, spec_.dtype, dx.rows, dx.cols);
  k_.round(queue_, dx, rounded);
  return rounded;
}

void Transformer::headBackward(Pass& pass, const OutputGradients& d, View<float> dHidden) {
  const Workspace& w = pass.workspace;
  if (spec_.shape.head == Head::kLanguage) {
    const std::string name = vocabularyName();
    const kernels::Staging staging{w.take("staging", w.bytes("staging")), w.bytes("staging")};
    const kernels::Weight weight = parameters_.weight(name);
    const std::vector<int32_t> targets = localTokens(pass.batch.targets, weight.layout->out);
    k_.logprobsBackward(queue_, pass.hidden, weight, targets.data(), pass.inverseTemperature, pass.softmax(),
                        d.logprobs, d.entropies, dHidden, parameters_.gradient(name, vocabularyCopy()), staging);
    sumOverTensor(dHidden, "dHidden");
    return;
  }
  const Operand dValues = w.operand("operand", kAbsent, spec_.dtype, pass.rows(), 1);
  const View<float> values = w.f32("wide", kAbsent, pass.rows(), 1);  // until dHidden takes its place
  queue_.fromHost(values.data, d.values, static_cast<size_t>(pass.rows()) * sizeof(float));
  k_.round(queue_, values, dValues);
  k_.linearBackwardWeight(queue_, dValues, pass.hidden, parameters_.gradient("scalarHead"),
                          parameters_.vectorGradient("scalarHeadBias"));
  k_.linearBackwardInput(queue_, dValues, parameters_.weight("scalarHead"), kernels::Output::store(dHidden));
}

void Transformer::backward(std::span<Pass> passes, std::span<const OutputGradients> d) {
  const auto visit = [&](size_t unit, const auto& each) {
    gradients_.enter(unit);
    for (size_t i = 0; i < passes.size(); ++i) each(i);
    gradients_.leave(unit);
  };
  for (const Pass& pass : passes) receiveGradients(pass);
  WorkClock::begin();
  weights_.enter(headUnit());
  visit(headUnit(), [&](size_t i) {
    if (parallel_.lastStage()) beginBackward(passes[i], d[i]);
  });
  for (int64_t l = spec_.shape.layers - 1; l >= 0; --l) {
    const auto unit = static_cast<size_t>(l) + 1;
    weights_.enter(unit);
    visit(unit, [&](size_t i) {
      LayerBuffers b = layer(passes[i], l, Keep::kActivations);
      if (spec_.recompute) {
        b.out = {};
        blockForward(passes[i], l, b);
      }
      blockBackward(passes[i], l, b);
    });
  }
  visit(0, [&](size_t i) { finishBackward(passes[i]); });
}

void Transformer::beginBackward(Pass& pass, const OutputGradients& d) {
  const Shape& s = spec_.shape;
  const Workspace& w = pass.workspace;
  const View<float> dHidden = w.f32("wide", kAbsent, pass.rows(), s.width);
  headBackward(pass, d, dHidden);
  queue_.fill(dx(pass).data, 0, static_cast<size_t>(pass.rows() * s.width) * sizeof(float));
  normBackward("finalNorm", w.f32("x", s.layers, pass.rows(), s.width),
               w.f32("hiddenStat", kAbsent, pass.rows(), s.norm == Norm::kLayer ? 2 : 1).data, dHidden, dx(pass));
}

void Transformer::receiveGradients(const Pass& pass) {
  if (parallel_.lastStage()) return flush();
  link_.receive(dx(pass), +1, "gradients");
}

void Transformer::finishBackward(const Pass& pass) {
  if (!parallel_.firstStage()) return link_.send(dx(pass), -1);
  const kernels::WeightGradient gradient = parameters_.gradient("embed");
  const std::vector<int32_t> tokens = localTokens(pass.batch.tokens, gradient.layout->out);
  k_.embedBackward(queue_, tokens.data(), pass.batch.positions.data(), dx(pass), gradient,
                   parameters_.vectorGradient("positions"));
}

void Transformer::shareKeyValueGradients(const Workspace& w, const kernels::QkvLayout& qkv, View<float> dqkv) {
  comm::Communicator* sharers = parallel_.keyValue.get();
  if (sharers == nullptr) return;
  // The rank's one key head and, behind it, its value head.
  const int64_t first = qkv.keyColumn(0), columns = 2 * qkv.attention.headWidth;
  const View<float> sum = w.f32("keyValueGradients", kAbsent, dqkv.rows, columns);
  const auto bytes = [](int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); };
  queue_.copyRows(sum.data, bytes(columns), dqkv.data + first, bytes(dqkv.stride), bytes(columns), dqkv.rows);
  sharers->allReduce(sum.data, sum.data, sum.rows * sum.cols, "key/value gradients");
  if (sharers->rank() == 0) {
    queue_.copyRows(dqkv.data + first, bytes(dqkv.stride), sum.data, bytes(columns), bytes(columns), dqkv.rows);
  } else {
    queue_.fillRows(dqkv.data + first, bytes(dqkv.stride), 0, bytes(columns), dqkv.rows);
  }
}

void Transformer::blockBackward(const Pass& pass, int64_t l, const LayerBuffers& b) {
  checkCancelled();
  const Range range(named(l, "backward"));
  const Batch& batch = pass.batch;
  const Workspace& w = pass.workspace;
  const View<float> dx = this->dx(pass);
  const Shape& s = spec_.shape;
  const kernels::QkvLayout qkv = s.qkv(l);
  const int64_t rows = pass.rows();
  const auto weight = [&](const char* name) { return parameters_.weight(named(l, name)); };
  const auto gradient = [&](const char* name) { return parameters_.gradient(named(l, name)); };
  const auto vector = [&](const char* name) { return parameters_.vector(named(l, name)); };
  const auto vectorGradient = [&](const char* name) { return parameters_.vectorGradient(named(l, name)); };
  const kernels::HeadNorm headNorm{vector("queryNorm"), vector("keyNorm"), s.normEps};
  const kernels::Rope rope = this->rope();
  // "wide" (float32) and "operand" (compute dtype) hold one intermediate after the other.
  const auto wide = [&](int64_t cols) { return w.f32("wide", kAbsent, rows, cols); };
  const auto operand = [&](int64_t cols) { return w.operand("operand", kAbsent, spec_.dtype, rows, cols); };
  const auto store = [](View<float> y) { return kernels::Output::store(y); };

  Operand dy = asOperand(w, dx);
  k_.linearBackwardWeight(queue_, dy, b.activated, gradient("down"), vectorGradient("downBias"));
  k_.linearBackwardInput(queue_, dy, weight("down"), store(wide(s.feedForward)));
  const Operand dUp = operand(s.upColumns());
  k_.activationBackward(queue_, s.activation, *weight("up").layout, b.up, wide(s.feedForward), dUp);
  k_.linearBackwardWeight(queue_, dUp, b.normed2, gradient("up"), vectorGradient("upBias"));
  k_.linearBackwardInput(queue_, dUp, weight("up"), store(wide(s.width)));
  sumOverTensor(wide(s.width), named(l, "up"));
  normBackward(named(l, "norm2"), b.middle, b.stat2, wide(s.width), dx);

  dy = asOperand(w, dx);
  k_.linearBackwardWeight(queue_, dy, b.attended, gradient("attentionOut"), vectorGradient("attentionOutBias"));
  const Operand dAttended = operand(s.heads * s.headWidth);
  k_.linearBackwardInput(queue_, dy, weight("attentionOut"), kernels::Output::round(dAttended));
  k_.attentionBackward(queue_, qkv, b.q, b.pages, batch.sequences(), b.attended, b.logSumExp, dAttended,
                       wide(qkv.columns()));
  shareKeyValueGradients(w, qkv, wide(qkv.columns()));
  const Operand dqkv = operand(qkv.columns());
  k_.qkvPrepareBackward(queue_, qkv, wide(qkv.columns()), batch.positions.data(), headNorm, rope, b.savedQk, dqkv,
                        vectorGradient("queryNorm"), vectorGradient("keyNorm"));
  k_.linearBackwardWeight(queue_, dqkv, b.normed1, gradient("qkv"), vectorGradient("qkvBias"));
  k_.linearBackwardInput(queue_, dqkv, weight("qkv"), store(wide(s.width)));
  sumOverTensor(wide(s.width), named(l, "qkv"));
  normBackward(named(l, "norm1"), b.in, b.stat1, wide(s.width), dx);
}

}  // namespace lockstep::model
