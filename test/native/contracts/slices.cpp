// The executor of slices: every byte arrives where the list says and nothing else is written, the communicator counts
// what the list adds up to, and a bit that changes on the way, or after it, is an error that names it.
#include <atomic>
#include <cstring>

#include "communicator_harness.h"
#include "core/error.h"
#include "harness.h"
#include "transfer/slices.h"

namespace lockstep::contracts {
namespace {

using transfer::Slice;
using transfer::Transfer;

constexpr char kUntouched = 0x5a;

char byteOf(uint64_t seed, int rank, int64_t offset) {
  uint64_t x = seed ^ (static_cast<uint64_t>(rank) << 40) ^ static_cast<uint64_t>(offset);
  x = (x ^ x >> 29) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 32) * 0x94d049bb133111ebu;
  return static_cast<char>(x >> 56);
}

struct Problem {
  uint64_t seed;
  int ranks;
  bool inPlace;
  int64_t bytes;  // of each memory
  std::vector<Slice> slices;
};

std::string tensorName(size_t i) {
  return "layers." + std::to_string(i) + ".up";
}

// Every rank sends the same pieces to the same places of all; in place they are there already.
Problem drawGather(CommunicatorTrial& t) {
  Problem p{t.seed(), static_cast<int>(t.integer(2, 6)), t.integer(0, 1) == 1, 0, {}};
  int64_t end = 0;
  size_t tensors = 0;
  for (int from = 0; from < p.ranks; ++from) {
    const int64_t count = t.integer(0, 4);
    int64_t sourceEnd = 0;
    for (int64_t i = 0; i < count; ++i) {
      const auto gap = [&] { return t.integer(0, 1) * t.integer(1, 70); };
      const int64_t bytes = t.integer(1, 3000);
      const int64_t destination = end + gap(), source = p.inPlace ? destination : sourceEnd + gap();
      for (int to = 0; to < p.ranks; ++to) {
        if (to != from || !p.inPlace)
          p.slices.push_back({tensorName(tensors), from, to, source, destination, bytes, 1, 0, 0});
      }
      ++tensors;
      end = destination + bytes;
      sourceEnd = source + bytes;
    }
  }
  p.bytes = end + 64;
  return p;
}

// Each rank gets what it wants from whom it wants, itself included, in runs at any distance.
Problem drawExchange(CommunicatorTrial& t) {
  Problem p{t.seed(), static_cast<int>(t.integer(1, 6)), false, 0, {}};
  for (int to = 0; to < p.ranks; ++to) {
    int64_t end = 0;
    for (int64_t i = t.integer(0, 12); i > 0; --i) {
      const int64_t bytes = t.integer(1, 400), count = t.integer(0, 2) == 0 ? t.integer(2, 9) : 1;
      const int64_t stride = bytes + t.integer(0, 50), sourceStride = t.integer(1, 500);
      Slice s{tensorName(p.slices.size()),
              static_cast<int>(t.integer(0, p.ranks - 1)),
              to,
              t.integer(0, 900),
              end + t.integer(0, 30),
              bytes,
              count,
              sourceStride,
              stride};
      end = s.destinationEnd();
      p.bytes = std::max({p.bytes, s.sourceEnd(), end});
      p.slices.push_back(s);
    }
  }
  p.bytes += 64;
  return p;
}

struct Memories {
  std::shared_ptr<Arena> source, destination;
};

char* bytesOf(const std::shared_ptr<Arena>& arena) {
  return static_cast<char*>(arena->at(0, arena->planned(), "the test"));
}

Memories memoriesOf(const Problem& p, int rank) {
  Memories m;
  m.source = std::make_shared<Arena>("source", static_cast<size_t>(p.bytes));
  m.destination = p.inPlace ? m.source : std::make_shared<Arena>("destination", static_cast<size_t>(p.bytes));
  std::memset(bytesOf(m.destination), kUntouched, static_cast<size_t>(p.bytes));
  for (int64_t i = 0; i < p.bytes && !p.inPlace; ++i) bytesOf(m.source)[i] = byteOf(p.seed, rank, i);
  for (const Slice& s : p.slices) {
    if (!p.inPlace || s.from != rank) continue;
    for (int64_t i = 0; i < s.bytes; ++i)
      bytesOf(m.source)[s.sourceOffset + i] = byteOf(p.seed, rank, s.sourceOffset + i);
  }
  return m;
}

// Byte by byte, from the list alone.
std::vector<char> expectedOf(const Problem& p, int rank) {
  std::vector<char> expected(static_cast<size_t>(p.bytes), kUntouched);
  const auto put = [&](const Slice& s, int64_t to) {
    for (int64_t run = 0; run < s.count; ++run) {
      for (int64_t i = 0; i < s.bytes; ++i)
        expected[static_cast<size_t>(to + run * s.destinationStride + i)] =
            byteOf(p.seed, s.from, s.sourceOffset + run * s.sourceStride + i);
    }
  };
  for (const Slice& s : p.slices) {
    if (s.to == rank) put(s, s.destinationOffset);
    if (p.inPlace && s.from == rank) put(s, s.sourceOffset);
  }
  return expected;
}

std::vector<int> namesOf(int ranks) {
  std::vector<int> names;
  for (int i = 0; i < ranks; ++i) names.push_back(100 + i);
  return names;
}

void runProblem(CommunicatorTrial& t, const Problem& p, bool gathers) {
  t.note(std::to_string(p.ranks) + " ranks, " + std::to_string(p.slices.size()) + " slices");
  t.expectAllFine(t.run(p.ranks, [&](Rank& rank) {
    const int me = rank.world->rank();
    std::shared_ptr<comm::Communicator> world = std::move(rank.world);
    const Memories m = memoriesOf(p, me);
    Transfer transfer(p.ranks == 1 ? nullptr : world, m.source, m.destination, p.slices, namesOf(p.ranks));
    require(transfer.gathers() == gathers || p.ranks == 1, "what is an all-gather is taken for something else");
    Queue pool(me % 2 + 1, 0);
    for (const bool check : {false, true}) {
      const transfer::TransferResult result = transfer.run(pool, check);
      const std::vector<char> expected = expectedOf(p, me);
      require(std::memcmp(expected.data(), bytesOf(m.destination), expected.size()) == 0, "bytes differ");
      int64_t received = 0, sent = 0;
      for (const Slice& s : p.slices) {
        if (s.from == s.to) continue;
        if (s.to == me) received += s.total();
        if (s.from == me) sent += s.total();
      }
      require(result.receivedBytes == received && result.sentBytes == sent, "the counter differs from the list");
      transfer.verify(pool);
    }
  }));
}

const CommunicatorRegistration kGather("slices.gather", 30, [](CommunicatorTrial& t) {
  Problem p = drawGather(t);
  while (p.slices.empty()) p = drawGather(t);
  runProblem(t, p, true);
});

const CommunicatorRegistration kExchange("slices.exchange", 40, [](CommunicatorTrial& t) {
  Problem p = drawExchange(t);
  // Runs at distances make any list an exchange.
  if (p.ranks > 1) {
    p.slices.push_back({"last", 0, 1, 0, p.bytes, 4, 2, 8, 16});
    p.bytes += 64;
  }
  runProblem(t, p, false);
});

// Changes one bit of what its rank receives, behind the back of both sides.
class Flipping final : public comm::Communicator {
 public:
  Flipping(std::shared_ptr<comm::Communicator> inner, int64_t bit)
      : Communicator(inner->rank(), inner->size(), inner->name()), inner_(std::move(inner)), bit_(bit) {}

  void progress() override { inner_->progress(); }
  void abort(const std::string& reason) override { inner_->abort(reason); }

 protected:
  [[noreturn]] void fail(const std::string& code, const comm::Call&, const std::string& message) override {
    throw Error(code, message);
  }
  void runAllGather(const comm::Call& call, const void* send, void* receive) override {
    inner_->allGather(send, receive, call.count, call.element, call.site);
  }
  void runAllGatherPieces(const comm::Call& call, std::span<const comm::Piece> pieces, void* receive) override {
    inner_->allGatherPieces(pieces, receive, call.count, call.site);
    flip(static_cast<char*>(receive));
  }
  void runReduceScatter(const comm::Call&, const float*, float*) override { unused(); }
  void runReduceScatterPieces(const comm::Call&, float*, std::span<const comm::Share>) override { unused(); }
  void runAllReduce(const comm::Call&, const float*, float*) override { unused(); }
  void runBroadcast(const comm::Call&, void*) override { unused(); }
  void runBarrier(const comm::Call&) override { unused(); }
  std::unique_ptr<comm::Communicator> runSplit(const comm::Call&, int, int) override { unused(); }
  void live(const comm::Call&) override { unused(); }
  void runExchange(std::span<const comm::Outgoing> outgoing, std::span<const comm::Incoming> incoming,
                   std::string_view site, comm::Matches*) override {
    inner_->exchange(outgoing, incoming, site);
    flip(static_cast<char*>(incoming[0].data));
  }

 private:
  void flip(char* data) const { data[bit_ / 8] = static_cast<char>(data[bit_ / 8] ^ 1 << bit_ % 8); }
  [[noreturn]] static void unused() { throw Failure{"a transfer makes no such call"}; }

  std::shared_ptr<comm::Communicator> inner_;
  int64_t bit_;
};

// Rank 0 sends two tensors to all; rank 1 finds a bit of the second changed.
void plantFlippedBit(CommunicatorTrial& t, bool asExchange) {
  const int64_t bytes = t.integer(1, 500);
  std::vector<Slice> slices;
  for (int to = 0; to < 3; ++to) {
    slices.push_back({"first", 0, to, 64, 0, 64, 1, 0, 0});
    slices.push_back({"second", 0, to, 128, asExchange && to == 2 ? 192 : 128, bytes, 1, 0, 0});
  }
  if (asExchange) std::swap(slices[2], slices[3]);  // its first message
  // Of an all-gather the receiver's memory counts, of an exchange the first message.
  const int64_t bit = t.integer(0, bytes * 8 - 1) + (asExchange ? 0 : 128 * 8);
  const auto outcomes = t.run(3, [&](Rank& rank) {
    const int me = rank.world->rank();
    std::shared_ptr<comm::Communicator> world = std::move(rank.world);
    if (me == 1) world = std::make_shared<Flipping>(std::move(world), bit);
    const auto source = std::make_shared<Arena>("source", 1024), destination = std::make_shared<Arena>("to", 1024);
    Transfer transfer(world, source, destination, slices, namesOf(3));
    require(transfer.gathers() == !asExchange, "an all-gather for an exchange");
    Queue pool(1, 0);
    transfer.run(pool, false);  // nobody looks
    transfer.run(pool, true);
    if (me != 1) transfer.run(pool, true);  // the other ranks learn of it at the next call
  });
  t.expectOne(outcomes, 1, "WEIGHTS_DIFFER", {"rank 101", "'second' of rank 100", "expected checksum", "received"});
  for (const int other : {0, 2}) t.expectOne(outcomes, other, "RANK_ABORTED", {"'second' of rank 100"});
}

const CommunicatorRegistration kFlippedGather("slices.flippedBit.gather", 40,
                                              [](CommunicatorTrial& t) { plantFlippedBit(t, false); });
const CommunicatorRegistration kFlippedExchange("slices.flippedBit.exchange", 20,
                                                [](CommunicatorTrial& t) { plantFlippedBit(t, true); });

const CommunicatorRegistration kChanged("slices.changedLater", 10, [](CommunicatorTrial& t) {
  const int64_t at = t.integer(0, 999);
  t.expectAllFine(t.run(2, [&](Rank& rank) {
    const int me = rank.world->rank();
    const auto memory = std::make_shared<Arena>("memory", 2048);
    const std::vector<Slice> slices{{"mine", 0, 1, 0, 0, 1000, 1, 0, 0}, {"yours", 1, 0, 1024, 1024, 1000, 1, 0, 0}};
    Transfer transfer(std::move(rank.world), memory, memory, slices, {4, 5});
    Queue pool(1, 0);
    transfer.run(pool, true);
    transfer.verify(pool);
    bytesOf(memory)[(1 - me) * 1024 + at] = 1;  // what was received is not this rank's to keep
    transfer.verify(pool);
    bytesOf(memory)[me * 1024 + at] = 1;
    std::string code, message;
    try {
      transfer.verify(pool);
    } catch (const Error& error) {
      code = error.code(), message = error.what();
    }
    require(code == "WEIGHTS_CHANGED", "a changed weight was not seen");
    require(message.find(me == 0 ? "rank 4: tensor 'mine'" : "rank 5: tensor 'yours'") != std::string::npos, message);
  }));
});

}  // namespace
}  // namespace lockstep::contracts
