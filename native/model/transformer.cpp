#include "model/transformer.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace lockstep::model {

namespace {

std::string named(int64_t layer, const char* tensor) {
  return "layers." + std::to_string(layer) + "." + tensor;
}

// Rows between sequences are read by products over tokens and must be finite: attention writes none of them.
void zeroPaddingRows(const Batch& batch, Operand x) {
  for (int64_t b = 0; b < batch.count(); ++b) {
    const int64_t end = batch.rowBegin[static_cast<size_t>(b)] + batch.length[static_cast<size_t>(b)];
    const int64_t next = b + 1 < batch.count() ? batch.rowBegin[static_cast<size_t>(b) + 1] : batch.rows();
    for (int64_t row = end; row < next; ++row)
      std::memset(x.rowBytes(row), 0, static_cast<size_t>(x.cols) * bytesOf(x.dtype));
  }
}

}  // namespace

Transformer::Transformer(const Spec& spec, const Parameters& parameters, const kernels::Kernels& kernels, Queue& queue,
                         const std::atomic<bool>& cancelled)
    : spec_(spec), parameters_(parameters), k_(kernels), queue_(queue), cancelled_(cancelled) {}

void Transformer::checkCancelled() const {
  if (cancelled_) throw Error("ABORTED", "the model was closed while it was working");
}

LayerBuffers Transformer::layer(const Workspace& w, int64_t l, int64_t rows, int64_t pageCount, Keep what) const {
  const bool keep = what == Keep::kActivations;
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
  const int64_t pageBytes = pageCount * b.pages.pageElements() * static_cast<int64_t>(bytesOf(dtype));
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

void Transformer::blockForward(const Batch& batch, int64_t l, const Workspace& w, const LayerBuffers& b) {
  checkCancelled();
  const Shape& s = spec_.shape;
  const kernels::QkvLayout qkv = s.qkv(l);
  const auto weight = [&](const char* name) { return parameters_.weight(named(l, name)); };
  const auto vector = [&](const char* name) { return parameters_.vector(named(l, name)); };
  const kernels::HeadNorm headNorm{vector("queryNorm"), vector("keyNorm"), s.normEps};
  const kernels::Rope rope{spec_.cosine.empty() ? nullptr : spec_.cosine.data(),
                           spec_.sine.empty() ? nullptr : spec_.sine.data()};

  norm(named(l, "norm1"), b.in, b.normed1, b.stat1);
  const View<float> wide = w.f32("wide", kAbsent, batch.rows(), qkv.columns());
  k_.linear(queue_, b.normed1, weight("qkv"), vector("qkvBias"), kernels::Output::store(wide));
  k_.qkvPrepare(queue_, qkv, wide, batch.sequences(), headNorm, rope, b.q, b.pages, b.savedQk);
  k_.attention(queue_, qkv.attention, b.q, b.pages, batch.sequences(), b.attended, b.logSumExp);
  zeroPaddingRows(batch, b.attended);
  k_.linear(queue_, b.attended, weight("attentionOut"), vector("attentionOutBias"),
            kernels::Output::add(b.in, b.middle));

  norm(named(l, "norm2"), b.middle, b.normed2, b.stat2);
  k_.activatedLinear(queue_, b.normed2, weight("up"), vector("upBias"), s.activation, b.activated, b.up);
  if (b.out.empty()) return;  // recomputation for backward needs what the block saves, not what it returns
  k_.linear(queue_, b.activated, weight("down"), vector("downBias"), kernels::Output::add(b.middle, b.out));
}

Operand Transformer::forward(const Workspace& w, const Batch& batch, Keep what, int64_t pageCount) {
  const Shape& s = spec_.shape;
  const View<float> x = w.f32("x", 0, batch.rows(), s.width);
  k_.embed(queue_, batch.tokens.data(), batch.positions.data(), parameters_.weight("embed"),
           parameters_.vector("positions"), x);
  for (int64_t l = 0; l < s.layers; ++l) blockForward(batch, l, w, layer(w, l, batch.rows(), pageCount, what));
  const Operand hidden = w.operand("hidden", kAbsent, spec_.dtype, batch.rows(), s.width);
  float* stat = what == Keep::kActivations
                    ? w.f32("hiddenStat", kAbsent, batch.rows(), s.norm == Norm::kLayer ? 2 : 1).data
                    : nullptr;
  norm("finalNorm", w.f32("x", s.layers, batch.rows(), s.width), hidden, stat);
  return hidden;
}

void Transformer::logprobs(const Workspace& w, const Batch& batch, Operand hidden, float inverseTemperature,
                           kernels::LogSoftmax out) {
  const kernels::Staging staging{w.take("staging", w.bytes("staging")), w.bytes("staging")};
  k_.logprobs(queue_, hidden, parameters_.weight(vocabularyName()), batch.targets.data(), inverseTemperature, out,
              staging);
}

void Transformer::values(Operand hidden, View<float> values) {
  k_.linear(queue_, hidden, parameters_.weight("scalarHead"), parameters_.vector("scalarHeadBias"),
            kernels::Output::store(values));
}

void Transformer::logits(Operand hidden, View<float> logits) {
  k_.linear(queue_, hidden, parameters_.weight(vocabularyName()), nullptr, kernels::Output::store(logits));
}

Operand Transformer::asOperand(const Workspace& w, View<float> dx) {
  if (spec_.dtype == DType::kFloat32) return denseOperand(dx.data, DType::kFloat32, dx.rows, dx.cols);
  const Operand rounded = w.operand("dxOperand", kAbsent, spec_.dtype, dx.rows, dx.cols);
  k_.round(queue_, dx, rounded);
  return rounded;
}

void Transformer::headBackward(const Workspace& w, const Batch& batch, Operand hidden, float inverseTemperature,
                               kernels::LogSoftmax forward, const OutputGradients& d, View<float> dHidden) {
  if (spec_.shape.head == Head::kLanguage) {
    const std::string name = vocabularyName();
    const kernels::Staging staging{w.take("staging", w.bytes("staging")), w.bytes("staging")};
    k_.logprobsBackward(queue_, hidden, parameters_.weight(name), batch.targets.data(), inverseTemperature, forward,
                        d.logprobs, d.entropies, dHidden, parameters_.gradient(name), staging);
    return;
  }
  const Operand dValues = w.operand("operand", kAbsent, spec_.dtype, batch.rows(), 1);
  k_.round(queue_, {d.values, batch.rows(), 1, 1}, dValues);
  k_.linearBackwardWeight(queue_, dValues, hidden, parameters_.gradient("scalarHead"),
                          parameters_.vectorGradient("scalarHeadBias"));
  k_.linearBackwardInput(queue_, dValues, parameters_.weight("scalarHead"), kernels::Output::store(dHidden));
}

void Transformer::backward(const Workspace& w, const Batch& batch, Operand hidden, float inverseTemperature,
                           kernels::LogSoftmax forward, const OutputGradients& d) {
  const Shape& s = spec_.shape;
  const int64_t rows = batch.rows();
  const View<float> dHidden = w.f32("wide", kAbsent, rows, s.width), dx = w.f32("dx", kAbsent, rows, s.width);
  headBackward(w, batch, hidden, inverseTemperature, forward, d, dHidden);
  std::fill_n(dx.data, rows * s.width, 0.0f);
  normBackward("finalNorm", w.f32("x", s.layers, rows, s.width),
               w.f32("hiddenStat", kAbsent, rows, s.norm == Norm::kLayer ? 2 : 1).data, dHidden, dx);
  for (int64_t l = s.layers - 1; l >= 0; --l) {
    LayerBuffers b = layer(w, l, rows, batch.pageCount, Keep::kActivations);
    if (spec_.recompute) {
      b.out = {};
      blockForward(batch, l, w, b);
    }
    blockBackward(batch, l, w, b, dx);
  }
  const int copy = s.tied && s.head == Head::kLanguage ? 1 : 0;
  k_.embedBackward(queue_, batch.tokens.data(), batch.positions.data(), dx, parameters_.gradient("embed", copy),
                   parameters_.vectorGradient("positions"));
}

void Transformer::blockBackward(const Batch& batch, int64_t l, const Workspace& w, const LayerBuffers& b,
                                View<float> dx) {
  checkCancelled();
  const Shape& s = spec_.shape;
  const kernels::QkvLayout qkv = s.qkv(l);
  const int64_t rows = batch.rows();
  const auto weight = [&](const char* name) { return parameters_.weight(named(l, name)); };
  const auto gradient = [&](const char* name) { return parameters_.gradient(named(l, name)); };
  const auto vector = [&](const char* name) { return parameters_.vector(named(l, name)); };
  const auto vectorGradient = [&](const char* name) { return parameters_.vectorGradient(named(l, name)); };
  const kernels::HeadNorm headNorm{vector("queryNorm"), vector("keyNorm"), s.normEps};
  const kernels::Rope rope{spec_.cosine.empty() ? nullptr : spec_.cosine.data(),
                           spec_.sine.empty() ? nullptr : spec_.sine.data()};
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
  normBackward(named(l, "norm2"), b.middle, b.stat2, wide(s.width), dx);

  dy = asOperand(w, dx);
  k_.linearBackwardWeight(queue_, dy, b.attended, gradient("attentionOut"), vectorGradient("attentionOutBias"));
  const Operand dAttended = operand(s.heads * s.headWidth);
  k_.linearBackwardInput(queue_, dy, weight("attentionOut"), kernels::Output::round(dAttended));
  k_.attentionBackward(queue_, qkv, b.q, b.pages, batch.sequences(), b.attended, b.logSumExp, dAttended,
                       wide(qkv.columns()));
  const Operand dqkv = operand(qkv.columns());
  k_.qkvPrepareBackward(queue_, qkv, wide(qkv.columns()), batch.positions.data(), headNorm, rope, b.savedQk, dqkv,
                        vectorGradient("queryNorm"), vectorGradient("keyNorm"));
  k_.linearBackwardWeight(queue_, dqkv, b.normed1, gradient("qkv"), vectorGradient("qkvBias"));
  k_.linearBackwardInput(queue_, dqkv, weight("qkv"), store(wide(s.width)));
  normBackward(named(l, "norm1"), b.in, b.stat1, wide(s.width), dx);
}

}  // namespace lockstep::model
