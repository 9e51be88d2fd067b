// Device memory by pages, emulated: addresses that stay while what lies behind them comes and goes. hardware/pages.h
// has the same names.
#pragma once

#include <cuda_runtime.h>

namespace lockstep::cuda::pages {

inline cudaError_t grain(int, size_t* bytes) {
  return *bytes = size_t{2} << 20, cudaSuccess;
}
inline cudaError_t reserve(char** address, size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? cudaErrorMemoryAllocation : (*address = static_cast<char*>(memory), cudaSuccess);
}
inline cudaError_t map(int gpu, char* at, size_t bytes) {
  if (!emulated::has_memory(gpu, bytes)) return cudaErrorMemoryAllocation;
  if (mprotect(at, bytes, PROT_READ | PROT_WRITE) != 0) return cudaErrorMemoryAllocation;
  emulated::DeviceAccess::protect(at, bytes);
  return emulated::take_memory(gpu, at, bytes), cudaSuccess;
}
inline cudaError_t clear(char*, size_t) {
  return cudaSuccess;  // new pages are
}
inline cudaError_t unmap(char* at, size_t bytes) {
  cudaDeviceSynchronize();
  emulated::give_memory(at);
  madvise(at, bytes, MADV_DONTNEED);
  return mprotect(at, bytes, PROT_NONE), cudaSuccess;
}
inline cudaError_t release(char* at, size_t bytes) {
  return munmap(at, bytes), cudaSuccess;
}

}  // namespace lockstep::cuda::pages
