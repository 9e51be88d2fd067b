// The thread that runs everything of a rank, in the order of the calls. Never libuv's pool: busy workers there freeze
// file input and output, and a rank that waits for another would hang.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace lockstep {

class RankThread {
 public:
  RankThread();
  ~RankThread();  // close()
  RankThread(const RankThread&) = delete;
  RankThread& operator=(const RankThread&) = delete;

  // Appends a job; jobs must not throw. Returns false after close().
  bool post(std::function<void()> job);

  // Asks the running job to stop soon (it polls `cancelled`), drops nothing, waits for all jobs, joins. Idempotent.
  void close();

  const std::atomic<bool>& cancelled() const { return cancelled_; }

 private:
  void loop();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> jobs_;
  std::atomic<bool> cancelled_{false};
  bool closing_ = false;
  std::thread thread_;
};

}  // namespace lockstep
