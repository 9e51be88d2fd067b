// What a GPU can do at most, measured by the benches in the same call as a kernel: multiply-adds from registers, of
// bfloat16 by the instruction of the products (mma.sync of sm_80, slower on Hopper than the wgmma that data sheets
// count), and reading memory.
#include "kernels/cuda/cuda.h"

#include "cuda/backend.h"
#include "kernels/ceiling.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr int kThreads = 256, kChains = 8;
constexpr int64_t kWideLoads = 4;  // of 16 bytes, on their way at once

// Always false of sums of small numbers, which the compiler does not know.
__device__ inline void keep(float sum, float* sink) {
  if (sum == 3e38f) *sink = sum;
}

__global__ void tensorCoreKernel(int rounds, float* sink) {
  float d[kChains][4] = {};
  const unsigned one = 0x3f803f80u;  // two bfloat16 ones
  const unsigned a[4] = {one, one, one, one}, b[2] = {one, one};
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) mma_m16n8k16_bf16(d[i], a, b);
  }
  float sum = 0;
  for (int i = 0; i < kChains; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
  keep(sum, sink);
}

__global__ void chainKernel(int rounds, float x, float* sink) {
  float d[kChains];
  for (int i = 0; i < kChains; ++i) d[i] = static_cast<float>(i);
  for (int r = 0; r < rounds; ++r) {
#pragma unroll
    for (int i = 0; i < kChains; ++i) d[i] = fmaf(d[i], x, 1e-5f);
  }
  float sum = 0;
  for (int i = 0; i < kChains; ++i) sum += d[i];
  keep(sum, sink);
}

__global__ void readKernel(const float4* data, int64_t count, float* sink) {
  const int64_t step = int64_t{gridDim.x} * kThreads * kWideLoads;
  float sum = 0;
  for (int64_t i = (int64_t{blockIdx.x} * kWideLoads) * kThreads + threadIdx.x; i < count; i += step) {
    float4 part[kWideLoads] = {};
#pragma unroll
    for (int j = 0; j < kWideLoads; ++j) {
      if (i + j * kThreads < count) part[j] = data[i + j * kThreads];
    }
#pragma unroll
    for (int j = 0; j < kWideLoads; ++j) sum += (part[j].x + part[j].y) + (part[j].z + part[j].w);
  }
  keep(sum, sink);
}

unsigned multiprocessorsOf(Queue& queue) {
  static const lockstep::cuda::Status status = lockstep::cuda::status();
  return static_cast<unsigned>(status.gpus[static_cast<size_t>(onGpu(queue).gpu())].multiprocessors);
}

double multiplyAdds(Queue& queue, DType dtype) {
  static const int rounds = lockstep::cuda::status().build == "emulated" ? 2 : 4096;
  auto& gpu = onGpu(queue);
  const unsigned blocks = 4 * multiprocessorsOf(queue);
  float* const sink = gpu.scratchOf<float>(1);
  if (dtype == DType::kBFloat16) {
    launch(tensorCoreKernel, dim3(blocks), dim3(kThreads), 0, gpu.stream(), rounds, sink);
    return double{16 * 8 * 16} * kChains * rounds * blocks * (kThreads / kWarp);
  }
  launch(chainKernel, dim3(blocks), dim3(kThreads), 0, gpu.stream(), rounds, 0.9999f, sink);
  return double{kChains} * rounds * blocks * kThreads;
}

void readAll(Queue& queue, const float* data, int64_t count) {
  auto& gpu = onGpu(queue);
  const unsigned blocks = 8 * multiprocessorsOf(queue);
  launch(readKernel, dim3(blocks), dim3(kThreads), 0, gpu.stream(), reinterpret_cast<const float4*>(data), count / 4,
         gpu.scratchOf<float>(1));
}

}  // namespace

}  // namespace lockstep::kernels::cuda

namespace lockstep::kernels {

const Ceiling* cudaCeiling() {
  static const Ceiling functions = {cuda::multiplyAdds, cuda::readAll};
  return &functions;
}

}  // namespace lockstep::kernels
