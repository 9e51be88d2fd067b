#include "model/snapshot.h"

#include <algorithm>
#include <cstring>

namespace lockstep::model {

namespace {

constexpr size_t kAlignment = 64, kBlock = size_t{1} << 20;

struct Chunk {
  char* to;
  const char* from;
  size_t bytes;
};

}  // namespace

Snapshot::Snapshot(const Parameters& parameters, Queue& queue, const std::vector<Key>& tensors)
    : memory_("snapshot", 0) {
  std::map<Key, size_t> offsets;
  size_t total = 0;
  for (const Key& key : tensors) {
    if (!offsets.emplace(key, total).second) continue;
    total += (parameters.stored(key.first, key.second).bytes() + kAlignment - 1) / kAlignment * kAlignment;
  }
  memory_.reserve(total);
  parameters.settle();
  std::vector<Chunk> chunks;
  for (const auto& [key, offset] : offsets) {
    const Stored from = parameters.stored(key.first, key.second);
    const size_t bytes = from.bytes();
    auto* to = static_cast<char*>(memory_.at(offset, bytes, "a tensor's copy"));
    copies_.emplace(key, Stored{to, from.dtype, from.begin, from.end});
    if (!from.memory->isHost()) {
      from.memory->toHost(to, static_cast<const char*>(from.data), bytes);
      continue;
    }
    for (size_t done = 0; done < bytes; done += kBlock) {
      chunks.push_back({to + done, static_cast<const char*>(from.data) + done, std::min(kBlock, bytes - done)});
    }
  }
  queue.pool().forEach(static_cast<int64_t>(chunks.size()), [&](int64_t i, int) {
    const Chunk& chunk = chunks[static_cast<size_t>(i)];
    std::memcpy(chunk.to, chunk.from, chunk.bytes);
  });
}

}  // namespace lockstep::model
