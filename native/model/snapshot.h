// A copy of tensors in host memory, from which a checkpoint is written while the model goes on learning.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "core/arena.h"
#include "core/queue.h"
#include "model/parameters.h"

namespace lockstep::model {

class Snapshot {
 public:
  using Key = std::pair<int64_t, Space>;

  // Copies on all threads of the queue. Throws Error("OUT_OF_MEMORY"), Error("MODEL_NOT_TRAINED").
  Snapshot(const Parameters&, Queue&, const std::vector<Key>& tensors);

  // Any thread; only tensors that were copied.
  Stored at(int64_t tensor, Space space) const { return copies_.at({tensor, space}); }
  // Host memory that is held.
  size_t bytes() const { return memory_.planned(); }

 private:
  Arena memory_;
  std::map<Key, Stored> copies_;
};

}  // namespace lockstep::model
