// Device memory by pages, emulated: addresses that stay while what lies behind them comes and goes. hardware/pages.h
// has the same names.
#pragma once

#include <cuda_runtime.h>

#include <map>

namespace lockstep::cuda::pages {

inline cudaError_t grain(int, size_t* bytes) {
  return *bytes = size_t{2} << 20, cudaSuccess;
}
// Sizes of what was reserved and of what was mapped: neither is given back in part.
inline std::map<const char*, size_t> reserved, mapped;

inline cudaError_t reserve(char** address, size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return cudaErrorMemoryAllocation;
  std::lock_guard lock(emulated::machine.mutex);
  reserved[*address = static_cast<char*>(memory)] = bytes;
  return cudaSuccess;
}
inline bool whole(std::map<const char*, size_t>& all, char* at, size_t bytes) {
  std::lock_guard lock(emulated::machine.mutex);
  const auto found = all.find(at);
  return found != all.end() && found->second == bytes && (all.erase(found), true);
}
inline cudaError_t map(int gpu, char* at, size_t bytes) {
  if (!emulated::has_memory(gpu, bytes)) return cudaErrorMemoryAllocation;
  if (mprotect(at, bytes, PROT_READ | PROT_WRITE) != 0) return cudaErrorMemoryAllocation;
  emulated::DeviceAccess::protect(at, bytes);
  emulated::take_memory(gpu, at, bytes);
  std::lock_guard lock(emulated::machine.mutex);
  return mapped[at] = bytes, cudaSuccess;
}
inline cudaError_t clear(char* at, size_t bytes, cudaStream_t) {
  return madvise(at, bytes, MADV_DONTNEED), cudaSuccess;
}
inline cudaError_t unmap(char* at, size_t bytes) {
  if (!whole(mapped, at, bytes)) return cudaErrorInvalidValue;
  emulated::give_memory(at);
  madvise(at, bytes, MADV_DONTNEED);
  return mprotect(at, bytes, PROT_NONE), cudaSuccess;
}
inline cudaError_t release(char* at, size_t bytes) {
  if (!whole(reserved, at, bytes)) return cudaErrorInvalidValue;
  return munmap(at, bytes), cudaSuccess;
}

}  // namespace lockstep::cuda::pages
