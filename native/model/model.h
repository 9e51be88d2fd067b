// One rank's model, or its part of a model: what the binding calls, on the rank's thread.
#pragma once

#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "core/arena.h"
#include "core/error.h"
#include "core/queue.h"
#include "core/range.h"
#include "model/generator.h"
#include "model/parallel.h"
#include "model/parameters.h"
#include "model/spec.h"
#include "model/transformer.h"

namespace lockstep::model {

// What all models of a rank share: its kernels, threads and the workspace that they use in turn.
struct Device {
  const kernels::Kernels& kernels;
  Queue& queue;
  Arena& workspace;
  MemorySpace& memory;
  const std::atomic<bool>& cancelled;
  // Counts the calls that used the workspace: activations kept for backward are gone when another call came between.
  int64_t& workspaceUse;
};

// Which per-token outputs a forward pass computes; null pointers are not wanted. Packed without padding.
struct ForwardOutputs {
  float *logprobs = nullptr, *entropies = nullptr, *values = nullptr;  // [T]
  float* logits = nullptr;                                             // [T, V]
  float* hidden = nullptr;                                             // [T, D]
};

// One micro-batch of a forward call: whole sequences, packed without padding.
struct ForwardPass {
  std::vector<BufferSpec> plan;
  std::vector<int32_t> tokens, lengths;
  int64_t slot;  // of those under way together, where its activations stay
  ForwardOutputs outputs;
};

// Activations stay for backward. Several micro-batches may be under way at the same time, each in a slot of its own of
// the workspace.
struct Keeping {
  bool first;  // of those under way together: what was kept before is gone
  bool more;   // this stage has another operation of them to do, with which its message can go out
};

struct ForwardCall {
  std::vector<ForwardPass> passes;  // none: the rank takes part in what its replicas do together
  std::vector<BufferSpec> units;    // buffers of weights and gradients (layout/units.ts)
  int64_t workspaceBytes;           // of all micro-batches under way together
  float inverseTemperature;
  std::optional<Keeping> keep;
};

// Per-token gradients of the outputs of the forward kept in `slot`, packed without padding; empty is zero. All ranks of
// a stage give the same; before the last stage they are not read.
struct BackwardPass {
  int64_t slot;
  std::vector<float> logprobs, entropies, values;
};

struct GeneratePlans {
  std::vector<BufferSpec> call, units;
  int64_t workspaceBytes;
};

class Model {
 public:
  // `parallel` unjoined: join() comes before any other call. `weights` as of Parameters.
  Model(Spec spec, Device device, Parallel parallel = {}, std::shared_ptr<Arena> weights = nullptr);
  ~Model();

  // Forms the groups of ranks over connect(world), for what lies on the device; all of the world at the same time.
  template <class Connect>
  void join(const Degrees& degrees, const Connect& connect) {
    parallel_.world = connect(std::move(parallel_.world));
    parallel_.join(degrees);
  }
  // Runs `work` to its end on the device; if it fails, the other ranks are told, so that their calls fail as well and
  // none waits for this one.
  template <class Work>
  void together(const Work& work) {
    try {
      if (!parallel_.joined()) throw Error("RANKS_NOT_JOINED", "the ranks of this model have not joined");
      work();
      device_.queue.synchronize();
    } catch (const std::exception& error) {
      if (parallel_.world != nullptr) parallel_.world->abort(error.what());
      throw;
    }
  }

  // All ranks make the call together; those of the last stage have the outputs.
  void forward(const ForwardCall&);
  // `more` as of Keeping; `last`: of the step, so that gradients can be reduced over the replicas while it goes on.
  // Throws Error("NO_FORWARD") when there is no forward in a slot.
  void backward(const std::vector<BackwardPass>&, bool more, bool last);
  // Ends the reduction; the gradients are then those of all replicas, or the rank's pieces of them. All ranks together.
  void reduceGradients();
  // All ranks make the call together. Throws Error("GRADIENT_NOT_FINITE"), on all of them; the gradients are gone.
  double step(const StepOptions&);
  // Drops what was accumulated and kept. All replicas have made the same calls.
  void clearGradients();
  // All ranks make the call together; the leader's control and progress count, and its results are whole.
  std::vector<Generated> generate(const GeneratePlans&, const GenerateSettings&, const std::vector<GenerateRequest>&,
                                  GenerateControl&, const Generator::Progress&, GenerateStatistics& statistics);
  void publish() {
    const Range range("publish");
    together([&] { parameters_.publish(device_.queue); });
  }

  // Returns when what replicas still exchange behind the computation is done: until then it writes the gradients.
  void settleGradients() {
    if (parallel_.background != nullptr) parallel_.background->drain();
  }
  // Of what goes over the replicas behind the computation.
  comm::Traffic backgroundTraffic() const {
    return parallel_.background == nullptr ? comm::Traffic{} : parallel_.background->traffic();
  }
  Parameters& parameters() { return parameters_; }
  const Spec& spec() const { return spec_; }

 private:
  void enter(int64_t workspaceBytes, bool first);
  void runForward(const ForwardCall&);
  void runBackward(const std::vector<BackwardPass>&, bool last);
  std::vector<Generated> runGenerate(const GeneratePlans&, const GenerateSettings&, const std::vector<GenerateRequest>&,
                                     GenerateControl&, const Generator::Progress&, GenerateStatistics& statistics);
  void requireSequences(const ForwardPass&) const;
  void requireTokens(const std::vector<int32_t>& tokens) const;
  void giveOutputs(Pass&, const ForwardOutputs&, bool keep);
  void copyOut(const Batch&, View<const float> rows, float* out) const;

  Spec spec_;
  Device device_;
  Parallel parallel_;
  Parameters parameters_;
  GatheredWeights weights_;
  GradientBuckets gradients_;
  Transformer transformer_;

  std::unordered_map<int64_t, Pass> kept_;  // forward passes that a backward belongs to, by slot
  Workspace units_;                         // of those
  int64_t keptUse_ = 0;                     // Device::workspaceUse of those
};

}  // namespace lockstep::model
