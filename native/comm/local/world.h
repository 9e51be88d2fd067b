// What the ranks of one process share: a world, which is alive or has a first cause of failure, and its groups.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "core/error.h"
#include "core/wait.h"

namespace lockstep::comm::local {

struct Group;

class World {
 public:
  World(int ranks, int64_t timeoutNanoseconds);

  bool failed() const { return failed_.load(); }
  // Keeps the first cause and wakes everybody.
  void fail(const std::string& code, const std::string& message);
  // The first cause; `where` says which call of which rank throws it.
  Error cause(const std::string& where);

  int64_t timeout() const { return timeout_; }
  void stamp(int rank) { lives_[rank].stamp.store(nowNanoseconds(), std::memory_order_relaxed); }
  // A rank that waits lives as long as those that it waits for.
  void inherit(int rank, int64_t stamp) {
    std::atomic<int64_t>& own = lives_[rank].stamp;
    int64_t seen = own.load(std::memory_order_relaxed);
    while (seen < stamp && !own.compare_exchange_weak(seen, stamp, std::memory_order_relaxed)) {
    }
  }
  int64_t stampOf(int rank) const { return lives_[rank].stamp.load(std::memory_order_relaxed); }
  // Calls of a rank that have waited for others for a while.
  std::atomic<int>& waitsOf(int rank) { return lives_[rank].waits; }

  void add(Group*);
  void remove(Group*);
  // ", now in all-reduce 3 ... of group 'world/a.0'" for every call that a rank is in.
  std::string callsOf(int rank);

 private:
  struct alignas(64) Life {
    std::atomic<int64_t> stamp{0};
    std::atomic<int> waits{0};
  };

  std::vector<Life> lives_;
  int64_t timeout_;
  std::atomic<bool> failed_{false};
  std::mutex causeMutex_, groupsMutex_;
  std::string code_, message_;
  std::vector<Group*> groups_;
};

// One rank in a group. Its owner writes the first block before it arrives; the others read it between the first and the
// last meeting of a collective.
struct alignas(64) Member {
  int worldRank = 0;
  Call call;  // `call.site` points to `site`
  std::string site;
  const void* send = nullptr;
  void* receive = nullptr;
  std::span<const Piece> pieces;
  std::span<const Share> shares;
  int colour = 0, key = 0;
  std::shared_ptr<Group> created;

  // call, site and what follows against those who look for the cause of a failure.
  std::mutex mutex;
  uint64_t calls = 0;
  bool inCall = false;
  uint64_t sendingTo = 0, receivingFrom = 0;  // ranks, as bits, of messages that are not through

  alignas(64) std::atomic<uint64_t> meetings{0};  // arrived at, in this group
  std::atomic<uint64_t> entered{0};               // collectives
  std::atomic<bool> accessing{false};             // uses others' buffers, which must stay
  std::atomic<bool> left{false};
  Bell bell;  // a message came, or went
};

// The message from one rank to another; the sender's until posted > taken, then the receiver's until it is taken.
struct alignas(64) Channel {
  std::atomic<uint64_t> posted{0}, taken{0};
  Call call;
  std::string site;
  const void* data = nullptr;
};

struct Group {
  Group(std::shared_ptr<World>, std::string name, const std::vector<int>& worldRanks);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  int size() const { return static_cast<int>(members.size()); }
  Channel& channel(int from, int to) { return channels[static_cast<size_t>(from * size() + to)]; }
  // "rank 2", with its rank in the world where that differs.
  std::string rank(int member) const;
  std::string ranks(const std::vector<int>& list) const;
  // What a rank does here, and does elsewhere.
  std::string activity(int member);

  std::shared_ptr<World> world;
  std::string name;
  std::vector<Member> members;
  std::vector<Channel> channels;
  alignas(64) std::atomic<uint64_t> arrivals{0};  // at meetings, by all
  Bell bell;                                      // a meeting is complete
};

}  // namespace lockstep::comm::local
