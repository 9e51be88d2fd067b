// The transformer: forward and backward as mirror images, one implementation for training, scoring, prefill and decode.
// What differs between them is the plan of buffers: in training every layer has its own, in inference all layers share
// one set and the residual stream is updated in place; with recomputation a layer keeps only its input.
//
// With several ranks (Shoeybi et al. 2019, Megatron-LM [1909.08053]) a rank computes its columns of qkv, up and the
// vocabulary, and partial sums of attentionOut and down, which the tensor group adds up: the ranks continue the tree
// over parts. Stages of the pipeline hand the residual stream on.
//
// A call takes several micro-batches through a unit (the embedding, a layer, the head) before it goes on to the next;
// weights come and gradients go unit by unit (gathered_weights.h, gradient_buckets.h).
#pragma once

#include <atomic>
#include <span>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/queue.h"
#include "kernels/kernels.h"
#include "model/batch.h"
#include "model/gathered_weights.h"
#include "model/gradient_buckets.h"
#include "model/parallel.h"
#include "model/parameters.h"
#include "model/spec.h"
#include "model/stage_link.h"
#include "model/workspace.h"

namespace lockstep::model {

// Named buffers of one layer and the layer's tensors. Empty views are buffers that this call does not keep.
struct LayerBuffers {
  View<float> in, middle, out;               // residual stream before attention, before the MLP, after
  Operand normed1, normed2;                  // norm outputs
  float *stat1 = nullptr, *stat2 = nullptr;  // inverse RMS [T], or mean [T] then inverse deviation [T]
  Operand q, savedQk, attended;
  kernels::KvPages pages;
  View<float> logSumExp;
  Operand up, activated;
};

// What a forward pass leaves behind: activations of every layer for backward; nothing (one set of buffers, keys and
// values of one layer at a time); or keys and values of every layer, [layer][page], for later calls.
enum class Keep : uint8_t { kActivations, kNothing, kCache };

// A micro-batch on its way through the model.
struct Pass {
  Workspace workspace;
  Batch batch;
  int64_t pageCount;  // pages of keys and values in a layer
  float inverseTemperature = 1;
  Operand hidden = {};                                          // of the last stage: the final norm's output [T, D]
  std::vector<float> logprobs = {}, entropies = {}, logZ = {};  // [T] of a language head

  int64_t rows() const { return batch.rows(); }
  kernels::LogSoftmax softmax() { return {logprobs.data(), entropies.data(), logZ.data()}; }
};

class Transformer {
 public:
  Transformer(const Spec&, const Parallel&, const Parameters&, GatheredWeights&, GradientBuckets&,
              const kernels::Kernels&, Queue&, Memory&, const std::atomic<bool>& cancelled);

  // Runs the rank's layers; with several passes there is one stage, and activations are kept. What a stage hands on
  // goes with its next operation or flush() when activations are kept.
  void forward(std::span<Pass>, Keep);

  // Sends what still waits for the next operation of this stage.
  void flush() { link_.flush("flush"); }

  // Per-row log-softmax of the language head at the batch's targets, into the pass.
  void logprobs(Pass&);
  // values [T] of the scalar head.
  void values(Operand hidden, View<float> values);
  // logits [rows, V] of given rows of hidden, on every rank of the last stage.
  void logits(Operand hidden, View<float> logits);

  // Of the whole model's vocabulary.
  kernels::WeightLayout vocabularyLayout() const;

  // Gradients of each pass's per-row outputs [T] (null: zero; on the last stage, else they come from the stage after)
  // through the heads, into the plan's "wide" buffer; then through the trunk. Those of rows without a target are zero.
  struct OutputGradients {
    const float *logprobs = nullptr, *entropies = nullptr, *values = nullptr;
  };
  void backward(std::span<Pass>, std::span<const OutputGradients>);

 private:
  kernels::Rope rope();
  LayerBuffers layer(const Pass&, int64_t l, Keep) const;
  void receive(const Pass&);
  void finish(Pass&, Keep);
  void blockForward(const Pass&, int64_t l, const LayerBuffers&);
  // Sums over the tensor group what its ranks have of y.
  void sumOverTensor(View<float> y, const std::string& site);
  // The ranks that share a key/value head sum its gradients; they stay with the first, the others get zeros.
  void shareKeyValueGradients(const Workspace&, const kernels::QkvLayout&, View<float> dqkv);
  void receiveGradients(const Pass&);
  void beginBackward(Pass&, const OutputGradients&);
  void finishBackward(const Pass&);
  void blockBackward(const Pass&, int64_t l, const LayerBuffers&);
  View<float> dx(const Pass& pass) const { return pass.workspace.f32("dx", kAbsent, pass.rows(), spec_.shape.width); }
  void embed(const Batch&, View<float> x);
  // y = residual + x W^T + bias, of a weight that is cut along its columns.
  void rowProduct(const Workspace&, Operand x, const std::string& name, View<const float> residual, View<float> y);
  std::vector<int32_t> localTokens(const std::vector<int32_t>& tokens, int64_t rows) const;
  // The tensor's name in the model, of a layer of the rank.
  std::string named(int64_t layer, const char* tensor) const;
  void norm(const std::string& name, View<const float> x, Operand y, float* stat);
  void normBackward(const std::string& name, View<const float> x, const float* stat, View<const float> dy,
                    View<float> dx);
  void headBackward(Pass&, const OutputGradients&, View<float> dHidden);
  Operand asOperand(const Workspace&, View<float> dx);
  void checkCancelled() const;
  std::string vocabularyName() const { return spec_.shape.tied ? "embed" : "vocabulary"; }
  // With both ends of a tied embedding on this stage each has an accumulator.
  int vocabularyCopy() const { return spec_.shape.tied && parallel_.firstStage() ? 1 : 0; }
  size_t headUnit() const { return static_cast<size_t>(spec_.shape.layers) + 1; }

  const Spec& spec_;
  const Parallel& parallel_;
  const Parameters& parameters_;
  GatheredWeights& weights_;
  GradientBuckets& gradients_;
  const kernels::Kernels& k_;
  Queue& queue_;
  const std::atomic<bool>& cancelled_;
  StageLink link_;
  Arena tables_;
};

}  // namespace lockstep::model
