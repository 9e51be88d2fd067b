// Log-probabilities and entropies of the next token, forward and backward, by blocks of rows: the matrix products run
// inside, then what follows of the rows of logits. Forward, a block of threads takes a row of a part (softmax.h), then
// a thread merges the parts of a row. Backward, every logit by itself becomes its gradient.
#include <algorithm>
#include <vector>

#include "kernels/cuda/softmax.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr int kThreads = 256, kMergeThreads = 64;
constexpr int kEach = 4;           // neighbouring logits of a thread of backward
constexpr int64_t kRowGrain = 16;  // rows of a step of a product over rows, which must not depend on how rows are cut
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

// Logits of a block of rows and their gradients as an operand, in the staging memory.
struct Blocks {
  void* data;
  int64_t vocabulary, stride, rows;  // stride of both matrices, in elements; rows of a full block
  DType dtype;

  Blocks(void* memory, int64_t bytes, int64_t vocabularySize, DType operand, bool backward)
      : data(memory), vocabulary(vocabularySize), stride(roundUp(vocabularySize, kPanelGrain)), dtype(operand) {
    rows = bytes / vocabularyStagingBytes(1, vocabularySize, operand, backward);
    rows = rows / (rows >= kRowGrain ? kRowGrain : 2) * (rows >= kRowGrain ? kRowGrain : 2);
  }
  View<float> logits(int64_t count) const { return {static_cast<float*>(data), count, vocabulary, stride}; }
  // float32 gradients take the place of the logits.
  Operand gradients(int64_t count) const {
    void* at = dtype == DType::kFloat32 ? data : static_cast<float*>(data) + rows * stride;
    return {at, dtype, count, vocabulary, stride};
  }
};

// --- forward ---------------------------------------------------------------------------------------------------------

// Block (t, p): part p of row t. Also brings the target's logit along, from the part that it is in.
__global__ void partStatisticsKernel(View<const float> logits, const Part* parts, const int32_t* targets,
                                     float inverseTemperature, SoftmaxPart* statistics, SoftmaxStatistics* out) {
  const int64_t t = blockIdx.x, p = blockIdx.y, target = targets[t];
  const Part part = parts[p];
  const float* row = logits.row(t);
  const SoftmaxPart all = softmaxPart(row + part.outBegin, inverseTemperature, part.out, [](int64_t, int, float*) {});
  if (threadIdx.x != 0) return;
  statistics[t * gridDim.y + p] = all;
  if (p == 0 && target < 0) out[t].target = -kInfinity;
  if (target >= part.outBegin && target < part.outBegin + part.out) out[t].target = row[target] * inverseTemperature;
}

__global__ void mergePartsKernel(SoftmaxPart* statistics, int64_t rows, int64_t parts, SoftmaxStatistics* out) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (t >= rows) return;
  const SoftmaxPart all = mergeTree(statistics + t * parts, parts);
  out[t].m = all.m;
  out[t].s = all.s;
  out[t].u = all.u;
}

// --- backward --------------------------------------------------------------------------------------------------------

struct RowGradient {
  float logZ, entropy, dLogprob, dEntropy;
  int32_t target;
};

__device__ float gradientOf(float logit, int64_t v, float inverseTemperature, const RowGradient& row) {
  const float logp = below(logit * inverseTemperature, row.logZ);
  const float pull = exp(logp) * fma(row.dEntropy, logp + row.entropy, row.dLogprob);
  const float push = v == row.target ? row.dLogprob : 0.0f;
  return row.dLogprob == 0 && row.dEntropy == 0 ? 0.0f : (push - pull) * inverseTemperature;
}

// Rows begin at 64 bytes and their gaps are ours: whole vectors, those that reach into the gap too.
__global__ void gradientKernel(View<float> logits, const RowGradient* rows, float inverseTemperature,
                               Operand gradients) {
  const int64_t t = blockIdx.x, v = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kEach;
  if (v >= logits.cols) return;
  const RowGradient row = rows[t];
  const float4 x = *reinterpret_cast<const float4*>(logits.row(t) + v);
  const float4 d{gradientOf(x.x, v, inverseTemperature, row), gradientOf(x.y, v + 1, inverseTemperature, row),
                 gradientOf(x.z, v + 2, inverseTemperature, row), gradientOf(x.w, v + 3, inverseTemperature, row)};
  if (gradients.dtype == DType::kFloat32) {
    *reinterpret_cast<float4*>(gradients.row<float>(t) + v) = d;
  } else {
    const auto pair = [](float low, float high) {
      return toBFloat16(low).bits | static_cast<unsigned>(toBFloat16(high).bits) << 16;
    };
    *reinterpret_cast<uint2*>(gradients.row<BFloat16>(t) + v) = {pair(d.x, d.y), pair(d.z, d.w)};
  }
}

}  // namespace

void softmaxStatistics(Queue& queue, Operand hidden, const Weight& w, const int32_t* targets, float inverseTemperature,
                       SoftmaxStatistics* out, Staging staging) {
  const WeightLayout& layout = *w.layout;
  if (layout.out == 0) {
    for (int64_t t = 0; t < hidden.rows; ++t) out[t] = {kLowest, 0, 0, -kInfinity};
    return;
  }
  lockstep::cuda::Queue& gpu = onGpu(queue);
  // What the host gets waits at the end of the staging memory, so that it waits for the device once; where two rows of
  // logits leave no room for it, it gets the rows of each block by themselves.
  const auto results = roundUp(hidden.rows * static_cast<int64_t>(sizeof(SoftmaxStatistics)), 64);
  const int64_t most = staging.bytes / 64 * 64 - results;
  const bool atOnce = most >= vocabularyStagingBytes(2, layout.out, hidden.dtype, false);
  auto* const kept = reinterpret_cast<SoftmaxStatistics*>(static_cast<char*>(staging.data) + most);
  const Blocks blocks(staging.data, atOnce ? most : staging.bytes, layout.out, hidden.dtype, false);
  const auto parts = static_cast<int64_t>(layout.parts.size());
  for (int64_t begin = 0; begin < hidden.rows; begin += blocks.rows) {
    const int64_t count = std::min(hidden.rows - begin, blocks.rows);
    const View<float> logits = blocks.logits(count);
    linear(queue, hidden.slice(begin, count), w, nullptr, Output::store(logits));
    auto* const own = gpu.scratchOf<SoftmaxStatistics>(count + (count * parts * 3 + 3) / 4);
    auto* const partial = reinterpret_cast<SoftmaxPart*>(own + count);
    SoftmaxStatistics* const rows = atOnce ? kept + begin : own;
    launch(partStatisticsKernel, dim3(blocksFor(count, 1), blocksFor(parts, 1)), kThreads, 0, gpu.stream(), logits,
           gpu.stage(layout.parts.data(), parts), gpu.stage(targets + begin, count), inverseTemperature, partial, rows);
    launch(mergePartsKernel, blocksFor(count, kMergeThreads), kMergeThreads, 0, gpu.stream(), partial, count, parts,
           rows);
    if (!atOnce) gpu.give(out + begin, own, count);
  }
  if (atOnce && hidden.rows > 0) gpu.give(out, kept, hidden.rows);
}

// On the host, where its few numbers are and go: a round trip to the device would take longer. math.h and the
// compiler's options give the same roundings there, and a rank's thread flushes denormals.
void mergeStatistics(Queue&, const SoftmaxStatistics* statistics, int64_t groups, int64_t rows, const int32_t* targets,
                     LogSoftmax out) {
  std::vector<SoftmaxPart> parts(static_cast<size_t>(groups));
  for (int64_t t = 0; t < rows; ++t) {
    float target = -kInfinity;
    for (int64_t g = 0; g < groups; ++g) {
      const SoftmaxStatistics& own = statistics[g * rows + t];
      parts[static_cast<size_t>(g)] = {own.m, own.s, own.u};
      if (own.target != -kInfinity) target = own.target;
    }
    const SoftmaxPart all = mergeTree(parts.data(), groups);
    const float logS = log(all.s);
    out.logZ[t] = all.m + logS;
    out.entropies[t] = logS - all.u / all.s;
    out.logprobs[t] = targets[t] < 0 ? 0.0f : target - out.logZ[t];
  }
}

void logprobsBackward(Queue& queue, Operand hidden, const Weight& w, const int32_t* targets, float inverseTemperature,
                      LogSoftmax forward, const float* dLogprobs, const float* dEntropies, View<float> dHidden,
                      WeightGradient dW, Staging staging) {
  lockstep::cuda::Queue& gpu = onGpu(queue);
  const int64_t vocabulary = w.layout->out;
  if (vocabulary == 0) {
    const auto cell = static_cast<int64_t>(sizeof(float));
    queue.fillRows(dHidden.data, static_cast<size_t>(dHidden.stride * cell), 0,
                   static_cast<size_t>(dHidden.cols * cell), dHidden.rows);
    return;
  }
  std::vector<RowGradient> rows;
  rows.reserve(static_cast<size_t>(hidden.rows));
  for (int64_t t = 0; t < hidden.rows; ++t) {
    rows.push_back({forward.logZ[t], forward.entropies[t], dLogprobs == nullptr ? 0.0f : dLogprobs[t],
                    dEntropies == nullptr ? 0.0f : dEntropies[t], targets[t]});
  }
  const Blocks blocks(staging.data, staging.bytes, vocabulary, hidden.dtype, true);
  for (int64_t begin = 0; begin < hidden.rows; begin += blocks.rows) {
    const int64_t count = std::min(hidden.rows - begin, blocks.rows);
    const View<float> logits = blocks.logits(count);
    const Operand gradients = blocks.gradients(count), x = hidden.slice(begin, count);
    linear(queue, x, w, nullptr, Output::store(logits));
    launch(gradientKernel, dim3(blocksFor(count, 1), blocksFor(vocabulary, kThreads * kEach)), kThreads, 0,
           gpu.stream(), logits, gpu.stage(rows.data() + begin, count), inverseTemperature, gradients);
    linearBackwardInput(queue, gradients, w, Output::store(dHidden.slice(begin, count)));
    linearBackwardWeight(queue, gradients, x, dW, nullptr);
  }
}

}  // namespace lockstep::kernels::cuda
