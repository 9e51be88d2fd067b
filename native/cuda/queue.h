// A rank's place on a GPU: one stream, on which operations follow each other, and what they need from the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/queue.h"
#include "cuda/recording.h"

namespace lockstep::cuda {

class StreamTimer;

// Throws Error(code) unless `error` is cudaSuccess: CUDA_OUT_OF_MEMORY, CUDA_DEVICE_LOST or CUDA_FAILED. `what` says
// what was being done.
void check(cudaError_t error, const char* what);

// Held while a stream of the GPU is captured into a graph, and by whoever waits for the whole GPU or gives its memory
// back: that would spoil the capture, whichever thread makes it.
std::mutex& capturing(int gpu);

class Queue final : public lockstep::Queue {
 public:
  // Device memory beside arenas: of the index arrays of graphs, and of two regions for those of operations, which are
  // larger where an array takes more than half of it. The memory plan (src/layout/gpu-plan.ts) has the same numbers.
  static constexpr size_t kGraphArrays = size_t{1} << 20, kFirstStaging = size_t{4} << 20;
  static constexpr int kMostGraphs = 64;

  // `timed`: the calls of a rank hear what its stream did for them. Throws what check() throws.
  Queue(int gpu, int threads, size_t hostScratchBytes, bool timed = false);
  ~Queue() override;

  void close() override;
  void copyRows(void* to, size_t toStride, const void* from, size_t fromStride, size_t bytes, int64_t rows) override;
  void fillRows(void* at, size_t stride, int byte, size_t bytes, int64_t rows) override;
  void toHost(void* to, const void* from, size_t bytes) override;
  void fromHost(void* to, const void* from, size_t bytes) override;
  void synchronize() override;
  // The first run is made as it comes, the second is recorded into a CUDA graph, of later ones only the arrays that
  // they stage are renewed. A run that takes other steps than the one recorded, or that waits for the device, is made
  // as it comes, and so is one that cannot be recorded for want of memory. When there are kMostGraphs, all are
  // forgotten.
  void repeat(const std::string& key, const std::function<void()>& work) override;
  void forget() override;

  int gpu() const { return gpu_; }
  unsigned multiprocessors() const { return multiprocessors_; }
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
    size_t offset, bytes;
  };
  struct Repeated {
    enum class State : uint8_t { kSeen, kRecorded, kRefused } state = State::kSeen;
    Recording recording;
    Region arrays;
    std::vector<Staged> staged;  // in arrays, by the run that is made
    cudaGraphExec_t graph = nullptr;
  };
  const void* stageBytes(const void* host, size_t bytes);
  const void* stageRepeated(const void* host, size_t bytes);
  void record(Repeated&, const std::function<void()>& work);
  bool capture(Repeated&, const std::function<void()>& work);
  bool replay(Repeated&, const std::function<void()>& work);
  // Before something is launched that is not only recorded.
  void launching() const;
  void wait(const char* what);
  // Throws where the device cannot be waited for.
  void refuseWaiting() const;
  void nextRegion(size_t bytes);
  // Pinned memory and as much of the device's, or the error.
  static cudaError_t take(Region&, size_t bytes);
  void release(Region&);
  void forgetGraphs();

  int gpu_;
  unsigned multiprocessors_ = 0;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<StreamTimer> timer_;
  Region regions_[2];  // filled in turn, so that what an operation has staged outlives its next stage()
  int region_ = 0;
  std::vector<Staged> staged_;  // in regions_[region_]
  std::unordered_map<std::string, Repeated> repeated_;
  int graphs_ = 0;                 // of those that have arrays
  Repeated* repeating_ = nullptr;  // that is recorded or compared
  void* scratch_ = nullptr;
  size_t scratchSize_ = 0;
};

}  // namespace lockstep::cuda
