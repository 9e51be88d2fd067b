// What correct programs get: the right bytes, the bits of the tree, the traffic; groups used from two threads at once.
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

#include "communicator_program.h"
#include "core/work_clock.h"
#include "harness.h"

namespace lockstep::contracts {
namespace {

using comm::Communicator;
using comm::Element;

void runRandomProgram(CommunicatorTrial& t, int ranks, int steps, int64_t largest) {
  const Program program = drawProgram(t.seed(), ranks, steps, largest);
  t.note(std::to_string(ranks) + " ranks");
  t.expectAllFine(t.run(ranks, [&](Rank& rank) { runProgram(program, rank); }));
}

const CommunicatorRegistration kPrograms("programs", 40, [](CommunicatorTrial& t) {
  runRandomProgram(t, static_cast<int>(t.integer(1, 8)), 25, 3000);
});

const CommunicatorRegistration kLarge("programs.large", 6, [](CommunicatorTrial& t) {
  runRandomProgram(t, static_cast<int>(t.integer(2, 5)), 6, 300'001);
});

const CommunicatorRegistration kSixteen("programs.sixteen", 1,
                                        [](CommunicatorTrial& t) { runRandomProgram(t, 16, 25, 3000); });

// One number per rank, every size of group: the tree has one shape for each.
const CommunicatorRegistration kTree("tree", 1, [](CommunicatorTrial& t) {
  for (const int ranks : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 17, 24, 31, 64}) {
    const uint64_t seed = t.seed();
    t.expectAllFine(t.run(ranks, [&](Rank& rank) {
      constexpr int64_t kCount = 1234;
      Communicator& c = *rank.world;
      std::vector<float> mine, expected, sum(kCount), chunked, shares(kCount);
      for (int64_t i = 0; i < kCount; ++i) {
        std::vector<float> addends;
        for (int r = 0; r < ranks; ++r) addends.push_back(valueOf(seed, r, i));
        mine.push_back(addends[static_cast<size_t>(c.rank())]);
        expected.push_back(plainTree(addends));
      }
      chunked = mine;
      c.allReduce(mine.data(), sum.data(), kCount, "whole");
      for (int64_t begin = 0; begin < kCount; begin += 77) {
        const int64_t count = std::min<int64_t>(77, kCount - begin);
        c.allReduce(chunked.data() + begin, chunked.data() + begin, count, "chunk");
      }
      const int64_t share = kCount / ranks;
      c.reduceScatter(mine.data(), shares.data(), share, "share");
      for (int64_t i = 0; i < kCount; ++i) {
        const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
        const size_t at = static_cast<size_t>(i);
        const std::string where = "element " + std::to_string(i) + " of " + std::to_string(ranks) + " ranks: ";
        require(bits(sum[at]) == bits(expected[at]), where + "all-reduce differs from the tree");
        require(bits(chunked[at]) == bits(expected[at]), where + "chunks change the sum");
        if (i < share) {
          require(bits(shares[at]) == bits(expected[static_cast<size_t>(c.rank() * share + i)]),
                  where + "reduce-scatter differs from the tree");
        }
      }
    }));
  }
});

// Pieces of many tensors, each rank's share of every one: the bits of one all-reduce, whatever the number of ranks.
const CommunicatorRegistration kShares("shares", 1, [](CommunicatorTrial& t) {
  for (const int ranks : {1, 2, 3, 4, 5}) {
    const uint64_t seed = t.seed();
    t.expectAllFine(t.run(ranks, [&](Rank& rank) {
      constexpr int64_t kTensors[] = {640, 1, 33, 5000, 0, 17};
      Communicator& c = *rank.world;
      std::vector<comm::Share> shares;
      int64_t count = 0;
      for (const int64_t tensor : kTensors) {
        const int64_t each = (tensor + ranks - 1) / ranks;
        for (int owner = 0; owner < ranks; ++owner) {
          const int64_t begin = std::min(tensor, owner * each), end = std::min(tensor, begin + each);
          shares.push_back({count + begin, end - begin, owner});
        }
        count += tensor + 3;  // a gap that belongs to nobody
      }
      std::vector<float> buffer;
      for (int64_t i = 0; i < count; ++i) buffer.push_back(valueOf(seed, c.rank(), i));
      std::vector<float> sum(buffer.size());
      c.allReduce(buffer.data(), sum.data(), count, "whole");
      c.reduceScatterPieces(buffer.data(), count, shares, "shares");
      for (const comm::Share& share : shares) {
        const size_t bytes = static_cast<size_t>(share.count) * 4;
        require(share.owner != c.rank() || bytes == 0 ||
                    std::memcmp(buffer.data() + share.offset, sum.data() + share.offset, bytes) == 0,
                "the share at " + std::to_string(share.offset) + " of " + std::to_string(ranks) +
                    " ranks has other bits than the all-reduce");
      }
    }));
  }
});

// The rest of a large buffer is not even there: it costs nothing, and touching it ends the process.
const CommunicatorRegistration kSparse("pieces.sparse", 1, [](CommunicatorTrial& t) {
  t.expectAllFine(t.run(3, [](Rank& rank) {
    constexpr int64_t kBytes = int64_t{1} << 36, kPage = 4096, kFloats = kPage / 4;
    Communicator& c = *rank.world;
    void* const memory = mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    require(memory != MAP_FAILED, "the system reserves no addresses");
    const std::unique_ptr<void, void (*)(void*)> freed(memory, [](void* all) { munmap(all, kBytes); });
    auto* const buffer = static_cast<float*>(memory);
    std::vector<comm::Share> shares;
    std::vector<comm::Piece> own;
    for (int owner = 0; owner < 3; ++owner) {
      shares.push_back({owner * (kBytes / 16), kFloats, owner});
      float* const at = buffer + shares.back().offset;
      require(mprotect(at, kPage, PROT_READ | PROT_WRITE) == 0, "the system refuses a page");
      std::fill_n(at, kFloats, 1.0f);
      if (owner == c.rank()) own.push_back({at, shares.back().offset * 4, kPage});
    }
    c.reduceScatterPieces(buffer, kBytes / 4, shares, "sums");
    c.allGatherPieces(own, buffer, kBytes, "gather");
    for (const comm::Share& share : shares) {
      const float* const at = buffer + share.offset;
      require(std::all_of(at, at + kFloats, [](float x) { return x == 3.0f; }), "a share is not the sum");
    }
  }));
});

const CommunicatorRegistration kTraffic("traffic", 1, [](CommunicatorTrial& t) {
  for (const int ranks : {1, 2, 4}) {
    t.expectAllFine(t.run(ranks, [&](Rank& rank) {
      Communicator& c = *rank.world;
      const int64_t others = ranks - 1;
      std::vector<float> a(4096), b(4096 * 4);
      comm::Traffic before = c.traffic();
      const auto moved = [&](const std::string& what, int64_t received, int64_t sent) {
        const comm::Traffic now = c.traffic();
        require(now.receivedBytes - before.receivedBytes == received && now.sentBytes - before.sentBytes == sent,
                what + ": received " + std::to_string(now.receivedBytes - before.receivedBytes) + " and sent " +
                    std::to_string(now.sentBytes - before.sentBytes) + " bytes, expected " + std::to_string(received) +
                    " and " + std::to_string(sent));
        before = now;
      };
      c.allGather(a.data(), b.data(), 4096, Element::kFloat32, "gather");
      moved("all-gather", others * 16384, others * 16384);
      c.reduceScatter(b.data(), a.data(), 4096, "scatter");
      moved("reduce-scatter", others * 16384, others * 16384);
      c.allReduce(a.data(), a.data(), 4096, "reduce");
      moved("all-reduce", 2 * others * 16384 / ranks, 2 * others * 16384 / ranks);
      c.broadcast(a.data(), 4096, Element::kBFloat16, 0, "broadcast");
      moved("broadcast", c.rank() == 0 ? 0 : 8192, c.rank() == 0 ? others * 8192 : 0);
      const comm::Piece piece{a.data(), c.rank() * 100, 100};
      c.allGatherPieces({&piece, 1}, b.data(), 400, "pieces");
      moved("pieces", others * 100, others * 100);
      const comm::Share halves[] = {{0, 2048, 0}, {2048, 1024, ranks - 1}};
      c.reduceScatterPieces(b.data(), 4096, halves, "shares");
      const int64_t own = (c.rank() == 0 ? 8192 : 0) + (c.rank() == ranks - 1 ? 4096 : 0);
      moved("shares", others * own, 12288 - own);
      const comm::Outgoing to{(c.rank() + 1) % ranks, a.data(), 77, Element::kByte};
      const comm::Incoming from{(c.rank() + ranks - 1) % ranks, b.data(), 77, Element::kByte};
      c.exchange({&to, 1}, {&from, 1}, "exchange");
      moved("exchange", ranks > 1 ? 77 : 0, ranks > 1 ? 77 : 0);
      c.barrier("barrier");
      moved("barrier", 0, 0);
    }));
  }
});

// Two threads of each rank use two groups of one world, at their own pace and in their own order.
const CommunicatorRegistration kTwoThreads("twoThreads", 4, [](CommunicatorTrial& t) {
  const int ranks = static_cast<int>(t.integer(2, 4));
  const Program first = drawProgram(t.seed(), ranks, 15, 2000), second = drawProgram(t.seed(), ranks, 15, 2000);
  t.expectAllFine(t.run(ranks, [&](Rank& rank) {
    Rank behind{rank.world->duplicate("behind")};
    std::exception_ptr thrown;
    std::thread thread([&] {
      flushDenormals();
      try {
        runProgram(second, behind);
      } catch (...) {
        thrown = std::current_exception();
      }
    });
    try {
      runProgram(first, rank);
    } catch (...) {
      thread.join();
      throw;
    }
    thread.join();
    if (thrown) std::rethrow_exception(thrown);
  }));
});

const CommunicatorRegistration kSplits("split", 1, [](CommunicatorTrial& t) {
  t.expectAllFine(t.run(6, [](Rank& rank) {
    const int r = rank.world->rank();
    const auto tensor = rank.world->split(r / 2, 0, "tensor");
    require(tensor->name() == "world/tensor." + std::to_string(r / 2), "a group's name is " + tensor->name());
    require(tensor->size() == 2 && tensor->rank() == r % 2, "a group has the wrong members");
    const auto reversed = rank.world->split(7, -r, "reversed");
    require(reversed->size() == 6 && reversed->rank() == 5 - r, "keys do not order a group");
    const auto some = rank.world->split(r == 3 ? -1 : 0, 0, "some");
    require((some == nullptr) == (r == 3), "a negative colour joins a group");
    const auto again = tensor->duplicate("again");
    require(again->size() == 2 && again->rank() == r % 2, "a duplicate differs");
    again->barrier("again");
  }));
});

// Every operation counts as communication, waits included (core/work_clock.h).
const CommunicatorRegistration kClock("clock", 1, [](CommunicatorTrial& t) {
  t.expectAllFine(t.run(2, [](Rank& rank) {
    Communicator& c = *rank.world;
    std::vector<float> all(8), own(4);
    float* const mine = own.data();
    const comm::Piece piece{mine, c.rank() * 16, 16};
    const comm::Share share{0, 4, 1};
    const std::pair<const char*, std::function<void()>> calls[] = {
        {"allGather", [&] { c.allGather(mine, all.data(), 4, Element::kFloat32, "gather"); }},
        {"allGatherPieces",
         [&] {
           c.allGatherPieces({&piece, 1}, all.data(), 32, "pieces");
         }},
        {"reduceScatter", [&] { c.reduceScatter(all.data(), mine, 4, "scatter"); }},
        {"reduceScatterPieces",
         [&] {
           c.reduceScatterPieces(all.data(), 8, {&share, 1}, "shares");
         }},
        {"allReduce", [&] { c.allReduce(mine, mine, 4, "sum"); }},
        {"broadcast", [&] { c.broadcast(mine, 4, Element::kFloat32, 1, "spread"); }},
        {"barrier", [&] { c.barrier("barrier"); }},
        {"split", [&] { c.duplicate("split"); }},
        {"send and receive",
         [&] {
           c.rank() == 0 ? c.receive(mine, 4, Element::kFloat32, 1, "m") : c.send(mine, 4, Element::kFloat32, 0, "m");
         }},
    };
    for (const auto& [name, call] : calls) {
      c.barrier("together");
      if (c.rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(20));
      WorkClock::begin();
      call();
      const int64_t counted = WorkClock::times().communicating;
      require(counted > (c.rank() == 0 ? 10'000'000 : 0), std::string(name) + " counts too little");
    }
  }));
});

// A rank may be late, and a group idle, for longer than the timeout: only silence counts, and only while others wait.
const CommunicatorRegistration kProgress("progress", 1, [](CommunicatorTrial& t) {
  t.expectAllFine(t.run(
      3,
      [](Rank& rank) {
        Communicator& c = *rank.world;
        c.barrier("begin");
        std::this_thread::sleep_for(std::chrono::milliseconds(900));
        if (c.rank() == 2) std::this_thread::sleep_for(std::chrono::milliseconds(100));
        c.barrier("after an idle time");
        if (c.rank() == 1) {
          for (int i = 0; i < 24; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(50));
            c.progress();
          }
        }
        c.barrier("after a long computation");
        // Rank 0 waits for 1, and 2 for 0: it has to see that 1 lives.
        const auto pair = c.split(c.rank() == 1 ? 1 : 0, 0, "pair");
        char byte = 'a';
        if (c.rank() == 1) {
          for (int i = 0; i < 24; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(50));
            c.progress();
          }
          return c.send(&byte, 1, Element::kByte, 0, "a late message");
        }
        if (c.rank() == 0) c.receive(&byte, 1, Element::kByte, 1, "a late message");
        pair->barrier("after the message");
      },
      0.5));
});

}  // namespace
}  // namespace lockstep::contracts
