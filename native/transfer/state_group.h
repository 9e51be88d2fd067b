// A group of a model's state (its parameters, gradients or optimizer state: one arena) that can leave the device and
// come back, chunk by chunk, while the rank computes with other groups.
//
// Uses (calls that need the group) and moves happen in the order in which they were issued on the JavaScript thread:
// a use waits for the moves issued before it, a move for the uses issued before it. Nothing else waits.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <future>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "core/arena.h"
#include "transfer/backing.h"

namespace lockstep::transfer {

enum class Place : uint8_t { kDevice, kHost, kFile, kDropped };

inline const char* nameOf(Place place) {
  constexpr const char* kNames[] = {"device", "host", "file", "dropped"};
  return kNames[static_cast<size_t>(place)];
}

// What moving a group has cost so far. Dropped bytes were given up, not copied.
struct Counts {
  int64_t offloadBytes = 0, restoreBytes = 0, droppedBytes = 0;
  double offloadSeconds = 0, restoreSeconds = 0;
};

class StateGroup {
 public:
  // Keeps references. `live`: whether the contents may be other than zero; while they are not they may be given up.
  // Null: they never are.
  StateGroup(std::string name, Arena& arena, HostRoom& host, const std::atomic<bool>* live = nullptr);

  // --- order of uses and moves; tickets are issued on the JavaScript thread ---
  enum class Kind : uint8_t { kUse, kMove };
  uint64_t issue(Kind);
  // Waits until no earlier ticket of the other kind is outstanding.
  void await(Kind, uint64_t ticket);
  void end(Kind, uint64_t ticket);

  // --- moving, on the transfer thread, between await and end of a move ---
  // The group is to go to `place`. Throws Error("STATE_MOVE_INVALID") when it cannot go there from where it is,
  // Error("GRADIENTS_LIVE"), and what backings throw; then nothing has changed.
  void aim(Place, const std::string& folder);
  bool arrived() const;
  // Moves one chunk of at most `bytes` towards the aim. A failure leaves the chunk where it was: whatever has left can
  // be fetched by aiming at the device.
  void moveChunk(size_t bytes);
  // The size of the next chunk; 0 after arrival.
  size_t nextChunk(size_t bytes) const;
  bool leaving() const { return aim_ != Place::kDevice; }

  // --- any thread ---
  const std::string& name() const { return name_; }
  size_t bytes() const { return arena_.planned(); }
  size_t absentBytes() const { return arena_.absent(); }
  // Where what is not on the device is; the device when all of it is there.
  Place place() const { return arena_.absent() == 0 ? Place::kDevice : place_.load(); }
  Counts counts() const;

 private:
  const std::string name_;
  Arena& arena_;
  HostRoom& host_;
  const std::atomic<bool>* const live_;

  std::mutex order_;
  std::condition_variable ended_;
  uint64_t issued_ = 0;
  std::set<uint64_t> outstanding_[2];

  std::atomic<Place> place_{Place::kDevice};
  Place aim_ = Place::kDevice;
  std::unique_ptr<Backing> backing_;
  mutable std::mutex counting_;
  Counts counts_;
};

struct Move {
  StateGroup* group;
  Place to;
  uint64_t ticket;
};

// Makes moves as one exchange: what leaves and what comes take turns, chunk by chunk, so that the device never holds
// more than before or after, and the host at most two chunks more. Each move's ticket ends when its group has
// arrived; a failure or a cancellation ends all and throws. It begins when `ready`, where there is one, is; an error of
// that is one of the exchange.
void exchange(const std::shared_future<void>& ready, const std::vector<Move>& moves, size_t chunkBytes,
              const std::string& folder, const std::atomic<bool>& cancelled);

}  // namespace lockstep::transfer
