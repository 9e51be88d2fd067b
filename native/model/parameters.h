// The parameters of one model, or of a rank's part of it, and their copies: compute weights, master weights, gradients,
// Adam moments. With ZeRO (Rajbhandari et al. 2020 [1910.02054]) a rank keeps its piece of every tensor only: of
// masters and moments from stage 1 on, of gradients from 2 on, of compute weights in 3. It updates that piece; the
// whole of a gradient or of compute weights is then wherever GradientBuckets or GatheredWeights put it last.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/arena.h"
#include "core/queue.h"
#include "kernels/kernels.h"
#include "model/parallel.h"
#include "model/spec.h"

namespace lockstep::model {

enum class Space : uint8_t { kWeights, kMoment1, kMoment2, kGradients };

// A tensor as it lies in memory, in the element order of its dtype, or the elements begin .. end - 1 of it: with ZeRO
// the others are other ranks'.
struct Stored {
  void* data;  // of element `begin`
  DType dtype;
  int64_t begin, end;
  Memory* memory = &hostMemory();

  size_t bytes() const { return static_cast<size_t>(end - begin) * bytesOf(dtype); }
};

// Rows row .. row + rows - 1 of a tensor, columns column .. column + columns - 1.
struct Block {
  int64_t row, rows, column, columns;
};

struct StepOptions {
  double learningRate, beta1, beta2, epsilon, weightDecay, clipNorm;
  int64_t step;  // 1 for the first update
};

class Parameters {
 public:
  // Keeps references; the arenas lie in `memory` and count in `space`. `weights`: the arena in which the compute
  // weights lie, shared with whoever else uses it; null: one of its own. Throws Error("MEMORY_PLAN") when a tensor does
  // not fit where the plan puts it.
  Parameters(const Spec& spec, const Parallel& parallel, const kernels::Kernels& kernels, Queue& queue, Memory& memory,
             MemorySpace& space, std::shared_ptr<Arena> weights = nullptr);

  bool has(const std::string& name) const { return index_.count(name) != 0; }
  kernels::Weight weight(const std::string& name) const;
  // Null when the model has no such vector.
  const float* vector(const std::string& name) const;

  // The accumulator of a matrix; `copy` 1 is the second accumulator of a tied embedding, for its use as projection.
  kernels::WeightGradient gradient(const std::string& name, int copy = 0) const;
  float* vectorGradient(const std::string& name) const;
  // Adds the second accumulator, where there is one, to the first and clears it.
  void joinAccumulators(Queue&, int64_t tensor);

  // Bytes begin .. begin + count - 1 of a tensor's compute weights: those that the rank renews, and keeps.
  struct HeldWeights {
    char* data;
    int64_t begin, count;
    int64_t whole;  // bytes of the tensor
  };
  HeldWeights heldWeights(int64_t tensor) const;
  // The rank's piece of a gradient, from stage 2 on.
  float* heldGradient(int64_t tensor) const { return static_cast<float*>(stored(tensor, Space::kGradients).data); }
  // Where the whole of a tensor is for now: of its compute weights in stage 3, of a gradient accumulator from 2 on.
  void putWeights(int64_t tensor, void* whole) { wholeWeights_[static_cast<size_t>(tensor)] = whole; }
  void putGradient(int64_t tensor, int copy, float* whole) {
    wholeGradients_[static_cast<size_t>(tensor)][static_cast<size_t>(copy)] = whole;
  }

  // Where a tensor lies: its masters where there are any, else its compute weights; a moment; its first gradient
  // accumulator. Throws Error("MODEL_NOT_TRAINED").
  Stored stored(int64_t tensor, Space) const;
  // Whether this rank writes it into a checkpoint: of what all replicas hold whole only the first does.
  bool saves(int64_t tensor, Space) const;

  // Rows row .. row + count - 1 of a tensor as plain float32 [count, in]; bfloat16 weights are rounded when written. Of
  // what other ranks keep the rank reads zeros, and writes nothing.
  void writeRows(int64_t tensor, Space, int64_t row, int64_t count, const float* data);
  void readRows(int64_t tensor, Space, int64_t row, int64_t count, float* data) const;
  const TensorSpec& spec(int64_t tensor) const { return spec_.tensors[static_cast<size_t>(tensor)]; }
  int64_t find(const std::string& name) const;

  // Rows of a tensor that lies elsewhere in the same order, as plain float32 [count, in]; of one that operations use
  // settle() first.
  static void unpack(const TensorSpec&, const Stored&, int64_t row, int64_t count, float* data);
  // Which of these rows' elements are stored.
  static std::vector<Block> blocks(const TensorSpec&, const Stored&, int64_t row, int64_t count);

  // Renews the compute weights from the masters; all ranks together.
  void publish(Queue&);

  // Sums the gradients, reduced over the replicas, over the other ranks that have parts of them and returns their
  // global norm: the same bits on all ranks. Without data parallelism they do not depend on the number of ranks either,
  // but for the gains of head norms.
  double finishGradients(Queue&);
  // Clips by that norm, updates, publishes, clears the gradients; all ranks together.
  void step(Queue&, const StepOptions&, double norm);
  void clearGradients();
  // The gradients may be other than zero: something is added to them, and no step has used it.
  void touchGradients() { gradientsLive_ = true; }
  const std::atomic<bool>& gradientsLive() const { return gradientsLive_; }

  // What operations still do with the tensors is done.
  void settle() const { queue_.synchronize(); }

  Arena& weights() { return weights_; }
  Arena& gradients() { return gradients_; }
  Arena& optimizer() { return optimizer_; }

 private:
  const TensorSpec& tensor(const std::string& name) const;
  // What the rank keeps of a tensor where it keeps a piece only.
  struct Held {
    int64_t begin, end;            // elements
    kernels::WeightLayout layout;  // of a matrix: where these lie, from `begin` on
  };
  Held held(const TensorSpec&) const;
  float* floats(Arena&, const TensorSpec&, int64_t offset, int64_t count) const;
  void* compute(const TensorSpec&) const;
  void gatherWeights();
  void sumShared(const TensorSpec&);
  double globalNorm(std::vector<double> sums);
  struct GradientRuns {
    std::vector<kernels::Run> runs;
    std::vector<std::unique_ptr<Arena>> copies;  // in which some of them lie
  };
  void addRuns(Queue&, const TensorSpec&, GradientRuns&) const;

  const Spec& spec_;
  const Parallel& parallel_;
  const kernels::Kernels& kernels_;
  Queue& queue_;
  std::shared_ptr<Arena> shared_;
  Arena& weights_;
  mutable Arena gradients_, optimizer_;
  std::atomic<bool> gradientsLive_{false};
  std::unordered_map<std::string, size_t> index_;
  // By tensor.
  std::vector<Held> held_;
  std::vector<void*> wholeWeights_;
  std::vector<std::array<float*, 2>> wholeGradients_;
};

}  // namespace lockstep::model
