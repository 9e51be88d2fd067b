// A fixed set of threads that run one function together. Waits spin at most 20 microseconds, then park; with more
// threads than cores they park at once. Every thread computes with denormals flushed (FTZ and DAZ).
#pragma once

#include <cstdint>
#include <memory>

namespace lockstep {

// Sets FTZ and DAZ on the calling thread. Every thread that computes calls it once.
void flushDenormals();

class ThreadPool {
 public:
  // `threads` counts the caller: a pool of 1 has no thread of its own. Throws Error("THREADS_INVALID") outside 1..256.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Ends the threads; no run may follow. Idempotent.
  void stop();

  // Calls function(context, thread) once for each thread in 0..threads-1 and returns when all are done. The caller is
  // thread 0. One caller at a time. Functions must not throw.
  void run(void (*function)(void* context, int thread), void* context);

  // body(thread) on every thread.
  template <class Body>
  void each(const Body& body) {
    run([](void* context, int thread) { (*static_cast<const Body*>(context))(thread); }, const_cast<Body*>(&body));
  }

  // body(index, thread) for every index in 0..count-1, dealt dynamically one index at a time: which thread takes an
  // index varies, so body's result must not depend on it. Runs on the caller alone when count is 1.
  template <class Body>
  void forEach(int64_t count, const Body& body);

 private:
  int64_t takeIndex();
  void resetIndex();

  struct State;
  std::unique_ptr<State> state_;
  int threads_;
};

template <class Body>
void ThreadPool::forEach(int64_t count, const Body& body) {
  if (count <= 1 || threads_ == 1) {
    for (int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
  resetIndex();
  each([&](int thread) {
    for (int64_t i = takeIndex(); i < count; i = takeIndex()) body(i, thread);
  });
}

}  // namespace lockstep
