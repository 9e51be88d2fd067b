// The primitives kernels are written with, for nvcc. emulation/device.h says what each does; the include path chooses.
#pragma once

#define LOCKSTEP_INLINE static __host__ __device__ __forceinline__

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "core/dtype.h"
#include "core/error.h"
#include "cuda/recording.h"

template <class T>
using Shared = T;
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid = true) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int Left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Lets a kernel have so much dynamic shared memory. Above 48 KiB, static shared memory included, it must be asked for;
// it is never lowered, since another rank may be about to launch with more.
inline void allowShared(const void* kernel, size_t bytes) {
  constexpr size_t kAlways = 32 << 10;
  if (bytes <= kAlways) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;  // of a GPU
  int gpu = 0;
  cudaGetDevice(&gpu);
  const std::lock_guard lock(mutex);
  size_t& most = allowed[{kernel, gpu}];
  if (bytes <= most) return;
  most = bytes;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A... arguments) {
  if (!lockstep::cuda::admit({reinterpret_cast<const void*>(kernel),
                              {grid.x, grid.y, grid.z},
                              uint64_t{block.x} * block.y * block.z,
                              shared_bytes}))
    return;
  allowShared(reinterpret_cast<const void*>(kernel), shared_bytes);
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(arguments)...);
  if (const auto error = cudaGetLastError(); error != cudaSuccess)
    throw lockstep::Error("CUDA_FAILED", cudaGetErrorString(error));
}
