// How threads wait for one another: they spin at most 20 microseconds, and only while every thread that computes can
// have a core of its own; then they park on a futex.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

namespace lockstep {

// The clock of all deadlines here (CLOCK_MONOTONIC).
int64_t nowNanoseconds();

// Counts the calling thread, until it ends, among those that compute. Counting it again costs nothing.
void countThread();

// Whether the threads counted so far leave a core to each.
bool spinningPays();

// What a thread parks on until something that others change comes true.
class Bell {
 public:
  static constexpr int64_t kForever = std::numeric_limits<int64_t>::max();

  // Returns true once done(), which must be cheap and read what others change atomically; false when it is not by
  // `deadline`.
  template <class Done>
  bool wait(const Done& done, int64_t deadline = kForever);

  // After a change, by a sequentially consistent operation, that may make somebody's done() true. A system call only
  // when somebody sleeps.
  void ring() {
    if (sleepers_.load() != 0) wakeAll();
  }

 private:
  static void relax();
  void wakeAll();
  void park(uint32_t seen, int64_t deadline);

  // A sleeper counts itself, then looks once more, then sleeps while the word is what it was before that look.
  std::atomic<uint32_t> word_{0}, sleepers_{0};
};

template <class Done>
bool Bell::wait(const Done& done, int64_t deadline) {
  constexpr int64_t kSpinNanoseconds = 20'000;
  if (done()) return true;
  if (spinningPays()) {
    const int64_t end = nowNanoseconds() + kSpinNanoseconds;
    do {
      for (int i = 0; i < 16; ++i) {
        if (done()) return true;
        relax();
      }
    } while (nowNanoseconds() < end);
  }
  sleepers_.fetch_add(1);
  bool reached = false;
  for (;;) {
    const uint32_t seen = word_.load();
    reached = done();
    if (reached || nowNanoseconds() >= deadline) break;
    park(seen, deadline);
  }
  sleepers_.fetch_sub(1);
  return reached;
}

inline void Bell::relax() {
  __builtin_ia32_pause();
}

}  // namespace lockstep
