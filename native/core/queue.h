// What an operation needs besides its arguments: the threads that run it and the scratch memory of its rank. On a CPU
// rank an operation has finished when the call returns; on a GPU (cuda/queue.h) operations follow each other on the
// device, and what copies to the host waits for them.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <string>

#include "core/thread_pool.h"

namespace lockstep {

class Queue {
 public:
  // scratchBytes per thread and once more for all, 64-byte aligned, reserved at once and touched on use.
  Queue(int threads, size_t scratchBytes);
  virtual ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  // Ends the threads and gives the scratch memory back; no operation may follow. Idempotent.
  virtual void close();

  // --- memory, in order with the operations --------------------------------------------------------------------------
  // Within the device.
  void copy(void* to, const void* from, size_t bytes) { copyRows(to, bytes, from, bytes, bytes, 1); }
  virtual void copyRows(void* to, size_t toStride, const void* from, size_t fromStride, size_t bytes, int64_t rows);
  void fill(void* at, int byte, size_t bytes) { fillRows(at, bytes, byte, bytes, 1); }
  virtual void fillRows(void* at, size_t stride, int byte, size_t bytes, int64_t rows);
  // What comes to the host is there on return; what leaves it may change.
  virtual void toHost(void* to, const void* from, size_t bytes);
  virtual void fromHost(void* to, const void* from, size_t bytes);
  // Runs `work`, whose operations depend on `key`, on arrays of the host and on the contents of memory only, until
  // forget(). A GPU makes the later runs with one launch.
  virtual void repeat(const std::string&, const std::function<void()>& work) { work(); }
  virtual void forget() {}
  // Returns when everything before has been done. Throws its errors.
  virtual void synchronize() {}

  ThreadPool& pool() { return pool_; }
  int threads() const { return pool_.threads(); }

  // Scratch of one thread; contents do not survive the operation. Throws Error("SCRATCH_TOO_SMALL") naming both sizes.
  void* scratch(int thread, size_t bytes);
  // One more block of the same size that all threads of an operation share, for intermediates of an op made of others.
  void* shared(size_t bytes);
  size_t scratchBytes() const { return scratchBytes_; }
  // Largest request seen so far, per thread.
  size_t scratchHighWater() const { return highWater_; }
  size_t sharedHighWater() const { return sharedHighWater_; }

 private:
  void require(size_t bytes) const;

  ThreadPool pool_;
  size_t scratchBytes_;
  std::atomic<size_t> highWater_{0};
  size_t sharedHighWater_ = 0;
  char* memory_ = nullptr;
};

}  // namespace lockstep
