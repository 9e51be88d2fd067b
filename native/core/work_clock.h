// When the work of a rank's call began and ended, and what of that time was communication. A stage of a pipeline begins
// when its input is there and ends before it hands its output on, so that what it waits for lies between its works.
// On a GPU also what its streams did meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/wait.h"

namespace lockstep {

// What a stream of a GPU did for a call, in nanoseconds of nowNanoseconds() (cuda/stream_timer.h).
struct StreamWork {
  enum class Stream : uint8_t { kCompute, kToHost, kFromHost } stream;
  int64_t begin, end;
  int64_t busy;   // of that time; while a computation lets the host have its turns, its stream is idle
  int64_t bytes;  // of a copy
};

// Nanoseconds; begin and end of nowNanoseconds().
struct WorkTimes {
  int64_t begin = 0, end = 0;  // end is 0 while the work goes on
  int64_t communicating = 0;   // in calls of communicators, waits included
  int64_t waiting = 0;         // in those, for ranks that have not come
  std::vector<StreamWork> streams;
};

// Of the call that the calling thread is in.
class WorkClock {
 public:
  static void begin() { times() = {nowNanoseconds(), 0, 0, 0, {}}; }
  // The first after begin() counts.
  static void end() {
    if (times().end == 0) times().end = nowNanoseconds();
  }
  // Whether the thread is in a call, between begin() and end().
  static bool running() { return times().begin != 0 && times().end == 0; }
  // What a stream did for it: a call's computations are one work, each copy is one.
  static void add(StreamWork work) {
    if (!running()) return;
    work.begin = std::max(work.begin, times().begin);
    work.busy = work.end - work.begin;
    std::vector<StreamWork>& streams = times().streams;
    const auto earlier = std::find_if(streams.begin(), streams.end(), [&](const StreamWork& other) {
      return work.stream == StreamWork::Stream::kCompute && other.stream == work.stream;
    });
    if (earlier == streams.end()) return streams.push_back(work);
    earlier->end = work.end;
    earlier->busy += work.busy;
  }
  // The thread is in no call any more.
  static WorkTimes take() { return std::exchange(times(), {}); }
  static WorkTimes& times() {
    thread_local WorkTimes own;
    return own;
  }

  // Adds its own life to one of the sums.
  class Span {
   public:
    explicit Span(int64_t WorkTimes::*sum) : sum_(sum), began_(nowNanoseconds()) {}
    ~Span() {
      WorkTimes& t = times();
      if (t.end == 0) t.*sum_ += nowNanoseconds() - began_;
    }
    Span(const Span&) = delete;
    Span& operator=(const Span&) = delete;

   private:
    int64_t WorkTimes::*sum_;
    int64_t began_;
  };
};

}  // namespace lockstep
