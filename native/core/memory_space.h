// The bytes that a rank's arenas hold in one kind of memory, beside the most that they may hold. On a CPU rank the
// device's memory and the host's are both RAM: what tells them apart is whose budget a byte counts in.
#pragma once

#include <cstddef>
#include <mutex>
#include <string>

namespace lockstep {

class MemorySpace {
 public:
  static constexpr size_t kUnbounded = ~size_t{0};

  // `setting` is what a user raises when the budget is too small.
  MemorySpace(std::string setting, size_t budget) : setting_(std::move(setting)), budget_(budget) {}
  MemorySpace(const MemorySpace&) = delete;
  MemorySpace& operator=(const MemorySpace&) = delete;

  // Throws Error("MEMORY_BUDGET") with the arithmetic; then nothing was taken.
  void take(size_t bytes, const std::string& what);
  void give(size_t bytes);

  size_t used() const;
  // The largest used() so far.
  size_t highWater() const;

 private:
  const std::string setting_;
  const size_t budget_;
  mutable std::mutex mutex_;
  size_t used_ = 0, highWater_ = 0;
};

}  // namespace lockstep
