#include "transfer/host_room.h"

namespace lockstep::transfer {

HostRoom::Chunk HostRoom::take(size_t bytes, const std::string& what) {
  space_.take(bytes, what);
  try {
    {
      const std::lock_guard lock(mutex_);
      auto& free = free_[bytes];
      if (!free.empty()) {
        Chunk chunk = std::move(free.back());
        free.pop_back();
        return chunk;
      }
    }
    auto chunk = std::make_unique<Arena>("host memory", bytes);
    device_.pin(chunk->data(), bytes);
    return chunk;
  } catch (...) {
    space_.give(bytes);
    throw;
  }
}

void HostRoom::give(Chunk chunk) {
  const size_t bytes = chunk->planned();
  space_.give(bytes);
  if (device_.isHost()) return;
  const std::lock_guard lock(mutex_);
  free_[bytes].push_back(std::move(chunk));
}

void HostRoom::close() {
  const std::lock_guard lock(mutex_);
  for (const auto& [bytes, chunks] : free_) {
    for (const Chunk& chunk : chunks) device_.unpin(chunk->data());
  }
  free_.clear();
}

}  // namespace lockstep::transfer
