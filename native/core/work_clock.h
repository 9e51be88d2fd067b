// When the work of a rank's call began and ended, and what of that time was communication. A stage of a pipeline begins
// when its input is there and ends before it hands its output on, so that what it waits for lies between its works.
#pragma once

#include <cstdint>

#include "core/wait.h"

namespace lockstep {

// Nanoseconds; begin and end of nowNanoseconds().
struct WorkTimes {
  int64_t begin = 0, end = 0;  // end is 0 while the work goes on
  int64_t communicating = 0;   // in calls of communicators, waits included
  int64_t waiting = 0;         // in those, for ranks that have not come
};

// Of the call that the calling thread is in.
class WorkClock {
 public:
  static void begin() { times() = {nowNanoseconds(), 0, 0, 0}; }
  // The first after begin() counts.
  static void end() {
    if (times().end == 0) times().end = nowNanoseconds();
  }
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
