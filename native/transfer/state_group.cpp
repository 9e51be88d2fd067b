#include "transfer/state_group.h"

#include <algorithm>
#include <chrono>

#include "core/error.h"
#include "core/range.h"

namespace lockstep::transfer {

namespace {

double secondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

StateGroup::StateGroup(std::string name, Arena& arena, HostRoom& host, const std::atomic<bool>* live)
    : name_(std::move(name)), arena_(arena), host_(host), live_(live) {}

uint64_t StateGroup::issue(Kind kind) {
  const std::lock_guard lock(order_);
  outstanding_[static_cast<size_t>(kind)].insert(++issued_);
  return issued_;
}

void StateGroup::await(Kind kind, uint64_t ticket) {
  const auto& others = outstanding_[kind == Kind::kUse ? 1 : 0];
  std::unique_lock lock(order_);
  ended_.wait(lock, [&] { return others.empty() || *others.begin() > ticket; });
}

void StateGroup::end(Kind kind, uint64_t ticket) {
  {
    const std::lock_guard lock(order_);
    outstanding_[static_cast<size_t>(kind)].erase(ticket);
  }
  ended_.notify_all();
}

void StateGroup::aim(Place to, const std::string& folder) {
  const Place from = place();
  if (from == Place::kDevice) backing_.reset();
  aim_ = to;
  if (to == from || to == Place::kDevice) return;
  aim_ = from;
  if (from != Place::kDevice || (to == Place::kDropped && live_ == nullptr)) {
    throw Error("STATE_MOVE_INVALID",
                "'" + name_ + "' cannot go from " + nameOf(from) + " to " + nameOf(to) +
                    (from == Place::kDevice ? ": only gradients can be dropped" : "; move it to the device first"));
  }
  if (to == Place::kDropped && *live_) {
    throw Error("GRADIENTS_LIVE",
                "the gradients have not been used by a step, so dropping them would lose them; step first, or move "
                "them to the host");
  }
  if (to == Place::kHost) backing_ = hostBacking(name_, host_, arena_.memory());
  if (to == Place::kFile) backing_ = fileBacking(name_, arena_.planned(), folder, arena_.memory());
  aim_ = to;
  place_ = to;
}

bool StateGroup::arrived() const {
  return arena_.absent() == (leaving() ? arena_.planned() : 0);
}

size_t StateGroup::nextChunk(size_t bytes) const {
  const size_t absent = arena_.absent();
  if (leaving()) return std::min(bytes, arena_.planned() - absent);
  // From the end: what is absent stays one run of bytes from the start.
  return absent == 0 ? 0 : absent - (absent - 1) / bytes * bytes;
}

void StateGroup::moveChunk(size_t bytes) {
  const Range range((leaving() ? "evict " : "restore ") + name_);
  const auto start = std::chrono::steady_clock::now();
  const size_t absent = arena_.absent(), moved = nextChunk(bytes);
  if (leaving()) {
    if (backing_) backing_->put(absent, arena_.data() + absent, moved);
    arena_.setAbsent(absent + moved);
  } else {
    arena_.setAbsent(absent - moved);
    try {
      if (backing_) backing_->take(absent - moved, arena_.data() + absent - moved, moved);
    } catch (...) {
      arena_.setAbsent(absent);
      throw;
    }
  }
  {
    const std::lock_guard lock(counting_);
    (leaving() ? counts_.offloadSeconds : counts_.restoreSeconds) += secondsSince(start);
    if (backing_) (leaving() ? counts_.offloadBytes : counts_.restoreBytes) += static_cast<int64_t>(moved);
    if (!backing_ && leaving()) counts_.droppedBytes += static_cast<int64_t>(moved);
  }
  if (arrived() && !leaving()) backing_.reset();
}

Counts StateGroup::counts() const {
  const std::lock_guard lock(counting_);
  return counts_;
}

namespace {

// The moves of one direction, one group after the other.
struct Direction {
  std::vector<Move> moves;
  size_t next = 0, moved = 0;

  bool done() const { return next == moves.size(); }
  size_t nextChunk(size_t bytes) const { return moves[next].group->nextChunk(bytes); }
  void chunk(size_t bytes) {
    const Move& move = moves[next];
    moved += nextChunk(bytes);
    if (!move.group->arrived()) move.group->moveChunk(bytes);
    if (!move.group->arrived()) return;
    move.group->end(StateGroup::Kind::kMove, move.ticket);
    ++next;
  }
};

}  // namespace

void exchange(const std::shared_future<void>& ready, const std::vector<Move>& moves, size_t chunkBytes,
              const std::string& folder, const std::atomic<bool>& cancelled) {
  Direction away, back;
  try {
    if (ready.valid()) ready.get();
    for (const Move& move : moves) move.group->await(StateGroup::Kind::kMove, move.ticket);
    for (const Move& move : moves) {
      move.group->aim(move.to, folder);
      (move.group->leaving() ? away : back).moves.push_back(move);
    }
    while (!away.done() || !back.done()) {
      if (cancelled) throw Error("ABORTED", "the device was closed while state was moving");
      // What comes takes only room that was made.
      const bool leave = !away.done() && (back.done() || back.moved + back.nextChunk(chunkBytes) > away.moved);
      (leave ? away : back).chunk(chunkBytes);
    }
  } catch (...) {
    for (const Move& move : moves) move.group->end(StateGroup::Kind::kMove, move.ticket);
    throw;
  }
}

}  // namespace lockstep::transfer
