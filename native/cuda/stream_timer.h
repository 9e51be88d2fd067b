// When a stream worked, as its GPU measures it: an event before the first operation after a wait, one behind the last
// before the next. The stretch between them ends where the host has returned from that wait: the clocks of a GPU and of
// the host drift apart, and what cudaEventElapsedTime counts from an event of long ago is a float.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/work_clock.h"

namespace lockstep::cuda {

// Measures only in a call of a rank (core/work_clock.h). Two threads may wait, one at a time may begin.
class StreamTimer {
 public:
  explicit StreamTimer(StreamWork::Stream kind) : kind_(kind) {}
  ~StreamTimer();
  StreamTimer(const StreamTimer&) = delete;
  StreamTimer& operator=(const StreamTimer&) = delete;

  // Before an operation on the stream, of the thread's current GPU. Not while a graph is captured.
  void begin(cudaStream_t);
  // Waits for the stream. The stretch that the thread has begun ends, and its call hears of it (WorkClock); `bytes` of
  // a copy. Throws what check() throws, with `what` was being done.
  void wait(cudaStream_t, const char* what, size_t bytes = 0);

 private:
  const StreamWork::Stream kind_;
  cudaEvent_t first_ = nullptr, last_ = nullptr;
  std::atomic<const WorkTimes*> of_{nullptr};  // those of the thread that has begun a stretch
  int64_t ended_ = 0;                          // the last one
};

}  // namespace lockstep::cuda
