#include "core/wait.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>

namespace lockstep {

namespace {

constexpr int64_t kSecond = 1'000'000'000;

std::atomic<int> countedThreads{0};

struct CountedThread {
  CountedThread() { countedThreads.fetch_add(1, std::memory_order_relaxed); }
  ~CountedThread() { countedThreads.fetch_sub(1, std::memory_order_relaxed); }
};

int availableCores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return CPU_COUNT(&set);
}

}  // namespace

int64_t nowNanoseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * kSecond + t.tv_nsec;
}

void countThread() {
  thread_local const CountedThread counted;
  (void)counted;
}

bool spinningPays() {
  static const int cores = availableCores();
  return countedThreads.load(std::memory_order_relaxed) <= cores;
}

void Bell::wakeAll() {
  word_.fetch_add(1);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word_), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

void Bell::park(uint32_t seen, int64_t deadline) {
  timespec left{};
  if (deadline != kForever) {
    const int64_t nanoseconds = std::max<int64_t>(deadline - nowNanoseconds(), 0);
    left = {nanoseconds / kSecond, nanoseconds % kSecond};
  }
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word_), FUTEX_WAIT_PRIVATE, seen,
          deadline == kForever ? nullptr : &left, nullptr, 0);
}

}  // namespace lockstep
