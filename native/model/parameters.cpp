#include "model/parameters.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/error.h"

namespace lockstep::model {

using kernels::kPanel;
using kernels::Part;
using kernels::Split;

namespace {

size_t bytes(int64_t elements, DType dtype) {
  return static_cast<size_t>(elements) * bytesOf(dtype);
}

// Calls visit(index, column) for every element of row `row` of a packed matrix: where it lies in the given element
// order.
template <class Visit>
void eachElement(const kernels::WeightLayout& layout, int64_t row, DType order, const Visit& visit) {
  for (const Part& part : layout.parts) {
    if (row < part.outBegin || row >= part.outBegin + part.out) continue;
    const int64_t n = (row - part.outBegin) % kPanel, panel = (row - part.outBegin) / kPanel;
    const int64_t width = part.panelWidth(panel), base = part.panelOffset(panel);
    for (int64_t k = 0; k < part.in; ++k) {
      visit(order == DType::kFloat32 ? base + k * width + n : base + k / 2 * 2 * width + 2 * n + k % 2,
            part.inBegin + k);
    }
  }
}

}  // namespace

kernels::QkvLayout Shape::qkv(int64_t layer) const {
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(headWidth)));
  return {{heads, keyValueHeads, headWidth, windows[static_cast<size_t>(layer)], parts, scale}};
}

Parameters::Parameters(const Spec& spec, const kernels::Kernels& kernels, std::shared_ptr<Arena> weights)
    : spec_(spec),
      kernels_(kernels),
      shared_(weights != nullptr ? std::move(weights)
                                 : std::make_shared<Arena>("weights", static_cast<size_t>(spec.weightsBytes))),
      weights_(*shared_),
      gradients_("gradients", static_cast<size_t>(spec.gradientBytes)),
      optimizer_("optimizer", static_cast<size_t>(spec.optimizerBytes)) {
  for (size_t i = 0; i < spec.tensors.size(); ++i) {
    const TensorSpec& t = spec.tensors[i];
    index_[t.name] = i;
    const auto need = [&](Arena& arena, int64_t offset, DType dtype) {
      if (offset != kAbsent) arena.at(static_cast<size_t>(offset), bytes(t.layout.elements, dtype), t.name.c_str());
    };
    need(weights_, t.weights, t.matrix ? spec.dtype : DType::kFloat32);
    need(optimizer_, t.master, DType::kFloat32);
    need(optimizer_, t.moment1, DType::kFloat32);
    need(optimizer_, t.moment2, DType::kFloat32);
    need(gradients_, t.gradient, DType::kFloat32);
    need(gradients_, t.gradient2, DType::kFloat32);
  }
}

int64_t Parameters::find(const std::string& name) const {
  const auto found = index_.find(name);
  if (found == index_.end()) throw Error("MODEL_TENSOR_UNKNOWN", "the model has no tensor '" + name + "'");
  return static_cast<int64_t>(found->second);
}

const TensorSpec& Parameters::tensor(const std::string& name) const {
  return spec_.tensors[static_cast<size_t>(find(name))];
}

kernels::Weight Parameters::weight(const std::string& name) const {
  const TensorSpec& t = tensor(name);
  return {&t.layout, weights_.at(static_cast<size_t>(t.weights), bytes(t.layout.elements, spec_.dtype), t.name.c_str()),
          spec_.dtype};
}

const float* Parameters::vector(const std::string& name) const {
  return has(name) ? master(tensor(name)) : nullptr;
}

float* Parameters::master(const TensorSpec& t) const {
  const bool separate = t.master != kAbsent;
  Arena& arena = separate ? optimizer_ : weights_;
  return static_cast<float*>(arena.at(static_cast<size_t>(separate ? t.master : t.weights),
                                      bytes(t.layout.elements, DType::kFloat32), t.name.c_str()));
}

kernels::WeightGradient Parameters::gradient(const std::string& name, int copy) const {
  const TensorSpec& t = tensor(name);
  const int64_t offset = copy == 0 ? t.gradient : t.gradient2;
  return {&t.layout, static_cast<float*>(gradients_.at(static_cast<size_t>(offset),
                                                       bytes(t.layout.elements, DType::kFloat32), t.name.c_str()))};
}

float* Parameters::vectorGradient(const std::string& name) const {
  return has(name) ? gradient(name).data : nullptr;
}

void Parameters::writeRows(int64_t index, Space space, int64_t row, int64_t count, const float* data) {
  const TensorSpec& t = spec(index);
  const int64_t in = t.layout.in;
  const bool rounded = space == Space::kWeights && t.matrix && t.master == kAbsent && spec_.dtype == DType::kBFloat16;
  if (rounded) {
    auto* to = static_cast<BFloat16*>(
        weights_.at(static_cast<size_t>(t.weights), bytes(t.layout.elements, spec_.dtype), t.name.c_str()));
    for (int64_t r = 0; r < count; ++r) {
      eachElement(t.layout, row + r, DType::kBFloat16,
                  [&](int64_t i, int64_t k) { to[i] = toBFloat16(data[r * in + k]); });
    }
    return;
  }
  const int64_t offset = space == Space::kMoment1 ? t.moment1 : space == Space::kMoment2 ? t.moment2 : t.gradient;
  if (space != Space::kWeights && offset == kAbsent)
    throw Error("MODEL_NOT_TRAINED", "tensor '" + t.name + "' has no such state: the model was loaded for inference");
  Arena& arena = space == Space::kGradients ? gradients_ : optimizer_;
  float* to = space == Space::kWeights
                  ? master(t)
                  : static_cast<float*>(arena.at(static_cast<size_t>(offset), bytes(t.layout.elements, DType::kFloat32),
                                                 t.name.c_str()));
  for (int64_t r = 0; r < count; ++r) {
    if (t.matrix) {
      eachElement(t.layout, row + r, DType::kFloat32, [&](int64_t i, int64_t k) { to[i] = data[r * in + k]; });
    } else {
      std::copy_n(data + r * in, in, to + (row + r) * in);
    }
  }
}

void Parameters::readRows(int64_t index, Space space, int64_t row, int64_t count, float* data) const {
  const TensorSpec& t = spec(index);
  const int64_t in = t.layout.in;
  const bool rounded = space == Space::kWeights && t.matrix && t.master == kAbsent && spec_.dtype == DType::kBFloat16;
  if (rounded) {
    const auto* from = static_cast<const BFloat16*>(
        weights_.at(static_cast<size_t>(t.weights), bytes(t.layout.elements, spec_.dtype), t.name.c_str()));
    for (int64_t r = 0; r < count; ++r) {
      eachElement(t.layout, row + r, DType::kBFloat16,
                  [&](int64_t i, int64_t k) { data[r * in + k] = toFloat(from[i]); });
    }
    return;
  }
  const int64_t offset = space == Space::kMoment1 ? t.moment1 : space == Space::kMoment2 ? t.moment2 : t.gradient;
  if (space != Space::kWeights && offset == kAbsent)
    throw Error("MODEL_NOT_TRAINED", "tensor '" + t.name + "' has no such state: the model was loaded for inference");
  Arena& arena = space == Space::kGradients ? gradients_ : optimizer_;
  const auto read = [&](int64_t at) {
    return static_cast<const float*>(
        arena.at(static_cast<size_t>(at), bytes(t.layout.elements, DType::kFloat32), t.name.c_str()));
  };
  const float* from = space == Space::kWeights ? master(t) : read(offset);
  const float* second = space == Space::kGradients && t.gradient2 != kAbsent ? read(t.gradient2) : nullptr;
  for (int64_t r = 0; r < count; ++r) {
    if (t.matrix) {
      eachElement(t.layout, row + r, DType::kFloat32,
                  [&](int64_t i, int64_t k) { data[r * in + k] = second == nullptr ? from[i] : from[i] + second[i]; });
    } else {
      std::copy_n(from + (row + r) * in, in, data + r * in);
    }
  }
}

void Parameters::publish(Queue& queue) {
  for (const TensorSpec& t : spec_.tensors) {
    if (!t.matrix || t.master == kAbsent) continue;
    kernels_.publish(
        queue, t.layout, master(t),
        weights_.at(static_cast<size_t>(t.weights), bytes(t.layout.elements, spec_.dtype), t.name.c_str()));
  }
}

// Canonical whatever the number of tensor-parallel ranks: leaves within a part, a tree over parts, tensors in table
// order.
double Parameters::gradientNorm(Queue& queue) {
  double total = 0;
  std::vector<double> sums;
  for (const TensorSpec& t : spec_.tensors) {
    float* first = gradient(t.name).data;
    if (t.gradient2 != kAbsent) kernels_.accumulate(queue, t.layout.elements, gradient(t.name, 1).data, first);
    sums.clear();
    if (!t.matrix) {
      sums.push_back(kernels_.sumOfSquares(queue, first, t.layout.elements));
    } else {
      for (const Part& part : t.layout.parts)
        sums.push_back(part.out == 0 ? 0 : kernels_.sumOfSquares(queue, first + part.offset, part.elements()));
    }
    for (size_t width = 1; width < sums.size(); width *= 2) {
      for (size_t i = 0; i + width < sums.size(); i += 2 * width) sums[i] += sums[i + width];
    }
    total += sums[0];
  }
  return std::sqrt(total);
}

double Parameters::step(Queue& queue, const StepOptions& o) {
  const double norm = gradientNorm(queue);
  if (!std::isfinite(norm)) {
    throw Error(
        "GRADIENT_NOT_FINITE",
        "the gradient norm of step " + std::to_string(o.step) +
            " is not finite; nothing was updated. Lower optimizer.learningRate or look for bad rows in the data");
  }
  const double scale = o.clipNorm > 0 ? std::min(1.0, o.clipNorm / (norm + 1e-6)) : 1.0;
  const double n = static_cast<double>(o.step);
  for (const TensorSpec& t : spec_.tensors) {
    const kernels::AdamW settings{
        o.learningRate,           o.beta1, o.beta2, o.epsilon, t.decay ? o.weightDecay : 0.0, 1 - std::pow(o.beta1, n),
        1 - std::pow(o.beta2, n), scale};
    const size_t size = bytes(t.layout.elements, DType::kFloat32);
    const auto moment = [&](int64_t offset) {
      return static_cast<float*>(optimizer_.at(static_cast<size_t>(offset), size, t.name.c_str()));
    };
    const bool published = t.matrix && t.master != kAbsent;
    void* weights =
        published ? weights_.at(static_cast<size_t>(t.weights), bytes(t.layout.elements, spec_.dtype), t.name.c_str())
                  : nullptr;
    kernels_.adamw(queue, settings, t.layout.elements, master(t), moment(t.moment1), moment(t.moment2),
                   gradient(t.name).data, published ? &t.layout : nullptr, weights);
  }
  return norm;
}

}  // namespace lockstep::model
