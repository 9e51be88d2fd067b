// What the contract suite needs to know of the machine. emulation/testing.h says what each does.
#pragma once

#include <cuda_runtime.h>

namespace lockstep::cuda::testing {

constexpr int kSchedules = 1;
inline void setSchedule(int) {}
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  return cudaMallocManaged(&memory, bytes) == cudaSuccess ? memory : nullptr;
}
inline void free(void* memory) {
  cudaFree(memory);
}

}  // namespace lockstep::cuda::testing
