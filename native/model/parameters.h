// The parameters of one model and their copies: compute weights, master weights, gradients, Adam moments.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/arena.h"
#include "core/queue.h"
#include "kernels/kernels.h"
#include "model/spec.h"

namespace lockstep::model {

enum class Space : uint8_t { kWeights, kMoment1, kMoment2, kGradients };

struct StepOptions {
  double learningRate, beta1, beta2, epsilon, weightDecay, clipNorm;
  int64_t step;  // 1 for the first update
};

class Parameters {
 public:
  // Keeps a reference to `spec`. `weights`: the arena in which the compute weights lie, shared with whoever else uses
  // it; null: one of its own. Throws Error("MEMORY_PLAN") when a tensor does not fit where the plan puts it.
  Parameters(const Spec& spec, const kernels::Kernels& kernels, std::shared_ptr<Arena> weights = nullptr);

  bool has(const std::string& name) const { return index_.count(name) != 0; }
  kernels::Weight weight(const std::string& name) const;
  // Null when the model has no such vector.
  const float* vector(const std::string& name) const;

  // The accumulator of a matrix; `copy` 1 is the second accumulator of a tied embedding.
  kernels::WeightGradient gradient(const std::string& name, int copy = 0) const;
  float* vectorGradient(const std::string& name) const;

  // Rows row .. row + count - 1 of a tensor as plain float32 [count, in]. Weights means the masters where there are
  // any, else the compute weights (rounded when written).
  void writeRows(int64_t tensor, Space, int64_t row, int64_t count, const float* data);
  void readRows(int64_t tensor, Space, int64_t row, int64_t count, float* data) const;
  const TensorSpec& spec(int64_t tensor) const { return spec_.tensors[static_cast<size_t>(tensor)]; }
  int64_t find(const std::string& name) const;

  // Renews the compute weights from the masters.
  void publish(Queue&);

  // Clips by the global norm, updates, publishes, clears the gradients; returns the norm before clipping.
  double step(Queue&, const StepOptions&);

  const Arena& weights() const { return weights_; }
  const Arena& gradients() const { return gradients_; }
  const Arena& optimizer() const { return optimizer_; }

 private:
  const TensorSpec& tensor(const std::string& name) const;
  float* master(const TensorSpec&) const;
  double gradientNorm(Queue&);

  const Spec& spec_;
  const kernels::Kernels& kernels_;
  std::shared_ptr<Arena> shared_;
  Arena& weights_;
  mutable Arena gradients_, optimizer_;
  std::unordered_map<std::string, size_t> index_;
};

}  // namespace lockstep::model
