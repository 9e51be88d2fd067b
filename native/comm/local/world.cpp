#include "comm/local/world.h"

#include <algorithm>
#include <utility>

namespace lockstep::comm::local {

World::World(int ranks, int64_t timeoutNanoseconds)
    : lives_(static_cast<size_t>(ranks)), timeout_(timeoutNanoseconds) {}

void World::fail(const std::string& code, const std::string& message) {
  {
    const std::lock_guard lock(causeMutex_);
    if (failed_.load()) return;
    code_ = code;
    message_ = message;
    failed_.store(true);
  }
  const std::lock_guard lock(groupsMutex_);
  for (Group* group : groups_) {
    group->bell.ring();
    for (Member& member : group->members) member.bell.ring();
  }
}

Error World::cause(const std::string& where) {
  const std::lock_guard lock(causeMutex_);
  return Error(code_, message_ + " [" + where + "]");
}

void World::add(Group* group) {
  const std::lock_guard lock(groupsMutex_);
  groups_.push_back(group);
}

void World::remove(Group* group) {
  const std::lock_guard lock(groupsMutex_);
  std::erase(groups_, group);
}

std::string World::callsOf(int rank) {
  std::string text;
  const std::lock_guard lock(groupsMutex_);
  for (Group* group : groups_) {
    for (Member& member : group->members) {
      if (member.worldRank != rank) continue;
      const std::lock_guard memberLock(member.mutex);
      if (member.inCall) text += ", now in " + describe(member.call) + " of group '" + group->name + "'";
    }
  }
  return text;
}

Group::Group(std::shared_ptr<World> shared, std::string label, const std::vector<int>& worldRanks)
    : world(std::move(shared)),
      name(std::move(label)),
      members(worldRanks.size()),
      channels(worldRanks.size() * worldRanks.size()) {
  for (size_t i = 0; i < members.size(); ++i) members[i].worldRank = worldRanks[i];
  world->add(this);
}

Group::~Group() {
  world->remove(this);
}

std::string Group::rank(int member) const {
  const int worldRank = members[static_cast<size_t>(member)].worldRank;
  return "rank " + std::to_string(member) +
         (worldRank == member ? "" : " (" + std::to_string(worldRank) + " of the world)");
}

std::string Group::ranks(const std::vector<int>& list) const {
  std::string text;
  for (const int member : list) text += (text.empty() ? "" : ", ") + rank(member);
  return text;
}

std::string Group::activity(int member) {
  Member& m = members[static_cast<size_t>(member)];
  std::string last = "has made no call in this group";
  {
    const std::lock_guard lock(m.mutex);
    if (m.calls > 0) last = "its last call in this group is " + describe(m.call);
  }
  return rank(member) + " (" + last + world->callsOf(m.worldRank) + ")";
}

}  // namespace lockstep::comm::local
