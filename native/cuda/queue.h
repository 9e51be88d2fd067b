// A rank's place on a GPU: one stream, on which operations follow each other, and what they need from the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "core/queue.h"

namespace lockstep::cuda {

// Throws Error(code) unless `error` is cudaSuccess: CUDA_OUT_OF_MEMORY, CUDA_DEVICE_LOST or CUDA_FAILED. `what` says
// what was being done.
void check(cudaError_t error, const char* what);

class Queue final : public lockstep::Queue {
 public:
  // Throws what check() throws.
  Queue(int gpu, int threads, size_t hostScratchBytes);
  ~Queue() override;

  void close() override;
  void copyRows(void* to, size_t toStride, const void* from, size_t fromStride, size_t bytes, int64_t rows) override;
  void fillRows(void* at, size_t stride, int byte, size_t bytes, int64_t rows) override;
  void toHost(void* to, const void* from, size_t bytes) override;
  void fromHost(void* to, const void* from, size_t bytes) override;
  void synchronize() override;

  int gpu() const { return gpu_; }
  // The stream of the calling thread's operations; makes the GPU the thread's current one.
  cudaStream_t stream() const;

  // An index array of the host as the device sees it, for the operation that asks. Arrays that are given again
  // unchanged, as those of a batch are by every layer, are not sent again.
  template <class T>
  const T* stage(const T* host, int64_t count) {
    return host == nullptr || count == 0
               ? nullptr
               : static_cast<const T*>(stageBytes(host, static_cast<size_t>(count) * sizeof(T)));
  }
  // Device memory for the intermediates of one operation, 256-byte aligned; one block at a time, undefined contents.
  void* scratch(size_t bytes);
  template <class T>
  T* scratchOf(int64_t count) {
    return static_cast<T*>(scratch(static_cast<size_t>(count) * sizeof(T)));
  }
  using lockstep::Queue::scratch;
  // What an operation has computed for the host; waits for it.
  template <class T>
  void give(T* host, const T* device, int64_t count) {
    toHost(host, device, static_cast<size_t>(count) * sizeof(T));
  }

 private:
  // Pinned memory of the host and as much of the device: a staged array has one offset in both.
  struct Region {
    char *pinned = nullptr, *device = nullptr;
    size_t bytes = 0, end = 0;
  };
  struct Staged {
    const void* host;
    int region;
    size_t offset, bytes;
  };
  const void* stageBytes(const void* host, size_t bytes);
  void nextRegion(size_t bytes);
  void release(Region&);

  int gpu_;
  cudaStream_t stream_ = nullptr;
  Region regions_[2];  // filled in turn, so that what an operation has staged outlives its next stage()
  int region_ = 0;
  std::vector<Staged> staged_;
  void* scratch_ = nullptr;
  size_t scratchSize_ = 0;
};

}  // namespace lockstep::cuda
