#include "model/snapshot.h"

#include <algorithm>
#include <cstring>

namespace lockstep::model {

namespace {

constexpr size_t kAlignment = 64, kBlock = size_t{1} << 20;

struct Block {
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
    total += (parameters.stored(key.first, key.second).bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  memory_.reserve(total);
  std::vector<Block> blocks;
  for (const auto& [key, offset] : offsets) {
    const Stored from = parameters.stored(key.first, key.second);
    auto* to = static_cast<char*>(memory_.at(offset, from.bytes, "a tensor's copy"));
    copies_.emplace(key, Stored{to, from.dtype, from.bytes});
    for (size_t done = 0; done < from.bytes; done += kBlock) {
      blocks.push_back({to + done, static_cast<const char*>(from.data) + done, std::min(kBlock, from.bytes - done)});
    }
  }
  queue.pool().forEach(static_cast<int64_t>(blocks.size()), [&](int64_t i, int) {
    const Block& block = blocks[static_cast<size_t>(i)];
    std::memcpy(block.to, block.from, block.bytes);
  });
}

}  // namespace lockstep::model
