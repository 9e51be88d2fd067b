#include "core/memory_space.h"

#include <algorithm>

#include "core/error.h"

namespace lockstep {

void MemorySpace::take(size_t bytes, const std::string& what) {
  const std::lock_guard lock(mutex_);
  if (bytes > budget_ - std::min(used_, budget_)) {
    throw Error("MEMORY_BUDGET", what + " needs " + std::to_string(bytes) + " bytes, and " + std::to_string(used_) +
                                     " of the " + std::to_string(budget_) + " bytes of " + setting_ +
                                     " are taken; raise " + setting_);
  }
  used_ += bytes;
  highWater_ = std::max(highWater_, used_);
}

void MemorySpace::give(size_t bytes) {
  const std::lock_guard lock(mutex_);
  used_ -= bytes;
}

size_t MemorySpace::used() const {
  const std::lock_guard lock(mutex_);
  return used_;
}

size_t MemorySpace::highWater() const {
  const std::lock_guard lock(mutex_);
  return highWater_;
}

}  // namespace lockstep
