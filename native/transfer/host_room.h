// Host memory for state that is away from a rank's device: chunks within a budget. For a GPU they are pinned, which
// costs more than a copy, so chunks that are given back stay for those that ask next.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/memory_space.h"

namespace lockstep::transfer {

class HostRoom {
 public:
  // `setting` is what a user raises when the budget is too small.
  HostRoom(std::string setting, size_t budget, Memory& device) : space_(std::move(setting), budget), device_(device) {}
  ~HostRoom() { close(); }
  HostRoom(const HostRoom&) = delete;
  HostRoom& operator=(const HostRoom&) = delete;

  using Chunk = std::unique_ptr<Arena>;
  // Contents are undefined. Throws Error("MEMORY_BUDGET") and Error("OUT_OF_MEMORY").
  Chunk take(size_t bytes, const std::string& what);
  void give(Chunk);
  // Frees what waits to be asked for.
  void close();

  // Counts the chunks that are taken.
  const MemorySpace& space() const { return space_; }

 private:
  MemorySpace space_;
  Memory& device_;
  std::mutex mutex_;
  std::map<size_t, std::vector<Chunk>> free_;  // by size; pinned
};

}  // namespace lockstep::transfer
