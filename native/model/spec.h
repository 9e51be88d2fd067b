// What a model is: its shape, its tensors and where they lie. Made in TypeScript's layout/, validated here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "kernels/kernels.h"
#include "kernels/weight.h"

namespace lockstep::model {

enum class Norm : uint8_t { kRms, kLayer };
enum class Head : uint8_t { kLanguage, kScalar };

// What a rank has of it: with several ranks, its layers, heads, feed-forward columns and parts only.
struct Shape {
  int64_t vocabulary;  // of the whole model, whatever part of it the rank has
  int64_t width, layers, heads, keyValueHeads, headWidth, feedForward;
  Norm norm;
  float normEps;
  kernels::Activation activation;
  bool headNorm, learnedPositions, tied;
  int64_t maxPositions;
  std::vector<int64_t> windows;  // per layer of the rank, 0: none
  Head head;
  int64_t parts;

  kernels::QkvLayout qkv(int64_t layer) const;
  // Columns of the pre-activation: 2 F for SwiGLU, F for GELU.
  int64_t upColumns() const { return activation == kernels::Activation::kSwiGlu ? 2 * feedForward : feedForward; }
};

constexpr int64_t kAbsent = -1;

// A vector's, plain row-major: elements() and panels of its parts mean nothing, `out` and `offset` do.
kernels::WeightLayout vectorLayout(int64_t out, int64_t in, const std::vector<int64_t>& sizes);

// Ranks over which a tensor's gradient, or that of some of its rows, must be summed: they hold the same parameters, and
// the backward pass of each gives a part of the gradient.
enum class Summed : uint8_t { kNever, kTensor, kKeyValue, kEnds };

// A matrix lies packed (weight.h), a vector as plain row-major float32. Offsets are bytes in the arenas; kAbsent where
// the model has no such copy (inference has weights only; float32 training has no separate master).
struct TensorSpec {
  std::string name;
  bool matrix;
  bool decay;
  kernels::WeightLayout layout;
  int64_t weights, master, gradient, gradient2, moment1, moment2;
  bool cut;       // its parts go on on the other ranks of the tensor group
  Summed summed;  // rows summedBegin .. summedEnd - 1
  int64_t summedBegin, summedEnd;
  bool owner;                   // of those rows the first holder, whose copy counts
  std::vector<int64_t> pieces;  // of the data-parallel ranks: rank i has elements pieces[i] .. pieces[i + 1] - 1
};

// Parameters that a pass uses together (layout/units.ts): those before the layers, of each layer, behind the layers.
struct Unit {
  std::vector<int64_t> tensors;  // its own: their gradients are complete when backward has left it
  std::vector<int64_t> weights;  // those that it reads: its own, and behind the layers a tied embedding
  int bucket;                    // neighbours of the same bucket are reduced together; 0 is the first
};

struct Spec {
  Shape shape;
  DType dtype;
  bool train;
  bool recompute;
  int dataRank, dataRanks;
  // ZeRO stage: masters and moments are those of the rank's pieces only from 1 on, gradients from 2 on, compute weights
  // in 3. 0 where there is one data-parallel rank.
  int zero;
  bool overlap;  // communication over the data-parallel ranks goes on behind the computation
  std::vector<TensorSpec> tensors;
  std::vector<Unit> units;
  int64_t firstLayer = 0;                // of the rank, in the whole model: tensors carry the model's names
  int64_t vocabularyBegin = 0;           // first row of the embedding and the vocabulary that the rank has
  std::vector<int64_t> vocabularyParts;  // rows of each part of the whole vocabulary
  int64_t weightsBytes, gradientBytes, optimizerBytes;
  std::vector<float> cosine, sine;  // rope tables [maxPositions, K / 2], empty without rotation
};

// One named buffer of a workspace plan.
struct BufferSpec {
  std::string name;
  int64_t offset, bytes;
};

}  // namespace lockstep::model
