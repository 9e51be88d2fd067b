// One rank's model, or its part of a model: what the binding calls, on the rank's thread.
#pragma once

#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "core/arena.h"
#include "core/error.h"
#include "core/queue.h"
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

// A forward pass whose activations stay for backward. Several micro-batches may be under way at the same time, each in
// a slot of its own of the workspace.
struct KeptPass {
  int64_t slot;
  bool first;              // of those under way together: what was kept before is gone
  bool more;               // this stage has another operation of them to do, with which its message can go out
  int64_t workspaceBytes;  // of all slots
};

class Model {
 public:
  // `parallel` unjoined: join() comes before any other call. `weights` as of Parameters.
  Model(Spec spec, Device device, Parallel parallel = {}, std::shared_ptr<Arena> weights = nullptr);

  // Forms the groups of ranks; all of the world at the same time.
  void join(const Degrees& degrees) { parallel_.join(degrees); }
  // Runs `work`; if it fails, the other ranks are told, so that their calls fail as well and none waits for this one.
  template <class Work>
  void together(const Work& work) {
    try {
      if (!parallel_.joined()) throw Error("RANKS_NOT_JOINED", "the ranks of this model have not joined");
      work();
    } catch (const std::exception& error) {
      if (parallel_.world != nullptr) parallel_.world->abort(error.what());
      throw;
    }
  }

  // Whole sequences, packed without padding. With `keep` the activations stay for backward. All ranks make the call
  // together; those of the last stage have the outputs.
  void forward(const std::vector<BufferSpec>& plan, const int32_t* tokens, const int32_t* lengths, int64_t count,
               float inverseTemperature, const std::optional<KeptPass>& keep, const ForwardOutputs&);
  // Per-token gradients of the outputs of the forward kept in `slot`, packed without padding; null is zero. All ranks
  // of a stage give the same; before the last stage they are not read. `more` as of a KeptPass.
  // Throws Error("NO_FORWARD") when there is none.
  void backward(int64_t slot, bool more, const float* dLogprobs, const float* dEntropies, const float* dValues);
  // All ranks make the call together. Throws Error("GRADIENT_NOT_FINITE"), on all of them.
  double step(const StepOptions&);
  // Drops what was accumulated and kept.
  void clearGradients();
  // All ranks make the call together; the leader's control and progress count, and its results are whole.
  std::vector<Generated> generate(const std::vector<BufferSpec>& plan, const GenerateSettings&,
                                  const std::vector<GenerateRequest>&, GenerateControl&, const Generator::Progress&,
                                  GenerateStatistics& statistics);
  void publish() {
    together([&] { parameters_.publish(device_.queue); });
  }

  Parameters& parameters() { return parameters_; }
  const Spec& spec() const { return spec_; }

 private:
  Workspace enter(const std::vector<BufferSpec>& plan, const std::optional<KeptPass>& keep = {});
  void runForward(const std::vector<BufferSpec>& plan, const int32_t* tokens, const int32_t* lengths, int64_t count,
                  float inverseTemperature, const std::optional<KeptPass>& keep, const ForwardOutputs&);
  void runBackward(int64_t slot, const float* dLogprobs, const float* dEntropies, const float* dValues);
  std::vector<Generated> runGenerate(const std::vector<BufferSpec>& plan, const GenerateSettings&,
                                     const std::vector<GenerateRequest>&, GenerateControl&, const Generator::Progress&,
                                     GenerateStatistics& statistics);
  void requireTokens(const int32_t* tokens, int64_t count) const;
  void copyOut(const Batch&, View<const float> rows, float* out) const;

  Spec spec_;
  Device device_;
  Parallel parallel_;
  Parameters parameters_;
  Transformer transformer_;

  // A forward pass that a backward belongs to, and its per-row outputs.
  struct Kept {
    Workspace workspace;
    Batch batch;
    Operand hidden;
    float inverseTemperature;
    std::vector<float> logprobs, entropies, logZ;
  };
  std::unordered_map<int64_t, Kept> kept_;  // by slot
  int64_t keptUse_ = 0;                     // Device::workspaceUse of those
};

}  // namespace lockstep::model
