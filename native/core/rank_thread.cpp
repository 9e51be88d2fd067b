#include "core/rank_thread.h"

#include <utility>

#include "core/thread_pool.h"

namespace lockstep {

RankThread::RankThread() : thread_([this] { loop(); }) {}

RankThread::~RankThread() {
  close();
}

bool RankThread::post(std::function<void()> job) {
  {
    const std::lock_guard lock(mutex_);
    if (closing_) return false;
    jobs_.push_back(std::move(job));
  }
  wake_.notify_one();
  return true;
}

void RankThread::close() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    cancelled_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void RankThread::loop() {
  flushDenormals();
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return closing_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    std::function<void()> job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    job();
    job = nullptr;
    lock.lock();
  }
}

}  // namespace lockstep
