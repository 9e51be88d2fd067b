#include "core/thread_pool.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"

namespace lockstep {

namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kSpinNanoseconds = 20'000;
constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;

// Threads of all pools of the process, callers included. Spinning pays only while each has a core of its own.
std::atomic<int> liveThreads{0};

int availableCores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return CPU_COUNT(&set);
}

void futexWait(std::atomic<uint32_t>& word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futexWakeAll(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, kMaxThreads, nullptr, nullptr, 0);
}

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1'000'000'000} + t.tv_nsec;
}

// Spins until done() or until the time is up; says whether done.
template <class Done>
bool spin(const Done& done) {
  const int64_t end = now() + kSpinNanoseconds;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      _mm_pause();
    }
  } while (now() < end);
  return done();
}

}  // namespace

void flushDenormals() {
  _mm_setcsr(_mm_getcsr() | kFlushToZero | kDenormalsAreZero);
}

// `generation` numbers the runs: a worker waits for it to pass the last one it has seen. `pending` counts the workers
// that have not finished the current run. A side that parks says so first (sleepers, callerParked), so that the other
// side makes a system call only when somebody sleeps.
struct ThreadPool::State {
  alignas(64) std::atomic<uint32_t> generation{0};
  std::atomic<uint32_t> sleepers{0};
  void (*function)(void*, int) = nullptr;
  void* context = nullptr;
  bool stop = false;
  alignas(64) std::atomic<uint32_t> pending{0};
  std::atomic<uint32_t> callerParked{0};
  alignas(64) std::atomic<int64_t> index{0};
  int cores = availableCores();
  std::vector<std::thread> workers;

  bool spins() const { return liveThreads.load(std::memory_order_relaxed) <= cores; }

  void awaitRun(uint32_t seen) {
    const auto started = [&] { return generation.load(std::memory_order_acquire) != seen; };
    if (spins() && spin(started)) return;
    while (!started()) {
      sleepers.fetch_add(1);
      futexWait(generation, seen);
      sleepers.fetch_sub(1);
    }
  }

  void awaitWorkers() {
    const auto done = [&] { return pending.load(std::memory_order_acquire) == 0; };
    if (done() || (spins() && spin(done))) return;
    callerParked.store(1);
    for (uint32_t left = pending.load(); left != 0; left = pending.load()) futexWait(pending, left);
    callerParked.store(0);
  }

  void work(int thread) {
    flushDenormals();
    for (uint32_t seen = 0;; ++seen) {
      awaitRun(seen);
      if (stop) return;
      function(context, thread);
      if (pending.fetch_sub(1) == 1 && callerParked.load() != 0) futexWakeAll(pending);
    }
  }

  void start() {
    generation.fetch_add(1);
    if (sleepers.load() != 0) futexWakeAll(generation);
  }
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>()), threads_(threads) {
  if (threads < 1 || threads > kMaxThreads) {
    throw Error("THREADS_INVALID",
                "threads: expected 1.." + std::to_string(kMaxThreads) + ", got " + std::to_string(threads));
  }
  liveThreads.fetch_add(threads);
  for (int i = 1; i < threads; ++i) state_->workers.emplace_back([this, i] { state_->work(i); });
}

ThreadPool::~ThreadPool() {
  stop();
}

void ThreadPool::stop() {
  if (state_->stop) return;
  state_->stop = true;
  state_->start();
  for (std::thread& worker : state_->workers) worker.join();
  state_->workers.clear();
  liveThreads.fetch_sub(threads_);
}

void ThreadPool::run(void (*function)(void*, int), void* context) {
  if (threads_ == 1) return function(context, 0);
  State& s = *state_;
  s.function = function;
  s.context = context;
  s.pending.store(static_cast<uint32_t>(threads_ - 1), std::memory_order_relaxed);
  s.start();
  function(context, 0);
  s.awaitWorkers();
}

int64_t ThreadPool::takeIndex() {
  return state_->index.fetch_add(1, std::memory_order_relaxed);
}
void ThreadPool::resetIndex() {
  state_->index.store(0, std::memory_order_relaxed);
}

}  // namespace lockstep
