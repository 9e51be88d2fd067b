#include "comm/local/local.h"

#include <time.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "comm/local/world.h"
#include "comm/tree_sum.h"
#include "core/thread_pool.h"
#include "core/work_clock.h"

namespace lockstep::comm {

namespace local {
namespace {

constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kSecond = 1'000 * kMillisecond;
// A long wait looks this often for ranks that cannot come.
constexpr int64_t kLookNanoseconds = 50 * kMillisecond;
// A copy looks this often whether the world is still alive.
constexpr int64_t kCopyBytes = int64_t{64} << 20;
// Slices of a sum begin at whole cache lines.
constexpr int64_t kSliceFloats = 16;
// An all-reduce sums and spreads so much at a time.
constexpr int64_t kBlockFloats = 4096;

struct Slice {
  int64_t begin = 0, count = 0;
};

Slice sliceOf(int64_t count, int ranks, int rank) {
  const int64_t each = ((count + ranks - 1) / ranks + kSliceFloats - 1) / kSliceFloats * kSliceFloats;
  const int64_t begin = std::min(count, rank * each);
  return {begin, std::min(each, count - begin)};
}

std::string seconds(int64_t nanoseconds) {
  const std::string text = std::to_string(static_cast<double>(nanoseconds) / kSecond);
  return text.substr(0, text.find('.') + 2) + " s";
}

// A collective is a few meetings of all members. Between the first and the last everybody may read what the others have
// published (Member) and read, in an all-reduce also write, the buffers it points to. A member that throws first waits
// until nobody does any more.
class LocalCommunicator final : public Communicator {
 public:
  LocalCommunicator(std::shared_ptr<Group> group, int rank)
      : Communicator(rank, group->size(), group->name),
        group_(std::move(group)),
        world_(*group_->world),
        me_(group_->members[static_cast<size_t>(rank)]) {}

  ~LocalCommunicator() override { me_.left.store(true); }

  void progress() override { world_.stamp(me_.worldRank); }

  void abort(const std::string& reason) override {
    world_.fail("RANK_ABORTED", "group '" + name() + "': aborted by " + group_->activity(rank()) + ": " + reason);
  }

 protected:
  [[noreturn]] void fail(const std::string& code, const Call& call, const std::string& message) override {
    world_.fail(code, inCall(call, message));
    throw world_.cause(where(call));
  }

  void runAllGather(const Call& call, const void* send, void* receive) override {
    enter(call, [&] { me_.send = send, me_.receive = receive; });
    const int64_t bytes = call.count * bytesOf(call.element);
    char* const to = static_cast<char*>(receive);
    copy(to + rank() * bytes, send, bytes);
    for (int step = 1; step < size(); ++step) {
      const int peer = (rank() + step) % size();
      copy(to + peer * bytes, member(peer).send, bytes);
    }
    countReceived((size() - 1) * bytes);
    countSent((size() - 1) * bytes);
    leave();
  }

  void runAllGatherPieces(const Call& call, std::span<const Piece> pieces, void* receive) override {
    enter(call, [&] { me_.pieces = pieces; });
    checkPieces(call);
    for (int step = 0; step < size(); ++step) {
      const int peer = (rank() + step) % size();
      for (const Piece& piece : member(peer).pieces) {
        copy(static_cast<char*>(receive) + piece.offset, piece.data, piece.bytes);
        if (peer == rank()) {
          countSent((size() - 1) * piece.bytes);
        } else {
          countReceived(piece.bytes);
        }
      }
    }
    leave();
  }

  void runReduceScatter(const Call& call, const float* send, float* receive) override {
    flushDenormals();
    enter(call, [&] { me_.send = send, me_.receive = receive; });
    sumAll(rank() * call.count, receive, call.count);
    countReceived((size() - 1) * call.count * 4);
    countSent((size() - 1) * call.count * 4);
    leave();
  }

  void runReduceScatterPieces(const Call& call, float* buffer, std::span<const Share> shares) override {
    flushDenormals();
    enter(call, [&] { me_.send = buffer, me_.shares = shares; });
    checkSameShares(call);
    int64_t own = 0, others = 0;
    for (const Share& share : shares) {
      if (share.owner == rank()) sumAll(share.offset, buffer + share.offset, share.count);
      (share.owner == rank() ? own : others) += share.count;
    }
    countReceived((size() - 1) * own * 4);
    countSent(others * 4);
    leave();
  }

  // Every rank sums a slice, block by block, into its own buffer and from there, while the block is in a cache, into
  // the others': of this slice nobody else reads or writes.
  void runAllReduce(const Call& call, const float* send, float* receive) override {
    flushDenormals();
    enter(call, [&] { me_.send = send, me_.receive = receive; });
    const Slice mine = sliceOf(call.count, size(), rank());
    for (int64_t begin = mine.begin, end = mine.begin + mine.count; begin < end; begin += kBlockFloats) {
      const int64_t count = std::min(kBlockFloats, end - begin);
      sumAll(begin, receive + begin, count);
      for (int step = 1; step < size(); ++step) {
        float* const other = static_cast<float*>(member((rank() + step) % size()).receive);
        copy(other + begin, receive + begin, count * 4);
      }
    }
    const int64_t bytes = ((size() - 1) * mine.count + call.count - mine.count) * 4;
    countReceived(bytes);
    countSent(bytes);
    leave();
  }

  void runBroadcast(const Call& call, void* data) override {
    enter(call, [&] { me_.send = data; });
    const int64_t bytes = call.count * bytesOf(call.element);
    if (rank() == call.root) {
      countSent((size() - 1) * bytes);
    } else {
      copy(data, member(call.root).send, bytes);
      countReceived(bytes);
    }
    leave();
  }

  void runBarrier(const Call& call) override {
    enter(call, [] {});
    leave();
  }

  std::unique_ptr<Communicator> runSplit(const Call& call, int colour, int key) override {
    enter(call, [&] { me_.colour = colour, me_.key = key; });
    std::vector<int> order;
    for (int i = 0; i < size(); ++i) {
      if (member(i).colour == colour) order.push_back(i);
    }
    const int leader = order.front();
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return member(a).key < member(b).key; });
    if (colour >= 0 && leader == rank()) {
      std::vector<int> worldRanks;
      for (const int i : order) worldRanks.push_back(member(i).worldRank);
      me_.created = std::make_shared<Group>(
          group_->world, name() + "/" + std::string(call.site) + "." + std::to_string(colour), worldRanks);
    }
    meet();
    std::shared_ptr<Group> group = member(leader).created;
    leave();
    me_.created = nullptr;
    if (colour < 0) return nullptr;
    const auto place = std::find(order.begin(), order.end(), rank()) - order.begin();
    return std::make_unique<LocalCommunicator>(std::move(group), static_cast<int>(place));
  }

  void runExchange(std::span<const Outgoing> outgoing, std::span<const Incoming> incoming, std::string_view site,
                   Matches* matches) override {
    Exchange x{outgoing, incoming, site, matches, {}, {}};
    x.sent.resize(outgoing.size());
    x.received.resize(incoming.size());
    const Call first = !outgoing.empty()   ? callOf(outgoing[0], site)
                       : !incoming.empty() ? callOf(incoming[0], site)
                                           : Call{.operation = Operation::kSend, .site = site};
    begin(first, x.sendingTo(), x.receivingFrom());
    while (!x.done()) {
      if (advance(x)) continue;
      move(matches, first);
      await(
          me_.bell, [&] { return canAdvance(x); }, [&](int64_t began) { examinePeers(x, began); });
    }
    move(matches, first);
    end();
  }

  void live(const Call& call) override {
    if (world_.failed()) throw world_.cause(where(call));
    world_.stamp(me_.worldRank);
  }

 private:
  Member& member(int i) { return group_->members[static_cast<size_t>(i)]; }

  std::string inCall(const Call& call, const std::string& message) const {
    return "group '" + name() + "', " + group_->rank(rank()) + ": " + describe(call) + ": " + message;
  }
  std::string where(const Call& call) const {
    return group_->rank(rank()) + " of group '" + name() + "' in " + describe(call);
  }

  // --- the frame of a call -------------------------------------------------------------------------------------------

  void begin(const Call& call, uint64_t sendingTo = 0, uint64_t receivingFrom = 0) {
    if (world_.failed()) throw world_.cause(where(call));
    countThread();
    world_.stamp(me_.worldRank);
    if (!claim(call, sendingTo, receivingFrom)) refuse(call, "another thread is in a call of this handle");
  }

  bool claim(const Call& call, uint64_t sendingTo, uint64_t receivingFrom) {
    const std::lock_guard lock(me_.mutex);
    if (me_.inCall) return false;
    me_.inCall = true;
    ++me_.calls;
    me_.site = call.site;
    me_.call = call;
    me_.call.site = me_.site;
    me_.sendingTo = sendingTo;
    me_.receivingFrom = receivingFrom;
    return true;
  }

  void end() {
    const std::lock_guard lock(me_.mutex);
    me_.inCall = false;
    me_.sendingTo = me_.receivingFrom = 0;
  }

  // Ends the call with the world's first cause, once nobody uses this rank's buffers any more.
  [[noreturn]] void raise() {
    me_.accessing.store(false);
    for (int i = 0; i < size(); ++i) {
      while (member(i).accessing.load()) {
        const timespec pause{0, 50'000};
        nanosleep(&pause, nullptr);
      }
    }
    const Error error = world_.cause(where(me_.call));
    end();
    throw error;
  }

  [[noreturn]] void mismatch(const std::string& message) {
    world_.fail("COLLECTIVE_MISMATCH", "group '" + name() + "': " + message);
    raise();
  }

  // From here on others' buffers may be used. A rank that raises has set `failed` before it looks at `accessing`:
  // either it sees this rank at it and waits, or this rank sees the failure.
  void access() {
    me_.accessing.store(true);
    if (world_.failed()) raise();
  }

  // Waits at a bell until ready(). Now and then examine(began) looks for ranks that cannot come and kills the world.
  template <class Ready, class Examine>
  void await(Bell& bell, const Ready& ready, const Examine& examine) {
    const auto done = [&] { return ready() || world_.failed(); };
    if (!done()) {
      const WorkClock::Span span(&WorkTimes::waiting);
      const int64_t began = nowNanoseconds(), look = std::min(kLookNanoseconds, world_.timeout() / 8 + 1);
      bool long_ = false;
      while (!bell.wait(done, nowNanoseconds() + look)) {
        if (!long_) world_.waitsOf(me_.worldRank).fetch_add(1);
        long_ = true;
        examine(began);
      }
      if (long_) world_.waitsOf(me_.worldRank).fetch_sub(1);
    }
    if (!ready()) raise();
  }

  // When a member that is waited for since `began` was last seen alive.
  int64_t aliveAt(int i, int64_t began) { return std::max(began, world_.stampOf(member(i).worldRank)); }

  // Whether that is too long ago. Who waits for others itself is blamed later than who does not, so that the cause is
  // found first.
  bool silent(int i, int64_t began) {
    const int64_t patience = world_.waitsOf(member(i).worldRank).load() > 0 ? world_.timeout() / 4 : 0;
    return nowNanoseconds() - aliveAt(i, began) > world_.timeout() + patience;
  }

  // `who` cannot be waited for any longer; `expected` says what for.
  void reportAbsent(const char* code, const std::vector<int>& who, const std::string& expected) {
    std::string text = "group '" + name() + "': " + expected;
    for (const int i : who) text += "; " + group_->activity(i);
    if (std::strcmp(code, "RANK_LEFT") == 0) {
      text += ": it has left the group";
    } else {
      text += ": nothing came for " + seconds(world_.timeout()) +
              ", neither a call nor progress(); let long computations call progress(), or raise the timeout";
    }
    world_.fail(code, text);
  }

  // --- collectives ---------------------------------------------------------------------------------------------------

  // Begins, has publish() write what the others need, and meets them. From here until leave() their memory may be used.
  template <class Publish>
  void enter(const Call& call, const Publish& publish) {
    begin(call);
    publish();
    me_.entered.fetch_add(1);
    meet();
    for (int i = 0; i < size(); ++i) {
      if (member(i).call != me_.call) reportDifferent();
    }
  }

  void leave() {
    arrive();
    end();
  }

  void meet() {
    arrive();
    access();
  }

  void arrive() {
    me_.accessing.store(false);
    world_.stamp(me_.worldRank);
    const uint64_t meeting = ++meeting_, all = meeting * static_cast<uint64_t>(size());
    me_.meetings.store(meeting);
    if (group_->arrivals.fetch_add(1) + 1 == all) return group_->bell.ring();
    await(
        group_->bell, [&] { return group_->arrivals.load(std::memory_order_acquire) >= all; },
        [&](int64_t began) { examineMissing(meeting, began); });
  }

  void examineMissing(uint64_t meeting, int64_t began) {
    std::vector<int> gone, late;
    int64_t alive = nowNanoseconds();
    for (int i = 0; i < size(); ++i) {
      const bool left = member(i).left.load();
      if (member(i).meetings.load() >= meeting) continue;
      if (left) gone.push_back(i);
      if (silent(i, began)) late.push_back(i);
      alive = std::min(alive, aliveAt(i, began));
    }
    world_.inherit(me_.worldRank, alive);
    const std::string expected = "expected " + describe(me_.call) + " of all " + std::to_string(size()) + " ranks";
    if (!gone.empty()) {
      reportAbsent("RANK_LEFT", gone, expected);
    } else if (!late.empty()) {
      reportAbsent("RANK_MISSING", late, expected);
    }
  }

  // Expected is what most ranks call, or the lowest of as many.
  [[noreturn]] void reportDifferent() {
    std::vector<std::vector<int>> alike;
    for (int i = 0; i < size(); ++i) {
      const auto same = std::find_if(alike.begin(), alike.end(),
                                     [&](const auto& ranks) { return member(ranks[0]).call == member(i).call; });
      if (same == alike.end()) {
        alike.push_back({i});
      } else {
        same->push_back(i);
      }
    }
    std::stable_sort(alike.begin(), alike.end(), [](const auto& a, const auto& b) { return a.size() > b.size(); });
    std::string text;
    for (const auto& ranks : alike) {
      text += (text.empty() ? "ranks make different calls: expected " : "; received ") +
              describe(member(ranks[0]).call) + " from " + group_->ranks(ranks);
    }
    mismatch(text);
  }

  // No two pieces may claim the same byte.
  void checkPieces(const Call& call) {
    struct Claim {
      int64_t begin, end;
      int rank;
    };
    std::vector<Claim> claims;
    for (int i = 0; i < size(); ++i) {
      for (const Piece& piece : member(i).pieces) {
        if (piece.bytes > 0) claims.push_back({piece.offset, piece.offset + piece.bytes, i});
      }
    }
    std::sort(claims.begin(), claims.end(), [](const Claim& a, const Claim& b) { return a.begin < b.begin; });
    for (size_t i = 1; i < claims.size(); ++i) {
      const Claim &a = claims[i - 1], &b = claims[i];
      if (b.begin >= a.end) continue;
      mismatch(describe(call) + ": expected pieces that do not overlap, received bytes " + std::to_string(a.begin) +
               ".." + std::to_string(a.end) + " from " + group_->rank(a.rank) + " and " + std::to_string(b.begin) +
               ".." + std::to_string(b.end) + " from " + group_->rank(b.rank));
    }
  }

  void checkSameShares(const Call& call) {
    const auto text = [](std::span<const Share> shares, size_t i) {
      if (i == shares.size()) return std::string("no further share");
      return std::to_string(shares[i].count) + " elements at offset " + std::to_string(shares[i].offset) +
             " for rank " + std::to_string(shares[i].owner);
    };
    const std::span<const Share> expected = member(0).shares, mine = me_.shares;
    const auto [a, b] = std::mismatch(expected.begin(), expected.end(), mine.begin(), mine.end());
    if (a == expected.end() && b == mine.end()) return;
    const auto i = static_cast<size_t>(a - expected.begin());
    mismatch(describe(call) + ": expected share " + std::to_string(i) + " to be " + text(expected, i) + ", as of " +
             group_->rank(0) + ", received " + text(mine, i) + " from " + group_->rank(rank()));
  }

  // to = tree over ranks of send[first ..].
  void sumAll(int64_t first, float* to, int64_t count) {
    if (size() == 1) return copy(to, static_cast<const float*>(me_.send) + first, count * 4);
    const float* addends[kMaxRanks];
    for (int i = 0; i < size(); ++i) addends[i] = static_cast<const float*>(member(i).send) + first;
    if (count > 0) treeSum(addends, size(), to, count);
  }

  void copy(void* to, const void* from, int64_t bytes) {
    if (to == from) return;
    for (int64_t done = 0; done < bytes; done += kCopyBytes) {
      if (world_.failed()) raise();
      std::memcpy(static_cast<char*>(to) + done, static_cast<const char*>(from) + done,
                  static_cast<size_t>(std::min(kCopyBytes, bytes - done)));
    }
  }

  // --- messages ------------------------------------------------------------------------------------------------------

  // The messages of one call. Only the first unfinished message to, or from, each rank can move.
  struct Exchange {
    enum State : uint8_t { kWaiting, kPosted, kDone };

    std::span<const Outgoing> outgoing;
    std::span<const Incoming> incoming;
    std::string_view site;
    Matches* matches;
    std::vector<State> sent, received;

    bool done() const { return sendingTo() == 0 && receivingFrom() == 0; }
    uint64_t sendingTo() const {
      uint64_t ranks = 0;
      for (size_t i = 0; i < sent.size(); ++i) ranks |= sent[i] == kDone ? 0 : bit(outgoing[i].to);
      return ranks;
    }
    uint64_t receivingFrom() const {
      uint64_t ranks = 0;
      for (size_t i = 0; i < received.size(); ++i) ranks |= received[i] == kDone ? 0 : bit(incoming[i].from);
      return ranks;
    }
  };

  static uint64_t bit(int rank) { return uint64_t{1} << rank; }

  // A message's number is that of its channel.
  Call callOf(const Outgoing& m, std::string_view site) {
    return {Operation::kSend, m.element, m.count, m.to, group_->channel(rank(), m.to).taken.load(), site};
  }
  Call callOf(const Incoming& m, std::string_view site) {
    return {Operation::kReceive, m.element, m.count, m.from, group_->channel(m.from, rank()).taken.load(), site};
  }

  // visit(i) for the first unfinished message of each rank; true when one of them says so.
  template <class Messages, class Peer, class Visit>
  static bool anyHead(const Messages& messages, const std::vector<typename Exchange::State>& states, const Peer& peer,
                      const Visit& visit) {
    uint64_t seen = 0;
    bool any = false;
    for (size_t i = 0; i < states.size(); ++i) {
      const uint64_t ranks = bit(peer(messages[i]));
      if (states[i] == Exchange::kDone || (seen & ranks) != 0) continue;
      seen |= ranks;
      any = visit(i) || any;
    }
    return any;
  }
  template <class Visit>
  static bool anySendable(const Exchange& x, const Visit& visit) {
    return anyHead(
        x.outgoing, x.sent, [](const Outgoing& m) { return m.to; }, visit);
  }
  template <class Visit>
  static bool anyReceivable(const Exchange& x, const Visit& visit) {
    return anyHead(
        x.incoming, x.received, [](const Incoming& m) { return m.from; }, visit);
  }

  static bool pending(const Channel& c) { return c.posted.load() != c.taken.load(); }

  bool canAdvance(const Exchange& x) {
    return anySendable(x, [&](size_t i) { return !pending(group_->channel(rank(), x.outgoing[i].to)); }) ||
           anyReceivable(x, [&](size_t i) { return pending(group_->channel(x.incoming[i].from, rank())); });
  }

  // Moves what can move; false when nothing could.
  bool advance(Exchange& x) {
    const bool sent = anySendable(x, [&](size_t i) {
      if (x.sent[i] == Exchange::kWaiting) {
        post(x.outgoing[i], x.site);
        x.sent[i] = Exchange::kPosted;
        return true;
      }
      if (pending(group_->channel(rank(), x.outgoing[i].to))) return false;
      x.sent[i] = Exchange::kDone;
      return true;
    });
    const bool received = anyReceivable(x, [&](size_t i) {
      if (!pending(group_->channel(x.incoming[i].from, rank()))) return false;
      x.received[i] = Exchange::kDone;
      take(i, x);
      return true;
    });
    return sent || received;
  }

  void post(const Outgoing& message, std::string_view site) {
    Channel& channel = group_->channel(rank(), message.to);
    channel.site = site;
    channel.call = callOf(message, channel.site);
    channel.data = message.data;
    channel.posted.fetch_add(1);
    member(message.to).bell.ring();
    if (message.to != rank()) countSent(message.count * bytesOf(message.element));
  }

  void take(size_t i, const Exchange& x) {
    const Incoming& message = x.incoming[i];
    Channel& channel = group_->channel(message.from, rank());
    access();
    if (channel.call.count != message.count || channel.call.element != message.element) {
      mismatch("message from " + group_->rank(message.from) + " to " + group_->rank(rank()) + ": expected " +
               describe(callOf(message, x.site)) + ", received " + describe(channel.call));
    }
    const int64_t bytes = message.count * bytesOf(message.element);
    copy(message.data, channel.data, bytes);
    me_.accessing.store(false);
    {
      // Before the sender goes on: it may look at once for what this rank still waits for.
      const std::lock_guard lock(me_.mutex);
      me_.receivingFrom = x.receivingFrom();
    }
    if (x.matches != nullptr) x.matches->meet(i);
    channel.taken.fetch_add(1);
    member(message.from).bell.ring();
    if (message.from != rank()) countReceived(bytes);
  }

  // What it throws ends the call once nobody uses this rank's buffers any more.
  void move(Matches* matches, const Call& call) {
    if (matches == nullptr) return;
    try {
      matches->move();
      return;
    } catch (const Error& error) {
      world_.fail(error.code(), inCall(call, error.what()));
    } catch (const std::exception& error) {
      abort(error.what());
    }
    raise();
  }

  // A rank that has left, has entered a collective that needs this one, or waits for this one the same way, will not
  // serve a message of this call.
  void examinePeers(const Exchange& x, int64_t began) {
    const uint64_t sending = x.sendingTo(), receiving = x.receivingFrom();
    int64_t alive = nowNanoseconds();
    for (int i = 0; i < size(); ++i) {
      if (i == rank() || ((sending | receiving) & bit(i)) == 0) continue;
      const bool sends = (sending & bit(i)) != 0;
      const std::string expected = "expected " + describe(sends ? firstTo(x, i) : firstFrom(x, i)) + " (of " +
                                   group_->rank(rank()) + ") to be answered";
      const bool left = member(i).left.load(), elsewhere = member(i).entered.load() > me_.entered.load();
      const bool crossed = waitsAlike(i, sending, receiving), late = silent(i, began);
      if (canAdvance(x)) return;
      if (elsewhere || crossed) {
        world_.fail("COLLECTIVE_MISMATCH",
                    "group '" + name() + "': " + expected + ", received none: " + group_->activity(i) + " waits for " +
                        group_->rank(rank()) + "; ranks that send to each other use one exchange");
      } else if (left || late) {
        reportAbsent(left ? "RANK_LEFT" : "RANK_MISSING", {i}, expected);
      }
      alive = std::min(alive, aliveAt(i, began));
    }
    world_.inherit(me_.worldRank, alive);
  }

  Call firstTo(const Exchange& x, int peer) {
    size_t i = 0;
    while (x.outgoing[i].to != peer || x.sent[i] == Exchange::kDone) ++i;
    return callOf(x.outgoing[i], x.site);
  }
  Call firstFrom(const Exchange& x, int peer) {
    size_t i = 0;
    while (x.incoming[i].from != peer || x.received[i] == Exchange::kDone) ++i;
    return callOf(x.incoming[i], x.site);
  }

  // Both only send to each other, or both only receive.
  bool waitsAlike(int peer, uint64_t sending, uint64_t receiving) {
    Member& other = member(peer);
    const bool sends = (sending & bit(peer)) != 0, receives = (receiving & bit(peer)) != 0;
    const std::lock_guard lock(other.mutex);
    const bool otherSends = (other.sendingTo & bit(rank())) != 0;
    const bool otherReceives = (other.receivingFrom & bit(rank())) != 0;
    if (receives) return !sends && otherReceives && !otherSends;
    return !otherReceives && pending(group_->channel(peer, rank()));
  }

  std::shared_ptr<Group> group_;
  World& world_;
  Member& me_;
  uint64_t meeting_ = 0;
};

}  // namespace
}  // namespace local

std::vector<std::unique_ptr<Communicator>> localWorld(int ranks, const LocalOptions& options) {
  if (ranks < 1 || ranks > kMaxRanks || !(options.timeoutSeconds > 0)) {
    throw Error("RANKS_INVALID", "group '" + options.name + "': expected 1.." + std::to_string(kMaxRanks) +
                                     " ranks and a timeout above 0 s, got " + std::to_string(ranks) + " ranks and " +
                                     std::to_string(options.timeoutSeconds) + " s");
  }
  std::vector<int> members(static_cast<size_t>(ranks));
  for (int i = 0; i < ranks; ++i) members[static_cast<size_t>(i)] = i;
  auto world = std::make_shared<local::World>(ranks, static_cast<int64_t>(options.timeoutSeconds * local::kSecond));
  auto group = std::make_shared<local::Group>(std::move(world), options.name, members);
  std::vector<std::unique_ptr<Communicator>> handles;
  for (int i = 0; i < ranks; ++i) handles.push_back(std::make_unique<local::LocalCommunicator>(group, i));
  return handles;
}

}  // namespace lockstep::comm
