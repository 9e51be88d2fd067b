#include "core/thread_pool.h"

#include <xmmintrin.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/wait.h"

namespace lockstep {

namespace {

constexpr int kMaxThreads = 256;
constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;

}  // namespace

void flushDenormals() {
  _mm_setcsr(_mm_getcsr() | kFlushToZero | kDenormalsAreZero);
}

// `generation` numbers the runs: a worker waits for it to pass the last one it has seen. `pending` counts the workers
// that have not finished the current run.
struct ThreadPool::State {
  alignas(64) std::atomic<uint32_t> generation{0};
  Bell started;
  void (*function)(void*, int) = nullptr;
  void* context = nullptr;
  bool stop = false;
  alignas(64) std::atomic<uint32_t> pending{0};
  Bell finished;
  alignas(64) std::atomic<int64_t> index{0};
  std::vector<std::thread> workers;

  void work(int thread) {
    flushDenormals();
    countThread();
    for (uint32_t seen = 0;; ++seen) {
      started.wait([&] { return generation.load(std::memory_order_acquire) != seen; });
      if (stop) return;
      function(context, thread);
      if (pending.fetch_sub(1) == 1) finished.ring();
    }
  }

  void start() {
    generation.fetch_add(1);
    started.ring();
  }
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>()), threads_(threads) {
  if (threads < 1 || threads > kMaxThreads) {
    throw Error("THREADS_INVALID",
                "threads: expected 1.." + std::to_string(kMaxThreads) + ", got " + std::to_string(threads));
  }
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
}

void ThreadPool::run(void (*function)(void*, int), void* context) {
  if (threads_ == 1) return function(context, 0);
  countThread();
  State& s = *state_;
  s.function = function;
  s.context = context;
  s.pending.store(static_cast<uint32_t>(threads_ - 1), std::memory_order_relaxed);
  s.start();
  function(context, 0);
  s.finished.wait([&] { return s.pending.load(std::memory_order_acquire) == 0; });
}

int64_t ThreadPool::takeIndex() {
  return state_->index.fetch_add(1, std::memory_order_relaxed);
}
void ThreadPool::resetIndex() {
  state_->index.store(0, std::memory_order_relaxed);
}

}  // namespace lockstep
