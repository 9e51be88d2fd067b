// The sum of float32 across ranks: one balanced binary tree over the ranks (comm/tree_sum.h). A thread takes four
// neighbouring elements and merges the ranks as a binary counter carries: a finished subtree of 2^level ranks waits on
// its level for the next one, and those left at the end are merged from the smallest up. That is the tree in which an
// odd one out passes up, whatever the number of ranks. For the usual numbers the counter is resolved at compile time.
#include "device.h"

#include <algorithm>

#include "comm/communicator.h"
#include "comm/nccl/tree_sum.h"

namespace lockstep::comm::nccl {

namespace {

constexpr int kThreads = 256, kLevels = 7;  // of 64 ranks, the level of all included
constexpr int64_t kMostBlocks = 8192;

struct Addends {
  const float* of[kMaxRanks];
};

__device__ inline float sumOf(float a, float b) {
  return a + b;
}
__device__ inline float4 sumOf(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Ranks == 0: as many as `given` says.
template <int Ranks, class V>
__device__ inline V tree(const Addends& addends, int given, int64_t i) {
  const int ranks = Ranks > 0 ? Ranks : given;
  V waiting[kLevels];
#pragma unroll
  for (int r = 0; r < ranks; ++r) {
    V sum = reinterpret_cast<const V*>(addends.of[r])[i];
    bool merging = true;
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      if (!merging) continue;
      if ((r >> level & 1) != 0) {
        sum = sumOf(waiting[level], sum);
      } else {
        waiting[level] = sum;
        merging = false;
      }
    }
  }
  V sum{};
  bool any = false;
#pragma unroll
  for (int level = 0; level < kLevels; ++level) {
    if ((ranks >> level & 1) == 0) continue;
    sum = any ? sumOf(waiting[level], sum) : waiting[level];
    any = true;
  }
  return sum;
}

// Vectors as far as they go, then one by one.
template <int Ranks, class V>
__global__ void treeSumKernel(Addends addends, int ranks, int64_t count, float* to) {
  constexpr int64_t kWidth = sizeof(V) / sizeof(float);
  const int64_t whole = count / kWidth, step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < whole; i += step) reinterpret_cast<V*>(to)[i] = tree<Ranks, V>(addends, ranks, i);
  for (int64_t i = whole * kWidth + first; i < count; i += step) to[i] = tree<Ranks, float>(addends, ranks, i);
}

template <int Ranks>
void launchTreeSum(cudaStream_t stream, bool aligned, const Addends& addends, int ranks, int64_t count, float* to) {
  const int64_t each = kThreads * (aligned ? 4 : 1);
  const auto blocks = static_cast<unsigned>(std::min(kMostBlocks, (count + each - 1) / each));
  if (aligned) {
    launch(treeSumKernel<Ranks, float4>, blocks, kThreads, 0, stream, addends, ranks, count, to);
  } else {
    launch(treeSumKernel<Ranks, float>, blocks, kThreads, 0, stream, addends, ranks, count, to);
  }
}

}  // namespace

void treeSum(cuda::Queue& queue, const float* const* addends, int ranks, int64_t count, float* to) {
  if (count == 0) return;
  Addends all{};
  auto bits = reinterpret_cast<uintptr_t>(to);
  for (int r = 0; r < ranks; ++r) {
    all.of[r] = addends[r];
    bits |= reinterpret_cast<uintptr_t>(addends[r]);
  }
  const bool aligned = bits % sizeof(float4) == 0;
  cudaStream_t const stream = queue.stream();
  switch (ranks) {
    case 2:
      return launchTreeSum<2>(stream, aligned, all, ranks, count, to);
    case 4:
      return launchTreeSum<4>(stream, aligned, all, ranks, count, to);
    case 8:
      return launchTreeSum<8>(stream, aligned, all, ranks, count, to);
    default:
      return launchTreeSum<0>(stream, aligned, all, ranks, count, to);
  }
}

}  // namespace lockstep::comm::nccl
