// The operations on a GPU, declared as kernels.h documents them, and what they share. A .cu file is compiled by nvcc
// with the headers of cuda/hardware, and by the host's compiler with those of cuda/emulation, for tests: it includes
// this file, or "device.h", first, and has no #ifdef.
#pragma once

#include "device.h"

#include "cuda/queue.h"
#include "kernels/kernels.h"
#include "kernels/math.h"

namespace lockstep::kernels::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;
constexpr unsigned kMultiprocessors = 132;  // about, to choose tiles by: of an H100; of an A100 108

constexpr unsigned blocksFor(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

inline lockstep::cuda::Queue& onGpu(Queue& queue) {
  return static_cast<lockstep::cuda::Queue&>(queue);
}

// --- in kernels ------------------------------------------------------------------------------------------------------

__device__ inline float load(const Operand& x, int64_t row, int64_t col) {
  return x.dtype == DType::kFloat32 ? x.row<float>(row)[col] : toFloat(x.row<BFloat16>(row)[col]);
}

__device__ inline void store(const Operand& y, int64_t row, int64_t col, float value) {
  if (y.dtype == DType::kFloat32) {
    y.row<float>(row)[col] = value;
  } else {
    y.row<BFloat16>(row)[col] = toBFloat16(value);
  }
}

// Element (t, n) of where a product goes.
__device__ inline void put(const Output& y, int64_t t, int64_t n, float value) {
  switch (y.kind) {
    case Output::Kind::kStore:
      y.f32.row(t)[n] = value;
      break;
    case Output::Kind::kRound:
      store(y.operand, t, n, value);
      break;
    case Output::Kind::kAdd:
      y.f32.row(t)[n] = y.residual.row(t)[n] + value;
      break;
  }
}

// The lanes sum by 16 neighbouring threads, of which this is number `lane`: next(acc, i) returns acc with element i
// added. All 16 get the sum; all threads of the warp call.
template <class Next>
__device__ inline float lanesSum16(int lane, int64_t count, const Next& next) {
  float sum = 0;
  for (int64_t i = lane; i < count; i += 16) sum = next(sum, i);
  for (int width = 8; width >= 1; width /= 2) sum = sum + __shfl_xor_sync(kAllLanes, sum, width);
  return sum;
}

// --- operations ------------------------------------------------------------------------------------------------------

#include "kernels/operations.inc"

}  // namespace lockstep::kernels::cuda
