// Work behind a rank's computation: in order, beside it, and ended by whatever ends the world.
#include <xmmintrin.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "comm/background.h"
#include "communicator_harness.h"
#include "core/error.h"

namespace lockstep::contracts {
namespace {

using comm::Background;
using comm::Communicator;
using comm::Element;

// The code with which a call throws; "" when it does not.
template <class Call>
std::string codeOf(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.code();
  } catch (const std::exception&) {
    return "EXCEPTION";
  }
  return "";
}

const CommunicatorRegistration kOrder("background.order", 3, [](CommunicatorTrial& t) {
  const int ranks = static_cast<int>(t.integer(1, 4));
  t.expectAllFine(t.run(ranks, [&](Rank& rank) {
    constexpr int kJobs = 40;
    _mm_setcsr(_mm_getcsr() & ~0x8040u);  // a new thread inherits it
    Background behind(rank.world->duplicate("behind"));
    std::vector<int> order;
    std::vector<float> sums(kJobs);
    std::vector<Background::Ticket> tickets;
    bool flushed = true;
    for (int i = 0; i < kJobs; ++i) {
      sums[static_cast<size_t>(i)] = static_cast<float>(i);
      tickets.push_back(behind.submit([&, i](Communicator& group) {
        flushed = flushed && (_mm_getcsr() & 0x8040) == 0x8040;
        group.allReduce(&sums[static_cast<size_t>(i)], &sums[static_cast<size_t>(i)], 1, "job." + std::to_string(i));
        order.push_back(i);
      }));
      if (i % 7 == 0) rank.world->barrier("the owner's own calls");
    }
    behind.wait(tickets[20]);
    require(order.size() > 20, "a ticket's work is not done when wait() returns");
    behind.wait(tickets[3]);
    behind.drain();
    require(order.size() == kJobs && flushed, "drain() leaves work, or denormals are not flushed");
    for (int i = 0; i < kJobs; ++i) {
      require(order[static_cast<size_t>(i)] == i, "work runs out of order");
      require(sums[static_cast<size_t>(i)] == static_cast<float>(i * ranks), "a sum is wrong");
    }
    require(codeOf([&] { behind.wait(tickets.back() + 1); }) == "TICKET_UNKNOWN", "wait() takes a ticket of nothing");
    require(behind.traffic().receivedBytes > 0 || ranks == 1, "traffic is not counted");
  }));
});

// The work of rank 0 ends only after its owner has gone on to wake rank 1, whose work it waits for.
const CommunicatorRegistration kOverlap("background.overlap", 3, [](CommunicatorTrial& t) {
  t.expectAllFine(t.run(
      2,
      [](Rank& rank) {
        Communicator& c = *rank.world;
        Background behind(c.duplicate("behind"));
        float sum = 1;
        char byte = 0;
        const auto reduce = [&](Communicator& group) { group.allReduce(&sum, &sum, 1, "behind"); };
        if (c.rank() == 0) {
          behind.submit(reduce);
          c.send(&byte, 1, Element::kByte, 1, "the owner's");
        } else {
          c.receive(&byte, 1, Element::kByte, 0, "the owner's");
          behind.submit(reduce);
        }
        behind.drain();
        require(sum == 2, "a sum is wrong");
      },
      2));
});

// Owner and work both take 0.3 s.
const CommunicatorRegistration kBeside("background.beside", 1, [](CommunicatorTrial& t) {
  t.expectAllFine(t.run(2, [](Rank& rank) {
    using std::chrono::milliseconds;
    Background behind(rank.world->duplicate("behind"));
    const auto began = std::chrono::steady_clock::now();
    for (int i = 0; i < 3; ++i) {
      behind.submit([](Communicator& group) {
        std::this_thread::sleep_for(milliseconds(100));
        group.barrier("behind");
      });
      std::this_thread::sleep_for(milliseconds(100));
    }
    behind.drain();
    require(std::chrono::steady_clock::now() - began < milliseconds(500), "work does not run beside its owner");
  }));
});

// The first error ends all ranks' work; tickets before it stay good, and what comes after does not run.
const CommunicatorRegistration kError("background.error", 3, [](CommunicatorTrial& t) {
  const auto outcomes = t.run(3, [](Rank& rank) {
    Communicator& c = *rank.world;
    Background behind(c.duplicate("behind"));
    const bool faulty = c.rank() == 1;
    bool ran = false;
    const auto fine = behind.submit([](Communicator& group) { group.barrier("fine"); });
    behind.wait(fine);
    c.barrier("all have passed");
    const auto failing = behind.submit([&](Communicator& group) {
      if (faulty) throw std::runtime_error("planted");
      group.barrier("failing");
    });
    const auto after = behind.submit([&](Communicator&) { ran = true; });
    const std::string code = faulty ? "EXCEPTION" : "RANK_ABORTED";
    require(codeOf([&] { behind.wait(after); }) == code, "a later ticket does not throw the first error");
    require(codeOf([&] { behind.wait(failing); }) == code, "wait() does not throw the error of its work");
    require(codeOf([&] { behind.wait(fine); }).empty(), "a ticket before the error throws it");
    require(!ran, "work runs after an error");
    require(codeOf([&] { c.barrier("later"); }) == "RANK_ABORTED", "an error behind leaves the world alive");
    behind.drain();
  });
  t.expectOne(outcomes, 0, "RANK_ABORTED", {"aborted by rank 1", "planted"});
  t.expectOne(outcomes, 1, "EXCEPTION", {"planted"});
  t.expectOne(outcomes, 2, "RANK_ABORTED", {"aborted by rank 1", "planted"});
});

// Destroyed while its work waits for a rank that does not come: after the timeout, or at once when the world dies.
const CommunicatorRegistration kDestroyed("background.destroyed", 4, [](CommunicatorTrial& t) {
  constexpr double kTimeout = 0.5;
  const bool aborted = t.integer(0, 1) == 1;
  const auto outcomes = t.run(
      3,
      [&](Rank& rank) {
        Communicator& c = *rank.world;
        auto behind = std::make_unique<Background>(c.duplicate("behind"));
        if (c.rank() == 2) {
          rank.mark();
          std::this_thread::sleep_for(std::chrono::milliseconds(aborted ? 50 : 1200));
          if (aborted) behind->abort("closing");
          return;
        }
        for (int i = 0; i < 3; ++i) behind->submit([](Communicator& group) { group.barrier("missing"); });
        behind = nullptr;
      },
      aborted ? 60 : kTimeout);
  t.expectAllFine(outcomes);
  for (int r = 0; r < 2; ++r) {
    const double after = outcomes[static_cast<size_t>(r)].endedSeconds - outcomes[2].markedSeconds;
    const double least = aborted ? 0 : 0.9 * kTimeout, most = aborted ? 1 : kTimeout + 1;
    if (after < least || after > most)
      t.fail("rank " + std::to_string(r) + " ended after " + std::to_string(after) + " s");
  }
});

// A rank that dies in the foreground ends the work of the others, and its own.
const CommunicatorRegistration kForeground("background.foreground", 3, [](CommunicatorTrial& t) {
  const auto outcomes = t.run(3, [](Rank& rank) {
    Communicator& c = *rank.world;
    Background behind(c.duplicate("behind"));
    if (c.rank() != 0) behind.submit([](Communicator& group) { group.barrier("behind"); });
    if (c.rank() == 0) {
      rank.mark();
      c.abort("planted");
    }
    behind.drain();
    if (c.rank() == 0) c.barrier("later");
  });
  t.expectAll(outcomes, "RANK_ABORTED", {"aborted by rank 0", "planted"});
  for (const Outcome& outcome : outcomes) {
    if (outcome.endedSeconds - outcomes[0].markedSeconds > 1) t.fail("a rank ended late: " + outcome.message);
  }
});

}  // namespace
}  // namespace lockstep::contracts
