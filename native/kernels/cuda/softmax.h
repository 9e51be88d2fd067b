// Softmax statistics of a row of logits: per part, then merged by the tree over parts (kernels.h, vocabulary). Training
// and sampling share this code, so the log-probability of a sampled token is the one that training computes.
#pragma once

#include "kernels/cuda/cuda.h"

namespace lockstep::kernels::cuda {

// An empty part, and one of nothing but -inf, is (lowest, 0, 0), which adds nothing to another.
struct SoftmaxPart {
  float m, s, u;
};

// x - m, held at -100 from below; NaN stays NaN.
LOCKSTEP_INLINE float below(float x, float m) {
  return maximum(-100.0f, x - m);
}

LOCKSTEP_INLINE SoftmaxPart merge(SoftmaxPart a, SoftmaxPart b) {
  const float m = maximum(a.m, b.m), d1 = below(a.m, m), d2 = below(b.m, m), e1 = exp(d1), e2 = exp(d2);
  return {m, fma(b.s, e2, a.s * e1), fma(e2, fma(d2, b.s, b.u), e1 * fma(d1, a.s, a.u))};
}

// The tree over `count` parts (a power of two), which are overwritten.
LOCKSTEP_INLINE SoftmaxPart mergeTree(SoftmaxPart* parts, int64_t count) {
  for (int64_t n = count / 2; n >= 1; n /= 2) {
    for (int64_t i = 0; i < n; ++i) parts[i] = merge(parts[2 * i], parts[2 * i + 1]);
  }
  return parts[0];
}

// Statistics of `count` logits, by all threads of a block of whole warps; thread 0 gets all of them, the others only m.
// The maximum has no order. Then the threads bring exp(x - m) of a tile to shared memory, and one warp continues the
// lanes sums over it, s by its first half and u by its second, which is the only part that is a chain. visit(base,
// size, e) sees every tile in shared memory; the last tile stays until the next barrier.
constexpr int kSoftmaxTile = 1024;

template <class Visit>
__device__ SoftmaxPart softmaxPart(const float* logits, float inverseTemperature, int64_t count, const Visit& visit) {
  __shared__ Shared<float[kSoftmaxTile]> exponentials;
  __shared__ Shared<float[kSoftmaxTile]> distances;
  __shared__ Shared<float[kWarp]> maxima;
  float *const e = exponentials, *const d = distances, *const warps = maxima;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % 16;

  float m = std::numeric_limits<float>::lowest();
  for (int64_t i = thread; i < count; i += threads) m = maximum(logits[i] * inverseTemperature, m);
  for (int width = kWarp / 2; width >= 1; width /= 2) m = maximum(__shfl_xor_sync(kAllLanes, m, width), m);
  if (thread % kWarp == 0) warps[thread / kWarp] = m;
  __syncthreads();
  for (int warp = 0; warp < threads / kWarp; ++warp) m = maximum(warps[warp], m);

  float sum = 0;
  for (int64_t base = 0; base < count; base += kSoftmaxTile) {
    const int size = static_cast<int>(count - base < kSoftmaxTile ? count - base : kSoftmaxTile);
    __syncthreads();  // the last tile has been read
    for (int i = thread; i < size; i += threads) {
      d[i] = below(logits[base + i] * inverseTemperature, m);
      e[i] = exp(d[i]);
    }
    __syncthreads();
    if (thread < kWarp) {
      const bool first = thread < 16;
      // fma(e, 1, s) rounds as e + s does.
      for (int i = lane; i < size; i += 16) sum = fma(e[i], first ? 1.0f : d[i], sum);
    }
    visit(base, size, e);
  }
  float u = 0;
  if (thread < kWarp) {
    for (int width = 8; width >= 1; width /= 2) sum = sum + __shfl_xor_sync(kAllLanes, sum, width);
    u = __shfl_sync(kAllLanes, sum, 16);
  }
  return {m, sum, u};
}

}  // namespace lockstep::kernels::cuda
