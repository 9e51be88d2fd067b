#include "cuda/stream_timer.h"

#include <algorithm>

#include "core/wait.h"
#include "cuda/queue.h"

namespace lockstep::cuda {

StreamTimer::~StreamTimer() {
  if (first_ != nullptr) cudaEventDestroy(first_);
  if (last_ != nullptr) cudaEventDestroy(last_);
}

void StreamTimer::begin(cudaStream_t stream) {
  if (of_ != nullptr || !WorkClock::running()) return;
  for (cudaEvent_t* event : {&first_, &last_}) {
    if (*event == nullptr) check(cudaEventCreateWithFlags(event, cudaEventDefault), "making an event");
  }
  check(cudaEventRecord(first_, stream), "working");
  of_ = &WorkClock::times();
}

void StreamTimer::wait(cudaStream_t stream, const char* what, size_t bytes) {
  const bool mine = of_ == &WorkClock::times();
  if (mine) check(cudaEventRecord(last_, stream), what);
  check(cudaStreamSynchronize(stream), what);
  if (!mine) return;
  const int64_t end = nowNanoseconds();
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, first_, last_), "measuring time");
  const int64_t begin = std::max(ended_, end - static_cast<int64_t>(static_cast<double>(milliseconds) * 1e6));
  WorkClock::add({kind_, begin, end, 0, static_cast<int64_t>(bytes)});
  ended_ = end;
  of_ = nullptr;
}

}  // namespace lockstep::cuda
