// publish and round: the two places where float32 becomes an operand outside of another operation. Each element by
// itself; publish walks row pairs of panels (pairs.h) and takes the padding along, which is zero in the masters.
#include "kernels/cuda/pairs.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr int kThreads = 256, kEach = 4;  // a block rounds kThreads * kEach columns of a row

struct Publish {
  const float* master;
  BFloat16* weights;

  __device__ void operator()(int64_t even, int64_t odd, int64_t pairs) const {
    storePairs(weights + pairs, *reinterpret_cast<const float4*>(master + even),
               *reinterpret_cast<const float4*>(master + odd));
  }
};

__global__ void roundKernel(View<const float> src, Operand dst) {
  const int64_t t = blockIdx.x, begin = static_cast<int64_t>(blockIdx.y) * kThreads * kEach + threadIdx.x;
  for (int j = 0; j < kEach; ++j) {
    const int64_t i = begin + j * kThreads;
    if (i < src.cols) store(dst, t, i, src.row(t)[i]);
  }
}

}  // namespace

void publish(Queue& queue, const WeightLayout& layout, const float* master, void* weights) {
  forPairs(queue, layout, Publish{master, static_cast<BFloat16*>(weights)});
}

void round(Queue& queue, View<const float> src, Operand dst) {
  if (src.rows == 0 || src.cols == 0) return;
  launch(roundKernel, dim3(blocksFor(src.rows, 1), blocksFor(src.cols, kThreads * kEach)), kThreads, 0,
         onGpu(queue).stream(), src, dst);
}

}  // namespace lockstep::kernels::cuda
