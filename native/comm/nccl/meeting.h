// What ranks tell each other of the buffers of a call, before the control or NCCL moves the bytes.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

namespace lockstep::comm::nccl {

enum class Place : int64_t { kNone, kHost, kGpu };

inline const char* nameOf(Place place) {
  return place == Place::kHost ? "the host" : "its GPU";
}

struct Record {
  Place place = Place::kNone;
  int64_t items = 0;  // of its list of pieces or shares
};
struct Meeting {
  Place place;
  std::vector<Record> records;
};

// Every rank's list, of those of all ranks behind each other. gather(mine, before, all) fetches them: `mine` is the
// rank's own list, to lie behind `before` items.
template <class Item, class Gather>
std::vector<std::vector<Item>> listsOf(std::span<const Item> mine, int rank, const std::vector<Record>& records,
                                       const Gather& gather) {
  std::vector<std::vector<Item>> lists(records.size());
  int64_t items = 0, before = 0;
  for (size_t r = 0; r < records.size(); ++r) {
    if (static_cast<int>(r) == rank) before = items;
    items += records[r].items;
  }
  std::vector<Item> all(static_cast<size_t>(items));
  gather(mine, before, all);
  auto from = all.begin();
  for (size_t r = 0; r < records.size(); from += records[r].items, ++r) lists[r].assign(from, from + records[r].items);
  return lists;
}

// Where the ends of messages lie, of all groups of the process: the control moves bytes between ends on the host, and
// must not be given one end there and one on a GPU.
class Ends {
 public:
  static Ends& all() {
    static Ends ends;
    return ends;
  }

  int64_t newGroup() { return ++groups_; }

  // False when the other end, of as many bytes, has said otherwise.
  bool agree(int64_t group, int from, int to, uint64_t number, Place place, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto [at, first] = said_.try_emplace({group, from, to, static_cast<int64_t>(number)}, place, bytes);
    if (first) return true;
    const auto [other, otherBytes] = at->second;
    said_.erase(at);
    return other == place || otherBytes != bytes;  // the control looks at sizes
  }

  // Of a rank that is gone.
  void forget(int64_t group, int rank) {
    const std::lock_guard lock(mutex_);
    std::erase_if(said_, [&](const auto& said) {
      return said.first[0] == group && (said.first[1] == rank || said.first[2] == rank);
    });
  }

 private:
  std::mutex mutex_;
  std::map<std::array<int64_t, 4>, std::pair<Place, int64_t>> said_;  // by group, sender, receiver and number
  std::atomic<int64_t> groups_{0};
};

}  // namespace lockstep::comm::nccl
